"""The names of tasks and mixtures, and what they are made of.

A task's name is CORPUS_FAMILY[_FORMAT], as `amazon_beauty_retrieval` or `amazon_beauty_mim_token`; a
mixture's is CORPUS_MIXTURE[_FORMAT], as `amazon_beauty_retrieval_aligned_token`. Of several corpora, joined by dots,
every family and mixture is a mixture, as `amazon_beauty.amazon_toys_retrieval_aligned`.
"""

import pathlib
from typing import NamedTuple

from recalign_jax.corpus.catalog import ITEM_FORMATS
from recalign_jax.corpus.corpus import corpora, data_dir_or_default, is_rated
from recalign_jax.errors import InputError, did_you_mean

DEFAULT_FORMAT = "title"
# Of several corpora, other formats would give different items the same number.
JOINT_FORMATS = ("title",)
FAMILIES = ("retrieval", "ranking", "rating", "rating_random", "mim", "mlm", "bpr")
RATED_FAMILIES = ("rating", "rating_random")
# mixture -> the families in it; those that a corpus can't give are left out of `all`.
MIXTURES = {
    "retrieval_aligned": ("retrieval", "mim", "mlm"),
    "retrieval_mim": ("retrieval", "mim"),
    "retrieval_mlm": ("retrieval", "mlm"),
    "ranking_aligned": ("ranking", "bpr"),
    "rating_aligned": ("rating", "bpr"),
    "all": ("retrieval", "ranking", "rating", "mim", "mlm", "bpr"),
}


class TaskName(NamedTuple):
    """A name, taken apart."""

    corpora: tuple[str, ...]
    base: str  # a family or a mixture
    item_format: str

    def __str__(self) -> str:
        return f"{'.'.join(self.corpora)}_{with_format(self.base, self.item_format)}"

    def of(self, corpus: str, base: str) -> str:
        """The name of another family or mixture in the same format."""
        return str(TaskName((corpus,), base, self.item_format))


def with_format(name: str, item_format: str) -> str:
    """Appends the item format to a task's name, unless it is the default."""
    return name if item_format == DEFAULT_FORMAT else f"{name}_{item_format}"


def families(rated: bool) -> tuple[str, ...]:
    """The families that a corpus gives."""
    return tuple(family for family in FAMILIES if rated or family not in RATED_FAMILIES)


def members(base: str) -> tuple[str, ...]:
    """The families in a mixture; of a family itself."""
    return MIXTURES.get(base, (base,))


def mixtures(rated: bool) -> dict[str, tuple[str, ...]]:
    """The mixtures that a corpus gives, and the families in each."""
    given = families(rated)
    found = {name: tuple(f for f in members if f in given) for name, members in MIXTURES.items()}
    return {name: members for name, members in found.items() if rated or name != "rating_aligned"}


def names_for(corpus: str, rated: bool) -> list[str]:
    """Every task and mixture of a corpus."""
    bases = (*families(rated), *mixtures(rated))
    return [f"{corpus}_{with_format(base, item_format)}" for base in bases for item_format in ITEM_FORMATS]


def split_name(name: str, data_dir: str | pathlib.Path | None) -> TaskName:
    """Reads a task's or mixture's name.

    Raises:
      InputError: when no prepared corpus or no task has such a name.
    """
    root = data_dir_or_default(data_dir)
    prepared = corpora(root)
    *others, last = name.split(".")
    for corpus in sorted(prepared, key=len, reverse=True):
        if not last.startswith(corpus + "_"):
            continue
        for other in others:
            if other not in prepared:
                raise InputError(f"{name!r}: no corpus {other!r} in {root}.{did_you_mean(other, prepared)}")
        rated = all(is_rated(root / part) for part in (*others, corpus))
        for base in (*families(rated), *mixtures(rated)):
            for item_format in ITEM_FORMATS:
                if last in (f"{corpus}_{base}_{item_format}", f"{corpus}_{with_format(base, item_format)}"):
                    return _checked(TaskName((*others, corpus), base, item_format))
        if last.startswith(f"{corpus}_rating") and not rated:
            unrated = next(part for part in (*others, corpus) if not is_rated(root / part))
            raise InputError(
                f"Corpus {unrated!r} has no ratings, so there is no {name!r}. Prepare it from interactions with a "
                "rating column."
            )
        raise InputError(f"Unknown task {name!r} of corpus {corpus!r}.{did_you_mean(last, names_for(corpus, rated))}")
    known = [task for corpus in prepared for task in names_for(corpus, is_rated(root / corpus))]
    raise InputError(
        f"Unknown task {name!r}: no prepared corpus in {root} begins its name."
        f"{did_you_mean(name, known)} Prepared: {', '.join(prepared) or 'none (see recalign prepare)'}."
    )


def _checked(name: TaskName) -> TaskName:
    if len(name.corpora) > 1 and name.item_format not in JOINT_FORMATS:
        raise InputError(
            f"Several corpora can't be mixed in format {name.item_format!r}: different items would have the same "
            f"number. Use {str(name._replace(item_format=DEFAULT_FORMAT))!r}."
        )
    if len(set(name.corpora)) < len(name.corpora):
        raise InputError(f"{str(name)!r} names a corpus twice.")
    return name

"""What a task is made of, and how its name is read. Needs neither SeqIO nor TensorFlow.

A task's name is CORPUS_FAMILY[_FORMAT], as `amazon_beauty_retrieval` or `amazon_beauty_mim_token`; a
mixture's is CORPUS_FAMILY_aligned[_FORMAT].
"""

import dataclasses
import functools
import pathlib

import gin

from recalign_jax.corpus.catalog import ITEM_FORMATS, Catalog, build_catalog
from recalign_jax.corpus.corpus import Corpus, corpora, data_dir_or_default, load_corpus
from recalign_jax.errors import InputError, did_you_mean
from seqio_tasks import prompts, vocabulary
from seqio_tasks.vocabulary import Vocabulary

DEFAULT_FORMAT = "title"
FAMILIES = ("retrieval", "mim")
# mixture -> the families in it
MIXTURES = {"retrieval_aligned": ("retrieval", "mim")}


@gin.configurable
@dataclasses.dataclass(frozen=True)
class TaskOptions:
    """Choices that the paper leaves open, one set for all tasks of a run.

    Attributes:
      history_length: most items of a user's past in a prompt; the newest stay.
      mim_mask_rate: probability that an item of the window is masked; at least one always is.
      max_item_tokens: longest token sequence of an item, end of sequence counted.
      mixture_maximum: number of examples above which a task's mixing rate no longer grows; None for no cap.
      mixture_temperature: T of rate = examples ** (1 / T).
    """

    history_length: int = 20
    mim_mask_rate: float = 0.2
    max_item_tokens: int = 48
    mixture_maximum: int | None = None
    mixture_temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.history_length < 1:
            raise InputError(f"HISTORY_LENGTH is {self.history_length}; a prompt needs at least one item.")
        if self.max_item_tokens < 2:
            raise InputError(f"MAX_ITEM_TOKENS is {self.max_item_tokens}; a token and the end of sequence take 2.")


@dataclasses.dataclass(frozen=True)
class TaskSpec:
    """All that `samples.render` needs: a family over a corpus, in an item format, with a vocabulary."""

    family: str
    corpus: Corpus
    catalog: Catalog
    vocabulary: Vocabulary
    options: TaskOptions

    @property
    def name(self) -> str:
        return self.corpus.name + "_" + with_format(self.family, self.catalog.item_format)

    @property
    def num_tokens(self) -> int:
        """Number of entries of the vocabulary, item tokens included."""
        return self.vocabulary.num_tokens + (self.corpus.num_items if self.catalog.item_format == "token" else 0)


def with_format(name: str, item_format: str) -> str:
    """Appends the item format to a task's name, unless it is the default."""
    return name if item_format == DEFAULT_FORMAT else f"{name}_{item_format}"


def names_for(corpus: str) -> list[str]:
    """Every task and mixture of a corpus."""
    bases = (*FAMILIES, *MIXTURES)
    return [f"{corpus}_{with_format(base, item_format)}" for base in bases for item_format in ITEM_FORMATS]


def split_name(name: str, data_dir: str | pathlib.Path | None) -> tuple[str, str, str]:
    """Reads a task's or mixture's name: (corpus, family or mixture, item format).

    Raises:
      InputError: when no prepared corpus or no task has such a name.
    """
    prepared = corpora(data_dir_or_default(data_dir))
    for corpus in sorted(prepared, key=len, reverse=True):
        if not name.startswith(corpus + "_"):
            continue
        for base in (*FAMILIES, *MIXTURES):
            for item_format in ITEM_FORMATS:
                if name in (f"{corpus}_{base}_{item_format}", f"{corpus}_{with_format(base, item_format)}"):
                    return corpus, base, item_format
        if name.startswith(f"{corpus}_rating") and load_corpus(corpus, data_dir).ratings is None:
            raise InputError(
                f"Corpus {corpus!r} has no ratings, so there is no {name!r}. Prepare it from interactions with a "
                "rating column."
            )
        raise InputError(f"Unknown task {name!r} of corpus {corpus!r}.{did_you_mean(name, names_for(corpus))}")
    known = [task for corpus in prepared for task in names_for(corpus)]
    raise InputError(
        f"Unknown task {name!r}: no prepared corpus in {data_dir_or_default(data_dir)} begins its name."
        f"{did_you_mean(name, known)} Prepared: {', '.join(prepared) or 'none (see recalign prepare)'}."
    )


@functools.lru_cache(maxsize=8)
def _catalog(corpus: Corpus, item_format: str, words: Vocabulary, max_item_tokens: int) -> Catalog:
    return build_catalog(corpus, item_format, words.encode, words.num_tokens, max_item_tokens)


def make_spec(corpus: Corpus, family: str, item_format: str, words: Vocabulary, options: TaskOptions) -> TaskSpec:
    """Builds a task over a loaded corpus; catalogues are shared between tasks.

    Raises:
      InputError: when the vocabulary can't write the prompts.
    """
    vocabulary.check_pieces(words, prompts.literals())
    catalog = _catalog(corpus, item_format, words, options.max_item_tokens)
    return TaskSpec(family, corpus, catalog, words, options)


def check_family(spec: TaskSpec, family: str) -> None:
    """Raises InputError when a task is of another family than a command needs."""
    if spec.family != family:
        fitting = f"{spec.corpus.name}_{with_format(family, spec.catalog.item_format)}"
        raise InputError(f"TASK_NAME {spec.name} is a {spec.family} task; {family} is needed here, as {fitting}.")


def task_spec(name: str, vocabulary_path: str, data_dir: str | pathlib.Path | None) -> TaskSpec:
    """The task of that name, with the options that gin holds.

    Raises:
      InputError: for an unknown name (a mixture's too), or a vocabulary that doesn't fit.
    """
    corpus, family, item_format = split_name(name, data_dir)
    if family in MIXTURES:
        raise InputError(f"{name!r} is a mixture; a single task is needed here, as {names_for(corpus)[0]!r}.")
    return make_spec(
        load_corpus(corpus, data_dir), family, item_format, vocabulary.load(vocabulary_path), TaskOptions()
    )

"""Which items of a catalogue may be recommended at all: an allow list, a deny list, categories."""

import pathlib
from collections.abc import Sequence

import numpy as np

from recalign_jax import terminal
from recalign_jax.corpus.corpus import Corpus
from recalign_jax.corpus.records import RowError
from recalign_jax.corpus.sources.lines import decode, lines_of
from recalign_jax.errors import InputError, did_you_mean


def permitted_items(
    corpus: Corpus, allow: str | None = None, deny: str | None = None, categories: Sequence[str] = ()
) -> np.ndarray | None:
    """The items that pass all filters: int32 ascending, or None where there is no filter.

    Args:
      corpus: the corpus.
      allow: path of a text file with an item id a line: only these.
      deny: path of such a file: none of these.
      categories: names of categories: only items that are in one of them.

    Raises:
      InputError: a file can't be read, a category that no item has, or nothing passes.
    """
    if allow is None and deny is None and not categories:
        return None
    passes = np.ones(corpus.num_items, bool)
    if allow is not None:
        passes &= _listed(corpus, "ALLOW", allow)
    if deny is not None:
        passes &= ~_listed(corpus, "DENY", deny)
    if categories:
        passes &= _in_categories(corpus, categories)
    if not passes.any():
        raise InputError(f"No item of {corpus.name} passes the filters ALLOW, DENY and CATEGORY.")
    return np.flatnonzero(passes).astype(np.int32)


def _listed(corpus: Corpus, macro: str, file: str) -> np.ndarray:
    """Which items a file names: bool [I]."""
    path = pathlib.Path(file)
    ids = corpus.item_numbers
    listed, unknown = np.zeros(corpus.num_items, bool), []
    for line, raw in lines_of(path, watched=False):
        try:
            if isinstance(raw, RowError):
                raise raw
            name = decode(raw, "utf-8").strip()
        except RowError as error:
            raise InputError(f"{macro} {path}, line {line}: {error}.") from None
        if name in ids:
            listed[ids[name]] = True
        elif name:
            unknown.append(name)
    if unknown and not listed.any() and macro == "ALLOW":
        raise InputError(f"{macro} {path}: {corpus.name} has none of its item ids; the first is {unknown[0]!r}.")
    if unknown:
        terminal.warn(f"{macro} {path}: {corpus.name} lacks {len(unknown)} of its items, as {unknown[0]!r}.")
    return listed


def _in_categories(corpus: Corpus, categories: Sequence[str]) -> np.ndarray:
    having = [corpus.item_text(item).categories for item in range(corpus.num_items)]
    known = {name for names in having for name in names}
    for name in categories:
        if name not in known:
            raise InputError(f"CATEGORY: no item of {corpus.name} is in {name!r}.{did_you_mean(name, known)}")
    wanted = set(categories)
    return np.asarray([not wanted.isdisjoint(names) for names in having])

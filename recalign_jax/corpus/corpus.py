"""A prepared corpus, as every other room sees it: sequences of item numbers, and the text of the items."""

import dataclasses
import functools
import hashlib
import os
import pathlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from recalign_jax import errors, files
from recalign_jax.corpus import datasets, holdout, storage
from recalign_jax.corpus.records import Item, ItemText

# A task is named CORPUS_TASK[_FORMAT], so no name of a corpus may end like one.
_RESERVED_SUFFIXES = (
    *("_retrieval", "_ranking", "_rating", "_mim", "_mlm", "_bpr", "_aligned", "_all"),
    *("_title", "_id", "_token", "_random"),
)
# Folders of the data directory that aren't corpora.
VOCABULARIES = "vocabularies"
_OTHER_FOLDERS = (VOCABULARIES, "downloads")


@dataclass(frozen=True, eq=False)
class Corpus:
    """Users are 0 to U - 1 and items 0 to I - 1, numbered at random. Arrays are memory-mapped and read-only.

    Attributes:
      name: that of its folder; also the first part of the names of its tasks.
      directory: where it lies.
      metadata: `corpus.json`: sources, options, counts. Its `name` is the one that it was prepared under.
      fingerprint: equal for two corpora with the same arrays, item ids and item text.
      num_items: I.
      user_offsets: int64 [U + 1]; user u has the interactions `user_offsets[u]:user_offsets[u + 1]`.
      items: int32 [N], in time order within a user.
      timestamps: int64 [N], in the unit of the source.
      ratings: float32 [N], or None if the corpus has none.
      more_items: the last items, which nobody has met and which are not in the directory; see `with_items`.
    """

    name: str
    directory: pathlib.Path
    metadata: dict[str, Any]
    fingerprint: str
    num_items: int
    user_offsets: np.ndarray
    items: np.ndarray
    timestamps: np.ndarray
    ratings: np.ndarray | None
    more_items: tuple[Item, ...] = ()

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles as the directory: worker processes map the same files instead of copying the arrays."""
        return _reopened, (self.directory, self.metadata["fingerprint"], self.more_items)

    @property
    def num_users(self) -> int:
        return len(self.user_offsets) - 1

    @property
    def num_interactions(self) -> int:
        return len(self.items)

    def sequence(self, user: int) -> np.ndarray:
        """Returns all items of a user, oldest first: int32 view."""
        return self.items[self.user_offsets[user] : self.user_offsets[user + 1]]

    def training_sequence(self, user: int) -> np.ndarray:
        """Returns the items of a user that are for training, oldest first: int32 view."""
        start = self.user_offsets[user]
        return self.items[start : start + self.training_lengths[user]]

    def history(self, user: int, split: str) -> np.ndarray:
        """Returns the items before the target of "validation" or "test", oldest first: int32 view."""
        start, end = self.user_offsets[user], self.user_offsets[user + 1]
        return self.items[start : start + holdout.target_positions(end - start, split)]

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """Number of interactions of each user: int64 [U]."""
        return np.diff(self.user_offsets)

    @functools.cached_property
    def training_lengths(self) -> np.ndarray:
        """Number of interactions of each user that are for training, from the oldest on: int64 [U]."""
        return holdout.training_lengths(self.lengths)

    @functools.cached_property
    def evaluation_users(self) -> np.ndarray:
        """The users who have a validation and a test target: int64 [E], ascending."""
        return np.flatnonzero(self.lengths >= holdout.MIN_INTERACTIONS)

    def targets(self, split: str) -> np.ndarray:
        """Returns the target of "validation" or "test" for each of `evaluation_users`: int32 [E]."""
        users = self.evaluation_users
        return self.items[self.user_offsets[users] + holdout.target_positions(self.lengths[users], split)]

    @property
    def in_training(self) -> np.ndarray:
        """Which interactions are for training: bool [N]."""
        position = np.arange(self.num_interactions) - np.repeat(self.user_offsets[:-1], self.lengths)
        return position < np.repeat(self.training_lengths, self.lengths)

    @functools.cached_property
    def training_popularity(self) -> np.ndarray:
        """How often each item occurs in the training parts of all users: int64 [I]."""
        return np.bincount(self.items[self.in_training], minlength=self.num_items)

    @functools.cached_property
    def num_rating_values(self) -> int:
        """How many different ratings there are; 0 without ratings."""
        return 0 if self.ratings is None else len(np.unique(self.ratings))

    @functools.cached_property
    def _item_records(self) -> tuple[list[str], list[ItemText]]:
        ids, texts = datasets.read_items(self.directory)
        self.check_not_replaced()
        return [*ids, *(item.item_id for item in self.more_items)], [*texts, *(item.text for item in self.more_items)]

    @functools.cached_property
    def item_numbers(self) -> dict[str, int]:
        """The number of each item by the id that the source has for it."""
        return {item_id: item for item, item_id in enumerate(self._item_records[0])}

    @functools.cached_property
    def _user_ids(self) -> list[str]:
        user_ids = datasets.read_user_ids(self.directory)
        self.check_not_replaced()
        return user_ids

    def item_text(self, item: int) -> ItemText:
        """Returns the text of an item. The first call reads the text of all items."""
        return self._item_records[1][item]

    def item_source_id(self, item: int) -> str:
        """Returns the id that the source has for an item."""
        return self._item_records[0][item]

    def numbering(self, count: int) -> str:
        """Returns "COUNT HASH" of the ids of the first `count` items: equal where their numbers are the same items."""
        ids = "\0".join(self._item_records[0][:count])
        return f"{count} {hashlib.sha256(ids.encode()).hexdigest()}"

    def user_source_id(self, user: int) -> str:
        """Returns the id that the source has for a user. The first call reads the ids of all users."""
        return self._user_ids[user]

    def check_not_replaced(self) -> None:
        """Raises InputError if another corpus lies in the directory now: what is read of it has other numbers."""
        if storage.read_metadata(self.directory)["fingerprint"] != self.metadata["fingerprint"]:
            raise _replaced(self.directory)


def load_corpus(name: str, data_dir: str | os.PathLike[str] | None = None) -> Corpus:
    """Opens the corpus DATA_DIR/NAME. Raises InputError if it isn't there or cannot be read.

    Args:
      name: of the corpus.
      data_dir: see `data_dir_or_default`.
    """
    root = data_dir_or_default(data_dir)
    known = corpora(root)
    if name not in known:
        if (root / name / "corpus.json").is_file():
            check_name(name)
        raise errors.InputError(
            f"No corpus {name!r} in {root}. Prepared there: {', '.join(known) or 'none'}."
            f"{errors.did_you_mean(name, known)} Build one with `recalign prepare`."
        )
    return read_corpus(root / name)


def read_corpus(directory: str | os.PathLike[str]) -> Corpus:
    """Opens the corpus that lies in a directory, under the name of that directory: a copy of a corpus is another one.

    Raises:
      InputError: it cannot be read, was replaced meanwhile, or the name of the directory can't be that of a corpus.
    """
    directory = pathlib.Path(directory)
    name = check_name(pathlib.Path(os.path.abspath(directory)).name)  # of a link, its own name
    metadata = storage.read_metadata(directory)
    corpus = Corpus(
        name=name,
        directory=directory,
        metadata=metadata,
        fingerprint=metadata["fingerprint"],
        num_items=metadata["counts"]["items"],
        user_offsets=storage.read_array(directory, "user_offsets"),
        items=storage.read_array(directory, "items"),
        timestamps=storage.read_array(directory, "timestamps"),
        ratings=storage.read_array(directory, "ratings") if is_rated(directory) else None,
    )
    corpus.check_not_replaced()
    lengths = {len(array) for array in (corpus.items, corpus.timestamps, corpus.ratings) if array is not None}
    if lengths != {int(corpus.user_offsets[-1])}:
        raise errors.InputError(f"The arrays of {directory} do not belong together. Prepare the corpus again.")
    return corpus


def with_items(corpus: Corpus, items: Sequence[Item]) -> Corpus:
    """The corpus with new items behind its own, which nobody has met; on disk nothing changes.

    Args:
      corpus: the corpus.
      items: with ids that it doesn't have.
    """
    if not items:
        return corpus
    return dataclasses.replace(
        corpus,
        num_items=corpus.num_items + len(items),
        fingerprint=hashlib.sha256(f"{corpus.fingerprint} {items!r}".encode()).hexdigest(),
        more_items=(*corpus.more_items, *items),
    )


def _reopened(directory: pathlib.Path, fingerprint: str, more_items: tuple[Item, ...]) -> Corpus:
    corpus = read_corpus(directory)
    if corpus.fingerprint != fingerprint:
        raise _replaced(directory)
    return with_items(corpus, more_items)


def _replaced(directory: pathlib.Path) -> errors.InputError:
    return errors.InputError(f"{directory} was replaced while in use. Start the command again.")


def is_rated(directory: pathlib.Path) -> bool:
    """Returns whether the interactions of the corpus in a directory have ratings."""
    return (directory / "arrays" / "ratings.npy").is_file()


def corpora(data_dir: pathlib.Path) -> list[str]:
    """Returns the names of the corpora in a data directory, sorted. A copy beside them, as `beauty.old`, is none."""
    names = (path.parent.name for path in data_dir.glob("[a-z0-9_]*/corpus.json"))
    return sorted(name for name in names if not _objection(name))


def check_name(name: str) -> str:
    """Returns the name of a corpus, or raises InputError if it cannot be one."""
    if objection := _objection(name):
        raise errors.InputError(f"{name!r} cannot be a corpus: {objection}.")
    return name


def _objection(name: str) -> str:
    """Why this cannot be the name of a corpus; an empty text if it can."""
    if not re.fullmatch(r"[a-z0-9_]+", name):
        return "use small letters, digits and underscores"
    if name in _OTHER_FOLDERS:
        return f"the data directory keeps {name} there"
    for suffix in _RESERVED_SUFFIXES:
        if f"_{name}".endswith(suffix):
            return f"tasks are named CORPUS_TASK, so no corpus may end in {suffix!r}"
    return ""


def data_dir_or_default(data_dir: str | os.PathLike[str] | None) -> pathlib.Path:
    """Returns the directory that holds the corpora: the argument, $RECALIGN_DATA_DIR or ~/recalign_data."""
    given = os.fspath(data_dir or os.environ.get("RECALIGN_DATA_DIR") or "~/recalign_data")
    return files.local_folder("The folder of corpora", given).expanduser()

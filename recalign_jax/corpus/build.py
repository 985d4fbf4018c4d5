"""From a stream of interactions to numbered, cleaned and ordered arrays. Pure array code, no files.

1. Of several interactions of a user with the same item the earliest is kept (of the same time: the first read).
2. k-core: users and items with fewer than N interactions go, again and again, until none is left.
3. Users and items are numbered by a seeded random permutation of their sorted ids, so that a number says nothing
   about the id, the time or the place in the file.
4. Each user's interactions are put in order of (timestamp, order in the file), or, for `tie_break="shuffle"`, of
   (timestamp, a seeded random key): where many share a timestamp, the order of a file can give targets away.

A corpus is extended by the same steps: its own interactions come first in the log, stay whatever comes after them,
and keep their numbers and their order. Building one from nothing is extending the empty corpus.
"""

import array
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from recalign_jax import errors
from recalign_jax.corpus.records import Interaction

TIE_BREAKS = ("file", "shuffle")
# Streams of random numbers that must not depend on each other.
_USERS, _ITEMS, _TIES = range(3)


class Interactions(NamedTuple):
    """Interactions in the order of the file. Users and items are positions in the ids, which are all different."""

    users: np.ndarray  # int32 [N]
    items: np.ndarray  # int32 [N]
    timestamps: np.ndarray  # int64 [N]
    ratings: np.ndarray | None  # float32 [N]
    user_ids: list[str]
    item_ids: list[str]

    def take(self, kept: np.ndarray) -> "Interactions":
        """Returns those at a mask bool [N] or at positions; the ids stay."""
        ratings = None if self.ratings is None else self.ratings[kept]
        return self._replace(
            users=self.users[kept], items=self.items[kept], timestamps=self.timestamps[kept], ratings=ratings
        )


class Sequences(NamedTuple):
    """A corpus in numbers: user u has the interactions `offsets[u]:offsets[u + 1]`, oldest first."""

    offsets: np.ndarray  # int64 [U + 1]
    items: np.ndarray  # int32 [N]
    timestamps: np.ndarray  # int64 [N]
    ratings: np.ndarray | None  # float32 [N]
    user_ids: list[str]  # [U]
    item_ids: list[str]  # [I]


EMPTY = Sequences(np.zeros(1, np.int64), np.zeros(0, np.int32), np.zeros(0, np.int64), None, [], [])


def collect(stream: Iterable[Interaction]) -> Interactions:
    """Reads the stream into arrays (20 bytes an interaction). Raises InputError if only some have a rating."""
    users, items, timestamps, ratings = array.array("i"), array.array("i"), array.array("q"), array.array("f")
    user_numbers: dict[str, int] = {}
    item_numbers: dict[str, int] = {}
    for user_id, item_id, timestamp, rating in stream:
        users.append(user_numbers.setdefault(user_id, len(user_numbers)))
        items.append(item_numbers.setdefault(item_id, len(item_numbers)))
        timestamps.append(timestamp)
        if rating is not None:
            ratings.append(rating)
    return _log(users, items, timestamps, ratings, user_numbers, item_numbers)


def join(parts: Iterable[Interactions]) -> Interactions:
    """Returns the interactions of all parts, one part after the other, as one log.

    The ids of the first part stay at their positions; those that later parts add follow in the order of their ids.
    Raises InputError if only some parts have ratings.
    """
    users, items, timestamps, ratings = array.array("i"), array.array("i"), array.array("q"), array.array("f")
    user_numbers: dict[str, int] = {}
    item_numbers: dict[str, int] = {}
    for part in parts:
        users.frombytes(_continued(user_numbers, part.user_ids)[part.users].tobytes())
        items.frombytes(_continued(item_numbers, part.item_ids)[part.items].tobytes())
        timestamps.frombytes(part.timestamps.tobytes())
        if part.ratings is not None:
            ratings.frombytes(part.ratings.tobytes())
    return _log(users, items, timestamps, ratings, user_numbers, item_numbers)


def log_of(sequences: Sequences) -> Interactions:
    """Returns the interactions of a corpus, user by user, with its numbers."""
    lengths = np.diff(sequences.offsets)
    return Interactions(
        users=np.repeat(np.arange(len(lengths), dtype=np.int32), lengths),
        items=sequences.items,
        timestamps=sequences.timestamps,
        ratings=sequences.ratings,
        user_ids=sequences.user_ids,
        item_ids=sequences.item_ids,
    )


def first_of_each_pair(users: np.ndarray, items: np.ndarray, timestamps: np.ndarray, num_kept: int = 0) -> np.ndarray:
    """Returns bool [N], true at the earliest (of the same time: the first) interaction of each (user, item).

    Args:
      users: int32 [N].
      items: int32 [N].
      timestamps: int64 [N].
      num_kept: so many from the start are different pairs that stay, also where a later one is of an earlier time.
    """
    timestamps = timestamps.copy()
    timestamps[:num_kept] = np.iinfo(np.int64).min
    order = np.lexsort((timestamps, items, users))  # stable, so ties stay in the order of the file
    users, items = users[order], items[order]
    first = np.ones(len(order), bool)
    first[1:] = (users[1:] != users[:-1]) | (items[1:] != items[:-1])
    kept = np.empty_like(first)
    kept[order] = first
    return kept


def k_core(users: np.ndarray, items: np.ndarray, k: int) -> np.ndarray:
    """Returns bool [N]: the largest subset in which every user and every item has at least k interactions."""
    kept = np.ones(len(users), bool)
    while True:
        enough_users = np.bincount(users[kept], minlength=users.max(initial=0) + 1) >= k
        enough_items = np.bincount(items[kept], minlength=items.max(initial=0) + 1) >= k
        smaller = kept & enough_users[users] & enough_items[items]
        if smaller.sum() == kept.sum():
            return kept
        kept = smaller


def shuffled(ids: Iterable[str], seed: int, stream: int, extensions: int = 0) -> list[str]:
    """Returns the ids in an order that depends on nothing but the set of ids and the three numbers."""
    in_order = sorted(ids)
    return [in_order[i] for i in np.random.default_rng([seed, stream, extensions]).permutation(len(in_order))]


def sequences(
    log: Interactions,
    other_item_ids: Iterable[str],
    tie_break: str,
    seed: int,
    before: Sequences = EMPTY,
    extensions: int = 0,
) -> Sequences:
    """Numbers users and items at random and orders the interactions of each user by time.

    Args:
      log: the interactions to keep; ids that no interaction refers to are left out. It begins with those of `before`
        (see `log_of`), whose users and items keep their numbers; of the same time they stay before the others.
      other_item_ids: items without interactions, to be numbered among the others.
      tie_break: one of TIE_BREAKS.
      seed: not negative.
      before: the corpus that is extended.
      extensions: how many times it will then have been; each has its own random numbers.
    """
    known_users, known_items, known = len(before.user_ids), len(before.item_ids), len(before.items)
    new_users = (log.user_ids[number] for number in np.unique(log.users) if number >= known_users)
    new_items = {log.item_ids[number] for number in np.unique(log.items) if number >= known_items}
    user_ids = [*before.user_ids, *shuffled(new_users, seed, _USERS, extensions)]
    item_ids = [*before.item_ids, *shuffled(new_items.union(other_item_ids), seed, _ITEMS, extensions)]
    users = _renumber(log.user_ids, user_ids)[log.users]
    ties = np.arange(len(users))
    if tie_break == "shuffle":
        ties[known:] = known + np.random.default_rng([seed, _TIES, extensions]).permutation(len(users) - known)
    order = np.lexsort((ties, log.timestamps, users))
    offsets = np.zeros(len(user_ids) + 1, np.int64)
    np.cumsum(np.bincount(users, minlength=len(user_ids)), out=offsets[1:])
    return Sequences(
        offsets=offsets,
        items=_renumber(log.item_ids, item_ids)[log.items][order],
        timestamps=log.timestamps[order],
        ratings=None if log.ratings is None else log.ratings[order],
        user_ids=user_ids,
        item_ids=item_ids,
    )


def _log(
    users: array.array,
    items: array.array,
    timestamps: array.array,
    ratings: array.array,
    user_numbers: dict[str, int],
    item_numbers: dict[str, int],
) -> Interactions:
    if len(ratings) not in (0, len(users)):
        raise errors.InputError(f"Only {len(ratings)} of {len(users)} interactions have a rating. Give all or none.")
    return Interactions(
        np.asarray(users, np.int32),
        np.asarray(items, np.int32),
        np.asarray(timestamps, np.int64),
        np.asarray(ratings, np.float32) if ratings else None,
        list(user_numbers),
        list(item_numbers),
    )


def _continued(numbers: dict[str, int], ids: list[str]) -> np.ndarray:
    """Gives ids that have none the next numbers; returns the number of each: int32 [len(ids)]."""
    return np.fromiter((numbers.setdefault(name, len(numbers)) for name in ids), np.int32, len(ids))


def _renumber(old: list[str], new: list[str]) -> np.ndarray:
    """Returns int32 [len(old)]: the position in `new` of each id in `old`, -1 where it isn't there."""
    position = {name: number for number, name in enumerate(new)}
    return np.fromiter((position.get(name, -1) for name in old), np.int32, len(old))

"""Which examples there are: from (family, split, index) to users and items. Nothing here is text, or random.

This is where a leak between splits would be, so the rules stand together: training examples take from
`corpus.training_sequence` only, held-out ones end with their split's target.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from recalign_jax.corpus import holdout
from recalign_jax.corpus.corpus import Corpus


class Query(NamedTuple):
    """What a user had, and what came next."""

    user: int  # -1 for one who is not of the corpus
    history: np.ndarray  # int32 [h], item numbers, oldest first, not cut
    target: int


# Ranks items for queries, none of which is answered with the items excluded for it. Yields parts in any order:
# (which queries [b], items int32 [b, top_k] padded with -1, scores float32 [b, top_k]).
Ranked = Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]
Recommend = Callable[[Sequence[Query], Sequence[np.ndarray]], Ranked]

# Scores the candidates of queries, int32 [n, C] padded with -1: the likelier next, the higher. Yields parts in any
# order: (which queries [b], scores float32 [b, C], -inf where there is no candidate).
Scored = Iterator[tuple[np.ndarray, np.ndarray]]
ScoreCandidates = Callable[[Sequence[Query], np.ndarray], Scored]


class RatedQuery(NamedTuple):
    """What a user had and how it was rated, and the item whose rating is asked for."""

    user: int
    history: np.ndarray  # int32 [h], oldest first, not cut
    ratings: np.ndarray  # float32 [h]
    target: int
    rating: float


# Predicts the ratings that are asked for. Yields parts in any order: (which queries [b], the expected rating
# float32 [b], the most likely rating float32 [b]).
Predicted = Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]
PredictRatings = Callable[[Sequence[RatedQuery]], Predicted]


def next_item(corpus: Corpus, split: str, index: int, prefixes: bool = True) -> Query:
    """The history of a user and the item after it.

    Args:
      corpus: the corpus.
      split: one of `holdout.SPLITS`.
      index: 0 .. num_next_items - 1.
      prefixes: whether every prefix of a training part is an example, or only the longest.
    """
    user, position = _place(corpus, split, index, prefixes)
    sequence = corpus.sequence(user)
    return Query(user, sequence[:position], int(sequence[position]))


def num_next_items(corpus: Corpus, split: str, prefixes: bool = True) -> int:
    """Number of examples of `next_item`."""
    if split != "train":
        return len(corpus.evaluation_users)
    return int(_training_pairs(corpus)[-1]) if prefixes else len(window_users(corpus))


def next_rating(corpus: Corpus, split: str, index: int, prefixes: bool = True) -> RatedQuery:
    """As `next_item`, with the ratings of a rated corpus."""
    user, position = _place(corpus, split, index, prefixes)
    start = corpus.user_offsets[user]
    return _rated(corpus, user, np.arange(start, start + position), int(start + position))


def random_rating(corpus: Corpus, split: str, index: int) -> RatedQuery:
    """An interaction of a part of the random 8:1:1 split; the history is what the user rated before it in training."""
    interaction = int(random_part(corpus, split)[index])
    user = int(np.searchsorted(corpus.user_offsets, interaction, side="right")) - 1
    before = np.arange(corpus.user_offsets[user], interaction)
    return _rated(corpus, user, before[_random_parts(corpus)[before] == 0], interaction)


@functools.lru_cache(maxsize=16)
def random_part(corpus: Corpus, split: str) -> np.ndarray:
    """The interactions of a part of the random split: positions in the arrays of the corpus, int64."""
    return np.flatnonzero(_random_parts(corpus) == holdout.SPLITS.index(split))


def window_end(corpus: Corpus, split: str, index: int) -> tuple[int, int]:
    """(user, end): the window of a MIM or MLM example ends at `end` of the user's sequence, or, in training, before.

    Held-out windows end with the split's target.
    """
    if split == "train":
        user = int(window_users(corpus)[index])
        return user, int(corpus.training_lengths[user])
    user = int(corpus.evaluation_users[index])
    return user, int(holdout.target_positions(corpus.lengths[user], split)) + 1


def num_windows(corpus: Corpus, split: str) -> int:
    """Number of examples of `window_end`."""
    return len(window_users(corpus)) if split == "train" else len(corpus.evaluation_users)


@functools.lru_cache(maxsize=8)
def window_users(corpus: Corpus) -> np.ndarray:
    """Users with at least two training items: an item and what to tell it from."""
    return np.flatnonzero(corpus.training_lengths >= 2)


def _place(corpus: Corpus, split: str, index: int, prefixes: bool) -> tuple[int, int]:
    """User and position of the target of an example."""
    if split != "train":
        user = int(corpus.evaluation_users[index])
        return user, int(holdout.target_positions(corpus.lengths[user], split))
    if not prefixes:
        user = int(window_users(corpus)[index])
        return user, int(corpus.training_lengths[user]) - 1
    first_of_user = _training_pairs(corpus)
    user = int(np.searchsorted(first_of_user, index, side="right")) - 1
    return user, index - int(first_of_user[user]) + 1


def _rated(corpus: Corpus, user: int, history: np.ndarray, target: int) -> RatedQuery:
    assert corpus.ratings is not None, "specs offers no rating task of a corpus without ratings"
    return RatedQuery(
        user, corpus.items[history], corpus.ratings[history], int(corpus.items[target]), float(corpus.ratings[target])
    )


@functools.lru_cache(maxsize=8)
def _training_pairs(corpus: Corpus) -> np.ndarray:
    """First training example of each user, [U + 1]: every prefix of the training part predicts its next item."""
    return np.concatenate([[0], np.cumsum(np.maximum(corpus.training_lengths - 1, 0))])


@functools.lru_cache(maxsize=8)
def _random_parts(corpus: Corpus) -> np.ndarray:
    return holdout.random_parts(corpus.num_interactions)

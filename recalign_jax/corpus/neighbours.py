"""Collaborative neighbours: items that other users' training parts hold beside the items of a history."""

import functools
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from recalign_jax.corpus.corpus import Corpus

if TYPE_CHECKING:
    import scipy.sparse

# Neighbours that are kept of each item.
NUM_KEPT = 50
_ITEMS_A_BLOCK = 4096


class CoOccurrence(NamedTuple):
    """The most frequent neighbours of each item, by cosine similarity."""

    items: np.ndarray  # int32 [I, M], -1 where there are no more
    counts: np.ndarray  # int32 [I, M], in how many users' training parts both occur


def users_items(corpus: Corpus) -> "scipy.sparse.csr_array":
    """Who has which items in training, each once, however often: 1 or nothing, int32 [U, I]."""
    import scipy.sparse

    items = corpus.items[corpus.in_training]
    offsets = np.append(0, np.cumsum(corpus.training_lengths))
    has = scipy.sparse.csr_array((np.ones_like(items), items, offsets), shape=(corpus.num_users, corpus.num_items))
    has.sum_duplicates()
    has.data[:] = 1
    return has


@functools.lru_cache(maxsize=4)
def co_occurrence(corpus: Corpus) -> CoOccurrence:
    """Counts in how many training parts two items stand together; nothing held out is looked at."""
    matrix = users_items(corpus)
    popularity = np.maximum(np.asarray(matrix.sum(axis=0)).ravel(), 1)
    kept = min(NUM_KEPT, corpus.num_items)
    items = np.full((corpus.num_items, kept), -1, np.int32)
    counts = np.zeros((corpus.num_items, kept), np.int32)
    transposed = matrix.T.tocsr()
    for start in range(0, corpus.num_items, _ITEMS_A_BLOCK):
        block = (transposed[start : start + _ITEMS_A_BLOCK] @ matrix).tocsr()
        for row in range(block.shape[0]):
            others, count = (part[block.indptr[row] : block.indptr[row + 1]] for part in (block.indices, block.data))
            own = others != start + row
            others, count = others[own], count[own]
            # Of equal similarity, the smaller number: numbers are random.
            best = np.lexsort((others, -count / np.sqrt(popularity[others])))[:kept]
            items[start + row, : len(best)] = others[best]
            counts[start + row, : len(best)] = count[best]
    return CoOccurrence(items, counts)


def neighbours_of(corpus: Corpus, history: np.ndarray, count: int, user: int = -1) -> np.ndarray:
    """Returns the items that co-occur most with a history, best first, none of it: int32 [at most count].

    An item's score is the sum over the history of co-occurrences / sqrt(popularity of both). Of a user of the corpus,
    the user's own co-occurrences are left out: in training they would give the next item away.

    Args:
      corpus: the corpus.
      history: int32 [h], item numbers.
      count: at most so many.
      user: whose history it is; -1 for one who is not of the corpus.
    """
    if not len(history):
        return np.zeros(0, np.int32)
    known = co_occurrence(corpus)
    items, counts = known.items[history], known.counts[history].astype(np.float64)  # [h, M]
    popularity = corpus.training_popularity.astype(np.float64)
    own = np.zeros(0, np.int32) if user < 0 else corpus.training_sequence(user)
    theirs = np.isin(items, own) & np.isin(history, own)[:, None]
    weight = np.sqrt(np.maximum(popularity[history], 1))[:, None] * np.sqrt(np.maximum(popularity[items], 1))
    scores = np.where(items >= 0, (counts - theirs) / weight, 0.0)
    candidates, place = np.unique(items, return_inverse=True)
    total = np.bincount(place.ravel(), scores.ravel(), len(candidates))
    total[np.isin(candidates, history) | (candidates < 0)] = 0
    best = np.argsort(-total, kind="stable")[:count]
    return candidates[best[total[best] > 1e-9]].astype(np.int32)

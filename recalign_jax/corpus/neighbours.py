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
    """The most similar items of each item, see `_similarity`."""

    items: np.ndarray  # int32 [I, M], -1 where there are no more
    counts: np.ndarray  # int32 [I, M], in how many users' training parts both occur
    popularity: np.ndarray  # int64 [I], in how many users' training parts each occurs
    least: np.ndarray  # float64 [I], the similarity of the last one; 0 where all that occur beside the item are there


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
    popularity = np.asarray(matrix.sum(axis=0)).ravel()
    kept = min(NUM_KEPT, corpus.num_items)
    items = np.full((corpus.num_items, kept), -1, np.int32)
    counts = np.zeros((corpus.num_items, kept), np.int32)
    least = np.zeros(corpus.num_items)
    transposed = matrix.T.tocsr()
    for start in range(0, corpus.num_items, _ITEMS_A_BLOCK):
        block = (transposed[start : start + _ITEMS_A_BLOCK] @ matrix).tocsr()
        for row in range(block.shape[0]):
            others, count = (part[block.indptr[row] : block.indptr[row + 1]] for part in (block.indices, block.data))
            own = others != start + row
            others, count = others[own], count[own]
            # Of equal similarity, the smaller number: numbers are random.
            similarity = _similarity(count, popularity[others])
            best = np.lexsort((others, -similarity))[:kept]
            items[start + row, : len(best)] = others[best]
            counts[start + row, : len(best)] = count[best]
            if len(best) < len(others):
                least[start + row] = similarity[best[-1]]
    return CoOccurrence(items, counts, popularity, least)


def _similarity(counts: np.ndarray, popularity: np.ndarray) -> np.ndarray:
    """The cosine of an item's users and those of others, but for a factor of the item."""
    return counts / np.sqrt(np.maximum(popularity, 1))


def neighbours_of(corpus: Corpus, history: np.ndarray, count: int, user: int = -1) -> np.ndarray:
    """Returns the items that co-occur most with a history, best first, none of it: int32 [at most count].

    An item's score is the sum over the history of co-occurrences / sqrt(popularity of both); of each item of the
    history only the NUM_KEPT most similar ones count. A user of the corpus is left out of all these numbers: in
    training the user's own co-occurrences would give the next item away. That holds for which items count, too: one
    that the user has must come up to the NUM_KEPT-th without the user.

    Args:
      corpus: the corpus.
      history: int32 [h], item numbers.
      count: at most so many.
      user: whose history it is; -1 for one who is not of the corpus.
    """
    if not len(history):
        return np.zeros(0, np.int32)
    known = co_occurrence(corpus)
    items, least = known.items[history], known.least[history]  # [h, M], [h]
    own = np.zeros(0, np.int32) if user < 0 else corpus.training_sequence(user)
    of_history, of_items = np.isin(history, own)[:, None], np.isin(items, own)
    similarity = _similarity(known.counts[history] - (of_history & of_items), known.popularity[items] - of_items)
    weight = np.sqrt(np.maximum(known.popularity[history][:, None] - of_history, 1))
    scores = np.where((items >= 0) & (similarity >= least[:, None]), similarity / weight, 0.0)
    candidates, place = np.unique(items, return_inverse=True)
    total = np.bincount(place.ravel(), scores.ravel(), len(candidates))
    total[np.isin(candidates, history) | (candidates < 0)] = 0
    best = np.argsort(-total, kind="stable")[:count]
    return candidates[best[total[best] > 1e-9]].astype(np.int32)

"""Item-kNN: items that the same users have as those of the history, by cosine similarity with shrinkage.

All of it is products of sparse matrices, which scipy does in seconds.
"""

import dataclasses
import itertools
from collections.abc import Sequence

import gin
import numpy as np
import scipy.sparse

from recalign_jax.baselines.scores import Scores
from recalign_jax.corpus.corpus import Corpus
from recalign_jax.corpus.neighbours import users_items
from recalign_jax.errors import InputError, check_kinds
from seqio_tasks.examples import Query

# Pairs are counted for as many items at a time as have about so many of them, which takes some 150 MB.
PAIRS_AT_ONCE = 2**21
LEAST_WEIGHT = 1e-30


@gin.configurable
@dataclasses.dataclass(frozen=True)
class ItemKnnOptions:
    """Which items are similar, and how much each one of the history counts.

    Attributes:
      neighbours: M, kept of each item.
      shrink: added to the denominator of the cosine; makes little of similarities that rest on few users.
      decay: the newest item of the history counts 1, the one before it `decay`, then `decay`**2, and so on; 1 for all
        alike, which is the plain method.
    """

    neighbours: int = 200
    shrink: float = 50.0
    decay: float = 0.6

    def __post_init__(self) -> None:
        check_kinds(self)
        if self.neighbours < 1:
            raise InputError(f"ItemKnnOptions.neighbours is {self.neighbours}: must be at least 1.")
        if not self.shrink >= 0:
            raise InputError(f"ItemKnnOptions.shrink is {self.shrink}: must be 0 or more.")
        if not 0 < self.decay <= 1:
            raise InputError(f"ItemKnnOptions.decay is {self.decay}: must be above 0, at most 1.")


def make(corpus: Corpus, options: ItemKnnOptions) -> Scores:
    """Scores an item by the sum of its similarities to the history's items, times what these count.

    Such scores are above 0. Items that are similar to none of the history stand below 0, ordered by popularity.
    """
    similarity = similarities(corpus, options)
    popularity = corpus.training_popularity
    otherwise = (popularity / (popularity.max() + 1) - 1).astype(np.float32)  # [I]

    def scores(queries: Sequence[Query]) -> np.ndarray:
        similar = (_histories(queries, corpus.num_items, options.decay) @ similarity).toarray()
        return np.where(similar > 0, similar, otherwise)

    return scores


def similarities(corpus: Corpus, options: ItemKnnOptions) -> scipy.sparse.csr_array:
    """The similarities of each item's nearest neighbours, at most M a row: float32 [I, I].

    Of items i and j with n_i and n_j users in training, n_ij of whom have both, it is n_ij / (sqrt(n_i n_j) + shrink)
    (Dacrema, Cremonesi and Jannach 2019, arXiv:1907.06902). Of equal ones the item with the smaller number is the
    nearer (a random order). Neighbours are those of the history's items (Deshpande and Karypis 2004, "Item-based
    top-N recommendation algorithms"), not those of the scored ones.
    """
    has = users_items(corpus)
    had_by = has.T.tocsr()
    users = has.sum(axis=0)  # [I]
    pairs = had_by @ has.sum(axis=1)  # [I], how many occurrences of pairs an item is in
    _, starts = np.unique((np.cumsum(pairs) - pairs) // PAIRS_AT_ONCE, return_index=True)
    parts = []
    for start, end in itertools.pairwise([*starts, corpus.num_items]):
        both = (had_by[start:end] @ has).tocoo()
        others = both.col != both.row + start
        row, column, count = both.row[others], both.col[others], both.data[others]
        similarity = (count / (np.sqrt(users[row + start] * users[column]) + options.shrink)).astype(np.float32)
        order = np.lexsort((column, -similarity, row))
        row, column, similarity = row[order], column[order], similarity[order]
        kept = np.arange(len(row)) - np.searchsorted(row, row) < options.neighbours
        part = (similarity[kept], (row[kept], column[kept]))
        parts.append(scipy.sparse.csr_array(part, shape=(end - start, corpus.num_items)))
    return scipy.sparse.vstack(parts, format="csr")


def _histories(queries: Sequence[Query], num_items: int, decay: float) -> scipy.sparse.csr_array:
    """What the items of the histories count: float32 [B, I]."""
    lengths = [len(query.history) for query in queries]
    ages = np.concatenate([np.arange(length)[::-1] for length in lengths])
    # Never 0 in float32, so that what is similar to the oldest items alone still stands above what isn't similar.
    weights = np.maximum(decay**ages, LEAST_WEIGHT).astype(np.float32)
    items = np.concatenate([query.history for query in queries])
    return scipy.sparse.csr_array((weights, items, np.append(0, np.cumsum(lengths))), shape=(len(queries), num_items))

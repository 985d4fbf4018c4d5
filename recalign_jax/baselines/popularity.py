"""The most popular items for everyone: the floor that every recommender must stand above."""

from collections.abc import Sequence

import numpy as np

from recalign_jax.corpus.corpus import Corpus
from seqio_tasks.examples import Query, Ranked, Recommend, ScoreCandidates, Scored


def recommender(corpus: Corpus, top_k: int = 10, batch_size: int = 1024) -> Recommend:
    """Ranks items by how often they occur in the training parts, ties by item number (a random order)."""
    popularity = corpus.training_popularity
    order = np.argsort(-popularity, kind="stable").astype(np.int32)

    def best(excluded: np.ndarray) -> np.ndarray:
        # The best top_k allowed items are among the best top_k + X of all.
        head = order[: top_k + len(excluded)]
        kept = head[~np.isin(head, excluded)][:top_k]
        return np.pad(kept, (0, top_k - len(kept)), constant_values=-1)

    def recommend(queries: Sequence[Query], excluded: Sequence[np.ndarray]) -> Ranked:
        for start in range(0, len(queries), batch_size):
            chosen = np.arange(start, min(start + batch_size, len(queries)))
            items = np.stack([best(items) for items in excluded[start : start + batch_size]])
            yield chosen, items, np.where(items >= 0, popularity[items], -np.inf).astype(np.float32)

    return recommend


def scorer(corpus: Corpus) -> ScoreCandidates:
    """Scores candidates by how often they occur in the training parts."""
    popularity = corpus.training_popularity

    def score(queries: Sequence[Query], candidates: np.ndarray) -> Scored:
        yield np.arange(len(queries)), np.where(candidates >= 0, popularity[candidates], -np.inf).astype(np.float32)

    return score

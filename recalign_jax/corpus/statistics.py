"""The statistics of a corpus."""

import collections
from typing import Any

import numpy as np

from recalign_jax.corpus.corpus import Corpus
from recalign_jax.corpus.records import rating_text

_MAX_RATING_VALUES = 20


def statistics(corpus: Corpus) -> dict[str, Any]:
    """Returns what a paper's table of data sets holds, and what to beware of in this corpus.

    density: interactions over users x items. users_train_only: too few interactions to be split. shared_titles:
    items that have the title of another item. unseen_test_items: share of test targets that occur in no training
    part. tied_*: share of adjacent interactions (of all users), and of test targets and their predecessors, with
    equal timestamps: there the order is the tie rule's, not the user's.
    """
    lengths = corpus.lengths
    titles = [title for item in range(corpus.num_items) if (title := corpus.item_text(item).title)]
    same_time = np.diff(corpus.timestamps) == 0
    starts = corpus.user_offsets[1:-1] - 1  # pairs that span two users
    within = np.delete(same_time, starts)
    test = corpus.user_offsets[corpus.evaluation_users + 1] - 1
    numbers: dict[str, Any] = {
        "users": corpus.num_users,
        "items": corpus.num_items,
        "interactions": corpus.num_interactions,
        "density": corpus.num_interactions / (corpus.num_users * corpus.num_items),
        "users_train_only": corpus.num_users - len(corpus.evaluation_users),
        "items_never_met": int((np.bincount(corpus.items, minlength=corpus.num_items) == 0).sum()),
        "untitled_items": corpus.num_items - len(titles),
        "shared_titles": sum(sharers for sharers in collections.Counter(titles).values() if sharers > 1),
        "unseen_test_items": _mean(corpus.training_popularity[corpus.targets("test")] == 0),
        "tied_pairs": _mean(within),
        "tied_test_items": _mean(same_time[test - 1]),
        "sequence_length": {
            "min": int(lengths.min()),
            "median": float(np.median(lengths)),
            "mean": float(lengths.mean()),
            "max": int(lengths.max()),
        },
    }
    if corpus.ratings is not None:
        numbers["ratings"] = rating_counts(corpus.ratings)
    return numbers


def _mean(values: np.ndarray) -> float | None:
    """Returns the share of true values, None (not NaN, which JSON lacks) where there are no values."""
    return float(values.mean()) if len(values) else None


def rating_counts(ratings: np.ndarray) -> dict[str, int]:
    """Returns how often each rating occurs; of many different ones, in ten bins of equal width."""
    values, counts = np.unique(ratings, return_counts=True)
    if len(values) <= _MAX_RATING_VALUES:
        return {rating_text(value): int(count) for value, count in zip(values, counts, strict=True)}
    counts, edges = np.histogram(ratings.astype(np.float64), bins=10)
    texts = [f"{edge:g}" for edge in edges]
    if len(set(texts)) < len(texts):  # a narrow range of large numbers
        texts = [np.format_float_positional(edge, trim="-") for edge in edges]
    return {f"{low} to {high}": int(n) for low, high, n in zip(texts, texts[1:], counts, strict=False)}

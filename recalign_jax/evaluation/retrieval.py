"""Retrieval: all items of the catalogue are ranked for a user; the held-out item should stand high.

The same function evaluates the language model and every baseline, so all have one protocol: the same users, the
same split, the same treatment of items that the user already has.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import gin
import numpy as np

from recalign_jax import metrics, terminal
from recalign_jax.corpus.corpus import Corpus
from recalign_jax.errors import InputError
from seqio_tasks import examples
from seqio_tasks.examples import Query, Recommend

KS = (5, 10)


@gin.configurable
@dataclasses.dataclass(frozen=True)
class RetrievalOptions:
    """How retrieval is evaluated.

    Attributes:
      filter_history: drop the items of the user's whole history from the ranked list for the figures without
        suffix. Figures without the filter are always there too, as `recall@10_unfiltered`.
      max_users: evaluate only so many users (users are numbered at random, so the first ones are a random sample);
        None for all.
    """

    filter_history: bool = True
    max_users: int | None = None


def evaluation_queries(corpus: Corpus, split: str, max_users: int | None = None) -> list[Query]:
    """The held-out queries of a split, one a user.

    Raises:
      InputError: when the split is none of validation and test, or no user has enough interactions.
    """
    if split not in ("validation", "test"):
        raise InputError(f"SPLIT is {split!r}: retrieval is evaluated on validation or test.")
    count = len(corpus.evaluation_users)
    if count == 0:
        raise InputError(f"Corpus {corpus.name} has no user with three interactions: nothing can be held out.")
    count = min(count, max_users or count)
    return [examples.next_item(corpus, split, index) for index in range(count)]


def evaluate(recommend: Recommend, queries: Sequence[Query], options: RetrievalOptions) -> dict[str, float]:
    """Recall, NDCG and MRR at KS, with the history filter and without.

    Args:
      recommend: the model, or a baseline.
      queries: from `evaluation_queries`.
      options: of the evaluation.

    Returns:
      `recall@5`, ..., `recall@5_unfiltered`, ..., and `users`.
    """
    # As many places as items to exclude, all empty: the same compiled program serves both.
    nothing = [np.full_like(query.history, -1) for query in queries]
    plain = _measure(recommend, queries, nothing, "without history filter")
    values = {f"{name}_unfiltered": value for name, value in plain.items()}
    if options.filter_history:
        plain = _measure(recommend, queries, [query.history for query in queries], "with history filter")
    return {**plain, **values, "users": len(queries)}


def show(title: str, results: Mapping[str, Mapping[str, float]]) -> None:
    """Prints results side by side, a row for every model."""
    names = [f"{metric}@{k}" for k in KS for metric in ("recall", "ndcg")]
    names += [f"{name}_unfiltered" for name in ("recall@10", "ndcg@10")]
    rows = [[model, *(f"{values[name]:.4f}" for name in names)] for model, values in results.items()]
    terminal.table(title, ["", *names], rows)


def _measure(
    recommend: Recommend, queries: Sequence[Query], excluded: Sequence[np.ndarray], label: str
) -> dict[str, float]:
    targets = np.asarray([query.target for query in queries], np.int32)
    sums = []
    with terminal.progress(f"retrieval {label}", len(queries), "users") as advance:
        for chosen, items, _ in recommend(queries, excluded):
            sums.append(metrics.retrieval_metrics(items, targets[chosen], np.ones(len(chosen), np.float32), KS))
            advance(len(chosen))
    means = metrics.mean_metrics(sums)
    return {name: value for name, value in means.items() if name != "count"}

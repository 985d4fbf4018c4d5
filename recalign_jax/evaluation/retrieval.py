"""Retrieval: all items of the catalogue are ranked for a user; the held-out item should stand high.

The same function evaluates the language model and every baseline, so all have one protocol: the same users, the
same split, the same treatment of items that the user already has.
"""

from collections.abc import Sequence

import numpy as np

from recalign_jax import metrics
from recalign_jax.corpus.corpus import Corpus
from recalign_jax.evaluation import results
from recalign_jax.evaluation.results import EvaluationOptions, Result
from seqio_tasks import examples
from seqio_tasks.examples import Query, Recommend

METRICS = ("recall", "ndcg", "hr", "mrr", "map")
MAIN_CUTOFF = 10


def evaluation_queries(corpus: Corpus, split: str, options: EvaluationOptions) -> list[Query]:
    """The held-out queries of a split, one a user; also what ranking asks. Raises InputError as `num_evaluated`."""
    count = results.num_evaluated(corpus, split, len(corpus.evaluation_users), options)
    return [examples.next_item(corpus, split, index) for index in range(count)]


def evaluate(corpus: Corpus, recommend: Recommend, queries: Sequence[Query], options: EvaluationOptions) -> Result:
    """METRICS at the cutoffs, with the history filter and without (`_unfiltered`).

    Args:
      corpus: what the queries are of.
      recommend: the model, or a baseline; as many items a query as the last cutoff.
      queries: from `evaluation_queries`.
      options: of the evaluation.

    Returns:
      The metrics, `coverage@10` and `popularity_bias@10` of the lists of the figures without suffix, and as facts
      `items` [N, last cutoff] and `rank` and `rank_unfiltered` of the target, from 1, 0 where it isn't among them.
    """
    facts = results.facts(corpus, queries)
    ks, k = options.cutoffs, MAIN_CUTOFF
    names = [f"{name}@{k}" for k in ks for name in METRICS]

    def ranked(excluded: Sequence[np.ndarray], what: str) -> np.ndarray:
        items, _ = results.gather(recommend(queries, excluded), len(queries), f"retrieval {what}")
        return items[:, : ks[-1]]

    # As many places as items to exclude, all empty: the same compiled program serves both.
    plain = ranked([np.full_like(query.history, -1) for query in queries], "without history filter")
    items = ranked([query.history for query in queries], "with history filter") if options.filter_history else plain
    targets = facts["target"]
    bias = metrics.popularity_bias(items, targets, corpus.training_popularity, k)
    return Result(
        family="retrieval",
        facts=facts | {"rank": _ranks(items, targets), "rank_unfiltered": _ranks(plain, targets), "items": items},
        values={
            "": results.ordered(metrics.retrieval_values(items, targets, ks), names),
            "_unfiltered": results.ordered(metrics.retrieval_values(plain, targets, ks), names),
        },
        main=(f"recall@{k}", f"ndcg@{k}"),
        overall={
            f"coverage@{k}": float(metrics.coverage(items, corpus.num_items, k)),
            f"popularity_bias@{k}": float(bias),
        },
    )


def _ranks(items: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """From 1; 0 where the target isn't in the list."""
    return (np.asarray(metrics.target_ranks(items, targets)) + 1) % (items.shape[1] + 1)

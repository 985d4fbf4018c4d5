"""Ranking: the held-out item among 99 that the user never met; the model or baseline gives each a score."""

from collections.abc import Sequence

import numpy as np

from recalign_jax import metrics, terminal
from recalign_jax.corpus.candidates import CANDIDATE_SEED, NUM_TEST_NEGATIVES, held_out_candidates
from recalign_jax.corpus.corpus import Corpus
from recalign_jax.decoding.retrieve import padded
from recalign_jax.evaluation import results
from recalign_jax.evaluation.results import Result
from seqio_tasks.examples import Query, ScoreCandidates

KS = (1, 5, 10)
METRICS = ("hr@1", "hr@5", "hr@10", "ndcg@5", "ndcg@10", "mrr@10")


def candidates(
    corpus: Corpus,
    split: str,
    queries: Sequence[Query],
    negatives: int = NUM_TEST_NEGATIVES,
    seed: int = CANDIDATE_SEED,
) -> np.ndarray:
    """The candidates of held-out queries, the target among them, in random order: int32 [n, C].

    C is `negatives` + 1, or less where the corpus has no more; rows of users who met nearly all items end in -1.
    """
    rows = [held_out_candidates(corpus, split, query.user, query.target, negatives, seed) for query in queries]
    sizes = [*map(len, rows)]
    if min(sizes) <= negatives:
        terminal.warn(
            f"{corpus.name} has {corpus.num_items:,} items, so users have {min(sizes)} to {max(sizes)} candidates, not "
            f"{negatives + 1}: figures of ranking are higher than they would be with all."
        )
    return padded(rows, len(rows), max(map(len, rows)), fill=-1)


def evaluate(corpus: Corpus, score: ScoreCandidates, queries: Sequence[Query], candidates: np.ndarray) -> Result:
    """METRICS of the candidates by score. The target stands behind all others that have its score.

    Args:
      corpus: what the queries are of.
      score: the model, or a baseline.
      queries: from `retrieval.evaluation_queries`.
      candidates: int32 [n, C], padded with -1.

    Returns:
      The metrics, and as facts `items` [N, 10], the best candidates, and `rank` of the target, from 1.
    """
    facts = results.facts(corpus, queries)
    targets = facts["target"]
    [scores] = results.gather(score(queries, candidates), len(queries), "ranking")
    order = np.lexsort((candidates == targets[:, None], -scores))  # by score, the target last among equals
    ranked = np.take_along_axis(candidates, order, axis=1)
    ranked = np.pad(ranked, ((0, 0), (0, max(max(KS) - ranked.shape[1], 0))), constant_values=-1)
    return Result(
        family="ranking",
        facts=facts | {"rank": np.asarray(metrics.target_ranks(ranked, targets)) + 1, "items": ranked[:, : max(KS)]},
        values={"": results.ordered(metrics.retrieval_values(ranked, targets, KS), METRICS)},
        main=("hr@10", "ndcg@10"),
    )

"""Rating: what a user gives an item, predicted as the expected value and as the most likely rating."""

from collections.abc import Sequence

import numpy as np

from recalign_jax import metrics
from recalign_jax.corpus.corpus import Corpus
from recalign_jax.errors import InputError
from recalign_jax.evaluation import results
from recalign_jax.evaluation.results import EvaluationOptions, Result
from seqio_tasks import examples
from seqio_tasks.examples import PredictRatings, RatedQuery

METRICS = ("mse", "mae")
SAMPLE_SEED = 0


def evaluation_queries(corpus: Corpus, split: str, family: str, options: EvaluationOptions) -> list[RatedQuery]:
    """The held-out ratings of a rated corpus: of `rating` one a user, of `rating_random` all of the part.

    Where not all are evaluated, `rating` has the first users, who are numbered at random. Those of `rating_random` are
    drawn, since its part is in the order of users: its first ratings are all of a few.

    Raises InputError as `num_evaluated`, and when there are too few ratings for a random split.
    """
    random = family == "rating_random"
    held_out = len(examples.random_part(corpus, split) if random else corpus.evaluation_users)
    if random and not held_out:
        raise InputError(
            f"Corpus {corpus.name} has {corpus.num_interactions} ratings: with fewer than ten, nothing can be held out "
            "by the random 8:1:1 split."
        )
    count = results.num_evaluated(corpus, split, held_out, options)
    if not random:
        return [examples.next_rating(corpus, split, index) for index in range(count)]
    chosen = np.random.default_rng(SAMPLE_SEED).permutation(held_out)[:count]
    return [examples.random_rating(corpus, split, int(index)) for index in np.sort(chosen)]


def evaluate(corpus: Corpus, predict: PredictRatings, queries: Sequence[RatedQuery], family: str = "rating") -> Result:
    """Errors of the expected rating (`rmse`, `mae`) and of the most likely one (`rmse_argmax`, `mae_argmax`).

    Args:
      corpus: what the queries are of.
      predict: the model, or a baseline.
      queries: from `evaluation_queries`.
      family: `rating` or `rating_random`: what was trained on.

    Returns:
      The metrics, and as facts `rating`, `expected` and `most_likely`.
    """
    ratings = np.asarray([query.rating for query in queries], np.float32)
    expected, likely = results.gather(predict(queries), len(queries), "rating")
    return Result(
        family="rating",
        facts=results.facts(corpus, queries, _popularity(corpus, family))
        | {"rating": ratings, "expected": expected, "most_likely": likely},
        values={
            "": results.ordered(metrics.rating_values(expected, ratings), METRICS),
            "_argmax": results.ordered(metrics.rating_values(likely, ratings), METRICS),
        },
        main=METRICS,
        rows_of="ratings" if family == "rating_random" else "users",
    )


def _popularity(corpus: Corpus, family: str) -> np.ndarray:
    """Interactions of each item in the training part of the family: int64 [I]."""
    if family != "rating_random":
        return corpus.training_popularity
    return np.bincount(corpus.items[examples.random_part(corpus, "train")], minlength=corpus.num_items)

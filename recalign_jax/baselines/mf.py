"""Biased matrix factorization for ratings (Koren, Bell and Volinsky 2009, "Matrix factorization techniques ...")."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import gin
import jax
import jax.numpy as jnp
import numpy as np

from recalign_jax import metrics
from recalign_jax.baselines import minibatches
from recalign_jax.baselines.fit import Batch, FitOptions, Problem, Run, fit
from recalign_jax.corpus.corpus import Corpus
from recalign_jax.errors import InputError, check_least
from recalign_jax.evaluation import rating
from recalign_jax.evaluation.results import EvaluationOptions
from seqio_tasks import examples
from seqio_tasks.examples import Predicted, PredictRatings, RatedQuery

# Standard deviation of the first vectors: small, so that what isn't learned doesn't count.
INITIAL = 0.01


@gin.configurable
@dataclasses.dataclass(frozen=True)
class MfOptions(FitOptions):
    """Of model and training.

    Attributes:
      factors: D, of the vectors; 0 for biases only.
      batch: ratings a step.
      l2: the paper's lambda, of all biases and vectors that a rating meets.
    """

    learning_rate: float = 2e-3
    factors: int = 32
    batch: int = 1024
    l2: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, 1, "batch")
        check_least(self, 0, "factors", "l2")


def make(corpus: Corpus, options: MfOptions, run: Run, family: str) -> PredictRatings:
    """Trains it, and chooses the epoch by the RMSE on the family's validation split.

    The expected rating is the prediction, clipped to the range of the ratings in training; the most likely one is
    the nearest rating that occurs in training.

    Args:
      corpus: with ratings, InputError otherwise.
      options: see there.
      run: see `fit`.
      family: `rating`, which trains on the training parts, or `rating_random`, on the training part of the random
        split.
    """
    table = training_ratings(corpus, family)
    mean = float(np.mean(table["rating"], dtype=np.float64))
    values = np.unique(table["rating"])  # those that occur, ascending

    def init(key: jax.Array) -> dict[str, jax.Array]:
        # Vectors of zeros have no gradient and so remain: those of who isn't in training, and without factors all
        # (of width 1, as checkpoints don't hold empty arrays).
        def vectors(key: jax.Array, met: np.ndarray, count: int) -> jax.Array:
            known = np.bincount(met, minlength=count)[:, None] > 0
            scale = INITIAL if options.factors else 0.0
            return jax.random.normal(key, (count, max(options.factors, 1))) * (scale * known)

        of_users, of_items = jax.random.split(key)
        return {
            "users": vectors(of_users, table["user"], corpus.num_users),
            "items": vectors(of_items, table["item"], corpus.num_items),
            "user_biases": jnp.zeros(corpus.num_users),
            "item_biases": jnp.zeros(corpus.num_items),
        }

    def batches(epoch: int) -> Iterator[dict[str, np.ndarray]]:
        return minibatches.shuffled(table, options.batch, np.random.default_rng([run.seed, epoch]))

    def expected(params: Any, queries: Sequence[RatedQuery]) -> np.ndarray:
        users, items = (
            np.asarray([getattr(query, name) for query in queries], np.int32) for name in ("user", "target")
        )
        return np.clip(mean + np.asarray(deviations(params, users, items)), values[0], values[-1])

    queries = rating.evaluation_queries(corpus, "validation", family, EvaluationOptions(max_users=None))
    held_out = np.asarray([query.rating for query in queries], np.float32)

    def validate(params: Any) -> dict[str, float]:
        squares = metrics.rating_values(expected(params, queries), held_out)["mse"]
        return {"validation_rmse": float(np.sqrt(np.mean(squares)))}

    problem = Problem(
        init=init,
        loss=lambda params, batch, key: loss(params, batch, mean, options.l2),
        batches=batches,
        validate=validate,
        metric="validation_rmse",
    )
    params = fit(problem, options, run)

    def predict(queries: Sequence[RatedQuery]) -> Predicted:
        ratings = expected(params, queries)
        nearest = np.searchsorted((values[1:] + values[:-1]) / 2, ratings)
        yield np.arange(len(queries)), ratings, values[nearest]

    return predict


def loss(params: Any, batch: Batch, mean: float, l2: float) -> tuple[jax.Array, jax.Array]:
    """Squared error + l2 * squares of biases and vectors, the paper's equation 5: each rating pays for what it meets.

    Args:
      params: `users` [U, D], `items` [I, D], `user_biases` [U], `item_biases` [I].
      batch: `user`, `item`, `rating` and `weight`, each [B].
      mean: of the ratings in training.
      l2: lambda.

    Returns:
      The weighted sum, and the sum of the weights.
    """
    user, item, weight = batch["user"], batch["item"], batch["weight"]
    error = batch["rating"] - mean - deviations(params, user, item)
    squares = jnp.sum(params["users"][user] ** 2 + params["items"][item] ** 2, axis=1)
    squares += params["user_biases"][user] ** 2 + params["item_biases"][item] ** 2
    return jnp.sum(weight * (error**2 + l2 * squares)), jnp.sum(weight)


@jax.jit
def deviations(params: Any, users: jax.Array, items: jax.Array) -> jax.Array:
    """What is added to the mean rating, biases and dot products: [B]; for user -1 the item's bias."""
    of_user = params["user_biases"][users] + jnp.sum(params["users"][users] * params["items"][items], axis=1)
    return params["item_biases"][items] + jnp.where(users < 0, 0, of_user)


def training_ratings(corpus: Corpus, family: str) -> dict[str, np.ndarray]:
    """What a family trains on: `user`, `item` and `rating`, each [n]. InputError if the corpus has no ratings."""
    if corpus.ratings is None:
        raise InputError(
            f"Corpus {corpus.name} has no ratings, and mf predicts ratings. Choose another method, or prepare the "
            "corpus from interactions that have them."
        )
    random = family == "rating_random"
    chosen = examples.random_part(corpus, "train") if random else np.flatnonzero(corpus.in_training)
    users = np.repeat(np.arange(corpus.num_users), corpus.lengths)
    return {"user": users[chosen], "item": corpus.items[chosen], "rating": corpus.ratings[chosen]}

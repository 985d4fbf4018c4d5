"""BPR-MF: a vector for every user and item, trained to rank what a user has above the rest (Rendle et al. 2009)."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import gin
import jax
import jax.numpy as jnp
import numpy as np

from recalign_jax.baselines import minibatches
from recalign_jax.baselines.fit import Batch, FitOptions, Problem, Run, fit, ranking_validation
from recalign_jax.baselines.scores import Scores
from recalign_jax.corpus.corpus import Corpus
from recalign_jax.errors import InputError, check_least
from seqio_tasks.examples import Query

# Standard deviation of the first vectors: small, so that what isn't learned doesn't count.
INITIAL = 0.01


@gin.configurable
@dataclasses.dataclass(frozen=True)
class BprMfOptions(FitOptions):
    """Of model and training.

    Attributes:
      width: D, of the vectors.
      batch: pairs of a user and an item a step.
      l2: the paper's lambda, of all vectors and biases that a pair meets.
    """

    learning_rate: float = 3e-3
    epochs: int = 150
    eval_period: int = 10
    patience: int = 3
    width: int = 64
    batch: int = 4096
    l2: float = 0.03

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, 1, "width", "batch")
        check_least(self, 0, "l2")


def make(corpus: Corpus, options: BprMfOptions, run: Run) -> Scores:
    """Trains it, on every pair of a user and an item of the training parts.

    The scores are for users of the corpus only: InputError for another one.
    """
    pairs = training_pairs(corpus)
    if not len(pairs):
        raise InputError(f"Corpus {corpus.name} has no user with an item to train on and one to tell it from.")

    def init(key: jax.Array) -> dict[str, jax.Array]:
        of_users, of_items = jax.random.split(key)
        return {
            "users": INITIAL * jax.random.normal(of_users, (corpus.num_users, options.width)),
            "items": INITIAL * jax.random.normal(of_items, (corpus.num_items, options.width)),
            "biases": jnp.zeros(corpus.num_items),
        }

    def batches(epoch: int) -> Iterator[dict[str, np.ndarray]]:
        random = np.random.default_rng([run.seed, epoch])
        users, items = np.divmod(pairs, corpus.num_items)
        table = {"user": users, "item": items, "negative": draw_negatives(pairs, corpus.num_items, random)}
        return minibatches.shuffled(table, options.batch, random)

    @jax.jit
    def all_scores(params: Any, users: jax.Array) -> jax.Array:
        return params["users"][users] @ params["items"].T + params["biases"]

    def of_params(params: Any) -> Scores:
        def scores(queries: Sequence[Query]) -> jax.Array:
            users = np.asarray([query.user for query in queries], np.int32)
            if np.any(users < 0):
                raise InputError(
                    f"BPR-MF has vectors for the users of corpus {corpus.name} only, and can't answer for others. "
                    "Extend the corpus by them and train again, or take a method that goes by the history."
                )
            return all_scores(params, users)

        return scores

    problem = Problem(
        init=init,
        loss=lambda params, batch, key: loss(params, batch, options.l2),
        batches=batches,
        validate=ranking_validation(corpus, of_params),
        metric="validation_ndcg@10",
    )
    return of_params(fit(problem, options, run))


def loss(params: Any, batch: Batch, l2: float) -> tuple[jax.Array, jax.Array]:
    """-log sigmoid(score of the item - score of the negative) + l2 / 2 * squares, BPR-Opt of the paper's section 4.1.

    As in its section 4.3, a pair pays for the vectors it meets, so that what is met often pays often.

    Args:
      params: `users` [U, D], `items` [I, D], `biases` [I].
      batch: `user`, `item`, `negative` and `weight`, each [B].
      l2: lambda.

    Returns:
      The weighted sum, and the sum of the weights.
    """
    user, item, negative = (
        params[name][batch[of]] for name, of in (("users", "user"), ("items", "item"), ("items", "negative"))
    )  # [B, D]
    biases = params["biases"][batch["item"]], params["biases"][batch["negative"]]
    above = jnp.sum(user * (item - negative), axis=1) + biases[0] - biases[1]
    squares = jnp.sum(user**2 + item**2 + negative**2, axis=1) + biases[0] ** 2 + biases[1] ** 2
    weight = batch["weight"]
    return jnp.sum(weight * (jax.nn.softplus(-above) + l2 / 2 * squares)), jnp.sum(weight)


def training_pairs(corpus: Corpus) -> np.ndarray:
    """The distinct pairs of the training parts as user * I + item, ascending: int64 [n].

    Without those of users who have every item: there is no negative for them.
    """
    users = np.repeat(np.arange(corpus.num_users), corpus.lengths)[corpus.in_training]
    pairs = np.unique(users * corpus.num_items + corpus.items[corpus.in_training])
    users = pairs // corpus.num_items
    return pairs[np.bincount(users, minlength=corpus.num_users)[users] < corpus.num_items]


def draw_negatives(pairs: np.ndarray, num_items: int, random: np.random.Generator) -> np.ndarray:
    """One item for each pair, uniform among those that its user isn't paired with: int64 [n].

    Held-out items are among them, so that their absence gives nothing away.

    Args:
      pairs: from `training_pairs`.
      num_items: I.
      random: what to draw from.
    """
    users, items = np.divmod(pairs, num_items)
    first = np.searchsorted(users, users)  # of the user's pairs
    paired = np.searchsorted(users, users, side="right") - first
    # Of the items that are left, number n (from 0) is n plus the number of paired ones below it: those that have at
    # most n left ones below them.
    drawn = random.integers(num_items - paired)
    left_below = items - (np.arange(len(pairs)) - first)
    before = np.searchsorted(users * num_items + left_below, users * num_items + drawn, side="right") - first
    return drawn + before

"""Metrics: arrays of all users in, one value a user out; then means with intervals.

In a list the item at rank r (from 0) is a hit if it is one of the R items that are relevant to the user. Gains are
binary. A user without relevant items has 0 everywhere. At a cutoff k:
  recall  hits among the first k / R
  hr      1 if there is a hit among the first k: the hit rate
  ndcg    sum of 1 / log2(r + 2) over the hits, divided by what min(R, k) hits at the top give
          (Järvelin & Kekäläinen, 2002)
  mrr     1 / (r + 1) of the first hit (Voorhees, 1999)
  map     sum of the precision among the first r + 1 over the hits, divided by R (Buckley & Voorhees, 2000; trec_eval's
          map_cut, ranx' map)
With one relevant item (leave-one-out) recall is hr, and map is mrr.

Nothing here knows of batches or devices: whoever gathers the results leaves out the users that filled up a batch.
"""

from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

RESAMPLES_AT_ONCE = 8


@partial(jax.jit, static_argnames="ks")
def retrieval_values(items: jax.Array, targets: jax.Array, ks: tuple[int, ...] = (5, 10)) -> dict[str, jax.Array]:
    """Returns `recall@k`, `hr@k`, `ndcg@k`, `mrr@k` and `map@k` of every user for every k; float32 [N] each.

    Args:
      items: int32 [N, K], distinct items best first, -1 where there are no more.
      targets: int32 [N], the relevant item of each user; or [N, R] distinct ones, -1 where there are no more.
      ks: cutoffs.

    Raises:
      ValueError: lists shorter than a cutoff.
    """
    items = _top(items, max(ks))
    relevant = targets if targets.ndim == 2 else targets[:, None]  # [N, R]
    hits = (items[:, :, None] == relevant[:, None, :]) & (relevant >= 0)[:, None, :]
    hits = hits.any(axis=2).astype(jnp.float32)  # [N, K]
    number = jnp.maximum(jnp.sum(relevant >= 0, axis=1), 1)  # without relevant items there is no hit either
    places = jnp.arange(max(ks)) + 1.0
    discounts = 1 / jnp.log2(places + 1)
    ideal = jnp.cumsum(discounts)
    found = jnp.cumsum(hits, axis=1)  # [N, K]: hits so far
    values = {}
    for k in ks:
        first, places_k = hits[:, :k], places[:k]
        values[f"recall@{k}"] = found[:, k - 1] / number
        values[f"hr@{k}"] = first.max(axis=1)
        values[f"ndcg@{k}"] = jnp.sum(first * discounts[:k], axis=1) / ideal[jnp.minimum(number, k) - 1]
        values[f"mrr@{k}"] = jnp.max(first / places_k, axis=1)
        values[f"map@{k}"] = jnp.sum(first * found[:, :k] / places_k, axis=1) / number
    return values


@jax.jit
def target_ranks(items: jax.Array, targets: jax.Array) -> jax.Array:
    """Returns the rank, from 0, of each user's target in a ranked list, K where it is absent; int32 [N].

    Args:
      items: int32 [N, K], distinct items best first, -1 where there are no more.
      targets: int32 [N]; a negative target is in no list.
    """
    found = (items == targets[:, None]) & (targets[:, None] >= 0)
    return jnp.where(found.any(axis=1), jnp.argmax(found, axis=1), items.shape[1]).astype(jnp.int32)


@jax.jit
def rating_values(predictions: jax.Array, ratings: jax.Array) -> dict[str, jax.Array]:
    """Returns the squared (`mse`) and absolute (`mae`) error of every prediction; arguments and values float32 [N]."""
    errors = predictions - ratings
    return {"mse": errors**2, "mae": jnp.abs(errors)}


@partial(jax.jit, static_argnames=("num_items", "k"))
def coverage(items: jax.Array, num_items: int, k: int) -> jax.Array:
    """Returns the share of the catalogue's `num_items` items that stand among the first k of at least one list.

    Args:
      items: int32 [N, K], best first, -1 where there are no more.
      num_items: size of the catalogue.
      k: cutoff.

    Raises:
      ValueError: lists shorter than k.
    """
    items = _top(items, k)
    seen = jnp.zeros(num_items + 1, bool).at[jnp.where(items < 0, num_items, items)].set(True)
    return jnp.sum(seen[:num_items]) / num_items


@partial(jax.jit, static_argnames="k")
def popularity_bias(items: jax.Array, targets: jax.Array, popularity: jax.Array, k: int) -> jax.Array:
    """Returns how much more popular recommended items are than those that users took: 1 is without bias.

    That is the average recommendation popularity (Yin et al., 2012: the mean over users of the mean popularity of
    their first k items), divided by the mean popularity of the targets. Users with an empty list don't count above.
    nan if no list holds an item, or no target was met in training.

    Args:
      items: int32 [N, K], best first, -1 where there are no more.
      targets: int32 [N], the item that each user took.
      popularity: [I], how often each item was met in training.
      k: cutoff.

    Raises:
      ValueError: lists shorter than k.
    """
    items, popularity = _top(items, k), popularity.astype(jnp.float32)
    lengths = jnp.sum(items >= 0, axis=1)  # [N]
    sums = jnp.sum(jnp.where(items >= 0, popularity[items], 0.0), axis=1)
    recommended = jnp.sum(sums / jnp.maximum(lengths, 1)) / jnp.sum(lengths > 0)
    taken = jnp.mean(popularity[targets])
    return jnp.where(taken > 0, recommended / taken, jnp.nan)


def _top(items: jax.Array, k: int) -> jax.Array:
    if items.shape[1] < k:
        raise ValueError(f"metrics at {k} need as many results a user, not {items.shape[1]}")
    return items[:, :k]


class Estimate(NamedTuple):
    """A mean over users, and the interval around it."""

    value: float
    low: float
    high: float


def estimates(
    values: Mapping[str, ArrayLike], *, seed: int = 0, resamples: int = 1000, confidence: float = 0.95
) -> dict[str, Estimate]:
    """Returns the mean of each metric with its percentile bootstrap interval (Efron & Tibshirani, 1993, chapter 13).

    Users are drawn with replacement, the same ones for all metrics. `mse` becomes `rmse`, the root of the mean. The
    numbers are a function of the arguments alone: one device computes them, whatever the number of devices.

    Args:
      values: what each user has of each metric; [N] each.
      seed: of the resamples.
      resamples: their number.
      confidence: share of resamples within the interval.

    Raises:
      ValueError: there is no user.
    """
    table = np.stack([np.asarray(column, np.float64) for column in values.values()], axis=1)  # [N, M]
    count = len(table)
    if count == 0:
        raise ValueError("no metrics: there is not one user")
    means = table.mean(axis=0)
    # Single precision is enough for deviations from the mean: they cancel out instead of adding up. Rows are filled up
    # to a power of two, so that slices of many sizes share a few compiled programs.
    deviations = np.zeros((1 << (count - 1).bit_length(), len(values)), np.float32)
    deviations[:count] = table - means
    sums = _resampled_sums(deviations, np.uint32(count), seed, resamples)
    resampled = means + np.asarray(sums, np.float64) / count  # [resamples, M]
    resampled = np.clip(resampled, table.min(axis=0), table.max(axis=0))  # rounding alone leads out of it
    tail = (1 - confidence) / 2
    result = {}
    for name, mean, draws in zip(values, means, resampled.T, strict=True):
        if name == "mse":
            name, mean, draws = "rmse", np.sqrt(mean), np.sqrt(np.maximum(draws, 0))
        low, high = np.quantile(draws, [tail, 1 - tail])
        result[name] = Estimate(float(mean), float(low), float(high))
    return result


@partial(jax.jit, static_argnames="resamples")
def _resampled_sums(values: jax.Array, count: jax.Array, seed: int, resamples: int) -> jax.Array:
    """Sums over `count` users, drawn with replacement from the first `count` rows: [N, M] -> [resamples, M]."""

    def one(key: jax.Array) -> jax.Array:
        users = jax.random.bits(key, (len(values),), jnp.uint32) % count  # off from uniform by a share of count / 2**32
        times = jnp.zeros(len(values)).at[users].add(jnp.arange(len(values)) < count)  # [N]: how often each was drawn
        return jnp.dot(times, values, precision="highest")

    return jax.lax.map(one, jax.random.split(jax.random.key(seed), resamples), batch_size=RESAMPLES_AT_ONCE)

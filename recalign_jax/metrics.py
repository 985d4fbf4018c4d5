"""Metrics: arrays in, numbers out.

Batches add up: the jitted functions return sums over the users (or ratings) of a batch that count, and
`mean_metrics` divides once, at the end. Rows with weight 0 (padding) never count.

Every user has one relevant item (leave-one-out). Then with r the 0-based rank of that item, all of them 0 if r >= k:
  recall@k = 1                 equal to the hit rate
  ndcg@k   = 1 / log2(r + 2)   Järvelin & Kekäläinen (2002), the ideal gain being 1
  mrr@k    = 1 / (r + 1)       Voorhees (1999)
"""

import math
from collections.abc import Iterable, Mapping
from functools import partial

import jax
import jax.numpy as jnp


def target_ranks(items: jax.Array, targets: jax.Array) -> jax.Array:
    """Returns the 0-based rank of each user's target in a ranked list, K where it is absent; int32 [B].

    Args:
      items: int32 [B, K], best first, -1 where there are no more.
      targets: int32 [B]; a negative target is in no list.
    """
    found = (items == targets[:, None]) & (targets[:, None] >= 0)
    return jnp.where(found.any(axis=1), jnp.argmax(found, axis=1), items.shape[1]).astype(jnp.int32)


def recall_at_k(ranks: jax.Array, k: int) -> jax.Array:
    """Returns recall@k for ranks int32 [B]; float32 [B]."""
    return (ranks < k).astype(jnp.float32)


def ndcg_at_k(ranks: jax.Array, k: int) -> jax.Array:
    """Returns NDCG@k for ranks int32 [B]; float32 [B]."""
    return jnp.where(ranks < k, 1 / jnp.log2(ranks + 2.0), 0.0)


def mrr_at_k(ranks: jax.Array, k: int) -> jax.Array:
    """Returns the reciprocal rank, cut at k, for ranks int32 [B]; float32 [B]."""
    return jnp.where(ranks < k, 1 / (ranks + 1.0), 0.0)


@partial(jax.jit, static_argnames="ks")
def retrieval_metrics(
    items: jax.Array, targets: jax.Array, weights: jax.Array, ks: tuple[int, ...] = (5, 10)
) -> dict[str, jax.Array]:
    """Sums a batch's `recall@k` and `ndcg@k` for each k, `mrr@k` for the largest, and `count`.

    Args:
      items: int32 [B, K], distinct items best first, -1 where there are no more.
      targets: int32 [B], the held-out item of each user.
      weights: float32 [B], 1 for a user, 0 for a row that fills up the batch.
      ks: cutoffs.

    Raises:
      ValueError: lists shorter than a cutoff.
    """
    if items.shape[1] < max(ks):
        raise ValueError(f"metrics at {max(ks)} need as many results a user, not {items.shape[1]}")
    ranks = target_ranks(items, targets)
    values = {f"recall@{k}": recall_at_k(ranks, k) for k in ks}
    values |= {f"ndcg@{k}": ndcg_at_k(ranks, k) for k in ks}
    values[f"mrr@{max(ks)}"] = mrr_at_k(ranks, max(ks))
    return _sums(values, weights)


@jax.jit
def rating_metrics(predictions: jax.Array, ratings: jax.Array, weights: jax.Array) -> dict[str, jax.Array]:
    """Sums a batch's squared errors (`mse`), absolute errors (`mae`) and `count`; all arguments float32 [B]."""
    errors = predictions - ratings
    return _sums({"mse": errors**2, "mae": jnp.abs(errors)}, weights)


def _sums(values: dict[str, jax.Array], weights: jax.Array) -> dict[str, jax.Array]:
    # Not a product alone: a row of padding may hold NaN.
    sums = {name: jnp.sum(jnp.where(weights > 0, value * weights, 0.0)) for name, value in values.items()}
    return sums | {"count": jnp.sum(weights)}


def mean_metrics(batches: Iterable[Mapping[str, jax.Array]]) -> dict[str, float]:
    """Adds up the sums of batches in double precision and divides by their count.

    Returns:
      The means and `count`; `mse` becomes `rmse`, its square root.

    Raises:
      ValueError: nothing was counted.
    """
    totals: dict[str, float] = {}
    for batch in batches:
        for name, value in batch.items():
            totals[name] = totals.get(name, 0.0) + float(value)
    count = totals.pop("count", 0.0)
    if count == 0:
        raise ValueError("no metrics: not one row was counted")
    means = {name: total / count for name, total in totals.items()}
    if "mse" in means:
        means["rmse"] = math.sqrt(means.pop("mse"))
    return means | {"count": count}

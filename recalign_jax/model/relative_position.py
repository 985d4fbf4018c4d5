"""T5's relative position bias: one learned number per head and bucket of distances, added to attention logits."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


class RelativePositionBias(nnx.Module):
    """The table [N, buckets] of one stack, shared by its layers."""

    def __init__(self, num_heads: int, num_buckets: int, max_distance: int, bidirectional: bool, *, rngs: nnx.Rngs):
        init = nnx.initializers.variance_scaling(1.0, "fan_avg", "uniform")
        self.rel_embedding = nnx.Param(init(rngs.params(), (num_heads, num_buckets), jnp.float32))
        self.max_distance = max_distance
        self.bidirectional = bidirectional

    def __call__(self, length: int) -> jax.Array:
        """The bias between all positions of a row, [N, length, length] float32 (query, key).

        Positions are indices in the row: within a packed segment their differences are those of the segment's
        own positions, and across segments nothing attends. The bias depends only on key - query, so 2 * length
        values are looked up and then skewed into the square: tiled, and cut into rows one shorter than the
        period. Neither this nor its gradient gathers the whole square.
        """
        distances = np.concatenate([np.arange(length), np.arange(-length, 0)])
        period = self.at(distances)  # [N, 2 * length]
        skewed = jnp.tile(period, (1, length))[:, : length * (2 * length - 1)]
        return skewed.reshape(-1, length, 2 * length - 1)[:, :, :length]

    def at(self, distances: jax.Array | np.ndarray) -> jax.Array:
        """The bias for distances (key position - query position) of any shape: [N, *distances.shape]."""
        table = self.rel_embedding[...]
        return jnp.take(table, buckets(distances, table.shape[1], self.max_distance, self.bidirectional), axis=1)


def buckets(distances: jax.Array | np.ndarray, num_buckets: int, max_distance: int, bidirectional: bool) -> jax.Array:
    """The bucket of each distance (key position - query position), int32 in [0, num_buckets).

    Looking back: one bucket a distance for the first half of the buckets, then logarithmically wider ones up to
    `max_distance`. Looking ahead: the same again in the upper half if bidirectional, else bucket 0.
    (Raffel et al. 2020, section 2.1; `relative_position_bucket` in T5X.)
    """
    one_sided = num_buckets // 2 if bidirectional else num_buckets
    back = jnp.maximum(-distances, 0)
    limits = _lower_limits(one_sided, max_distance)
    bucket = jnp.searchsorted(limits, back, side="right", method="compare_all")
    if bidirectional:
        ahead = jnp.searchsorted(limits, jnp.maximum(distances, 0), side="right", method="compare_all")
        bucket = jnp.where(jnp.asarray(distances) > 0, ahead + one_sided, bucket)
    return bucket.astype(jnp.int32)


def _lower_limits(num_buckets: int, max_distance: int) -> np.ndarray:
    """The smallest distance in each bucket but the first. Integers: a float32 logarithm may round wrongly there."""
    exact = num_buckets // 2
    growth = max_distance / exact
    wide = [exact * growth ** (k / (num_buckets - exact)) for k in range(num_buckets - exact)]
    return np.array([*range(1, exact), *(math.ceil(limit - 1e-6) for limit in wide)], np.int32)

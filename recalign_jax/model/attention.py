"""Multi-head attention as in T5: no bias, no scaling of the logits (it is folded into the query's initializer)."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from recalign_jax.model.config import T5Config
from recalign_jax.model.dot_product_attention import MASKED, dot_product_attention
from recalign_jax.model.layers import Dense, Initializer
from recalign_jax.partitioning import constrain

_INIT: Initializer = nnx.initializers.variance_scaling(1.0, "fan_in", "normal")


class Attention(nnx.Module):
    """Projections to and from the heads. Kernels are 2-D, [D, N * H] and [N * H, D], heads major, as in T5X."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        features, joined = config.emb_dim, config.num_heads * config.head_dim
        self.num_heads = config.num_heads

        def query_init(key: jax.Array, shape: tuple[int, int], dtype: DTypeLike) -> jax.Array:
            return _INIT(key, shape, dtype) / config.head_dim**0.5

        self.query = Dense(features, joined, query_init, rngs=rngs)
        self.key = Dense(features, joined, _INIT, rngs=rngs)
        self.value = Dense(features, joined, _INIT, rngs=rngs)
        self.out = Dense(joined, features, _INIT, rngs=rngs)

    def split_heads(self, x: jax.Array) -> jax.Array:
        """[B, L, N * H] -> [B, L, N, H]."""
        return constrain(x.reshape(*x.shape[:-1], self.num_heads, -1), "batch", None, "heads", None)

    def queries(self, x: jax.Array) -> jax.Array:
        """[B, L, D] -> [B, L, N, H]."""
        return self.split_heads(self.query(x, x.dtype))

    def keys_and_values(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """[B, M, D] -> keys and values, each [B, M, N, H]."""
        return self.split_heads(self.key(x, x.dtype)), self.split_heads(self.value(x, x.dtype))

    def output(self, x: jax.Array) -> jax.Array:
        """[B, L, N, H] -> [B, L, D]."""
        return self.out(x.reshape(*x.shape[:-2], -1), x.dtype)

    def __call__(
        self,
        x: jax.Array,
        context: jax.Array,
        mask: jax.Array,
        bias: jax.Array | None,
        noise: jax.Array | None,
    ) -> jax.Array:
        """Attends from x [B, L, D] to context [B, M, D].

        Args:
          mask: bool, broadcasts to [B, 1, L, M]; False is not attended.
          bias: float32 [N, L, M], added to the logits of every row.
          noise: dropout of the weights, [B, N, 1, M].

        Returns:
          [B, L, D].
        """
        keys, values = self.keys_and_values(context)
        return self.output(dot_product_attention(self.queries(x), keys, values, mask, bias, noise))


def softmax(logits: jax.Array, mask: jax.Array, bias: jax.Array | None) -> jax.Array:
    """softmax(logits + bias) over the last axis, in float32, with masked entries at zero weight."""
    if bias is not None:
        logits = logits + bias
    return jax.nn.softmax(jnp.where(mask, logits, MASKED), axis=-1)


def segment_mask(query_segments: jax.Array, key_segments: jax.Array) -> jax.Array:
    """[B, L], [B, M] -> bool [B, 1, L, M]: attend within the same segment; segment 0 is padding, never attended."""
    keys = key_segments[:, None, None, :]
    return (query_segments[:, None, :, None] == keys) & (keys > 0)


def causal_mask(length: int) -> jax.Array:
    """bool [length, length]: attend to the same and earlier positions."""
    return jnp.tril(jnp.ones((length, length), bool))

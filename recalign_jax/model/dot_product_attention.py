"""Attention's two products and the softmax between them, with a gradient that stores nothing of size L x M.

The backward pass computes the logits again from queries and keys, and needs no sum over a row of the weights: that sum
is the product of output and its gradient (Dao et al. 2022, arXiv:2205.14135, appendix B.2).
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

# As in T5X. Finite, so that a query that may attend to nothing (padding) gets uniform weights instead of NaN.
MASKED = -1e10
# What the backward pass needs beside the arguments is marked by this name, for policies of rematerialization.
RESIDUALS = "attention"

Residuals = tuple[Any, ...]


@jax.custom_vjp
def dot_product_attention(
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    mask: jax.Array,
    bias: jax.Array | None,
    noise: jax.Array | None,
) -> jax.Array:
    """dropout(softmax(queries @ keys + bias)) @ values, a head at a time.

    Args:
      queries: [B, L, N, H].
      keys: [B, M, N, H].
      values: [B, M, N, H].
      mask: bool, broadcasts to [B, 1, L, M]; False is not attended.
      bias: float32 [N, L, M], added to the logits of every row.
      noise: float32 [B, N, 1, M], what `dropout_noise` gives for the weights.

    Returns:
      [B, L, N, H] in the dtype of the values; the softmax is float32.
    """
    return _forward(queries, keys, values, mask, bias, noise)[0]


def _forward(
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    mask: jax.Array,
    bias: jax.Array | None,
    noise: jax.Array | None,
) -> tuple[jax.Array, Residuals]:
    logits = _logits(queries, keys, mask, bias)
    top = checkpoint_name(jnp.max(logits, axis=-1, keepdims=True), RESIDUALS)  # [B, N, L, 1]
    scale = checkpoint_name(1 / jnp.sum(jnp.exp(logits - top), axis=-1, keepdims=True), RESIDUALS)
    weights = _times(jnp.exp(logits - top) * scale, noise).astype(values.dtype)
    out = checkpoint_name(jnp.einsum("BNLM,BMNH->BLNH", weights, values), RESIDUALS)
    return out, (queries, keys, values, mask, bias, noise, top, scale, out)


def _backward(residuals: Residuals, gradient: jax.Array) -> tuple[jax.Array | None, ...]:
    """Gradient of the output [B, L, N, H] -> those of the arguments; mask and noise have none."""
    queries, keys, values, mask, bias, noise, top, scale, out = residuals
    weights = jnp.exp(_logits(queries, keys, mask, bias) - top) * scale  # [B, N, L, M] float32
    of_weights = jnp.einsum("BLNH,BMNH->BNLM", gradient, values, preferred_element_type=jnp.float32)
    wide = gradient.astype(jnp.float32) * out.astype(jnp.float32)
    mean = jnp.moveaxis(jnp.sum(wide, axis=-1), 1, 2)[..., None]  # [B, N, L, 1], sum over M of weights * their gradient
    of_logits = jnp.where(mask, weights * (_times(of_weights, noise) - mean), 0.0)
    narrow = of_logits.astype(keys.dtype)
    of_values = jnp.einsum("BNLM,BLNH->BMNH", _times(weights, noise).astype(gradient.dtype), gradient)
    of_queries = jnp.einsum("BNLM,BMNH->BLNH", narrow, keys)
    of_keys = jnp.einsum("BNLM,BLNH->BMNH", narrow, queries)
    return of_queries, of_keys, of_values, None, None if bias is None else _sum_of_rows(of_logits), None


dot_product_attention.defvjp(_forward, _backward)


def _logits(queries: jax.Array, keys: jax.Array, mask: jax.Array, bias: jax.Array | None) -> jax.Array:
    """[B, N, L, M] float32."""
    logits = jnp.einsum("BLNH,BMNH->BNLM", queries, keys, preferred_element_type=jnp.float32)
    return jnp.where(mask, logits if bias is None else logits + bias, MASKED)


def _times(x: jax.Array, noise: jax.Array | None) -> jax.Array:
    return x if noise is None else x * noise


def _sum_of_rows(x: jax.Array) -> jax.Array:
    """[B, N, L, M] -> [N, L, M]. As a product with ones: XLA's CPU backend takes five times longer to sum."""
    return jnp.einsum("B,BNLM->NLM", jnp.ones(x.shape[0], x.dtype), x, precision=jax.lax.Precision.HIGHEST)

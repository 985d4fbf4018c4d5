"""The parts of a T5 layer that are not attention, and the scan that runs a stack of layers.

Parameters are float32 and are cast to the activation dtype where they are used. Initializers are T5X's
(`t5x/examples/t5/layers.py`): kernels have variance 1/fan_in, token embeddings have variance 1.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from recalign_jax.model.dot_product_attention import RESIDUALS
from recalign_jax.partitioning import constrain

Initializer = Callable[..., jax.Array]
KERNEL_INIT: Initializer = nnx.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")


class Dense(nnx.Module):
    """x @ kernel, no bias (T5 has none). The kernel is 2-D, [inputs, outputs], also where outputs are N * H."""

    def __init__(self, inputs: int, outputs: int, init: Initializer = KERNEL_INIT, *, rngs: nnx.Rngs):
        self.kernel = nnx.Param(init(rngs.params(), (inputs, outputs), jnp.float32))

    def __call__(self, x: jax.Array, dtype: DTypeLike) -> jax.Array:
        """[..., inputs] -> [..., outputs] in `dtype`."""
        # As one matrix product: XLA's CPU backend is three times slower at a gradient that contracts two dimensions.
        flat = x.reshape(-1, x.shape[-1]).astype(dtype)
        return jnp.dot(flat, self.kernel[...].astype(dtype)).reshape(*x.shape[:-1], -1)


class LayerNorm(nnx.Module):
    """Divides by the root mean square: no mean is subtracted, no bias added (Zhang and Sennrich 2019)."""

    def __init__(self, features: int, epsilon: float):
        self.scale = nnx.Param(jnp.ones(features, jnp.float32))
        self.epsilon = epsilon

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., D] -> [..., D] in x's dtype; the statistics are float32."""
        wide = x.astype(jnp.float32)
        normed = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.epsilon)
        return normed.astype(x.dtype) * self.scale[...].astype(x.dtype)


class Embedding(nnx.Module):
    """The token embedding, shared by encoder and decoder."""

    def __init__(self, vocab_size: int, features: int, *, rngs: nnx.Rngs):
        self.embedding = nnx.Param(jax.random.normal(rngs.params(), (vocab_size, features), jnp.float32))

    def __call__(self, tokens: jax.Array, dtype: DTypeLike) -> jax.Array:
        """[...] int -> [..., D] in `dtype`. A token >= V gives NaN, so that the mistake shows."""
        return jnp.take(self.embedding[...], tokens, axis=0).astype(dtype)


class Mlp(nnx.Module):
    """act_0(x wi_0) * act_1(x wi_1) @ wo: gated GELU with T5.1.1's ('gelu', 'linear') (Shazeer 2020)."""

    def __init__(self, features: int, hidden: int, activations: tuple[str, ...], *, rngs: nnx.Rngs):
        self.activations = activations
        for number, _ in enumerate(activations):
            setattr(self, f"wi_{number}", Dense(features, hidden, rngs=rngs))
        self.wo = Dense(hidden, features, rngs=rngs)

    def __call__(self, x: jax.Array, noise: jax.Array | None) -> jax.Array:
        """[B, L, D], dropout noise [B, 1, F] -> [B, L, D]."""
        product: jax.Array | None = None
        for number, name in enumerate(self.activations):
            y = ACTIVATION_FUNCTIONS[name](getattr(self, f"wi_{number}")(x, x.dtype))
            y = constrain(y, "batch", None, "mlp")  # [B, L, F]
            product = y if product is None else product * y
        assert product is not None
        return self.wo(dropout(product, noise), x.dtype)


ACTIVATION_FUNCTIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "linear": lambda x: x,
}


def dropout_noise(
    key: jax.Array | None, rate: float, batch: int, shapes: Sequence[tuple[int, ...]]
) -> list[jax.Array | None]:
    """Returns what to multiply with, for dropout in several places: [batch, *shape] of each of `shapes`, float32.

    An entry is 0 with probability `rate`, else 1 / (1 - rate). All come from one draw, as each draw is several hundred
    operations in a compiled program. Without dropout (no key, or rate 0) there are Nones.

    Noise is shared along the length (a dimension of 1), as T5 and T5X share it: far fewer random bits.
    """
    if key is None or rate == 0.0:
        return [None] * len(shapes)
    sizes = [math.prod(shape) for shape in shapes]
    noise = jax.random.bernoulli(key, 1.0 - rate, (batch, sum(sizes))) / (1.0 - rate)
    parts = jnp.split(noise, np.cumsum(sizes)[:-1], axis=1)
    return [part.reshape(batch, *shape) for part, shape in zip(parts, shapes, strict=True)]


def dropout(x: jax.Array, noise: jax.Array | None) -> jax.Array:
    """x times the noise of `dropout_noise`, which broadcasts to x; x itself if there is none."""
    return x if noise is None else x * noise.astype(x.dtype)


def stack_layers(create: Callable[[nnx.Rngs], nnx.Module], number: int, rngs: nnx.Rngs) -> nnx.Module:
    """Returns one module whose every parameter is that of `number` layers, stacked on a new first axis."""
    return nnx.split_rngs(splits=number)(nnx.vmap(create, in_axes=(0,), out_axes=0))(rngs)


def scan_layers(
    layers: Any, body: Callable[[Any, Any, Any], tuple[Any, Any]], carry: Any, inputs: Any, remat: str = "none"
) -> tuple[Any, Any]:
    """Runs `carry, output = body(layer, carry, input)` over stacked layers; returns the last carry, the outputs.

    The body is traced once whatever the depth. `inputs` is a pytree with a first axis of layers (or None).
    """
    graphdef, params = nnx.split(layers)

    def step(carry: Any, xs: Any) -> tuple[Any, Any]:
        return body(nnx.merge(graphdef, xs[0]), carry, xs[1])

    # Inside a scan the loop already keeps XLA from merging the recomputation with the forward pass.
    step = jax.checkpoint(step, policy=_REMAT_POLICIES[remat], prevent_cse=False)
    return jax.lax.scan(step, carry, (params, inputs))


# Also with 'none' only matrix products are kept for the backward pass, and of attention what is no longer than a row.
# What lies between them (softmax, gelu, norms, dropout noise) is computed again: measured on a CPU, a fifth faster than
# storing and reading it, in 0.4 of the memory.
_KEEP_PRODUCTS = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
_REMAT_POLICIES = {
    "none": jax.checkpoint_policies.save_from_both_policies(
        _KEEP_PRODUCTS, jax.checkpoint_policies.save_only_these_names(RESIDUALS)
    ),
    "minimal": _KEEP_PRODUCTS,
    "full": jax.checkpoint_policies.nothing_saveable,
}

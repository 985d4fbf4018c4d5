"""Attention's own gradient, next to the one that JAX derives from the formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recalign_jax.model.dot_product_attention import MASKED, dot_product_attention

B, L, M, N, H = 3, 5, 7, 2, 4


def formula(queries, keys, values, mask, bias, noise):
    logits = jnp.einsum("BLNH,BMNH->BNLM", queries, keys)
    if bias is not None:
        logits = logits + bias
    weights = jax.nn.softmax(jnp.where(mask, logits, MASKED), axis=-1)
    return jnp.einsum("BNLM,BMNH->BLNH", weights if noise is None else weights * noise, values)


def arguments(with_bias, with_noise, seed=0):
    """Row 0 attends as it likes, row 1 within a mask, and row 2 has a query that may attend to nothing."""
    random = np.random.default_rng(seed)
    queries, keys, values = (random.normal(size=(B, n, N, H)).astype(np.float32) for n in (L, M, M))
    mask = np.ones((B, 1, L, M), bool)
    mask[1] = random.random((1, L, M)) < 0.5
    mask[1, :, :, 0] = True
    mask[2, :, 1] = False
    bias = random.normal(size=(N, L, M)).astype(np.float32) if with_bias else None
    noise = (random.random((B, N, 1, M)) < 0.9).astype(np.float32) / np.float32(0.9) if with_noise else None
    return queries, keys, values, mask, bias, noise


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("with_noise", [True, False])
def test_output_and_gradient_are_the_formulas(with_bias, with_noise):
    given = arguments(with_bias, with_noise)
    of = (0, 1, 2, 4) if with_bias else (0, 1, 2)
    direction = np.random.default_rng(1).normal(size=(B, L, N, H)).astype(np.float32)

    def value(attend):
        return jax.value_and_grad(lambda *a: jnp.sum(direction * attend(*a)), argnums=of)(*given)

    np.testing.assert_allclose(dot_product_attention(*given), formula(*given), atol=1e-6)
    for ours, expected in zip(
        jax.tree.leaves(value(dot_product_attention)), jax.tree.leaves(value(formula)), strict=True
    ):
        np.testing.assert_allclose(ours, expected, atol=2e-6, rtol=1e-5)


def test_nothing_of_the_size_of_the_logits_is_kept():
    given = arguments(True, True)
    kept = jax.eval_shape(
        lambda q, k, v: jax.vjp(lambda *x: dot_product_attention(*x, *given[3:]), q, k, v)[1], *given[:3]
    )
    assert all(leaf.size < B * N * L * M for leaf in jax.tree.leaves(kept))
    plain = jax.eval_shape(lambda q, k, v: jax.vjp(lambda *x: formula(*x, *given[3:]), q, k, v)[1], *given[:3])
    assert any(leaf.size == B * N * L * M for leaf in jax.tree.leaves(plain))


def test_activations_of_half_precision_keep_their_dtype():
    half = [jnp.asarray(x, jnp.bfloat16) for x in arguments(False, False)[:3]]
    mask = arguments(False, False)[3]
    out, gradient = jax.vjp(lambda *x: dot_product_attention(*x, mask, None, None), *half)
    assert {x.dtype for x in (out, *gradient(out))} == {jnp.dtype(jnp.bfloat16)}
    np.testing.assert_allclose(out.astype(np.float32), formula(*arguments(False, False)), atol=0.05)

"""Adafactor against T5X's own three steps, a float64 oracle, and optax's where the two are the same optimizer."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recalign_jax.model.config import T5Config
from recalign_jax.model.t5 import abstract_params
from recalign_jax.training.adafactor import Factored, adafactor, leaf_axes
from tests.shared_data import shared

HEADS = 4  # of the fixture
LAYER = re.compile(r"layers_(\d+)/")


def run(optimizer, params, gradients):
    """The parameters after each gradient."""
    state, update, seen = optimizer.init(params), jax.jit(optimizer.update), []
    for gradient in gradients:
        updates, state = update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        seen.append(params)
    return seen


def unstacked(tree):
    return tree


def stacked(tree):
    """`encoder/layers_3/x` of every layer -> `encoder/layers/x` [layers, ...]."""
    names = dict.fromkeys(LAYER.sub("layers/", name) for name in tree)
    layers = {name: sorted(key for key in tree if LAYER.sub("layers/", key) == name) for name in names}
    return {
        name: np.stack([tree[key] for key in keys]) if "layers/" in name else tree[name]
        for name, keys in layers.items()
    }


LAYOUTS = {"unstacked": unstacked, "stacked": stacked}


@pytest.fixture(scope="module")
def golden():
    with np.load(shared("fixtures/t5x_tiny/adafactor_golden.npz")) as file:
        arrays = {name: file[name] for name in file.files}

    def part(prefix):
        return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}

    return {
        "learning_rates": arrays["learning_rates"],
        "params": [part(f"step{step}/") for step in range(4)],
        "gradients": [part(f"grad{step}/") for step in (1, 2, 3)],
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_t5x_per_layer(golden, layout):
    lay_out = LAYOUTS[layout]
    rates = jnp.asarray(golden["learning_rates"], jnp.float32)
    optimizer = adafactor(lambda step: rates[step], min_dim_size_to_factor=16)
    start, *expected = [lay_out(params) for params in golden["params"]]
    found = run(optimizer, start, [lay_out(gradient) for gradient in golden["gradients"]])
    for step, (ours, theirs) in enumerate(zip(found, expected, strict=True), 1):
        assert ours.keys() == theirs.keys()
        for name in theirs:
            message = f"{name} after step {step}"
            np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-5, atol=1e-6, err_msg=message)
            moved, should = (after[name] - start[name] for after in (ours, theirs))
            # The steps are far smaller than the parameters: compare them too, not only their sum.
            error = np.linalg.norm(moved - should) / np.linalg.norm(should)
            assert error < 1e-4, f"{message}: relative error of what it moved {error}"


def test_the_fixture_has_both_kinds_of_statistics(golden):
    state = adafactor(1.0, min_dim_size_to_factor=16).init(stacked(golden["params"][0]))[0]
    moments = state.moments
    assert moments["encoder/layers/mlp/wi_0/kernel"].row.shape == (3, 32)
    assert moments["encoder/layers/mlp/wi_0/kernel"].column.shape == (3, 64)
    assert moments["token_embedder/embedding"].row.shape == (384,)
    assert moments["encoder/relpos_bias/rel_embedding"].shape == (4, 32)
    assert moments["decoder/layers/pre_mlp_layer_norm/scale"].shape == (2, 32)


def oracle(parameter, gradients, learning_rate, beta1, weight_decay, factored):
    """Algorithms 4 and 5 of Shazeer and Stern (2018) for one matrix, in float64, as a loop over the steps."""
    parameter, momentum = parameter.astype(np.float64), 0.0
    rows = columns = full = 0.0
    for t, gradient in enumerate(gradients, 1):
        gradient, decay = gradient.astype(np.float64), 1 - t**-0.8
        square = gradient**2 + 1e-30
        if factored:
            rows = decay * rows + (1 - decay) * square.sum(1)
            columns = decay * columns + (1 - decay) * square.sum(0)
            second = np.outer(rows, columns) / rows.sum()
        else:
            second = full = decay * full + (1 - decay) * square
        update = gradient / np.sqrt(second)
        update /= max(1.0, np.sqrt(np.mean(update**2)))
        step = learning_rate * max(1e-3, np.sqrt(np.mean(parameter**2))) * update
        momentum = step if beta1 is None else beta1 * momentum + (1 - beta1) * step
        parameter = parameter - momentum - learning_rate * weight_decay * parameter
    return parameter


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    scale=st.sampled_from([1e-6, 1e-2, 10.0]),
    beta1=st.sampled_from([None, 0.9]),
    weight_decay=st.sampled_from([0.0, 0.1]),
    factored=st.booleans(),
)
def test_each_stacked_layer_is_an_optimizer_of_its_own(seed, scale, beta1, weight_decay, factored):
    generator = np.random.default_rng(seed)
    # Layers of very different size: any mean over the layers would show.
    sizes = scale * np.array([1.0, 100.0, 0.01], np.float32)[:, None, None]
    parameter, *gradients = (sizes * generator.normal(size=(3, 6, 8)).astype(np.float32) for _ in range(4))
    optimizer = adafactor(0.1, beta1=beta1, weight_decay=weight_decay, min_dim_size_to_factor=6 if factored else 7)
    found = run(optimizer, {"layers": {"kernel": parameter}}, [{"layers": {"kernel": g}} for g in gradients])[-1]
    for layer in range(3):
        expected = oracle(parameter[layer], [g[layer] for g in gradients], 0.1, beta1, weight_decay, factored)
        tolerance = 1e-5 * np.abs(expected).max()
        np.testing.assert_allclose(found["layers"]["kernel"][layer], expected, rtol=1e-5, atol=tolerance)


def test_is_optax_adafactor_on_one_matrix_only():
    """On one matrix the two agree. Stacked they don't: optax factors the two largest axes of [layers, D, F], and clips
    and scales all layers as one block."""
    generator = np.random.default_rng(0)
    arrays = [generator.normal(size=(3, 12, 16)).astype(np.float32) for _ in range(4)]
    arrays[0][1] *= 50

    def final(optimizer, make_tree):
        start, *gradients = [make_tree(array) for array in arrays]
        return run(optimizer, start, gradients)[-1]["layers"]["kernel"]

    ours, theirs = adafactor(0.1, min_dim_size_to_factor=8), optax.adafactor(0.1, min_dim_size_to_factor=8)
    whole = final(ours, lambda array: {"layers": {"kernel": array}})
    for layer in range(3):
        alone = final(theirs, lambda array, layer=layer: {"layers": {"kernel": array[layer]}})
        np.testing.assert_allclose(whole[layer], alone, rtol=1e-5, atol=1e-6)
    assert np.abs(whole - final(theirs, lambda array: {"layers": {"kernel": array}})).max() > 0.1


def test_leaf_axes():
    assert leaf_axes("token_embedder/embedding", (384, 32)) == ((), (0,), (1,))
    assert leaf_axes("encoder/layers/mlp/wo/kernel", (3, 64, 32)) == ((0,), (1,), (2,))
    assert leaf_axes("encoder/layers/pre_mlp_layer_norm/scale", (3, 32)) == ((0,), (), (1,))
    assert leaf_axes("temperature", ()) == ((), (), ())
    with pytest.raises(ValueError, match=r"conv/kernel, of shape \(3, 4, 5\), is no matrix"):
        leaf_axes("conv/kernel", (3, 4, 5))


def test_update_needs_params():
    params = {"kernel": jnp.ones((2, 2))}
    optimizer = adafactor(1.0)
    with pytest.raises(ValueError, match="params"):
        optimizer.update(params, optimizer.init(params))


def test_bfloat16_gradients_leave_statistics_float32():
    params = {"kernel": jnp.ones((4, 4)), "scale": jnp.ones(4)}
    optimizer = adafactor(1e-3, beta1=0.9, min_dim_size_to_factor=4)
    gradients = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    updates, state = optimizer.update(gradients, optimizer.init(params), params)
    floats = [x for x in jax.tree.leaves((updates, state)) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert {x.dtype for x in floats} == {np.dtype("float32")}


@pytest.mark.parametrize("beta1", [None, 0.9])
def test_jit_with_donation(beta1):
    params = {"layers": {"kernel": jnp.ones((2, 8, 8)), "scale": jnp.ones((2, 8))}}
    gradients = jax.tree.map(jnp.ones_like, params)
    optimizer = adafactor(lambda step: 0.1 / (step + 1), beta1=beta1, weight_decay=0.1, min_dim_size_to_factor=8)

    def step(params, state, gradients):
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    expected = step(*step(params, optimizer.init(params), gradients), gradients)
    donating = jax.jit(step, donate_argnums=(0, 1))
    old = state = optimizer.init(params)
    params, state = donating(params, state, gradients)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old))
    params, state = donating(params, state, gradients)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), (params, state), expected)


def size_in_bytes(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def test_memory_for_flan_t5_xl():
    config = T5Config(
        emb_dim=2048, num_heads=32, head_dim=64, num_encoder_layers=24, num_decoder_layers=24, mlp_dim=5120
    )
    params = abstract_params(config)
    state = jax.eval_shape(adafactor(1e-3).init, params)
    adamw = jax.eval_shape(optax.adamw(1e-3).init, params)
    assert size_in_bytes(adamw) > 2 * size_in_bytes(params)
    assert size_in_bytes(state) < size_in_bytes(params) / 1000
    is_factored = jax.tree.map(
        lambda moment: isinstance(moment, Factored), state[0].moments, is_leaf=lambda node: isinstance(node, Factored)
    )
    for path, factored in jax.tree_util.tree_leaves_with_path(is_factored):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        assert factored == name.endswith(("kernel", "/embedding")), name

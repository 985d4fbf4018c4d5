"""What must hold of the model by itself: packing, decoding, dropout, depth, remat, numerics."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from recalign_jax.checkpoint.stacking import flatten
from recalign_jax.errors import InputError
from recalign_jax.model import layers, relative_position, t5
from recalign_jax.model.config import T5Config

CONFIG = T5Config(
    vocab_size=64, emb_dim=32, num_heads=3, head_dim=8, num_encoder_layers=2, num_decoder_layers=2, mlp_dim=48
)
TOLERANCE = 1e-4


# Compiles in half the time.
FAST_COMPILATION = {"xla_backend_optimization_level": 0}


@pytest.fixture(scope="module")
def model():
    """(graphdef, params), with random norms too."""
    rng = np.random.default_rng(0)

    def draw(shape):
        noise = rng.standard_normal(shape).astype(np.float32)
        return noise / shape[-2] ** 0.5 if len(shape) > 1 else 1 + 0.2 * noise

    return t5.graph(CONFIG), jax.tree.map(lambda leaf: draw(leaf.shape), t5.abstract_params(CONFIG))


@functools.partial(jax.jit, static_argnums=0, compiler_options=FAST_COMPILATION)
def forward(graphdef, params, *args, **kwargs):
    return nnx.merge(graphdef, params)(*args, **kwargs)


def random_tokens(shape, seed=0):
    return np.random.default_rng(seed).integers(2, CONFIG.vocab_size, shape).astype(np.int32)


def test_packed_row_equals_its_samples_alone(model):
    sizes = [(7, 3), (12, 5), (2, 1)]  # tokens of encoder and decoder, a sample
    length, steps = 24, 11  # leaves padding at the end of both
    samples = [(random_tokens(n, 2 * i), random_tokens(t, 2 * i + 1)) for i, (n, t) in enumerate(sizes)]
    rows = {
        name: np.zeros((1, size), np.int32)
        for name, size in (("e", length), ("es", length), ("d", steps), ("ds", steps))
    }
    starts = []
    at, at_step = 0, 0
    for segment, (tokens, targets) in enumerate(samples, start=1):
        inputs = np.concatenate([[0], targets[:-1]])
        rows["e"][0, at : at + len(tokens)], rows["es"][0, at : at + len(tokens)] = tokens, segment
        rows["d"][0, at_step : at_step + len(inputs)], rows["ds"][0, at_step : at_step + len(inputs)] = inputs, segment
        starts.append(at_step)
        at, at_step = at + len(tokens), at_step + len(inputs)
    packed = forward(*model, rows["e"], rows["d"], rows["es"], rows["ds"])
    for start, (tokens, targets) in zip(starts, samples, strict=True):
        encoder, decoder = np.zeros((1, length), np.int32), np.zeros((1, steps), np.int32)
        encoder[0, : len(tokens)], decoder[0, 1 : len(targets)] = tokens, targets[:-1]
        alone = forward(*model, encoder, decoder)[0, : len(targets)]
        np.testing.assert_allclose(packed[0, start : start + len(targets)], alone, rtol=0, atol=TOLERANCE)


def test_later_targets_and_padding_are_not_seen(model):
    encoder, decoder = random_tokens((2, 10)), random_tokens((2, 6), 1)
    encoder[1, 4:] = 0
    logits = forward(*model, encoder, decoder)
    changed = decoder.copy()
    changed[:, 4:] = 9
    np.testing.assert_array_equal(forward(*model, encoder, changed)[:, :4], logits[:, :4])
    short = forward(*model, encoder[1:, :4], decoder[1:])
    np.testing.assert_allclose(logits[1:], short, rtol=0, atol=TOLERANCE)


def test_decode_step_equals_decode(model):
    graphdef, params = model
    users, beams, steps = 3, 4, 7
    encoder = random_tokens((users, 9))
    encoder[1, 5:] = 0
    decoder = random_tokens((users, beams, steps), 1)
    decoder[:, :, 0] = 0
    tiled = np.repeat(encoder, beams, axis=0)
    expected = forward(graphdef, params, tiled, decoder.reshape(-1, steps)).reshape(users, beams, steps, -1)

    @functools.partial(jax.jit, compiler_options=FAST_COMPILATION)
    def start(params):
        merged = nnx.merge(graphdef, params)
        return merged.init_cache(merged.encode(encoder), encoder > 0, beams, steps)

    chosen = random_tokens((users, beams, 1, 5), 2)

    @functools.partial(jax.jit, compiler_options=FAST_COMPILATION)
    def step(params, *args):
        merged = nnx.merge(graphdef, params)
        hidden, cache = merged.decode_step(*args)
        tokens = chosen.repeat(hidden.shape[2], 2)
        return merged.logits(hidden), merged.token_logits(hidden, tokens, merged.output_embeddings()), cache

    cross, cache = start(params)
    assert {leaf.shape[:3] for leaf in jax.tree.leaves(cache)} == {(CONFIG.num_decoder_layers, users, beams)}
    assert beams not in {size for leaf in jax.tree.leaves(cross) for size in leaf.shape}  # the encoder isn't tiled
    for position, size in ((0, 1), (1, 1), (2, 3), (5, 2)):  # one token at a time, and several
        here = slice(position, position + size)
        logits, some, cache = step(params, decoder[:, :, here], position, cross, cache)
        np.testing.assert_allclose(logits, expected[:, :, here], rtol=0, atol=TOLERANCE)
        at_chosen = np.take_along_axis(np.asarray(logits), chosen.repeat(size, 2), -1)
        np.testing.assert_allclose(some, at_chosen, rtol=0, atol=TOLERANCE)


def test_beams_follow_their_cache(model):
    """Gathering the cache along its beam axis is all it takes to reorder beams."""
    graphdef, params = model
    first, second = np.array([[0, 3], [4, 5]], np.int32), np.array([[6, 7], [8, 9]], np.int32)

    @functools.partial(jax.jit, compiler_options=FAST_COMPILATION)
    def decode(params):
        merged, encoder = nnx.merge(graphdef, params), random_tokens((2, 5))
        cross, cache = merged.init_cache(merged.encode(encoder), encoder > 0, 2, 2)
        _, cache = merged.decode_step(first[..., None], 0, cross, cache)
        straight, _ = merged.decode_step(second[..., None], 1, cross, cache)
        swapped = jax.tree.map(lambda leaf: leaf[:, :, ::-1], cache)
        return straight, merged.decode_step(second[:, ::-1, None], 1, cross, swapped)[0]

    straight, swapped = decode(params)
    assert np.abs(straight[:, 0] - straight[:, 1]).max() > 0.1
    np.testing.assert_allclose(swapped, straight[:, ::-1], rtol=0, atol=1e-6)


def count_equations(jaxpr):
    inner = [value for equation in jaxpr.eqns for value in jax.tree.leaves(equation.params, is_leaf=is_jaxpr)]
    return len(jaxpr.eqns) + sum(count_equations(getattr(x, "jaxpr", x)) for x in inner if is_jaxpr(x))


def is_jaxpr(value):
    return hasattr(value, "eqns") or hasattr(value, "jaxpr")


def test_program_does_not_grow_with_depth():
    def size(depth):
        config = dataclasses.replace(CONFIG, num_encoder_layers=depth, num_decoder_layers=depth)
        graphdef = t5.graph(config)

        def loss(params, tokens, key):
            return jnp.sum(nnx.merge(graphdef, params)(tokens, tokens, dropout_key=key))

        args = t5.abstract_params(config), jax.ShapeDtypeStruct((2, 8), jnp.int32), jax.random.key(0)
        traced = jax.jit(jax.grad(loss)).trace(*args)
        return count_equations(traced.jaxpr.jaxpr), len(traced.lower().as_text().splitlines())

    assert size(2) == size(6)
    assert size(2)[0] > 100


def test_dropout_is_a_function_of_its_key(model):
    encoder, decoder = random_tokens((2, 8)), random_tokens((2, 4), 1)
    plain = forward(*model, encoder, decoder)
    one, again, other = (forward(*model, encoder, decoder, dropout_key=jax.random.key(k)) for k in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - other).max() > 0.1
    assert np.abs(one - plain).max() > 0.1


def test_dropout_keeps_the_mean_and_differs_between_places():
    first, second = layers.dropout_noise(jax.random.key(0), 0.25, 400, [(1, 50), (3, 1, 20)])
    assert first.shape == (400, 1, 50)
    assert second.shape == (400, 3, 1, 20)
    np.testing.assert_allclose(np.unique(first), [0, 1 / 0.75], rtol=1e-6)
    # 20,000 draws: five standard errors of a mean are 5 * sqrt(0.75 * 0.25) / 0.75 / sqrt(20,000)
    np.testing.assert_allclose([first.mean(), second.mean()], 1, atol=0.021)
    assert np.mean((first[:, 0, :20] > 0) == (second[:, 0, 0] > 0)) < 0.7  # independent: 0.75 ** 2 + 0.25 ** 2
    assert (
        layers.dropout_noise(None, 0.25, 4, [(1, 2)])
        == layers.dropout_noise(jax.random.key(0), 0.0, 4, [(1, 2)])
        == [None]
    )


def test_dropout_differs_between_layers(model, monkeypatch):
    keys = []

    def spy(stacked, body, carry, inputs, remat):
        keys.append(jax.random.key_data(inputs))
        return carry, None

    monkeypatch.setattr(t5, "scan_layers", spy)

    @jax.jit
    def keys_of_layers():
        nnx.merge(*model)(random_tokens((1, 4)), random_tokens((1, 3)), dropout_key=jax.random.key(3))
        return jnp.concatenate(keys)

    found = np.asarray(keys_of_layers())
    assert len(np.unique(found, axis=0)) == CONFIG.num_encoder_layers + CONFIG.num_decoder_layers


def test_remat_changes_no_gradient(model):
    encoder, decoder = random_tokens((2, 8)), random_tokens((2, 4), 1)

    def gradients(remat):
        graphdef = t5.graph(dataclasses.replace(CONFIG, remat=remat))

        def loss(params):
            logits = nnx.merge(graphdef, params)(encoder, decoder, dropout_key=jax.random.key(3))
            return jnp.mean(jax.nn.logsumexp(logits, axis=-1))

        return flatten(jax.jit(jax.grad(loss), compiler_options=FAST_COMPILATION)(model[1]))

    expected = gradients("none")
    for path, gradient in gradients("full").items():
        np.testing.assert_allclose(gradient, expected[path], rtol=1e-4, atol=1e-6, err_msg=path)


def test_remat_stores_less():
    def stored(remat):
        config = dataclasses.replace(CONFIG, remat=remat)
        graphdef = t5.graph(config)
        tokens = jax.ShapeDtypeStruct((4, 64), jnp.int32)

        def residuals(params, tokens):
            return jax.vjp(lambda p: nnx.merge(graphdef, p)(tokens, tokens), params)[1]

        return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(residuals, t5.abstract_params(config), tokens)))

    assert stored("full") < stored("minimal") < stored("none")


def test_rows_without_a_token_are_masked(model):
    _, params = model
    config = dataclasses.replace(CONFIG, num_tokens=50)
    logits = forward(t5.graph(config), params, random_tokens((1, 5)), random_tokens((1, 3)))
    assert np.all(logits[..., 50:] == -1e9)
    np.testing.assert_array_equal(
        logits[..., :50], forward(*model, random_tokens((1, 5)), random_tokens((1, 3)))[..., :50]
    )


def test_token_outside_the_vocabulary_shows(model):
    tokens = random_tokens((2, 5))
    tokens[0, 2] = CONFIG.vocab_size
    logits = forward(*model, tokens, random_tokens((2, 3)))
    assert np.all(np.isnan(logits[0]))
    assert not np.any(np.isnan(logits[1]))


def test_bfloat16_activations_stay_near_float32(model):
    _, params = model
    graphdef = t5.graph(dataclasses.replace(CONFIG, activation_dtype="bfloat16"))
    encoder, decoder = random_tokens((4, 12)), random_tokens((4, 5), 1)
    logits = forward(graphdef, params, encoder, decoder)
    assert logits.dtype == jnp.float32
    hidden = jax.eval_shape(lambda p: nnx.merge(graphdef, p).encode(jnp.asarray(encoder)), params)
    assert hidden.dtype == jnp.bfloat16
    expected = forward(*model, encoder, decoder)
    assert np.abs(logits - expected).mean() < 0.05 * np.abs(expected).mean()


def test_initial_values_are_those_of_t5x():
    config = dataclasses.replace(CONFIG, emb_dim=256, num_heads=4, head_dim=16, mlp_dim=512, vocab_size=512)
    init = jax.jit(functools.partial(t5.init_params, config), compiler_options=FAST_COMPILATION)
    expected = {  # standard deviation, t5x/examples/t5/layers.py and network.py
        "token_embedder/embedding": 1.0,
        "encoder/layers/attention/query/kernel": 256**-0.5 / 16**0.5,
        "encoder/layers/attention/key/kernel": 256**-0.5,
        "encoder/layers/attention/value/kernel": 256**-0.5,
        "decoder/layers/encoder_decoder_attention/out/kernel": 64**-0.5,
        "decoder/layers/mlp/wi_0/kernel": 256**-0.5,
        "decoder/layers/mlp/wo/kernel": 512**-0.5,
        "decoder/logits_dense/kernel": 256**-0.5,
        "encoder/relpos_bias/rel_embedding": ((4 + 32) / 2) ** -0.5,
    }
    flat = flatten(init(jax.random.key(0)))
    for path, deviation in expected.items():
        tolerance = 0.15 if "rel_embedding" in path else 0.02
        np.testing.assert_allclose(np.std(flat[path]), deviation, rtol=tolerance, err_msg=path)
    assert all(np.all(flat[path] == 1) for path in flat if path.endswith("scale"))
    first, second = flat["encoder/layers/mlp/wo/kernel"]
    assert np.abs(first - second).max() > 0.01  # layers are drawn apart


@pytest.mark.parametrize("length", [1, 2, 33])
def test_position_bias_of_a_row_is_that_of_each_pair(length):
    bias = relative_position.RelativePositionBias(2, 32, 128, bidirectional=True, rngs=nnx.Rngs(0))
    positions = np.arange(length)
    pairs = bias.at(positions[None, :] - positions[:, None])
    np.testing.assert_array_equal(bias(length), pairs)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 128), (32, 256), (16, 50)])
def test_buckets_equal_transformers(bidirectional, num_buckets, max_distance):
    torch = pytest.importorskip("torch")
    from transformers.models.t5.modeling_t5 import T5Attention

    distances = np.arange(-2000, 2001)
    expected = T5Attention._relative_position_bucket(
        torch.from_numpy(distances), bidirectional, num_buckets, max_distance
    )
    ours = relative_position.buckets(distances, num_buckets, max_distance, bidirectional)
    np.testing.assert_array_equal(ours, expected.numpy())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("activation_dtype", "bfloat"), ("remat", "ful"), ("mlp_activations", ("gelu", "linea")), ("num_tokens", 65)),
        *(("emb_dim", 64.5), ("emb_dim", 0), ("emb_dim", None), ("num_heads", "4"), ("mlp_activations", ())),
        *(("dropout_rate", 1.0), ("dropout_rate", -0.5), ("dropout_rate", None), ("layer_norm_epsilon", -1e-6)),
        *(("relative_attention_num_buckets", 2), ("relative_attention_max_distance", 16)),
    ],
)
def test_bad_configuration_is_named(field, value):
    with pytest.raises(InputError, match=field):
        dataclasses.replace(CONFIG, **{field: value})

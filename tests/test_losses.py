"""Losses against plain formulas, and packed batches against their samples one by one through a tiny model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from recalign_jax.errors import InputError
from recalign_jax.model import lora, t5
from recalign_jax.model.config import T5Config
from recalign_jax.model.lora import LoraOptions
from recalign_jax.training import losses, packing
from recalign_jax.training.step import (
    StepOptions,
    TrainState,
    accumulated,
    check_divides,
    loss_sums,
    make_eval_step,
    make_train_step,
)

FAST = {"xla_backend_optimization_level": 0}  # compiles in half the time
VOCAB, NUM_TASKS, LENGTH, TARGET_LENGTH = 40, 3, 24, 12
CONFIG = T5Config(
    emb_dim=16,
    num_heads=2,
    head_dim=8,
    num_encoder_layers=1,
    num_decoder_layers=1,
    mlp_dim=16,
    vocab_size=VOCAB,
    dropout_rate=0.5,
    activation_dtype="float32",
)


@pytest.fixture(scope="module")
def model():
    """(graphdef, params) with weights large enough for logits far from uniform."""
    random = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: random.normal(0, 0.5, leaf.shape).astype(np.float32), t5.abstract_params(CONFIG))
    return t5.graph(CONFIG), params


@pytest.fixture(scope="module")
def window():
    """(inputs, targets, tasks) of 21 samples."""
    random = np.random.default_rng(1)
    inputs = [random.integers(3, VOCAB, size).astype(np.int32) for size in random.integers(1, LENGTH, 21)]
    targets = [random.integers(3, VOCAB, size).astype(np.int32) for size in random.integers(1, TARGET_LENGTH, 21)]
    return inputs, targets, np.arange(21) % NUM_TASKS


def packed(window, normalization: str) -> dict[str, jax.Array]:
    """Rows of the window, filled up with empty rows to a fixed number."""
    rows = packing.pack(*window, LENGTH, TARGET_LENGTH, normalization)
    return {name: jnp.asarray(np.pad(values, ((0, 21 - len(values)), (0, 0)))) for name, values in rows.items()}


@pytest.fixture(scope="module")
def eval_step(model):
    return jax.jit(make_eval_step(model[0], NUM_TASKS))


# Formulas.


def plain_cross_entropy(logits: np.ndarray, targets: np.ndarray, z_loss: float) -> tuple[np.ndarray, np.ndarray]:
    """-log softmax(logits)[target] and z_loss * log(sum exp)**2, token by token in float64."""
    entropy, z = np.zeros(targets.shape), np.zeros(targets.shape)
    for place in np.ndindex(targets.shape):
        scores = logits[place].astype(np.float64)
        log_normalizer = scores.max() + np.log(np.exp(scores - scores.max()).sum())
        entropy[place] = log_normalizer - scores[targets[place]]
        z[place] = z_loss * log_normalizer**2
    return entropy, z


@pytest.mark.parametrize(("scale", "shift"), [(1, 0), (20, 0), (3, 500), (3, -500)])
def test_cross_entropy_and_z_loss(scale, shift):
    random = np.random.default_rng(0)
    logits = (scale * random.normal(size=(3, 5, 17)) + shift).astype(np.float32)
    targets = random.integers(0, 17, (3, 5))
    found = jax.jit(losses.cross_entropy)(logits, targets, 1e-3)
    for ours, expected in zip(found, plain_cross_entropy(logits, targets, 1e-3), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6 * max(1, abs(shift)))


def test_gradient_of_the_loss():
    """(1 + 2 z log Z) softmax - one-hot, as T5X's custom gradient has it."""
    random = np.random.default_rng(0)
    logits, targets, z_loss = random.normal(size=(6, 11)).astype(np.float32), random.integers(0, 11, 6), 0.1

    def total(logits: jax.Array) -> jax.Array:
        return sum(part.sum() for part in losses.cross_entropy(logits, targets, z_loss))

    found = jax.jit(jax.grad(total))(logits)
    normalizer = np.exp(logits.astype(np.float64)).sum(axis=-1, keepdims=True)
    expected = (1 + 2 * z_loss * np.log(normalizer)) * np.exp(logits) / normalizer - np.eye(11)[targets]
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_masked_rows_of_the_vocabulary_do_not_matter():
    logits = np.random.default_rng(0).normal(size=(4, 9)).astype(np.float32)
    padded = np.concatenate([logits, np.full((4, 3), -1e10, np.float32)], axis=1)
    targets, of_logits = np.asarray([0, 8, 3, 3]), jax.jit(losses.cross_entropy)
    for one, other in zip(of_logits(logits, targets, 1.0), of_logits(padded, targets, 1.0), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)


@pytest.mark.parametrize("normalization", packing.LOSS_NORMALIZATIONS)
def test_sums_are_weighted_sums(window, normalization):
    batch = packed(window, normalization)
    entropy, z = np.random.default_rng(0).random((2, 21, TARGET_LENGTH)).astype(np.float32)
    sums = jax.device_get(jax.jit(losses.summed, static_argnums=3)(batch, entropy, z, NUM_TASKS))
    rows = {name: np.asarray(values) for name, values in batch.items()}
    weights, tasks = rows["decoder_loss_weights"], rows["decoder_task_ids"]
    real = rows["decoder_segment_ids"] > 0
    assert sums["loss"] == pytest.approx((weights * entropy).sum(), rel=1e-5)
    assert sums["z_loss"] == pytest.approx((weights * z).sum(), rel=1e-5)
    assert sums["weight"] == pytest.approx(21 if normalization == "samples" else sum(map(len, window[1])), rel=1e-5)
    assert sums["input_tokens"] == sum(map(len, window[0]))
    assert sums["target_tokens"] == sum(map(len, window[1]))
    assert sums["slots"] == 21 * LENGTH
    for task in range(NUM_TASKS):
        here = real & (tasks == task)
        assert sums["task_loss"][task] == pytest.approx((weights * entropy)[here].sum(), rel=1e-5)
        assert sums["task_weight"][task] == pytest.approx(weights[here].sum(), rel=1e-5)
        assert sums["task_tokens"][task] == here.sum()
    assert sums["task_loss"].sum() == pytest.approx(sums["loss"], rel=1e-5)
    assert sums["task_weight"].sum() == pytest.approx(sums["weight"], rel=1e-5)
    assert sums["task_tokens"].sum() == sums["target_tokens"]


# Through a model.


@pytest.fixture(scope="module")
def alone(model, window):
    """Cross-entropies of each sample's target, the sample in a row of its own without segment ids."""
    graphdef, params = model
    inputs, targets, _ = window
    rows = {"inputs": np.zeros((21, LENGTH), np.int32), "decoder": np.zeros((21, TARGET_LENGTH), np.int32)}
    for row, (tokens, target) in enumerate(zip(inputs, targets, strict=True)):
        rows["inputs"][row, : len(tokens)] = tokens
        rows["decoder"][row, 1 : len(target)] = target[:-1]
    logits = np.asarray(jax.jit(lambda *arrays: nnx.merge(graphdef, params)(*arrays))(rows["inputs"], rows["decoder"]))
    return [plain_cross_entropy(logits[row, : len(target)], target, 0)[0] for row, target in enumerate(targets)]


@pytest.mark.parametrize("normalization", packing.LOSS_NORMALIZATIONS)
def test_the_loss_of_a_packed_batch_is_that_of_its_samples(model, window, alone, eval_step, normalization):
    batch = packed(window, normalization)
    assert int((batch["encoder_segment_ids"].max(axis=1) > 0).sum()) < 21 - 5  # rows hold several samples
    sums = jax.device_get(eval_step(model[1], batch))
    expected = np.zeros(NUM_TASKS)
    for entropy, task in zip(alone, window[2], strict=True):
        expected[task] += entropy.mean() if normalization == "samples" else entropy.sum()
    np.testing.assert_allclose(sums["task_loss"], expected, rtol=2e-5)
    assert sums["loss"] == pytest.approx(expected.sum(), rel=2e-5)
    assert sums["z_loss"] == 0


def test_sums_of_batches_add_up(model, window, eval_step):
    batch = packed(window, "samples")
    whole = jax.device_get(eval_step(model[1], batch))
    halves = [
        jax.device_get(eval_step(model[1], {name: jnp.where(mask[:, None], rows, 0) for name, rows in batch.items()}))
        for mask in (jnp.arange(21) % 2 == 0, jnp.arange(21) % 2 == 1)
    ]
    for name, value in whole.items():
        if name != "slots":  # of a fixed number of rows
            np.testing.assert_allclose(halves[0][name] + halves[1][name], value, rtol=1e-5, err_msg=name)


# The step, with a model that compiles at once.


class Toy(nnx.Module):
    """The next token from the last one, with dropout."""

    def __init__(self):
        self.config = dataclasses.replace(CONFIG, emb_dim=VOCAB, vocab_size=VOCAB)
        self.kernel = nnx.Param(jax.random.normal(jax.random.key(0), (VOCAB, VOCAB)))

    def hidden(self, inputs, decoder_inputs, encoder_segments, decoder_segments, dropout_key):
        logits = self.kernel[...][decoder_inputs]
        return logits * jax.random.bernoulli(dropout_key, 0.5, logits.shape)

    def output_embeddings(self):
        return jnp.eye(VOCAB)


LEARNING_RATE = 0.1


@pytest.fixture(scope="module")
def stepped(window):
    """A function (step number, seed) -> (state before, state after, sums) for plain gradient descent."""
    graphdef, state = nnx.split(Toy())
    batch, optimizer = packed(window, "samples"), optax.sgd(LEARNING_RATE)
    params = nnx.to_pure_dict(state)
    steps = [jax.jit(make_train_step(graphdef, optimizer, StepOptions(0.01), NUM_TASKS, seed)) for seed in (0, 1)]

    def run(number: int, seed: int):
        before = TrainState(jnp.int32(number), params, optimizer.init(params))
        return before, *steps[seed](before, batch)

    return run


def test_a_step_depends_on_its_number_and_the_seed_alone(stepped):
    losses_of = {where: float(stepped(*where)[2]["loss"]) for where in ((0, 0), (1, 0), (0, 1))}
    assert losses_of[0, 0] == float(stepped(0, 0)[2]["loss"])
    assert len(set(losses_of.values())) == 3  # dropout differs


def test_a_step_follows_the_gradient_of_the_mean_loss(stepped, window):
    graphdef, _ = nnx.split(Toy())
    before, after, sums = stepped(3, 0)
    key = jax.random.fold_in(jax.random.key(0, impl="rbg"), 3)
    batch = packed(window, "samples")
    of_params = jax.jit(lambda params: loss_sums(graphdef, params, batch, StepOptions(0.01), NUM_TASKS, key))

    def loss(params) -> float:
        total, found = of_params(params)
        assert float(total) == pytest.approx(float(found["loss"] + found["z_loss"]), rel=1e-6)
        return float(total / found["weight"])

    assert int(after.step) == 4
    assert float(sums["steps"]) == 1
    assert float(sums["weight"]) == pytest.approx(21)
    assert loss(before.params) == pytest.approx(float((sums["loss"] + sums["z_loss"]) / sums["weight"]), rel=1e-6)
    descent = np.asarray(before.params["kernel"] - after.params["kernel"]) / LEARNING_RATE
    norm = np.linalg.norm(descent)
    assert norm == pytest.approx(float(sums["gradient_norm"]), rel=1e-4)
    ahead, back = (loss({"kernel": before.params["kernel"] + sign * 0.01 * descent / norm}) for sign in (1, -1))
    assert (ahead - back) / 0.02 == pytest.approx(norm, rel=2e-3)


# The same step in parts.


def taken(window, options, rank=0):
    """(state, sums) after one step of gradient descent on 24 rows, whole or in parts."""
    config = dataclasses.replace(CONFIG, dropout_rate=0.0)
    random = np.random.default_rng(2)
    base = jax.tree.map(lambda leaf: random.normal(0, 0.3, leaf.shape).astype(np.float32), t5.abstract_params(config))
    lora_options = LoraOptions(rank=rank)
    params = base
    if rank:
        adapters = lora.init_adapters(base, lora_options, jax.random.key(0))
        params = jax.tree.map(lambda leaf: random.normal(0, 0.3, leaf.shape).astype(np.float32), adapters)
    rows = {name: jnp.pad(values, ((0, 3), (0, 0))) for name, values in packed(window, "samples").items()}
    # Weights that differ between the microbatches: the mean of their means is not the mean.
    rows["decoder_loss_weights"] *= jnp.linspace(0.1, 3, 24)[:, None]
    optimizer = optax.sgd(LEARNING_RATE)
    step = make_train_step(t5.graph(config), optimizer, options, NUM_TASKS, 0, lora_options)
    state = TrainState(jnp.int32(0), params, optimizer.init(params))
    return jax.device_get(jax.jit(step, compiler_options=FAST)(state, rows, base if rank else None))


@pytest.mark.parametrize(("rank", "ways"), [(0, [(2, 1), (4, 3), (1, 4)]), (2, [(4, 3)])])
def test_a_step_in_parts_is_the_same_step(window, rank, ways):
    state, sums = taken(window, StepOptions(1e-2), rank)
    for parts, chunks in ways:
        other, other_sums = taken(window, StepOptions(1e-2, parts, chunks), rank)
        for name, value in sums.items():
            np.testing.assert_allclose(other_sums[name], value, rtol=1e-6, err_msg=name)
        for path, leaf in jax.tree_util.tree_leaves_with_path(state.params):
            found = other.params
            for key in path:
                found = found[key.key]
            largest = np.abs(leaf).max()
            np.testing.assert_allclose(found, leaf, rtol=0, atol=1e-6 * largest, err_msg=jax.tree_util.keystr(path))


def test_microbatches_have_dropout_of_their_own():
    batch = {"rows": jnp.zeros((8, 2))}
    keys = []

    def remember(params, rows, key):
        jax.debug.callback(lambda data: keys.append(tuple(np.asarray(data))), jax.random.key_data(key))
        return jnp.zeros(())

    jax.jit(lambda batch: accumulated(remember, None, batch, jax.random.key(0, impl="rbg"), 4))(batch)
    jax.effects_barrier()
    assert len(set(keys)) == 4


def test_chunks_hold_the_logits_of_one_part_at_a_time(window):
    """Of the compiled gradient, temporaries shrink by nearly the logits that are not there."""
    config = dataclasses.replace(CONFIG, vocab_size=8192, dropout_rate=0.0)
    shapes = packing.batch_shapes(32, LENGTH, TARGET_LENGTH)

    def temporaries(chunks: int) -> int:
        def loss(params, batch):
            return loss_sums(t5.graph(config), params, batch, StepOptions(0.0, 1, chunks), 1, None)[0]

        compiled = jax.jit(jax.grad(loss)).lower(t5.abstract_params(config), shapes).compile(FAST)
        return compiled.memory_analysis().temp_size_in_bytes

    logits = 32 * TARGET_LENGTH * 8192 * 4
    assert temporaries(1) - temporaries(6) > 0.8 * logits


@pytest.mark.parametrize(
    ("options", "rows", "message"),
    [
        ((1e-4, 0), 8, "GRADIENT_ACCUMULATION is 0"),
        ((1e-4, 1, 2.5), 8, r"StepOptions\.logits_chunks is 2\.5: must be a whole number"),
        ((1e-4, 3), 8, r"BATCH_SIZE is 8: must be a multiple of 3, .* times GRADIENT_ACCUMULATION \(3\)"),
        ((1e-4, 1, 5), 8, "LOGITS_CHUNKS is 5: must divide the targets of TASK_FEATURE_LENGTHS, 12"),
        ((1e-4,), 0, "BATCH_SIZE is 0"),
    ],
)
def test_parts_that_do_not_divide_are_errors(options, rows, message):
    mesh = jax.sharding.AbstractMesh((1, 1, 1), ("data", "fsdp", "model"))
    with pytest.raises(InputError, match=message):
        check_divides(StepOptions(*options), rows, TARGET_LENGTH, mesh)

"""LoRA: what merging computes, that only adapters move, and a run of adapters from training to inference."""

import dataclasses
import functools
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx, traverse_util

from recalign_jax import cli, partitioning
from recalign_jax.checkpoint import initial, saved
from recalign_jax.checkpoint.fingerprints import fingerprint
from recalign_jax.errors import InputError
from recalign_jax.model import lora, t5
from recalign_jax.model.config import T5Config
from recalign_jax.model.layers import Dense
from recalign_jax.model.lora import LoraOptions
from recalign_jax.training import packing
from recalign_jax.training.optimizer import make_optimizer
from recalign_jax.training.step import StepOptions, TrainState, make_train_step, state_shardings
from tests.test_commands import FAST, FINETUNE, eval_arguments, folder, shop  # noqa: F401 (fixtures)

pytestmark = pytest.mark.usefixtures("fast_compilation")
FAST_COMPILATION = {"xla_backend_optimization_level": 0}
CONFIG = T5Config(
    emb_dim=16,
    num_heads=2,
    head_dim=4,
    num_encoder_layers=2,
    num_decoder_layers=3,
    mlp_dim=24,
    vocab_size=40,
    dropout_rate=0.0,
    activation_dtype="float32",
)
OPTIONS = LoraOptions(rank=3, alpha=6.0, targets=("query", "value", "wo"))
# What the targets are in this model: the stacked kernels' layers, inputs and outputs.
KERNELS = {
    "encoder/layers/attention/query/kernel": (2, 16, 8),
    "encoder/layers/attention/value/kernel": (2, 16, 8),
    "encoder/layers/mlp/wo/kernel": (2, 24, 16),
    "decoder/layers/self_attention/query/kernel": (3, 16, 8),
    "decoder/layers/self_attention/value/kernel": (3, 16, 8),
    "decoder/layers/encoder_decoder_attention/query/kernel": (3, 16, 8),
    "decoder/layers/encoder_decoder_attention/value/kernel": (3, 16, 8),
    "decoder/layers/mlp/wo/kernel": (3, 24, 16),
}


def flat(tree):
    return {path: np.asarray(leaf) for path, leaf in traverse_util.flatten_dict(tree, sep="/").items()}


def random_like(tree, seed, scale=0.3):
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: random.normal(0, scale, leaf.shape).astype(np.float32), tree)


@pytest.fixture(scope="module")
def base():
    return random_like(t5.abstract_params(CONFIG), 0)


@pytest.fixture(scope="module")
def adapters(base):
    """Neither A nor B is zero."""
    return random_like(lora.init_adapters(base, OPTIONS, jax.random.key(0)), 1)


@pytest.fixture(scope="module")
def batch():
    random = np.random.default_rng(2)
    inputs, targets = (
        [random.integers(3, high, size).astype(np.int32) for size in random.integers(2, 9, 12)] for high in (40, 8)
    )
    return {k: jnp.asarray(v) for k, v in packing.pack(inputs, targets, np.zeros(12, int), 16, 16, "samples").items()}


def test_new_adapters(base):
    found = flat(lora.init_adapters(base, OPTIONS, jax.random.key(0)))
    assert found.keys() == {f"{path}/{part}" for path in KERNELS for part in "ab"}
    for path, (layers, inputs, outputs) in KERNELS.items():
        a, b = found[f"{path}/a"], found[f"{path}/b"]
        assert a.shape == (layers, inputs, 3)
        assert b.shape == (layers, 3, outputs)
        assert not b.any()
        assert 0.6 < a.std() * inputs**0.5 < 1.4
        assert (a[0] != a[1]).all()
    draws = [array[0, 0] for path, array in found.items() if path.endswith("/a")]
    assert len(np.unique(np.stack(draws), axis=0)) == len(KERNELS)  # every kernel has draws of its own
    start = lora.merge(base, lora.init_adapters(base, OPTIONS, jax.random.key(0)), OPTIONS)
    for path, array in flat(start).items():
        np.testing.assert_array_equal(array, flat(base)[path], err_msg=path)


def test_merging_is_w_plus_s_a_b_in_every_layer(base, adapters):
    merged, before, low = flat(lora.merge(base, adapters, OPTIONS)), flat(base), flat(adapters)
    assert merged.keys() == before.keys()
    for path, array in merged.items():
        if path not in KERNELS:
            assert array is before[path] or (array == before[path]).all()
            continue
        for layer in range(KERNELS[path][0]):
            a, b = (low[f"{path}/{part}"][layer].astype(np.float64) for part in "ab")
            np.testing.assert_allclose(array[layer], before[path][layer] + 6.0 / 3 * a @ b, rtol=0, atol=1e-6)


def test_merged_forward_is_that_of_layers_with_a_branch(base, adapters, monkeypatch):
    """x (W + s A B) = x W + s (x A) B, where every Dense layer of the model has a branch of its own."""
    tokens, decoder = np.arange(2, 18).reshape(2, 8), np.arange(20, 30).reshape(2, 5)
    plain = nnx.merge(t5.graph(CONFIG), base)(tokens, decoder)
    merged = nnx.merge(t5.graph(CONFIG), lora.merge(base, adapters, OPTIONS))(tokens, decoder)
    assert np.abs(merged - plain).max() > 0.1

    init, call = Dense.__init__, Dense.__call__

    def init_with_branch(self, inputs, outputs, *args, **kwargs):
        init(self, inputs, outputs, *args, **kwargs)
        self.a, self.b = nnx.Param(jnp.zeros((inputs, 3))), nnx.Param(jnp.zeros((3, outputs)))

    monkeypatch.setattr(Dense, "__init__", init_with_branch)
    monkeypatch.setattr(
        Dense, "__call__", lambda self, x, dtype: call(self, x, dtype) + 2.0 * ((x @ self.a[...]) @ self.b[...])
    )
    values = flat(base) | {path.replace("/kernel/", "/"): array for path, array in flat(adapters).items()}
    wanted = traverse_util.flatten_dict(t5.abstract_params(CONFIG), sep="/")
    params = {path: values.get(path, np.zeros(leaf.shape, np.float32)) for path, leaf in wanted.items()}
    assert len(params) > len(flat(base)) + 2 * len(KERNELS)
    branched = nnx.merge(t5.graph(CONFIG), traverse_util.unflatten_dict(params, sep="/"))(tokens, decoder)
    np.testing.assert_allclose(branched, merged, rtol=0, atol=1e-4)


def trained(base, batch, optimizer, steps, seed=0):
    """(states, losses) of training adapters."""
    step = jax.jit(
        make_train_step(t5.graph(CONFIG), optimizer, StepOptions(1e-4), 1, seed, OPTIONS),
        compiler_options=FAST_COMPILATION,
    )
    params = lora.init_adapters(base, OPTIONS, jax.random.key(seed))
    states, losses = [TrainState(jnp.int32(0), params, optimizer.init(params))], []
    for _ in range(steps):
        state, sums = step(states[-1], batch, base)
        states.append(state)
        losses.append(float(sums["loss"] / sums["weight"]))
    return states, losses


def test_only_adapters_are_trained(base, batch):
    before = {path: array.copy() for path, array in flat(base).items()}
    states, losses = trained(base, batch, make_optimizer("adamw", 0.02), 30)
    assert losses[-1] < 0.85 * losses[0]
    count = sum(layers * 3 * (inputs + outputs) for layers, inputs, outputs in KERNELS.values())
    assert sum(leaf.size for leaf in jax.tree.leaves(states[-1].params)) == count
    moments = [leaf for leaf in jax.tree.leaves(states[-1].opt_state) if leaf.ndim]
    assert sum(leaf.size for leaf in moments) == 2 * count
    for path, array in flat(base).items():
        np.testing.assert_array_equal(array, before[path], err_msg=path)
    merged = flat(lora.merge(base, states[-1].params, OPTIONS))
    assert {path for path in merged if (merged[path] != before[path]).any()} == set(KERNELS)
    # The first step can move B alone: A's gradient has B as a factor, which is zero.
    first, second = flat(states[0].params), flat(states[1].params)
    assert all((first[path] != second[path]).any() == path.endswith("/b") for path in first)


def test_the_first_gradient_is_the_whole_kernels(base, batch):
    """With B = 0, dL/dB = s A' dL/dW: plain gradient descent shows both."""
    rate = 0.1
    states, _ = trained(base, batch, optax.sgd(rate), 1)
    whole = TrainState(jnp.int32(0), base, optax.sgd(rate).init(base))
    step = jax.jit(
        make_train_step(t5.graph(CONFIG), optax.sgd(rate), StepOptions(1e-4), 1, 0), compiler_options=FAST_COMPILATION
    )
    after, before = flat(step(whole, batch)[0].params), flat(base)
    for path in KERNELS:
        a, b = (flat(states[i].params)[f"{path}/{part}"] for i, part in ((0, "a"), (1, "b")))
        moved = after[path] - before[path]
        np.testing.assert_allclose(b, 2.0 * np.swapaxes(a, 1, 2) @ moved, rtol=1e-3, atol=2e-6, err_msg=path)


def test_full_rank_can_be_any_update():
    """A rank as large as the kernel: least squares finds the target that W alone is far from."""
    random = np.random.default_rng(0)
    kernel, target = random.normal(size=(2, 1, 5, 4)).astype(np.float32)
    options = LoraOptions(rank=4, alpha=4.0, targets=("query",))
    base = {"layers": {"query": {"kernel": kernel}}}
    optimizer = optax.adam(0.03)

    @jax.jit
    def step(params, state):
        def loss(params):
            return jnp.mean((lora.merge(base, params, options)["layers"]["query"]["kernel"] - target) ** 2)

        value, gradients = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(params, updates), state, value

    params = lora.init_adapters(base, options, jax.random.key(0))
    state = optimizer.init(params)
    for _ in range(1000):
        params, state, value = step(params, state)
    assert float(value) < 1e-6 < np.mean((kernel - target) ** 2)


def test_fingerprint_notices_any_bit_and_place(base):
    whole = fingerprint(base)
    assert whole == fingerprint(jax.tree.map(jnp.array, base))
    path = ("decoder", "layers", "mlp", "wo", "kernel")

    def changed(change):
        copy = traverse_util.flatten_dict(base)
        copy[path] = change(copy[path].copy())
        return fingerprint(traverse_util.unflatten_dict(copy))

    def flip(array):
        array.view(np.uint32)[1, 2, 3] ^= 1
        return array

    seen = {whole, changed(flip), changed(lambda array: array[::-1]), changed(lambda array: array[:, ::-1])}
    seen |= {changed(lambda array: array[:, :, ::-1]), changed(lambda array: array[:, [1, 0, *range(2, 24)]])}
    assert len(seen) == 6


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"rank": -1}, "LORA_RANK is -1"),
        ({"rank": 2.0}, "LORA_RANK is 2.0"),
        ({"alpha": 0}, "LORA_ALPHA is 0"),
        ({"targets": "query"}, r"as in \('query', 'value'\)"),
        ({"targets": ()}, "must name layers"),
        ({"targets": ("querry",)}, "'querry'.*Did you mean 'query'"),
    ],
)
def test_bad_options(base, changes, says):
    with pytest.raises(InputError, match=says):
        lora.init_adapters(base, dataclasses.replace(OPTIONS, **changes), jax.random.key(0))


@pytest.mark.devices8
@pytest.mark.parametrize(("optimizer", "steps"), [("adafactor", 2), ("adamw", 3)])
def test_every_mesh_trains_the_same_adapters(base, batch, optimizer, steps):
    # Where a gradient is nearly zero, Adafactor makes a step of its sign, and a third step of its last bits.
    expected = trained(base, batch, make_optimizer(optimizer, 0.02), steps)[0][-1].params
    for shape in ({"fsdp": 8}, {"data": 2, "fsdp": 2, "model": 2}):
        mesh = partitioning.make_mesh(shape)
        on_mesh = jax.tree.map(
            lambda leaf, like: jax.device_put(leaf, like.sharding), base, partitioning.with_shardings(base, mesh)
        )
        assert fingerprint(on_mesh) == fingerprint(base)
        made = make_optimizer(optimizer, 0.02)
        params = lora.init_adapters(base, OPTIONS, jax.random.key(0))
        state = TrainState(jnp.int32(0), params, made.init(params))
        state = jax.device_put(state, state_shardings(state, made, mesh))
        query = state.params["encoder"]["layers"]["attention"]["query"]["kernel"]
        if "model" in shape:
            assert query["a"].sharding.spec == jax.sharding.PartitionSpec(None, "fsdp", None)
            assert query["b"].sharding.spec == jax.sharding.PartitionSpec(None, None, "model")
        step = jax.jit(
            make_train_step(t5.graph(CONFIG), made, StepOptions(1e-4), 1, 0, OPTIONS), compiler_options=FAST_COMPILATION
        )
        for _ in range(steps):
            state, _ = step(state, batch, on_mesh)
        for path, array in flat(state.params).items():
            np.testing.assert_allclose(array, flat(expected)[path], rtol=1e-4, atol=1e-6, err_msg=path)


# A run.


LORA = ("--gin.LORA_RANK=4", "--gin.OPTIMIZER=adamw", "--gin.LEARNING_RATE=0.01", "--gin.TRAIN_STEPS=4")


def train_in(folder, model_dir, *arguments):  # noqa: F811
    task = ("--gin.MIXTURE_OR_TASK_NAME=shop_retrieval_token", f"--gin.VOCABULARY={folder / 'words.model'}")
    where = ("--data_dir", str(folder), f"--gin.MODEL_DIR={folder / model_dir}")
    assert cli.main(["train", *where, *FINETUNE, *FAST, *task, *arguments]) == 0
    return folder / model_dir


@pytest.fixture(scope="module")
def trained_base(folder):  # noqa: F811
    """Four steps of a whole model."""
    # The program of test_commands, compiled once.
    return train_in(
        folder, "lora_base", "--gin.TRAIN_STEPS=4", "--gin.MIXTURE_OR_TASK_NAME=shop_retrieval_aligned_token"
    )


@pytest.fixture(scope="module")
def adapted(folder, trained_base):  # noqa: F811
    """Four steps of adapters of it, evaluated at the end."""
    start = f"--gin.INITIAL_CHECKPOINT={trained_base}"
    return train_in(folder, "adapted", *LORA, start, "--gin.EVAL_PERIOD=4", "--gin.NUM_BEAMS=10")


@pytest.fixture
def train(shop, trained_base):  # noqa: F811
    return functools.partial(shop.train, task="shop_retrieval_token")


def parameters(model_dir: pathlib.Path, load):
    """Whole parameters of a checkpoint, flat."""
    rows = saved.read_arrays(str(model_dir.parent / "lora_base"))["token_embedder/embedding"].shape[0]
    config = T5Config(
        emb_dim=64, num_heads=4, head_dim=16, num_encoder_layers=2, num_decoder_layers=2, mlp_dim=160, vocab_size=rows
    )
    shapes = partitioning.with_shardings(t5.abstract_params(config), partitioning.make_mesh({"data": -1}))
    return flat(load(str(model_dir), config, shapes))


def first(path, config, shapes):
    """The parameters, without the step."""
    return initial.load_trained(path, config, shapes)[0]


def test_train_resume_and_evaluate(shop, train, trained_base, adapted):  # noqa: F811
    records = [json.loads(line) for line in (adapted / "metrics.jsonl").read_text().splitlines()]
    assert "validation_recall@10" in records[-1]
    stored = saved.read_arrays(str(adapted))  # adapters, and nothing of the base
    assert stored
    assert all(path.split("/")[-3] in ("query", "value") for path in stored)

    start = f"--gin.INITIAL_CHECKPOINT={trained_base}"
    train("halted", *LORA, start, "--gin.TRAIN_STEPS=2", "--gin.CHECKPOINT_PERIOD=2")
    train("halted", *LORA, start)
    found, halted, whole = (parameters(path, first) for path in (adapted, shop.folder / "halted", trained_base))
    for path, array in found.items():
        np.testing.assert_array_equal(halted[path], array, err_msg=path)
        is_target = path.endswith(("query/kernel", "value/kernel"))
        assert (array != whole[path]).any() == is_target, path
    # What a run starts from, if it starts from a run of adapters: both merged.
    again = parameters(adapted, lambda path, config, shapes: initial.load_initial(path, config, 0, shapes))
    for path, array in found.items():
        np.testing.assert_array_equal(again[path], array, err_msg=path)

    validation = ("--gin.SPLIT=validation", "--gin.NUM_BEAMS=10")
    evaluated = shop("eval", *eval_arguments(adapted, shop), *validation)["retrieval"]
    for name in ("recall@10", "ndcg@10"):
        assert evaluated[name] == records[-1][f"validation_{name}"]


def test_a_run_of_adapters_keeps_to_its_base(shop, train, trained_base, adapted):  # noqa: F811
    moving = shop.folder / "moving"
    shutil.copytree(trained_base, moving)
    start = f"--gin.INITIAL_CHECKPOINT={moving}"
    train("tied", *LORA, start, "--gin.TRAIN_STEPS=1")
    assert "lora" in train("tied", *LORA, start, "--gin.LORA_ALPHA=8", status=2)["error"]
    assert "base" in train("tied", *LORA, f"--gin.INITIAL_CHECKPOINT={trained_base}", status=2)["error"]
    assert "LORA_RANK" in train("tied", start, status=2)["error"]
    shutil.rmtree(moving)
    evaluation = eval_arguments(shop.folder / "tied", shop)
    assert str(moving) in shop("eval", *evaluation, status=2)["error"]
    shutil.copytree(adapted, moving)  # the same path with other parameters in it
    assert "other parameters now" in shop("eval", *evaluation, status=2)["error"]
    assert "fingerprint" in train("tied", *LORA, start, status=2)["error"]


def test_bad_input(train, trained_base):
    start = f"--gin.INITIAL_CHECKPOINT={trained_base}"
    assert "--gin.INITIAL_CHECKPOINT=PATH" in train("never_lora", *LORA, status=2)["error"]
    error = train("never_lora", *LORA, start, "--gin.LORA_TARGETS=('query', 'valve')", status=2)["error"]
    assert "Did you mean 'value'?" in error
    assert "LORA_TARGETS" in train("never_lora", *LORA, start, "--gin.LORA_TARGETS=query", status=2)["error"]
    assert not (trained_base.parent / "never_lora").exists()


def test_what_adapters_cannot_learn_with_is_said(shop, trained_base, capsys):  # noqa: F811
    where = ("--data_dir", str(shop.folder), f"--gin.MODEL_DIR={shop.folder / 'warned'}", shop.vocabulary)
    task = ("--gin.MIXTURE_OR_TASK_NAME=shop_retrieval_token", f"--gin.INITIAL_CHECKPOINT={trained_base}")
    assert cli.main(["train", *where, *FINETUNE, *FAST, *task, *LORA[:1], "--gin.TRAIN_STEPS=1"]) == 0
    said = " ".join("".join(capsys.readouterr()).split())
    assert "--gin.OPTIMIZER=adamw" in said
    assert "the embeddings of item tokens" not in said  # this base has them
    # 2 attentions of the encoder's layers, 4 of the decoder's; query and value, 64 -> 64; A and B of rank 4.
    assert f"Training {(2 + 4) * 2 * 4 * (64 + 64):,} parameters of adapters" in said

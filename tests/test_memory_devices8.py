"""What each of eight devices holds, and a step in parts over a mesh."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recalign_jax import partitioning
from recalign_jax.corpus.catalog import EOS_ID
from recalign_jax.decoding.retrieve import make_generate, retrieve
from recalign_jax.decoding.trie import build_trie
from recalign_jax.model import lora, t5
from recalign_jax.model.config import T5Config
from recalign_jax.model.lora import LoraOptions
from recalign_jax.training import memory, packing
from recalign_jax.training.input_pipeline import InputOptions
from recalign_jax.training.memory import Job
from recalign_jax.training.optimizer import make_optimizer
from recalign_jax.training.step import (
    StepOptions,
    abstract_state,
    jit_eval_step,
    jit_train_step,
    make_eval_step,
    make_train_step,
)

pytestmark = [pytest.mark.devices8, pytest.mark.usefixtures("fast_compilation")]

CONFIG = T5Config(
    emb_dim=128, num_heads=8, head_dim=16, num_encoder_layers=2, num_decoder_layers=2, mlp_dim=256,
    vocab_size=512, dropout_rate=0.0, activation_dtype="float32",
)  # fmt: skip
LENGTH, TARGETS, TASKS = 24, 12, 2


def held(tree) -> list[int]:
    """Bytes on each device."""
    counts = dict.fromkeys(jax.devices(), 0)
    for leaf in jax.tree.leaves(tree):
        for shard in leaf.addressable_shards:
            counts[shard.device] += shard.data.nbytes
    return list(counts.values())


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
@pytest.mark.parametrize(
    ("shape", "parts"), [({"data": 8}, 1), ({"fsdp": 8}, 8), ({"fsdp": 4, "model": 2}, 8), ({"model": 8}, 8)], ids=str
)
def test_state_is_split_over_devices(optimizer, shape, parts):
    initialize, shapes = abstract_state(CONFIG, make_optimizer(optimizer), partitioning.make_mesh(shape))
    shardings = jax.tree.map(lambda leaf: leaf.sharding, shapes)
    state = jax.jit(initialize, out_shardings=shardings)(jax.random.key(0))
    for tree in (state.params, state.opt_state):
        whole = sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
        on_each = held(tree)
        assert len(set(on_each)) == 1
        # Norms, biases, and the statistics of an axis that isn't split stand on every device: little of AdamW's state,
        # more of Adafactor's, whose statistics are vectors.
        small = tree is state.opt_state and optimizer == "adafactor"
        assert whole / parts <= on_each[0] <= (0.7 if small and parts > 1 else 1.05 / parts) * whole


def test_every_device_computes_its_own_rows():
    """Left to itself XLA keeps all rows on every device and splits their width."""

    def needs(devices: int) -> int:
        mesh = partitioning.make_mesh({"fsdp": devices}, jax.devices()[:devices])
        rows = InputOptions(task_feature_lengths={"inputs": 256, "targets": 64}, batch_size=16)
        config = dataclasses.replace(CONFIG, remat="full")
        return memory.footprint(Job(config, make_optimizer(), mesh, StepOptions(), rows, LoraOptions())).hbm_bytes

    assert needs(8) < needs(1) / 5


def batch() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    inputs = [random.integers(1, 500, size).astype(np.int32) for size in random.integers(4, LENGTH, 40)]
    targets = [random.integers(1, 500, size).astype(np.int32) for size in random.integers(2, TARGETS, 40)]
    rows = packing.pack(inputs, targets, np.arange(40) % TASKS, LENGTH, TARGETS, "samples")
    return {name: np.resize(values, (32, values.shape[1])) for name, values in rows.items()}


def stepped(shape, devices, options, rank):
    """(parameters, sums) after a step."""
    mesh = partitioning.make_mesh(shape, jax.devices()[:devices])
    optimizer, lora_options = make_optimizer("adafactor", 1e-2), LoraOptions(rank=rank)
    _, shapes = abstract_state(CONFIG, optimizer, mesh, lora_options)
    whole = t5.init_params(CONFIG, jax.random.key(1))
    params = whole
    if rank:
        adapters = lora.init_adapters(whole, lora_options, jax.random.key(2))
        params = jax.tree.map(lambda leaf: leaf + 0.01, adapters)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, shapes)
    state = jax.device_put(type(shapes)(jnp.int32(0), params, optimizer.init(params)), shardings)
    laid_out = jax.tree.map(lambda leaf: leaf.sharding, partitioning.with_shardings(whole, mesh))
    base = jax.device_put(whole, laid_out) if rank else None
    rows = jax.device_put(batch(), partitioning.batch_sharding(mesh))
    step = make_train_step(t5.graph(CONFIG), optimizer, options, TASKS, 0, lora_options)
    after, sums = jit_train_step(step, shapes, mesh)(state, rows, base)
    assert jax.tree.map(lambda leaf: leaf.sharding, after) == shardings
    return jax.device_get((after.params, sums))


@pytest.mark.parametrize("rank", [0, 2])
def test_a_step_in_parts_over_a_mesh_equals_one_device(rank):
    expected, expected_sums = stepped({}, 1, StepOptions(), rank)
    found, sums = stepped({"data": 2, "fsdp": 2, "model": 2}, 8, StepOptions(1e-4, 4, 3), rank)
    for name, value in expected_sums.items():
        np.testing.assert_allclose(sums[name], value, rtol=1e-5, err_msg=name)
    for (path, leaf), ours in zip(jax.tree_util.tree_leaves_with_path(expected), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(ours, leaf, rtol=1e-5, atol=1e-5, err_msg=jax.tree_util.keystr(path))


def test_microbatches_move_no_rows():
    """A batch is cut so that each device keeps its rows: no collective is as large as a row of hidden states."""
    mesh = partitioning.make_mesh({"data": 8})
    rows = jax.ShapeDtypeStruct((32, 1024), np.int32, sharding=partitioning.batch_sharding(mesh))

    def cut(x):
        return jnp.sum(jnp.moveaxis(x.reshape(-1, 4, 1024), 1, 0) ** 2, axis=(1, 2))

    text = jax.jit(cut).lower(rows).compile().as_text()
    assert "all-to-all" not in text
    assert "all-gather" not in text
    assert "collective-permute" not in text


def test_evaluation_over_a_mesh_equals_one_device():
    params = t5.init_params(CONFIG, jax.random.key(1))

    def evaluated(shape, devices):
        mesh = partitioning.make_mesh(shape, jax.devices()[:devices])
        shardings = jax.tree.map(lambda leaf: leaf.sharding, partitioning.with_shardings(params, mesh))
        rows = jax.device_put(batch(), partitioning.batch_sharding(mesh))
        return jit_eval_step(make_eval_step(t5.graph(CONFIG), TASKS), mesh)(jax.device_put(params, shardings), rows)

    one, eight = evaluated({}, 1), evaluated({"fsdp": 4, "model": 2}, 8)
    for name, value in one.items():
        np.testing.assert_allclose(eight[name], value, rtol=1e-5, err_msg=name)


ITEMS, USERS = 60, 16


def decoded(shape, devices):
    """(the compiled program of a batch of users, their items and scores by user)."""
    mesh = partitioning.make_mesh(shape, jax.devices()[:devices])
    sharding = partitioning.batch_sharding(mesh)
    random = np.random.default_rng(3)
    lengths = random.integers(2, 6, ITEMS)
    tokens = np.where(np.arange(6) < lengths[:, None] - 1, random.integers(2, 500, (ITEMS, 6)), 0)
    tokens[np.arange(ITEMS), lengths - 1] = EOS_ID
    trie = build_trie(tokens, lengths, random.permutation(ITEMS), CONFIG.vocab_size)
    prompts = [random.integers(2, 500, size).astype(np.int32) for size in random.integers(3, 30, USERS + 5)]
    without = [random.integers(0, ITEMS, 3).astype(np.int32) for _ in prompts]
    params = t5.init_params(CONFIG, jax.random.key(1))
    shardings = jax.tree.map(lambda leaf: leaf.sharding, partitioning.with_shardings(params, mesh))
    params = jax.device_put(params, shardings)
    generate = make_generate(t5.graph(CONFIG), 8, 5, mesh=mesh)
    parts = list(retrieve(generate, params, trie, prompts, without, USERS, sharding))
    order = np.argsort(np.concatenate([part[0] for part in parts]))
    items, scores = (np.concatenate([part[place] for part in parts])[order] for place in (1, 2))
    rows = jax.ShapeDtypeStruct((USERS, 32), np.int32, sharding=sharding)
    return generate.lower(params, rows, rows, None, trie).compile(), items, scores


def test_decoding_over_a_mesh_equals_one_device():
    _, items, scores = decoded({}, 1)
    _, found, theirs = decoded({"fsdp": 4, "model": 2}, 8)
    np.testing.assert_array_equal(found, items)
    np.testing.assert_allclose(theirs, scores, rtol=1e-5)


def test_every_device_decodes_its_own_rows():
    """As in training: without the mesh all devices have all rows, and split the width of layers."""
    program, *_ = decoded({"fsdp": 8}, 8)
    text = program.as_text()
    assert f"f32[{USERS // 8},32,{CONFIG.mlp_dim}]" in text
    assert f"f32[{USERS},32,{CONFIG.mlp_dim}]" not in text
    assert f"f32[{USERS},32,{CONFIG.mlp_dim // 8}]" not in text

"""The mesh, the tables of axes, and that a sharded model computes what one device computes."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from recalign_jax import gin_config, partitioning
from recalign_jax.commands.common import model_config
from recalign_jax.errors import InputError
from recalign_jax.model import t5
from recalign_jax.model.config import T5Config

CONFIG = T5Config(
    vocab_size=128, emb_dim=32, num_heads=4, head_dim=8, num_encoder_layers=2, num_decoder_layers=2, mlp_dim=64
)
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # compiles in half the time
eight_devices = pytest.mark.skipif(
    jax.device_count() < 8, reason="needs 8 devices: XLA_FLAGS=--xla_force_host_platform_device_count=8"
)


def fake_devices(count):
    return [jax.devices()[0]] * count


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"data": 1, "modle": 1}, "no axis 'modle'.*Did you mean 'model'"),
        ({"data": 0}, "'data' is 0"),
        ({"data": "2"}, "'data' is '2'"),
        ({"data": -1, "fsdp": -1}, "-1 for data and fsdp"),
        ({"data": 3}, r"3 devices, but there are 8. Set one axis to -1 .* \{'data': -1\}"),
        ({"data": -1, "model": 3}, "a multiple of 3 devices, but there are 8"),
        ({}, "1 devices, but there are 8"),
    ],
)
def test_mesh_that_does_not_fit_is_an_error(shape, message):
    with pytest.raises(InputError, match=message):
        partitioning.make_mesh(shape, fake_devices(8))


def test_mesh_of_one_device():
    assert dict(partitioning.make_mesh({}, jax.devices()[:1]).shape) == {"data": 1, "fsdp": 1, "model": 1}


def mesh_like(**sizes):
    """An abstract mesh: specs need no devices."""
    return jax.sharding.AbstractMesh(tuple(sizes.values()), tuple(sizes))


@dataclasses.dataclass(frozen=True)
class Device:
    """One of several processes, and of several GPU machines or TPU slices."""

    id: int
    process_index: int
    slice_index: int = 0
    platform: str = "gpu"
    device_kind: str = "NVIDIA H100"


@pytest.mark.parametrize(
    ("shape", "slices", "within"),
    [
        # Which devices stand beside the first one along each axis: by the slices that these are of.
        ({"data": -1}, 2, {"data": [0] * 8 + [1] * 8}),
        ({"fsdp": -1}, 4, {"fsdp": [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4}),
        ({"data": 2, "fsdp": -1}, 2, {"data": [0, 1], "fsdp": [0] * 8}),
        ({"data": 2, "fsdp": -1}, 4, {"data": [0, 2], "fsdp": [0] * 4 + [1] * 4}),
        ({"data": -1, "model": 4}, 4, {"data": [0, 1, 2, 3], "model": [0] * 4}),
        ({"model": -1}, 2, {"model": [0] * 8 + [1] * 8}),
    ],
)
def test_a_mesh_over_several_machines(shape, slices, within):
    devices = [Device(n, n * slices // 16, n * slices // 16) for n in range(16)]
    mesh = partitioning.make_mesh(shape, devices)
    assert mesh.size == 16
    assert len(set(mesh.devices.flat)) == 16
    for axis, expected in within.items():
        along = np.moveaxis(mesh.devices, partitioning.AXES.index(axis), 0).reshape(mesh.shape[axis], -1)[:, 0]
        assert [device.slice_index for device in along] == expected
    parts = partitioning.row_parts(partitioning.batch_sharding(mesh))
    assert sorted(parts) == list(range(slices))


def test_machines_of_different_sizes_are_an_error():
    devices = [Device(n, n // 5, n // 5) for n in range(8)]
    with pytest.raises(InputError, match="3 to 5 devices"):
        partitioning.make_mesh({"data": -1}, devices)


@pytest.mark.parametrize(
    ("shape", "processes", "parts"),
    [
        ((4, 1, 1), [0, 0, 0, 0], {0: 0}),
        ((4, 1, 1), [0, 0, 1, 1], {0: 0, 1: 1}),
        ((2, 2, 2), [0, 0, 0, 0, 1, 1, 1, 1], {0: 0, 1: 1}),
        # The axis model spans processes: of two, and of two of four.
        ((1, 1, 2), [0, 1], {0: 0, 1: 0}),
        ((2, 1, 4), [0, 0, 1, 1, 2, 2, 3, 3], {0: 0, 1: 0, 2: 1, 3: 1}),
        # As a TPU's devices are wired: the rows of a process are no neighbours, and processes in no order.
        ((4, 2, 1), [0, 0, 1, 1, 0, 0, 1, 1], {0: 0, 1: 1}),
        ((2, 1, 2), [1, 1, 0, 0], {0: 1, 1: 0}),
        # Processes with some rows in common, and of different sizes.
        ((2, 1, 3), [0, 0, 1, 1, 2, 2], None),
        ((4, 1, 1), [0, 0, 0, 1], None),
    ],
)
def test_which_rows_a_process_holds(shape, processes, parts):
    devices = np.asarray([Device(number, process) for number, process in enumerate(processes)], object)
    assert math.prod(shape) == len(devices)
    sharding = partitioning.batch_sharding(jax.sharding.Mesh(devices.reshape(shape), partitioning.AXES))
    if parts is None:
        with pytest.raises(InputError, match=r"MESH .* axis model"):
            partitioning.row_parts(sharding)
    else:
        assert partitioning.row_parts(sharding) == parts


@pytest.mark.parametrize("tied", [True, False])
def test_every_parameter_has_its_row(tied):
    config = T5Config(**{**vars(CONFIG), "logits_via_embedding": tied})
    specs = partitioning.param_specs(t5.abstract_params(config), mesh_like(data=1, fsdp=2, model=2))
    kernels = {"query": (None, "fsdp", "model"), "out": (None, "model", "fsdp")}
    for name, expected in kernels.items():
        for stack, attention in (("encoder", "attention"), ("decoder", "self_attention")):
            assert tuple(specs[stack]["layers"][attention][name]["kernel"]) == expected
    assert tuple(specs["token_embedder"]["embedding"]) == ("model", "fsdp")
    assert tuple(specs["encoder"]["relpos_bias"]["rel_embedding"]) == ("model", None)
    assert tuple(specs["decoder"]["decoder_norm"]["scale"]) == (None,)


def test_parameter_without_a_row_is_an_error():
    tree = {"encoder": {"layers": {"mlp": {"gate": {"kernel": jax.ShapeDtypeStruct((2, 4, 4), "float32")}}}}}
    with pytest.raises(ValueError, match="encoder/layers/mlp/gate/kernel"):
        partitioning.param_specs(tree, mesh_like(data=1, fsdp=1, model=1))


def test_dimension_that_is_not_divided_evenly_stays_whole():
    specs = partitioning.param_specs(t5.abstract_params(CONFIG), mesh_like(data=1, fsdp=1, model=8))
    assert tuple(specs["encoder"]["relpos_bias"]["rel_embedding"]) == (None, None)  # 4 heads over 8
    assert tuple(specs["encoder"]["layers"]["attention"]["query"]["kernel"]) == (None, "fsdp", "model")  # 32 over 8


def test_full_sized_model_splits_everything_large():
    """XL over fsdp 4 x model 4: no device holds more than a sixteenth and the norms and biases."""
    config = T5Config(
        emb_dim=2048, num_heads=32, head_dim=64, num_encoder_layers=24, num_decoder_layers=24, mlp_dim=5120
    )
    sizes = {"data": 1, "fsdp": 4, "model": 4}
    abstract = t5.abstract_params(config)
    specs = partitioning.param_specs(abstract, mesh_like(**sizes))
    whole = sum(leaf.size for leaf in jax.tree.leaves(abstract))
    held = 0
    for leaf, spec in zip(jax.tree.leaves(abstract), jax.tree.leaves(specs, is_leaf=is_spec), strict=True):
        held += leaf.size / np.prod([sizes[axis] for axis in spec if axis])
    assert held / whole < 1.01 / 16


def is_spec(node):
    return isinstance(node, jax.sharding.PartitionSpec)


@pytest.fixture(scope="module")
def problem():
    """(params, batch, function from them to (logits, gradients))."""
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: rng.standard_normal(leaf.shape, np.float32) / (leaf.shape[-2] ** 0.5 if leaf.ndim > 1 else 1),
        t5.abstract_params(CONFIG),
    )
    encoder, decoder = rng.integers(1, CONFIG.vocab_size, (16, 12)), rng.integers(1, CONFIG.vocab_size, (16, 6))
    segments = np.repeat([[1, 2, 0]], 4, axis=-1).repeat(16, axis=0), np.repeat([[1, 2, 0]], 2, -1).repeat(16, axis=0)
    graphdef = t5.graph(CONFIG)

    def compute(params, batch):
        def loss(params):
            logits = nnx.merge(graphdef, params)(*batch, dropout_key=jax.random.key(0, impl="rbg"))
            real = batch[3][..., None] > 0
            return jnp.mean(jnp.where(real, jax.nn.log_softmax(logits), 0) ** 2), logits

        gradients, logits = jax.grad(loss, has_aux=True)(params)
        return logits, gradients

    batch = tuple(array.astype(np.int32) for array in (encoder, decoder, *segments))
    return params, batch, compute


@pytest.fixture(scope="module")
def alone(problem):
    params, batch, compute = problem
    return jit(compute)(params, batch)


@pytest.mark.devices8
@eight_devices
@pytest.mark.parametrize(
    "shape",
    [{"data": 8}, {"fsdp": 8}, {"model": 2, "data": -1}, {"data": 2, "fsdp": 2, "model": 2}],
    ids=str,
)
def test_sharded_model_equals_one_device(problem, alone, shape):
    params, batch, compute = problem
    mesh = partitioning.make_mesh(shape)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, partitioning.with_shardings(t5.abstract_params(CONFIG), mesh))
    split = jax.device_put(params, shardings)
    rows = jax.device_put(batch, partitioning.batch_sharding(mesh))
    compiled = jit(compute, out_shardings=(partitioning.batch_sharding(mesh), shardings))
    logits, gradients = compiled(split, rows)
    np.testing.assert_allclose(logits, alone[0], rtol=0, atol=1e-4)
    for (path, ours), expected in zip(
        jax.tree_util.tree_leaves_with_path(gradients), jax.tree.leaves(alone[1]), strict=True
    ):
        np.testing.assert_allclose(ours, expected, rtol=1e-3, atol=1e-6, err_msg=jax.tree_util.keystr(path))


@pytest.mark.devices8
@eight_devices
def test_parameters_are_drawn_where_they_stay_and_do_not_depend_on_the_mesh():
    def draw(shape):
        mesh = partitioning.make_mesh(shape)
        abstract = partitioning.with_shardings(t5.abstract_params(CONFIG), mesh)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
        return jit(functools.partial(t5.init_params, CONFIG), out_shardings=shardings)(jax.random.key(0))

    split, whole = draw({"fsdp": 4, "model": 2}), draw({"data": 8})
    kernel = split["encoder"]["layers"]["mlp"]["wo"]["kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size // 8
    jax.tree.map(np.testing.assert_array_equal, split, whole)


@pytest.mark.parametrize("tokens", [1, 32_100, 44_201])
def test_vocabulary_rows_do_not_depend_on_the_mesh_and_every_mesh_splits_them(tokens):
    gin_config.parse(["gin_configs/models/t5_tiny.gin"], [])
    rows = model_config(tokens).vocab_size
    assert 0 <= rows - tokens < 128
    table = {"token_embedder": {"embedding": jax.ShapeDtypeStruct((rows, 64), "float32")}}
    for model in (2, 8, 128):
        spec = partitioning.param_specs(table, mesh_like(data=1, fsdp=1, model=model))["token_embedder"]["embedding"]
        assert tuple(spec) == ("model", "fsdp")

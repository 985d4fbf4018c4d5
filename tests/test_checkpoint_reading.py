"""Reading in slices: a device gets its shard and no process reads more, and slices are those of the whole array."""

import dataclasses
import math

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from recalign_jax import partitioning
from recalign_jax.checkpoint import arrays, stacking, training
from recalign_jax.checkpoint.arrays import LazyArray, place, whole
from recalign_jax.checkpoint.formats import open_checkpoint, our_params
from recalign_jax.checkpoint.initial import load_initial
from recalign_jax.checkpoint.stacking import Source
from recalign_jax.errors import InputError
from recalign_jax.model import t5
from recalign_jax.model.config import T5Config
from tests.checkpoint_folders import SMALL_JSON, T5X_TINY, state_dict, write_folder
from tests.shared_data import shared

# Every dimension can be split over four devices.
CONFIG = T5Config(
    emb_dim=16, num_heads=4, head_dim=8, num_encoder_layers=2, num_decoder_layers=3, mlp_dim=24, vocab_size=64
)
JSON = SMALL_JSON | {"d_model": 16, "num_heads": 4, "d_kv": 8, "d_ff": 24, "vocab_size": 64}
GROWN = dataclasses.replace(CONFIG, vocab_size=96, num_tokens=90)


@pytest.fixture(scope="module")
def params():
    random = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: random.standard_normal(leaf.shape, np.float32), t5.abstract_params(CONFIG))


@pytest.fixture(scope="module")
def folders(params, tmp_path_factory):
    """The same parameters as a Hugging Face folder, and as one of our own checkpoints."""
    root = tmp_path_factory.mktemp("checkpoints")
    write_folder(root / "huggingface", state_dict(params, CONFIG), JSON, files=3)
    with training.open_checkpoints(str(root / "recalign"), keep=3) as checkpoints:
        metadata = {"identity": {}, "model": dataclasses.asdict(CONFIG), "positions": []}
        training.save(checkpoints, 3, params, {"count": np.int32(3)}, metadata)
    return root


def checkpoint_at(folders, kind):
    """(folder, config) of a checkpoint of each format."""
    if kind.startswith("t5x"):
        return shared(f"fixtures/t5x_tiny/{kind.removeprefix('t5x_')}_checkpoint_6"), T5X_TINY
    return folders / kind, CONFIG


def recorded(checkpoint, reads):
    """The checkpoint, with the size of every read of an array put into `reads`."""

    def record(name, array):
        def read(index):
            block = array[index]
            reads.setdefault(name, []).append(block.size)
            return block

        return LazyArray(tuple(array.shape), array.dtype, read)

    opened = {name: record(name, array) for name, array in checkpoint.arrays.items()}
    return dataclasses.replace(checkpoint, arrays=opened)


@pytest.mark.devices8
@pytest.mark.parametrize("kind", ["huggingface", "t5x_legacy", "t5x_orbax", "recalign"])
@pytest.mark.parametrize("shape", [{"fsdp": 4, "model": 2}, {"fsdp": 8}, {"data": 2, "model": 4}])
def test_no_read_is_larger_than_a_shard(folders, kind, shape):
    folder, config = checkpoint_at(folders, kind)
    mesh = partitioning.make_mesh(shape)
    targets = stacking.flatten(partitioning.with_shardings(t5.abstract_params(config), mesh))
    reads: dict[str, list[int]] = {}
    checkpoint = recorded(open_checkpoint(str(folder)), reads)
    lazily = our_params(checkpoint, config, seed=0)
    assert not reads
    expected = our_params(open_checkpoint(str(folder)), config, seed=0)
    for path, source in checkpoint.sources(config).items():
        target = targets[path]
        reads.clear()
        placed = place(lazily[path], target)
        np.testing.assert_array_equal(np.asarray(placed), whole(expected[path]))
        assert placed.sharding == target.sharding
        assert placed.dtype == np.float32
        shard = target.sharding.shard_shape(target.shape)
        limit = math.prod(shard[1:] if source.stacked else shard)
        different = math.prod(target.shape) // math.prod(shard)
        assert set(reads) == set(source.names)
        for sizes in reads.values():
            # As many reads as there are different shards: what devices hold alike is read once.
            assert sizes == [limit] * different


@pytest.mark.devices8
@pytest.mark.parametrize("kind", ["huggingface", "recalign"])
def test_a_grown_vocabulary_is_the_same_on_every_mesh(folders, kind, params):
    one = partitioning.make_mesh({}, jax.devices()[:1])
    shapes = t5.abstract_params(GROWN)
    expected = load_initial(str(folders / kind), GROWN, 0, partitioning.with_shardings(shapes, one))
    for shape in ({"fsdp": 4, "model": 2}, {"model": 8}):
        mesh = partitioning.make_mesh(shape)
        found = load_initial(str(folders / kind), GROWN, 0, partitioning.with_shardings(shapes, mesh))
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), found, expected)


@pytest.mark.parametrize("kind", ["huggingface", "recalign"])
def test_rows_that_a_checkpoint_lacks_are_those_of_a_new_model(folders, kind, params):
    mesh = partitioning.make_mesh({"data": -1})
    loaded = load_initial(str(folders / kind), GROWN, 5, partitioning.with_shardings(t5.abstract_params(GROWN), mesh))
    fast = {"xla_backend_optimization_level": 0}  # to compile
    new = jax.jit(lambda key: t5.init_params(GROWN, key), compiler_options=fast)(jax.random.key(5))
    rows, columns = loaded["token_embedder"]["embedding"], loaded["decoder"]["logits_dense"]["kernel"]
    np.testing.assert_array_equal(rows[:64], params["token_embedder"]["embedding"])
    np.testing.assert_array_equal(columns[:, :64], params["decoder"]["logits_dense"]["kernel"])
    # Compiled otherwise, a random number may differ in its last bit.
    np.testing.assert_allclose(rows[64:], new["token_embedder"]["embedding"][64:], rtol=1e-6)
    np.testing.assert_allclose(columns[:, 64:], new["decoder"]["logits_dense"]["kernel"][:, 64:], rtol=1e-6)


def test_t5x_by_url_is_t5x_by_path():
    """`gs://` goes through the same code as `file://`."""
    for kind in ("legacy", "orbax"):
        folder = shared(f"fixtures/t5x_tiny/{kind}_checkpoint_6")
        local, remote = (open_checkpoint(path) for path in (str(folder), folder.as_uri()))
        assert (local.input_format, local.config) == (remote.input_format, remote.config)
        assert local.input_format == f"t5x_{kind}"
        assert local.config == dataclasses.replace(T5X_TINY)
        assert local.arrays.keys() == remote.arrays.keys()
        for name, array in local.arrays.items():
            np.testing.assert_array_equal(whole(array), whole(remote.arrays[name]))


def test_what_is_no_checkpoint_is_an_error(tmp_path):
    with pytest.raises(InputError, match="not a T5X checkpoint: neither"):
        open_checkpoint(tmp_path.as_uri())
    with pytest.raises(InputError, match="can't be opened"):
        open_checkpoint("nonsense://bucket/path")
    with pytest.raises(InputError, match="no such folder"):
        open_checkpoint(str(tmp_path / "nowhere"))
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file: give the folder"):
        open_checkpoint(str(tmp_path / "file"))
    (tmp_path / "run" / "checkpoint_1000").mkdir(parents=True)
    with pytest.raises(InputError, match=r"Give one step of it, as .*checkpoint_1000"):
        open_checkpoint(str(tmp_path / "run"))


@pytest.mark.parametrize(
    ("rename", "message"),
    [
        (lambda name: name.replace("mlp/wi_0", "mlp/wi"), "no parameter 'encoder/layers/mlp/wi_[01]/kernel'"),
        (lambda name: name.replace("encoder/layers_0/", "encoder/encoder/"), "scalable_t5"),
        (lambda name: name.replace("mlp/wi_1", "mlp/wi"), "not a T5.1.1"),
    ],
)
def test_other_networks_of_t5x_are_refused(tmp_path, rename, message):
    from flax import serialization

    source = open_checkpoint(str(shared("fixtures/t5x_tiny/legacy_checkpoint_6")))
    target = stacking.unflatten({rename(name): whole(array) for name, array in source.arrays.items()})
    tree = {"version": 3, "optimizer": {"target": target, "state": {"step": np.int32(6)}}}
    (tmp_path / "checkpoint").write_bytes(serialization.msgpack_serialize(tree))
    with pytest.raises(InputError, match=message):
        open_checkpoint(str(tmp_path))


def test_damaged_safetensors_are_named(params, tmp_path):
    write_folder(tmp_path, state_dict(params, CONFIG), JSON, files=2)
    part, index = tmp_path / "model-00002-of-00002.safetensors", tmp_path / "model.safetensors.index.json"
    good = part.read_bytes()
    part.write_bytes(good[:-100])
    with pytest.raises(InputError, match=r"model-00002-of-00002\.safetensors: no safetensors file, or damaged"):
        open_checkpoint(str(tmp_path))
    part.write_bytes(good)
    index.write_text(index.read_text().replace('"shared.weight"', '"shared.wait"'))
    with pytest.raises(InputError, match=r"no array .shared\.wait"):
        open_checkpoint(str(tmp_path))
    index.write_text("{}")
    with pytest.raises(InputError, match="no index of safetensors files"):
        open_checkpoint(str(tmp_path))


def test_weights_of_an_unknown_type_are_refused(tmp_path):
    save_file({"x": np.zeros(3, np.int8)}, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match="parameter 'x' is of type I8"):
        arrays.open_safetensors({"x": tmp_path / "x.safetensors"})


@given(st.data(), st.booleans(), st.booleans(), st.integers(0, 2**31))
def test_slices_of_stacked_layers_and_of_split_ones(data, stacked, transposed, seed):
    """Both directions against numpy, for any slice."""
    random = np.random.default_rng(seed)
    layers, rows, columns = random.integers(1, 5, 3)
    names = tuple(f"layer{layer}" for layer in range(layers if stacked else 1))
    foreign = {name: random.standard_normal((rows, columns)).astype(np.float16) for name in names}
    expected = np.stack([array.T if transposed else array for array in foreign.values()]).astype(np.float32)
    expected = expected if stacked else expected[0]
    sources = {"x": Source(names, stacked, transposed)}
    abstract = {"x": jax.ShapeDtypeStruct(expected.shape, np.float32)}
    ours = stacking.stack(foreign, sources, abstract, "here")["x"]

    def any_slice(size):
        start = data.draw(st.integers(0, size - 1))
        return slice(start, data.draw(st.integers(start + 1, size)))

    index = tuple(any_slice(size) for size in expected.shape)
    np.testing.assert_array_equal(ours[index], expected[index])
    assert ours[index].dtype == np.float32
    for name, array in stacking.split({"x": ours}, sources):
        assert array.shape == foreign[name].shape
        index = tuple(any_slice(size) for size in array.shape)
        np.testing.assert_array_equal(array[index], foreign[name][index])

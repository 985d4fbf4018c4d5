"""Reading Hugging Face folders and T5X checkpoints: T5X's own numbers come out, and what doesn't fit is named."""

import json
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx, serialization

from recalign_jax.checkpoint import huggingface, stacking, t5x
from recalign_jax.checkpoint.arrays import open_orbax, open_store, whole
from recalign_jax.errors import InputError
from recalign_jax.model import t5
from recalign_jax.model.config import T5Config
from tests.checkpoint_folders import SMALL, SMALL_JSON, T5X_TINY, state_dict, write_folder
from tests.shared_data import shared

TOLERANCE = 1e-4


# ---------------------------------------------------------------- T5X


@pytest.mark.parametrize("kind", ["legacy", "orbax"])
def test_t5x_checkpoint_gives_t5x_logits(kind):
    folder = shared("fixtures/t5x_tiny")
    params = t5x.load_params(t5x.read_arrays(folder / f"{kind}_checkpoint_6"), T5X_TINY, kind)
    golden = np.load(folder / f"{kind}_golden.npz")
    graphdef = t5.graph(T5X_TINY)
    fast = {"xla_backend_optimization_level": 0}  # to compile
    forward = jax.jit(lambda params, *batch: nnx.merge(graphdef, params)(*batch), compiler_options=fast)

    names = ("encoder_input_tokens", "decoder_input_tokens", "encoder_segment_ids", "decoder_segment_ids")
    packed = forward(params, *(golden[f"packed_{name}"] for name in names))
    np.testing.assert_allclose(packed, golden["packed_logits"], rtol=0, atol=TOLERANCE)

    # Told where the padding is, even the meaningless logits there are T5X's.
    inputs = [golden[name] for name in names[:2]]
    segments = ((golden[name] > 0).astype(int) for name in ("encoder_input_tokens", "decoder_target_tokens"))
    np.testing.assert_allclose(forward(params, *inputs, *segments), golden["logits"], rtol=0, atol=TOLERANCE)

    real = golden["decoder_target_tokens"] > 0
    untold = forward(params, *inputs)
    np.testing.assert_allclose(untold[real], golden["logits"][real], rtol=0, atol=TOLERANCE)


def test_legacy_checkpoint_with_arrays_inside(tmp_path):
    """T5X keeps small arrays in the msgpack file itself; here all are, and no zarr folder is."""
    source = shared("fixtures/t5x_tiny/legacy_checkpoint_6")
    arrays = t5x.read_arrays(source)
    target = stacking.unflatten({name: np.asarray(array) for name, array in arrays.items()})
    tree = {"version": 3, "optimizer": {"target": target, "state": {"step": np.int32(6)}}}
    (tmp_path / "checkpoint").write_bytes(serialization.msgpack_serialize(tree))
    again = t5x.read_arrays(tmp_path)
    assert again.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(again[name], array)


def test_t5x_mismatch_names_the_parameter():
    arrays = t5x.read_arrays(shared("fixtures/t5x_tiny/legacy_checkpoint_6"))
    with pytest.raises(InputError, match=r"logits_dense/kernel' has shape \[32, 384\].*expects \[32, 512\]"):
        t5x.load_params(arrays, T5Config(**{**vars(T5X_TINY), "vocab_size": 512}), "here")
    with pytest.raises(InputError, match="no place for parameter 'encoder/layers_2/"):
        t5x.load_params(arrays, T5Config(**{**vars(T5X_TINY), "num_encoder_layers": 2}), "here")
    with pytest.raises(InputError, match="here: no parameter 'decoder/layers_2/"):
        t5x.load_params(arrays, T5Config(**{**vars(T5X_TINY), "num_decoder_layers": 3}), "here")


def test_t5x_damage_is_named(tmp_path):
    with pytest.raises(InputError, match="not a T5X checkpoint: neither"):
        t5x.read_arrays(tmp_path)
    (tmp_path / "checkpoint").write_bytes(b"\x81nonsense")
    with pytest.raises(InputError, match="not a T5X checkpoint, or damaged"):
        t5x.read_arrays(tmp_path)
    (tmp_path / "checkpoint").write_bytes(serialization.msgpack_serialize({"version": 2, "optimizer": {"target": {}}}))
    with pytest.raises(InputError, match="version 2"):
        t5x.read_arrays(tmp_path)


def test_t5x_missing_zarr_folder_is_named(tmp_path):
    source = shared("fixtures/t5x_tiny/legacy_checkpoint_6")
    shutil.copyfile(source / "checkpoint", tmp_path / "checkpoint")
    for folder in source.glob("target.*"):
        if "layers_1.mlp.wo" not in folder.name:
            (tmp_path / folder.name).symlink_to(folder)
    with pytest.raises(InputError, match="layers_1/mlp/wo/kernel"):
        t5x.read_arrays(tmp_path)


def test_t5x_missing_chunk_is_named(tmp_path):
    """TensorStore would fill it with zeros."""
    shutil.copytree(shared("fixtures/t5x_tiny/legacy_checkpoint_6"), tmp_path / "6")
    next((tmp_path / "6" / "target.encoder.layers_0.mlp.wo.kernel").glob("[0-9]*")).unlink()
    arrays = t5x.read_arrays(tmp_path / "6")
    with pytest.raises(InputError, match=r"'encoder/layers_0/mlp/wo/kernel' can't be read: .*missing"):
        t5x.load_params(arrays, T5X_TINY, "here")


@pytest.mark.parametrize("ocdbt", [True, False])
@pytest.mark.parametrize("zarr3", [True, False])
def test_a_kernel_of_zeros_is_read(tmp_path, ocdbt, zarr3):
    tree = {"a": {"kernel": np.zeros((40, 30), np.float32)}, "b": np.ones(3, np.float32)}
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=ocdbt, use_zarr3=zarr3)
    ocp.Checkpointer(handler).save(tmp_path / "x", args=ocp.args.PyTreeSave(tree))
    found = open_orbax(open_store(str(tmp_path / "x")), "x")
    np.testing.assert_array_equal(whole(found["a/kernel"]), tree["a"]["kernel"])


# ---------------------------------------------------------------- Hugging Face


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32), t5.abstract_params(SMALL))


@pytest.mark.parametrize("files", [1, 3])
def test_huggingface_round_trip_is_bitwise(params, tmp_path, files):
    write_folder(tmp_path, state_dict(params, SMALL), files=files)
    config = huggingface.read_config(tmp_path)
    assert config == SMALL
    again = huggingface.load_params(huggingface.read_arrays(tmp_path), config, str(tmp_path))
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_names_are_those_of_transformers(params):
    transformers = pytest.importorskip("transformers")
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**SMALL_JSON))
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if "embed_tokens" not in name}
    ours = {name: array.shape for name, array in state_dict(params, SMALL).items()}
    assert ours == expected


def test_folder_that_transformers_wrote_loads(tmp_path):
    """transformers 5 ties a T5.1.1 that it makes from scratch and says tie_word_embeddings whatever is the case."""
    transformers = pytest.importorskip("transformers")
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**SMALL_JSON))
    model.save_pretrained(tmp_path)
    config = huggingface.read_config(tmp_path)
    assert (config.logits_via_embedding, config.scale_decoder_outputs) == (True, False)
    loaded = huggingface.load_params(huggingface.read_arrays(tmp_path), config, str(tmp_path))
    np.testing.assert_array_equal(loaded["token_embedder"]["embedding"], model.shared.weight.detach().numpy())


def test_bfloat16_weights_become_float32(params, tmp_path):
    import ml_dtypes

    arrays = {name: x.astype(ml_dtypes.bfloat16) for name, x in state_dict(params, SMALL).items()}
    write_folder(tmp_path, arrays)
    loaded = huggingface.load_params(huggingface.read_arrays(tmp_path), SMALL, str(tmp_path))
    kernel, original = (tree["encoder"]["layers"]["mlp"]["wo"]["kernel"] for tree in (loaded, params))
    assert kernel.dtype == np.float32
    np.testing.assert_array_equal(kernel, original.astype(ml_dtypes.bfloat16).astype(np.float32))


def test_pickle_is_refused_with_what_to_do(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SMALL_JSON))
    (tmp_path / "pytorch_model.bin").write_bytes(b"never read")
    with pytest.raises(InputError, match=r"pickle.*save_pretrained"):
        huggingface.read_config(tmp_path)


def test_huggingface_mismatch_names_the_parameter(params, tmp_path):
    arrays = state_dict(params, SMALL)
    with pytest.raises(InputError, match=r"'lm_head.weight' has shape \[40, 16\], the model expects \[64, 16\]"):
        huggingface.load_params(arrays, T5Config(**{**vars(SMALL), "vocab_size": 64}), "here")
    wider = T5Config(**{**vars(SMALL), "mlp_dim": 32})
    with pytest.raises(InputError, match=r"wi_0.weight' has shape \[24, 16\], the model expects \[32, 16\]"):
        huggingface.load_params(arrays, wider, "here")
    del arrays["encoder.block.1.layer.0.SelfAttention.q.weight"]
    with pytest.raises(InputError, match=r"here: no parameter 'encoder.block.1.layer.0.SelfAttention.q.weight'"):
        huggingface.load_params(arrays, SMALL, "here")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"feed_forward_proj": "relu"}, "feed_forward_proj is 'relu'"),
        ({"d_kv": None}, "'d_kv' is missing"),
    ],
)
def test_config_that_is_no_t5_1_1_is_an_error(tmp_path, change, message):
    values = {name: value for name, value in {**SMALL_JSON, **change}.items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps(values, indent=1))
    with pytest.raises(InputError, match=message):
        huggingface.read_config(tmp_path)


def test_what_files_of_t5_1_1_lack_is_what_transformers_takes(params, tmp_path):
    import transformers

    write_folder(tmp_path, state_dict(params, SMALL))
    same_name = {
        "relative_attention_max_distance",
        "relative_attention_num_buckets",
        "dropout_rate",
        "layer_norm_epsilon",
    }
    values = {name: SMALL_JSON[name] for name in SMALL_JSON.keys() - same_name - {"num_decoder_layers"}}
    (tmp_path / "config.json").write_text(json.dumps(values))
    config, theirs = huggingface.read_config(tmp_path), transformers.T5Config(**values)
    assert config.num_decoder_layers == theirs.num_decoder_layers == 2
    for name in same_name:
        assert getattr(config, name) == getattr(theirs, name)


def test_folder_that_is_incomplete_is_an_error(params, tmp_path):
    with pytest.raises(InputError, match=r"no config\.json"):
        huggingface.read_config(tmp_path)
    (tmp_path / "config.json").write_text("{\n broken")
    with pytest.raises(InputError, match=r"config\.json:2: not valid JSON"):
        huggingface.read_config(tmp_path)
    for content, message in ((b"\xff\xfe{}", "not valid JSON"), (b"[]", "not the configuration of a model")):
        (tmp_path / "config.json").write_bytes(content)
        with pytest.raises(InputError, match=message):
            huggingface.read_config(tmp_path)
    write_folder(tmp_path, state_dict(params, SMALL), files=2)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(InputError, match=r"'model-00002-of-00002\.safetensors', which is not in the folder"):
        huggingface.read_arrays(tmp_path)
    for content in (b"\xff\xfe", b"[]", b'{"weight_map": [1]}'):
        (tmp_path / "model.safetensors.index.json").write_bytes(content)
        with pytest.raises(InputError, match="no index of safetensors files, or damaged"):
            huggingface.read_arrays(tmp_path)

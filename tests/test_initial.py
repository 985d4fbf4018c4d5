"""Starting from a checkpoint of any format: what it has is taken over, the rest drawn, what doesn't fit is named."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest

from recalign_jax import partitioning
from recalign_jax.checkpoint import locations, stacking, t5x, training
from recalign_jax.checkpoint.initial import load_base, load_initial, load_trained
from recalign_jax.errors import InputError
from recalign_jax.model import t5
from tests.checkpoint_folders import SMALL, T5X_TINY, state_dict, write_folder
from tests.shared_data import shared


def shapes(config):
    return partitioning.with_shardings(t5.abstract_params(config), partitioning.make_mesh({"data": -1}))


def flat(params):
    return {name: np.asarray(array) for name, array in stacking.flatten(params).items()}


@pytest.fixture(scope="module")
def random_params():
    random = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: random.normal(size=leaf.shape).astype(np.float32), t5.abstract_params(SMALL))


@pytest.fixture
def folder(random_params, tmp_path):
    """A Hugging Face folder of SMALL, whose vocabulary has 40 rows."""

    write_folder(tmp_path / "hf", state_dict(random_params, SMALL))
    return str(tmp_path / "hf")


def test_huggingface_folder_with_item_tokens_on_top(folder, random_params):
    config = dataclasses.replace(SMALL, vocab_size=64, num_tokens=60)
    loaded, expected = flat(load_initial(folder, config, 0, shapes(config))), flat(random_params)
    for name, array in loaded.items():
        if name == "token_embedder/embedding":
            array, new = array[:40], array[40:]
        elif name == "decoder/logits_dense/kernel":
            array, new = array[:, :40], array[:, 40:]
        else:
            new = np.ones(1)
        np.testing.assert_array_equal(array, expected[name], err_msg=name)
        assert np.abs(new).min() > 0
    again = flat(load_initial(folder, config, 0, shapes(config)))
    other = flat(load_initial(folder, config, 1, shapes(config)))
    np.testing.assert_array_equal(again["token_embedder/embedding"], loaded["token_embedder/embedding"])
    assert (other["token_embedder/embedding"][40:] != loaded["token_embedder/embedding"][40:]).all()


@pytest.mark.parametrize("kind", ["legacy", "orbax"])
def test_t5x_checkpoint(kind):
    folder = shared(f"fixtures/t5x_tiny/{kind}_checkpoint_6")
    loaded = flat(load_initial(str(folder), T5X_TINY, 0, shapes(T5X_TINY)))
    expected = flat(t5x.load_params(t5x.read_arrays(folder), T5X_TINY, kind))
    for name, array in expected.items():
        np.testing.assert_array_equal(loaded[name], array, err_msg=name)


def test_an_own_checkpoint_with_altered_numbers_is_no_start(random_params, tmp_path):
    """A whole file of another checkpoint, which its own checksums pass. A vocabulary that grew hides nothing else."""
    for name, change in (("run", 0.0), ("other", 0.5)):
        params = jax.tree.map(np.copy, random_params)
        params["encoder"]["encoder_norm"]["scale"][3] += change
        with training.open_checkpoints(str(tmp_path / name)) as checkpoints:
            training.save(checkpoints, 3, params, {"count": np.int32(3)}, {"identity": {}, "positions": []})
    shutil.rmtree(tmp_path / "run/checkpoints/3/params")
    shutil.copytree(tmp_path / "other/checkpoints/3/params", tmp_path / "run/checkpoints/3/params")
    for config in (SMALL, dataclasses.replace(SMALL, vocab_size=64, num_tokens=60)):
        load_initial(str(tmp_path / "other"), config, 0, shapes(config))
        with pytest.raises(InputError, match="encoder/encoder_norm/scale is not what was saved"):
            load_initial(str(tmp_path / "run"), config, 0, shapes(config))


def test_own_checkpoint(random_params, tmp_path):
    with training.open_checkpoints(str(tmp_path / "run")) as checkpoints:
        training.save(checkpoints, 3, random_params, {"count": np.int32(3)}, {"identity": {}, "positions": []})
    loaded = flat(load_initial(str(tmp_path / "run"), SMALL, 0, shapes(SMALL)))
    for name, array in flat(random_params).items():
        np.testing.assert_array_equal(loaded[name], array, err_msg=name)
    wider = dataclasses.replace(SMALL, mlp_dim=32)
    with pytest.raises(InputError, match="mlp/wi_0/kernel"):
        load_initial(str(tmp_path / "run"), wider, 0, shapes(wider))


@pytest.fixture
def run(random_params, tmp_path):
    """A run's checkpoints of steps 3 (the best) and 4."""
    with training.open_checkpoints(str(tmp_path / "run")) as checkpoints:
        for step in (3, 4):
            metadata = {"identity": {}, "positions": [], "model": dataclasses.asdict(SMALL)}
            training.save(checkpoints, step, random_params, {"count": np.int32(step)}, metadata)
    locations.write_best(str(tmp_path / "run"), {"step": 3, "metric": "validation_loss", "value": 1.0})
    return str(tmp_path / "run")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"layer_norm_epsilon": 1e-5}, r"layer_norm_epsilon 1e-06, yours has 1e-05: set --gin\.T5Config\..*=1e-06"),
        ({"mlp_activations": ("silu", "linear")}, r"mlp_activations \('gelu', 'linear'\), yours has \('silu'"),
        ({"relative_attention_max_distance": 64}, "relative_attention_max_distance 128, yours has 64"),
        ({"scale_decoder_outputs": True}, "scale_decoder_outputs False, yours has True"),
        ({"logits_via_embedding": True}, "logits_via_embedding False, yours has True"),
        ({"dropout_rate": 0.5, "remat": "full", "activation_dtype": "bfloat16", "num_tokens": 39}, None),
    ],
)
def test_a_model_that_computes_something_else_with_the_same_parameters(run, change, says):
    config = dataclasses.replace(SMALL, **change)
    for load in (
        lambda: load_trained(run, config, shapes(config)),
        lambda: load_initial(run, config, 0, shapes(config)),
    ):
        if says is None:
            load()
        else:
            with pytest.raises(InputError, match=says):
                load()


def test_the_base_of_adapters_is_one_checkpoint_for_good(run, tmp_path, monkeypatch):
    """Whatever way it is given."""
    monkeypatch.chdir(tmp_path)
    ways = {"run": 4, "run/best": 3, "run/checkpoints": 4, "run/checkpoints/3": 3}
    for given, step in ways.items():
        for path in (given, str(tmp_path / given)):
            assert load_base(path, SMALL, 0, shapes(SMALL))[1]["path"] == f"{run}/checkpoints/{step}"


def test_what_does_not_fit_is_named(folder, tmp_path):
    for changes, says in [
        ({"vocab_size": 32}, "40 vocabulary rows"),
        ({"mlp_dim": 32}, "wi_0"),
        ({"num_decoder_layers": 2}, "no place for parameter"),
        ({"logits_via_embedding": True}, "logits_via_embedding=False"),
    ]:
        config = dataclasses.replace(SMALL, **changes)
        with pytest.raises(InputError, match=says):
            load_initial(folder, config, 0, shapes(config))
    with pytest.raises(InputError, match="no such folder"):
        load_initial(str(tmp_path / "nowhere"), SMALL, 0, shapes(SMALL))
    with pytest.raises(InputError, match="No checkpoint"):
        load_initial(str(tmp_path), SMALL, 0, shapes(SMALL))

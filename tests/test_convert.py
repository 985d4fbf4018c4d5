"""`recalign convert`: weights bit for bit there and back, the same answers in torch, and nothing half-written."""

import dataclasses
import json
import os
import pathlib
import shutil
import types

import jax
import ml_dtypes
import numpy as np
import optax
import pytest
import tensorstore
import torch
from flax import nnx, serialization, traverse_util
from safetensors import safe_open

from recalign_jax import cli, gin_config, partitioning
from recalign_jax.checkpoint import hub, huggingface, locations, saved, stacking, training
from recalign_jax.checkpoint.arrays import whole
from recalign_jax.checkpoint.formats import open_checkpoint, our_params
from recalign_jax.checkpoint.initial import load_base
from recalign_jax.commands.common import load_model
from recalign_jax.errors import RunError
from recalign_jax.model import lora, t5
from recalign_jax.model.config import T5Config
from recalign_jax.model.lora import LoraOptions
from recalign_jax.training import adafactor
from recalign_jax.training.optimizer import make_schedule
from seqio_tasks import specs
from seqio_tasks import vocabulary as vocabularies
from tests.checkpoint_folders import SMALL, SMALL_JSON, state_dict, write_folder
from tests.shared_data import shared

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("fast_compilation")
TOLERANCE = 1e-4
TINY_RUN = (
    *("--gin_file", "gin_configs/models/t5_tiny.gin", "--gin_file", "gin_configs/runs/finetune.gin"),
    *("--gin.TRAIN_STEPS=3", "--gin.BATCH_SIZE=4", "--gin.LOG_PERIOD=1"),
    *("--gin.InputOptions.window=64", "--gin.InputOptions.data_shards=2"),
    "--gin.TASK_FEATURE_LENGTHS={'inputs': 128, 'targets': 32}",
)


@pytest.fixture
def convert(capsys):
    """Runs the command; returns its JSON object, or with status 2 the error message."""

    def run(source, output, to, *arguments, status=0):
        capsys.readouterr()
        command = ["convert", "--input", str(source), "--output", str(output), "--to", to, "--json", *arguments]
        assert cli.main(command) == status
        printed = capsys.readouterr()
        return json.loads(printed.out.splitlines()[-1]) if status == 0 else printed.err

    return run


@pytest.fixture(scope="module")
def params():
    random = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: random.standard_normal(leaf.shape, np.float32), t5.abstract_params(SMALL))


@pytest.fixture
def folder(params, tmp_path):
    """A Hugging Face folder of SMALL as safetensors' own writer writes it."""
    write_folder(tmp_path / "first", state_dict(params, SMALL))
    return tmp_path / "first"


def shapes_of(config):
    return partitioning.with_shardings(t5.abstract_params(config), partitioning.make_mesh({"data": -1}))


def stored(folder):
    """All arrays of a folder's safetensors, by safetensors' own reader."""
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="numpy") as tensors:
            assert tensors.metadata() == {"format": "pt"} or folder.name == "first"
            found |= {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118  it is no mapping
    return found


def torch_logits(folder, inputs, decoder_inputs):
    model = transformers.T5ForConditionalGeneration.from_pretrained(folder).eval()
    inputs, decoder_inputs = (torch.tensor(np.asarray(tokens)).long() for tokens in (inputs, decoder_inputs))
    with torch.no_grad():
        return model(input_ids=inputs, attention_mask=(inputs > 0).long(), decoder_input_ids=decoder_inputs).logits


def our_model(path):
    """(inputs, decoder inputs) -> logits, compiled once a shape."""
    checkpoint = open_checkpoint(str(path))
    params = our_params(checkpoint, checkpoint.config, seed=0)
    params = stacking.unflatten({name: whole(array) for name, array in params.items()})
    graphdef = t5.graph(checkpoint.config)
    fast = {"xla_backend_optimization_level": 0}  # to compile
    forward = jax.jit(lambda params, *batch: nnx.merge(graphdef, params)(*batch), compiler_options=fast)
    return lambda *batch: np.asarray(forward(params, *(np.asarray(tokens, np.int32) for tokens in batch)))


# Weights.


@pytest.mark.parametrize(("dtype", "bits"), [(np.float32, "float32"), (ml_dtypes.bfloat16, "bfloat16")])
@pytest.mark.parametrize("max_shard_size", ["5", "0.000005"])
def test_there_and_back_is_bitwise(params, convert, tmp_path, dtype, bits, max_shard_size):
    write_folder(tmp_path / "first", {name: x.astype(dtype) for name, x in state_dict(params, SMALL).items()})
    first = stored(tmp_path / "first")
    there = convert(tmp_path / "first", tmp_path / "own", "recalign")
    assert there["input_format"] == "huggingface"
    assert there["parameters"] == sum(array.size for array in first.values())
    assert there["output"] == str(tmp_path / "own")
    back = convert(
        tmp_path / "own", tmp_path / "second", "huggingface", "--dtype", bits, "--max_shard_size", max_shard_size
    )
    assert (back["input_format"], back["parameters"]) == ("recalign", there["parameters"])
    second = stored(tmp_path / "second")
    assert second.keys() == first.keys()
    for name, array in first.items():
        assert (second[name].dtype, second[name].shape) == (array.dtype, array.shape)
        assert second[name].tobytes() == array.tobytes(), name
    files = sorted(tmp_path.glob("second/*.safetensors"))
    assert (len(files) > 5) == (max_shard_size != "5")
    largest = max(array.nbytes for array in first.values())
    for file in files:
        header = int.from_bytes(file.read_bytes()[:8], "little")
        assert header % 8 == 0
        assert file.stat().st_size - header - 8 <= max(float(max_shard_size) * 1e9, largest)
    assert huggingface.read_config(tmp_path / "second") == SMALL


def test_an_own_checkpoint_is_opened_like_any_other(folder, params, convert, tmp_path):
    convert(folder, tmp_path / "own", "recalign")
    loaded, step = saved.load_params(str(tmp_path / "own"), t5.abstract_params(SMALL))
    assert step == 1
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), b), loaded, params)


@pytest.mark.parametrize("kind", ["legacy", "orbax"])
def test_t5x_checkpoint_gives_t5x_logits_in_torch(convert, tmp_path, kind):
    source = shared(f"fixtures/t5x_tiny/{kind}_checkpoint_6")
    result = convert(source, tmp_path / "hf", "huggingface")
    assert result["input_format"] == f"t5x_{kind}"
    golden = np.load(source.parent / f"{kind}_golden.npz")
    logits = torch_logits(tmp_path / "hf", golden["encoder_input_tokens"], golden["decoder_input_tokens"])
    real = golden["decoder_target_tokens"] > 0
    np.testing.assert_allclose(logits.numpy()[real], golden["logits"][real], rtol=0, atol=TOLERANCE)


# To T5X. Whether T5X takes it is in test_t5x_bridge.py.


def state_of_t5x(step):
    """The train state in T5X's own format, and the arrays that its specs name."""
    tree = serialization.msgpack_restore((step / "checkpoint").read_bytes())
    assert tree["version"] == 3

    def read(leaf):
        if not isinstance(leaf, dict):
            return leaf
        where = {"driver": "file", "path": f"{step}/{leaf['kvstore']['path']}"}
        return tensorstore.open(leaf | {"kvstore": where}).result().read().result()

    flat = traverse_util.flatten_dict(tree["optimizer"], sep="/", is_leaf=lambda _, node: "driver" in node)
    return flat, {name: read(leaf) for name, leaf in flat.items()}


def test_a_checkpoint_of_t5x_comes_out_as_t5x_wrote_it(convert, tmp_path):
    source = shared("fixtures/t5x_tiny/legacy_checkpoint_6")
    convert(source, tmp_path / "out", "t5x")
    (their_leaves, their_arrays), (leaves, arrays) = map(state_of_t5x, (source, tmp_path / "out" / "checkpoint_0"))
    assert leaves.keys() == their_leaves.keys()
    for name, leaf in their_leaves.items():
        if isinstance(leaf, dict):
            assert leaves[name] == leaf
        assert (arrays[name].dtype, arrays[name].shape) == (their_arrays[name].dtype, their_arrays[name].shape)
        # The optimizer begins anew.
        expected = their_arrays[name] if name.startswith("target/") else np.zeros_like(their_arrays[name])
        np.testing.assert_array_equal(arrays[name], expected)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_to_t5x_and_back_is_bitwise(params, convert, tmp_path, dtype):
    bits = np.dtype(dtype).name
    write_folder(tmp_path / "first", {name: x.astype(dtype) for name, x in state_dict(params, SMALL).items()})
    convert(tmp_path / "first", tmp_path / "t5x", "t5x", "--dtype", bits)
    _, arrays = state_of_t5x(tmp_path / "t5x" / "checkpoint_0")
    assert {array.dtype for name, array in arrays.items() if name.startswith("target/")} == {np.dtype(dtype)}
    back = convert(tmp_path / "t5x" / "checkpoint_0", tmp_path / "second", "huggingface", "--dtype", bits)
    assert back["input_format"] == "t5x_legacy"
    first, second = stored(tmp_path / "first"), stored(tmp_path / "second")
    assert {name: x.tobytes() for name, x in second.items()} == {name: x.tobytes() for name, x in first.items()}


def test_the_optimizer_of_a_run_goes_along(tmp_path, convert):
    """Kernels of three kinds: more rows, more columns, and too small to be factored."""
    config = dataclasses.replace(SMALL, vocab_size=200, emb_dim=128, mlp_dim=136, num_heads=2, head_dim=80)
    random = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: random.standard_normal(leaf.shape, np.float32), t5.abstract_params(config))
    schedule = make_schedule("linear_warmup_cosine", 1e-3, 2, 9)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), adafactor.adafactor(schedule, beta1=0.9))
    state = jax.tree.map(lambda leaf: random.standard_normal(leaf.shape).astype(leaf.dtype), optimizer.init(params))
    metadata = {"identity": {}, "model": dataclasses.asdict(config), "positions": []}
    with training.open_checkpoints(str(tmp_path / "run")) as checkpoints:
        training.save(checkpoints, 7, params, state, metadata)
    convert(tmp_path / "run", tmp_path / "t5x", "t5x")
    _, arrays = state_of_t5x(tmp_path / "t5x" / "checkpoint_7")
    assert arrays.pop("state/step") == 7
    moments = state[1][0].moments
    below = "state/param_states/decoder/layers_2"
    more_columns = moments["decoder"]["layers"]["mlp"]["wi_1"]["kernel"]  # 128 x 136
    np.testing.assert_array_equal(arrays[f"{below}/mlp/wi_1/kernel/v_row"], more_columns.row[2])
    np.testing.assert_array_equal(arrays[f"{below}/mlp/wi_1/kernel/v_col"], more_columns.column[2])
    more_rows = moments["decoder"]["layers"]["self_attention"]["out"]["kernel"]  # 160 x 128
    np.testing.assert_array_equal(arrays[f"{below}/self_attention/out/kernel/v_row"], more_rows.column[2])
    np.testing.assert_array_equal(arrays[f"{below}/self_attention/out/kernel/v_col"], more_rows.row[2])
    biases = moments["decoder"]["relpos_bias"]["rel_embedding"]
    np.testing.assert_array_equal(arrays["state/param_states/decoder/relpos_bias/rel_embedding/v"], biases)
    momentum = state[1][2].ema["decoder"]["layers"]["mlp"]["wi_1"]["kernel"]  # of what is added, T5X's of subtracted
    np.testing.assert_array_equal(arrays[f"{below}/mlp/wi_1/kernel/m"], -momentum[2])
    kept = sum(x.size for name, x in arrays.items() if name.startswith("state/") and x.shape != (1,))
    assert kept == sum(leaf.size for leaf in jax.tree.leaves((moments, state[1][2].ema)))


def test_rows_that_stand_for_no_token_are_never_likely_in_t5x(run, shop_corpus, shop_words, convert, tmp_path):
    """They have the weights of padding, which no target is."""
    convert(run, tmp_path / "t5x", "t5x")
    _, arrays = state_of_t5x(tmp_path / "t5x" / "checkpoint_3")
    num_tokens = shop_words.num_tokens + shop_corpus.num_items
    trained = saved.read_arrays(str(run))
    for path, axis in {"token_embedder/embedding": 0, "decoder/logits_dense/kernel": 1}.items():
        ours, theirs = (np.moveaxis(whole(x), axis, 0) for x in (trained[path], arrays[f"target/{path}"]))
        np.testing.assert_array_equal(theirs[:num_tokens], ours[:num_tokens])
        assert len(theirs) == len(ours) > num_tokens
        np.testing.assert_array_equal(theirs[num_tokens:], np.broadcast_to(ours[0], theirs[num_tokens:].shape))


@pytest.mark.parametrize(
    "other", [{"logits_via_embedding": True}, {"relative_attention_max_distance": 64}, {"layer_norm_epsilon": 1e-5}]
)
def test_what_t5x_cannot_run_is_not_written(convert, tmp_path, other):
    config = dataclasses.replace(SMALL, **other)
    params = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), t5.abstract_params(config))
    metadata = {"identity": {}, "model": dataclasses.asdict(config), "positions": []}
    with training.open_checkpoints(str(tmp_path / "own")) as checkpoints:
        training.save(checkpoints, 3, params, {"count": np.int32(3)}, metadata)
    assert "T5X has no such T5.1.1" in convert(tmp_path / "own", tmp_path / "t5x", "t5x", status=2)
    assert [path.name for path in tmp_path.iterdir()] == ["own"]


def test_a_run_of_t5x_is_not_overwritten(folder, convert, tmp_path):
    convert(folder, tmp_path / "t5x", "t5x")
    convert(folder, tmp_path / "t5x", "t5x", "--overwrite")
    (tmp_path / "t5x" / "checkpoint_0").rename(tmp_path / "t5x" / "checkpoint_5")
    shutil.copytree(tmp_path / "t5x" / "checkpoint_5", tmp_path / "t5x" / "checkpoint_9")
    assert "or other files beside it" in convert(folder, tmp_path / "t5x", "t5x", "--overwrite", status=2)
    assert {path.name for path in (tmp_path / "t5x").iterdir()} == {"checkpoint_5", "checkpoint_9"}


@pytest.mark.parametrize("scaled", [False, True])
def test_a_tied_model_gives_the_same_logits_in_torch(convert, tmp_path, scaled):
    config = dataclasses.replace(SMALL, logits_via_embedding=True, scale_decoder_outputs=scaled)
    random = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: random.normal(0, 0.1, leaf.shape), t5.abstract_params(config))
    params = jax.tree.map(np.float32, params)
    metadata = {"identity": {}, "model": dataclasses.asdict(config), "positions": []}
    with training.open_checkpoints(str(tmp_path / "own")) as checkpoints:
        training.save(checkpoints, 3, params, {"count": np.int32(3)}, metadata)
    convert(tmp_path / "own", tmp_path / "hf", "huggingface")
    assert "lm_head.weight" not in stored(tmp_path / "hf")
    tokens = np.random.default_rng(0).integers(1, 40, (2, 9))
    expected = our_model(tmp_path / "own")(tokens, tokens[:, :5])
    logits = torch_logits(tmp_path / "hf", tokens, tokens[:, :5])
    np.testing.assert_allclose(logits.numpy(), expected, rtol=0, atol=TOLERANCE)
    assert huggingface.read_config(tmp_path / "hf") == config


# A model that `recalign train` trained.


@pytest.fixture(scope="module")
def run(shop_corpus, shop_words, data_dir, tmp_path_factory):
    """A model of three steps on item tokens."""
    model_dir = tmp_path_factory.mktemp("run")
    arguments = [f"--gin.MODEL_DIR={model_dir}", f"--gin.VOCABULARY={shop_words.path}"]
    arguments += ["--gin.MIXTURE_OR_TASK_NAME=shop_retrieval_aligned_token"]
    assert cli.main(["train", "--data_dir", str(data_dir), *TINY_RUN, *arguments]) == 0
    return model_dir


def test_a_trained_model_answers_identically_in_torch(run, shop_corpus, shop_words, convert, tmp_path):
    convert(run, tmp_path / "hf", "huggingface")
    num_tokens = shop_words.num_tokens + shop_corpus.num_items
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["vocab_size"] == num_tokens == len(stored(tmp_path / "hf")["shared.weight"])

    random = np.random.default_rng(0)
    inputs = random.integers(3, num_tokens, (3, 20))
    inputs[1, 12:] = 0
    decoder_inputs = np.concatenate([np.zeros((3, 1), int), random.integers(3, num_tokens, (3, 6))], axis=1)
    expected = our_model(run)(inputs, decoder_inputs)
    assert expected.shape[-1] > num_tokens  # rows of padding, which are not exported
    assert expected[..., num_tokens:].max() < -1e8
    logits = torch_logits(tmp_path / "hf", inputs, decoder_inputs).numpy()
    np.testing.assert_allclose(logits, expected[..., :num_tokens], rtol=0, atol=TOLERANCE)


def test_the_tokenizer_of_a_trained_model(run, shop_corpus, shop_words, convert, tmp_path):
    convert(run, tmp_path / "hf", "huggingface")
    titles = [shop_corpus.item_text(item).title or "" for item in range(shop_corpus.num_items)]
    num_tokens = shop_words.num_tokens + shop_corpus.num_items
    for make in (transformers.AutoTokenizer, transformers.T5Tokenizer):
        tokenizer = make.from_pretrained(tmp_path / "hf")
        assert len(tokenizer) == num_tokens
        assert [tokenizer(title).input_ids for title in titles] == [[*ids, 1] for ids in shop_words.encode(titles)]
        text = "history : <item_7> <item_59> ; <extra_id_0> next"
        expected = [
            *shop_words.encode(["history :"])[0],
            *(shop_words.num_tokens + 7, shop_words.num_tokens + 59),
            *(shop_words.encode([";"])[0] + [shop_words.num_tokens - 1] + shop_words.encode(["next"])[0] + [1]),
        ]
        assert tokenizer(text).input_ids == expected
        assert tokenizer.decode([shop_words.num_tokens + 7, 1], skip_special_tokens=True) == "<item_7>"


def test_torch_generates_what_our_model_finds_likeliest(run, shop_corpus, shop_words, convert, tmp_path):
    convert(run, tmp_path / "hf", "huggingface")
    model = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "hf").eval()
    inputs = np.random.default_rng(1).integers(3, shop_words.num_tokens, (4, 12))
    found = model.generate(torch.tensor(inputs), max_new_tokens=4, do_sample=False, num_beams=1).numpy()
    ours, decoded = our_model(run), np.zeros((4, 5), int)
    for position in range(4):  # what comes later in a row changes nothing
        logits = ours(inputs, decoded)[:, position]
        ended = (decoded[:, : position + 1] == 1).any(axis=1)
        decoded[:, position + 1] = np.where(ended, 0, logits.argmax(-1))
    np.testing.assert_array_equal(found, decoded[:, : found.shape[1]])


def test_the_vocabulary_must_be_the_one_of_the_run(run, convert, tmp_path, shop_words):
    other = shared("data/t5_vocabulary/spiece.model")
    message = convert(run, tmp_path / "hf", "huggingface", "--vocabulary", str(other), status=2)
    assert "trained with another vocabulary" in message
    assert not (tmp_path / "hf").exists()
    convert(run, tmp_path / "hf", "huggingface", "--vocabulary", shop_words.path)
    assert (tmp_path / "hf" / "spiece.model").read_bytes() == pathlib.Path(shop_words.path).read_bytes()


def test_the_best_checkpoint_and_a_vocabulary_by_name(run, convert, tmp_path, shop_words):
    """As a run has them that was trained with --gin.VOCABULARY=NAME and BEST_METRIC."""
    shutil.copytree(run, tmp_path / "run")
    config = tmp_path / "run" / "config.gin"
    config.write_text(config.read_text().replace(shop_words.path, "shop_words.model"))
    step = locations.steps(str(run))[0]
    locations.write_best(str(tmp_path / "run"), {"step": step, "metric": "validation_loss", "value": 1.0})
    (tmp_path / "data/vocabularies").mkdir(parents=True)
    shutil.copy(shop_words.path, tmp_path / "data/vocabularies/shop_words.model")
    data_dir = ("--data_dir", str(tmp_path / "data"))
    convert(tmp_path / "run" / "best", tmp_path / "hf", "huggingface", *data_dir)
    assert (tmp_path / "hf" / "spiece.model").read_bytes() == pathlib.Path(shop_words.path).read_bytes()
    by_name = (*data_dir, "--vocabulary", "shop_words.model")
    convert(tmp_path / "run" / "checkpoints" / str(step), tmp_path / "same", "huggingface", *by_name)
    for name, array in stored(tmp_path / "hf").items():
        np.testing.assert_array_equal(array, stored(tmp_path / "same")[name])


def test_a_converted_folder_is_no_run_to_go_on_with(run, convert, tmp_path, shop_words, data_dir, capsys):
    convert(run, tmp_path / "own", "recalign")
    arguments = [f"--gin.MODEL_DIR={tmp_path / 'own'}", f"--gin.VOCABULARY={shop_words.path}"]
    arguments += ["--gin.MIXTURE_OR_TASK_NAME=shop_retrieval_aligned_token"]
    assert cli.main(["train", "--data_dir", str(data_dir), *TINY_RUN, *arguments]) == 2
    assert "converted from" in capsys.readouterr().err


def test_evaluation_takes_a_converted_checkpoint(run, shop_corpus, shop_words, convert, tmp_path):
    convert(run, tmp_path / "own", "recalign")
    gin_config.parse(["gin_configs/models/t5_tiny.gin"], [])
    spec = specs.make_spec(shop_corpus, "retrieval", "token", shop_words, specs.TaskOptions())
    step = load_model(spec, str(tmp_path / "own"), None, "EVAL_BATCH_SIZE").step
    assert step == 1


def test_a_run_that_goes_on_meanwhile(params, convert, tmp_path, monkeypatch):
    """The checkpoint that was the newest is converted, all of it."""
    real = saved.read_metadata

    def save_step(step):
        changed = jax.tree.map(lambda leaf: leaf + step, params)
        with training.open_checkpoints(str(tmp_path / "run")) as checkpoints:
            metadata = {"identity": {}, "model": dataclasses.asdict(SMALL), "positions": []}
            training.save(checkpoints, step, changed, {"count": np.int32(step)}, metadata)

    def read_and_save(folder):
        metadata = real(folder)
        if not (tmp_path / "run" / "checkpoints" / "2").exists():
            save_step(2)
        return metadata

    save_step(1)
    monkeypatch.setattr(saved, "read_metadata", read_and_save)
    convert(tmp_path / "run", tmp_path / "own", "recalign")
    assert (tmp_path / "run" / "checkpoints" / "2").exists()
    loaded, _ = saved.load_params(str(tmp_path / "own"), shapes_of(SMALL))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b + 1), loaded, params)


@pytest.mark.parametrize("grown", [False, True])
def test_adapters_are_merged_with_their_base(folder, params, convert, tmp_path, grown):
    """A run of `LORA_RANK` saves its adapters alone; whatever is made of them holds the sum."""
    config = dataclasses.replace(SMALL, vocab_size=64, num_tokens=50) if grown else SMALL
    shapes = shapes_of(config)
    base, told = load_base(str(folder), config, 0, shapes)
    options = LoraOptions(rank=2, alpha=3.0, targets=("query", "wo"))
    adapters = lora.init_adapters(params, options, jax.random.key(1))
    adapters = jax.tree.map(lambda leaf: leaf + 0.1, adapters)
    identity = {"base": told, "lora": dataclasses.asdict(options), "vocabulary": "x"}
    with training.open_checkpoints(str(tmp_path / "run")) as checkpoints:
        metadata = {"identity": identity, "model": dataclasses.asdict(config), "positions": []}
        training.save(checkpoints, 3, adapters, {"count": np.int32(3)}, metadata)
    convert(tmp_path / "run", tmp_path / "own", "recalign")
    assert saved.read_identity(str(tmp_path / "own")).keys() == {"vocabulary", "converted from"}
    loaded, _ = saved.load_params(str(tmp_path / "own"), shapes)
    expected = lora.merge(base, adapters, options)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), loaded, expected)
    convert(tmp_path / "run", tmp_path / "hf", "huggingface")
    assert stored(tmp_path / "hf")["shared.weight"].shape == (50 if grown else 40, 16)

    write_folder(folder, {name: x + 1 for name, x in stored(folder).items()})
    message = convert(tmp_path / "run", tmp_path / "other", "recalign", status=2)
    assert "which has other parameters now than when they were trained" in message
    shutil.rmtree(folder)
    assert "which is not there" in convert(tmp_path / "run", tmp_path / "other", "recalign", status=2)


# Tokenizer files of a pretrained model.


def test_tokenizer_files_of_a_folder_are_kept(folder, convert, tmp_path):
    for name in ("spiece.model", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(shared("data/t5_vocabulary") / name, folder / name)
    (folder / "pytorch_model.bin").write_bytes(b"never read")
    convert(folder, tmp_path / "second", "huggingface")
    assert {path.name for path in (tmp_path / "second").iterdir()} == {
        *("config.json", "generation_config.json", "model.safetensors"),
        *("spiece.model", "tokenizer.json", "tokenizer_config.json"),
    }
    for name in ("spiece.model", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "second" / name).read_bytes() == (folder / name).read_bytes()
    message = convert(folder, tmp_path / "x", "huggingface", "--vocabulary", str(folder / "spiece.model"), status=2)
    assert "has 32100 tokens, the model only 40" in message
    assert not (tmp_path / "x").exists()
    convert(folder, tmp_path / "own", "recalign")
    fingerprint = vocabularies.load(str(folder / "spiece.model")).fingerprint
    assert saved.read_identity(str(tmp_path / "own"))["vocabulary"] == fingerprint


def test_a_vocabulary_that_was_not_known_can_be_given_later(convert, tmp_path, shop_words):
    config = dataclasses.replace(SMALL, vocab_size=384)
    random = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: random.standard_normal(leaf.shape, np.float32), t5.abstract_params(config))
    write_folder(tmp_path / "first", state_dict(params, config), SMALL_JSON | {"vocab_size": 384})
    convert(tmp_path / "first", tmp_path / "ours", "recalign")
    convert(tmp_path / "ours", tmp_path / "again", "huggingface", "--vocabulary", shop_words.path)
    assert len(transformers.AutoTokenizer.from_pretrained(tmp_path / "again")) == shop_words.num_tokens


def test_t5_vocabulary_is_written_as_flan_t5_has_it(convert, tmp_path):
    """All 32,128 rows of a pretrained model are kept: nothing says which of them are tokens."""
    config = dataclasses.replace(SMALL, vocab_size=32128)
    params = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), t5.abstract_params(config))
    write_folder(tmp_path / "first", state_dict(params, config), SMALL_JSON | {"vocab_size": 32128})
    pieces = shared("data/t5_vocabulary/spiece.model")
    convert(tmp_path / "first", tmp_path / "second", "huggingface", "--vocabulary", str(pieces))
    assert json.loads((tmp_path / "second" / "config.json").read_text())["vocab_size"] == 32128
    ours, published = (
        transformers.AutoTokenizer.from_pretrained(folder) for folder in (tmp_path / "second", pieces.parent)
    )
    assert len(ours) == 32100
    texts = ["Red kettle, 2 l (new!)", "a <extra_id_0> b <extra_id_99>", "Crème  brûlée"]
    assert [ours(text).input_ids for text in texts] == [published(text).input_ids for text in texts]


# What goes wrong.


def test_an_output_is_not_overwritten_unasked(folder, convert, tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "precious.txt").write_text("mine")
    assert "is there already" in convert(folder, tmp_path / "notes", "huggingface", status=2)
    assert "holds no checkpoint" in convert(folder, tmp_path / "notes", "huggingface", "--overwrite", status=2)
    assert "holds the input" in convert(folder, folder, "huggingface", "--overwrite", status=2)
    assert "holds the input" in convert(folder, tmp_path, "recalign", "--overwrite", status=2)
    convert(folder, tmp_path / "second", "recalign")
    convert(folder, tmp_path / "second", "huggingface", "--overwrite")
    assert (tmp_path / "second" / "model.safetensors").is_file()
    assert not (tmp_path / "second" / "checkpoints").exists()
    assert (tmp_path / "notes" / "precious.txt").read_text() == "mine"


@pytest.mark.parametrize("beside", ["thesis.txt", "checkpoints/notes.txt"])
def test_a_folder_that_only_looks_like_a_checkpoint_is_not_overwritten(folder, convert, tmp_path, beside):
    path = tmp_path / "app" / beside
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    (tmp_path / "app" / "config.json").write_text('{"name": "a web app"}')
    assert "holds no checkpoint" in convert(folder, tmp_path / "app", "recalign", "--overwrite", status=2)
    convert(folder, tmp_path / "second", "huggingface")
    (tmp_path / "second" / "thesis.txt").write_text("mine")
    assert "or other files beside it" in convert(folder, tmp_path / "second", "recalign", "--overwrite", status=2)
    assert {path.read_text(), (tmp_path / "second" / "thesis.txt").read_text()} == {"mine"}


@pytest.mark.parametrize("converted", [False, True])
@pytest.mark.parametrize("to", ["huggingface", "recalign"])
def test_an_own_checkpoint_with_altered_numbers_is_not_converted(folder, params, convert, tmp_path, to, converted):
    """A whole file of another checkpoint, which its own checksums don't tell from the right one."""
    changed = jax.tree.map(np.copy, params)
    changed["encoder"]["encoder_norm"]["scale"][3] += 0.5
    for name, values in (("run", params), ("other", changed)):
        if converted:
            write_folder(tmp_path / f"{name}_hf", state_dict(values, SMALL))
            convert(tmp_path / f"{name}_hf", tmp_path / name, "recalign")
        else:
            metadata = {"identity": {}, "model": dataclasses.asdict(SMALL), "positions": []}
            with training.open_checkpoints(str(tmp_path / name)) as checkpoints:
                training.save(checkpoints, 1, values, {"count": np.int32(3)}, metadata)
    shutil.rmtree(tmp_path / "run/checkpoints/1/params")
    shutil.copytree(tmp_path / "other/checkpoints/1/params", tmp_path / "run/checkpoints/1/params")
    message = convert(tmp_path / "run", tmp_path / "out", to, status=2)
    assert "encoder/encoder_norm/scale is not what was saved" in message
    assert not (tmp_path / "out").exists()


def test_a_run_is_not_overwritten(folder, params, convert, tmp_path):
    with training.open_checkpoints(str(tmp_path / "run")) as checkpoints:
        training.save(checkpoints, 3, params, {"count": np.int32(3)}, {"identity": {}, "positions": []})
    says = convert(folder, tmp_path / "run", "recalign", "--overwrite", status=2)
    assert "holds a training run" in says
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "3" / "optimizer")
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    assert "holds a training run" in convert(folder, tmp_path / "run", "huggingface", "--overwrite", status=2)
    assert locations.steps(str(tmp_path / "run")) == [3]


def test_the_base_of_adapters_is_not_overwritten(folder, params, convert, tmp_path):
    _, told = load_base(str(folder), SMALL, 0, shapes_of(SMALL))
    options = LoraOptions(rank=2, targets=("query",))
    adapters = lora.init_adapters(params, options, jax.random.key(1))
    metadata = {"identity": {"base": told, "lora": dataclasses.asdict(options)}, "model": dataclasses.asdict(SMALL)}
    with training.open_checkpoints(str(tmp_path / "run")) as checkpoints:
        training.save(checkpoints, 3, adapters, {"count": np.int32(3)}, metadata | {"positions": []})
    before = (folder / "model.safetensors").read_bytes()
    message = convert(tmp_path / "run", folder, "huggingface", "--overwrite", status=2)
    assert f"holds {folder}, which the input has adapters of" in message
    assert (folder / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("to", ["huggingface", "recalign"])
def test_a_failure_half_way_leaves_what_was_there(folder, convert, tmp_path, to, monkeypatch):
    convert(folder, tmp_path / "second", "huggingface")
    before = {path.name: path.read_bytes() for path in (tmp_path / "second").iterdir()}
    read = huggingface.read_arrays

    def broken(folder):
        def fail(index):
            raise OSError("the disk is gone")

        arrays = read(folder)
        array = arrays["decoder.block.1.layer.2.DenseReluDense.wo.weight"]
        arrays["decoder.block.1.layer.2.DenseReluDense.wo.weight"] = dataclasses.replace(array, read=fail)
        return arrays

    monkeypatch.setattr(huggingface, "read_arrays", broken)
    assert "the disk is gone" in convert(folder, tmp_path / "second", to, "--overwrite", status=1)
    assert {path.name: path.read_bytes() for path in (tmp_path / "second").iterdir()} == before
    assert {path.name for path in tmp_path.iterdir()} == {"first", "second"}


def test_what_can_not_be_converted_is_named(folder, params, convert, tmp_path):
    arrays = state_dict(params, SMALL)
    del arrays["decoder.block.2.layer.1.EncDecAttention.o.weight"]
    write_folder(tmp_path / "less", arrays)
    message = convert(tmp_path / "less", tmp_path / "own", "recalign", status=2)
    assert "no parameter 'decoder.block.2.layer.1.EncDecAttention.o.weight'" in message
    assert not (tmp_path / "own").exists()
    assert "our own checkpoints are float32" in convert(
        folder, tmp_path / "own", "recalign", "--dtype", "bfloat16", status=2
    )
    assert "must be above 0" in convert(folder, tmp_path / "x", "huggingface", "--max_shard_size", "0", status=2)
    silu = T5Config(**dataclasses.asdict(SMALL) | {"mlp_activations": ("silu", "linear")})
    with training.open_checkpoints(str(tmp_path / "silu")) as checkpoints:
        metadata = {"identity": {}, "model": dataclasses.asdict(silu), "positions": []}
        training.save(checkpoints, 3, params, {"count": np.int32(3)}, metadata)
    assert "transformers has no such T5.1.1" in convert(tmp_path / "silu", tmp_path / "x", "huggingface", status=2)


# The hub.


@pytest.fixture
def cache(folder, tmp_path, monkeypatch):
    """A cache as huggingface_hub lays it out, with one model; no network."""
    import huggingface_hub.constants

    snapshot = tmp_path / "cache" / "models--someone--tiny-t5" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    for file in folder.iterdir():
        shutil.copyfile(file, snapshot / file.name)
    refs = snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text("0" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return snapshot


def test_a_hub_name_is_read_from_the_cache(cache, folder, convert, tmp_path):
    result = convert("someone/tiny-t5", tmp_path / "second", "huggingface")
    assert result["input_format"] == "huggingface"
    first, second = stored(folder), stored(tmp_path / "second")
    assert all(second[name].tobytes() == array.tobytes() for name, array in first.items())


def test_a_hub_model_without_safetensors_says_what_to_do(cache, convert, tmp_path):
    (cache / "model.safetensors").unlink()
    message = convert("someone/tiny-t5", tmp_path / "second", "huggingface", status=2)
    assert "someone/tiny-t5: the hub has no safetensors of it." in message
    assert "from_pretrained('someone/tiny-t5').save_pretrained('tiny-t5-safetensors')" in message
    assert str(cache) not in message


def test_a_folder_of_that_name_goes_before_the_hub(cache, convert, tmp_path):
    (tmp_path / "someone" / "tiny-t5").mkdir(parents=True)
    assert "No checkpoint at" in convert("someone/tiny-t5", tmp_path / "second", "huggingface", status=2)


def test_without_a_network_a_hub_name_says_what_to_do(cache, convert, tmp_path):
    message = convert("google/flan-t5-nonexistent", tmp_path / "second", "huggingface", status=2)
    assert "can't be had from the Hugging Face hub" in message
    assert "hf download google/flan-t5-nonexistent" in message
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize("status", [429, 503])
def test_a_hub_that_is_too_busy_is_no_bad_input(monkeypatch, status):
    """A scheduler may try again after status 1."""
    import huggingface_hub
    from huggingface_hub import errors

    def refuse(*_, **__):
        answer = types.SimpleNamespace(status_code=status, headers={}, request=None)
        raise errors.LocalEntryNotFoundError("nothing cached") from errors.HfHubHTTPError("busy", response=answer)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(RunError, match="doesn't give it now"):
        hub.download("google/flan-t5-base")

"""The bridge to T5X: its gin files, its module, and, where T5X is installed, T5X itself on our tasks."""

import dataclasses
import functools
import importlib
import inspect
import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter

import gin
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import seqio
from gin import config_parser

from recalign_jax import cli, gin_config
from recalign_jax.checkpoint import stacking, training
from recalign_jax.checkpoint import t5x as t5x_checkpoint
from recalign_jax.commands.common import model_config
from recalign_jax.errors import InputError
from recalign_jax.model import t5
from recalign_jax.model.config import T5Config
from recalign_jax.training import adafactor
from recalign_jax.training.step import StepOptions, loss_sums
from seqio_tasks import samples, specs, t5x_model, task_names

ROOT = pathlib.Path(__file__).parents[1]
FILES = sorted((ROOT / "gin_configs" / "t5x").glob("*.gin"))
MODULE = "seqio_tasks.t5x"
MIXTURE = "shop_retrieval_aligned_token"
LENGTHS = {"inputs": 160, "targets": 64}
OPTIONS = {"history_length": 4, "training_wordings": 1}  # with one wording, retrieval isn't random


class _AsText(config_parser.ParserDelegate):
    def configurable_reference(self, name, evaluate):
        return f"@{name}{'()' if evaluate else ''}"

    def macro(self, name):
        return f"%{name}"


def statements(file: pathlib.Path) -> list:
    """What a gin file says, without carrying it out."""
    return list(config_parser.ConfigParser(file.read_text(encoding="utf-8"), _AsText()))


def of_kind(file: pathlib.Path, kind: str) -> list:
    return [statement for statement in statements(file) if type(statement).__name__ == kind]


@pytest.fixture(scope="module")
def environment(shop_corpus, shop_words, tmp_path_factory):
    """RECALIGN_DATA_DIR with the shop alone, and RECALIGN_VOCABULARY."""
    data_dir = tmp_path_factory.mktemp("t5x_data")
    shutil.copytree(shop_corpus.directory, data_dir / "shop")
    return {"RECALIGN_DATA_DIR": str(data_dir), "RECALIGN_VOCABULARY": shop_words.path}


@pytest.fixture(scope="module")
def vocabulary(environment):
    """The mixture's vocabulary as a T5X model gets it: gin is parsed, then the module is imported."""
    for name, value in OPTIONS.items():
        gin.bind_parameter(f"TaskOptions.{name}", value)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        patch.delitem(sys.modules, MODULE, raising=False)
        yield t5x_model.vocabulary(MIXTURE, MODULE)
        sys.modules.pop(MODULE, None)
    gin.clear_config()


def packed_rows(name: str) -> list[dict[str, np.ndarray]]:
    """Twenty packed rows, as SeqIO makes them for T5X."""
    converter = seqio.EncDecFeatureConverter(pack=True)
    dataset = seqio.get_dataset(name, LENGTHS, dataset_split="train", shuffle=True, feature_converter=converter, seed=0)
    return list(dataset.take(20).as_numpy_iterator())


# ---------------------------------------------------------------- Without T5X


def test_the_module_registers_what_the_environment_names(vocabulary):
    registered = set(sys.modules[MODULE].NAMES)
    assert registered == set(task_names.names_for("shop", rated=True))
    assert registered <= {*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()}
    assert vocabulary == seqio.get_mixture_or_task(MIXTURE).output_features["inputs"].vocabulary


def test_options_that_gin_holds_are_in_force(vocabulary):
    options = dataclasses.replace(specs.TaskOptions(), **OPTIONS)
    for task in seqio.get_subtasks(seqio.get_mixture_or_task(MIXTURE)):
        assert task.source.spec.options == options


def test_without_a_vocabulary_the_module_says_so(environment, monkeypatch):
    monkeypatch.setenv("RECALIGN_DATA_DIR", environment["RECALIGN_DATA_DIR"])
    monkeypatch.delenv("RECALIGN_VOCABULARY", raising=False)
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    with pytest.raises(InputError, match="No vocabulary given"):
        importlib.import_module(MODULE)


def test_rows_are_those_of_our_own_model(vocabulary, shop_corpus, shop_words):
    assert vocabulary.vocab_size == shop_words.num_tokens + shop_corpus.num_items
    gin.parse_config("T5Config.emb_dim = 8")
    for base, tokens in ((MIXTURE, vocabulary.vocab_size), ("shop_mim", shop_words.num_tokens)):
        rows = t5x_model.vocab_size(base, MODULE)
        assert rows % 128 == 0
        assert tokens <= rows < tokens + 128
    gin.parse_config("T5Config.num_heads = 2\nT5Config.head_dim = 4\nT5Config.mlp_dim = 8")
    gin.parse_config("T5Config.num_encoder_layers = 1\nT5Config.num_decoder_layers = 1")
    assert t5x_model.vocab_size(MIXTURE, MODULE) == model_config(vocabulary.vocab_size).vocab_size


def test_packed_rows_hold_the_samples_of_the_task(vocabulary):
    spec = seqio.get_mixture_or_task("shop_retrieval_token").source.spec
    rendered = [samples.render(spec, "train", index) for index in range(samples.num_examples(spec, "train"))]
    left = Counter((tuple(sample.inputs.tolist()), tuple(sample.targets.tolist())) for sample in rendered)
    rows = packed_rows("shop_retrieval_token")
    for row in rows:
        assert row["encoder_input_tokens"].max() < vocabulary.vocab_size
        np.testing.assert_array_equal(row["decoder_loss_weights"], row["decoder_target_tokens"] > 0)
        for segment in range(1, row["decoder_segment_ids"].max() + 1):
            inputs = row["encoder_input_tokens"][row["encoder_segment_ids"] == segment]
            targets = row["decoder_target_tokens"][row["decoder_segment_ids"] == segment]
            left[tuple(inputs.tolist()), tuple(targets.tolist())] -= 1
    assert min(left.values()) == 0  # no sample twice, none that isn't the task's
    assert sum(row["decoder_segment_ids"].max() for row in rows) > 2 * len(rows)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_gin_files_name_what_there_is(file):
    aliases = {}
    for statement in of_kind(file, "ImportStatement"):
        if statement.module.split(".")[0] not in ("t5x", "__main__", "__gin__"):
            aliases[statement.bound_name()] = importlib.import_module(statement.module)
    for statement in of_kind(file, "IncludeStatement"):
        assert statement.filename.startswith("t5x/") or (ROOT / statement.filename).is_file()
    for statement in of_kind(file, "BindingStatement"):
        module, _, name = statement.selector.rpartition(".")
        if module in aliases:
            assert statement.arg_name in inspect.signature(getattr(aliases[module], name)).parameters


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_gin_files_begin_with_a_command_that_fits(file):
    header = re.match(r"(#.*\n)+", file.read_text(encoding="utf-8"))[0]
    assert "# Expect " in header
    command = shlex.split(re.search(r"python -m t5x\.(.*\\\n)*.*", header)[0].replace("\\\n#", ""))
    files = [argument.removeprefix("--gin_file=") for argument in command if argument.startswith("--gin_file=")]
    assert file.relative_to(ROOT).as_posix() in files
    ours = [ROOT / name for name in files if not name.startswith("t5x/")]
    macros = {s.selector for ours_file in ours for s in of_kind(ours_file, "BindingStatement") if not s.arg_name}
    required = {"MIXTURE_OR_TASK_NAME", "MODEL_DIR", "TRAIN_STEPS", "CHECKPOINT_PATH"}  # of T5X's own run files
    required |= {"EVAL_OUTPUT_DIR", "INFER_OUTPUT_DIR"}
    for argument in command:
        if argument.startswith("--gin."):
            assert argument.removeprefix("--gin.").partition("=")[0] in macros | required


def test_tiny_has_our_dimensions():
    gin_config.parse(["gin_configs/models/t5_tiny.gin"], [])
    ours = dataclasses.asdict(gin.get_configurable(T5Config)())
    bound = of_kind(ROOT / "gin_configs/t5x/t5_tiny.gin", "BindingStatement")
    theirs = {s.arg_name: s.value for s in bound if s.selector == "network.T5Config"}
    assert theirs.pop("dtype") == "float32"
    assert theirs
    assert theirs == {name: ours[name] for name in theirs}


# ---------------------------------------------------------------- With T5X


def _needs_t5x() -> None:
    pytest.importorskip("t5x", reason="T5X isn't installed, see docs/t5x.md", exc_type=ImportError)


@pytest.fixture(scope="module")
def t5x_network(vocabulary):
    """T5X's T5.1.1 over the mixture's vocabulary."""
    _needs_t5x()
    from t5x import adafactor, models
    from t5x.examples.t5 import network

    config = network.T5Config(
        vocab_size=t5x_model.vocab_size(MIXTURE, MODULE),
        dtype="float32",
        emb_dim=32,
        num_heads=2,
        head_dim=8,
        num_encoder_layers=2,
        num_decoder_layers=2,
        mlp_dim=48,
        mlp_activations=("gelu", "linear"),
        dropout_rate=0.0,
    )
    return models.EncoderDecoderModel(
        module=network.Transformer(config),
        input_vocabulary=vocabulary,
        output_vocabulary=vocabulary,
        optimizer_def=adafactor.Adafactor(),
        z_loss=1e-4,
    )


def test_loss_and_gradients_of_a_packed_batch_are_t5xs(t5x_network):
    batch = jax.tree.map(lambda *rows: np.stack(rows), *packed_rows(MIXTURE)[:8])
    shapes = {name: array.shape for name, array in batch.items()}
    params = t5x_network.get_initial_variables(jax.random.key(0), shapes)["params"]
    params = jax.tree.map(np.asarray, jax.tree.map(lambda leaf: getattr(leaf, "value", leaf), params))
    flat = {"/".join(str(key.key) for key in path): leaf for path, leaf in jax.tree.leaves_with_path(params)}
    config = T5Config(
        vocab_size=len(flat["token_embedder/embedding"]),
        emb_dim=32,
        num_heads=2,
        head_dim=8,
        num_encoder_layers=2,
        num_decoder_layers=2,
        mlp_dim=48,
        dropout_rate=0.0,
    )
    ours = t5x_checkpoint.load_params(flat, config, "T5X's parameters")
    rows = {name: jnp.asarray(array) for name, array in batch.items()}
    (expected, _), expected_gradients = jax.value_and_grad(t5x_network.loss_fn, has_aux=True)(params, rows, None)

    rows["decoder_task_ids"] = jnp.zeros_like(rows["decoder_target_tokens"])

    def loss(params):
        return loss_sums(t5.graph(config), params, rows, StepOptions(1e-4), 1, None)[0]

    found, gradients = jax.value_and_grad(loss)(ours)
    weight = batch["decoder_loss_weights"].sum()
    assert abs(float(found - expected)) / weight < 1e-4
    flat_gradients = {
        "/".join(str(key.key) for key in path): np.asarray(leaf)
        for path, leaf in jax.tree.leaves_with_path(expected_gradients)
    }
    expected_gradients = t5x_checkpoint.load_params(flat_gradients, config, "T5X's gradients")
    for path, gradient in jax.tree.leaves_with_path(gradients):
        theirs = expected_gradients
        for key in path:
            theirs = theirs[key.key]
        np.testing.assert_allclose(gradient / weight, theirs / weight, rtol=0, atol=1e-4, err_msg=str(path))


@pytest.fixture(params=[True, False], ids=["orbax", "legacy"])
def t5x_program(request, environment):
    """Runs a program of T5X as docs/t5x.md says."""
    _needs_t5x()

    def run(program: str, **macros: object) -> None:
        macros = {"TASK_FEATURE_LENGTHS": LENGTHS, "USE_ORBAX": request.param, "BATCH_SIZE": 8, **macros}
        files = ["t5_tiny", {"train": "finetune"}.get(program, program)]
        command = [
            sys.executable,
            "-m",
            f"t5x.{program}",
            *(f"--gin_file=gin_configs/t5x/{name}.gin" for name in files),
        ]
        command += [f"--gin.{name}={value!r}" for name, value in macros.items()]
        done = subprocess.run(
            command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]

    return run


def test_t5x_trains_evaluates_and_infers(t5x_program, vocabulary, tmp_path):
    """The commands of docs/t5x.md on the shop, and the checkpoint read here."""
    run = t5x_program
    run(
        "train",
        MIXTURE_OR_TASK_NAME=MIXTURE,
        MODEL_DIR=str(tmp_path / "run"),
        TRAIN_STEPS=2,
        EVAL_PERIOD=2,
        EVAL_STEPS=1,
        CHECKPOINT_PERIOD=2,
        EVALUATOR_NUM_EXAMPLES=4,
    )
    checkpoint = tmp_path / "run" / "checkpoint_2"
    run(
        "eval",
        MIXTURE_OR_TASK_NAME="shop_retrieval_token",
        SPLIT="validation",
        NUM_EXAMPLES=8,
        CHECKPOINT_PATH=str(checkpoint),
        EVAL_OUTPUT_DIR=str(tmp_path / "eval"),
    )
    metrics = (tmp_path / "eval/inference_eval/shop_retrieval_token-metrics.jsonl").read_text()
    assert {"step", "recall@1", "in_catalogue"} <= json.loads(metrics).keys()
    run(
        "infer",
        MIXTURE_OR_TASK_NAME="shop_retrieval_token",
        CHECKPOINT_PATH=str(checkpoint),
        INFER_OUTPUT_DIR=str(tmp_path / "infer"),
    )
    [predictions] = (tmp_path / "infer").glob("*predict.jsonl-00000-of-00001")
    lines = [json.loads(line) for line in predictions.read_text().splitlines()]
    task = seqio.get_mixture_or_task("shop_retrieval_token")
    assert len(lines) == task.num_input_examples("test")
    for line, row in zip(lines, task.get_dataset(LENGTHS, "test", shuffle=False).as_numpy_iterator(), strict=True):
        assert [token for token in line["inputs"]["targets"] if token] == row["targets"].tolist()
        assert all(0 <= token < t5x_model.vocab_size(MIXTURE, MODULE) for token in line["prediction_tokens"])

    gin_config.parse(["gin_configs/models/t5_tiny.gin"], [])
    config = dataclasses.replace(model_config(vocabulary.vocab_size), num_tokens=None)
    params = t5x_checkpoint.load_params(t5x_checkpoint.read_arrays(checkpoint), config, str(checkpoint))
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, t5.abstract_params(config))


def test_t5x_goes_on_from_our_checkpoint(t5x_program, environment, tmp_path):
    command = ["train", "--gin_file=gin_configs/models/t5_tiny.gin", "--gin_file=gin_configs/runs/finetune.gin"]
    macros = {"MODEL_DIR": tmp_path / "ours", "VOCABULARY": environment["RECALIGN_VOCABULARY"], "TRAIN_STEPS": 2}
    macros |= {"MIXTURE_OR_TASK_NAME": MIXTURE, "BATCH_SIZE": 8, "TASK_FEATURE_LENGTHS": LENGTHS}
    command += ["--data_dir", environment["RECALIGN_DATA_DIR"]]
    assert cli.main([*command, *(f"--gin.{name}={value}" for name, value in macros.items())]) == 0
    assert cli.main(["convert", "--input", f"{tmp_path}/ours", "--output", f"{tmp_path}/out", "--to", "t5x"]) == 0
    checkpoint = str(tmp_path / "out" / "checkpoint_2")
    t5x_program(
        "eval",
        MIXTURE_OR_TASK_NAME="shop_retrieval_token",
        SPLIT="validation",
        NUM_EXAMPLES=8,
        CHECKPOINT_PATH=checkpoint,
        EVAL_OUTPUT_DIR=str(tmp_path / "eval"),
    )
    metrics = (tmp_path / "eval/inference_eval/shop_retrieval_token-metrics.jsonl").read_text()
    assert json.loads(metrics)["step"] == 2
    t5x_program(
        "train",
        MIXTURE_OR_TASK_NAME=MIXTURE,
        MODEL_DIR=str(tmp_path / "theirs"),
        INITIAL_CHECKPOINT_PATH=checkpoint,
        TRAIN_STEPS=4,
        EVAL_PERIOD=2,
        EVAL_STEPS=1,
        CHECKPOINT_PERIOD=2,
        EVALUATOR_NUM_EXAMPLES=4,
    )
    assert (tmp_path / "theirs" / "checkpoint_4").is_dir()


@pytest.mark.parametrize("beta1", [None, 0.9])
def test_t5x_goes_on_with_the_state_of_our_adafactor(beta1, tmp_path):
    """Its third update is ours."""
    _needs_t5x()
    from t5x import adafactor as t5x_adafactor
    from t5x import checkpoints

    config = T5Config(
        vocab_size=64, emb_dim=24, num_heads=2, head_dim=8, num_encoder_layers=2, num_decoder_layers=3, mlp_dim=32
    )
    random = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: random.standard_normal(leaf.shape, np.float32), t5.abstract_params(config))
    gradients = [jax.tree.map(lambda leaf: random.standard_normal(leaf.shape, np.float32), params) for _ in range(3)]
    optimizer = adafactor.adafactor(1e-2, beta1=beta1, min_dim_size_to_factor=16)

    def update(params, state, gradient):
        updates, state = jax.jit(optimizer.update)(gradient, state, params)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for gradient in gradients[:2]:
        params, state = update(params, state, gradient)
    metadata = {"identity": {}, "model": dataclasses.asdict(config), "positions": []}
    with training.open_checkpoints(str(tmp_path / "run")) as saving:
        training.save(saving, 2, params, state, metadata)
    assert cli.main(["convert", "--input", f"{tmp_path}/run", "--output", f"{tmp_path}/out", "--to", "t5x"]) == 0

    def as_t5x(params):
        split = stacking.split(stacking.flatten(jax.tree.map(np.asarray, params)), t5x_checkpoint.sources(config))
        return stacking.unflatten({name: np.asarray(array) for name, array in split})

    theirs = t5x_adafactor.Adafactor(1e-2, beta1=beta1, min_dim_size_to_factor=16).create(as_t5x(params))
    theirs = theirs.restore_state(checkpoints.load_t5x_checkpoint(str(tmp_path / "out" / "checkpoint_2")))
    assert theirs.state.step == 2
    theirs = theirs.apply_gradient(jax.tree.map(jnp.asarray, as_t5x(gradients[2])))
    expected = as_t5x(update(params, state, gradients[2])[0])
    for path, leaf in jax.tree.leaves_with_path(expected):
        there = functools.reduce(lambda node, key: node[key.key], path, theirs.target)
        np.testing.assert_allclose(there, leaf, rtol=1e-5, atol=1e-6, err_msg=str(path))

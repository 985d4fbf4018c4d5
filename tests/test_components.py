"""Tasks that are SeqIO's own: the example in docs/add_a_task.md, as it stands there, trains and resumes."""

import json
import pathlib
import re
import shutil
import sys

import numpy as np
import pytest
import seqio
import tensorflow as tf

from recalign_jax import cli
from recalign_jax.commands import train
from recalign_jax.errors import InputError
from recalign_jax.training import input_pipeline
from recalign_jax.training.input_pipeline import InputOptions
from seqio_tasks import components
from seqio_tasks.components import CorpusTask, SeqioTask, registered
from seqio_tasks.writing import Limits

pytestmark = pytest.mark.usefixtures("fast_compilation")
ROOT = pathlib.Path(__file__).resolve().parents[1]
LENGTHS = {"inputs": 128, "targets": 48}


@pytest.fixture(scope="module")
def example(shop_corpus, shop_words, tmp_path_factory):
    """Trains four steps on the documented module, over the shop instead of MovieLens: (data folder, run)."""
    folder = tmp_path_factory.mktemp("add_a_task")
    text = (ROOT / "docs/add_a_task.md").read_text(encoding="utf-8")
    [module] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (folder / "my_tasks.py").write_text(module.replace('CORPUS = "movielens"', 'CORPUS = "shop"'))
    [command] = re.findall(r"```bash\nrecalign (.*?)```", text, re.DOTALL)
    data = folder / "data"
    shutil.copytree(shop_corpus.directory, data / "shop")
    places = {"movielens": "shop", "PATH": shop_words.path, "DIR": str(folder / "run")}
    arguments = re.sub(r"movielens|PATH|DIR", lambda m: places.get(m[0], m[0]), command.replace("MODEL_DIR", "MODEL@"))
    arguments = arguments.replace("MODEL@", "MODEL_DIR").replace("\\\n", " ").split()
    arguments[0:1] = ["train", "--data_dir", str(data)]
    arguments += ["--gin.BATCH_SIZE=16", "--gin.LOG_PERIOD=1", "--gin.EVAL_PERIOD=4", "--gin.CHECKPOINT_PERIOD=2"]
    lengths = str(LENGTHS).replace(" ", "")
    arguments += [f"--gin.TASK_FEATURE_LENGTHS={lengths}", "--gin.train.evaluate_recommendations=False"]
    arguments += ["--gin.InputOptions.window=64", "--gin.InputOptions.data_shards=2"]
    sys.path.insert(0, str(folder))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RECALIGN_DATA_DIR", "")
        patch.setenv("RECALIGN_VOCABULARY", "")
        assert cli.main([*arguments, "--gin.TRAIN_STEPS=2"]) == 0
        assert cli.main([*arguments, "--gin.TRAIN_STEPS=4"]) == 0  # goes on
        yield folder / "run"
    sys.path.remove(str(folder))


def test_the_documented_example_trains_and_resumes(example):
    records = [json.loads(line) for line in (example / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert any(np.isfinite(record.get("loss/shop_order", np.nan)) for record in records)
    assert np.isfinite(records[-1]["validation_loss/shop_order"])


def test_its_samples_are_those_of_seqio_by_index_and_differ_between_epochs(example):
    found = {task.name: (task, rate) for task, rate in registered("shop_retrieval_and_order", LENGTHS)}
    assert {name: type(task) for name, (task, _) in found.items()} == {
        "shop_retrieval": CorpusTask,
        "shop_order": SeqioTask,
    }
    task, _ = found["shop_order"]
    counts = {name: task.num_examples("train") for name, (task, _) in found.items()}
    assert counts["shop_order"] == sum(n >= 4 for n in found["shop_retrieval"][0].spec.corpus.lengths)
    limits = Limits(**LENGTHS)
    first = [task.render("train", index, 0, 7, limits) for index in range(counts["shop_order"])]
    second = [task.render("train", index, 1, 7, limits) for index in range(counts["shop_order"])]
    again = [task.render("train", index, 0, 7, limits) for index in range(counts["shop_order"])]
    words = found["shop_retrieval"][0].spec.vocabulary
    for one, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(one.inputs, other.inputs)
    changed = 0
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one.targets, other.targets)
        changed += one.inputs.tolist() != other.inputs.tolist()
        assert words.decode(one.targets[:-1]) in words.decode(one.inputs)
        assert one.inputs[-1] == one.targets[-1] == 1
    assert 0 < changed < len(first)


def test_its_examples_are_counted_once(example, monkeypatch):
    """Whatever epochs are kept: at the end of one, three would be asked for in turn."""
    monkeypatch.setattr(components, "_KEPT_ROWS", 0)
    task = {task.name: task for task, _ in registered("shop_retrieval_and_order", LENGTHS)}["shop_order"]
    ran = []
    monkeypatch.setattr(task, "_run", lambda split, seed, run=task._run: (ran.append(seed), run(split, seed))[1])
    for epoch in (3, 4, 3, 4):
        assert task.num_examples("train")
        task.render("train", 0, epoch, 7, Limits(**LENGTHS))
    assert len(ran) == 3


def test_tensorflow_is_kept_off_the_devices_before_a_module_is_imported(tmp_path, monkeypatch):
    imported = []
    monkeypatch.setattr(train.importlib, "import_module", imported.append)
    for name in ("RECALIGN_DATA_DIR", "RECALIGN_VOCABULARY"):
        monkeypatch.setenv(name, "")
    train.import_tasks("my_tasks", "words.model", str(tmp_path))
    assert imported == ["seqio_tasks.tasks", "my_tasks"]


def test_workers_are_refused(example):
    options = InputOptions(LENGTHS, batch_size=4, workers=1)
    stream = input_pipeline.make_stream(registered("shop_order", LENGTHS), "train", 0, options)
    with pytest.raises(InputError, match="can't be read by worker processes"):
        next(input_pipeline.PackedBatches(stream, input_pipeline.start_positions(options)))


def test_a_task_whose_features_are_no_tokens_is_an_input_error():
    seqio.TaskRegistry.remove("floats")
    seqio.TaskRegistry.add(
        "floats",
        source=seqio.FunctionDataSource(
            lambda split, shuffle_files, seed=None: tf.data.Dataset.from_tensors({"inputs": [0.5], "targets": [0.5]}),
            splits=["train"],
            num_input_examples={"train": 1},
        ),
        output_features={
            name: seqio.Feature(seqio.PassThroughVocabulary(9), add_eos=False, dtype=tf.float32)
            for name in ("inputs", "targets")
        },
    )
    [(task, _)] = registered("floats", LENGTHS)
    with pytest.raises(InputError, match="'floats': inputs must be token ids"):
        task.num_examples("train")
    assert task.num_examples("validation") == 0


@pytest.mark.parametrize(
    ("module", "text", "message"),
    [
        ("no_such_module", None, "'no_such_module' can't be imported"),
        ("module_cut_off", "x = 1\ndef task(:\n", "module_cut_off.py, line 2: "),
        ("module_of_other_times", "from seqio_tasks import gone\n", "cannot import name 'gone'"),
    ],
)
def test_a_module_that_cannot_be_imported_is_an_input_error(
    shop_words, data_dir, tmp_path, capsys, module, text, message
):
    if text:
        (tmp_path / f"{module}.py").write_text(text)
    arguments = ("--gin_file", "gin_configs/models/t5_tiny.gin", "--gin_file", "gin_configs/runs/finetune.gin")
    where = (f"--gin.VOCABULARY={shop_words.path}", f"--gin.MODEL_DIR={tmp_path / 'run'}")
    task = (f"--gin.MIXTURE_OR_TASK_MODULE={module}", "--gin.MIXTURE_OR_TASK_NAME=x")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RECALIGN_DATA_DIR", "")
        patch.setenv("RECALIGN_VOCABULARY", "")
        patch.syspath_prepend(tmp_path)
        assert cli.main(["train", "--data_dir", str(data_dir), *arguments, *where, *task]) == 2
    assert message in capsys.readouterr().err.replace("\n", "")

"""The train loop in one process: best checkpoint, early stopping, signals, crashes, and steps that go wrong."""

import contextlib
import dataclasses
import itertools
import json
import os
import signal
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from recalign_jax import partitioning
from recalign_jax.checkpoint import locations, saved
from recalign_jax.errors import InputError, Preempted, RunError
from recalign_jax.model.config import T5Config
from recalign_jax.training import input_pipeline, log, preemption
from recalign_jax.training.input_pipeline import InputOptions
from recalign_jax.training.memory import Job
from recalign_jax.training.optimizer import make_optimizer
from recalign_jax.training.step import StepOptions
from recalign_jax.training.train import TrainOptions, train
from seqio_tasks import specs
from seqio_tasks.components import CorpusTask

pytestmark = pytest.mark.usefixtures("fast_compilation")
ROWS = InputOptions(task_feature_lengths={"inputs": 64, "targets": 16}, batch_size=8, window=64, data_shards=2)
METRIC = "validation_recall@10"


@pytest.fixture
def run(shop_corpus, shop_words, tmp_path):
    """Trains with options as keywords, beside `evaluators`, `learning_rate`, `identity`, `mesh` and `schedule`."""
    spec = specs.make_spec(shop_corpus, "retrieval", "token", shop_words, specs.TaskOptions())
    components = [(CorpusTask(spec), 1.0)]
    config = T5Config(
        emb_dim=16, num_heads=2, head_dim=8, num_encoder_layers=1, num_decoder_layers=1, mlp_dim=16,
        vocab_size=384, num_tokens=spec.num_tokens, dropout_rate=0.1, activation_dtype="float32",
    )  # fmt: skip

    def run(name, evaluators=(), learning_rate=1e-3, identity=None, mesh=None, schedule=None, **options):
        values = {"train_steps": 8, "log_period": 1, "checkpoint_period": 100, **options}
        mesh = partitioning.make_mesh({}, jax.devices()[:1]) if mesh is None else mesh
        job = Job(config, make_optimizer("adamw", learning_rate), mesh, StepOptions(), ROWS)
        options = TrainOptions(model_dir=str(tmp_path / name), **values)
        with preemption.handled() as told:
            return train(options, job, components, evaluators, identity or {}, told, schedule=schedule)

    run.stream = input_pipeline.make_stream(components, "train", 0, ROWS)
    return run


def scripted(values):
    """An evaluator that yields one value a call; an exception is raised instead, a signal sent before."""
    left = iter(values)

    def evaluator(params):
        del params
        value = next(left)
        if isinstance(value, signal.Signals):
            os.kill(os.getpid(), value)
        elif isinstance(value, Exception):
            raise value
        else:
            yield METRIC, value

    return evaluator


def state(model_dir, step):
    metadata = saved.read_metadata(locations.folder_of(str(model_dir), step))
    return metadata["fingerprints"], metadata["positions"]


def curve(model_dir):
    return [(record["step"], record["loss"], record.get(METRIC)) for record in log.read(str(model_dir))]


def test_the_best_checkpoint_stays_and_the_run_ends_early(run, tmp_path):
    options = {"eval_period": 1, "keep_checkpoints": 1, "best_metric": METRIC, "early_stopping": 3}
    result = run("best", [scripted([0.1, 0.5, 0.3, 0.5, 0.2])], **options)
    assert result["step"] == 5
    assert result["best"] == {"step": 2, "metric": METRIC, "value": 0.5}
    assert locations.steps(str(tmp_path / "best")) == [5, 2]
    assert locations.locate(str(tmp_path / "best" / "best")) == (str(tmp_path / "best"), 2)
    # Started again it neither trains nor evaluates, and leaves all files as they are.
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "best").rglob("*")}
    assert run("best", [scripted([])], **options)["step"] == 5
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "best").rglob("*")} == files


def test_lower_is_better_for_a_loss(run, tmp_path):
    result = run("loss", eval_period=2, best_metric="validation_loss")
    values = {record["step"]: record["validation_loss"] for record in log.read(str(tmp_path / "loss")) if
              "validation_loss" in record}  # fmt: skip
    assert set(values) == {2, 4, 6, 8}
    assert result["best"]["value"] == min(values.values())
    assert values[result["best"]["step"]] == result["best"]["value"]


def test_a_metric_that_is_not_evaluated_is_named(run):
    with pytest.raises(RunError, match=f"Did you mean '{METRIC}'"):
        run("typo", [scripted([0.1])], eval_period=1, best_metric="validation_recal@10")
    with pytest.raises(InputError, match="EVAL_PERIOD"):
        run("never", best_metric=METRIC)
    with pytest.raises(InputError, match=r"BEST_METRIC is 'loss': .* as validation_loss"):
        run("never", eval_period=1, best_metric="loss")  # which every record has, of evaluations or not
    with pytest.raises(InputError, match="needs BEST_METRIC"):
        run("never", eval_period=1, early_stopping=2)


def test_a_metric_that_was_misspelt_is_mended_by_the_same_command(run, tmp_path):
    options = {"train_steps": 2, "eval_period": 2}
    with pytest.raises(RunError):
        run("typo", [scripted([0.1])], best_metric="validation_recal@10", **options)
    assert run("typo", [scripted([0.1])], best_metric=METRIC, **options)["best"]["step"] == 2


def test_the_best_of_a_metric_that_is_new_to_a_run_has_a_checkpoint(run, tmp_path):
    options = {"eval_period": 2, "keep_checkpoints": 1}
    run("new", [scripted([0.9, 0.1])], train_steps=4, **options)
    result = run("new", [scripted([0.3, 0.2])], train_steps=8, best_metric=METRIC, **options)
    assert result["best"]["step"] == 6  # that of step 2 is gone
    assert locations.steps(str(tmp_path / "new")) == [8, 6]


@pytest.mark.parametrize("interruption", [RuntimeError("crash"), signal.SIGTERM])
def test_an_evaluation_that_was_cut_off_is_done_again(run, tmp_path, interruption):
    options = {"eval_period": 2, "best_metric": METRIC, "early_stopping": 2}
    run("calm", [scripted([0.3, 0.2, 0.4, 0.1])], **options)
    with pytest.raises(Preempted if interruption is signal.SIGTERM else RuntimeError):
        run("cut", [scripted([0.3, interruption])], **options)
    assert locations.steps(str(tmp_path / "cut"))[0] == 4
    run("cut", [scripted([0.2, 0.4, 0.1])], **options)
    assert curve(tmp_path / "cut") == curve(tmp_path / "calm")
    assert state(tmp_path / "cut", 8) == state(tmp_path / "calm", 8)
    assert locations.read_best(str(tmp_path / "cut")) == locations.read_best(str(tmp_path / "calm"))


def test_sigterm_in_a_step_saves_that_step(run, tmp_path):
    run("calm")

    def schedule(step):
        """Is called after every logged step."""
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return 0.0

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Preempted, match="saved step 6") as error:
        run("told", schedule=schedule)
    assert error.value.exit_status == 75
    assert signal.getsignal(signal.SIGTERM) is before
    assert locations.steps(str(tmp_path / "told")) == [6]
    run("told")
    assert state(tmp_path / "told", 8) == state(tmp_path / "calm", 8)
    assert curve(tmp_path / "told") == curve(tmp_path / "calm")


class Dying:
    """Is told to leave while it is finalized, where nothing can be raised."""

    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)


def test_sigterm_where_nothing_can_be_raised_is_raised_again(capsys):
    before, hook = signal.getsignal(signal.SIGALRM), sys.unraisablehook

    def die_and_wait():
        Dying()
        time.sleep(10)

    with preemption.handled(), pytest.raises(Preempted):
        die_and_wait()
    assert (signal.getsignal(signal.SIGALRM), sys.unraisablehook) == (before, hook)
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    assert "Traceback" not in capsys.readouterr().err


def test_sigterm_that_something_caught_is_raised_before_the_loop():
    with preemption.handled() as told:
        with contextlib.suppress(Exception):  # as a library may
            os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Preempted), told.postponed():
            pytest.fail("The loop begins.")


def test_a_damaged_checkpoint_is_named_and_an_older_one_used(run, tmp_path, capsys):
    run("calm", train_steps=6, checkpoint_period=2)
    run("hurt", train_steps=4, checkpoint_period=2)
    newest = locations.folder_of(str(tmp_path / "hurt"), 4)
    for path in (newest / "params").rglob("d/*"):
        path.write_bytes(path.read_bytes()[:-50])
    run("hurt", train_steps=6, checkpoint_period=2)
    told = capsys.readouterr()
    assert f"{newest} is damaged" in told.err
    assert "at step 2" in told.out
    assert (tmp_path / "hurt" / "damaged_checkpoints" / "4").is_dir()
    assert state(tmp_path / "hurt", 6) == state(tmp_path / "calm", 6)


def test_too_little_memory_for_a_checkpoint_is_no_damage(run, tmp_path, monkeypatch):
    run("memory", train_steps=4)

    def restore(self, *arguments, **options):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 123 bytes.")

    monkeypatch.setattr(ocp.StandardCheckpointHandler, "restore", restore)
    with pytest.raises(RunError, match=r"Out of memory: RESOURCE_EXHAUSTED(?s:.)*A step of these settings needs"):
        run("memory")
    assert locations.steps(str(tmp_path / "memory")) == [4]
    assert not (tmp_path / "memory" / "damaged_checkpoints").exists()


def test_another_configuration_goes_on_only_when_told(run, capsys):
    run("changed", identity={"LEARNING_RATE": "0.001"}, train_steps=2)
    with pytest.raises(InputError, match=r"LEARNING_RATE: 0\.001 then, 0\.5 now"):
        run("changed", identity={"LEARNING_RATE": "0.5"}, train_steps=4)
    assert run("changed", identity={"LEARNING_RATE": "0.5"}, train_steps=4, resume_changed=True)["step"] == 4
    assert "0.001 then, 0.5 now" in capsys.readouterr().err


@pytest.mark.parametrize("log_period", [1, 4])
def test_a_step_that_is_not_finite_stops_and_its_batch_is_kept(run, tmp_path, log_period):
    # The second step's parameters are beyond float32, so the third step goes wrong.
    def rate(step):
        return jax.numpy.where(step < 1, 1e-3, 1e38)

    with pytest.raises(RunError, match=f"not finite in steps 3 to {3 if log_period == 1 else 4}") as error:
        run("wild", learning_rate=rate, log_period=log_period, checkpoint_period=1 if log_period == 1 else 100)
    kept = np.load(tmp_path / "wild" / "not_finite" / "step_3.npz", allow_pickle=False)
    batches = input_pipeline.PackedBatches(run.stream, input_pipeline.start_positions(ROWS))
    expected, _ = next(itertools.islice(batches, 2, None))
    assert set(kept) == set(expected)
    for name, values in expected.items():
        np.testing.assert_array_equal(kept[name], values)
    assert "step_3.npz" in error.value.message
    assert locations.steps(str(tmp_path / "wild")) == ([2, 1] if log_period == 1 else [])


def test_a_trace_is_written(run, tmp_path):
    run("traced", profile=(2, 2))
    assert list((tmp_path / "traced" / "profile").rglob("*.xplane.pb"))
    with pytest.raises(InputError, match="PROFILE"):
        run("traced", profile=(0, 2))


def test_what_is_logged(run, tmp_path):
    run("logged", schedule=lambda step: 0.5 * step)
    records = [json.loads(line) for line in (tmp_path / "logged" / "metrics.jsonl").read_text().splitlines()]
    assert [record["learning_rate"] for record in records] == [0.5 * step for step in range(8)]
    # The first step's time is the compiler's.
    assert "tokens_per_second" not in records[0]
    assert all(0 <= record["input_wait_share"] <= 1 for record in records[1:])


@pytest.mark.devices8
def test_a_run_goes_on_over_other_devices(run, tmp_path):
    one, parts = (
        partitioning.make_mesh({}, jax.devices()[:1]),
        partitioning.make_mesh({"data": 2, "fsdp": 2, "model": 2}),
    )
    run("calm", mesh=one)
    run("moved", mesh=parts, train_steps=4)
    run("moved", mesh=one)
    losses = [np.asarray([loss for _, loss, _ in curve(tmp_path / name)]) for name in ("calm", "moved")]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)


@pytest.mark.parametrize("change", [{"log_period": 0}, {"eval_period": -1}, {"keep_checkpoints": 0}])
def test_bad_options(change):
    with pytest.raises(InputError, match=next(iter(change)).upper()):
        dataclasses.replace(TrainOptions(model_dir="x"), **change)

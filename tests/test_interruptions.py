"""Real processes that are killed, told to leave, or several at once: the run is always the same."""

import pathlib
import re
import shutil
import signal
import subprocess
import time

import numpy as np
import pytest

from recalign_jax import cli
from recalign_jax.checkpoint import locations, saved
from recalign_jax.training import log
from tests import kill_and_infer, kill_and_resume


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A prepared corpus with a vocabulary."""
    folder = tmp_path_factory.mktemp("interruptions")
    kill_and_resume.prepare(folder)
    return folder


def test_a_run_that_is_killed_three_times(tmp_path):
    result = kill_and_resume.kill_and_resume(tmp_path, times=3, seed=0)
    assert result["identical"]
    assert result["kills"] == 3
    assert result["while_writing"] >= 1
    assert result["checkpoints"] == 4 * kill_and_resume.STEPS_A_KILL // kill_and_resume.CHECKPOINT_PERIOD


def test_sigterm_saves_and_leaves_with_its_own_status(folder):
    process = kill_and_resume.train(folder, "told", 10**6, "--gin.CHECKPOINT_PERIOD=1000000")
    kill_and_resume.until(process, lambda: kill_and_resume.has_logged(folder / "told", 3))
    maps = pathlib.Path(f"/proc/{process.pid}/maps")  # of Linux
    assert not maps.exists() or "/tensorflow/" not in maps.read_text()  # whose import takes seconds
    told = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 75
    assert time.monotonic() - told < 25  # the shortest grace period that schedulers give is 30 seconds
    last = log.read(str(folder / "told"))[-1]["step"]
    (step,) = locations.steps(str(folder / "told"))
    assert last <= step <= last + 1
    assert f"SIGTERM: saved step {step}" in (folder / "told.log").read_text()


@pytest.mark.skipif(not pathlib.Path("/proc/self/status").exists(), reason="needs /proc, of Linux")
def test_sigterm_before_the_run_leaves_with_the_same_status(folder):
    process = kill_and_resume.train(folder, "early", 10**6)

    def minds_sigterm():
        status = pathlib.Path(f"/proc/{process.pid}/status").read_text()
        caught = int(re.search(r"^SigCgt:\s*(\w+)", status, re.MULTILINE)[1], 16)
        return caught >> (signal.SIGTERM - 1) & 1

    kill_and_resume.until(process, minds_sigterm)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 75
    assert "SIGTERM: left with nothing to save" in (folder / "early.log").read_text()
    assert not (folder / "early").exists()


@pytest.fixture(scope="module")
def model(folder):
    """A model of two steps."""
    assert cli.main(["train", *kill_and_resume.arguments(folder, "model", 2)]) == 0
    return folder / "model"


@pytest.mark.usefixtures("fast_compilation", "model")
@pytest.mark.parametrize(("times", "processes"), [(1, 1), (1, 2)])
def test_killed_inference_leaves_what_uninterrupted_inference_does(folder, times, processes):
    """Of two processes one is killed."""
    for name in ("calm", "killed"):
        shutil.rmtree(folder / name, ignore_errors=True)
    result = kill_and_infer.kill_and_infer(folder, times, 0, processes)
    assert result["identical"]
    assert result["kills"] == times


@pytest.mark.usefixtures("fast_compilation")
def test_two_processes_leave_together_and_train_as_one(folder):
    """Each of four devices, all axes of the mesh larger than one; with evaluation."""
    more = ("--gin.DROPOUT_RATE=0.0", "--gin.NUM_BEAMS=10", "--gin.CHECKPOINT_PERIOD=1000000")
    mesh = "--gin.MESH={'data': 2, 'fsdp': 2, 'model': 2}"
    environment = kill_and_resume.environment(folder) | {"LOG_DIR": str(folder / "logs")}

    def start(steps, *evaluation):
        script = [str(kill_and_resume.ROOT / "launch" / "local_processes.sh"), "2", "4", "--", "train"]
        arguments = kill_and_resume.arguments(folder, "two", steps, *more, mesh, *evaluation)
        with (folder / "two.log").open("a") as output:
            return subprocess.Popen([*script, *arguments], env=environment, stdout=output, stderr=output)

    process = start(10**6)
    kill_and_resume.until(process, lambda: kill_and_resume.has_logged(folder / "two", 2))
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=90) == 75
    (saved_step,) = locations.steps(str(folder / "two"))
    steps, evaluation = saved_step + 2, "--gin.EVAL_PERIOD=1000000"
    assert start(steps, evaluation).wait(timeout=300) == 0
    assert cli.main(["train", *kill_and_resume.arguments(folder, "one", steps, *more, evaluation)]) == 0
    one, two = (log.read(str(folder / name)) for name in ("one", "two"))
    assert [record["step"] for record in one] == [record["step"] for record in two] == [*range(1, steps + 1)]
    for name in ("loss", "gradient_norm", "loss/shop_retrieval_token"):
        np.testing.assert_allclose([r[name] for r in two], [r[name] for r in one], rtol=1e-5, err_msg=name)
    names = [name for name in one[-1] if name.startswith("validation_") and "loss" not in name]
    assert len(names) > 5
    assert [two[-1][name] for name in names] == [one[-1][name] for name in names]


@pytest.mark.usefixtures("fast_compilation")
def test_two_processes_that_hold_the_same_rows_train_as_one(folder, model):
    """The mesh axis model spans them."""
    script = [str(kill_and_resume.ROOT / "launch" / "local_processes.sh"), "2", "--", "train"]
    arguments = kill_and_resume.arguments(folder, "both", 2, "--gin.MESH={'data': 1, 'model': 2}")
    environment = kill_and_resume.environment(folder) | {"LOG_DIR": str(folder / "both_logs")}
    subprocess.run([*script, *arguments], env=environment, check=True, timeout=300)
    one, two = (log.read(str(path)) for path in (model, folder / "both"))
    assert [record["step"] for record in one] == [record["step"] for record in two] == [1, 2]
    for name in ("loss", "gradient_norm", "packing_efficiency"):
        np.testing.assert_allclose([r[name] for r in two], [r[name] for r in one], rtol=1e-5, err_msg=name)
    folders = (locations.folder_of(str(path), 2) for path in (model, folder / "both"))
    first, second = (saved.read_metadata(path)["positions"] for path in folders)
    assert first == second  # so that it may be resumed by any number of processes

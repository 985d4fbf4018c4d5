"""Kills a training run at seeded moments and runs it again, until it is done; it must be the run that nothing killed.

    python tests/kill_and_resume.py --times 20

Some kills come while a checkpoint is being written, some while the process still starts. Prints one JSON line:
`kills`, how many of them `while_writing` and `while_starting`, the `checkpoints` compared, and `identical`: parameters,
optimizer state, data positions and the log of losses, bit for bit. Exit status 1 when they are not.
"""

import argparse
import functools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from recalign_jax import cli
from recalign_jax.checkpoint import locations, saved
from recalign_jax.training import log
from tests.corpora import prepare_shop

ROOT = pathlib.Path(__file__).resolve().parents[1]
STEPS_A_KILL, CHECKPOINT_PERIOD = 8, 4
MOMENTS = ("writing", "step", "time")  # after which a process is killed, in turn


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = kill_and_resume(pathlib.Path(folder), args.times, args.seed)
    print(json.dumps(result))
    return 0 if result["identical"] else 1


def kill_and_resume(folder: pathlib.Path, times: int, seed: int) -> dict[str, Any]:
    """Returns what is printed; `folder` is empty."""
    random = np.random.default_rng(seed)
    prepare(folder)
    steps = (times + 1) * STEPS_A_KILL
    assert cli.main(["train", *arguments(folder, "calm", steps)]) == 0
    counts = dict.fromkeys(("kills", "while_writing", "while_starting"), 0)
    while counts["kills"] < times:
        moment = MOMENTS[counts["kills"] % len(MOMENTS)]
        before = len(log.read(str(folder / "killed")))
        steps_done, seconds = int(random.integers(1, STEPS_A_KILL // 2)), random.uniform(0.5, 6)
        process = train(folder, "killed", steps)
        if moment == "time":
            until(process, functools.partial(has_had_time, time.monotonic() + seconds, folder / "killed", before))
        else:
            until(process, functools.partial(has_logged, folder / "killed", before + steps_done))
            if moment == "writing":
                until(process, functools.partial(being_written, folder / "killed"))
        process.kill()
        if process.wait() == 0:
            break  # it was done before: the seed gives moments too late
        counts["kills"] += 1
        counts["while_writing"] += being_written(folder / "killed")
        counts["while_starting"] += len(log.read(str(folder / "killed"))) == before
    assert train(folder, "killed", steps).wait() == 0
    calm, killed = str(folder / "calm"), str(folder / "killed")
    common = locations.steps(calm)
    same = common == locations.steps(killed) and all(state(calm, step) == state(killed, step) for step in common)
    return {**counts, "checkpoints": len(common), "identical": same and losses(calm) == losses(killed)}


def prepare(folder: pathlib.Path) -> None:
    """A corpus and a vocabulary in `folder`."""
    random = np.random.default_rng(0)
    rows = [
        (f"user{user}", f"thing{item}", moment)
        for user in range(40)
        for moment, item in enumerate(random.permutation(30)[:8])
    ]
    items = [{"item_id": f"thing{n}", "title": f"red {n} kettle of tin"} for n in range(30)]
    prepare_shop(folder, rows, items, 105)


def arguments(folder: pathlib.Path, name: str, steps: int, *more: str) -> list[str]:
    """Of `recalign train` with FOLDER/NAME as MODEL_DIR."""
    return [
        *("--data_dir", str(folder), "--gin_file", "gin_configs/models/t5_tiny.gin"),
        *("--gin_file", "gin_configs/runs/finetune.gin", f"--gin.MODEL_DIR={folder / name}"),
        *("--gin.MIXTURE_OR_TASK_NAME=shop_retrieval_aligned_token", f"--gin.VOCABULARY={folder / 'words.model'}"),
        *(f"--gin.TRAIN_STEPS={steps}", "--gin.BATCH_SIZE=8", "--gin.LOG_PERIOD=1", "--gin.KEEP_CHECKPOINTS=1000"),
        *(f"--gin.CHECKPOINT_PERIOD={CHECKPOINT_PERIOD}", "--gin.TASK_FEATURE_LENGTHS={'inputs': 128, 'targets': 32}"),
        # A run goes through several windows, and they are rendered in no time.
        *("--gin.InputOptions.window=32", "--gin.InputOptions.data_shards=2"),
        *more,
    ]


def environment(folder: pathlib.Path) -> dict[str, str]:
    """One where a process that is started again doesn't compile the same programs again."""
    cache = {"JAX_COMPILATION_CACHE_DIR": str(folder / "cache"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    return cache | dict(os.environ)


def train(folder: pathlib.Path, name: str, steps: int, *more: str) -> subprocess.Popen:
    """Starts `recalign train`; its output goes to NAME.log."""
    command = [sys.executable, "-m", "recalign_jax.cli", "train", *arguments(folder, name, steps, *more)]
    with (folder / f"{name}.log").open("a") as output:
        return subprocess.Popen(command, stdout=output, stderr=output, cwd=ROOT, env=environment(folder))


def until(process: subprocess.Popen, happens: Callable[[], bool], seconds: float = 300) -> None:
    """Waits until something happens or the process has ended."""
    deadline = time.monotonic() + seconds
    while process.poll() is None and not happens():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def has_logged(model_dir: pathlib.Path, count: int) -> bool:
    """Whether so many steps are in the log."""
    return len(log.read(str(model_dir))) >= count


def has_had_time(deadline: float, model_dir: pathlib.Path, before: int) -> bool:
    """Whether the time is over, or so fast a machine has done the steps of a kill already."""
    return time.monotonic() > deadline or has_logged(model_dir, before + STEPS_A_KILL)


def being_written(model_dir: pathlib.Path) -> bool:
    """Whether there is a checkpoint that has not got its name yet."""
    folder = model_dir / locations.DIRECTORY
    return folder.is_dir() and any(not path.name.isdigit() for path in folder.iterdir())


def state(model_dir: str, step: int) -> dict[str, Any]:
    """Hashes of parameters and optimizer state, and the data positions, of a checkpoint."""
    metadata = saved.read_metadata(locations.folder_of(model_dir, step))
    return {name: metadata[name] for name in ("fingerprints", "positions")}


def losses(model_dir: str) -> list[tuple[int, float]]:
    """Every logged loss with its step."""
    return [(record["step"], record["loss"]) for record in log.read(model_dir)]


if __name__ == "__main__":
    sys.exit(main())

"""How long commands take to begin: `recalign --help`, `recalign inspect`, and `recalign train` to its first step.

    python benchmarks/startup.py --corpus amazon_beauty --vocabulary spiece.model [--t5x_python T5X/bin/python]

Every start is a process of its own. Training is that of t5_tiny, 8 packed rows of 512/128 a step, from random
parameters and without evaluations, once with an empty compilation cache (cold) and once with the one which that start
filled (warm), and is ended after its first step. With --t5x_python T5X's own `t5x.train` does the same (docs/t5x.md).

Prints one JSON line of medians over rounds in seconds: `help`, `inspect`, and for `train_cold` and `train_warm` when
(from the beginning) modules are imported, data and model's shapes are there, parameters are drawn, and the first step
is done (`first_step`); `t5x_cold` and `t5x_warm`, and `ratio` and `ratio_warm`, T5X's time to its first step over ours.
The corpus must be prepared.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from recalign_jax.corpus.corpus import data_dir_or_default

ROOT = pathlib.Path(__file__).resolve().parents[1]
RECALIGN = [sys.executable, "-m", "recalign_jax.cli"]

Times = dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", required=True)
    parser.add_argument("--vocabulary", required=True)
    parser.add_argument("--data_dir")
    parser.add_argument("--t5x_python", help="the Python of an environment with T5X")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    data_dir = str(data_dir_or_default(args.data_dir).resolve())
    vocabulary = str(pathlib.Path(args.vocabulary).resolve())
    rounds = [one_round(args.corpus, data_dir, vocabulary, args.t5x_python) for _ in range(args.rounds)]
    medians = {
        name: {mark: round(statistics.median(r[name][mark] for r in rounds), 2) for mark in times}
        for name, times in rounds[0].items()
    }
    ratios = {}
    if args.t5x_python:
        for name, kind in (("ratio", "cold"), ("ratio_warm", "warm")):
            pairs = [(r[f"t5x_{kind}"]["first_step"], r[f"train_{kind}"]["first_step"]) for r in rounds]
            ratios[name] = round(statistics.median(theirs / ours for theirs, ours in pairs), 2)
    print(json.dumps(ratios | medians | {"rounds": args.rounds}))


def one_round(corpus: str, data_dir: str, vocabulary: str, t5x_python: str | None) -> dict[str, Times]:
    """Every start once; a start of T5X after each one of ours."""
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        times = {
            "help": whole([*RECALIGN, "--help"]),
            "inspect": whole([*RECALIGN, "inspect", "--corpus", corpus, "--data_dir", data_dir]),
        }
        (folder / "data").mkdir()
        (folder / "data" / corpus).symlink_to(pathlib.Path(data_dir) / corpus)  # T5X registers all that are there
        variables = {"RECALIGN_DATA_DIR": str(folder / "data"), "RECALIGN_VOCABULARY": vocabulary}
        for kind in ("cold", "warm"):
            times[f"train_{kind}"] = ours(corpus, variables, folder / f"ours_{kind}", cache(folder / "cache"))
            if t5x_python:
                times[f"t5x_{kind}"] = t5x(
                    t5x_python, corpus, variables, folder / f"t5x_{kind}", cache(folder / "t5x_cache")
                )
        return times


def cache(folder: pathlib.Path) -> dict[str, str]:
    """The variables by which JAX keeps all that it compiles."""
    return {"JAX_COMPILATION_CACHE_DIR": str(folder), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}


def ours(corpus: str, variables: dict[str, str], folder: pathlib.Path, cached: dict[str, str]) -> Times:
    command = [
        *RECALIGN,
        "train",
        *("--gin_file=gin_configs/models/t5_tiny.gin", "--gin_file=gin_configs/runs/finetune.gin"),
        *(f"--gin.MIXTURE_OR_TASK_NAME={corpus}_retrieval_aligned", "--gin.BATCH_SIZE=8"),
        *(f"--gin.VOCABULARY={variables['RECALIGN_VOCABULARY']}", f"--gin.MODEL_DIR={folder}"),
    ]
    metrics = folder / "metrics.jsonl"
    marks = {
        "data": lambda told: "Training all" in told,
        "parameters": lambda told: (folder / "config.gin").exists(),
        "first_step": lambda told: metrics.exists() and metrics.stat().st_size > 0,
    }
    imports = "import recalign_jax.commands.train; print('imported', flush=True)"
    imported = until([sys.executable, "-c", imports], {}, {"imports": lambda told: "imported" in told})
    return imported | until(command, {**variables, **cached}, marks)


def t5x(python: str, corpus: str, variables: dict[str, str], folder: pathlib.Path, cached: dict[str, str]) -> Times:
    command = [
        *(python, "-m", "t5x.train"),
        *("--gin_file=gin_configs/t5x/t5_tiny.gin", "--gin_file=gin_configs/t5x/finetune.gin"),
        *(f"--gin.MIXTURE_OR_TASK_NAME='{corpus}_retrieval_aligned'", "--gin.BATCH_SIZE=8", "--gin.TRAIN_STEPS=1"),
        *("--gin.train.train_eval_dataset_cfg=None", f"--gin.MODEL_DIR='{folder}'"),
        "--gin.train.infer_eval_dataset_cfg=None",
    ]
    # T5X saves when the step is done, and says so.
    marks = {
        "imports": lambda told: "Gin Configuration" in told,
        "parameters": lambda told: "Initialize/restore complete" in told,
        "first_step": lambda told: "Saving checkpoint." in told,
    }
    return until(command, {**variables, **cached}, marks)


def whole(command: Sequence[str]) -> Times:
    """The seconds of a command."""
    started = time.perf_counter()
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return {"end": time.perf_counter() - started}


def until(command: Sequence[str], variables: dict[str, str], marks: dict[str, Callable[[str], bool]]) -> Times:
    """Runs a command until all marks are seen, which look at what it wrote, and ends it then.

    Returns:
      The seconds until each was seen.
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # Python compiles a module once, not in every process
    times: Times = {}
    with tempfile.NamedTemporaryFile("w+") as told:
        started = time.perf_counter()
        with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=told, stderr=told) as process:
            while len(times) < len(marks):
                ended = process.poll() is not None
                said = pathlib.Path(told.name).read_text(errors="replace")
                now = time.perf_counter() - started
                times |= {name: now for name, seen in marks.items() if name not in times and seen(said)}
                if ended and len(times) < len(marks):
                    sys.exit(f"{command} ended before {marks.keys() - times.keys()}:\n{said[-3000:]}")
                time.sleep(0.02)
            process.kill()
    return times


if __name__ == "__main__":
    main()

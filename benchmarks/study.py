"""The study of docs/results.md: what the auxiliary tasks and the choices of the method buy, on a small model.

    python benchmarks/study.py --data_dir DIR --output DIR [--rows NAME ...] [--seeds N ...] [--records DIR]
      [--gin.NAME=VALUE ...]

A row is a file gin_configs/experiments/study_ROW.gin, and differs from the others in what its name says. DATA_DIR
holds `amazon_beauty`, `amazon_toys`, `amazon_beauty_shuffled` (prepared by `--tie_break shuffle`) and `movielens`, and
vocabularies that `recalign vocab` trained on `amazon_beauty` and `amazon_toys` (--size 4000) and `movielens` (--size
1000); a row whose corpus isn't there is left out.

Each run is a `recalign train`, and a `recalign eval` of its last checkpoint, or of its best one where the row has a
BEST_METRIC; both are printed. OUTPUT/ROW/SEED is its MODEL_DIR, and holds SPLIT/metrics.json with Parquet files, and
study.json: command, seed, settings, steps, useful tokens, and wall seconds summed over all parts of the training. The
queue may be stopped at any time: the same command goes on. What is done isn't done again, nor what is kept in RECORDS
(docs/results/runs by default) of runs elsewhere. A training that outlived its queue is waited for. A folder whose run
has other settings is refused. Prints last one JSON line with `runs`, without those kept elsewhere, and `failed`.
benchmarks/results.py keeps what is done, and writes docs/results.md.
"""

import argparse
import contextlib
import fcntl
import json
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import IO, Any, NamedTuple

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import recalign_jax.commands.train  # noqa: F401 (what its gin files configure)
from benchmarks import study_records
from recalign_jax import gin_config
from recalign_jax.checkpoint.locations import BEST
from recalign_jax.commands.eval import evaluation_settings
from recalign_jax.errors import InputError
from recalign_jax.evaluation.report import EVALUATION_FILE
from recalign_jax.files import atomic_file
from recalign_jax.training import log
from seqio_tasks import task_names

ROOT = pathlib.Path(__file__).resolve().parents[1]
PROGRAM = (sys.executable, "-m", "recalign_jax.cli")
RECORD = "study.json"

SEEDS = (0, 1, 2)
MIXTURES = ("retrieval", "retrieval_mim", "retrieval_mlm", "retrieval_aligned")
CHOICES = (  # each against `beauty_token_retrieval`, and the last one against `beauty_token_retrieval_aligned`
    "beauty_id_retrieval",
    "beauty_token_retrieval_history_5",
    "beauty_token_retrieval_history_10",
    "beauty_token_retrieval_no_prefixes",
    "beauty_token_retrieval_neighbours",
    "beauty_token_retrieval_mlm_wide",
    "beauty_token_retrieval_aligned_equal",
)
MLM_WIDE = "beauty_token_retrieval_mlm_wide"
RANKING_100 = ("beauty_token_ranking_100", "beauty_token_ranking_aligned_100")
LONG = ("beauty_token_retrieval_long", "beauty_token_retrieval_aligned_long")
LONG_DROPOUT = ("beauty_token_retrieval_long_dropout", "beauty_token_retrieval_aligned_long_dropout")
# Row -> its seeds, in the order of the queue.
ROWS: dict[str, Sequence[int]] = {
    **{f"beauty_token_{mixture}": SEEDS for mixture in (*MIXTURES, "ranking", "ranking_aligned")},
    "beauty_shuffled_token_retrieval_aligned": SEEDS[:1],
    **dict.fromkeys(CHOICES, SEEDS[:1]),
    **dict.fromkeys(RANKING_100, SEEDS),
    **{f"beauty_title_{mixture}": SEEDS for mixture in MIXTURES},
    **dict.fromkeys((*LONG, *LONG_DROPOUT), SEEDS[:1]),
    **{f"toys_token_{mixture}": SEEDS for mixture in (*MIXTURES, "ranking", "ranking_aligned")},
    **{f"toys_title_{mixture}": SEEDS for mixture in MIXTURES},
    **{f"movielens_token_{mixture}": SEEDS for mixture in ("rating", "rating_aligned")},
}
STOPPED = (75, 130, -signal.SIGTERM, -signal.SIGINT)  # exit statuses of a command that was told to end


class Job(NamedTuple):
    """A run: OUTPUT/ROW/SEED, the two commands, and all that gin holds for the training but for the seed."""

    row: str
    seed: int
    folder: pathlib.Path
    settings: dict[str, str]
    bindings: list[str]
    train: list[str]
    evaluate: list[str]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--data_dir", required=True, type=pathlib.Path)
    parser.add_argument("--output", required=True, type=pathlib.Path)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="NAME", help="default: all")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="N", help="default: 0 1 2, of some rows 0 alone")
    parser.add_argument("--split", default="test", choices=("validation", "test"), help="to evaluate on (default test)")
    parser.add_argument("--records", type=pathlib.Path, default=study_records.RECORDS, help="runs that are left out")
    args, bindings = parser.parse_known_args()
    # The runs have another working directory.
    data_dir, output = args.data_dir.resolve(), args.output.resolve()
    done, failed = [], []
    try:
        for row, seed in queue(args.rows, args.seeds):
            job = make_job(row, seed, data_dir, output, args.split, bindings)
            about = {"settings": job.settings, "bindings": job.bindings}
            if study_records.is_kept(row, seed, args.split, about, args.records):
                print(f"{row}/{seed} is kept in {args.records} already.", file=sys.stderr)
                continue
            try:
                task_names.split_name(job.settings["MIXTURE_OR_TASK_NAME"].strip("'"), data_dir)
            except InputError as error:
                print(f"{row} is left out: {error}", file=sys.stderr)
                continue
            status = run(job, args.split)
            if status in STOPPED:
                raise KeyboardInterrupt
            if status:
                failed.append(f"{row}/{seed}")
            else:
                done.append({name: read(job)[name] for name in ("row", "seed", "steps", "tokens", "seconds")})
    except InputError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        raise SystemExit("Stopped; the same command goes on.") from None
    print(json.dumps({"runs": done, "failed": failed}))
    raise SystemExit(1 if failed else 0)


def queue(rows: Sequence[str], seeds: Sequence[int] | None) -> list[tuple[str, int]]:
    """Which runs there are, corpus by corpus; of each corpus the first seed of all rows comes first."""
    runs = [(row, seed) for row in ROWS if row in rows for seed in seeds or ROWS[row]]
    corpora = list(dict.fromkeys(row.split("_")[0] for row in ROWS))
    return sorted(runs, key=lambda run: (corpora.index(run[0].split("_")[0]), run[1]))


def make_job(
    row: str, seed: int, data_dir: pathlib.Path, output: pathlib.Path, split: str, bindings: Sequence[str]
) -> Job:
    """Puts the commands of a run together.

    Args:
      row: of ROWS.
      seed: SEED.
      data_dir: absolute.
      output: absolute.
      split: that is evaluated.
      bindings: more arguments of `recalign train`, as `--gin.TRAIN_STEPS=100`.

    Raises:
      InputError: when gin doesn't know a name.
    """
    gin_file, folder = f"gin_configs/experiments/study_{row}.gin", output / row / str(seed)
    place = [f"--gin.SEED={seed}", f"--gin.MODEL_DIR={folder}"]
    train = ["recalign", "train", "--data_dir", str(data_dir), "--gin_file", gin_file, *place, *bindings]
    gin_config.parse([gin_file], gin_config.bindings_of([*place, *bindings]))
    settings = gin_config.snapshot()

    files, others = evaluation_settings([gin_file], settings)
    values = {
        "TASK_NAME": settings["MIXTURE_OR_TASK_NAME"].strip("'"),
        "SPLIT": split,
        "CHECKPOINT_PATH": str(folder if settings["BEST_METRIC"] == "None" else folder / BEST),
        "OUTPUT_DIR": str(folder / split),
    }
    evaluate = ["recalign", "eval", "--data_dir", str(data_dir)]
    evaluate += [part for file in files for part in ("--gin_file", file)]
    evaluate += [f"--gin.{name}={value}" for name, value in (values | others).items()]
    but_for = ("SEED", "MODEL_DIR")
    settings = {name: value for name, value in settings.items() if name not in but_for}
    return Job(row, seed, folder, settings, list(bindings), train, evaluate)


def run(job: Job, split: str) -> int:
    """Does what isn't done of a run; returns the exit status of the command that failed, or 0.

    Raises:
      InputError: when the folder holds a run with other settings.
    """
    with locked(job.folder) as lock:
        record = read(job)
        if record:
            check_settings(job, record["settings"])
        if "steps" not in record and (status := train(job, record, lock)):
            return status
        if not (job.folder / split / EVALUATION_FILE).is_file():
            return call(job.evaluate, lock)
    return 0


def train(job: Job, record: dict[str, Any], lock: IO[str]) -> int:
    """Trains, or goes on, and records what it took; returns the exit status."""
    seconds = record.get("seconds", 0.0)
    metrics = job.folder / log.METRICS_FILE
    if record and metrics.exists():  # nobody saw the end of the part before: it lasted at least to its last log
        seconds += max(0.0, metrics.stat().st_mtime - record["since"])
    since = time.time()
    begun = {
        "row": job.row,
        "seed": job.seed,
        "command": shlex.join(job.train),
        "bindings": job.bindings,
        "settings": job.settings,
        "cores": len(os.sched_getaffinity(0)),
        "seconds": seconds,
        "since": since,
    }
    write(job, begun)
    if status := call(job.train, lock):
        return status
    records = log.read(str(job.folder))
    ended = {"steps": records[-1]["step"], "tokens": useful_tokens(records)}
    write(job, begun | {"seconds": seconds + time.time() - since} | ended)
    return 0


def useful_tokens(records: Sequence[dict[str, Any]]) -> int | None:
    """Tokens of inputs and targets without padding that a run was trained on, from its log.

    The first step of a process is logged without rates; it counts as the mean of the others.
    """
    done = counted = 0
    tokens = 0.0
    for record in records:
        steps, done = record["step"] - done, record["step"]
        if "tokens_per_second" in record:
            tokens += steps * record["tokens_per_second"] / record["steps_per_second"]
            counted += steps
    return round(tokens * done / counted) if counted else None


def check_settings(job: Job, before: dict[str, str]) -> None:
    """Raises InputError when a run was begun with other settings."""
    differing = [
        f"{name} was {before.get(name, 'not set')}, is {job.settings.get(name, 'not set')}"
        for name in sorted({*before, *job.settings})
        if before.get(name) != job.settings.get(name)
    ]
    if differing:
        raise InputError(
            f"{job.folder} holds a run with other settings ({'; '.join(differing)}). Remove it, or give another "
            "--output."
        )


def call(command: Sequence[str], lock: IO[str]) -> int:
    """Prints and runs a command; it holds the lock even if this process is killed. Returns its exit status."""
    print(shlex.join(command), file=sys.stderr, flush=True)
    program = [*PROGRAM, *command[1:]]
    return subprocess.run(program, cwd=ROOT, stdout=subprocess.DEVNULL, pass_fds=[lock.fileno()]).returncode


@contextlib.contextmanager
def locked(folder: pathlib.Path) -> Iterator[IO[str]]:
    """Inside, no other queue, nor a training that outlived its own, works in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"Another process works in {folder}: waiting for it.", file=sys.stderr, flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock


def read(job: Job) -> dict[str, Any]:
    """What is recorded of a run; empty before it begins."""
    path = job.folder / RECORD
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def write(job: Job, record: dict[str, Any]) -> None:
    with atomic_file(job.folder / RECORD) as aside:
        aside.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

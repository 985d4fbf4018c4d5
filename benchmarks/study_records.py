"""What stays of the study's runs: small files in the repository, of which docs/results.md is written.

A run's folder goes with the machine that made it. Its record doesn't: a queue goes on elsewhere, later seeds are
compared with earlier ones user by user, and the page can be written again from what is there. RECORDS holds

    ROW/SEED.json       settings, budget and metrics of a run; of a baseline CORPUS/ROW/SEED.json
    ROW/SEED.parquet    the metrics of every user, in the order of their ids (which stay out)
    CORPUS/ROW/mean.json  of a baseline whose runs weren't kept: mean and deviation of its metrics
    claims.json         how each claim was judged (benchmarks/study_verdicts.py)
"""

import hashlib
import json
import pathlib
import statistics
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import pyarrow
from pyarrow import parquet

from benchmarks import baselines
from recalign_jax.errors import InputError
from recalign_jax.evaluation.report import EVALUATION_FILE
from recalign_jax.files import atomic_file

RECORDS = pathlib.Path(__file__).resolve().parents[1] / "docs" / "results" / "runs"
METRICS = baselines.FAMILIES
MEAN = "mean.json"
# What the root is taken of after the mean over users.
PER_USER = {"rmse": "mse"}


class Runs(NamedTuple):
    """The kept runs of a row, by seed; or `mean` of a baseline whose runs weren't kept."""

    name: str
    records: list[dict[str, Any]]
    tables: list[pathlib.Path]  # of those that have one
    mean: dict[str, Any] | None = None


class Spread(NamedTuple):
    """Mean and standard deviation over seeds; of one seed there is no deviation."""

    mean: float
    deviation: float | None

    def __str__(self) -> str:
        return f"{self.mean:.4f}" if self.deviation is None else f"{self.mean:.4f} ± {self.deviation:.4f}"


def spread(runs: Runs, family: str, metric: str) -> Spread | None:
    """A metric of a row; None if only the mean of other metrics is kept."""
    if runs.mean:
        mean, deviation = (runs.mean[part][family].get(metric) for part in ("mean", "deviation"))
        return None if mean is None else Spread(mean, deviation)
    values = [record["metrics"][family][metric] for record in runs.records]
    return Spread(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)


def keep(evaluated: pathlib.Path, about: dict[str, Any], records: pathlib.Path) -> None:
    """Keeps a finished run.

    Args:
      evaluated: the folder of its evaluation, with metrics.json and Parquet files.
      about: `row` and `seed`, and what else to say of it.
      records: where records are.

    Raises:
      InputError: when its row is kept with other settings, or its families have different users.
    """
    told = json.loads((evaluated / EVALUATION_FILE).read_text(encoding="utf-8"))
    folder = records / about["row"]
    for path in sorted(folder.glob("*.json")):
        check_settings(about, json.loads(path.read_text(encoding="utf-8")), path)
    metrics, columns, users = {}, {}, set()
    for family in (family for family in METRICS if family in told):
        metrics[family] = {name: told[family][name] for name in METRICS[family]}
        table = parquet.read_table(evaluated / f"{family}.parquet").sort_by("user")
        users.add(hashlib.sha256("\n".join(table["user"].to_pylist()).encode()).hexdigest())
        for name in (PER_USER.get(name, name) for name in METRICS[family]):
            columns[_column(family, name)] = table[name].cast(pyarrow.float32())
    if len(users) != 1:
        raise InputError(f"{evaluated}: its evaluations are of different users.")
    record = about | {
        "chosen": told.get("step", told.get("best", {}).get("step")),
        "users": users.pop(),
        "metrics": metrics,
    }
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_file(folder / f"{about['seed']}.parquet") as aside:
        # Columns have few different values: of 22,000 users they are some ten kilobytes.
        parquet.write_table(pyarrow.table(columns), aside, compression="zstd", compression_level=19)
    write(folder / f"{about['seed']}.json", record)


def _column(family: str, metric: str) -> str:
    return f"{family} {metric}"


def is_kept(row: str, seed: int, split: str, about: dict[str, Any], records: pathlib.Path) -> bool:
    """Whether a run with these `settings` and `bindings` is kept."""
    path = records / row / f"{seed}.json"
    if not path.exists():
        return False
    kept = json.loads(path.read_text(encoding="utf-8"))
    return kept["split"] == split and not _differing(kept, about)


def check_settings(about: dict[str, Any], kept: dict[str, Any], path: pathlib.Path) -> None:
    """Raises InputError when a run has other settings than one of its row that is kept."""
    if differing := _differing(kept, about):
        raise InputError(
            f"{path} is of a run with other settings ({'; '.join(differing)}). Remove it, or give another --records."
        )


def _differing(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs; an option that only one of them has is newer than the other, and counts where it was given."""
    first, second = (about.get("settings", {}) for about in (before, now))
    both = sorted(first.keys() & second.keys())
    found = [f"{name} was {first[name]}, is {second[name]}" for name in both if first[name] != second[name]]
    given = [sorted(about.get("bindings", ())) for about in (before, now)]
    if not found and given[0] != given[1]:
        found.append(f"given was {' '.join(given[0]) or 'nothing'}, is {' '.join(given[1]) or 'nothing'}")
    return found


def read(records: pathlib.Path, rows: Iterable[str]) -> dict[str, Runs]:
    """The kept runs of those of `rows` that have some."""
    found = {}
    for name in rows:
        paths = (path for path in (records / name).glob("*.json") if path.stem.isdigit())
        paths = sorted(paths, key=lambda path: int(path.stem))
        tables = [path.with_suffix(".parquet") for path in paths if path.with_suffix(".parquet").exists()]
        mean = records / name / MEAN
        if paths:
            found[name] = Runs(name, [json.loads(path.read_text(encoding="utf-8")) for path in paths], tables)
        elif mean.exists():
            found[name] = Runs(name, [], [], json.loads(mean.read_text(encoding="utf-8")))
    return found


def per_user(runs: Runs, family: str, metric: str) -> np.ndarray:
    """A metric of every user: float64 [seeds that have tables, users]."""
    name = _column(family, PER_USER.get(metric, metric))
    return np.asarray([parquet.read_table(path, columns=[name])[name].to_numpy() for path in runs.tables], np.float64)


def write(path: pathlib.Path, content: dict[str, Any]) -> None:
    """Writes JSON, whole or not at all."""
    with atomic_file(path) as aside:
        aside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

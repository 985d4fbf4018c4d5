"""Runs and evaluations, as they lie in folders: also of runs that go on, were killed, or are half written.

A run is a folder with `metrics.jsonl`: a MODEL_DIR of `recalign train` or a model_dir of `recalign baseline`. An
evaluation is a folder with `metrics.json`: an OUTPUT_DIR of `recalign eval` or an output_dir of `recalign baseline`.
"""

import dataclasses
import json
import math
import os
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

from recalign_jax.checkpoint import locations, saved
from recalign_jax.errors import InputError, RunError
from recalign_jax.evaluation.report import EVALUATION_FILE, FAMILIES
from recalign_jax.reporting import gin_text
from recalign_jax.training import log, steering

_PARTS_OF_A_RUN = ("checkpoints", "damaged_checkpoints", "profile", "tries")
# The best of a run is by BEST_METRIC, or else by the first of these that it logged, behind a corpus's name or not.
_MAIN_METRICS = ("ndcg@10", "ranking_ndcg@10", "rating_rmse", "loss")
RUNNING_SECONDS = 300


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """A training of the language model or of a baseline.

    Attributes:
      folder: its model_dir.
      name: its path below the folder that was looked through.
      records: the logged steps (of a baseline, epochs).
      config: the text of config.gin; "" where there is none.
      values: what stands in it, see `gin_text.values`.
      identity: of its newest readable checkpoint; empty where there is none.
      versions: of packages, where they are recorded.
    """

    folder: pathlib.Path
    name: str
    records: list[dict[str, Any]]
    config: str
    values: dict[str, Any]
    identity: dict[str, Any]
    versions: dict[str, str]

    @property
    def kind(self) -> str:
        """`train` has its configuration before its first step, `baseline` gets it when it ends."""
        return "train" if self.mixture else "baseline"

    @property
    def mixture(self) -> str:
        """What is trained on; "" of a baseline."""
        return self.values.get("train.mixture_or_task_name") or ""

    @property
    def method(self) -> str:
        """Of a baseline; "" if nothing says it."""
        return self.identity.get("method", "")

    @property
    def seed(self) -> int | None:
        return self.values.get("TrainOptions.seed", self.identity.get("seed"))

    @property
    def corpora(self) -> dict[str, str]:
        """Name -> fingerprint, as the checkpoints say."""
        return {name[7:]: value for name, value in self.identity.items() if name.startswith("corpus ")}

    @property
    def step(self) -> int:
        return self.records[-1]["step"] if self.records else 0

    @property
    def last_step(self) -> int | None:
        """How far the run is to go; None if nothing says it."""
        names = ("TrainOptions.train_steps", *(name for name in self.values if name.endswith("Options.epochs")))
        return next((self.values[name] for name in names if name in self.values), None)

    @property
    def finished(self) -> bool:
        """Whether it reached its last step, or ended early as it was told to."""
        if self.kind == "baseline":
            return bool(self.config) and self.step <= (self.last_step or self.step)  # else it went on since then
        metric, patience = (self.values.get(f"TrainOptions.{name}") for name in ("best_metric", "early_stopping"))
        return self.step >= (self.last_step or 0) or steering.ends(self.records, metric, patience)

    @property
    def best(self) -> dict[str, Any] | None:
        """`step`, `metric` and `value` of the best evaluation; None before the first one."""
        try:
            best = locations.read_best(str(self.folder))
        except (OSError, InputError):
            best = None
        return best or steering.best_evaluation(self.records, self.metric)[0]

    @property
    def metric(self) -> str:
        """What the best evaluation is chosen by, if no best.json says it; "" if nothing was evaluated."""
        chosen = self.values.get("TrainOptions.best_metric")
        names = dict.fromkeys(name for record in self.records for name in record)
        main = (
            name
            for metric in _MAIN_METRICS
            for name in names
            if re.fullmatch(f"validation_(.+_)?(?<!ranking_)(?<!rating_){re.escape(metric)}", name)
        )
        return chosen or next(main, "")

    @property
    def last_written(self) -> float:
        """When the log or a checkpoint was written last, in seconds since 1970."""
        paths = (self.folder / log.METRICS_FILE, self.folder / locations.DIRECTORY)
        return max(path.stat().st_mtime for path in paths if path.exists())


@dataclasses.dataclass(frozen=True, eq=False)
class Evaluation:
    """What `evaluation.report.publish` wrote.

    Attributes:
      folder: with metrics.json and FAMILY.parquet.
      name: its path below the folder that was looked through.
      told: metrics.json.
      run: what was evaluated; None where nothing says it, or the baseline is counted and not trained.
    """

    folder: pathlib.Path
    name: str
    told: dict[str, Any]
    run: Run | None


def find(folders: Sequence[str]) -> tuple[list[Run], list[Evaluation]]:
    """Looks through folders for runs and evaluations; files that can't be read are passed over.

    Raises:
      InputError: when a folder isn't there, or has neither.
    """
    paths = [pathlib.Path(folder).resolve() for folder in folders]
    runs: dict[pathlib.Path, Run] = {}
    told: dict[pathlib.Path, dict[str, Any]] = {}
    for path in paths:
        if not path.is_dir():
            raise InputError(f"{path} is no folder. Give folders of runs, as MODEL_DIR of recalign train.")
        for folder, files in _walk(path):
            if log.METRICS_FILE in files:
                runs[folder] = _read_run(folder)
            if EVALUATION_FILE in files and (evaluated := _read_evaluation(folder / EVALUATION_FILE)):
                told[folder] = evaluated
        if not any(path in (folder, *folder.parents) for folder in (*runs, *told)):
            raise InputError(
                f"Nothing to show in {path}: a run of recalign train or recalign baseline has a {log.METRICS_FILE} "
                f"(MODEL_DIR, --model_dir), an evaluation a {EVALUATION_FILE} (OUTPUT_DIR, --output_dir)."
            )
    top = pathlib.Path(os.path.commonpath([*runs, *told]))
    named = {path: dataclasses.replace(run, name=_name(path, top)) for path, run in runs.items()}
    evaluations = [
        Evaluation(folder, _name(folder, top), content, _run_of(folder, content, named))
        for folder, content in told.items()
    ]
    return list(named.values()), evaluations


def state(run: Run, now: float) -> str:
    """`finished`, `running` (something was written in the last RUNNING_SECONDS) or `unfinished`."""
    if run.finished:
        return "finished"
    return "running" if now - run.last_written < RUNNING_SECONDS else "unfinished"


def _walk(top: pathlib.Path) -> Iterator[tuple[pathlib.Path, list[str]]]:
    for folder, below, files in os.walk(top):
        passed_over = _PARTS_OF_A_RUN if log.METRICS_FILE in files else ()
        below[:] = sorted(name for name in below if name not in passed_over and not name.startswith("."))
        yield pathlib.Path(folder), files


def _name(folder: pathlib.Path, top: pathlib.Path) -> str:
    return str(folder.relative_to(top)) if folder != top else folder.name


def _read_run(folder: pathlib.Path) -> Run:
    try:
        read = [record for record in log.read(str(folder)) if isinstance(record, dict) and "step" in record]
        records = [{name: value for name, value in record.items() if _is_number(value)} for record in read]
    except (OSError, UnicodeDecodeError):
        records = []
    try:
        config = (folder / "config.gin").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        config = ""
    try:
        versions = json.loads((folder / log.VERSIONS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        versions = {}
    return Run(folder, "", records, config, gin_text.values(config), _identity(folder), versions)


def _is_number(value: Any) -> bool:
    """Whether it can be drawn: a diverged run logs others."""
    return isinstance(value, int | float) and math.isfinite(value)


def _identity(folder: pathlib.Path) -> dict[str, Any]:
    for step in locations.steps(str(folder)):
        try:
            return saved.read_metadata(locations.folder_of(str(folder), step))["identity"]
        except (saved.DamagedCheckpoint, RunError):
            continue
    return {}


def _read_evaluation(path: pathlib.Path) -> dict[str, Any]:
    """What is told; empty if the file can't be read, or is of something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(content, dict):
        return {}
    told = [content.get(family) for family in FAMILIES]
    if any(isinstance(part, dict) and "users" in part for part in told):
        return {name: value for name, value in content.items() if name not in FAMILIES or isinstance(value, dict)}
    return {}


def _run_of(folder: pathlib.Path, told: dict[str, Any], runs: dict[pathlib.Path, Run]) -> Run | None:
    """The run that an evaluation lies below (folders are moved and copied), or whose model_dir is told, or (of a
    baseline) that lies in its folder."""
    above = next((runs[path] for path in (folder, *folder.parents) if path in runs), None)
    named = runs.get(pathlib.Path(told["model_dir"]).resolve()) if "model_dir" in told else None
    if above or named or "method" not in told:
        return above or named
    inside = [run for path, run in runs.items() if path.parent == folder and run.method == told["method"]]
    return inside[0] if len(inside) == 1 else None

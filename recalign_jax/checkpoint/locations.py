"""Where a run's checkpoints lie: MODEL_DIR/checkpoints/STEP, and which of them is the best."""

import json
import pathlib
from typing import Any

from recalign_jax.errors import InputError
from recalign_jax.files import atomic_file

DIRECTORY = "checkpoints"
BEST = "best"
_BEST_FILE = "best.json"


def steps(model_dir: str) -> list[int]:
    """The steps that a run has checkpoints of, newest first."""
    directory = pathlib.Path(model_dir) / DIRECTORY
    found = directory.iterdir() if directory.is_dir() else ()
    return sorted((int(path.name) for path in found if path.name.isdigit()), reverse=True)


def folder_of(model_dir: str, step: int) -> pathlib.Path:
    """The folder of one checkpoint."""
    return (pathlib.Path(model_dir) / DIRECTORY / str(step)).absolute()


def locate(path: str) -> tuple[str, int]:
    """Finds a checkpoint.

    Args:
      path: a MODEL_DIR or its `checkpoints` means the newest, `MODEL_DIR/best` the best by BEST_METRIC, a numbered
        folder below `checkpoints` that one.

    Returns:
      (model_dir, step).

    Raises:
      InputError: when there is none.
    """
    given, model_dir = pathlib.Path(path).absolute(), model_dir_of(path)
    if given.name.isdigit() and given.parent.name == DIRECTORY and str(given) != model_dir:
        if not given.is_dir():
            there = ", ".join(map(str, steps(model_dir))) or "none"
            raise InputError(f"No checkpoint of step {given.name} at {path}. Steps there: {there}.")
        return model_dir, int(given.name)
    if given.name == BEST and not given.exists():
        best = read_best(model_dir)
        if best is None or best["step"] not in steps(model_dir):
            raise InputError(f"{model_dir} has no best checkpoint: it needs EVAL_PERIOD and BEST_METRIC in training.")
        return model_dir, best["step"]
    found = steps(model_dir)
    if not found:
        raise InputError(f"No checkpoint at {path}. Give a MODEL_DIR of recalign train, or MODEL_DIR/{DIRECTORY}/STEP.")
    return model_dir, found[0]


def model_dir_of(path: str) -> str:
    """The MODEL_DIR of what is given as a checkpoint, see `locate`; the path itself if it is none of these."""
    given = pathlib.Path(path).absolute()
    if (given / DIRECTORY).is_dir():  # whatever it is called
        return str(given)
    if given.name.isdigit() and given.parent.name == DIRECTORY:
        return str(given.parent.parent)
    return str(given.parent if given.name == DIRECTORY or (given.name == BEST and not given.exists()) else given)


def read_best(model_dir: str) -> dict[str, Any] | None:
    """`step`, `metric` and `value` of the best evaluation so far; None if there was none.

    Raises InputError when the file is damaged: to begin another one would give up the checkpoint that it names.
    """
    path = pathlib.Path(model_dir) / _BEST_FILE
    if not path.is_file():
        return None
    try:
        best = json.loads(path.read_text(encoding="utf-8"))
        best["step"], best["metric"], best["value"] + 0.0
    except (ValueError, KeyError, TypeError):
        like = '{"step": 1000, "metric": "validation_ndcg@10", "value": 0.05}'
        raise InputError(f"{path} is damaged. Write it again, as {like}: metrics.jsonl has the values.") from None
    return best


def write_best(model_dir: str, best: dict[str, Any]) -> None:
    """Puts down what `read_best` returns."""
    with atomic_file(pathlib.Path(model_dir) / _BEST_FILE) as aside:
        aside.write_text(json.dumps(best), encoding="utf-8")

"""The record of a run: `metrics.jsonl`, one object a logged step, and TensorBoard files."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import tensorboardX

from recalign_jax.files import atomic_file

METRICS_FILE = "metrics.jsonl"


def read(model_dir: str) -> list[dict[str, Any]]:
    """The logged steps so far; a last line that a kill cut short is left out."""
    path = pathlib.Path(model_dir) / METRICS_FILE
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


class RunLog:
    """Writes logged values; steps after `resumed_step`, which will be done again, are forgotten first."""

    def __init__(self, model_dir: str, resumed_step: int):
        kept = [record for record in read(model_dir) if record["step"] <= resumed_step]
        self._path = pathlib.Path(model_dir) / METRICS_FILE
        with atomic_file(self._path) as aside:
            aside.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
        self._file = self._path.open("a", encoding="utf-8")
        self._tensorboard = tensorboardX.SummaryWriter(model_dir)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Appends one record and flushes it."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._tensorboard.add_scalar(name, value, step)
        self._tensorboard.flush()

    def close(self) -> None:
        self._file.close()
        self._tensorboard.close()

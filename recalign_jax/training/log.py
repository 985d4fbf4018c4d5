"""The record of a run: `metrics.jsonl`, one object a logged step, TensorBoard files, and `versions.json`."""

import importlib.metadata
import json
import pathlib
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import tensorboardX

from recalign_jax import __version__
from recalign_jax.files import atomic_file

METRICS_FILE = "metrics.jsonl"
VERSIONS_FILE = "versions.json"
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


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


def versions() -> dict[str, str]:
    """What a run is made with, and on."""
    packages = {name: importlib.metadata.version(name) for name in _PACKAGES}
    device = jax.devices()[0]
    return {"recalign_jax": __version__, "python": platform.python_version(), **packages, "device": device.device_kind}


class RunLog:
    """Writes logged values, in the first process; begins with `records` and forgets what else is there.

    Attributes:
      records: all logged steps.
    """

    def __init__(self, model_dir: str, records: Sequence[dict[str, Any]]):
        self.records = list(records)
        self._file, self._tensorboard = None, None
        if jax.process_index() > 0:
            return
        path = pathlib.Path(model_dir) / METRICS_FILE
        with atomic_file(path) as aside:
            aside.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        with atomic_file(path.with_name(VERSIONS_FILE)) as aside:
            aside.write_text(json.dumps(versions()) + "\n", encoding="utf-8")
        self._file = path.open("a", encoding="utf-8")
        # What is forgotten is hidden from TensorBoard as well, which would show these steps twice.
        following = records[-1]["step"] + 1 if records else 0
        self._tensorboard = tensorboardX.SummaryWriter(model_dir, purge_step=following)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Appends one record and flushes it."""
        self.records.append({"step": step, **values})
        if self._file is None or self._tensorboard is None:
            return
        self._file.write(json.dumps(self.records[-1]) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._tensorboard.add_scalar(name, value, step)
        self._tensorboard.flush()

    def close(self) -> None:
        for file in (self._file, self._tensorboard):
            if file is not None:
                file.close()

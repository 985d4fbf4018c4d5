"""What happens to a row that cannot be used: `--on_error {fail,skip}`."""

import json
import pathlib
from types import TracebackType
from typing import Any

from recalign_jax import errors

ON_ERROR = ("fail", "skip")
_MAX_ROW_CHARACTERS = 10_000


def rejected(path: pathlib.Path, line: int, row: Any, reason: str) -> dict[str, Any]:
    """What is written of a row that cannot be used: JSON."""
    raw = row if isinstance(row, str) else json.dumps(row, ensure_ascii=False, default=str)
    return {"file": path.name, "line": line, "reason": reason, "row": raw[:_MAX_ROW_CHARACTERS]}


class Rejects:
    """Called by sources with each row they cannot use (a `records.Reject`).

    `fail` raises InputError with file and line at the first one. `skip` writes each, with its reason, as one
    JSON object to `path`; `count` is how many there were and `last` describes the latest.
    """

    def __init__(self, on_error: str, path: pathlib.Path):
        self.count = 0
        self.last = ""
        self._file = path.open("w", encoding="utf-8") if on_error == "skip" else None

    def __enter__(self) -> "Rejects":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if self._file:
            self._file.close()

    def __call__(self, path: pathlib.Path, line: int, row: Any, reason: str) -> None:
        self.last = f"{path}, {'row' if path.suffix == '.parquet' else 'line'} {line}: {reason}"
        if self._file is None:
            raise errors.InputError(f"{self.last}. Correct the row, or leave such rows out with --on_error skip.")
        self.count += 1
        self._file.write(json.dumps(rejected(path, line, row, reason)) + "\n")

"""A job in chunks, so that it can be killed at any moment and goes on where it stood.

While it is unfinished, OUTPUT_DIR holds

  unfinished/job.json               what the job is: a run with anything else is another job
  unfinished/000007.jsonl           the answers of chunk 7
  unfinished/000007.rejected.jsonl  its bad rows
  unfinished/000007.done            its counts, and sizes and hashes of both: it is whole

Every file is written aside and renamed, the marker last. When all chunks are there they are put together, in order,
and take their place in OUTPUT_DIR: a file there is always the whole result of one job. Nothing in it depends on when
the job was interrupted, or on who did which chunk.
"""

import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Iterable
from typing import Any

from recalign_jax.errors import InputError
from recalign_jax.files import atomic_file
from recalign_jax.inference import output

JOB_FILE = "job.json"
REJECTED_FILE = "rejected.jsonl"
_UNFINISHED = "unfinished"
Counts = dict[str, int]


def finished(output_dir: pathlib.Path, job: dict[str, Any]) -> Counts | None:
    """The counts of this very job if its results are in OUTPUT_DIR already, else None."""
    told = _read(output_dir / JOB_FILE)
    if told is None or told.get("job") != job or not output.path_of(output_dir, job["output_format"]).is_file():
        return None
    shutil.rmtree(output_dir / _UNFINISHED, ignore_errors=True)
    return told["counts"]


def start(output_dir: pathlib.Path, job: dict[str, Any]) -> None:
    """Makes OUTPUT_DIR ready to begin a job, or to go on with it.

    Raises:
      InputError: another job is unfinished there.
    """
    folder = output_dir / _UNFINISHED
    before = _read(folder / JOB_FILE)
    if before is not None and finished(output_dir, before) is not None:
        before = None  # it was, but for sweeping up
    if before is None:
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / JOB_FILE, json.dumps(job, indent=1))
    elif before != job:
        names = [name for name in sorted({*before, *job}) if before.get(name) != job.get(name)]
        differs = "; ".join(f"{name}: {before.get(name)!r} then, {job.get(name)!r} now" for name in names)
        raise InputError(
            f"{output_dir} holds another job that is unfinished ({differs[:1000]}). Finish that one, delete {folder}, "
            "or give another OUTPUT_DIR."
        )


def done(output_dir: pathlib.Path, num_chunks: int) -> dict[int, Counts]:
    """The counts of the chunks that are there, whole; what is left of others is done again."""
    found = {}
    for number in range(num_chunks):
        marker = _read(_path(output_dir, number, "done"))
        if marker is not None and all(
            _described(_path(output_dir, number, kind)) == marker[kind] for kind in ("jsonl", "rejected.jsonl")
        ):
            found[number] = marker["counts"]
    return found


def write(
    output_dir: pathlib.Path, number: int, rows: Iterable[dict], rejected: Iterable[dict], counts: Counts
) -> None:
    """Puts down a chunk."""
    marker: dict[str, Any] = {"counts": counts}
    for kind, objects in (("jsonl", rows), ("rejected.jsonl", rejected)):
        path = _path(output_dir, number, kind)
        _write(path, "".join(json.dumps(found, ensure_ascii=False) + "\n" for found in objects))
        marker[kind] = _described(path)
    _write(_path(output_dir, number, "done"), json.dumps(marker))


def finish(output_dir: pathlib.Path, job: dict[str, Any], found: dict[int, Counts]) -> Counts:
    """Puts all chunks together; returns the sums of their counts. Other processes may do the same at the same time."""
    counts: Counts = {}
    for of_chunk in found.values():
        for name, value in of_chunk.items():
            counts[name] = counts.get(name, 0) + value
    folder = output_dir / _UNFINISHED
    try:
        results = output.path_of(output_dir, job["output_format"])
        with atomic_file(folder / results.name) as aside:
            output.write(aside, job["output_format"], (_path(output_dir, number, "jsonl") for number in sorted(found)))
        with atomic_file(folder / REJECTED_FILE) as aside, aside.open("wb") as file:
            output.concatenate(file, (_path(output_dir, number, "rejected.jsonl") for number in sorted(found)))
        _write(folder / "result.json", json.dumps({"counts": counts, "job": job}, indent=1) + "\n")
        for name in output.FILES.values():
            if name != results.name:
                (output_dir / name).unlink(missing_ok=True)  # of an earlier job
        # From here to the last rename OUTPUT_DIR tells of no job: a kill in between does these lines again.
        (output_dir / JOB_FILE).unlink(missing_ok=True)
        os.replace(folder / results.name, results)
        os.replace(folder / REJECTED_FILE, output_dir / REJECTED_FILE)
        os.replace(folder / "result.json", output_dir / JOB_FILE)
    except FileNotFoundError:
        if finished(output_dir, job) is None:
            raise
    shutil.rmtree(folder, ignore_errors=True)
    return counts


def _path(output_dir: pathlib.Path, number: int, ending: str) -> pathlib.Path:
    return output_dir / _UNFINISHED / f"{number:06d}.{ending}"


def _described(path: pathlib.Path) -> dict[str, Any] | None:
    """Size and hash of a file, None if it isn't there."""
    try:
        with path.open("rb") as file:
            return {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "bytes": file.tell()}
    except FileNotFoundError:
        return None


def _read(path: pathlib.Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} can't be read ({error}): delete it.") from error


def _write(path: pathlib.Path, text: str) -> None:
    with atomic_file(path) as aside:
        aside.write_text(text, encoding="utf-8")

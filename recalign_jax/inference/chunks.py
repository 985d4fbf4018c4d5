"""A job in chunks, so that it can be killed at any moment and goes on where it stood.

While it is unfinished, OUTPUT_DIR holds

  unfinished/job.json               what the job is: a run with anything else is another job
  unfinished/000007.jsonl           the answers of chunk 7
  unfinished/000007.rejected.jsonl  its bad rows
  unfinished/000007.done            of which job they are, their counts, sizes and hashes: the chunk is whole

Every file is written aside and renamed, the marker last. When all chunks are there they are put together, in order,
and take their place in OUTPUT_DIR: a file there is always the whole result of one job. Nothing in it depends on when
the job was interrupted, on who did which chunk, or on how many put them together at once.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from typing import Any

from recalign_jax.errors import InputError, RunError
from recalign_jax.files import atomic_file
from recalign_jax.inference import output

JOB_FILE = "job.json"
REJECTED_FILE = "rejected.jsonl"
_UNFINISHED = "unfinished"
_SWEPT = f".{_UNFINISHED}."
_KINDS = ("jsonl", "rejected.jsonl")
_MISSING = object()
Counts = dict[str, int]


def finished(output_dir: pathlib.Path, job: dict[str, Any]) -> Counts | None:
    """The counts of this very job if its results are in OUTPUT_DIR already, else None."""
    told = _read(output_dir / JOB_FILE)
    if told is None or told.get("job") != job:
        return None
    files = {"results": output.path_of(output_dir, job["output_format"]), "rejected": output_dir / REJECTED_FILE}
    if any(told.get(name) != _described(path) for name, path in files.items()):
        return None  # killed while those of another job took their place
    if _read(output_dir / _UNFINISHED / JOB_FILE) == job:  # not another one's, which may still be at work
        _remove(output_dir)
    _sweep(output_dir)
    return told["counts"]


def start(output_dir: pathlib.Path, job: dict[str, Any]) -> None:
    """Makes OUTPUT_DIR ready to begin a job, or to go on with it.

    Raises:
      InputError: another job is unfinished there, or the folder can't be written.
    """
    folder = output_dir / _UNFINISHED
    before = _read(folder / JOB_FILE)
    if before is not None and before != job and finished(output_dir, before) is not None:
        before = None  # it was, but for sweeping up
    if before is None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _write(folder / JOB_FILE, json.dumps(job, indent=1))
        except OSError as error:
            raise InputError(f"OUTPUT_DIR {output_dir} can't be written: {error}.") from error
    elif before != job:
        raise InputError(
            f"{output_dir} holds another job that is unfinished: {'; '.join(_differences(before, job))}. Finish that "
            f"one, delete {folder}, or give another OUTPUT_DIR."
        )


def done(output_dir: pathlib.Path, job: dict[str, Any], num_chunks: int) -> dict[int, Counts]:
    """The counts of the job's chunks that are there, whole; what is left of others is done again."""
    found, of_job = {}, _hash(job)
    for number in range(num_chunks):
        try:
            marker = _read(_path(output_dir, number, "done")) or {}
        except InputError:
            continue
        files = {kind: _described(_path(output_dir, number, kind)) for kind in _KINDS}
        if marker.get("job") == of_job and marker["files"] == files:
            found[number] = marker["counts"]
    return found


def write(
    output_dir: pathlib.Path,
    job: dict[str, Any],
    number: int,
    rows: Iterable[dict],
    rejected: Iterable[dict],
    counts: Counts,
) -> None:
    """Puts down a chunk.

    Raises:
      RunError: a score is no finite number.
    """
    try:
        texts = [json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows]
    except ValueError as error:
        raise RunError(f"The model gave a score or rating that is no finite number ({error}): it diverged.") from error
    _write(_path(output_dir, number, "jsonl"), "".join(texts))
    # Bad rows may hold what no UTF-8 file can: it is escaped.
    _write(_path(output_dir, number, "rejected.jsonl"), "".join(json.dumps(found) + "\n" for found in rejected))
    files = {kind: _described(_path(output_dir, number, kind)) for kind in _KINDS}
    _write(_path(output_dir, number, "done"), json.dumps({"job": _hash(job), "counts": counts, "files": files}))


def finish(output_dir: pathlib.Path, job: dict[str, Any], found: dict[int, Counts]) -> Counts:
    """Puts all chunks together; returns the sums of their counts. Others may do the same at the same time."""
    counts: Counts = {}
    for of_chunk in found.values():
        for name, value in of_chunk.items():
            counts[name] = counts.get(name, 0) + value
    results, folder = output.path_of(output_dir, job["output_format"]), output_dir / _UNFINISHED
    try:
        with atomic_file(output_dir / REJECTED_FILE, aside_in=folder) as aside, aside.open("wb") as file:
            output.concatenate(file, (_path(output_dir, number, "rejected.jsonl") for number in sorted(found)))
            file.flush()
            rejected = _described(aside)
        with atomic_file(results, aside_in=folder) as aside:
            output.write(aside, job["output_format"], (_path(output_dir, number, "jsonl") for number in sorted(found)))
            described = _described(aside)
        for name in output.FILES.values():
            if name != results.name:
                (output_dir / name).unlink(missing_ok=True)  # of an earlier job
        with atomic_file(output_dir / JOB_FILE, aside_in=folder) as aside:
            told = {"counts": counts, "results": described, "rejected": rejected, "job": job}
            text = json.dumps(told, indent=1) + "\n"
            aside.write_text(text, encoding="utf-8")
    except FileNotFoundError:
        if finished(output_dir, job) is None:  # another one was faster, and swept up
            raise
    _remove(output_dir)
    return counts


def _differences(before: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    """What two jobs differ in, as `decoding.num_beams: 20 then, 50 now`."""
    for name in sorted({*before, *now}):
        then, after = before.get(name, _MISSING), now.get(name, _MISSING)
        if isinstance(then, dict) and isinstance(after, dict):
            yield from (f"{name}.{difference}" for difference in _differences(then, after))
        elif then is _MISSING or after is _MISSING:  # begun by another version
            yield f"{name}: not known {'then' if then is _MISSING else 'now'}"
        elif then != after:
            yield f"{name}: {_shown(then)} then, {_shown(after)} now"


def _shown(value: Any) -> str:
    """As text, with hashes cut."""
    return re.sub(r"\b([0-9a-f]{12})[0-9a-f]{20,}\b", r"\1...", str(value))


def _remove(output_dir: pathlib.Path) -> None:
    """Takes the chunks away, all at once: half of a job would be taken for one that can go on."""
    if (output_dir / _UNFINISHED).exists():
        with contextlib.suppress(FileNotFoundError):  # another one was faster
            os.rename(output_dir / _UNFINISHED, tempfile.mkdtemp(prefix=_SWEPT, dir=output_dir))
    _sweep(output_dir)


def _sweep(output_dir: pathlib.Path) -> None:
    for aside in output_dir.glob(f"{_SWEPT}*"):
        shutil.rmtree(aside, ignore_errors=True)


def _path(output_dir: pathlib.Path, number: int, ending: str) -> pathlib.Path:
    return output_dir / _UNFINISHED / f"{number:06d}.{ending}"


def _described(path: pathlib.Path) -> dict[str, Any] | None:
    """Size and hash of a file, None if it isn't there."""
    try:
        with path.open("rb") as file:
            return {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "bytes": file.tell()}
    except FileNotFoundError:
        return None


def _hash(job: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(job, sort_keys=True).encode()).hexdigest()


def _read(path: pathlib.Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} can't be read ({error}): delete it.") from error


def _write(path: pathlib.Path, text: str) -> None:
    # No look for what a kill left: the folder goes when all is done, and has a file for every chunk until then.
    with atomic_file(path, aside_in=path.parent) as aside:
        aside.write_text(text, encoding="utf-8")

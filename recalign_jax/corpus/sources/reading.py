"""Streams the rows of TSV, CSV, JSONL (each also as .gz) and Parquet files, with the number of their line.

Memory use does not grow with the file. Blank lines are not rows. What makes a file unusable (missing, not
gzip, a column missing from its header) is an InputError; what makes one row unusable goes to `reject`.
"""

import csv
import json
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from recalign_jax import errors, terminal
from recalign_jax.corpus.records import Reject, RowError, shown
from recalign_jax.corpus.sources.lines import decode, lines_of, printable

Row = dict[str, Any]
Rows = Iterator[tuple[int, Row | RowError]]
T = TypeVar("T")

_ROWS_A_BATCH = 4096


def parse_rows(path: pathlib.Path, rows: Rows, parse: Callable[[Row], T], reject: Reject) -> Iterator[T]:
    """Yields `parse(row)` for each row; what is broken, or what `parse` raises RowError for, goes to `reject`."""
    for line, row in rows:
        if isinstance(row, RowError):
            reject(path, line, row.row, str(row))
            continue
        try:
            parsed = parse(row)
        except RowError as error:
            reject(path, line, row, str(error))
            continue
        yield parsed


def find_table(folder: pathlib.Path, stem: str) -> pathlib.Path:
    """Returns the one file `STEM.{tsv,csv,jsonl,parquet}` or `.gz` of it in the folder; InputError otherwise."""
    if not folder.is_dir():
        raise errors.InputError(f"{folder} is not a folder. Give the folder that holds the raw data with --input.")
    names = [stem + suffix + end for suffix in _ROWS for end in ("", ".gz") if (suffix, end) != (".parquet", ".gz")]
    found = [folder / name for name in names if (folder / name).is_file()]
    if len(found) == 1:
        return found[0]
    if found:
        raise errors.InputError(f"{folder} holds {', '.join(path.name for path in found)}. Leave only one of them.")
    here = ", ".join(sorted(path.name for path in folder.iterdir())[:10]) or "nothing"
    raise errors.InputError(f"{folder} holds no {stem} table. Expected one of: {', '.join(names)}. Found: {here}.")


def table_rows(path: pathlib.Path, required: Sequence[str]) -> Rows:
    """Yields (number of the line, row by column names) for each row of a table, by the ending of its name.

    Raises:
      InputError: the file cannot be read, or its header lacks one of the `required` columns. Lines of JSON have
        no header: there each row is checked by whoever reads its fields.
    """
    name = path.name.removesuffix(".gz")
    return _ROWS[name[name.rindex(".") :]](path, required)


def separated_rows(path: pathlib.Path, separator: str, columns: Sequence[str], encoding: str = "utf-8") -> Rows:
    """Yields the rows of a file without header or quotes, its cells named by `columns`."""
    return _named(columns, _split(path, separator, encoding))


def tsv_rows(path: pathlib.Path, required: Sequence[str]) -> Rows:
    """Yields the rows of a tab-separated file with a header and without quotes, whatever its name."""
    rows = _split(path, "\t", "utf-8")
    return _named(_header(path, rows, required), rows)


def _csv_rows(path: pathlib.Path, required: Sequence[str]) -> Rows:
    rows = _split_quoted(path)
    return _named(_header(path, rows, required), rows)


def _json_rows(path: pathlib.Path, required: Sequence[str]) -> Rows:
    del required
    for line, raw in lines_of(path):
        try:
            yield line, _json_object(raw)
        except RowError as error:
            yield line, error


def _parquet_rows(path: pathlib.Path, required: Sequence[str]) -> Rows:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        message = f"{path} needs pyarrow (`pip install pyarrow`). TSV, CSV and JSONL need nothing more."
        raise errors.InputError(message) from None
    try:
        with parquet.ParquetFile(path) as table:
            _check_columns(path, table.schema_arrow.names, required)
            row_number = 0
            with terminal.progress(f"Reading {path.name}", table.metadata.num_rows, "rows") as advance:
                for batch in table.iter_batches(batch_size=_ROWS_A_BATCH):
                    for row in batch.to_pylist():
                        row_number += 1
                        yield row_number, row
                    advance(batch.num_rows)
    except (OSError, UnicodeDecodeError, pyarrow.ArrowException) as error:
        raise errors.InputError(f"{path} cannot be read as Parquet: {error}.") from None


_ROWS: dict[str, Callable[[pathlib.Path, Sequence[str]], Rows]] = {
    ".tsv": tsv_rows,
    ".csv": _csv_rows,
    ".jsonl": _json_rows,
    ".parquet": _parquet_rows,
}


def _json_object(raw: bytes) -> Row:
    line = decode(raw, "utf-8")
    try:
        row = json.loads(line, parse_constant=_refuse_constant)
        # An escape can spell half a surrogate pair, which no UTF-8 file can hold.
        if "\\u" in line:
            json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise RowError("holds half of a surrogate pair (\\ud800 to \\udfff)", printable(raw)) from None
    except (ValueError, RecursionError) as error:
        raise RowError(f"not JSON: {error}", printable(raw)) from None
    if not isinstance(row, dict):
        raise RowError(f"not a JSON object but {shown(row)}", printable(raw))
    return row


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number")


def _split(path: pathlib.Path, separator: str, encoding: str) -> Iterator[tuple[int, list[str] | RowError]]:
    for line, raw in lines_of(path):
        try:
            yield line, decode(raw, encoding).rstrip("\r\n").split(separator)
        except RowError as error:
            yield line, error


def _split_quoted(path: pathlib.Path) -> Iterator[tuple[int, list[str] | RowError]]:
    """Splits CSV; a row may go over several lines, and has the number of its first one."""
    start: int | None = None

    def lines() -> Iterator[str]:
        nonlocal start
        for line, raw in lines_of(path):
            start = start or line
            # Bytes that are not UTF-8 go through as lone surrogates, and are told from the finished row.
            yield raw.decode("utf-8", "surrogateescape")

    reader = csv.reader(lines(), strict=True)
    while True:
        start = None
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield start or 0, RowError(f"not CSV: {error}")
            continue
        try:
            decode("\n".join(cells).encode("utf-8", "surrogateescape"), "utf-8")
        except RowError as error:
            yield start or 0, error
            continue
        yield start or 0, cells


def _header(path: pathlib.Path, rows: Iterator[tuple[int, list[str] | RowError]], required: Sequence[str]) -> list[str]:
    line, columns = next(rows, (0, None))
    if columns is None:
        raise errors.InputError(f"{path} is empty. Its first line must name the columns: {', '.join(required)}.")
    if isinstance(columns, RowError):
        raise errors.InputError(f"{path}, line {line}: {columns}. The first line must name the columns.")
    _check_columns(path, columns, required)
    return columns


def _check_columns(path: pathlib.Path, columns: Sequence[str], required: Sequence[str]) -> None:
    for column in required:
        if column not in columns:
            found = ", ".join(columns)
            hint = errors.did_you_mean(column, columns)
            raise errors.InputError(f"{path}, line 1: no column {column!r} (found: {found}).{hint}")
    if len(set(columns)) < len(columns):
        raise errors.InputError(f"{path}, line 1: two columns have the same name (found: {', '.join(columns)}).")


def _named(columns: Sequence[str], rows: Iterable[tuple[int, list[str] | RowError]]) -> Rows:
    for line, cells in rows:
        if isinstance(cells, RowError):
            yield line, cells
        elif len(cells) != len(columns):
            yield line, RowError(f"{len(cells)} cells where there are {len(columns)} columns", " | ".join(cells))
        else:
            yield line, dict(zip(columns, cells, strict=True))

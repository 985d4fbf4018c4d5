"""Streams the rows of Parquet files."""

import contextlib
import importlib
import pathlib
from collections.abc import Iterator
from typing import Any

from recalign_jax import errors, terminal
from recalign_jax.corpus.records import RowError

_ROWS_A_BATCH = 4096


def columns_of(path: pathlib.Path) -> list[str]:
    """Returns the names of the columns. Raises InputError if the file cannot be read."""
    with _reader(path) as table:
        return list(table.schema_arrow.names)


def rows_of(path: pathlib.Path, watched: bool = True) -> Iterator[tuple[int, dict[str, Any] | RowError]]:
    """Yields (number of the row from 1, row by column names). Raises InputError if the file cannot be read."""
    row_number = 0
    with _reader(path) as table:
        watch = terminal.progress(f"Reading {path.name}", table.metadata.num_rows, "rows")
        with watch if watched else contextlib.nullcontext(lambda n: None) as advance:
            for batch in table.iter_batches(batch_size=_ROWS_A_BATCH):
                for row in _rows(batch):
                    row_number += 1
                    yield row_number, row
                advance(batch.num_rows)


@contextlib.contextmanager
def _reader(path: pathlib.Path) -> Iterator[Any]:
    try:
        pyarrow = importlib.import_module("pyarrow")
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError:
        message = f"{path} needs pyarrow (`pip install pyarrow`). TSV, CSV and JSONL need nothing more."
        raise errors.InputError(message) from None
    try:
        with parquet.ParquetFile(path) as table:
            yield table
    except (OSError, UnicodeDecodeError, pyarrow.ArrowException) as error:
        raise errors.InputError(f"{path} cannot be read as Parquet: {error}.") from None


def _rows(batch: Any) -> list[dict[str, Any] | RowError]:
    try:
        return batch.to_pylist()
    except (ValueError, OverflowError) as error:
        # Parquet does not check that texts are UTF-8, or that Python has a date for every time: find those rows.
        if batch.num_rows == 1:
            return [RowError(f"cannot be read: {error}")]
        return [row for start in range(batch.num_rows) for row in _rows(batch.slice(start, 1))]

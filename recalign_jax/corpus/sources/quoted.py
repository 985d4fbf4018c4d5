"""Streams the rows of a CSV file with quotes, in which a row may go over several lines."""

import csv
import pathlib
from collections.abc import Iterator

from recalign_jax.corpus.records import RowError
from recalign_jax.corpus.sources.lines import MAX_LINE_BYTES, lines_of, printable


def quoted_rows(path: pathlib.Path, watched: bool = True) -> Iterator[tuple[int, list[str] | RowError]]:
    """Yields (number of its first line, cells) for each row. Arguments and errors as `lines_of`.

    Bytes that are not UTF-8 stand in the cells as lone surrogates (`surrogateescape`): they are a fault of their
    row, and reading goes on after it. A quote that is never closed swallows rows up to the limit of a cell
    (128 KiB); they are one bad row, and the next line starts a new one.
    """
    lines = lines_of(path, watched)
    row: list[bytes] = []  # the lines of the row that is being read
    start = size = 0
    fault: RowError | None = None
    ended = False

    def texts() -> Iterator[str]:
        """Ends with the file, and at what no row may hold: the reader is then started anew."""
        nonlocal start, size, fault, ended
        for line, raw in lines:
            start = start or line
            if isinstance(raw, RowError):
                fault = raw
                return
            row.append(raw)
            size += len(raw)
            if size > MAX_LINE_BYTES:
                fault = RowError(f"is a row of more than {MAX_LINE_BYTES >> 20} MiB")
                return
            yield raw.decode("utf-8", "surrogateescape")
        ended = True

    reader = csv.reader(texts(), strict=True)
    while True:
        row.clear()
        start, size, fault = 0, 0, None
        cells: list[str] | None = None
        try:
            cells = next(reader, None)
        except csv.Error as error:
            fault = fault or RowError(f"not CSV: {error}")
        if fault is not None:
            shown = fault.row or printable(b"".join(row)[:1000])
            yield start, RowError(str(fault), shown)
            reader = csv.reader(texts(), strict=True)
        elif cells is not None:
            yield start, cells
        if ended and cells is None:
            return

"""Tables from TSV, CSV, JSONL (each also as .gz) and Parquet files, and the one way to go through a table.

Memory use does not grow with the file. Blank lines are not rows. What makes a file unusable (missing, not
gzip, a column missing from its header) is an InputError; what makes one row unusable goes to `reject`.
"""

import dataclasses
import functools
import itertools
import json
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from recalign_jax import errors
from recalign_jax.corpus.records import Item, Raw, Record, Reject, RowError, Table, shown
from recalign_jax.corpus.sources import parquet
from recalign_jax.corpus.sources.lines import decode, lines_of, printable
from recalign_jax.corpus.sources.quoted import quoted_rows

Row = dict[str, Any]
Rows = Iterator[tuple[int, Raw | RowError]]
# Names of tables end like this; all but Parquet also in `.gz`.
ENDINGS = (".tsv", ".csv", ".jsonl", ".parquet")


def parse_table(table: Table[Record], reject: Reject) -> Iterator[tuple[int, Record]]:
    """Yields (number of the line, record) for each good row, in order, and gives the others to `reject`."""
    for line, row in table.rows():
        record = parse_row(table.parse, row)
        if isinstance(record, RowError):
            reject(table.path, line, record.row, str(record))
        else:
            yield line, record


def parse_row(parse: Callable[[Any], Record], row: Raw | RowError) -> Record | RowError:
    """Returns the record, or a RowError whose `row` is what a person can read of the row."""
    if isinstance(row, RowError):
        return row
    try:
        return parse(row)
    except RowError as error:
        error.row = printable(row) if isinstance(row, bytes) else row
        return error


def distinct_items(path: pathlib.Path, items: Iterable[tuple[int, Item]], reject: Reject) -> Iterator[Item]:
    """Yields each item once: of several rows with the same id the first stands, the others go to `reject`.

    Args:
      path: of the table.
      items: (number of the line, item), in order.
      reject: called with the items that were there before.
    """
    seen: set[str] = set()
    for line, item in items:
        if item.item_id in seen:
            row = {"item_id": item.item_id, **dataclasses.asdict(item.text)}
            reject(path, line, row, f"item {item.item_id!r} is there twice")
        else:
            seen.add(item.item_id)
            yield item


def first_record(table: Table[Record]) -> Record | None:
    """Returns the first good record of a table, if it has one."""
    return next((record for _, record in parse_table(table, lambda *rejected: None)), None)


def check_ending(path: pathlib.Path) -> None:
    """Raises InputError when a file's name doesn't say what kind of table it is."""
    if not path.name.removesuffix(".gz").endswith(ENDINGS):
        raise errors.InputError(f"{path} is no table: its name ends in none of {', '.join(ENDINGS)}.")


def open_table(
    path: pathlib.Path, required: Sequence[str], record: Callable[[Row], Record], watched: bool = True
) -> Table[Record]:
    """Returns a table by the ending of its name.

    Args:
      path: a file with one of ENDINGS, perhaps with `.gz` after it.
      required: columns that the header must have. Lines of JSON have no header: there `record` sees what is missing.
      record: turns a row, by column names, into a record; can be pickled.
      watched: show progress while it is read.

    Raises:
      InputError: the file cannot be read, or its header lacks a required column or has one twice.
    """
    name = path.name.removesuffix(".gz")
    if name.endswith(".parquet"):
        check_columns(path, parquet.columns_of(path), required)
        return Table(path, functools.partial(parquet.rows_of, path, watched), record)
    if name.endswith(".jsonl"):
        return json_table(path, record, watched)
    if name.endswith(".csv"):
        return csv_table(path, required, record, watched)
    return tsv_table(path, required, record, watched)


def json_table(path: pathlib.Path, record: Callable[[Row], Record], watched: bool = True) -> Table[Record]:
    """Returns a table of one JSON object a line."""
    return line_table(path, json_object, record, watched)


def line_table(
    path: pathlib.Path, row_of: Callable[[bytes], Row], record: Callable[[Row], Record], watched: bool = True
) -> Table[Record]:
    """Returns a table of one row a line, which `row_of` reads."""
    return Table(path, functools.partial(lines_of, path, watched), functools.partial(_from_line, row_of, record))


def csv_table(
    path: pathlib.Path, required: Sequence[str], record: Callable[[Row], Record], watched: bool = True
) -> Table[Record]:
    """Returns a comma-separated table with a header, whatever its name. Raises InputError for a bad header."""
    columns = _header(path, quoted_rows(path, watched=False), _checked, required)
    rows = functools.partial(_after_header, quoted_rows, path, watched)
    return Table(path, rows, functools.partial(_from_cells, columns, _checked, record))


def tsv_table(
    path: pathlib.Path, required: Sequence[str], record: Callable[[Row], Record], watched: bool = True
) -> Table[Record]:
    """Returns a tab-separated table with a header and without quotes, whatever its name."""
    split = functools.partial(_split, "\t", "utf-8")
    columns = _header(path, lines_of(path, watched=False), split, required)
    rows = functools.partial(_after_header, lines_of, path, watched)
    return Table(path, rows, functools.partial(_from_cells, columns, split, record))


def separated_table(
    path: pathlib.Path,
    separator: str,
    columns: Sequence[str],
    record: Callable[[Row], Record],
    encoding: str = "utf-8",
) -> Table[Record]:
    """Returns a table without header or quotes, its cells named by `columns`."""
    split = functools.partial(_split, separator, encoding)
    return Table(path, functools.partial(lines_of, path), functools.partial(_from_cells, columns, split, record))


def check_columns(path: pathlib.Path, columns: Sequence[str], required: Sequence[str]) -> None:
    """Raises InputError if a required column is missing, or one is there twice."""
    for column in required:
        if column not in columns:
            found = ", ".join(columns)
            hint = errors.did_you_mean(column, [one for one in columns if one not in required])
            raise errors.InputError(f"{path}, line 1: no column {column!r} (found: {found}).{hint}")
    if len(set(columns)) < len(columns):
        raise errors.InputError(f"{path}, line 1: two columns have the same name (found: {', '.join(columns)}).")


def json_object(raw: bytes) -> Row:
    """Returns the JSON object of a line; RowError if it is something else, or can't be written as UTF-8."""
    line = decode(raw, "utf-8")
    try:
        row = json.loads(line, parse_constant=_refuse_constant)
        # An escape can spell half a surrogate pair, which no UTF-8 file can hold.
        if "\\u" in line:
            json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise RowError("holds half of a surrogate pair (\\ud800 to \\udfff)") from None
    except (ValueError, RecursionError) as error:
        raise RowError(f"not JSON: {error}") from None
    if not isinstance(row, dict):
        raise RowError(f"not a JSON object but {shown(row)}")
    return row


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number")


def _from_line(row_of: Callable[[bytes], Row], record: Callable[[Row], Record], raw: bytes) -> Record:
    return record(row_of(raw))


def _from_cells(
    columns: Sequence[str], cells_of: Callable[[Any], list[str]], record: Callable[[Row], Record], raw: Raw
) -> Record:
    cells = cells_of(raw)
    if len(cells) != len(columns):
        raise RowError(f"{len(cells)} cells where there are {len(columns)} columns")
    return record(dict(zip(columns, cells, strict=False)))


def _split(separator: str, encoding: str, raw: bytes) -> list[str]:
    return decode(raw, encoding).rstrip("\r\n").split(separator)


def _checked(cells: list[str]) -> list[str]:
    decode("\n".join(cells).encode("utf-8", "surrogateescape"), "utf-8")
    return cells


def _header(path: pathlib.Path, rows: Rows, cells_of: Callable[[Any], list[str]], required: Sequence[str]) -> list[str]:
    line, row = next(rows, (0, None))
    if row is None:
        raise errors.InputError(f"{path} is empty. Its first line must name the columns: {', '.join(required)}.")
    try:
        if isinstance(row, RowError):
            raise row
        columns = cells_of(row)
    except RowError as error:
        raise errors.InputError(f"{path}, line {line}: {error}. The first line must name the columns.") from None
    check_columns(path, columns, required)
    return columns


def _after_header(rows_of: Callable[[pathlib.Path, bool], Rows], path: pathlib.Path, watched: bool) -> Rows:
    return itertools.islice(rows_of(path, watched), 1, None)

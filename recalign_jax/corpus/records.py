"""What every source yields, and how raw values become it.

A source says where the raw rows are and how one becomes an `Interaction` or an `Item`. Reading rows is
sequential; parsing one is a pure, picklable function of that row alone, which raises a `RowError` that says what
is wrong with it, so that rows can be parsed anywhere, in any order. `sources.reading` adds the file and the line.
Text is cleaned here, once, so that every reader of a corpus (prompts, targets, vocabulary) sees the same text.
"""

import datetime
import decimal
import functools
import html
import math
import pathlib
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np

_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_INTEGER = re.compile(r"[+-]?\d{1,19}", re.ASCII)
# No entity is longer; Python does not read numbers of any length.
_ENTITY = re.compile(r"&(#\d{1,9}|#[xX][0-9a-fA-F]{1,9}|[a-zA-Z][a-zA-Z0-9]{0,50});")
_EARLIEST, _LATEST = 631_152_000, 4_133_980_799  # 1990-01-01 and the last second of 2100
_MAX_DIGITS = 100
_FLOAT_WHOLE = 2**53  # beyond it not every whole number is a float
_INT64 = np.iinfo(np.int64)
_FLOAT32_MAX = float(np.finfo(np.float32).max)


class Interaction(NamedTuple):
    """One user met one item. `rating` is None in a corpus without ratings."""

    user_id: str
    item_id: str
    timestamp: int
    rating: float | None


@dataclass(frozen=True)
class ItemText:
    """The text of one item, cleaned. Empty (or None) where nothing is known."""

    title: str = ""
    categories: tuple[str, ...] = ()
    brand: str = ""
    price: float | None = None
    extra: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_empty(self) -> bool:
        """Whether nothing is known that a prompt could show, as it never shows `extra`."""
        return not (self.title or self.categories or self.brand) and self.price is None


class Item(NamedTuple):
    """One row of an items table."""

    item_id: str
    text: ItemText


class RowError(ValueError):
    """A row that cannot be used. `row` is what can be shown of it: text, or what JSON can hold."""

    def __init__(self, reason: str, row: Any = ""):
        super().__init__(reason)
        self.row = row


# A row as it is read: a line, the cells of a CSV row, a row of Parquet. All can be pickled.
Raw = bytes | list[str] | dict[str, Any]
Record = TypeVar("Record")


class Table(NamedTuple, Generic[Record]):
    """One raw file.

    Attributes:
      path: the file.
      rows: starts a pass over the file, from its first row: (number of the line, row); RowError in place of a row
        that cannot be told from its neighbours. Shows progress. Raises InputError if the file cannot be read.
      parse: turns a row into a record, or raises RowError. Pure and picklable.
    """

    path: pathlib.Path
    rows: Callable[[], Iterator[tuple[int, Raw | RowError]]]
    parse: Callable[[Any], Record]


class Source(NamedTuple):
    """An opened folder of raw data.

    Attributes:
      files: all files that were or will be read.
      interactions: the tables of interactions, in the order that stands for the order of the file.
      items: the table of items. It may name an item twice: the first row stands.
    """

    files: list[pathlib.Path]
    interactions: list[Table[Interaction]]
    items: Table[Item]


# What a source calls for each row that it cannot use: (file, number of the line, the row, reason).
Reject = Callable[[pathlib.Path, int, Any, str], None]


def shown(value: object) -> str:
    """Returns `repr(value)`, cut to what fits in a message."""
    try:
        text = repr(value)
    except ValueError:  # Python does not write numbers of any length
        return "a number of thousands of digits"
    return text if len(text) <= 60 else text[:57] + "..."


def get(row: Mapping[str, Any], column: str) -> Any:
    """Returns the cell of a column; RowError if the row lacks it."""
    if column not in row:
        raise RowError(f"no field {column!r} (found: {', '.join(map(str, row))[:500] or 'none'})")
    return row[column]


def identifier(value: object, column: str) -> str:
    """Returns a user or item id as text (whole numbers are allowed); RowError if empty or of another type.

    White space at its ends is no part of an id, as files of ids have it that were made by hand.
    """
    if not isinstance(value, str):
        # A column with gaps has 7.0 for 7, and databases write whole numbers as decimals.
        if isinstance(value, (float, decimal.Decimal)) and _is_whole(value):
            value = int(value)
        if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() <= 64:
            return str(value)
        raise RowError(f"{column} must be text or a whole number of 64 bits, not {shown(value)}")
    value = value.strip()
    if not value:
        raise RowError(f"{column} is empty")
    if "\0" in value:
        raise RowError(f"{column} holds a NUL byte: {shown(value)}")
    return value


def _is_whole(value: float | decimal.Decimal) -> bool:
    return math.isfinite(value) and -_FLOAT_WHOLE < value < _FLOAT_WHOLE and value == int(value)


def number(value: object, column: str) -> float:
    """Returns a finite number that fits float32; RowError otherwise (NaN and infinity included)."""
    if isinstance(value, str) and len(value) <= _MAX_DIGITS:
        value = _number_of(value)
    value = float(value) if isinstance(value, decimal.Decimal) else value
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise RowError(f"{column} is not a number: {shown(value)}")
    if not -_FLOAT32_MAX <= value <= _FLOAT32_MAX:
        raise RowError(f"{column} is not a finite number that fits 32 bits: {shown(value)}")
    return float(value)


def rating_text(rating: float) -> str:
    """A rating as it is written and read, as "4" or "3.5": the fewest digits that tell it from others in float32."""
    return np.format_float_positional(np.float32(rating), trim="-")


@functools.lru_cache(maxsize=4096)  # ratings have few values
def _number_of(text: str) -> float | str:
    """Returns the number that a text spells, else the text."""
    stripped = text.strip()  # `float` itself strips less
    return float(stripped) if _NUMBER.fullmatch(stripped) else text


def whole_number(value: object, column: str) -> int:
    """Returns an integer of 64 bits, as timestamps are; RowError otherwise."""
    if isinstance(value, str):
        if len(value) < 19 and value.isdigit() and value.isascii():
            return int(value)
        stripped = value.strip()
        if _INTEGER.fullmatch(stripped):
            value = int(stripped)
        elif len(value) <= _MAX_DIGITS and _NUMBER.fullmatch(stripped):
            value = float(stripped)
    if isinstance(value, datetime.date):
        raise RowError(f"{column} is a date, not a Unix time: write it as seconds since 1970, not {shown(value)}")
    if isinstance(value, decimal.Decimal):
        value = int(value) if _is_whole(value) else float(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise RowError(f"{column} is not a number: {shown(value)}")
    if not _INT64.min <= value <= _INT64.max:
        raise RowError(f"{column} is not a finite number that fits 64 bits: {shown(value)}")
    if value != int(value):
        raise RowError(f"{column} must be a whole number (seconds, milliseconds, ...), not {shown(value)}")
    return int(value)


def check_range(value: float, column: str, lowest: float, highest: float) -> None:
    """Raises RowError for a value out of the range, which includes both ends."""
    if not lowest <= value <= highest:
        raise RowError(f"{column} must be from {lowest:g} to {highest:g}, not {value:g}")


def check_time(value: int, column: str, unit: int = 1) -> None:
    """Raises RowError for a Unix time before 1990 or after 2100; `unit` is how many of its steps are a second."""
    if not _EARLIEST <= value // unit <= _LATEST:
        raise RowError(f"{column} must be a Unix time from 1990 to 2100, not {value}")


def text(value: object, column: str) -> str:
    """Returns cleaned text, empty if there is none; RowError if the value is not text."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise RowError(f"{column} must be text, not {shown(value)}")
    return clean_text(value)


def texts(value: object, column: str) -> tuple[str, ...]:
    """Returns a list of cleaned, non-empty texts, from a list or from one cell with `|` between them."""
    if value is None:
        return ()
    if isinstance(value, str):
        value = value.split("|")
    if not isinstance(value, (list, tuple)):
        raise RowError(f"{column} must be a list of texts, not {shown(value)}")
    cleaned = (text(part, f"each of {column}") for part in value)
    return tuple(part for part in cleaned if part)


def clean_text(raw: str) -> str:
    """Resolves HTML entities, drops control characters (NUL included) and collapses white space."""
    if "&" in raw:
        raw = _ENTITY.sub(lambda entity: html.unescape(entity[0]), raw)
    if not raw.isprintable():
        raw = "".join(c for c in raw if c.isspace() or unicodedata.category(c) not in ("Cc", "Cs"))
    return " ".join(raw.split())

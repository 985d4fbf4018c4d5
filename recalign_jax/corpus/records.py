"""What every source yields, and how raw values become it.

A source turns each raw row into an `Interaction` or an `Item`, or raises a `RowError` that says what is wrong
with the row; `sources.reading` adds the file and the line. Text is cleaned here, once, so that every reader of
a corpus (prompts, targets, vocabulary) sees the same text.
"""

import html
import pathlib
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_INTEGER = re.compile(r"[+-]?\d{1,19}", re.ASCII)
_ENTITY = re.compile(r"&(#\d+|#[xX][0-9a-fA-F]+|[a-zA-Z][a-zA-Z0-9]*);")
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


class Item(NamedTuple):
    """One row of an items table."""

    item_id: str
    text: ItemText


class Source(NamedTuple):
    """An opened folder of raw data. Both iterators stream, and may be read once, interactions first."""

    files: list[pathlib.Path]
    interactions: Iterator[Interaction]
    items: Iterator[Item]


class RowError(ValueError):
    """A row that cannot be used. `row` is its raw text where parsing it into cells already failed."""

    def __init__(self, reason: str, row: str = ""):
        super().__init__(reason)
        self.row = row


# What a source calls for each row that it cannot use: (file, number of the line, the row, reason).
Reject = Callable[[pathlib.Path, int, Any, str], None]


def shown(value: object) -> str:
    """Returns `repr(value)`, cut to what fits in a message."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def get(row: Mapping[str, Any], column: str) -> Any:
    """Returns the cell of a column; RowError if the row lacks it."""
    if column not in row:
        raise RowError(f"no field {column!r} (found: {', '.join(map(str, row)) or 'none'})")
    return row[column]


def identifier(value: object, column: str) -> str:
    """Returns a user or item id as text (whole numbers are allowed); RowError if empty or of another type."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise RowError(f"{column} must be text or a whole number, not {shown(value)}")
    if not value.strip():
        raise RowError(f"{column} is empty")
    if "\0" in value:
        raise RowError(f"{column} holds a NUL byte: {shown(value)}")
    return value


def number(value: object, column: str) -> float:
    """Returns a finite number that fits float32; RowError otherwise (NaN and infinity included)."""
    if isinstance(value, str) and _NUMBER.fullmatch(value.strip()):
        value = float(value.strip())  # `float` itself strips less
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise RowError(f"{column} is not a number: {shown(value)}")
    if not -_FLOAT32_MAX <= value <= _FLOAT32_MAX:
        raise RowError(f"{column} is not a finite number that fits 32 bits: {shown(value)}")
    return float(value)


def whole_number(value: object, column: str) -> int:
    """Returns an integer of 64 bits, as timestamps are; RowError otherwise."""
    if isinstance(value, str):
        value = value.strip()
        if _INTEGER.fullmatch(value):
            value = int(value)
        elif _NUMBER.fullmatch(value):
            value = float(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise RowError(f"{column} is not a number: {shown(value)}")
    if not _INT64.min <= value <= _INT64.max:
        raise RowError(f"{column} is not a finite number that fits 64 bits: {shown(value)}")
    if value != int(value):
        raise RowError(f"{column} must be a whole number (seconds, milliseconds, ...), not {shown(value)}")
    return int(value)


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


def distinct(parse: Callable[[dict[str, Any]], Item]) -> Callable[[dict[str, Any]], Item]:
    """Returns `parse` with a memory: RowError for an item id that it gave before."""
    seen: set[str] = set()

    def parse_new(row: dict[str, Any]) -> Item:
        item = parse(row)
        if item.item_id in seen:
            raise RowError(f"item {item.item_id!r} is there twice")
        seen.add(item.item_id)
        return item

    return parse_new


def clean_text(raw: str) -> str:
    """Resolves HTML entities, drops control characters (NUL included) and collapses white space."""
    if "&" in raw:
        raw = _ENTITY.sub(lambda entity: html.unescape(entity[0]), raw)
    if not raw.isprintable():
        raw = "".join(c for c in raw if c.isspace() or unicodedata.category(c) not in ("Cc", "Cs"))
    return " ".join(raw.split())

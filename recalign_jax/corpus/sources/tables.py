"""The generic table form: a shop's own `interactions.*` and `items.*`.

interactions: user_id, item_id, timestamp (a whole number of any unit) and, if there is one, rating. Either every
row has a rating or none has. items: item_id and, where known, title, categories (a list, or one cell with `|`
between them), brand, price, and any other column of text, which is kept under its name.
"""

import functools
import pathlib
from typing import NamedTuple

from recalign_jax import errors
from recalign_jax.corpus import records
from recalign_jax.corpus.records import Interaction, Item, ItemText, RowError, Source, Table
from recalign_jax.corpus.sources import folders, reading


class Columns(NamedTuple):
    """The names of the columns. None takes the column of the usual name (`rating`, `title`, ...) if there is one."""

    user: str = "user_id"
    item: str = "item_id"
    timestamp: str = "timestamp"
    rating: str | None = None
    title: str | None = None
    categories: str | None = None
    brand: str | None = None
    price: str | None = None


_TEXT_COLUMNS = ("title", "categories", "brand", "price")
DEFAULT_COLUMNS = Columns()


def open_folder(
    folder: pathlib.Path, columns: Columns = DEFAULT_COLUMNS, rating_range: tuple[float, float] | None = None
) -> Source:
    """Opens the tables of a folder.

    Args:
      folder: holds one `interactions.*` and one `items.*`.
      columns: the names of the columns.
      rating_range: the lowest and highest rating there can be; rows out of it are rejected.

    Raises:
      InputError: a table is missing, or lacks a column.
    """
    interactions, items = _table(folder, "interactions"), _table(folder, "items")
    return Source(
        files=[interactions, items],
        interactions=[_interactions(interactions, columns, rating_range)],
        items=items_table(items, columns),
    )


def _table(folder: pathlib.Path, stem: str) -> pathlib.Path:
    names = [stem + ending for ending in reading.ENDINGS]
    names += [f"{name}.gz" for name in names if not name.endswith(".parquet")]
    return folders.one_of(folder, names, f"{stem} table")


def _interactions(path: pathlib.Path, columns: Columns, rating_range: tuple[float, float] | None) -> Table[Interaction]:
    required = [name for name in (columns.user, columns.item, columns.timestamp, columns.rating) if name is not None]
    record = functools.partial(_interaction, columns, rating_range)
    # Whether the corpus has ratings is what its first good row says.
    first = reading.first_record(reading.open_table(path, required, functools.partial(record, None), watched=False))
    rated = first is not None and first.rating is not None
    return reading.open_table(path, required, functools.partial(record, rated or columns.rating is not None))


def _interaction(
    columns: Columns, rating_range: tuple[float, float] | None, rated: bool | None, row: reading.Row
) -> Interaction:
    user = records.identifier(records.get(row, columns.user), columns.user)
    item = records.identifier(records.get(row, columns.item), columns.item)
    timestamp = records.whole_number(records.get(row, columns.timestamp), columns.timestamp)
    name = columns.rating or "rating"
    cell = records.get(row, name) if columns.rating else row.get(name)
    if cell is None or cell == "":
        if rated:
            raise RowError(f"{name} is empty")
        return Interaction(user, item, timestamp, None)
    rating = records.number(cell, name)
    if rating_range is not None:
        records.check_range(rating, name, *rating_range)
    if rated is False:
        raise RowError(f"has a {name}, but rows before it have none")
    return Interaction(user, item, timestamp, rating)


def items_table(path: pathlib.Path, columns: Columns = DEFAULT_COLUMNS) -> Table[Item]:
    """Opens a table of items. Raises InputError if it cannot be read or lacks a column."""
    named = [name for name in (getattr(columns, kind) for kind in _TEXT_COLUMNS) if name is not None]
    table = reading.open_table(path, [columns.item, *named], functools.partial(_item, columns))
    if named:
        _check_some_row_has(path, columns, named)
    return table


def _check_some_row_has(path: pathlib.Path, columns: Columns, named: list[str]) -> None:
    """Lines of JSON have no header, and may leave out what they don't know; but some row must have the column.

    Reads on until every column was seen: as a rule in the first rows.
    """
    rows = reading.parse_table(reading.open_table(path, [columns.item], dict, watched=False), lambda *rejected: None)
    found: dict[str, None] = {}  # in the order in which they are met
    for _, row in rows:
        found |= dict.fromkeys(row)
        if found.keys() >= set(named):
            return
    for name in named:
        if found and name not in found:
            hint = errors.did_you_mean(name, found)
            raise errors.InputError(f"{path}: no row has a field {name!r} (found: {', '.join(found)}).{hint}")


def _item(columns: Columns, row: reading.Row) -> Item:
    item = records.identifier(records.get(row, columns.item), columns.item)
    names = {kind: getattr(columns, kind) or kind for kind in _TEXT_COLUMNS}
    price = row.get(names["price"])
    known = {columns.item, *names.values()}
    extra = {
        name: records.clean_text(value) for name, value in row.items() if name not in known and isinstance(value, str)
    }
    text = ItemText(
        title=records.text(row.get(names["title"]), names["title"]),
        categories=records.texts(row.get(names["categories"]), names["categories"]),
        brand=records.text(row.get(names["brand"]), names["brand"]),
        price=None if price is None or price == "" else records.number(price, names["price"]),
        extra={name: value for name, value in extra.items() if value},
    )
    return Item(item, text)

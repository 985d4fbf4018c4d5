"""The generic table form: a shop's own `interactions.*` and `items.*`.

interactions: user_id, item_id, timestamp (a whole number of any unit) and, if there is one, rating. Either every
row has a rating or none has. items: item_id and, where known, title, categories (a list, or one cell with `|`
between them), brand, price, and any other column of text, which is kept under its name.
"""

import pathlib
from collections.abc import Iterator
from typing import NamedTuple

from recalign_jax.corpus import records
from recalign_jax.corpus.records import Interaction, Item, ItemText, Reject, RowError, Source
from recalign_jax.corpus.sources import reading


class Columns(NamedTuple):
    """The names of the columns. `rating=None` takes a column `rating` if there is one."""

    user: str = "user_id"
    item: str = "item_id"
    timestamp: str = "timestamp"
    rating: str | None = None


DEFAULT_COLUMNS = Columns()


def open_folder(folder: pathlib.Path, reject: Reject, columns: Columns = DEFAULT_COLUMNS) -> Source:
    """Opens the tables of a folder. Raises InputError if one is missing, or lacks a column."""
    interactions = reading.find_table(folder, "interactions")
    items = reading.find_table(folder, "items")
    return Source(
        files=[interactions, items],
        interactions=_interactions(interactions, columns, reject),
        items=_items(items, columns, reject),
    )


def _interactions(path: pathlib.Path, columns: Columns, reject: Reject) -> Iterator[Interaction]:
    required = [name for name in columns if name is not None]
    rating_column = columns.rating or "rating"
    rated: bool | None = None  # decided by the first row

    def parse(row: reading.Row) -> Interaction:
        nonlocal rated
        user = records.identifier(records.get(row, columns.user), columns.user)
        item = records.identifier(records.get(row, columns.item), columns.item)
        timestamp = records.whole_number(records.get(row, columns.timestamp), columns.timestamp)
        cell = records.get(row, rating_column) if columns.rating else row.get(rating_column)
        if cell is None or cell == "":
            if rated or columns.rating:
                raise RowError(f"{rating_column} is empty")
            rating = None
        else:
            rating = records.number(cell, rating_column)
            if rated is False:
                raise RowError(f"has a {rating_column}, but rows before it have none")
        rated = rating is not None
        return Interaction(user, item, timestamp, rating)

    return reading.parse_rows(path, reading.table_rows(path, required), parse, reject)


def _items(path: pathlib.Path, columns: Columns, reject: Reject) -> Iterator[Item]:
    known = {columns.item, "title", "categories", "brand", "price"}

    def parse(row: reading.Row) -> Item:
        item = records.identifier(records.get(row, columns.item), columns.item)
        price = row.get("price")
        extra = {
            name: records.clean_text(value)
            for name, value in row.items()
            if name not in known and isinstance(value, str)
        }
        text = ItemText(
            title=records.text(row.get("title"), "title"),
            categories=records.texts(row.get("categories"), "categories"),
            brand=records.text(row.get("brand"), "brand"),
            price=None if price is None or price == "" else records.number(price, "price"),
            extra={name: value for name, value in extra.items() if value},
        )
        return Item(item, text)

    return reading.parse_rows(path, reading.table_rows(path, [columns.item]), records.distinct(parse), reject)

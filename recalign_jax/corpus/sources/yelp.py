"""Yelp's academic dataset: `yelp_academic_dataset_review.json` and `yelp_academic_dataset_business.json`.

Both hold one JSON object a line, plain or gzip. An interaction is a review; its time is the review's `date`, which
has no time zone and is taken as UTC. The text of a business is its name, its categories, and city and state as
further fields.
"""

import datetime
import pathlib

from recalign_jax.corpus import records
from recalign_jax.corpus.records import Interaction, Item, ItemText, RowError, Source
from recalign_jax.corpus.sources import folders, reading

_REVIEWS = "yelp_academic_dataset_review.json"
_BUSINESSES = "yelp_academic_dataset_business.json"
_DATE = "%Y-%m-%d %H:%M:%S"


def open_folder(folder: pathlib.Path) -> Source:
    """Opens a folder with the reviews and businesses. Raises InputError if one of them is missing."""
    reviews = folders.plain_or_gzip(folder, _REVIEWS, "reviews of Yelp")
    businesses = folders.plain_or_gzip(folder, _BUSINESSES, "businesses of Yelp")
    return Source(
        files=[reviews, businesses],
        interactions=[reading.json_table(reviews, _interaction)],
        items=reading.json_table(businesses, _item),
    )


def _interaction(row: reading.Row) -> Interaction:
    rating = records.number(records.get(row, "stars"), "stars")
    records.check_range(rating, "stars", 1, 5)
    timestamp = _timestamp(records.get(row, "date"))
    records.check_time(timestamp, "date")
    return Interaction(
        records.identifier(records.get(row, "user_id"), "user_id"),
        records.identifier(records.get(row, "business_id"), "business_id"),
        timestamp,
        rating,
    )


def _timestamp(date: object) -> int:
    try:
        time = datetime.datetime.strptime(str(date), _DATE)
    except ValueError:
        raise RowError(f"date must be like 2018-07-07 22:09:11, not {records.shown(date)}") from None
    return int(time.replace(tzinfo=datetime.UTC).timestamp())


def _item(row: reading.Row) -> Item:
    categories = records.text(row.get("categories"), "categories")
    names = (name.strip() for name in categories.split(","))
    extra = {column: records.text(row.get(column), column) for column in ("city", "state")}
    text = ItemText(
        title=records.text(row.get("name"), "name"),
        categories=tuple(dict.fromkeys(name for name in names if name)),
        extra={column: value for column, value in extra.items() if value},
    )
    return Item(records.identifier(records.get(row, "business_id"), "business_id"), text)

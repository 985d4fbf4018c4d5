"""Amazon reviews and metadata as McAuley's group publishes them: one domain, such as Beauty, a folder.

    2014  reviews_X_5.json, meta_X.json      JSON lines, and lines that are Python literals
    2018  X_5.json, meta_X.json              JSON lines
    2023  X.jsonl, meta_X.jsonl              JSON lines; times in milliseconds
    2023  X.csv, meta_X.jsonl                the rating-only 5-core, or X.train.csv, X.valid.csv and X.test.csv

Each may also be a `.gz`, and the `_5` of 2014 and 2018 (the published 5-core) may be missing. Kept of an item: title,
categories, brand (2023: store) and price. Times stay in the unit of the dump.
"""

import functools
import pathlib
import re
from collections.abc import Callable
from typing import NamedTuple

from recalign_jax import errors
from recalign_jax.corpus import records
from recalign_jax.corpus.records import Interaction, Item, Source, Table
from recalign_jax.corpus.sources import amazon_metadata, folders, reading


class _Layout(NamedTuple):
    """Names of the files, without `.gz`, and of the columns; `unit`: how many of its times are a second."""

    name: str
    reviews: re.Pattern[str]
    metadata: str
    user: str
    item: str
    rating: str
    timestamp: str
    unit: int


_OLD_COLUMNS = ("reviewerID", "asin", "overall", "unixReviewTime", 1)
_NEW_COLUMNS = ("user_id", "parent_asin", "rating", "timestamp", 1000)
# The first that fits a name counts.
_LAYOUTS = (
    _Layout("2014", re.compile(r"reviews_(?P<domain>\w+?)(_5)?\.json"), "meta_{}.json", *_OLD_COLUMNS),
    _Layout("2018", re.compile(r"(?!meta_)(?P<domain>\w+?)(_5)?\.json"), "meta_{}.json", *_OLD_COLUMNS),
    _Layout("2023", re.compile(r"(?!meta_)(?P<domain>\w+)\.jsonl"), "meta_{}.jsonl", *_NEW_COLUMNS),
    _Layout("2023 split", re.compile(r"(?P<domain>\w+)\.(train|valid|test)\.csv"), "meta_{}.jsonl", *_NEW_COLUMNS),
    _Layout("2023 ratings", re.compile(r"(?P<domain>\w+)\.csv"), "meta_{}.jsonl", *_NEW_COLUMNS),
)
_SPLITS = ("train", "valid", "test")
_EXPECTED = "reviews_X_5.json (2014), X_5.json (2018), X.jsonl or X.csv (2023), each also as .gz"


def open_folder(folder: pathlib.Path) -> Source:
    """Opens a folder with the dump of one domain.

    Raises:
      InputError: there are no reviews or no metadata in it, or more than one domain or layout.
    """
    folders.check(folder)
    layout, domain, reviews = _reviews(folder)
    metadata = folders.plain_or_gzip(folder, layout.metadata.format(domain), f"items for {reviews[0].name}")
    record = functools.partial(_interaction, layout)
    return Source(
        files=[*reviews, metadata],
        interactions=[_table(path, layout, record) for path in reviews],
        items=_items(metadata, layout),
    )


def _reviews(folder: pathlib.Path) -> tuple[_Layout, str, list[pathlib.Path]]:
    found: dict[tuple[_Layout, str], list[pathlib.Path]] = {}
    for path in sorted(folder.iterdir()):
        fits = ((layout, layout.reviews.fullmatch(path.name.removesuffix(".gz"))) for layout in _LAYOUTS)
        layout, match = next(((layout, match) for layout, match in fits if match), (None, None))
        if layout and match and path.is_file():
            found.setdefault((layout, match["domain"]), []).append(path)
    if not found:
        raise errors.InputError(
            f"{folder} holds no reviews of Amazon. Expected {_EXPECTED}. Found: {folders.names_in(folder)}."
        )
    if len(found) > 1:
        there = "; ".join(f"{domain} ({layout.name}): {paths[0].name}" for (layout, domain), paths in found.items())
        raise errors.InputError(f"{folder} holds more than one dump: {there}. Give a folder with one of them.")
    ((layout, domain), paths) = next(iter(found.items()))
    if layout.name == "2023 split":
        what = "part of the three that belong together"
        return layout, domain, [folders.plain_or_gzip(folder, f"{domain}.{part}.csv", what) for part in _SPLITS]
    if len(paths) > 1:
        names = ", ".join(path.name for path in paths)
        raise errors.InputError(f"{folder} holds {names}. Leave only one of them.")
    return layout, domain, paths


def _table(path: pathlib.Path, layout: _Layout, record: Callable[[reading.Row], Interaction]) -> Table[Interaction]:
    if path.name.removesuffix(".gz").endswith(".csv"):
        return reading.csv_table(path, [layout.user, layout.item, layout.rating, layout.timestamp], record)
    return reading.json_table(path, record)


def _interaction(layout: _Layout, row: reading.Row) -> Interaction:
    rating = records.number(records.get(row, layout.rating), layout.rating)
    records.check_range(rating, layout.rating, 1, 5)
    timestamp = records.whole_number(records.get(row, layout.timestamp), layout.timestamp)
    records.check_time(timestamp, layout.timestamp, layout.unit)
    return Interaction(
        records.identifier(records.get(row, layout.user), layout.user),
        records.identifier(records.get(row, layout.item), layout.item),
        timestamp,
        rating,
    )


def _items(path: pathlib.Path, layout: _Layout) -> Table[Item]:
    if layout.name.startswith("2023"):
        return reading.json_table(path, amazon_metadata.item_2023)
    return reading.line_table(path, amazon_metadata.object_or_literal, amazon_metadata.item)

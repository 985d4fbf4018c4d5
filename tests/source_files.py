"""Raw data for the tests of sources: writes it, reads it, and small folders in every published layout.

No published dump can be had here: the rows follow the documented fields of each, with a value of every kind.
"""

import gzip
import json
import pathlib
import pickle
import tempfile
from collections.abc import Callable
from typing import Any

from recalign_jax.corpus.records import Source
from recalign_jax.corpus.sources import reading, rejects, tables


def put(folder: pathlib.Path, name: str, content: bytes | str) -> pathlib.Path:
    """Writes a file, compressed if its name ends in .gz; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    data = content.encode() if isinstance(content, str) else content
    (folder / name).write_bytes(gzip.compress(data, 1) if name.endswith(".gz") else data)
    return folder


def read(
    folder: pathlib.Path,
    on_error: str = "fail",
    open_folder: Callable[..., Source] = tables.open_folder,
    **options: Any,
) -> tuple[list[Any], list[Any], list[dict[str, Any]]]:
    """Reads a folder to its end: (interactions, items, rejected rows)."""
    with tempfile.TemporaryDirectory() as scratch:
        path = pathlib.Path(scratch) / "rejected.jsonl"
        source = pickle.loads(pickle.dumps(open_folder(folder, **options)))
        with rejects.Rejects(on_error, path) as reject:
            interactions = [row for table in source.interactions for _, row in reading.parse_table(table, reject)]
            rows = reading.parse_table(source.items, reject)
            items = list(reading.distinct_items(source.items.path, rows, reject))
        rejected = [json.loads(line) for line in path.read_text().splitlines()] if on_error == "skip" else []
        assert len(rejected) == reject.count
    return interactions, items, rejected


def lines(*rows: Any, write: Callable[[Any], str] = json.dumps) -> str:
    """One row a line: as JSON or, with `write=repr`, as Python literals."""
    return "".join(write(row) + "\n" for row in rows)


# The dumps of Amazon.

REVIEW_2014 = {
    "reviewerID": "A1YJEY40YUW4SE",
    "asin": "7806397051",
    "reviewerName": "Andrea",
    "helpful": [3, 4],
    "reviewText": "Very oily and creamy. Not at all what I expected...",
    "overall": 1.0,
    "summary": "Don't waste your money",
    "unixReviewTime": 1391040000,
    "reviewTime": "01 30, 2014",
}
META_2014 = {
    "asin": "7806397051",
    "description": 'A "palette" that isn\'t\nlarge',
    "title": "WAWO 15 Color Makeup Palette &amp; Brush",
    "imUrl": "http://ecx.images-amazon.com/images/I/31.jpg",
    "price": 12.99,
    "salesRank": {"Beauty": 52254},
    "related": {"also_bought": ["B000", "B001"]},
    "brand": "WAWO",
    "categories": [["Beauty", "Makeup", "Face"], ["Beauty", "Tools &amp; Accessories"]],
}
REVIEW_2018 = {
    "overall": 5.0,
    "verified": True,
    "reviewTime": "09 1, 2016",
    "reviewerID": "A3CIUOJXQ5VDQ2",
    "asin": "B0000530HU",
    "style": {"Size:": " 7.0 oz", "Flavor:": " Classic Ice Blue"},
    "reviewerName": "Shelly F",
    "reviewText": "As advertised.",
    "summary": "Five Stars",
    "unixReviewTime": 1472688000,
}
META_2018 = {
    "category": [
        "Beauty & Personal Care",
        "Shave & Hair Removal",
        '<span class="a-size-base">',
        "Shave & Hair Removal",
    ],
    "description": ["Aqua Velva"],
    "title": "Aqua Velva <b>After Shave</b>,\n Ice Blue",
    "also_buy": ["B0000530HX"],
    "brand": "Aqua Velva",
    "rank": "65,003 in Beauty",
    "price": "$1,012.50",
    "asin": "B0000530HU",
}
REVIEW_2023 = {
    "rating": 4.0,
    "title": "Such a lovely scent",
    "text": "This spray is really nice.",
    "images": [],
    "asin": "B00YQ6X8EO",
    "parent_asin": "B00YQ6X8E0",
    "user_id": "AGKHLEW2SOWHNMFQIJGBECAF7INQ",
    "timestamp": 1588687728923,
    "helpful_vote": 0,
    "verified_purchase": True,
}
META_2023 = {
    "main_category": "All Beauty",
    "title": "Howard LC0008 Leather Conditioner, 8-Ounce",
    "average_rating": 4.8,
    "rating_number": 10,
    "features": [],
    "description": [],
    "price": "from 9.99",
    "images": [{"thumb": "https://m.media-amazon.com/images/I/41.jpg"}],
    "store": "Howard Products",
    "categories": [],
    "details": {"Package Dimensions": "7.1 x 5.5 x 3 inches"},
    "parent_asin": "B00YQ6X8E0",
    "bought_together": None,
}
CSV_2023 = "user_id,parent_asin,rating,timestamp\nAGKH,B00YQ6X8E0,4.0,1588687728923\n"
CSV_2023_HISTORY = "user_id,parent_asin,rating,timestamp,history\nAGKH,{},4.0,{},B01 B02\n"

# MovieLens and Yelp.

RATINGS_DAT = "1::1193::5::978300760\n1::661::3::978302109\n"
MOVIES_DAT = "1193::One Flew Over the Cuckoo's Nest (1975)::Drama\n661::L\u00e9on (1994)::Action|Children's|Drama\n"
RATINGS_CSV = "userId,movieId,rating,timestamp\n1,296,5.0,1147880044\n1,306,0.5,1147868817\n"
MOVIES_CSV = (
    'movieId,title,genres\n296,"American President, The (1995)",Comedy|Drama\n306,L\u00e9on,(no genres listed)\n'
)
YELP_REVIEW = {
    "review_id": "KU_O5udG6zpxOg-VcAEodg",
    "user_id": "mh_-eMZ6K5RLWhZyISBhwA",
    "business_id": "XQfwVwDr-v0ZS3_CbbE5Xw",
    "stars": 3.0,
    "useful": 0,
    "funny": 0,
    "cool": 0,
    "text": "If you decide to eat here, just be aware",
    "date": "2018-07-07 22:09:11",
}
YELP_BUSINESS = {
    "business_id": "XQfwVwDr-v0ZS3_CbbE5Xw",
    "name": "Turning Point of North Wales",
    "address": "1460 Bethlehem Pike",
    "city": "North Wales",
    "state": "PA",
    "stars": 3.0,
    "is_open": 1,
    "attributes": None,
    "categories": "Restaurants, Breakfast &amp; Brunch, Food, Food",
    "hours": None,
}

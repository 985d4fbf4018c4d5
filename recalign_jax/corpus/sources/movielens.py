"""MovieLens-100K: GroupLens' own files, or the copy inside the registry package `recbole`.

GroupLens: `u.data`, `u.item` (latin-1) and `u.genre`. RecBole's copy: `ml-100k.inter` and `ml-100k.item`, where
the year stands in a column of its own. Both give titles with year, and genres as categories; of the titles ten
differ, in accents and the like.
"""

import pathlib

from recalign_jax import errors
from recalign_jax.corpus import records
from recalign_jax.corpus.records import Interaction, Item, ItemText, Reject, RowError, Source
from recalign_jax.corpus.sources import reading

# Also as RecBole's copy spells it.
_UNKNOWN = ("", "unknown", "unkonwn")
_OTHER_SIZES = {"ratings.dat": "MovieLens-1M or -10M", "ratings.csv": "MovieLens-20M or later"}


def open_folder(folder: pathlib.Path, reject: Reject) -> Source:
    """Opens a folder of MovieLens-100K. Raises InputError if files are missing or it is another size."""
    if (folder / "u.data").is_file():
        return _open_grouplens(folder, reject)
    if (folder / "ml-100k.inter").is_file():
        return _open_recbole(folder, reject)
    for name, size in _OTHER_SIZES.items():
        if (folder / name).is_file():
            raise errors.InputError(
                f"{folder} looks like {size}, of which only the 100K size can be read. "
                "Write its ratings and movies as tables and use --source tables."
            )
    raise errors.InputError(
        f"{folder} holds no MovieLens-100K. Give the folder with u.data, u.item and u.genre as --input."
    )


def _open_grouplens(folder: pathlib.Path, reject: Reject) -> Source:
    data, items, genres = (_existing(folder / name) for name in ("u.data", "u.item", "u.genre"))
    genre_names = [line.split("|")[0] for line in genres.read_text(encoding="latin-1").splitlines() if line.strip()]

    def item(row: reading.Row) -> Item:
        for genre in genre_names:
            if row[genre] not in ("0", "1"):
                raise RowError(f"genre {genre} must be 0 or 1, not {records.shown(row[genre])}")
        return _item(row["movie_id"], row["title"], [genre for genre in genre_names if row[genre] == "1"])

    rows = reading.separated_rows(data, "\t", ["user_id", "item_id", "rating", "timestamp"])
    columns = ["movie_id", "title", "release_date", "video_release_date", "imdb_url", *genre_names]
    item_rows = reading.separated_rows(items, "|", columns, encoding="latin-1")
    return Source(
        files=[data, items, genres],
        interactions=reading.parse_rows(data, rows, _interaction, reject),
        items=reading.parse_rows(items, item_rows, records.distinct(item), reject),
    )


def _open_recbole(folder: pathlib.Path, reject: Reject) -> Source:
    data, items = (_existing(folder / name) for name in ("ml-100k.inter", "ml-100k.item"))
    columns = ["user_id:token", "item_id:token", "rating:float", "timestamp:float"]
    item_columns = ["item_id:token", "movie_title:token_seq", "release_year:token", "class:token_seq"]

    def interaction(row: reading.Row) -> Interaction:
        return _interaction({column.split(":")[0]: row[column] for column in columns})

    def item(row: reading.Row) -> Item:
        item_id, title, year, genres = (row[column] for column in item_columns)
        return _item(item_id, f"{title} ({year})" if year.isdecimal() else title, genres.split())

    return Source(
        files=[data, items],
        interactions=reading.parse_rows(data, reading.tsv_rows(data, columns), interaction, reject),
        items=reading.parse_rows(items, reading.tsv_rows(items, item_columns), records.distinct(item), reject),
    )


def _existing(path: pathlib.Path) -> pathlib.Path:
    if not path.is_file():
        raise errors.InputError(f"{path} is missing. Copy the whole MovieLens folder.")
    return path


def _interaction(row: reading.Row) -> Interaction:
    rating = records.number(row["rating"], "rating")
    if not 1 <= rating <= 5:
        raise RowError(f"rating must be from 1 to 5, not {rating:g}")
    return Interaction(
        user_id=records.identifier(row["user_id"], "user_id"),
        item_id=records.identifier(row["item_id"], "item_id"),
        timestamp=records.whole_number(row["timestamp"], "timestamp"),
        rating=rating,
    )


def _item(item_id: str, title: str, genres: list[str]) -> Item:
    # One film is called "unknown" and has the genre "unknown": nothing is known of it.
    text = ItemText(
        title="" if title in _UNKNOWN else records.clean_text(title),
        categories=tuple(genre for genre in genres if genre not in _UNKNOWN),
    )
    return Item(records.identifier(item_id, "movie id"), text)

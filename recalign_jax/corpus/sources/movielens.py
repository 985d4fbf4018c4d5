"""MovieLens as GroupLens publishes it, each size in its layout, which the names of the files tell.

    100K               u.data, u.item (latin-1), u.genre     ratings 1 to 5
    1M                 ratings.dat, movies.dat (latin-1)      ratings 1 to 5
    10M                ratings.dat, movies.dat (UTF-8)        ratings 0.5 to 5
    20M, latest, ...   ratings.csv, movies.csv (UTF-8)        ratings 0.5 to 5
    100K in `recbole`  ml-100k.inter, ml-100k.item            the copy inside this registry package

All give titles with year, and genres as categories. RecBole's copy has the year in a column of its own, and of its
titles ten differ, in accents and the like.
"""

import functools
import pathlib

from recalign_jax import errors
from recalign_jax.corpus import records
from recalign_jax.corpus.records import Interaction, Item, ItemText, RowError, Source
from recalign_jax.corpus.sources import folders, reading

# Also as RecBole's copy spells it.
_UNKNOWN = ("", "unknown", "unkonwn", "(no genres listed)")
_WHOLE_STARS, _HALF_STARS = (1, 5), (0.5, 5)
_INTERACTION_COLUMNS = ("user_id", "item_id", "rating", "timestamp")
_RECBOLE_COLUMNS = ("user_id:token", "item_id:token", "rating:float", "timestamp:float")
_RECBOLE_ITEM_COLUMNS = ("item_id:token", "movie_title:token_seq", "release_year:token", "class:token_seq")
_CSV_COLUMNS = ("userId", "movieId", "rating", "timestamp")
_MOVIE_COLUMNS = ("movieId", "title", "genres")


def open_folder(folder: pathlib.Path) -> Source:
    """Opens a folder of one size of MovieLens. Raises InputError if files are missing or there is more than one."""
    folders.check(folder)
    openers = {
        "u.data": _open_grouplens,
        "ratings.dat": _open_dat,
        "ratings.csv": _open_csv,
        "ml-100k.inter": _open_recbole,
    }
    found = [name for name in openers if (folder / name).is_file()]
    if not found:
        raise errors.InputError(
            f"{folder} holds no MovieLens. Expected one of: {', '.join(openers)}. Found: {folders.names_in(folder)}."
        )
    if len(found) > 1:
        raise errors.InputError(f"{folder} holds more than one MovieLens: {', '.join(found)}. Leave only one of them.")
    return openers[found[0]](folder)


def _open_grouplens(folder: pathlib.Path) -> Source:
    data, items, genres = (
        folders.one_of(folder, [name], "whole MovieLens") for name in ("u.data", "u.item", "u.genre")
    )
    genre_names = [line.split("|")[0] for line in genres.read_text(encoding="latin-1").splitlines() if line.strip()]
    columns = ["movie_id", "title", "release_date", "video_release_date", "imdb_url", *genre_names]
    item = functools.partial(_grouplens_item, genre_names)
    interaction = functools.partial(_interaction, _WHOLE_STARS, _INTERACTION_COLUMNS)
    return Source(
        files=[data, items, genres],
        interactions=[reading.separated_table(data, "\t", _INTERACTION_COLUMNS, interaction)],
        items=reading.separated_table(items, "|", columns, item, encoding="latin-1"),
    )


def _grouplens_item(genre_names: list[str], row: reading.Row) -> Item:
    for genre in genre_names:
        if row[genre] not in ("0", "1"):
            raise RowError(f"genre {genre} must be 0 or 1, not {records.shown(row[genre])}")
    return _item(row["movie_id"], row["title"], [genre for genre in genre_names if row[genre] == "1"])


def _open_dat(folder: pathlib.Path) -> Source:
    ratings, movies = (_one(folder, name) for name in ("ratings.dat", "movies.dat"))
    is_1m = _is_1m(folder, movies)
    interaction = functools.partial(_interaction, _WHOLE_STARS if is_1m else _HALF_STARS, _INTERACTION_COLUMNS)
    return Source(
        files=[ratings, movies],
        interactions=[reading.separated_table(ratings, "::", _INTERACTION_COLUMNS, interaction)],
        items=reading.separated_table(movies, "::", _MOVIE_COLUMNS, _movie, "latin-1" if is_1m else "utf-8"),
    )


def _is_1m(folder: pathlib.Path, movies: pathlib.Path) -> bool:
    """Tells 1M from 10M by a file that only one of them has or, where only two files were copied, by the encoding."""
    if (folder / "users.dat").is_file():
        return True
    if (folder / "tags.dat").is_file():
        return False
    try:
        movies.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return True
    return False


def _open_csv(folder: pathlib.Path) -> Source:
    ratings, movies = (_one(folder, name) for name in ("ratings.csv", "movies.csv"))
    interaction = functools.partial(_interaction, _HALF_STARS, _CSV_COLUMNS)
    return Source(
        files=[ratings, movies],
        interactions=[reading.csv_table(ratings, _CSV_COLUMNS, interaction)],
        items=reading.csv_table(movies, _MOVIE_COLUMNS, _movie),
    )


def _movie(row: reading.Row) -> Item:
    return _item(row["movieId"], row["title"], row["genres"].split("|"))


def _open_recbole(folder: pathlib.Path) -> Source:
    data, items = (_one(folder, name) for name in ("ml-100k.inter", "ml-100k.item"))
    interaction = functools.partial(_interaction, _WHOLE_STARS, _RECBOLE_COLUMNS)
    return Source(
        files=[data, items],
        interactions=[reading.tsv_table(data, _RECBOLE_COLUMNS, interaction)],
        items=reading.tsv_table(items, _RECBOLE_ITEM_COLUMNS, _recbole_item),
    )


def _recbole_item(row: reading.Row) -> Item:
    item_id, title, year, genres = (row[column] for column in _RECBOLE_ITEM_COLUMNS)
    return _item(item_id, f"{title} ({year})" if year.isdecimal() else title, genres.split())


def _one(folder: pathlib.Path, name: str) -> pathlib.Path:
    return folders.one_of(folder, [name], "whole MovieLens")


def _interaction(stars: tuple[float, float], columns: tuple[str, str, str, str], row: reading.Row) -> Interaction:
    user, item, rating, timestamp = (row[column] for column in columns)
    stars_given = records.number(rating, "rating")
    records.check_range(stars_given, "rating", *stars)
    time = records.whole_number(timestamp, "timestamp")
    records.check_time(time, "timestamp")
    return Interaction(records.identifier(user, "user id"), records.identifier(item, "movie id"), time, stars_given)


def _item(item_id: str, title: str, genres: list[str]) -> Item:
    # One film is called "unknown" and has the genre "unknown": nothing is known of it.
    text = ItemText(
        title="" if title in _UNKNOWN else records.clean_text(title),
        categories=tuple(genre for genre in genres if genre not in _UNKNOWN),
    )
    return Item(records.identifier(item_id, "movie id"), text)

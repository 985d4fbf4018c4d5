"""A row of a table of histories as a request.

  user        any id, known to the corpus or not; `user_id` means the same
  items       the history, item ids, oldest first; `history` means the same
  titles      the history by titles, where there are no `items`
  ratings     of the items of the history, where ratings are to be predicted
  candidates  what is to be ranked, as the history is given: ids or titles

A list is a list, or one cell with `|` between, or with a JSON list.
"""

import contextlib
import functools
from collections.abc import Sequence, Sized
from typing import Any, NamedTuple

import numpy as np

from recalign_jax.corpus import records
from recalign_jax.corpus.catalog import title_text
from recalign_jax.corpus.corpus import Corpus
from recalign_jax.corpus.records import RowError
from recalign_jax.corpus.sources import reading
from seqio_tasks.examples import Query

MAX_CANDIDATES = 512
_TITLES = "titles"
_USERS, _HISTORIES = ("user", "user_id"), ("items", "history", _TITLES)


class Request(NamedTuple):
    """One user to answer.

    Attributes:
      user: the id that the source has.
      query: the history; `query.user` is -1 for a row of a table.
      ratings: float32 [h], of the history; None where none are known.
      candidates: int32 [c], what is to be ranked; empty for the whole catalogue.
      unknown: what the row names that the catalogue doesn't have, and that was left out.
    """

    user: str
    query: Query
    ratings: np.ndarray | None
    candidates: np.ndarray
    unknown: tuple[str, ...] = ()


class Needs(NamedTuple):
    """What a row of a table must have beside a user and a history."""

    candidates: bool = False
    ratings: bool = False
    known_items: bool = False  # whether a row that names an unknown item is rejected


def request_of(corpus: Corpus, needs: Needs, row: reading.Row) -> Request:
    """The request of a row, by column names. Raises RowError where it can't be used."""
    user = records.identifier(records.get(row, _column(row, _USERS)), "user")
    column = _column(row, _HISTORIES)
    by_title = column == _TITLES
    numbers, name_of = (_by_title(corpus), _title) if by_title else (corpus.item_numbers, records.identifier)
    unknown: list[str] = []

    def resolved(cell: Any, column: str) -> list[int]:
        values = _list(cell, column)
        found = [numbers.get(name_of(value, f"each of {column}"), -1) for value in values]
        unknown.extend(str(value).strip() for value, number in zip(values, found, strict=True) if number < 0)
        return found

    history = np.asarray(resolved(records.get(row, column), column if by_title else _HISTORIES[0]), np.int32)
    ratings = _ratings(corpus, row, len(history)) if needs.ratings else None
    candidates = np.zeros(0, np.int32)
    if needs.candidates:
        candidates = np.asarray(resolved(records.get(row, "candidates"), "candidates"), np.int32)
        if not len(candidates):
            raise RowError("candidates is empty")
        candidates = candidates[np.sort(np.unique(candidates, return_index=True)[1])]
        candidates = candidates[candidates >= 0]
        if not len(candidates):
            raise RowError("none of the candidates is in the catalogue")
        if len(candidates) > MAX_CANDIDATES:
            raise RowError(f"{len(candidates)} candidates, more than {MAX_CANDIDATES}")
    if unknown and needs.known_items:
        raise RowError(f"not in the catalogue: {', '.join(unknown[:5])}{', ...' if len(unknown) > 5 else ''}")
    known = history >= 0
    ratings = None if ratings is None else ratings[known]
    return Request(user, Query(-1, history[known], -1), ratings, candidates, tuple(unknown))


def _column(row: reading.Row, names: Sequence[str]) -> str:
    """The first of the columns whose cell isn't empty, else the first that there is, else the first."""
    filled = (name for name in names if not _is_empty(row.get(name)))
    return next(filled, next((name for name in names if name in row), names[0]))


def _is_empty(cell: Any) -> bool:
    """An empty cell of CSV is empty text, not None; an empty list of Parquet or JSON is one of these."""
    return cell is None or not (cell.strip() if isinstance(cell, str) else not isinstance(cell, Sized) or len(cell))


def _list(value: Any, column: str) -> Sequence[Any]:
    if _is_empty(value):
        return ()
    if isinstance(value, str):
        value = value.strip()
        if value.startswith("["):
            with contextlib.suppress(ValueError, RecursionError, RowError):  # a title may begin like this
                value = reading.json_object(f'{{"list": {value}}}'.encode())["list"]
        value = [part.strip() for part in value.split("|")] if isinstance(value, str) else value
    if not isinstance(value, (list, tuple)):
        raise RowError(f"{column} must be a list, not {records.shown(value)}")
    return value


def _title(value: Any, column: str) -> str:
    title = records.text(value, column)
    if not title:
        raise RowError(f"{column} is empty")
    return title.casefold()


def _ratings(corpus: Corpus, row: reading.Row, count: int) -> np.ndarray:
    ratings = [records.number(value, "each of ratings") for value in _list(records.get(row, "ratings"), "ratings")]
    if len(ratings) != count:
        raise RowError(f"{len(ratings)} ratings for a history of {count} items")
    low, high = _scale(corpus)
    for rating in ratings:
        if not low <= rating <= high:
            raise RowError(f"rating {rating:g} is outside of those of {corpus.name}, {low:g} to {high:g}")
    return np.asarray(ratings, np.float32)


@functools.lru_cache(maxsize=2)
def _scale(corpus: Corpus) -> tuple[float, float]:
    """The least and the greatest rating."""
    assert corpus.ratings is not None
    return float(corpus.ratings.min()), float(corpus.ratings.max())


@functools.lru_cache(maxsize=2)
def _by_title(corpus: Corpus) -> dict[str, int]:
    """Items by title, whatever its case; of several with one title, the one most popular in training."""
    rising = np.argsort(corpus.training_popularity, kind="stable")  # the last one of a title stays
    return {title_text(corpus, int(item)).casefold(): int(item) for item in rising}

"""What batch inference is asked: one request a user, from a corpus or from a table of histories.

A table (TSV, CSV, JSONL, Parquet) has a row a user:
  user        any id, known to the corpus or not; `user_id` means the same
  items       the history, item ids, oldest first; `history` means the same
  titles      the history by titles, where there are no `items`
  ratings     of the items of the history, where ratings are to be predicted
  candidates  what is to be ranked, as the history is given: ids or titles
A list is a list, or one cell with `|` between, or with a JSON list. Rows are numbered, and fall into parts of equal
size, so that a part is known by its number; bad rows count.
"""

import array
import contextlib
import functools
import hashlib
import itertools
import json
import pathlib
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from recalign_jax.corpus import records
from recalign_jax.corpus.catalog import title_text
from recalign_jax.corpus.corpus import Corpus
from recalign_jax.corpus.records import RowError, Table
from recalign_jax.corpus.sources import reading
from recalign_jax.corpus.sources.lines import printable
from recalign_jax.errors import InputError, check_choice
from seqio_tasks import examples
from seqio_tasks.examples import Query

SPLITS = ("test", "validation", "all")
ON_UNKNOWN_ITEM = ("drop", "reject")
MAX_CANDIDATES = 512
_NAMES = {"user": ("user", "user_id"), "items": ("items", "history")}


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


class Part(NamedTuple):
    """Rows `number * size` to `(number + 1) * size - 1`: what can be answered, and what can't, as JSON objects."""

    number: int
    requests: list[Request]
    rejected: list[dict[str, Any]]


class Requests(NamedTuple):
    """All requests of a job.

    Attributes:
      total: number of rows, bad ones counted.
      fingerprint: of where they come from.
      parts: (rows a part, the numbers of the parts wanted) -> those parts, in order; goes through the rows once.
    """

    total: int
    fingerprint: str
    parts: Callable[[int, Collection[int]], Iterator[Part]]


class Needs(NamedTuple):
    """What a row of a table must have beside a user and a history."""

    candidates: bool = False
    ratings: bool = False
    known_items: bool = False  # whether a row that names an unknown item is rejected


def of_corpus(corpus: Corpus, split: str, max_users: int | None = None) -> Requests:
    """The users of a corpus.

    Args:
      corpus: the corpus.
      split: for `test` and `validation` the history before that target; for `all` every user's whole history.
      max_users: only so many users, a random sample (users are numbered at random).

    Raises:
      InputError: there is no such split, or nobody in it.
    """
    check_choice("SPLIT", split, SPLITS)
    users = (np.arange(corpus.num_users) if split == "all" else corpus.evaluation_users)[:max_users]
    if not len(users):
        raise InputError(f"SPLIT {split} of {corpus.name} holds no users.")

    def request(index: int) -> Request:
        user = int(users[index])
        query = Query(user, corpus.sequence(user), -1)
        if split != "all":
            query = examples.next_item(corpus, split, index)
        start = corpus.user_offsets[user]
        ratings = None if corpus.ratings is None else corpus.ratings[start : start + len(query.history)]
        return Request(corpus.user_source_id(user), query, ratings, np.zeros(0, np.int32))

    def parts(size: int, wanted: Collection[int]) -> Iterator[Part]:
        for number in sorted(wanted):
            rows = range(number * size, min((number + 1) * size, len(users)))
            yield Part(number, [request(index) for index in rows], [])

    return Requests(len(users), f"{corpus.fingerprint} {split} {len(users)}", parts)


def of_table(path: pathlib.Path, corpus: Corpus, needs: Needs) -> Requests:
    """The rows of a table; goes through it once, to count them and to find users that are there twice.

    Raises:
      InputError: the file can't be read, or none of its rows can be used.
    """
    reading.check_ending(path)
    parse = functools.partial(of_row, corpus, needs)
    total, repeated = _survey(reading.open_table(path, [], parse))
    table = reading.open_table(path, [], parse, watched=False)

    def parts(size: int, wanted: Collection[int]) -> Iterator[Part]:
        rows = enumerate(table.rows())
        for number in range(-(-total // size)):
            some = itertools.islice(rows, size)
            if number not in wanted:
                next(itertools.islice(some, size, size), None)  # read, not parsed
                continue
            part = Part(number, [], [])
            for index, (line, row) in some:
                found = reading.parse_row(table.parse, row)
                if index in repeated and isinstance(found, Request):
                    shown = printable(row) if isinstance(row, bytes) else row
                    found = RowError(f"user {found.user!r} is there twice: the first row stands", shown)
                if isinstance(found, RowError):
                    part.rejected.append(_rejected(path, line, found))
                else:
                    part.requests.append(found)
            yield part

    return Requests(total, _file_hash(path), parts)


def _survey(table: Table[Request]) -> tuple[int, frozenset[int]]:
    """The number of rows, and which of them are of a user that a row before them is of. 24 bytes a user."""
    hashes, places, first_error, total = bytearray(), array.array("q"), "", 0
    for total, (line, row) in enumerate(table.rows(), start=1):
        found = reading.parse_row(table.parse, row)
        if isinstance(found, RowError):
            first_error = first_error or f"{table.path}, row {line}: {found}"
        else:
            hashes += hashlib.blake2b(found.user.encode(), digest_size=16).digest()
            places.append(total - 1)
    if not total:
        raise InputError(f"{table.path} holds no rows.")
    if not places:
        raise InputError(f"None of the {total} rows of {table.path} can be used. {first_error}".rstrip())
    halves = np.frombuffer(hashes, np.uint64).reshape(-1, 2)
    order = np.lexsort((*halves.T,))
    ordered = halves[order]
    same = np.append(False, (ordered[1:] == ordered[:-1]).all(axis=1))
    return total, frozenset(np.frombuffer(places, np.int64)[order[same]].tolist())


def _rejected(path: pathlib.Path, line: int, error: RowError) -> dict[str, Any]:
    shown = error.row if isinstance(error.row, str) else json.dumps(error.row, ensure_ascii=False, default=str)
    return {"file": path.name, "line": line, "reason": str(error), "row": shown[:10_000]}


def of_row(corpus: Corpus, needs: Needs, row: reading.Row) -> Request:
    """The request of a row, by column names. Raises RowError where it can't be used."""
    user = records.identifier(_cell(row, "user"), "user")
    by_title = all(row.get(name) is None for name in _NAMES["items"]) and row.get("titles") is not None
    numbers, name_of = (_by_title(corpus), _title) if by_title else (_by_id(corpus), _id)
    unknown: list[str] = []

    def resolved(cell: Any, column: str) -> list[int]:
        names = [name_of(value, f"each of {column}") for value in _list(cell, column)]
        unknown.extend(name for name in names if name not in numbers)
        return [numbers.get(name, -1) for name in names]

    column = "titles" if by_title else "items"
    history = np.asarray(resolved(_cell(row, column), column), np.int32)
    ratings = _ratings(row, len(history), needs.ratings)
    candidates = np.zeros(0, np.int32)
    if needs.candidates:
        candidates = np.asarray(resolved(records.get(row, "candidates"), "candidates"), np.int32)
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


def _cell(row: reading.Row, column: str) -> Any:
    names = _NAMES.get(column, (column,))
    return records.get(row, next((name for name in names if name in row), names[0]))


def _list(value: Any, column: str) -> Sequence[Any]:
    if value is None or value == "":
        return ()
    if isinstance(value, str):
        if value.startswith("["):
            with contextlib.suppress(ValueError, RecursionError, RowError):  # a title may begin like this
                value = reading.json_object(f'{{"list": {value}}}'.encode())["list"]
        value = [part.strip() for part in value.split("|")] if isinstance(value, str) else value
    if not isinstance(value, (list, tuple)):
        raise RowError(f"{column} must be a list, not {records.shown(value)}")
    return value


def _id(value: Any, column: str) -> str:
    """As text; 7.0, as some programs write whole numbers of columns with gaps, is 7."""
    return records.identifier(int(value) if isinstance(value, float) and value.is_integer() else value, column)


def _title(value: Any, column: str) -> str:
    return records.text(value, column).casefold()


def _ratings(row: reading.Row, count: int, needed: bool) -> np.ndarray | None:
    if not needed:
        return None
    ratings = [records.number(value, "each of ratings") for value in _list(records.get(row, "ratings"), "ratings")]
    if len(ratings) != count:
        raise RowError(f"{len(ratings)} ratings for a history of {count} items")
    return np.asarray(ratings, np.float32)


@functools.lru_cache(maxsize=2)
def _by_id(corpus: Corpus) -> dict[str, int]:
    return {corpus.item_source_id(item): item for item in range(corpus.num_items)}


@functools.lru_cache(maxsize=2)
def _by_title(corpus: Corpus) -> dict[str, int]:
    """Items by title, whatever its case; of several with one title, the one most popular in training."""
    rising = np.argsort(corpus.training_popularity, kind="stable")  # the last one of a title stays
    return {title_text(corpus, int(item)).casefold(): int(item) for item in rising}


def _file_hash(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

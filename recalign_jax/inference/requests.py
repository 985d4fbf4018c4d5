"""What batch inference is asked: one request a user, from a corpus or from a table of histories (see `rows`).

Rows are numbered, and fall into parts of equal size, so that a part is known by its number; bad rows count.
"""

import array
import functools
import hashlib
import itertools
import pathlib
from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

import numpy as np

from recalign_jax.corpus.corpus import Corpus
from recalign_jax.corpus.records import RowError, Table
from recalign_jax.corpus.sources import reading
from recalign_jax.corpus.sources.lines import printable
from recalign_jax.corpus.sources.rejects import rejected
from recalign_jax.errors import InputError, check_choice
from recalign_jax.inference.rows import Needs, Request, request_of
from seqio_tasks import examples
from seqio_tasks.examples import Query

SPLITS = ("test", "validation", "all")
ON_UNKNOWN_ITEM = ("drop", "reject")


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

    # The corpus's fingerprint leaves the users' ids out, which nothing that is trained sees.
    ids = hashlib.sha256("\0".join(corpus.user_source_id(int(user)) for user in users).encode()).hexdigest()
    return Requests(len(users), f"{corpus.fingerprint} {split} {len(users)} {ids}", parts)


def of_table(path: pathlib.Path, corpus: Corpus, needs: Needs) -> Requests:
    """The rows of a table; goes through it once, to count them and to find users that are there twice.

    Raises:
      InputError: the file can't be read, or none of its rows can be used.
    """
    reading.check_ending(path)
    parse = functools.partial(request_of, corpus, needs)
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
                    part.rejected.append(rejected(path, line, found.row, str(found)))
                else:
                    part.requests.append(found)
            yield part

    return Requests(total, _file_hash(path), parts)


def _survey(table: Table[Request]) -> tuple[int, frozenset[int]]:
    """The number of rows, and which of them are of a user that a row before them is of.

    It takes 24 bytes a user, and about 50 while they are sorted.
    """
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


def _file_hash(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

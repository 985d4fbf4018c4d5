"""Thousands of broken rows at every source and layout.

Each file is a mix of good rows, good rows with something broken in them, and garbage. Whatever it is: every line is
kept or rejected, the good ones are kept and give what they give alone, and nothing but InputError comes out.
"""

import functools
import json
import pathlib
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from recalign_jax.corpus.records import Source, Table
from recalign_jax.corpus.sources import amazon, movielens, reading, rejects, tables, yelp
from recalign_jax.errors import InputError
from tests import source_files
from tests.source_files import put

CELLS = st.one_of(
    st.sampled_from(
        ["", " ", "nan", "-inf", "1e999", "-1", "0", "6", "1_0", "9" * 30, "\0", "\x85", "\ud800", "{", "[" * 99]
    ),
    st.text(max_size=6),
    st.integers(-(10**20), 10**20).map(str),
)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), CELLS, st.just("x" * 100_000)),
    lambda inner: st.one_of(st.lists(inner, max_size=2), st.dictionaries(CELLS, inner, max_size=2)),
    max_leaves=3,
)
GARBAGE = st.one_of(
    st.binary(max_size=20),
    st.sampled_from(
        [b"{}", b"[]", b"null", b"{'", b'{"a"', b"\xff\xfe", b"\xef\xbb\xbf", b"::::", b",,,", b"\t\t\t", b"||"]
    ),
    st.just(b"[" * 20_000),
)


class Rows(NamedTuple):
    """A file: its good rows as lines, and how a row with one broken field is written."""

    name: str
    header: str
    good: list[str]
    broken: st.SearchStrategy[str]
    encoding: str = "utf-8"


def objects(name: str, *rows: dict[str, Any], write: Callable[[Any], str] = json.dumps) -> Rows:
    fields = sorted(rows[0])
    changed = st.tuples(st.sampled_from(rows), st.sampled_from(fields), VALUES).map(lambda d: {**d[0], d[1]: d[2]})
    missing = st.sampled_from(fields).map(lambda field: {name: rows[0][name] for name in fields if name != field})
    return Rows(name, "", [write(row) for row in rows], st.one_of(changed, missing).map(write))


def cells(name: str, separator: str, header: bool, text: str, encoding: str = "utf-8") -> Rows:
    first, *rows = text.splitlines() if header else ["", *text.splitlines()]
    split = rows[-1].split(separator)
    broken = st.tuples(st.integers(0, len(split) - 1), CELLS).map(
        lambda b: separator.join([*split[: b[0]], b[1], *split[b[0] + 1 :]])
    )
    longer = st.lists(CELLS, max_size=6).map(separator.join)
    return Rows(name, f"{first}\n" if header else "", rows, st.one_of(broken, longer), encoding)


PLAIN = {"user_id": "a", "item_id": "x", "timestamp": 1, "rating": 2.5}
THING = {"item_id": "x", "title": "Thing", "categories": "Toys|Games", "brand": "Lego", "price": 1.5}
META_2023 = source_files.META_2023


def table(separator: str, row: dict[str, Any]) -> str:
    return separator.join(row) + "\n" + separator.join(map(str, row.values())) + "\n"


LAYOUTS: dict[str, tuple[Callable[[pathlib.Path], Source], Rows, Rows]] = {
    "tsv": (
        tables.open_folder,
        cells("interactions.tsv", "\t", True, table("\t", PLAIN)),
        cells("items.tsv.gz", "\t", True, table("\t", THING)),
    ),
    "csv": (
        tables.open_folder,
        cells("interactions.csv.gz", ",", True, table(",", PLAIN)),
        cells("items.csv", ",", True, table(",", THING)),
    ),
    "jsonl": (tables.open_folder, objects("interactions.jsonl", PLAIN), objects("items.jsonl", THING)),
    "amazon 2014": (
        amazon.open_folder,
        objects("reviews_Beauty_5.json", source_files.REVIEW_2014),
        objects("meta_Beauty.json.gz", source_files.META_2014, {"asin": "y", "title": "plain"}, write=repr),
    ),
    "amazon 2018": (
        amazon.open_folder,
        objects("All_Beauty.json.gz", source_files.REVIEW_2018),
        objects("meta_All_Beauty.json", source_files.META_2018),
    ),
    "amazon 2023": (
        amazon.open_folder,
        objects("Toys.jsonl", source_files.REVIEW_2023),
        objects("meta_Toys.jsonl", META_2023),
    ),
    "amazon 2023 ratings": (
        amazon.open_folder,
        cells("Toys.csv", ",", True, source_files.CSV_2023),
        objects("meta_Toys.jsonl", META_2023),
    ),
    "movielens 100k": (
        movielens.open_folder,
        cells("u.data", "\t", False, "7\t1\t5\t881250949\n"),
        cells("u.item", "|", False, "1|L\u00e9on (1994)|01-Jan-1995||http|0|1|1\n", "latin-1"),
    ),
    "movielens 1m": (
        movielens.open_folder,
        cells("ratings.dat", "::", False, source_files.RATINGS_DAT),
        cells("movies.dat", "::", False, source_files.MOVIES_DAT, "latin-1"),
    ),
    "movielens csv": (
        movielens.open_folder,
        cells("ratings.csv", ",", True, source_files.RATINGS_CSV),
        cells("movies.csv", ",", True, "movieId,title,genres\n306,L\u00e9on,(no genres listed)\n"),
    ),
    "yelp": (
        yelp.open_folder,
        objects("yelp_academic_dataset_review.json.gz", source_files.YELP_REVIEW),
        objects("yelp_academic_dataset_business.json", source_files.YELP_BUSINESS),
    ),
}
# Other files that tell the layout.
COMPANIONS = {"u.data": {"u.genre": "unknown|0\nAction|1\nSci-Fi|2\n"}, "ratings.dat": {"users.dat": ""}}


@st.composite
def a_file(draw: st.DrawFn, rows: Rows) -> list[tuple[bytes, int | None]]:
    """(line, position in `rows.good` or None for what may be broken); the first is good, as it decides on ratings."""
    drawn: list[tuple[bytes, int | None]] = [(rows.good[0].encode(rows.encoding), 0)]
    broken = st.one_of(GARBAGE, rows.broken.map(lambda line: line.encode("utf-8", "surrogatepass")))
    for line in draw(st.lists(st.one_of(st.integers(0, len(rows.good) - 1), broken, broken), min_size=8, max_size=30)):
        if isinstance(line, int):
            drawn.append((rows.good[line].encode(rows.encoding), line))
        else:
            # A quote would make several lines one row of CSV: tests/test_sources.py has that.
            line = line.replace(b'"', b"") if ".csv" in rows.name else line
            drawn += [(part, None) for part in line.split(b"\n")]
    return drawn


def numbers(name: str, data: list[tuple[bytes, int | None]], header: bool) -> dict[int, int | None]:
    """Number of the line -> position of the good row, or None, for all lines that are not blank."""
    return {n: good for n, (line, good) in enumerate(data, start=1 + header) if line.strip(b"\r\n")}


def check(table: Table[Any], rows: Rows, data: list[tuple[bytes, int | None]], expected: list[Any]) -> int:
    """Checks one table in both modes; returns the number of rejected rows."""
    rejected: list[int] = []
    kept = dict(reading.parse_table(table, lambda path, line, row, reason: rejected.append(line)))
    positions = numbers(rows.name, data, bool(rows.header))
    assert sorted([*kept, *rejected]) == sorted(positions)  # kept + rejected = read, line by line
    for line, good in positions.items():
        if good is not None:
            assert kept[line] == expected[good]
    with tempfile.TemporaryDirectory() as scratch, rejects.Rejects("fail", pathlib.Path(scratch) / "none") as fail:
        if rejected:
            with pytest.raises(InputError, match=rf", line {min(rejected)}: "):
                list(reading.parse_table(table, fail))
        else:
            assert dict(reading.parse_table(table, fail)) == kept
    return len(rejected)


@functools.cache
def good_records(layout: str) -> tuple[list[Any], list[Any]]:
    open_folder, *files = LAYOUTS[layout]
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch)
        for rows in files:
            put(folder, rows.name, (rows.header + "\n".join(rows.good)).encode(rows.encoding))
        for name, content in COMPANIONS.get(files[0].name, {}).items():
            put(folder, name, content)
        interactions, items, rejected = source_files.read(folder, open_folder=open_folder)
    assert rejected == []
    return interactions, items


@pytest.fixture(scope="module")
def no_progress_lines() -> Iterator[None]:
    """Thousands of progress lines are no use in a report."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.print", lambda *args, **kwargs: None)
        yield


@pytest.mark.parametrize("layout", LAYOUTS)
def test_broken_rows(layout, no_progress_lines):
    open_folder, *files = LAYOUTS[layout]
    thrown = 0

    @settings(max_examples=120, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.tuples(*(a_file(rows) for rows in files)))
    def throw(data):
        nonlocal thrown
        with tempfile.TemporaryDirectory() as scratch:
            folder = pathlib.Path(scratch)
            for rows, drawn in zip(files, data, strict=True):
                content = b"\n".join(line for line, _ in drawn)
                put(folder, rows.name, rows.header.encode() + content)
            for name, content in COMPANIONS.get(files[0].name, {}).items():
                put(folder, name, content)
            source = open_folder(folder)
            for table, rows, drawn, expected in zip(
                [*source.interactions, source.items], files, data, good_records(layout), strict=True
            ):
                thrown += check(table, rows, drawn, expected)

    throw()
    assert thrown > 1000


def test_broken_rows_of_parquet(no_progress_lines):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    good = (b"a", b"x", 1, 2.5)
    columns = st.tuples(
        st.one_of(st.none(), st.binary(max_size=4), CELLS.map(lambda text: text.encode("utf-8", "surrogatepass"))),
        st.one_of(st.none(), st.just(b"x"), st.binary(max_size=3)),
        st.one_of(st.none(), st.integers(-(2**63), 2**63 - 1)),
        st.one_of(st.none(), st.floats()),
    )

    @settings(max_examples=60, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(st.one_of(st.just(good), columns), max_size=40))
    def throw(drawn):
        rows = [good, *drawn]
        user, item, time, rating = (list(column) for column in zip(*rows, strict=True))
        texts = [pyarrow.array(values, pyarrow.binary()).view(pyarrow.string()) for values in (user, item)]
        names = ["user_id", "item_id", "timestamp", "rating"]
        with tempfile.TemporaryDirectory() as scratch:
            folder = put(pathlib.Path(scratch), "items.jsonl", "")
            values = [*texts, pyarrow.array(time, pyarrow.int64()), pyarrow.array(rating, pyarrow.float64())]
            parquet.write_table(pyarrow.table(dict(zip(names, values, strict=True))), folder / "interactions.parquet")
            (table,) = tables.open_folder(folder).interactions
            rejected: list[int] = []
            kept = dict(reading.parse_table(table, lambda path, line, row, reason: rejected.append(line)))
            assert sorted([*kept, *rejected]) == list(range(1, len(rows) + 1))
            assert all(kept[n] == ("a", "x", 1, 2.5) for n, row in enumerate(rows, start=1) if row == good)
            with tempfile.TemporaryDirectory() as scratch, rejects.Rejects("fail", pathlib.Path(scratch) / "n") as fail:
                if rejected:
                    with pytest.raises(InputError, match=rf", row {min(rejected)}: "):
                        list(reading.parse_table(table, fail))

    throw()

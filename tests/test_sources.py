"""The sources: each kind of table, and every kind of bad input, by example and by hypothesis."""

import datetime
import decimal
import gzip
import json
import pathlib
import tempfile

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from recalign_jax.commands import prepare
from recalign_jax.corpus import records
from recalign_jax.corpus.corpus import load_corpus
from recalign_jax.corpus.sources import movielens, rejects, tables
from recalign_jax.errors import InputError
from tests.corpora import call, prepared, write_tables
from tests.shared_data import shared
from tests.source_files import put, read

ROWS = [("ann", "x", 3), ("ann", "y", 4), ("ann", "z", 5), ("bob", "x", 1)]


# Every format gives the same records.

INTERACTIONS = {
    "interactions.tsv": "user_id\titem_id\ttimestamp\trating\nann\tx\t3\t4.5\nbob\t7\t-1\t1\n",
    "interactions.tsv.gz": "rating\tother\ttimestamp\titem_id\tuser_id\n4.5\t?\t3\tx\tann\n\n1e0\t?\t-1.0\t7\tbob\n",
    "interactions.csv": 'user_id,item_id,timestamp,rating\r\n"ann",x,3,4.5\r\nbob,7,-1,1\r\n',
    "interactions.csv.gz": '\ufeffuser_id,item_id,note,timestamp,rating\nann,x,"a\n\n""b"",",3,4.5\nbob,7,,-1,1',
    "interactions.jsonl": '{"user_id": "ann", "item_id": "x", "timestamp": 3, "rating": 4.5}\n'
    '{"rating": "1", "user_id": "bob", "item_id": 7, "timestamp": -1.0}\n',
}
ITEMS = {
    "items.csv": 'item_id,title,categories,brand,price,about\nx,"A ""b"", c",Toys|Games ,Lego,1.5,Fun\n7,,,,,\n',
    "items.jsonl.gz": '{"item_id": "x", "title": "A \\"b\\",  c", "categories": ["Toys", "Games"], "brand": "Lego", '
    '"price": 1.5, "about": "Fun", "rank": {"a": 1}}\n{"item_id": 7, "title": null, "categories": []}\n',
}
EXPECTED = [records.Interaction("ann", "x", 3, 4.5), records.Interaction("bob", "7", -1, 1.0)]
EXPECTED_ITEMS = [
    records.Item("x", records.ItemText('A "b", c', ("Toys", "Games"), "Lego", 1.5, {"about": "Fun"})),
    records.Item("7", records.ItemText()),
]


@pytest.mark.parametrize("items", ITEMS)
@pytest.mark.parametrize("interactions", INTERACTIONS)
def test_all_formats_give_the_same_records(tmp_path, interactions, items):
    put(tmp_path, interactions, INTERACTIONS[interactions])
    put(tmp_path, items, ITEMS[items])
    assert read(tmp_path) == (EXPECTED, EXPECTED_ITEMS, [])


def test_parquet_as_databases_and_columns_with_gaps_have_it(tmp_path):
    """Whole numbers as decimals and floats: the ids of both tables are the same ones."""
    import pyarrow
    from pyarrow import parquet

    ids = [decimal.Decimal("7.00"), decimal.Decimal("8.00")]
    columns = {"user_id": [1.0, 2.0], "item_id": ids, "timestamp": [decimal.Decimal(3), decimal.Decimal(-1)]}
    columns["rating"] = [decimal.Decimal("4.5"), decimal.Decimal("1.0")]
    parquet.write_table(pyarrow.table(columns), tmp_path / "interactions.parquet")
    parquet.write_table(pyarrow.table({"item_id": [7, 8], "title": ["Seven", "Eight"]}), tmp_path / "items.parquet")
    interactions, items, _ = read(tmp_path)
    assert interactions == [("1", "7", 3, 4.5), ("2", "8", -1, 1.0)]
    assert [item.item_id for item in items] == ["7", "8"]
    for wrong in (1.5, float("nan"), 2.0**60, decimal.Decimal("1.5")):
        parquet.write_table(pyarrow.table({**columns, "user_id": [wrong, wrong]}), tmp_path / "interactions.parquet")
        with pytest.raises(InputError, match="row 1: user_id must be text or a whole number"):
            read(tmp_path)


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    columns = {"user_id": ["ann", "bob"], "item_id": ["x", "7"], "timestamp": [3, -1], "rating": [4.5, 1.0]}
    parquet.write_table(pyarrow.table(columns), tmp_path / "interactions.parquet")
    items = {"item_id": ["x", "7"], "title": ['A "b", c', None], "categories": [["Toys", "Games"], None]}
    items |= {"brand": ["Lego", None], "price": [1.5, None], "about": ["Fun", None]}
    parquet.write_table(pyarrow.table(items), tmp_path / "items.parquet")
    assert read(tmp_path) == (EXPECTED, EXPECTED_ITEMS, [])
    with pytest.raises(InputError, match=r"no column 'sku' \(found: user_id, item_id, timestamp, rating\)"):
        read(tmp_path, columns=tables.Columns(item="sku"))
    parquet.write_table(pyarrow.table({**columns, "timestamp": [3, None]}), tmp_path / "interactions.parquet")
    with pytest.raises(InputError, match=r"interactions\.parquet, row 2: timestamp is not a number: None"):
        read(tmp_path)
    when = [datetime.datetime(2014, 1, 2), None]
    parquet.write_table(pyarrow.table({**columns, "timestamp": when}), tmp_path / "interactions.parquet")
    with pytest.raises(InputError, match="row 1: timestamp is a date, not a Unix time: write it as seconds since 1970"):
        read(tmp_path)
    (tmp_path / "interactions.parquet").write_bytes(b"PAR1 no PAR1")
    with pytest.raises(InputError, match="cannot be read as Parquet"):
        read(tmp_path)


def test_columns_by_name(tmp_path):
    put(tmp_path, "interactions.csv", "who,what,when,stars\nann,x,3,4\n")
    put(tmp_path, "items.csv", "what,title\nx,Thing\n")
    flags = ["--user_column", "who", "--item_column", "what", "--timestamp_column", "when", "--rating_column", "stars"]
    result = prepared("tables", tmp_path, tmp_path / "data", "named", *flags)
    assert result.ratings.tolist() == [4]
    assert result.item_text(0).title == "Thing"
    columns = {"user": "who", "item": "what", "timestamp": "when", "rating": "stars"}
    assert result.metadata["options"]["columns"] == columns


@pytest.mark.parametrize("name", ["items.csv", "items.jsonl"])
def test_text_columns_by_name(tmp_path, name):
    put(tmp_path, "interactions.tsv", "user_id\titem_id\ttimestamp\nann\tx\t3\n")
    row = {"item_id": "x", "name": "Thing", "aisle": "Toys|Games", "maker": "Lego", "cost": "1.5", "title": "not this"}
    columns = tables.Columns(title="name", categories="aisle", brand="maker", price="cost")
    csv_text = ",".join(row) + "\n" + ",".join(row.values()) + "\n"
    put(tmp_path, name, csv_text if name.endswith("csv") else json.dumps({"item_id": "y"}) + "\n" + json.dumps(row))
    _, items, _ = read(tmp_path, columns=columns)
    expected = records.ItemText("Thing", ("Toys", "Games"), "Lego", 1.5, {"title": "not this"})
    assert items[-1] == records.Item("x", expected)
    with pytest.raises(InputError, match=r"'nome' \(found: item_id, name.* Did you mean 'name'"):
        read(tmp_path, columns=columns._replace(title="nome"))


def test_a_column_that_only_late_rows_of_json_have(tmp_path):
    put(tmp_path, "interactions.tsv", "user_id\titem_id\ttimestamp\nann\tx\t3\n")
    rows = [{"item_id": f"i{number}", "name": "Thing"} for number in range(1500)]
    put(tmp_path, "items.jsonl", "\n".join(map(json.dumps, [*rows, {"item_id": "x", "maker": "Lego"}])))
    columns = tables.Columns(title="name", brand="maker")
    _, items, _ = read(tmp_path, columns=columns)
    assert items[-1].text.brand == "Lego"
    with pytest.raises(InputError, match=r"no row has a field 'cost' \(found: item_id, name, maker\)"):
        read(tmp_path, columns=columns._replace(price="cost"))


def test_rating_range(tmp_path):
    write_tables(tmp_path, [("a", "x", 1, 7), ("a", "y", 2, 10), ("b", "x", 3, 10.5), ("b", "y", 4, -1)])
    interactions, _, rejected = read(tmp_path, "skip", rating_range=(0, 10))
    assert [row.rating for row in interactions] == [7, 10]
    assert [entry["reason"] for entry in rejected] == [
        "rating must be from 0 to 10, not 10.5",
        "rating must be from 0 to 10, not -1",
    ]
    assert len(read(tmp_path)[0]) == 4


def test_the_first_good_row_says_whether_there_are_ratings(tmp_path):
    put(tmp_path, "items.jsonl", "")
    bad, unrated, rated = "{}", '{"user_id": "a", "item_id": "x", "timestamp": 1}', '{"user_id": "a", "item_id": "x", '
    rated += '"timestamp": 1, "rating": 2}'
    put(tmp_path, "interactions.jsonl", "\n".join([bad, rated, unrated]))
    assert [row["reason"] for row in read(tmp_path, "skip")[2]][1:] == ["rating is empty"]
    put(tmp_path, "interactions.jsonl", "\n".join([bad, unrated, rated]))
    assert [row["reason"] for row in read(tmp_path, "skip")[2]][1:] == ["has a rating, but rows before it have none"]


# Bad rows.

HEADER = "user_id\titem_id\ttimestamp\trating\nann\tx\t3\t4\n"
BAD_ROWS = {
    "non-numeric rating": ("ann\ty\t4\tgood", "rating is not a number: 'good'"),
    "NaN rating": ("ann\ty\t4\tnan", "rating is not a number: 'nan'"),
    "infinite rating": ("ann\ty\t4\t1e999", "rating is not a finite number"),
    "underscored number": ("ann\ty\t4\t1_0", "rating is not a number"),
    "missing rating": ("ann\ty\t4\t", "rating is empty"),
    "non-numeric timestamp": ("ann\ty\t2014-01-01\t4", "timestamp is not a number: '2014-01-01'"),
    "infinite timestamp": ("ann\ty\t-inf\t4", "timestamp is not a number"),
    "huge timestamp": ("ann\ty\t99999999999999999999\t4", "timestamp is not a finite number that fits 64 bits"),
    "fractional timestamp": ("ann\ty\t4.5\t4", "timestamp must be a whole number"),
    "empty timestamp": ("ann\ty\t\t4", "timestamp is not a number: ''"),
    "empty user": ("\ty\t4\t4", "user_id is empty"),
    "blank item": ("ann\t  \t4\t4", "item_id is empty"),
    "nothing but tabs": ("\t\t\t", "user_id is empty"),
    "too few cells": ("ann\ty\t4", "3 cells where there are 4 columns"),
    "too many cells": ("ann\ty\t4\t4\t4", "5 cells where there are 4 columns"),
    "NUL": ("ann\ty\0\t4\t4", "holds a NUL byte"),
    "not UTF-8": (b"ann\ty\xe9\t4\t4", "not UTF-8: byte 0xe9 at 5"),
    "digits for ever": ("ann\ty\t" + "1" * 1_000_000 + "x\t4", "timestamp is not a number"),
    "long rating": ("ann\ty\t4\t" + "1" * 1_000_000, "rating is not a number"),
    "surrogate in UTF-8": (b"ann\ty\xed\xa0\x80\t4\t4", "not UTF-8"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_named_or_skipped(tmp_path, name):
    row, reason = BAD_ROWS[name]
    raw = row if isinstance(row, bytes) else row.encode()
    put(tmp_path, "interactions.tsv", HEADER.encode() + raw + b"\nbob\tx\t5\t5\n")
    put(tmp_path, "items.jsonl", "")
    with pytest.raises(InputError) as caught:
        read(tmp_path)
    assert f"{tmp_path}/interactions.tsv, line 3: {reason}" in str(caught.value)
    interactions, _, rejected = read(tmp_path, "skip")
    assert [row.user_id for row in interactions] == ["ann", "bob"]
    (entry,) = rejected
    assert (entry["file"], entry["line"]) == ("interactions.tsv", 3)
    assert entry["reason"].startswith(reason)
    assert entry["row"]


BAD_JSON = {
    "malformed": ('{"user_id": "a"', "not JSON"),
    "not an object": ('["a"]', "not a JSON object but ['a']"),
    "missing field": ('{"user_id": "a", "timestamp": 1}', "no field 'item_id' (found: user_id, timestamp)"),
    "NaN": ('{"user_id": "a", "item_id": "x", "timestamp": NaN}', "not JSON: NaN is not a number"),
    "overflow": ('{"user_id": "a", "item_id": "x", "timestamp": 1e999}', "timestamp is not a finite number"),
    "long integer": ('{"user_id": "a", "item_id": "x", "timestamp": 1' + "0" * 400 + "}", "timestamp is not a finite"),
    "longest integer": ('{"user_id": "a", "item_id": "x", "timestamp": ' + "1" * 5000 + "}", "not JSON"),
    "list as id": ('{"user_id": ["a"], "item_id": "x", "timestamp": 1}', "user_id must be text or a whole number"),
    "true as id": ('{"user_id": true, "item_id": "x", "timestamp": 1}', "user_id must be text or a whole number"),
    "true as time": ('{"user_id": "a", "item_id": "x", "timestamp": true}', "timestamp is not a number: True"),
    "NUL escape": ('{"user_id": "a\\u0000", "item_id": "x", "timestamp": 1}', "user_id holds a NUL byte"),
    "half a surrogate": ('{"user_id": "a\\ud800", "item_id": "x", "timestamp": 1}', "holds half of a surrogate pair"),
    "deep nesting": ("[" * 100_000, "not JSON"),
    "rating among none": ('{"user_id": "a", "item_id": "x", "timestamp": 1, "rating": 2}', "has a rating, but rows"),
}


@pytest.mark.parametrize("name", BAD_JSON)
def test_bad_lines_of_json(tmp_path, name):
    row, reason = BAD_JSON[name]
    good = '{"user_id": "a", "item_id": "x", "timestamp": 1}\n'
    put(tmp_path, "interactions.jsonl.gz", good + row + "\n" + good)
    put(tmp_path, "items.jsonl", "")
    with pytest.raises(InputError) as caught:
        read(tmp_path)
    assert f"interactions.jsonl.gz, line 2: {reason}" in str(caught.value)
    interactions, _, rejected = read(tmp_path, "skip")
    assert (len(interactions), len(rejected)) == (2, 1)


BAD_ITEMS = {
    "duplicate": ('{"item_id": "x", "title": "again"}', "item 'x' is there twice"),
    "empty id": ('{"item_id": " "}', "item_id is empty"),
    "no id": ('{"title": "t"}', "no field 'item_id'"),
    "title of another type": ('{"item_id": "y", "title": 5}', "title must be text, not 5"),
    "nested categories": ('{"item_id": "y", "categories": [["a"]]}', "each of categories must be text, not ['a']"),
    "number as categories": ('{"item_id": "y", "categories": 5}', "categories must be a list of texts, not 5"),
    "price": ('{"item_id": "y", "price": "cheap"}', "price is not a number: 'cheap'"),
}


@pytest.mark.parametrize("name", BAD_ITEMS)
def test_bad_items(tmp_path, name):
    row, reason = BAD_ITEMS[name]
    write_tables(tmp_path, ROWS)
    put(tmp_path, "items.jsonl", '{"item_id": "x", "title": "first"}\n' + row + "\n")
    with pytest.raises(InputError) as caught:
        read(tmp_path)
    assert f"items.jsonl, line 2: {reason}" in str(caught.value)
    _, items, rejected = read(tmp_path, "skip")
    assert [item.text.title for item in items] == ["first"]
    assert len(rejected) == 1


def test_bad_csv_names_the_first_line_of_the_row(tmp_path):
    lines = ["user_id,item_id,timestamp", 'a,"x', 'y",1', 'a,"b"c,2', "b,x,3", 'b,"never closed,4', "b,y,5"]
    put(tmp_path, "interactions.csv", "\n".join(lines) + "\n")
    put(tmp_path, "items.jsonl", "")
    interactions, _, rejected = read(tmp_path, "skip")
    assert [(row.user_id, row.item_id) for row in interactions] == [("a", "x\ny"), ("b", "x")]
    assert [(entry["line"], entry["reason"][:7]) for entry in rejected] == [(4, "not CSV"), (6, "not CSV")]


def test_an_unclosed_quote_takes_no_more_than_a_cell_may_hold(tmp_path):
    good = [f"u{n},x,{n}" for n in range(20_000)]
    put(tmp_path, "interactions.csv", "\n".join(["user_id,item_id,timestamp", "a,x,1", 'b,"x,2', *good]) + "\n")
    put(tmp_path, "items.jsonl", "")
    interactions, _, (rejected,) = read(tmp_path, "skip")
    assert (rejected["line"], rejected["row"][:5]) == (3, 'b,"x,')
    assert rejected["reason"].startswith("not CSV: field larger than field limit")
    kept = [f"{row.user_id},{row.item_id},{row.timestamp}" for row in interactions]
    assert kept == ["a,x,1", *good[-len(kept) + 1 :]]
    assert sum(map(len, good)) - sum(map(len, kept)) < 1 << 17


@pytest.mark.parametrize("name", ["interactions.tsv", "interactions.csv", "interactions.jsonl.gz"])
@pytest.mark.parametrize("end", ["\n", ""])
def test_a_line_of_megabytes_is_a_bad_row(tmp_path, name, end):
    good = {"user_id": "a", "item_id": "x", "timestamp": 1}
    separator = "\t" if ".tsv" in name else ","
    is_json = ".jsonl" in name
    header = "" if is_json else separator.join(good) + "\n"
    line = (json.dumps(good) if is_json else separator.join(map(str, good.values()))) + "\n"
    for size in (2 << 20, 5_000_000):
        long = line.replace("x", "x" * size, 1).rstrip("\n")
        put(tmp_path, name, header + line + long + end + (line if end else ""))
        put(tmp_path, "items.jsonl", "")
        interactions, _, (rejected,) = read(tmp_path, "skip")
        assert [row.item_id for row in interactions] == ["x", "x"][: 1 + bool(end)]
        assert (rejected["line"], rejected["reason"]) == (2 + (not is_json), "is a line of more than 2 MiB")
    fits = "x" * ((100 << 10) if separator == "," and not is_json else (1 << 20))
    put(tmp_path, name, header + line.replace("x", fits))
    assert read(tmp_path)[0][0].item_id == fits


def test_a_csv_row_of_many_lines_is_bounded(tmp_path):
    cells = '"\n",' * 530_000
    put(tmp_path, "interactions.csv", "user_id,item_id,timestamp\na,x,1\nb," + cells + "2\nc,x,3\n")
    put(tmp_path, "items.jsonl", "")
    interactions, _, rejected = read(tmp_path, "skip")
    assert interactions[0].user_id == "a"
    assert (rejected[0]["line"], rejected[0]["reason"]) == (3, "is a row of more than 2 MiB")


def test_parquet_rows_that_are_not_utf8(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    users = pyarrow.array([b"ann", b"b\xff", b"cid"]).view(pyarrow.string())
    table = pyarrow.table({"user_id": users, "item_id": ["x", "x", "x"], "timestamp": [1, 2, 3]})
    parquet.write_table(table, tmp_path / "interactions.parquet")
    put(tmp_path, "items.jsonl", "")
    with pytest.raises(InputError, match=r"interactions\.parquet, row 2: cannot be read: 'utf-8' codec can't"):
        read(tmp_path)
    interactions, _, _ = read(tmp_path, "skip")
    assert [row.user_id for row in interactions] == ["ann", "cid"]


# Bad files.


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        (
            "interactions.tsv",
            "user_id\ttimestamp\nann\t3\n",
            r"line 1: no column 'item_id' \(found: user_id, timestamp\)",
        ),
        ("interactions.tsv", "user_id\titem_ids\ttimestamp\n", r"Did you mean 'item_ids'\?"),
        ("interactions.tsv", "User_ID\titem_id\ttimestamp\n", r"Did you mean 'User_ID'\?"),
        ("interactions.tsv", "zz\titem_id\ttimestamp\n", r"no column 'user_id' \(found: zz, item_id, timestamp\)\.$"),
        ("interactions.csv", "user_id,item_id,timestamp,user_id\n", "two columns have the same name"),
        ("interactions.tsv", "", "is empty. Its first line must name the columns: user_id, item_id, timestamp"),
        ("interactions.tsv", b"\xff\xfeu\n", "line 1: not UTF-8"),
        ("interactions.csv", '"user_id\n', "line 1: not CSV"),
    ],
)
@pytest.mark.parametrize("on_error", ["fail", "skip"])
def test_bad_headers(tmp_path, name, content, reason, on_error):
    put(tmp_path, name, content)
    put(tmp_path, "items.jsonl", "")
    with pytest.raises(InputError, match=reason):
        read(tmp_path, on_error)


def test_missing_and_ambiguous_files(tmp_path):
    with pytest.raises(InputError, match="not a folder"):
        read(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"no interactions table\. .*interactions\.tsv.* Found: nothing"):
        read(tmp_path)
    put(tmp_path, "interactions.tsv", HEADER)
    with pytest.raises(InputError, match=r"no items table\. .*items\.jsonl.* Found: interactions\.tsv"):
        read(tmp_path)
    put(tmp_path, "items.jsonl", "")
    put(tmp_path, "interactions.csv.gz", "")
    with pytest.raises(InputError, match=r"holds interactions\.tsv, interactions\.csv\.gz\. Leave only one"):
        read(tmp_path)


@pytest.mark.parametrize("cut", [lambda data: data[:-9], lambda data: data[:2000], lambda data: b"plain text"])
def test_damaged_gzip_is_an_input_error_in_either_mode(tmp_path, cut):
    rows = "".join(f"user{n}\titem{n * n}\t{n}\n" for n in range(5000))
    whole = gzip.compress(("user_id\titem_id\ttimestamp\n" + rows).encode())
    (tmp_path / "interactions.tsv.gz").write_bytes(cut(whole))
    put(tmp_path, "items.jsonl", "")
    for on_error in rejects.ON_ERROR:
        with pytest.raises(InputError, match=r"interactions\.tsv\.gz cannot be read"):
            read(tmp_path, on_error)


# The whole command.


@pytest.mark.parametrize("name", BAD_ROWS)
def test_prepare_with_a_bad_row(tmp_path, name):
    row, reason = BAD_ROWS[name]
    raw = tmp_path / "raw"
    data_dir = tmp_path / "data"
    put(raw, "interactions.tsv", HEADER.encode() + (row if isinstance(row, bytes) else row.encode()) + b"\n")
    put(raw, "items.jsonl", "")
    flags = ["--source", "tables", "--input", str(raw), "--corpus", "c"]
    with pytest.raises(InputError, match="line 3"):
        call(prepare, data_dir, *flags)
    assert list(data_dir.iterdir()) == []
    result = call(prepare, data_dir, *flags, "--on_error", "skip")
    assert (result["interactions"], result["rejected_rows"]) == (1, 1)
    assert reason in json.loads((data_dir / "c" / "rejected.jsonl").read_text())["reason"]
    counts = load_corpus("c", data_dir).metadata["counts"]
    assert (counts["interactions_read"], counts["interactions_rejected"]) == (2, 1)


def test_a_table_without_one_good_row_says_what_the_last_bad_one_was(tmp_path):
    write_tables(tmp_path / "raw", [("a", "x", "soon"), ("b", "x", "later")])
    with pytest.raises(InputError, match=r"2 rows read, 2 of them bad.*line 3: timestamp is not a number: 'later'"):
        prepared("tables", tmp_path / "raw", tmp_path, "c", "--on_error", "skip")
    write_tables(tmp_path / "none", [])
    with pytest.raises(InputError, match="No interaction is left: 0 rows read"):
        prepared("tables", tmp_path / "none", tmp_path, "c")


def test_column_flags_need_tables(tmp_path):
    with pytest.raises(InputError, match="--user_column can be used with --source tables only"):
        prepared("movielens", tmp_path, tmp_path, "c", "--user_column", "who")


# Hypothesis: whatever the bytes are, rows are kept or rejected, and nothing else happens.

cells = st.one_of(
    st.sampled_from(["a", "x", "1", "4.5", "", " ", "nan", "-1", '"', '""', "a\tb", "a,b", "\0", "\\", "{", "\ud800"]),
    st.text(max_size=8),
    st.integers(-(10**20), 10**20).map(str),
    st.floats().map(str),
)
values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), cells), lambda inner: st.lists(inner, max_size=3)
)
names = st.sampled_from(["user_id", "item_id", "timestamp", "rating", "title", "categories", "brand", "price", "other"])
good_json = '{"user_id": "a", "item_id": "x", "timestamp": 1}'
lines = {
    ".tsv": st.lists(st.one_of(st.just("a\tx\t1\t2"), st.lists(cells, max_size=5).map("\t".join))),
    ".csv": st.lists(st.one_of(st.just("a,x,1,2"), st.lists(cells, max_size=5).map(",".join))),
    ".jsonl": st.lists(
        st.one_of(
            st.just(good_json), st.dictionaries(names, values).map(json.dumps), cells, st.lists(values).map(json.dumps)
        )
    ),
}
HEADERS = {
    ".tsv": b"user_id\titem_id\ttimestamp\trating\n",
    ".csv": b"user_id,item_id,timestamp,rating\n",
    ".jsonl": b"",
}
ITEM_HEADERS = {
    ".tsv": b"item_id\ttitle\tcategories\tprice\n",
    ".csv": b"item_id,title,categories,price\n",
    ".jsonl": b"",
}


@st.composite
def files(draw):
    suffix = draw(st.sampled_from(sorted(lines)))
    content = "\n".join(draw(lines[suffix])).encode("utf-8", "surrogatepass")
    if draw(st.booleans()):
        at = draw(st.integers(0, len(content)))
        content = content[:at] + draw(st.binary(max_size=6)) + content[at:]
    return suffix, content


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(files())
@example((".csv", b'"a\n"\n\n"'))
@example((".csv", b"a,x,1,\x1c2"))
def test_every_row_is_kept_or_rejected(no_progress_lines, file):
    suffix, content = file
    with tempfile.TemporaryDirectory() as scratch:
        folder = put(pathlib.Path(scratch), f"interactions{suffix}", HEADERS[suffix] + content)
        put(folder, f"items{suffix}", ITEM_HEADERS[suffix] + content)
        interactions, items, rejected = read(folder, "skip")
        if suffix != ".csv":
            body = content if HEADERS[suffix] else content.removeprefix(b"\xef\xbb\xbf")
            rows = sum(bool(line.strip(b"\r\n")) for line in body.split(b"\n"))
            of = [sum(entry["file"] == f"{stem}{suffix}" for entry in rejected) for stem in ("interactions", "items")]
            assert [len(interactions) + of[0], len(items) + of[1]] == [rows, rows]
        for user_id, item_id, timestamp, rating in interactions:
            assert user_id.strip()
            assert item_id.strip()
            assert -(2**63) <= timestamp < 2**63
            assert rating is None or abs(rating) < 3.5e38
        for item_id, text in items:
            json.dumps(
                [item_id, text.title, text.categories, text.brand, dict(text.extra)], ensure_ascii=False
            ).encode()
            assert "\0" not in text.title
        assert len({item.item_id for item in items}) == len(items)
        if rejected:
            with pytest.raises(InputError, match=r"(line|row) \d+: "):
                read(folder)
        else:
            assert read(folder) == (interactions, items, [])


@pytest.fixture(scope="module")
def no_progress_lines():
    """Thousands of progress lines are no use in a report."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.print", lambda *args, **kwargs: None)
        yield


@given(st.text())
def test_clean_text(raw):
    clean = records.clean_text(raw)
    assert clean == " ".join(clean.split())
    assert not any(ord(c) < 32 or 127 <= ord(c) < 160 for c in clean)
    if raw.isalnum():
        assert clean == raw
    clean.encode()


def test_clean_text_takes_any_entity_in_no_time():
    for raw in ("&#" + "9" * 100_000 + ";", "&#x" + "f" * 100_000 + ";", "&" * 100_000, "&a" * 50_000, "&#;&#x;&;"):
        assert records.clean_text(raw) == raw


def test_clean_text_examples():
    assert records.clean_text(" L&#39;Or &amp;\tCo\x00.\n\x07Ltd&reg;  AT&T &bogus; &#xD800;") == (
        "L'Or & Co. Ltd\u00ae AT&T &bogus; \ufffd"
    )


# MovieLens.

MOVIES = "1|Toy Story (1995)|01-Jan-1995||http|0|1|1\n2|L\u00e9on (1994)|||http|0|0|1\n3|unknown||||1|0|0\n"


def movielens_folder(folder: pathlib.Path) -> pathlib.Path:
    put(folder, "u.data", "7\t1\t5\t881250949\n7\t2\t3\t881250950\n8\t3\t1\t881250951\n")
    put(folder, "u.item", MOVIES.encode("latin-1"))
    return put(folder, "u.genre", "unknown|0\nAction|1\nSci-Fi|2\n\n")


def test_movielens(tmp_path):
    interactions, items, _ = read(movielens_folder(tmp_path), open_folder=movielens.open_folder)
    assert interactions[0] == records.Interaction("7", "1", 881250949, 5.0)
    assert items == [
        records.Item("1", records.ItemText("Toy Story (1995)", ("Action", "Sci-Fi"))),
        records.Item("2", records.ItemText("L\u00e9on (1994)", ("Sci-Fi",))),
        records.Item("3", records.ItemText()),
    ]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("u.data", "7\t1\t6\t881250949\n", r"u\.data, line 1: rating must be from 1 to 5, not 6"),
        ("u.data", "7\t1\tx\t881250949\n", r"u\.data, line 1: rating is not a number"),
        ("u.data", "7\t1\t5\n", r"u\.data, line 1: 3 cells where there are 4 columns"),
        ("u.item", "1|Toy Story|||http|0|2|1\n", r"u\.item, line 1: genre Action must be 0 or 1, not '2'"),
        ("u.item", "1|a||||0|0|1\n1|b||||0|0|1\n", r"u\.item, line 2: item '1' is there twice"),
        ("u.genre", "unknown|0\n", r"u\.item, line 1: 8 cells where there are 6 columns"),
    ],
)
def test_bad_movielens(tmp_path, name, content, reason):
    put(movielens_folder(tmp_path), name, content)
    with pytest.raises(InputError, match=reason):
        read(tmp_path, open_folder=movielens.open_folder)


def test_the_copy_in_recbole_gives_the_same_records(tmp_path):
    """The copy is made here from GroupLens' files, in the form in which the package has it."""
    original = shared("data/movielens_100k")
    interactions, items, _ = read(original, open_folder=movielens.open_folder)
    rows = "".join(f"{r.user_id}\t{r.item_id}\t{r.rating:g}\t{r.timestamp}\n" for r in interactions)
    put(tmp_path, "ml-100k.inter", "user_id:token\titem_id:token\trating:float\ttimestamp:float\n" + rows)
    movies = []
    for item in items:
        title, _, year = item.text.title.rpartition(" (")
        known = year[:4].isdecimal()
        title, year = (title, year[:-1]) if known else (item.text.title or "unkonwn", "unkonwn")
        movies.append("\t".join([item.item_id, title, year, " ".join(item.text.categories) or "unknown"]) + "\n")
    header = "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
    put(tmp_path, "ml-100k.item", header + "".join(movies))
    assert read(tmp_path, open_folder=movielens.open_folder) == (interactions, items, [])

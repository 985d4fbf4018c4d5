"""Apache Beam (DirectRunner) against one process: the same corpus, byte for byte, and the same messages."""

import json
import sys

import pytest

from recalign_jax.corpus import beam
from recalign_jax.errors import InputError
from tests.corpora import prepared, write_tables
from tests.shared_data import shared
from tests.test_corpus import ITEMS, ROWS, snapshot

DIRECT = ("--runner", "DirectRunner")


@pytest.fixture
def apache_beam(monkeypatch):
    # Several batches even from the few rows of a test.
    monkeypatch.setattr(beam, "ROWS_A_BATCH", 3)
    return pytest.importorskip("apache_beam", reason="Apache Beam is not installed: pip install -e '.[beam]'")


def files_but_for_the_runner(folder, runner):
    """Returns the bytes of all files; of corpus.json its objects without the runner, which is checked."""
    files = snapshot(folder)
    metadata = json.loads(files.pop("corpus.json"))
    assert metadata["options"].pop("runner") == runner
    return files, metadata


def assert_equal_corpora(source, raw, tmp_path, *flags):
    """Prepares with and without Beam into two data directories and compares all files."""
    prepared(source, raw, tmp_path / "one", "same", *flags)
    prepared(source, raw, tmp_path / "two", "same", *flags, *DIRECT)
    one = files_but_for_the_runner(tmp_path / "one" / "same", None)
    two = files_but_for_the_runner(tmp_path / "two" / "same", "DirectRunner")
    assert one == two
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == ["same"]


@pytest.mark.parametrize("flags", [(), ("--k_core", "2", "--tie_break", "shuffle", "--seed", "4")])
def test_tables(apache_beam, tmp_path, flags):
    rows = [*ROWS, ("ann", "x", 1, 5), ("ann", "x", 8, 2)]
    items = [*ITEMS, *({"item_id": f"n{n}", "title": f"Title {n}", "price": n / 7} for n in range(20))]
    assert_equal_corpora("tables", write_tables(tmp_path / "raw", rows, items), tmp_path, *flags)


def test_interactions_without_ratings(apache_beam, tmp_path):
    raw = write_tables(tmp_path / "raw", [row[:3] for row in ROWS], ITEMS)
    assert_equal_corpora("tables", raw, tmp_path)


def broken(raw):
    """Puts bad rows of every kind into tables, and items that are there twice."""
    interactions, items = raw / "interactions.tsv", raw / "items.jsonl"
    lines = interactions.read_bytes().splitlines()
    lines[3:3] = [b"ann\tx", b"\xff\tx\t1\t2", b"", b"ann\tx\tlate\t1", b"dan\tx\t1\t"]
    interactions.write_bytes(b"\n".join(lines) + b"\n")
    lines = items.read_bytes().splitlines()
    lines[1:1] = [b"{", b'["x"]', lines[0].replace(b"Sponge", b"Not the"), b'{"item_id": "\\ud800"}', lines[1]]
    items.write_bytes(b"\n".join([*lines, lines[0]]) + b"\n")
    return raw


def test_bad_rows_are_left_out(apache_beam, tmp_path):
    raw = broken(write_tables(tmp_path / "raw", ROWS, ITEMS))
    assert_equal_corpora("tables", raw, tmp_path, "--on_error", "skip")
    rejected = [json.loads(line) for line in (tmp_path / "two" / "same" / "rejected.jsonl").read_text().splitlines()]
    assert [entry["file"] for entry in rejected] == ["interactions.tsv"] * 4 + ["items.jsonl"] * 6
    assert sum("is there twice" in entry["reason"] for entry in rejected) == 3


def message(raw, data_dir, *flags):
    with pytest.raises(InputError) as error:
        prepared("tables", raw, data_dir, "bad", *flags)
    assert list(data_dir.iterdir()) == []
    return str(error.value)


def test_the_first_bad_row_is_named(apache_beam, tmp_path):
    data_dir = tmp_path / "data"
    data_dir.mkdir()
    raw = broken(write_tables(tmp_path / "raw", ROWS, ITEMS))
    for expected in ("line 4", "items.jsonl, line 2", "items.jsonl, line 4"):
        found = message(raw, data_dir, *DIRECT)
        assert found == message(raw, data_dir)
        assert expected in found
        # One after the other is put right.
        if expected == "line 4":
            write_tables(tmp_path / "good", ROWS)
            (tmp_path / "good" / "interactions.tsv").replace(raw / "interactions.tsv")
        elif expected == "items.jsonl, line 2":
            lines = (raw / "items.jsonl").read_bytes().splitlines()
            (raw / "items.jsonl").write_bytes(b"\n".join([lines[0], b"", b"", *lines[3:]]))


@pytest.mark.parametrize("on_error", ["fail", "skip"])
def test_a_file_that_breaks_off_is_named(apache_beam, tmp_path, on_error):
    import gzip

    data_dir = tmp_path / "data"
    data_dir.mkdir()
    rows = [(f"user{n * 7919 % 1000}", f"item{n * 104729 % 997}", n) for n in range(3000)]
    raw = write_tables(tmp_path / "raw", rows)
    path = raw / "interactions.tsv"
    (raw / "interactions.tsv.gz").write_bytes(gzip.compress(path.read_bytes())[:-100])
    path.unlink()
    flags = ("--on_error", on_error)
    found = message(raw, data_dir, *flags, *DIRECT)
    assert found == message(raw, data_dir, *flags)
    assert "cannot be read" in found


def test_movielens(apache_beam, tmp_path, monkeypatch):
    monkeypatch.setattr(beam, "ROWS_A_BATCH", 7000)
    assert_equal_corpora("movielens", shared("data/movielens_100k"), tmp_path, "--k_core", "5")


@pytest.mark.parametrize("bad", [(), ("u9,x,late,1", "u9,x,1")])
def test_several_tables(apache_beam, tmp_path, bad):
    """The published splits of Amazon 2023: three files in a row."""
    raw = tmp_path / "raw"
    raw.mkdir()
    for number, name in enumerate(("train", "valid", "test")):
        rows = [f"u{n},i{(n * 7 + number) % 10},{n % 5 + 1},{1_500_000_000_000 + n % 3}" for n in range(20)]
        lines = ["user_id,parent_asin,rating,timestamp", *rows[:11], *bad, *rows[11:]]
        (raw / f"Beauty.{name}.csv").write_text("\n".join(lines) + "\n")
    items = [{"parent_asin": f"i{n}", "title": f"Title {n}", "store": "Shop", "categories": ["A"]} for n in range(12)]
    (raw / "meta_Beauty.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    assert_equal_corpora("amazon", raw, tmp_path, "--on_error", "skip" if bad else "fail")


def test_a_corpus_is_extended(apache_beam, tmp_path):
    first = write_tables(tmp_path / "raw", ROWS, ITEMS)
    more = write_tables(tmp_path / "more", [("dan", "x", 1, 2), ("ann", "new", 0, 3)], [{"item_id": "z", "title": "Z"}])
    for name, flags in (("one", ()), ("two", DIRECT)):
        prepared("tables", first, tmp_path / name, "same")
        prepared("tables", more, tmp_path / name, "same", "--extend", *flags)
    one, two = snapshot(tmp_path / "one"), snapshot(tmp_path / "two")
    differing = {name for name in one if one[name] != two[name]}
    assert (one.keys(), differing) == (two.keys(), {"same/corpus.json"})


def test_an_unknown_runner(apache_beam, tmp_path):
    raw = write_tables(tmp_path / "raw", ROWS)
    with pytest.raises(InputError, match="--runner NoSuchRunner"):
        prepared("tables", raw, tmp_path, "same", "--runner", "NoSuchRunner")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["raw"]


def test_without_apache_beam(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    raw = write_tables(tmp_path / "raw", ROWS)
    with pytest.raises(InputError, match=r"pip install -e '\.\[beam\]'"):
        prepared("tables", raw, tmp_path, "same", *DIRECT)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["raw"]


def test_beam_options_need_a_runner(tmp_path):
    raw = write_tables(tmp_path / "raw", ROWS)
    with pytest.raises(InputError, match="--beam_options are for a --runner"):
        prepared("tables", raw, tmp_path, "same", "--beam_options=--project=x")

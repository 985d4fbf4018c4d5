"""`recalign prepare --extend` against plain dicts: nothing moves, newcomers enter by the rules of the corpus."""

import itertools
import json
import shutil
import types

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recalign_jax import files
from recalign_jax.commands import inspect, prepare
from recalign_jax.corpus import build
from recalign_jax.corpus.assemble import Reader, assemble
from recalign_jax.corpus.corpus import load_corpus
from recalign_jax.corpus.records import Interaction, Item, ItemText
from recalign_jax.errors import InputError
from tests.corpora import call, prepared, shared_corpus, write_tables
from tests.test_corpus import snapshot

FIRST = [
    *[("ann", item, time) for item, time in (("x", 3), ("y", 1), ("z", 2))],
    *[("bob", item, time) for item, time in (("x", 5), ("y", 5), ("z", 7))],
]
FIRST_ITEMS = [{"item_id": "x", "title": "Sponge"}, {"item_id": "y", "title": "Soap"}]
MORE = [
    *[("bob", item, time) for item, time in (("w", 5), ("v", 6), ("x", 1), ("w", 9))],
    *[("dan", item, time) for item, time in (("x", 1), ("u", 2), ("w", 3))],
]
MORE_ITEMS = [
    {"item_id": "x", "title": "Another sponge"},
    {"item_id": "z", "title": "Towel", "price": 2.5},
    {"item_id": "w", "title": "Brush"},
    {"item_id": "q", "title": "Never bought"},
]


@pytest.fixture
def small(tmp_path):
    return prepared("tables", write_tables(tmp_path / "raw", FIRST, FIRST_ITEMS), tmp_path, "small")


def extended(small, rows, items=(), *flags):
    """Extends the corpus by tables and opens it."""
    data_dir = small.directory.parent
    raw = write_tables(data_dir / "more", rows, items)
    flags = ["--source", "tables", "--input", str(raw), "--corpus", small.name, "--extend", *flags]
    result = call(prepare, data_dir, *flags)
    return load_corpus(small.name, data_dir), result


def history(corpus, user_id):
    """Returns (item id, timestamp) of a user, oldest first."""
    (user,) = (user for user in range(corpus.num_users) if corpus.user_source_id(user) == user_id)
    span = slice(corpus.user_offsets[user], corpus.user_offsets[user + 1])
    items = [corpus.item_source_id(item) for item in corpus.items[span]]
    return list(zip(items, corpus.timestamps[span].tolist(), strict=True))


def ids(corpus):
    return (
        [corpus.user_source_id(user) for user in range(corpus.num_users)],
        [corpus.item_source_id(item) for item in range(corpus.num_items)],
    )


# The oracle: dicts, one row at a time.

Row = tuple[str, str, int, float]  # user, item, time, rating


class Plain:
    """A corpus in dicts: each user's rows in order, and the text of each item."""

    def __init__(self):
        self.rows: dict[str, list[Row]] = {}
        self.texts: dict[str, str] = {}

    def add(self, rows: list[Row], items: dict[str, str], k: int) -> dict[str, int]:
        """Joins raw rows; returns how many were repeated and dropped, and how many items were known."""
        users, known_items = set(self.rows), set(self.texts)
        there = {(row[0], row[1]) for old in self.rows.values() for row in old}
        new: dict[tuple[str, str], Row] = {}
        for row in rows:
            pair = row[:2]
            if pair not in there and (pair not in new or row[2] < new[pair][2]):
                # A dict keeps the place of a key that is there: what is replaced must go first.
                new.pop(pair, None)
                new[pair] = row
        order = {id(row): number for number, row in enumerate(rows)}
        repeated = len(rows) - len(new)
        distinct = len(new)
        while True:
            poor_users = {u for u, _ in new if u not in users and sum(pair[0] == u for pair in new) < k}
            poor_items = {i for _, i in new if i not in known_items and sum(pair[1] == i for pair in new) < k}
            if not poor_users and not poor_items:
                break
            new = {pair: row for pair, row in new.items() if pair[0] not in poor_users and pair[1] not in poor_items}
        for row in sorted(new.values(), key=lambda row: order[id(row)]):
            self.rows.setdefault(row[0], []).append(row)
        for of_user in self.rows.values():
            of_user.sort(key=lambda row: row[2])  # stable: old before new, then as read
        for item in {pair[1] for pair in new} | (set(items) if k == 0 else set()):
            self.texts.setdefault(item, "")
        for item, text in items.items():
            if item in self.texts and not self.texts[item]:
                self.texts[item] = text
        return {
            "interactions_read": len(rows),
            "interactions_repeated": repeated,
            "interactions_dropped_by_k_core": distinct - len(new),
            "items_read": len(items),
            "items_dropped_by_k_core": len(set(items) - set(self.texts)),
        }


rows = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(0, 4), st.integers(1, 5)), max_size=25)
items = st.dictionaries(st.integers(0, 6), st.sampled_from(["", "one", "two"]), max_size=5)


def joined(raw, table, options, before=build.EMPTY, texts=(), extensions=0):
    """Assembles a corpus without files."""
    log = build.collect(Interaction(*row) for row in raw)
    reader = Reader(
        lambda reject: log, lambda reject: iter([Item(item, ItemText(title=title)) for item, title in table.items()])
    )
    return assemble(reader, types.SimpleNamespace(count=0, last=""), *options, before, texts, extensions)


def spelled(raw, table):
    return [(f"u{u}", f"i{i}", t, float(r)) for u, i, t, r in raw], {f"i{i}": text for i, text in table.items()}


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(rows, items), min_size=2, max_size=4),
    st.integers(0, 3),
    st.sampled_from(build.TIE_BREAKS),
    st.integers(0, 2),
)
def test_extending_is_what_dicts_say(steps, k, tie_break, seed):
    options = (k, tie_break, seed)
    plain, before, texts = Plain(), build.EMPTY, []
    for extensions, step in enumerate(steps):
        raw, table = spelled(*step)
        expected_counts = plain.add(raw, table, k)
        if not plain.rows:
            with pytest.raises(InputError, match="No interaction is left"):
                joined(raw, table, options)
            return
        after, new_texts, counts = joined(raw, table, options, before, texts, extensions)
        assert {name: counts[name] for name in expected_counts} == expected_counts
        # No number moves.
        assert after.user_ids[: len(before.user_ids)] == before.user_ids
        assert after.item_ids[: len(before.item_ids)] == before.item_ids
        # The same users, items and text.
        assert sorted(after.user_ids) == sorted(plain.rows)
        assert dict(zip(after.item_ids, (text.title for text in new_texts), strict=True)) == plain.texts
        old_rows = {user: set(history_of(before, number)) for number, user in enumerate(before.user_ids)}
        for number, user in enumerate(after.user_ids):
            found, expected = history_of(after, number), plain.rows[user]
            if tie_break == "file":
                assert found == expected
                continue
            assert sorted(found) == sorted(expected)
            assert [row[2] for row in found] == [row[2] for row in expected]
            # Of one time those of the corpus come first, in the order they had.
            old = [row in old_rows.get(user, ()) for row in found]
            same_time = [a[2] == b[2] for a, b in itertools.pairwise(found)]
            assert not any(
                same and late and not early for same, early, late in zip(same_time, old, old[1:], strict=False)
            )
            assert [row for row, is_old in zip(found, old, strict=True) if is_old] == (
                history_of(before, number) if user in old_rows else []
            )
            # The next step is judged by the order that was drawn.
            plain.rows[user] = found
        again = joined(raw, table, options, before, texts, extensions)
        assert again.sequences.user_ids == after.user_ids
        assert np.array_equal(again.sequences.items, after.items)
        before, texts = after, new_texts


def history_of(sequences, number):
    span = slice(sequences.offsets[number], sequences.offsets[number + 1])
    columns = (sequences.items[span], sequences.timestamps[span], sequences.ratings[span])
    user = sequences.user_ids[number]
    return [(user, sequences.item_ids[i], int(t), float(r)) for i, t, r in zip(*columns, strict=True)]


def test_newcomers_are_numbered_at_random_among_themselves():
    """Their order says nothing of their ids or of when they came, and differs from extension to extension."""
    first = [(f"u{n:04}", f"i{n:04}", 0, 1.0) for n in range(1000)]
    second = [(f"v{n:04}", f"j{n:04}", 0, 1.0) for n in range(1000)]
    options = (0, "file", 0)
    before = joined(first, {}, options).sequences

    def numbers(seed, extensions):
        again = (0, "file", seed)
        after = joined(second, {}, again, before, [ItemText()] * 1000, extensions).sequences
        assert after.user_ids[:1000] == before.user_ids
        assert after.item_ids[:1000] == before.item_ids
        return np.array([[int(name[1:]) for name in ids[1000:]] for ids in (after.user_ids, after.item_ids)])

    one = numbers(0, 1)
    assert (np.sort(one) == np.arange(1000)).all()
    others = (numbers(1, 1), numbers(0, 2), one[::-1], np.tile(np.arange(1000), (2, 1)))
    # A random permutation agrees with another in one place on average.
    assert all((one == other).mean() < 0.01 for other in others)
    assert all(abs(np.corrcoef(one[row], np.arange(1000))[0, 1]) < 4 / np.sqrt(1000) for row in (0, 1))


# Files and command.


def test_a_corpus_is_extended_in_place(small):
    users, item_ids = ids(small)
    texts = [small.item_text(item) for item in range(small.num_items)]
    fingerprint = small.fingerprint
    after, result = extended(small, MORE, MORE_ITEMS)
    assert (ids(after)[0][:2], ids(after)[1][:3]) == (users, item_ids)
    assert sorted(ids(after)[0][2:]) == ["dan"]
    assert sorted(ids(after)[1][3:]) == ["q", "u", "v", "w"]
    for item, text in enumerate(texts):
        if item_ids[item] != "z":
            assert after.item_text(item) == text
    assert after.item_text(item_ids.index("z")) == ItemText(title="Towel", price=2.5)
    assert after.item_text(ids(after)[1].index("w")).title == "Brush"
    assert history(after, "ann") == [("y", 1), ("z", 2), ("x", 3)]
    # bob's x stays at 5 though a row of time 1 came; w at 5 goes behind what was there at 5.
    assert history(after, "bob") == [("x", 5), ("y", 5), ("w", 5), ("v", 6), ("z", 7)]
    assert history(after, "dan") == [("x", 1), ("u", 2), ("w", 3)]
    assert result == {
        "users": 3,
        "items": 7,
        "interactions": 11,
        "rejected_rows": 0,
        "corpus_dir": str(small.directory),
        "users_added": 1,
        "items_added": 4,
        "interactions_added": 5,
    }
    (extension,) = after.metadata["extensions"]
    sizes = {"users": 2, "items": 3, "interactions": 6}
    assert extension["before"] == {"fingerprint": fingerprint, **sizes}
    assert extension["options"]["source"] == "tables"
    assert [entry["name"] for entry in extension["source_files"]] == ["interactions.tsv", "items.jsonl"]
    assert extension["recalign_jax_version"] == after.metadata["recalign_jax_version"]
    counts = extension["counts"]
    assert (counts["interactions_read"], counts["interactions_repeated"], counts["interactions"]) == (7, 2, 5)
    assert (counts["items_read"], counts["items_known"], counts["items_given_text"]) == (4, 1, 1)
    for name in ("name", "options", "source_files", "recalign_jax_version"):
        assert after.metadata[name] == small.metadata[name]
    total = after.metadata["counts"]
    assert (total["interactions_read"], total["interactions_repeated"], total["items_read"]) == (13, 2, 6)
    assert (total["items_never_met"], total["items_without_text"]) == (1, 2)  # q; u and v
    assert after.fingerprint != fingerprint
    statistics = inspect.statistics(after)
    assert (statistics["users"], statistics["items"], statistics["interactions"]) == (3, 7, 11)


def test_extending_twice_keeps_both_in_mind(small):
    first, _ = extended(small, MORE, MORE_ITEMS)
    users, item_ids = ids(first)
    second, _ = extended(first, [("eve", "x", 1), ("eve", "new", 2), ("ann", "new", 0)])
    assert (ids(second)[0][:3], ids(second)[1][:7]) == (users, item_ids)
    assert history(second, "ann") == [("new", 0), ("y", 1), ("z", 2), ("x", 3)]
    assert [entry["before"]["users"] for entry in second.metadata["extensions"]] == [2, 3]
    assert second.metadata["extensions"][0] == first.metadata["extensions"][0]
    assert second.metadata["extensions"][1]["before"]["fingerprint"] == first.fingerprint


def test_the_k_core_of_the_corpus_is_for_newcomers(tmp_path, capsys):
    raw = write_tables(tmp_path / "raw", [(u, i, 1) for u in "ab" for i in "xy"])
    small = prepared("tables", raw, tmp_path, "small", "--k_core", "2", "--seed", "3", "--tie_break", "shuffle")
    # c has two and stays; d has one with an item that stays and one with an item that doesn't, and goes.
    rows = [("c", "x", 1), ("c", "w", 1), ("a", "w", 1), ("d", "x", 1), ("d", "v", 1), ("b", "v", 0)]
    after, result = extended(small, rows[:5], [{"item_id": "t", "title": "T"}, {"item_id": "w", "title": "W"}])
    assert sorted(ids(after)[0]) == ["a", "b", "c"]
    assert sorted(ids(after)[1]) == ["w", "x", "y"]
    counts = after.metadata["extensions"][0]["counts"]
    assert (counts["interactions_dropped_by_k_core"], counts["items_dropped_by_k_core"]) == (2, 1)
    options = after.metadata["extensions"][0]["options"]
    assert (options["k_core"], options["tie_break"], options["seed"]) == (2, "shuffle", 3)
    assert result["interactions_added"] == 3
    # What was dropped is forgotten, as the command says, until it is given again.
    assert "dropped 2 interactions, which are not kept. Give them again" in capsys.readouterr().out
    without, result = extended(after, rows[5:])
    assert (result["interactions_added"], result["items"]) == (0, 3)
    again, result = extended(without, rows[3:])
    assert sorted(ids(again)[0]) == ["a", "b", "c", "d"]
    assert result["interactions_added"] == 3


def test_the_same_input_gives_the_same_bytes(small, tmp_path):
    shutil.copytree(small.directory, tmp_path / "other" / "small")
    extended(small, MORE, MORE_ITEMS)
    extended(load_corpus("small", tmp_path / "other"), MORE, MORE_ITEMS)
    assert snapshot(small.directory) == snapshot(tmp_path / "other" / "small")


def test_a_renamed_corpus_is_extended_under_its_folder_s_name(small):
    path = small.directory / "corpus.json"
    path.write_text(path.read_text().replace('"name": "small"', '"name": "../../escape"'))
    after, _ = extended(small, MORE, MORE_ITEMS)
    assert after.metadata["name"] == "small"
    assert sorted(path.name for path in small.directory.parent.iterdir()) == ["more", "raw", "small"]
    names = {path.name.partition("-")[0] for path in after.directory.glob("*/*.array_record-*")}
    assert names == {"small_items", "small_users"}


def test_nothing_new_is_no_extension(small, capsys):
    before = snapshot(small.directory)
    known = [{"item_id": "x", "title": "Another sponge"}, {"item_id": "z"}]
    after, result = extended(small, [("ann", "x", 1), ("bob", "z", 99)], known)
    assert "Nothing new" in capsys.readouterr().out
    assert snapshot(small.directory) == before
    assert (result["interactions"], result["interactions_added"], result["items_added"]) == (6, 0, 0)
    assert "extensions" not in after.metadata
    assert sorted(path.name for path in small.directory.parent.iterdir()) == ["more", "raw", "small"]


def test_items_alone_can_join(small):
    after, result = extended(small, [], [{"item_id": "new", "title": "New"}])
    assert (result["items_added"], result["interactions_added"]) == (1, 0)
    assert after.item_text(3).title == "New"
    assert np.array_equal(after.items, small.items)


def test_columns_that_no_prompt_shows_are_no_text(tmp_path, capsys):
    """A corpus whose column of titles wasn't named can be given them."""
    items = [{"item_id": item, "name": f"Name of {item}", "year": "1999"} for item in ("x", "y", "z")]
    small = prepared("tables", write_tables(tmp_path / "raw", FIRST, items), tmp_path, "small")
    assert "3 of 3 items have no text" in capsys.readouterr().err
    after, result = extended(small, [], items, "--title_column", "name")
    assert (result["items_added"], after.metadata["extensions"][0]["counts"]["items_given_text"]) == (0, 3)
    number = after.item_numbers["y"]
    assert after.item_text(number).title == "Name of y"
    assert after.item_text(number).extra == {"name": "Name of y", "year": "1999"}


def test_bad_rows_of_all_extensions_are_kept(small):
    for corpus, bad in ((small, "one"), (small, "two")):
        _, result = extended(corpus, [("ann", bad, 1), ("ann", f"{bad}!", "never")], (), "--on_error", "skip")
        assert result["rejected_rows"] == 1
    rows = [json.loads(line) for line in (small.directory / "rejected.jsonl").read_text().splitlines()]
    assert [entry["row"].split("\t")[1] for entry in rows] == ["one!", "two!"]
    after, _ = extended(small, [("ann", "three", 1)])
    assert len((small.directory / "rejected.jsonl").read_text().splitlines()) == 2
    counts = after.metadata["counts"]
    assert counts["interactions_rejected"] == 2
    assert counts["interactions_read"] == counts["interactions"] + 2


@pytest.mark.parametrize(
    ("rows", "flags", "message"),
    [
        ([("ann", "w", "never")], [], "line 2: timestamp"),
        ([("ann", "w", 1, 5)], [], "The corpus has no ratings, but the new interactions have some"),
        ([("ann", "w", 1)], ["--item_column", "sku"], "no column 'sku'"),
        ([("ann", "w", 1)], ["--k_core", "5"], r"--k_core cannot change with --extend: the corpus has k_core 0, tie"),
        ([("ann", "w", 1)], ["--seed", "0"], "--seed cannot change"),
        ([("ann", "w", 1)], ["--tie_break", "file"], "--tie_break cannot change"),
    ],
)
def test_a_failed_extension_leaves_the_corpus(small, rows, flags, message):
    before = snapshot(small.directory)
    with pytest.raises(InputError, match=message):
        extended(small, rows, (), *flags)
    assert snapshot(small.directory) == before
    assert sorted(path.name for path in small.directory.parent.iterdir()) == ["more", "raw", "small"]


def test_a_rated_corpus_needs_ratings(tmp_path):
    raw = write_tables(tmp_path / "raw", [("ann", "x", 1, 5)])
    rated = prepared("tables", raw, tmp_path, "rated")
    with pytest.raises(InputError, match="The corpus has ratings, and the new interactions have none"):
        extended(rated, [("ann", "y", 1)])
    after, _ = extended(rated, [("ann", "y", 2, 2.5)])
    assert after.ratings.tolist() == [5, 2.5]


def test_another_unit_of_time_is_told(small, capsys):
    extended(small, [("ann", "new", 3)])
    assert "milliseconds" not in capsys.readouterr().err
    after, _ = extended(small, [("ann", "newest", 4_000)])
    assert "The new timestamps are around 4e+03, those of the corpus around" in capsys.readouterr().err
    assert history(after, "ann")[-1] == ("newest", 4_000)


def test_an_interrupted_extension_leaves_the_corpus(small, monkeypatch):
    before = snapshot(small.directory)

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("recalign_jax.corpus.storage._fingerprint", interrupted)
    with pytest.raises(KeyboardInterrupt):
        extended(small, MORE, MORE_ITEMS)
    assert snapshot(small.directory) == before
    assert sorted(path.name for path in small.directory.parent.iterdir()) == ["more", "raw", "small"]


def test_of_two_extensions_at_once_none_is_lost(small, monkeypatch):
    real = files._sync_all

    def sync_all(folder):
        real(folder)
        monkeypatch.undo()
        extended(small, [("first", "a", 1)])  # the other one, from its beginning to its end

    monkeypatch.setattr(files, "_sync_all", sync_all)
    with pytest.raises(InputError, match="was replaced while in use"):
        extended(small, [("second", "a", 1)])
    after = load_corpus("small", small.directory.parent)
    users = [after.user_source_id(user) for user in range(after.num_users)]
    assert ("first" in users, "second" in users) == (True, False)


def test_what_a_killed_extension_left_is_removed(small):
    with files.scratch_directory(small.directory) as living:
        left = living.with_name(f"{living.name}_killed")
        left.mkdir()
        extended(small, [("new", "a", 1)])
        assert (left.exists(), living.exists()) == (False, True)
    assert not living.exists()


def test_only_a_corpus_can_be_extended(small, capsys):
    flags = ["--source", "tables", "--input", str(small.directory.parent / "raw"), "--extend"]
    with pytest.raises(InputError, match="Did you mean 'small'"):
        call(prepare, small.directory.parent, *flags, "--corpus", "smal")
    with pytest.raises(SystemExit):
        call(prepare, small.directory.parent, *flags, "--corpus", "small", "--overwrite")
    assert "not allowed with" in capsys.readouterr().err


def test_the_source_may_be_another_one(tmp_path):
    """MovieLens, extended by a shop's tables."""
    movielens = shared_corpus("movielens_100k")
    shutil.copytree(movielens.directory, tmp_path / movielens.name)
    rows = [("1", "9001", 900_000_000, 5), ("new user", "1", 1, 3), ("new user", "9001", 2, 4)]
    copy = load_corpus(movielens.name, tmp_path)
    after, _ = extended(copy, rows, [{"item_id": "9001", "title": "A film of our own"}])
    assert ids(after)[0][:943] == ids(movielens)[0]
    assert ids(after)[1][:1682] == ids(movielens)[1]
    assert ids(after)[1][1682] == "9001"
    assert [after.item_text(item) for item in range(1682)] == [movielens.item_text(item) for item in range(1682)]
    user = ids(after)[0].index("1")
    assert after.sequence(user).tolist() == [*movielens.sequence(user).tolist(), 1682]
    for other in range(0, 943, 50):
        if other != user:
            assert np.array_equal(after.sequence(other), movielens.sequence(other))

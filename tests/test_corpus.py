"""The corpus: published statistics, k-core, order and hold-out against brute force, storage, atomicity."""

import itertools
import json
import math
import pathlib
import pickle
import shutil
import subprocess
import sys
import textwrap
import threading
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recalign_jax import cli, files
from recalign_jax.commands import inspect, prepare
from recalign_jax.corpus import build, corpus, holdout, statistics
from recalign_jax.corpus.records import Interaction, ItemText
from recalign_jax.errors import InputError
from recalign_jax.files import atomic_directory, atomic_file
from tests.corpora import call, files_of_at_most, prepared, shared_corpus, write_tables

ROWS = [
    *[("ann", item, time, 4) for item, time in (("x", 3), ("y", 1), ("z", 2), ("w", 9))],
    *[("bob", item, time, 2.5) for item, time in (("x", 5), ("y", 5), ("z", 5))],
    *[("cem", item, time, 1) for item, time in (("w", 1), ("x", 2))],
]
ITEMS = [
    {"item_id": "x", "title": " Sponge &amp; \t cloth\x00 ", "categories": ["Home", "Bath"], "brand": "L&#39;Or"},
    {"item_id": "y", "title": "Sponge & cloth", "price": 14.96, "description": "Soft.", "weight": 3},
    {"item_id": "v", "title": "Never bought"},
]


@pytest.fixture
def beauty():
    return shared_corpus("amazon_beauty")


@pytest.fixture
def small(tmp_path):
    return prepared("tables", write_tables(tmp_path / "raw", ROWS, ITEMS), tmp_path, "small")


def snapshot(folder: pathlib.Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# Published statistics.


def test_beauty_has_the_published_statistics(beauty):
    numbers = inspect.statistics(beauty)
    expected = {"users": 22_363, "items": 12_101, "interactions": 198_502, "untitled_items": 7, "shared_titles": 55}
    assert {key: numbers[key] for key in expected} == expected
    assert numbers["sequence_length"] == {"min": 5, "median": 6, "mean": pytest.approx(198_502 / 22_363), "max": 204}
    assert numbers["users_train_only"] == numbers["items_never_met"] == numbers["tied_test_items"] == 0
    assert round(100 * numbers["unseen_test_items"], 1) == 0.6
    # Every prefix of a training part is a pair (history, next item).
    assert int((beauty.training_lengths - 1).sum()) == 131_413


def test_beauty_is_a_five_core(beauty):
    users = np.repeat(np.arange(beauty.num_users), beauty.lengths)
    assert build.k_core(users, beauty.items, 5).all()
    assert not build.k_core(users, beauty.items, 6).all()


def test_popularity_recall_is_the_known_floor(beauty):
    top = np.argsort(-beauty.training_popularity, kind="stable")[:10]
    assert float(np.isin(beauty.targets("test"), top).mean()) == pytest.approx(0.0114, abs=5e-5)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("amazon_toys", {"users": 19_412, "items": 11_924, "interactions": 167_597, "untitled_items": 59}),
        ("amazon_beauty_timed", {"users": 22_125, "items": 12_101}),
        ("movielens_100k", {"users": 943, "items": 1_682, "interactions": 100_000, "untitled_items": 1}),
    ],
)
def test_published_statistics(name, expected):
    numbers = inspect.statistics(shared_corpus(name))
    assert {key: numbers[key] for key in expected} == expected
    if name == "movielens_100k":
        assert numbers["ratings"] == {"1": 6_110, "2": 11_370, "3": 27_145, "4": 34_174, "5": 21_201}
    if name == "amazon_beauty_timed":
        assert round(100 * numbers["tied_pairs"]) == 44
        assert round(100 * numbers["tied_test_items"]) == 43


# Oracles.

logs = st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7), st.integers(0, 4), st.integers(1, 5)), max_size=60)


@given(logs, st.integers(0, 4))
def test_k_core_is_what_removing_one_by_one_leaves(log, k):
    left = list(enumerate(log))
    while True:
        users, items = Counter(row[0] for _, row in left), Counter(row[1] for _, row in left)
        bad = next((entry for entry in left if users[entry[1][0]] < k or items[entry[1][1]] < k), None)
        if bad is None:
            break
        left.remove(bad)
    users, items = (np.array([row[column] for row in log], np.int32) for column in (0, 1))
    assert np.flatnonzero(build.k_core(users, items, k)).tolist() == [number for number, _ in left]


@settings(max_examples=200)
@given(logs.filter(bool), st.sampled_from(build.TIE_BREAKS), st.integers(0, 3))
def test_sequences_are_distinct_items_in_time_order(log, tie_break, seed):
    collected = build.collect(Interaction(f"u{u}", f"i{i}", t, r) for u, i, t, r in log)
    kept = collected.take(build.first_of_each_pair(collected.users, collected.items, collected.timestamps))
    result = build.sequences(kept, [], tie_break, seed)
    assert sorted(result.user_ids) == sorted({f"u{row[0]}" for row in log})
    assert sorted(result.item_ids) == sorted({f"i{row[1]}" for row in log})
    for number, user_id in enumerate(result.user_ids):
        earliest: dict[str, tuple[int, int, int]] = {}
        for position, (u, i, t, r) in enumerate(log):
            if f"u{u}" == user_id and (f"i{i}" not in earliest or t < earliest[f"i{i}"][0]):
                earliest[f"i{i}"] = (t, position, r)
        span = slice(result.offsets[number], result.offsets[number + 1])
        rows = list(zip([result.item_ids[i] for i in result.items[span]], result.timestamps[span], strict=True))
        expected = [(item, t) for item, (t, _, _) in sorted(earliest.items(), key=lambda entry: entry[1][:2])]
        assert [t for _, t in rows] == [t for _, t in expected]
        assert rows == expected if tie_break == "file" else sorted(rows) == sorted(expected)
        ratings = result.ratings[span]
        assert [earliest[item][2] for item, _ in rows] == ratings.tolist()


@given(logs, st.lists(st.integers(0, 60), max_size=4), st.booleans())
def test_parts_of_a_log_join_to_the_whole(log, cuts, rated):
    rows = [Interaction(f"u{u}", f"i{i}", t, r if rated else None) for u, i, t, r in log]
    bounds = [0, *sorted(cuts), len(rows)]
    parts = [build.collect(rows[start:end]) for start, end in itertools.pairwise(bounds)]
    whole, joined = build.collect(rows), build.join(parts)
    for expected, found in zip(whole, joined, strict=True):
        assert type(found) is type(expected)
        assert np.array_equal(found, expected) if isinstance(found, np.ndarray) else found == expected
        assert getattr(found, "dtype", None) == getattr(expected, "dtype", None)


def test_parts_with_and_without_ratings_do_not_join():
    parts = [build.collect([Interaction("u", "i", 1, rating)]) for rating in (None, 2.0)]
    with pytest.raises(InputError, match="Only 1 of 2 interactions have a rating"):
        build.join(parts)


def test_shuffled_ties_move_only_ties_and_depend_on_the_seed():
    rows = [Interaction(f"u{u}", f"i{i}", i // 5, None) for u in range(30) for i in range(20)]
    log = build.collect(rows)

    def items(tie_break, seed):
        result = build.sequences(log, [], tie_break, seed)
        of_user = {user: result.items[i * 20 : i * 20 + 20] for i, user in enumerate(result.user_ids)}
        return np.array([[int(result.item_ids[i][1:]) for i in of_user[f"u{u}"]] for u in range(30)])

    one, two, file = items("shuffle", 1), items("shuffle", 2), items("file", 1)
    assert (file == np.arange(20)).all()
    assert (one // 5 == file // 5).all()
    assert (items("shuffle", 1) == one).all()
    assert (one != two).mean() > 0.5
    # Each of the five places of a tie is as likely for each item: 30 users x 4 ties.
    assert np.abs((one % 5).reshape(-1, 5).mean(axis=0) - 2).max() < 4 * math.sqrt(2 / 120)


def test_numbers_do_not_depend_on_the_order_of_the_file(tmp_path):
    first = prepared("tables", write_tables(tmp_path / "a", ROWS, ITEMS), tmp_path, "first")
    swapped = [*ROWS[4:], *ROWS[:4]]
    second = prepared("tables", write_tables(tmp_path / "b", swapped, ITEMS[::-1]), tmp_path, "second")
    assert first.fingerprint == second.fingerprint
    third = prepared("tables", tmp_path / "a", tmp_path, "third", "--seed", "1")
    assert third.fingerprint != first.fingerprint


def test_numbering_is_a_permutation_unrelated_to_the_ids():
    names = [f"{i:05}" for i in range(4000)]
    numbers = np.array([int(name) for name in build.shuffled(reversed(names), seed=3, stream=1)])
    assert sorted(numbers) == list(range(4000))
    assert abs(np.corrcoef(numbers, np.arange(4000))[0, 1]) < 4 / math.sqrt(4000)
    assert build.shuffled(names, 3, 1) == build.shuffled(names[::-1], 3, 1)
    assert build.shuffled(names, 3, 1) != build.shuffled(names, 3, 0)


# The hold-out rule.


def test_hold_out_by_position(beauty):
    popularity = Counter()
    test, validation = beauty.targets("test"), beauty.targets("validation")
    for number, user in enumerate(beauty.evaluation_users):
        *training, before_last, last = beauty.sequence(user).tolist()
        assert (validation[number], test[number]) == (before_last, last)
        if number % 50 == 0:
            assert beauty.training_sequence(user).tolist() == training
            assert beauty.history(user, "validation").tolist() == training
            assert beauty.history(user, "test").tolist() == [*training, before_last]
        popularity.update(training)
    assert [popularity[item] for item in range(beauty.num_items)] == beauty.training_popularity.tolist()


def test_users_too_short_to_split_are_for_training_only(small):
    numbers = {small.user_source_id(user): user for user in range(small.num_users)}
    assert [small.user_source_id(user) for user in small.evaluation_users] == sorted(
        ["ann", "bob"], key=lambda name: numbers[name]
    )
    assert small.training_lengths[numbers["cem"]] == 2
    cem = [small.item_source_id(item) for item in small.training_sequence(numbers["cem"])]
    assert cem == ["w", "x"]
    popularity = {small.item_source_id(item): n for item, n in enumerate(small.training_popularity.tolist())}
    assert popularity == {"x": 2, "y": 1, "z": 1, "w": 1, "v": 0}  # ann: y z; bob: x; cem: w x
    assert inspect.statistics(small)["users_train_only"] == 1


@given(st.lists(st.integers(1, 9), min_size=1))
def test_training_and_targets_cover_each_sequence_once(lengths):
    for length, training in zip(lengths, holdout.training_lengths(np.array(lengths)), strict=True):
        if length < holdout.MIN_INTERACTIONS:
            assert training == length
        else:
            held_out = [int(holdout.target_positions(np.array(length), split)) for split in ("validation", "test")]
            assert [*range(training), *held_out] == list(range(length))


def test_there_is_no_target_in_training(small):
    with pytest.raises(InputError, match="train"):
        small.targets("train")


# What is stored.


def test_text_is_cleaned_and_kept(small):
    texts = {small.item_source_id(item): small.item_text(item) for item in range(small.num_items)}
    assert texts["x"].title == "Sponge & cloth"
    assert texts["x"].categories == ("Home", "Bath")
    assert texts["x"].brand == "L'Or"
    assert texts["x"].price is None
    assert texts["y"].price == 14.96
    assert texts["y"].extra == {"description": "Soft."}
    assert texts["z"].title == ""


def test_corpus_json_tells_where_it_comes_from(tmp_path):
    rows = [*ROWS, ("ann", "x", 1, 5), ("ann", "x", 8, 2)]
    folder = write_tables(tmp_path / "raw", rows, ITEMS)
    result = prepared("tables", folder, tmp_path, "told", "--k_core", "2", "--tie_break", "shuffle")
    metadata = json.loads((tmp_path / "told" / "corpus.json").read_text())
    assert metadata == result.metadata
    assert [entry["name"] for entry in metadata["source_files"]] == ["interactions.tsv", "items.jsonl"]
    checksum = subprocess.run(["sha256sum", folder / "items.jsonl"], capture_output=True, text=True, check=True)
    assert metadata["source_files"][1]["sha256"] == checksum.stdout.split()[0]
    assert (metadata["options"]["k_core"], metadata["options"]["tie_break"]) == (2, "shuffle")
    counts = metadata["counts"]
    assert counts["interactions_read"] == len(rows)
    assert counts["interactions_repeated"] == 2
    assert counts["interactions"] == len(rows) - 2
    assert counts["items_dropped_by_k_core"] == 1  # v, which nobody met
    assert counts["items_without_text"] == 2  # z and w
    # Of the three of ann and x the one of time 1 is left, with its rating; y has time 1, too.
    ann = next(user for user in range(result.num_users) if result.user_source_id(user) == "ann")
    span = slice(result.user_offsets[ann], result.user_offsets[ann + 1])
    rows_of_ann = {
        (result.item_source_id(i), t, r)
        for i, t, r in zip(
            result.items[span], result.timestamps[span].tolist(), result.ratings[span].tolist(), strict=True
        )
    }
    assert rows_of_ann == {("x", 1, 5.0), ("y", 1, 4.0), ("z", 2, 4.0), ("w", 9, 4.0)}


def test_preparing_twice_gives_the_same_bytes(tmp_path):
    folder = write_tables(tmp_path / "raw", ROWS, ITEMS)
    for data_dir in ("one", "two"):
        prepared("tables", folder, tmp_path / data_dir, "same")
    assert snapshot(tmp_path / "one") == snapshot(tmp_path / "two")


def test_tfds_records_equal_the_arrays(small):
    import tensorflow_datasets as tfds

    items = tfds.builder_from_directory(small.directory / "items").as_data_source("full")
    users = tfds.builder_from_directory(small.directory / "users").as_data_source("full")
    assert (len(items), len(users)) == (small.num_items, small.num_users)
    for number, record in enumerate(items):
        text = small.item_text(number)
        assert record["item"] == number
        assert record["item_id"].decode() == small.item_source_id(number)
        assert record["title"].decode() == text.title
        assert [part.decode() for part in record["categories"]] == list(text.categories)
        assert record["brand"].decode() == text.brand
        assert text.price == (None if np.isnan(record["price"]) else pytest.approx(record["price"]))
        assert [part.decode() for part in record["extra_texts"]] == list(text.extra.values())
    for number, record in enumerate(users):
        span = slice(small.user_offsets[number], small.user_offsets[number + 1])
        assert record["user"] == number
        assert record["user_id"].decode() == small.user_source_id(number)
        assert record["items"].tolist() == small.sequence(number).tolist()
        assert record["timestamps"].tolist() == small.timestamps[span].tolist()
        assert record["ratings"].tolist() == small.ratings[span].tolist()


@pytest.mark.parametrize("name", ["items", "users"])
def test_records_are_what_tfds_itself_writes(small, name):
    """What TFDS reads, written by TFDS' own serializer, is what stands in the files."""
    import tensorflow_datasets as tfds
    from array_record.python import array_record_module
    from tensorflow_datasets.core import example_serializer
    from tensorflow_datasets.proto import tf_example_pb2

    builder = tfds.builder_from_directory(small.directory / name)
    features = builder.info.features
    serializer = example_serializer.ExampleSerializer(features.get_serialized_info())
    expected = [serializer.get_tf_example(features.encode_example(row)) for row in builder.as_data_source("full")]
    reader = array_record_module.ArrayRecordReader(str(next((small.directory / name).glob("*.array_record-*"))))
    assert [tf_example_pb2.Example.FromString(record) for record in reader.read_all()] == expected
    split = builder.info.splits["full"]
    assert split.shard_lengths == [len(expected)]
    assert split.num_bytes == sum(map(len, reader.read_all()))


def test_large_datasets_in_several_files_keep_their_order(tmp_path, monkeypatch):
    monkeypatch.setattr("recalign_jax.corpus.datasets._RECORDS_A_FILE", 7)
    rows = [(f"u{user}", f"i{item}", item) for user in range(20) for item in range(30)]
    result = prepared("tables", write_tables(tmp_path / "raw", rows), tmp_path, "many")
    assert len(list((tmp_path / "many" / "items").glob("*.array_record-*"))) == 5
    for user in range(20):
        assert [result.item_source_id(item) for item in result.sequence(user)] == [f"i{item}" for item in range(30)]
    assert sorted(result.user_source_id(user) for user in range(20)) == sorted({row[0] for row in rows})


def test_arrays_are_mapped_and_cannot_be_changed(small):
    assert [array.dtype for array in (small.user_offsets, small.items, small.timestamps, small.ratings)] == [
        np.int64,
        np.int32,
        np.int64,
        np.float32,
    ]
    assert np.shares_memory(small.sequence(0), small.items)
    with pytest.raises(ValueError):
        small.items[0] = 1


def test_pickling_a_corpus_copies_no_array(small):
    assert len(pickle.dumps(small)) < 1000
    assert np.array_equal(pickle.loads(pickle.dumps(small)).items, small.items)


def test_training_needs_no_tensorflow(small):
    program = (
        "import sys; from recalign_jax.corpus import catalog, corpus, prepare, statistics, vocab\n"
        f"small = corpus.load_corpus('small', {str(small.directory.parent)!r})\n"
        "assert small.item_text(0) is not None and small.training_popularity.sum() == 5\n"
        "assert 'tensorflow' not in sys.modules and 'seqio' not in sys.modules, 'heavy import'\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


# Names and places.


@pytest.mark.parametrize(
    "name", ["Beauty", "a-b", "", "a/b", "..", "x_retrieval", "x_all", "vocabularies", "downloads"]
)
def test_names_that_cannot_be_a_corpus(name, tmp_path):
    with pytest.raises(InputError, match="cannot be a corpus"):
        prepared("tables", write_tables(tmp_path / "raw", ROWS), tmp_path, name)


def test_a_missing_corpus_is_named_with_the_nearest(small):
    with pytest.raises(InputError, match=r"Prepared there: small\. Did you mean 'small'\?"):
        corpus.load_corpus("smal", small.directory.parent)


def test_the_data_directory(monkeypatch, tmp_path):
    monkeypatch.delenv("RECALIGN_DATA_DIR", raising=False)
    assert corpus.data_dir_or_default(None) == pathlib.Path.home() / "recalign_data"
    monkeypatch.setenv("RECALIGN_DATA_DIR", str(tmp_path))
    assert corpus.data_dir_or_default(None) == tmp_path
    assert corpus.data_dir_or_default("here") == pathlib.Path("here")


@pytest.mark.parametrize("damage", ["corpus.json", "arrays/items.npy", "items"])
def test_a_damaged_corpus_is_an_input_error(small, damage):
    path = small.directory / damage
    if path.is_dir():
        for record_file in path.glob("*.array_record-*"):
            record_file.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(InputError, match="repare"):
        corpus.load_corpus("small", small.directory.parent).item_text(0)


def test_a_corpus_has_the_name_of_its_folder(small, monkeypatch):
    """Whatever corpus.json says, which may be another's: of two tasks of one name, one would be lost."""
    data_dir = small.directory.parent
    for name in ("renamed", "small.old", "small_all"):
        shutil.copytree(small.directory, data_dir / name)
    path = data_dir / "renamed" / "corpus.json"
    path.write_text(path.read_text().replace('"name": "small"', '"name": "../../etc"'))
    (data_dir / "linked").symlink_to(small.directory)
    assert corpus.corpora(data_dir) == ["linked", "renamed", "small"]
    for name in ("linked", "renamed", "small"):
        assert corpus.load_corpus(name, data_dir).name == name
    monkeypatch.chdir(data_dir / "renamed")
    assert corpus.read_corpus(".").name == "renamed"
    for name, reason in (("small.old", "use small letters"), ("small_all", "may end in '_all'")):
        with pytest.raises(InputError, match=reason):
            corpus.load_corpus(name, data_dir)
        with pytest.raises(InputError, match=reason):
            corpus.read_corpus(data_dir / name)


@pytest.mark.parametrize("read", ["item_text", "item_source_id", "user_source_id"])
def test_a_corpus_that_is_replaced_while_in_use_is_not_read_on(small, read):
    """Its numbers are those of the old arrays; the new texts and ids have others."""
    data_dir, pickled = small.directory.parent, pickle.dumps(small)
    prepared("tables", data_dir / "raw", data_dir, "small", "--seed", "5", "--overwrite")
    with pytest.raises(InputError, match="was replaced while in use"):
        getattr(small, read)(0)
    with pytest.raises(InputError, match="was replaced while in use"):
        pickle.loads(pickled)


def test_a_corpus_that_is_replaced_while_it_is_opened_is_not_mixed(small, monkeypatch):
    data_dir, read_array = small.directory.parent, corpus.storage.read_array

    def replaced_meanwhile(directory, name):
        monkeypatch.setattr(corpus.storage, "read_array", read_array)
        prepared("tables", data_dir / "raw", data_dir, "small", "--seed", "5", "--overwrite")
        return read_array(directory, name)

    monkeypatch.setattr(corpus.storage, "read_array", replaced_meanwhile)
    with pytest.raises(InputError, match="was replaced while in use"):
        corpus.read_corpus(small.directory)


# Nothing half-written.


def test_a_corpus_is_replaced_only_when_told(small):
    before = snapshot(small.directory)
    raw = small.directory.parent / "raw"
    with pytest.raises(InputError, match="--overwrite"):
        prepared("tables", raw, raw.parent, "small", "--seed", "5")
    assert snapshot(small.directory) == before
    other = prepared("tables", raw, raw.parent, "small", "--seed", "5", "--overwrite")
    assert other.fingerprint != small.fingerprint
    assert sorted(path.name for path in raw.parent.iterdir()) == ["raw", "small"]


def test_a_folder_that_is_no_corpus_is_never_replaced(tmp_path):
    raw = write_tables(tmp_path / "raw", ROWS)
    with pytest.raises(InputError, match="not a corpus"):
        prepared("tables", raw, tmp_path, "raw", "--overwrite")
    assert (raw / "interactions.tsv").is_file()


@pytest.mark.parametrize("flags", [["--k_core", "9"], ["--k_core", "-1"], ["--seed", "-1"], ["--item_column", "sku"]])
@pytest.mark.parametrize("on_error", ["fail", "skip"])
def test_a_failed_prepare_leaves_the_old_corpus_and_nothing_else(small, flags, on_error):
    before = snapshot(small.directory)
    data_dir = small.directory.parent
    with pytest.raises(InputError):
        prepared("tables", data_dir / "raw", data_dir, "small", "--overwrite", "--on_error", on_error, *flags)
    assert snapshot(small.directory) == before
    assert sorted(path.name for path in data_dir.iterdir()) == ["raw", "small"]


def test_an_interrupted_prepare_leaves_the_old_corpus(small, monkeypatch):
    before = snapshot(small.directory)
    data_dir = small.directory.parent

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("recalign_jax.corpus.storage._fingerprint", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepared("tables", data_dir / "raw", data_dir, "small", "--overwrite")
    assert snapshot(small.directory) == before
    assert sorted(path.name for path in data_dir.iterdir()) == ["raw", "small"]


@pytest.mark.parametrize("size", [100, 1000, 3000])
def test_a_full_disk_is_told_of_and_leaves_nothing(tmp_path, capsys, size):
    rows = [(f"user{user}", f"item{item}", item) for user in range(40) for item in range(20)]
    raw = write_tables(tmp_path / "raw", rows, [{"item_id": f"item{item}", "title": "x" * 50} for item in range(20)])
    arguments = ["--source", "tables", "--input", str(raw), "--corpus", "full", "--data_dir", str(tmp_path / "data")]
    with files_of_at_most(size):
        assert cli.main(["prepare", *arguments]) == 1
    error = capsys.readouterr().err
    assert "can't be written" in error
    assert "See that there is room" in error
    assert "Traceback" not in error
    assert not list((tmp_path / "data").iterdir())


@pytest.mark.parametrize(("folder", "status"), [("/proc/x", 1), ("{}/file/below", 2), ("{}/" + 300 * "x", 2)])
def test_a_place_that_cannot_be_made_is_told_of(tmp_path, capsys, folder, status):
    (tmp_path / "file").write_text("")
    raw = write_tables(tmp_path / "raw", [("ann", "a", 1)])
    arguments = ["--source", "tables", "--input", str(raw), "--corpus", "x", "--data_dir", folder.format(tmp_path)]
    assert cli.main(["prepare", *arguments]) == status
    assert "Traceback" not in capsys.readouterr().err


def test_there_is_a_whole_corpus_at_every_moment(tmp_path):
    """A reader looks without a break while the folder is replaced 200 times."""
    target, ended, lacking = tmp_path / "corpus", threading.Event(), []

    def write(text: str) -> None:
        with atomic_directory(target) as aside:
            (aside / "first").write_text(text)
            (aside / "second").write_text(text)

    def read() -> None:
        while not ended.is_set():
            if not (target / "first").exists():
                lacking.append(sorted(path.name for path in tmp_path.iterdir()))

    write("0")
    reader = threading.Thread(target=read)
    reader.start()
    for number in range(200):
        write(str(number))
    ended.set()
    reader.join()
    assert (target / "second").read_text() == "199"
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]
    if sys.platform == "linux":
        assert not lacking


def test_all_files_are_on_the_disk_before_they_take_their_name(tmp_path, monkeypatch):
    target, synced = tmp_path / "made", []

    def sync(path: pathlib.Path) -> None:
        synced.append((path.name, target.exists()))

    monkeypatch.setattr(files, "_sync", sync)
    with atomic_directory(target) as aside:
        (aside / "below").mkdir()
        (aside / "below" / "file").write_text("")
        assert not synced
    *before, after = synced
    assert sorted(before) == sorted([("below", False), ("file", False), (aside.name, False)])
    assert after == (tmp_path.name, True)


def test_what_a_killed_writer_left_is_removed_and_what_a_living_one_writes_is_not(tmp_path):
    program = """
        import sys, time
        from recalign_jax.files import atomic_directory
        with atomic_directory(sys.argv[1]) as aside:
            (aside / "file").write_text("half")
            print(aside, flush=True)
            time.sleep(60)
    """
    target = tmp_path / "corpus"
    (tmp_path / ".corpus.original").mkdir()  # somebody's, though it looks like one of ours
    command = [sys.executable, "-c", textwrap.dedent(program), str(target)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as killed:
        assert killed.stdout is not None
        left = pathlib.Path(killed.stdout.readline().strip())
        with atomic_directory(target):
            assert (left / "file").read_text() == "half"
        killed.kill()
    assert left.is_dir()
    with atomic_directory(target) as aside:
        assert sorted(tmp_path.iterdir()) == sorted([target, aside, tmp_path / ".corpus.original"])


def test_what_a_killed_writer_of_a_file_left_is_removed(tmp_path):
    program = """
        import sys, time
        from recalign_jax.files import atomic_file
        with atomic_file(sys.argv[1]) as aside:
            aside.write_text("half")
            print(aside, flush=True)
            time.sleep(60)
    """
    target = tmp_path / "metrics.json"
    (tmp_path / ".metrics.json.mine").write_text("")
    command = [sys.executable, "-c", textwrap.dedent(program), str(target)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as killed:
        assert killed.stdout is not None
        left = pathlib.Path(killed.stdout.readline().strip())
        with atomic_file(target) as aside:
            aside.write_text("whole")
        assert left.read_text() == "half"  # it lives
        killed.kill()
    assert left.is_file()
    with atomic_file(target) as aside:
        aside.write_text("whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".metrics.json.mine", "metrics.json"]


@pytest.mark.parametrize("exchanges", [True, False])
def test_an_old_folder_that_cannot_be_removed_is_told_of(tmp_path, monkeypatch, capsys, exchanges):
    """As on NFS, where another machine has a file of it open."""

    def rmtree(path, ignore_errors=False):
        if not ignore_errors:
            raise OSError(39, "Directory not empty")

    target = tmp_path / "corpus"
    for text in ("old", "new"):
        with atomic_directory(target) as aside:
            (aside / "file").write_text(text)
            monkeypatch.setattr(shutil, "rmtree", rmtree)
            if not exchanges:
                monkeypatch.setattr(files, "_exchanged", lambda first, second: False)
    assert (target / "file").read_text() == "new"
    [left] = [path for path in tmp_path.iterdir() if path != target]
    assert left.name.startswith(".corpus.")
    assert f"{left} was replaced and could not be removed" in capsys.readouterr().err


# The commands.


def test_what_the_commands_return(small, capsys):
    data_dir = small.directory.parent
    flags = ["--source", "tables", "--input", str(data_dir / "raw"), "--corpus", "second"]
    result = call(prepare, data_dir, *flags)
    assert result == {
        "users": 3,
        "items": 5,
        "interactions": 9,
        "rejected_rows": 0,
        "corpus_dir": str(data_dir / "second"),
    }
    assert "Next: recalign inspect --corpus second" in capsys.readouterr().out
    shown = call(inspect, data_dir, "--corpus", "second")
    assert "interactions" in capsys.readouterr().out
    assert json.loads(json.dumps(shown, allow_nan=False)) == shown
    assert shown["statistics"]["ratings"] == {"1": 2, "2.5": 3, "4": 4}
    assert shown["statistics"]["items_never_met"] == 1
    assert shown["statistics"]["shared_titles"] == 2
    assert shown["statistics"]["tied_test_items"] == 0.5
    assert shown["statistics"]["tied_pairs"] == 2 / 6
    with pytest.raises(InputError, match="--task small_mim is of small, not of --corpus second"):
        call(inspect, data_dir, "--corpus", "second", "--task", "small_mim")


def test_ids_that_do_not_meet_are_told_of(tmp_path, capsys):
    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / "interactions.csv").write_text("user_id,item_id,timestamp\n1,1.0,1\n1,2.0,2\n2,1.0,3\n")
    (raw / "items.csv").write_text("item_id,title\n1,One\n2,Two\n")
    call(prepare, tmp_path, "--source", "tables", "--input", str(raw), "--corpus", "gaps")
    assert "2 of 4 items have no text. If they should, see that ids" in capsys.readouterr().err


def test_white_space_at_the_ends_is_no_part_of_an_id(tmp_path):
    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / "interactions.csv").write_text("user_id,item_id,timestamp\n 1,a b ,1\n1, a b,2\n1 ,c,3\n")
    (raw / "items.csv").write_text("item_id,title\na b,One\n\tc,Two\n")
    call(prepare, tmp_path, "--source", "tables", "--input", str(raw), "--corpus", "spaces")
    found = corpus.load_corpus("spaces", tmp_path)
    assert found.user_source_id(0) == "1"
    assert {found.item_source_id(item): found.item_text(item).title for item in range(2)} == {
        "a b": "One",
        "c": "Two",
    }


def test_many_bad_rows_are_told_of(tmp_path, capsys):
    """A first row without a rating makes bad rows of all that have one."""
    raw = tmp_path / "raw"
    raw.mkdir()
    rows = "".join(f"u{n},a,{n},5\n" for n in range(30))
    (raw / "interactions.csv").write_text(f"user_id,item_id,timestamp,rating\nu,a,1,\n{rows}")
    (raw / "items.csv").write_text("item_id,title\na,One\n")
    flags = ("--source", "tables", "--input", str(raw), "--corpus", "bad", "--on_error", "skip")
    call(prepare, tmp_path, *flags)
    assert "30 of 31 interactions were bad rows and are left out" in capsys.readouterr().err
    call(prepare, tmp_path, *flags, "--overwrite", "--rating_column", "rating")
    assert "bad rows" not in capsys.readouterr().err  # one of 31


def test_ratings_of_many_digits_stay_different(tmp_path):
    raw = tmp_path / "raw"
    raw.mkdir()
    ratings = ("1234567", "1234568", "16777217", "0.25", "4", "3.5")
    rows = "".join(f"u{n % 2},i{n},{n},{rating}\n" for n, rating in enumerate(ratings))
    (raw / "interactions.csv").write_text(f"user_id,item_id,timestamp,rating\n{rows}")
    (raw / "items.csv").write_text("item_id,title\n" + "".join(f"i{n},T{n}\n" for n in range(6)))
    call(prepare, tmp_path, "--source", "tables", "--input", str(raw), "--corpus", "counts")
    shown = call(inspect, tmp_path, "--corpus", "counts")["statistics"]["ratings"]
    # Ratings are float32, which has no 16777217.
    assert shown == dict.fromkeys(("0.25", "3.5", "4", "1234567", "1234568", "16777216"), 1)


def test_a_catalogue_of_items_that_nobody_met_is_told_of(tmp_path, capsys):
    unmet = [{"item_id": f"unmet {number}", "title": f"Title {number}"} for number in range(6)]
    raw = write_tables(tmp_path / "raw", ROWS, [*ITEMS, *unmet])
    warning = "Nobody met 7 of 11 items"
    whole = prepared("tables", raw, tmp_path, "whole")
    assert warning in (told := capsys.readouterr().err)
    assert "--k_core 1 leaves them out" in told
    # As it says: those go, and nothing else does.
    met = prepared("tables", raw, tmp_path, "met", "--k_core", "1")
    assert "Nobody met" not in capsys.readouterr().err
    assert (met.num_items, met.num_users, met.num_interactions) == (4, whole.num_users, whole.num_interactions)
    prepared("tables", write_tables(tmp_path / "raw", ROWS, [*ITEMS, *unmet[:2]]), tmp_path, "half")
    assert "Nobody met" not in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["-n", "--seed"])
def test_inspect_counts_from_zero(small, flag):
    with pytest.raises(InputError, match=f"{flag} must not be negative, but is -1"):
        call(inspect, small.directory.parent, "--corpus", "small", "--task", "retrieval", flag, "-1")


def test_columns_and_ratings_are_named_by_flags(tmp_path):
    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / "interactions.csv").write_text("who,what,when,stars\nann,x,1,5\nbob,x,2,6\n")
    (raw / "items.csv").write_text("what,name,kinds,maker,cost,colour\nx,Sponge,a|b,Acme,2.5,red\n")
    flags = ["user=who", "item=what", "timestamp=when", "rating=stars", "title=name"]
    flags += ["categories=kinds", "brand=maker", "price=cost"]
    flags = [part for flag in flags for part in (f"--{flag.split('=')[0]}_column", flag.split("=")[1])]
    flags += ["--rating_range", "1", "5"]
    with pytest.raises(InputError, match="line 3: stars must be from 1 to 5, not 6"):
        prepared("tables", raw, tmp_path, "named", *flags)
    result = prepared("tables", raw, tmp_path, "named", *flags, "--on_error", "skip")
    assert result.item_text(0) == ItemText("Sponge", ("a", "b"), "Acme", 2.5, {"colour": "red"})
    assert (result.user_source_id(0), result.ratings.tolist()) == ("ann", [5])
    options = result.metadata["options"]
    assert (options["rating_range"], options["columns"]["title"]) == ([1, 5], "name")
    for bad in (["--source", "movielens"], ["--rating_range", "5", "1"]):
        with pytest.raises(InputError, match=r"--\w+"):
            prepared("tables", raw, tmp_path, "bad", *flags, *bad)


def test_a_download_is_prepared(tmp_path, monkeypatch, capsys):
    raw = write_tables(tmp_path / "raw", ROWS, ITEMS)
    asked = []
    monkeypatch.setattr("recalign_jax.corpus.download.fetch", lambda *args: asked.append(args) or raw)
    flags = ["--source", "tables", "--corpus", "fetched"]
    assert call(prepare, tmp_path, *flags, "--download", "ml-1m")["interactions"] == len(ROWS)
    assert asked == [("tables", "ml-1m", tmp_path)]
    for both_or_none in ([], ["--download", "ml-1m", "--input", str(raw)]):
        with pytest.raises(SystemExit):
            call(prepare, tmp_path, *flags, "--overwrite", *both_or_none)
    assert "--input --download" in capsys.readouterr().err


def test_statistics_of_a_corpus_without_any_target(tmp_path):
    result = prepared("tables", write_tables(tmp_path / "raw", [("a", "b", 1)]), tmp_path, "one")
    numbers = inspect.statistics(result)
    assert (numbers["tied_pairs"], numbers["tied_test_items"], numbers["unseen_test_items"]) == (None, None, None)
    json.dumps(numbers, allow_nan=False)


def test_many_different_ratings_are_binned(tmp_path):
    rows = [("a", f"i{n}", n, n / 7) for n in range(100)]
    result = prepared("tables", write_tables(tmp_path / "raw", rows), tmp_path, "binned")
    ratings = inspect.statistics(result)["ratings"]
    assert len(ratings) == 10
    assert sum(ratings.values()) == 100
    narrow = statistics.rating_counts(np.arange(1_000_000, 1_000_030, dtype=np.float32))
    assert list(narrow.values()) == [3] * 10
    assert next(iter(narrow)) == "1000000 to 1000002.9"

"""Batch inference without a model: what is asked, filtered and answered, and jobs that are killed."""

import gzip
import hashlib
import json
import pathlib
import shutil

import numpy as np
import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from recalign_jax import files
from recalign_jax.corpus import more_items
from recalign_jax.corpus.catalog import title_text
from recalign_jax.corpus.corpus import with_items
from recalign_jax.corpus.records import Item, ItemText, RowError
from recalign_jax.errors import InputError, RunError
from recalign_jax.inference import answers, chunks, filters, job, requests
from recalign_jax.inference.answers import Models
from recalign_jax.inference.rows import Needs, request_of
from tests.corpora import prepared, write_tables

NEEDS = Needs()


def ids(corpus, *items):
    return [corpus.item_source_id(item) for item in items]


def all_parts(asked, size=1000):
    parts = list(asked.parts(size, set(range(-(-asked.total // size)))))
    return [found for part in parts for found in part.requests], [found for part in parts for found in part.rejected]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# What is asked.


def test_users_of_a_corpus_are_asked_by_their_histories(shop_corpus):
    for split in ("validation", "test", "all"):
        found, rejected = all_parts(requests.of_corpus(shop_corpus, split), size=7)
        users = range(shop_corpus.num_users) if split == "all" else shop_corpus.evaluation_users
        assert [request.user for request in found] == [shop_corpus.user_source_id(user) for user in users]
        for user, request in zip(users, found, strict=True):
            whole = shop_corpus.sequence(user)
            history = {"validation": whole[:-2], "test": whole[:-1], "all": whole}[split]
            np.testing.assert_array_equal(request.query.history, history)
            assert len(request.ratings) == len(history)
        assert not rejected
    assert requests.of_corpus(shop_corpus, "all", 3).total == 3


def test_other_users_are_another_job(tmp_path):
    """Also where they met the same items in the same order: the corpus is told by these alone."""
    found = []
    for prefix in ("u", "shop:u"):
        rows = [(f"{prefix}{user}", f"i{item}", item) for user in range(3) for item in range(4)]
        name = f"by_{len(prefix)}"
        found.append(prepared("tables", write_tables(tmp_path / name, rows), tmp_path / "data", name))
    assert found[0].fingerprint == found[1].fingerprint
    assert len({requests.of_corpus(corpus, "all").fingerprint for corpus in found}) == 2
    assert requests.of_corpus(found[0], "all").fingerprint == requests.of_corpus(found[0], "all").fingerprint


def test_only_a_split_is_asked(shop_corpus):
    with pytest.raises(InputError, match=r"SPLIT is 'tset'.*Did you mean 'test'"):
        requests.of_corpus(shop_corpus, "tset")


def test_every_form_of_a_table_asks_the_same(shop_corpus, tmp_path):
    rows = [{"user": f"new {n}", "items": ids(shop_corpus, *range(n))} for n in range(5)]
    cells = [(row["user"], "|".join(row["items"])) for row in rows]
    lists = [(row["user"], json.dumps(row["items"])) for row in rows]
    write_rows(tmp_path / "a.jsonl", rows)
    write_rows(tmp_path / "b.jsonl", [{"user_id": row["user"], "history": row["items"]} for row in rows])
    (tmp_path / "c.tsv").write_text("user\titems\n" + "".join(f"{user}\t{items}\n" for user, items in cells))
    quoted = "".join('"{}","{}"\n'.format(user, items.replace('"', '""')) for user, items in lists)
    (tmp_path / "d.csv").write_text("user,items\n" + quoted)
    (tmp_path / "e.csv.gz").write_bytes(gzip.compress((tmp_path / "d.csv").read_bytes()))
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "f.parquet")
    write_rows(tmp_path / "g.jsonl", [{**row, "items": "|".join(row["items"])} for row in rows])
    titled = [
        {"user": row["user"], "titles": [title_text(shop_corpus, item).upper() for item in range(10, 10 + n)]}
        for n, row in enumerate(rows)
    ]
    for path in sorted(tmp_path.iterdir()):
        found, rejected = all_parts(requests.of_table(path, shop_corpus, NEEDS), size=2)
        assert [(request.user, request.query.history.tolist()) for request in found] == [
            (f"new {n}", list(range(n))) for n in range(5)
        ], path
        assert not rejected
    write_rows(tmp_path / "titles.jsonl", titled)
    found, _ = all_parts(requests.of_table(tmp_path / "titles.jsonl", shop_corpus, NEEDS))
    named = [[title_text(shop_corpus, item) for item in request.query.history] for request in found]
    assert named == [[title_text(shop_corpus, item) for item in range(10, 10 + n)] for n in range(5)]


def test_a_title_of_several_items_is_the_most_popular_one(shop_corpus):
    text = ItemText(title="One name for two")
    [known] = [item for item in range(60) if shop_corpus.item_source_id(item) == "B00QXZ0007"]
    corpus = with_items(shop_corpus, [Item("new", ItemText(title=title_text(shop_corpus, known))), Item("x", text)])
    twins = [item for item in range(62) if title_text(corpus, item) == title_text(corpus, known)]
    assert len(twins) == 3
    best = max(twins, key=lambda item: corpus.training_popularity[item])
    row = request_of(corpus, NEEDS, {"user": 1, "titles": [title_text(corpus, known), "one NAME for two", "no such"]})
    assert row.query.history.tolist() == [best, 61]
    assert row.unknown == ("no such",)


BAD = [
    ("{", "not JSON"),
    ('{"items": []}', "no field 'user'"),
    ('{"user": "", "items": []}', "user is empty"),
    ('{"user": [1], "items": []}', "user must be text"),
    ('{"user": "a"}', "no field 'items'"),
    ('{"user": "a", "items": 3.5}', "items must be a list"),
    ('{"user": "a", "items": [null]}', "each of items must be text"),
    ('{"user": "a", "titles": [3]}', "each of titles must be text"),
    ('{"user": "a", "titles": [null]}', "each of titles is empty"),
    ('{"user": "good 0", "items": []}', "user 'good 0' is there twice"),
    ('{"user": "\\ud800", "items": []}', "surrogate"),
    ("\x00", "NUL"),
]


def test_bad_rows_are_rejected_with_line_and_reason(shop_corpus, tmp_path):
    path = tmp_path / "in.jsonl"
    lines = []
    for number, (bad, _) in enumerate(BAD):
        lines += [json.dumps({"user": f"good {number}", "items": ids(shop_corpus, number)}), bad]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    for size in (1, 4, 100):
        found, rejected = all_parts(requests.of_table(path, shop_corpus, NEEDS), size)
        assert [request.user for request in found] == [f"good {number}" for number in range(len(BAD))]
        assert [reject["line"] for reject in rejected] == [2 * number + 2 for number in range(len(BAD))]
        for reject, (bad, reason) in zip(rejected, BAD, strict=True):
            assert reason in reject["reason"]
            assert reject["file"] == "in.jsonl"
            assert reject["row"].strip("\n") == bad.strip("\n") or bad == "\x00"


def test_a_table_without_any_good_row_is_an_error(shop_corpus, tmp_path):
    path = write_rows(tmp_path / "in.jsonl", [{"customer": 1, "items": []}, {"customer": 2, "items": []}])
    with pytest.raises(InputError, match=r"None of the 2 rows of .*in.jsonl can be used.*row 1: no field 'user'"):
        requests.of_table(path, shop_corpus, NEEDS)
    with pytest.raises(InputError, match="is no table"):
        requests.of_table(tmp_path / "in.xlsx", shop_corpus, NEEDS)
    with pytest.raises(InputError, match=r"nothing\.jsonl"):
        requests.of_table(tmp_path / "nothing.jsonl", shop_corpus, NEEDS)


def test_cells_as_programs_write_them(shop_corpus):
    """Blanks around what separates, whole numbers as floats, a column for each kind of history."""
    corpus = with_items(shop_corpus, [Item("7", ItemText(title="Seven")), Item("8", ItemText(title="[Eight|8]"))])
    for items in (" 7 | 8", [7.0, 8], ["7 ", "8"], "[7, 8]", '["7", "8"]', ' ["7", " 8"] '):
        assert request_of(corpus, NEEDS, {"user": 1, "items": items}).query.history.tolist() == [60, 61]
    for empty in (None, "", "  ", []):
        for row in (
            {"items": empty, "titles": ["seven"]},
            {"items": empty, "history": [7]},
            {"history": "7", "items": empty},
        ):
            assert request_of(corpus, NEEDS, {"user": 1, **row}).query.history.tolist() == [60]
        assert not len(request_of(corpus, NEEDS, {"user": 1, "items": empty, "titles": empty}).query.history)
    with pytest.raises(RowError, match="64 bits"):  # no float is every whole number from here on
        request_of(corpus, NEEDS, {"user": 1, "items": [float(2**53)]})
    assert request_of(corpus, NEEDS, {"user": 1, "titles": '["[eight|8]"]'}).query.history.tolist() == [61]
    assert request_of(corpus, NEEDS, {"user": 1, "titles": "[Eight] | SEVEN"}).unknown == ("[Eight]",)  # as given


def test_bytes_that_are_no_text_are_rejected_and_written(shop_corpus, tmp_path):
    path = tmp_path / "in.csv"
    good = ids(shop_corpus, 3)[0]
    path.write_bytes(f"user,items\nu1,{good}\nu2,caf".encode() + b"\xe9\n" + b'u3,"[""\\ud800""]"\n')
    run_job(shop_corpus, path, tmp_path / "out")
    rejected = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").open(encoding="utf-8")]
    assert [reject["line"] for reject in rejected] == [3]
    rows = [json.loads(line) for line in (tmp_path / "out" / "recommendations.jsonl").open(encoding="utf-8")]
    assert [row["user"] for row in rows] == ["u1", "u3"]
    assert rows[1]["unknown_items"] == ['["\\ud800"]']  # half a character is no list


def test_a_diverged_model_is_an_error_and_leaves_no_file(shop_corpus, table, tmp_path):
    def answer(found, advance):
        row = {"scores": [float("nan")], "method": "model", "unknown_items": []}
        return [{"user": request.user, **row} for request in found]

    with pytest.raises(RunError, match="no finite number"):
        run_job(shop_corpus, table, tmp_path / "out", answer=answer)
    assert not list((tmp_path / "out").glob("*.jsonl"))


def test_an_output_dir_that_cannot_be_written(shop_corpus, table, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"OUTPUT_DIR .*file/out can't be written"):
        run_job(shop_corpus, table, tmp_path / "file" / "out")


def test_unknown_items_are_dropped_with_their_ratings_or_the_row_is_rejected(shop_corpus):
    known = ids(shop_corpus, 3, 4)
    row = {"user": "a", "items": [known[0], "gone", known[1]], "ratings": [1, 2, "3.5"]}
    found = request_of(shop_corpus, Needs(ratings=True), row)
    assert found.query.history.tolist() == [3, 4]
    assert found.ratings.tolist() == [1, 3.5]
    assert found.unknown == ("gone",)
    with pytest.raises(RowError, match="not in the catalogue: gone"):
        request_of(shop_corpus, Needs(known_items=True), row)
    with pytest.raises(RowError, match="2 ratings for a history of 3"):
        request_of(shop_corpus, Needs(ratings=True), {**row, "ratings": [1, 2]})
    for unheard_of in (0, 5.5, 7):
        with pytest.raises(RowError, match=rf"rating {unheard_of} is outside of those of shop, 1 to 5"):
            request_of(shop_corpus, Needs(ratings=True), {**row, "ratings": [1, 2, unheard_of]})
    with pytest.raises(RowError, match="no field 'ratings'"):
        request_of(shop_corpus, Needs(ratings=True), {"user": "a", "items": known})


def test_candidates_stand_once_and_must_be_known(shop_corpus):
    row = {"user": "a", "items": [], "candidates": [*ids(shop_corpus, 5, 2, 5), "gone"]}
    found = request_of(shop_corpus, Needs(candidates=True), row)
    assert found.candidates.tolist() == [5, 2]
    assert found.unknown == ("gone",)
    with pytest.raises(RowError, match="none of the candidates"):
        request_of(shop_corpus, Needs(candidates=True), {**row, "candidates": ["gone"]})
    with pytest.raises(RowError, match="candidates is empty"):
        request_of(shop_corpus, Needs(candidates=True), {**row, "candidates": []})
    with pytest.raises(RowError, match="no field 'candidates'"):
        request_of(shop_corpus, Needs(candidates=True), {"user": "a", "items": []})


@given(st.lists(st.integers(0, 30), min_size=1, max_size=60), st.integers(1, 9), st.randoms())
def test_repeated_users_are_found_whatever_their_order(shop_corpus, tmp_path_factory, users, size, random):
    path = write_rows(tmp_path_factory.mktemp("repeated") / "in.jsonl", [{"user": user, "items": []} for user in users])
    asked = requests.of_table(path, shop_corpus, NEEDS)
    first = [number for number, user in enumerate(users) if user not in users[:number]]
    wanted = {number for number in range(-(-len(users) // size)) if random.random() < 0.5}
    for part in asked.parts(size, wanted):
        places = [number for number in first if number // size == part.number]
        assert [request.user for request in part.requests] == [str(users[number]) for number in places]
        rest = range(part.number * size, min((part.number + 1) * size, len(users)))
        assert [reject["line"] for reject in part.rejected] == [n + 1 for n in rest if n not in places]


# Filters, new items.


def test_filters_meet(shop_corpus, tmp_path):
    [tubs] = [item for item in range(60) if shop_corpus.item_text(item).categories]
    allow, deny = tmp_path / "allow.txt", tmp_path / "deny.txt"
    allow.write_text("\n".join([*ids(shop_corpus, 9, tubs, 4), "unheard-of", "", " " + ids(shop_corpus, 5)[0]]))
    deny.write_text("\r\n".join(ids(shop_corpus, 4)))
    assert filters.permitted_items(shop_corpus) is None
    assert filters.permitted_items(shop_corpus, str(allow)).tolist() == sorted({9, tubs, 4, 5})
    assert filters.permitted_items(shop_corpus, str(allow), str(deny)).tolist() == sorted({9, tubs, 5} - {4})
    assert len(filters.permitted_items(shop_corpus, deny=str(deny))) == 59
    assert filters.permitted_items(shop_corpus, categories=["Tubs"]).tolist() == [tubs]
    with pytest.raises(InputError, match=r"no item of shop is in 'Tubes'. Did you mean 'Tubs'"):
        filters.permitted_items(shop_corpus, categories=["Tubes"])
    with pytest.raises(InputError, match="No item of shop passes"):
        filters.permitted_items(shop_corpus, str(deny), str(deny))
    deny.write_text("B1\nB2\n")
    with pytest.raises(InputError, match=r"ALLOW .*shop has none of its item ids; the first is 'B1'"):
        filters.permitted_items(shop_corpus, str(deny))
    assert len(filters.permitted_items(shop_corpus, deny=str(deny))) == 60  # what is denied may be gone
    with pytest.raises(InputError, match=r"nowhere\.txt"):
        filters.permitted_items(shop_corpus, allow=str(tmp_path / "nowhere.txt"))


def test_new_items_stand_behind_those_of_the_corpus(shop_corpus, tmp_path):
    path = write_rows(
        tmp_path / "items.jsonl",
        [{"item_id": "N1", "title": "Brand &amp; new"}, {"item_id": ids(shop_corpus, 3)[0], "title": "Other name"}],
    )
    more = more_items.with_table(shop_corpus, path)
    assert more.num_items == 61
    assert (more.item_source_id(60), more.item_text(60).title) == ("N1", "Brand & new")
    assert more.item_text(3) == shop_corpus.item_text(3)
    assert more.training_popularity.tolist() == [*shop_corpus.training_popularity, 0]
    assert more.fingerprint != shop_corpus.fingerprint
    write_rows(path, [{"item_id": "N1", "brand": "Acme"}])
    with pytest.raises(InputError, match="'N1' is new and has no title"):
        more_items.with_table(shop_corpus, path)
    write_rows(path, [{"item_id": "N1", "title": "a"}, {"title": "b"}])
    with pytest.raises(InputError, match=r"items.jsonl, row 2: no field 'item_id'"):
        more_items.with_table(shop_corpus, path)


# Answers.


def lists_by_number(top_k):
    """Recommends the smallest numbers that aren't excluded, in parts of two and backwards."""

    def recommend(queries, excluded):
        for start in reversed(range(0, len(queries), 2)):
            chosen = np.arange(start, min(start + 2, len(queries)))
            rows = [[item for item in range(60) if item not in excluded[query]][:top_k] for query in chosen]
            yield chosen, np.asarray(rows, np.int32), -np.asarray(rows, np.float32)

    return recommend


def ask(corpus, histories, candidates=()):
    rows = [{"user": str(n), "items": ids(corpus, *history)} for n, history in enumerate(histories)]
    for row, items in zip(rows, candidates, strict=False):
        row["candidates"] = ids(corpus, *items)
    return [request_of(corpus, Needs(candidates=bool(candidates)), row) for row in rows]


def test_answers_come_in_order_and_those_without_history_are_popular(shop_corpus):
    asked = ask(shop_corpus, [[0, 2], [], [1], [5, 6], []])
    told = []
    rows = answers.answer(shop_corpus, Models(lists_by_number(3), None, None), asked, None, 3, True, told.append)
    assert [row["user"] for row in rows] == ["0", "1", "2", "3", "4"]
    assert [row["method"] for row in rows] == ["model", "popularity", "model", "model", "popularity"]
    assert rows[0]["items"] == ids(shop_corpus, 1, 3, 4)
    assert rows[2]["items"] == ids(shop_corpus, 0, 2, 3)
    assert rows[0]["titles"] == [title_text(shop_corpus, item) for item in (1, 3, 4)]
    assert rows[0]["scores"] == [-1, -3, -4]
    counts = shop_corpus.training_popularity
    best = sorted(range(60), key=lambda item: -counts[item])[:3]
    assert rows[1]["items"] == ids(shop_corpus, *best)
    np.testing.assert_allclose(np.exp(rows[1]["scores"]), (counts[best] + 1) / (counts.sum() + 60), rtol=1e-5)
    assert sum(told) == 5
    seen = answers.answer(shop_corpus, Models(lists_by_number(3), None, None), asked, None, 3, False)
    assert seen[0]["items"] == ids(shop_corpus, 0, 1, 2)


def test_popular_items_pass_the_filters(shop_corpus):
    permitted = np.asarray([4, 8, 15], np.int32)
    [row] = answers.answer(
        shop_corpus, Models(lists_by_number(3), None, None), ask(shop_corpus, [[]]), permitted, 10, True
    )
    assert sorted(row["items"]) == sorted(ids(shop_corpus, 4, 8, 15))


def test_candidates_are_ordered_whatever_their_number(shop_corpus):
    """The score of an item is its number times the last item of the history."""
    random = np.random.default_rng(0)
    lists = [random.permutation(60)[:count].tolist() for count in (1, 2, 3, 4, 5, 9, 17, 60, 3)]
    histories = [[2]] * 8 + [[]]

    def score(queries, candidates):
        sign = np.asarray([query.history[-1] for query in queries])[:, None]
        yield np.arange(len(queries)), np.where(candidates >= 0, sign * candidates, -np.inf).astype(np.float32)

    asked = ask(shop_corpus, histories, lists)
    rows = answers.answer(shop_corpus, Models(None, score, None), asked, None, 10, True)
    for row, items in zip(rows[:-1], lists, strict=False):
        assert row["items"] == ids(shop_corpus, *sorted(items, reverse=True))
        assert row["scores"] == [2 * item for item in sorted(items, reverse=True)]
    by_popularity = sorted(lists[-1], key=lambda item: -shop_corpus.training_popularity[item])
    assert (rows[-1]["items"], rows[-1]["method"]) == (ids(shop_corpus, *by_popularity), "popularity")


def test_ratings_stand_beside_their_items(shop_corpus):
    def rate(pairs):
        values = np.asarray([pair.target + len(pair.history) / 10 for pair in pairs], np.float32)
        yield np.arange(len(pairs))[::-1], values[::-1], values[::-1]

    asked = ask(shop_corpus, [[0], [], [1, 2]])
    rows = answers.answer(shop_corpus, Models(lists_by_number(2), None, rate), asked, None, 2, True)
    assert rows[0]["ratings"] == [1.1, 2.1]
    assert rows[2]["ratings"] == [0.2, 3.2]
    assert len(rows[1]["ratings"]) == 2


# Jobs that are killed.


class Killed(BaseException):
    pass


@pytest.fixture
def table(shop_corpus, tmp_path):
    rows = [{"user": f"u{n}", "items": ids(shop_corpus, n % 60)} for n in range(11)]
    path = write_rows(tmp_path / "in.jsonl", rows)
    path.write_text(path.read_text() + "no row\n")
    return path


def run_job(corpus, path, output_dir, output_format="jsonl", size=4, shard=0, num_shards=1, answer=None):
    asked = requests.of_table(path, corpus, NEEDS)
    models = Models(lists_by_number(4), None, None)
    calm = answer or (lambda found, advance: answers.answer(corpus, models, found, None, 4, True, advance))
    about = {"input": asked.fingerprint, "output_format": output_format, "chunk_rows": size}
    return job.run(output_dir, about, asked, calm, size, shard, num_shards)


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def calm(shop_corpus, table, tmp_path):
    """What an uninterrupted job leaves, by format."""
    for output_format in ("jsonl", "parquet"):
        run_job(shop_corpus, table, tmp_path / f"calm_{output_format}", output_format)
    return {name: contents(tmp_path / f"calm_{name}") for name in ("jsonl", "parquet")}


def test_a_job_leaves_its_results_and_nothing_else(shop_corpus, table, calm, tmp_path):
    assert set(calm["jsonl"]) == {"recommendations.jsonl", "rejected.jsonl", "job.json"}
    rows = [json.loads(line) for line in calm["jsonl"]["recommendations.jsonl"].splitlines()]
    assert [row["user"] for row in rows] == [f"u{n}" for n in range(11)]
    told = json.loads(calm["jsonl"]["job.json"])["counts"]
    assert told == {"users": 11, "rejected": 1, "without_history": 0, "unknown_items": 0}
    table_of = parquet.read_table(tmp_path / "calm_parquet" / "recommendations.parquet")
    assert table_of.drop_columns(["scores"]).to_pylist() == [
        {name: value for name, value in row.items() if name != "scores"} for row in rows
    ]
    np.testing.assert_allclose(table_of["scores"].to_pylist(), [row["scores"] for row in rows])
    [rejected] = calm["jsonl"]["rejected.jsonl"].splitlines()
    assert json.loads(rejected)["line"] == 12
    assert run_job(shop_corpus, table, tmp_path / "calm_jsonl", answer=None) == told  # does nothing
    assert contents(tmp_path / "calm_jsonl") == calm["jsonl"]


def test_a_kill_at_any_change_of_the_disk_changes_nothing(shop_corpus, table, calm, tmp_path, monkeypatch):
    """Every rename, removal and new folder is once the moment of a kill, before it and after it."""
    changes = [(pathlib.Path, "unlink"), (pathlib.Path, "mkdir"), (chunks.shutil, "rmtree")]
    changes += [(files.os, "replace"), (files.os, "rename")]
    steps = 0

    def dying(function, moment, after):
        def call(*args, **kwargs):
            nonlocal steps
            steps += 1
            mine = steps
            if mine == moment and not after:
                raise Killed
            result = function(*args, **kwargs)
            if mine == moment:
                raise Killed
            return result

        return call

    moment, killed = 0, True
    while killed:
        moment += 1
        for after in (False, True):
            folder, steps = tmp_path / f"{moment}_{after}", 0
            with monkeypatch.context() as patch:
                for module, name in changes:
                    patch.setattr(module, name, dying(getattr(module, name), moment, after))
                try:
                    run_job(shop_corpus, table, folder)
                    killed = False
                except Killed:
                    pass
            run_job(shop_corpus, table, folder)
            assert contents(folder) == calm["jsonl"], (moment, after)
    assert moment > 20


@pytest.mark.parametrize("damage", ["cut", "emptied", "changed", "removed", "no marker", "another job's"])
def test_a_damaged_chunk_is_done_again(shop_corpus, table, calm, tmp_path, damage):
    models = Models(lists_by_number(4), None, None)

    def dies_at_the_third(found, advance):
        if found[0].user == "u8":
            raise Killed
        return answers.answer(shop_corpus, models, found, None, 4, True, advance)

    folder = tmp_path / "out"
    with pytest.raises(Killed):
        run_job(shop_corpus, table, folder, answer=dies_at_the_third)
    chunk = folder / "unfinished" / "000001.jsonl"
    content = chunk.read_bytes()
    marker = chunk.with_suffix(".done")
    if damage == "removed":
        chunk.unlink()
    elif damage == "no marker":
        marker.write_text("")
    elif damage == "another job's":
        # Chunks can outlive their job's own file where somebody deleted some of the folder.
        told = json.loads(marker.read_text())
        chunk.write_bytes(content.replace(b"u5", b"u9"))
        other = {"sha256": hashlib.sha256(chunk.read_bytes()).hexdigest(), "bytes": len(content)}
        marker.write_text(json.dumps(told | {"job": "0" * 64, "files": told["files"] | {"jsonl": other}}))
        (folder / "unfinished" / "job.json").unlink()
    else:
        chunk.write_bytes({"cut": content[:-5], "emptied": b"", "changed": content.replace(b"u5", b"u9")}[damage])
    run_job(shop_corpus, table, folder)
    assert contents(folder) == calm["jsonl"]


def test_shards_share_the_work_and_the_last_puts_it_together(shop_corpus, table, calm, tmp_path):
    folder = tmp_path / "out"
    assert run_job(shop_corpus, table, folder, shard=2, num_shards=3) is None
    assert run_job(shop_corpus, table, folder, shard=0, num_shards=3) is None
    assert run_job(shop_corpus, table, folder, shard=0, num_shards=3) is None
    assert run_job(shop_corpus, table, folder, shard=1, num_shards=3)["users"] == 11
    assert contents(folder) == calm["jsonl"]
    assert run_job(shop_corpus, table, folder, shard=2, num_shards=3)["users"] == 11


def test_two_shards_may_put_the_chunks_together_at_once(shop_corpus, table, calm, tmp_path, monkeypatch):
    """At every change of the disk that one makes, another one does it all before."""
    monkeypatch.setattr(chunks, "finish", lambda *args: None)
    run_job(shop_corpus, table, tmp_path / "ready")
    monkeypatch.undo()
    about = json.loads((tmp_path / "ready" / "unfinished" / "job.json").read_text())

    def met_another(moment):
        """Puts together; whether another one did so at that moment."""
        folder, steps, met = tmp_path / f"out{moment}", 0, False
        shutil.copytree(tmp_path / "ready", folder)
        found = chunks.done(folder, about, 3)

        def after_another(function):
            def call(*args, **kwargs):
                nonlocal steps, met
                steps += 1
                if steps == moment:
                    met = True
                    chunks.finish(folder, about, found)
                return function(*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            for name in ("replace", "rename"):
                patch.setattr(files.os, name, after_another(getattr(files.os, name)))
            assert chunks.finish(folder, about, found)["users"] == 11
        assert contents(folder) == calm["jsonl"], moment
        return met

    assert sum(map(met_another, range(1, 9))) > 3


def test_another_job_is_not_mixed_in(shop_corpus, table, tmp_path):
    folder = tmp_path / "out"

    def dies(found, advance):
        raise Killed

    with pytest.raises(Killed):
        run_job(shop_corpus, table, folder, answer=dies)
    with pytest.raises(InputError, match=r"another job that is unfinished: chunk_rows: 4 then, 5 now\. Finish that"):
        run_job(shop_corpus, table, folder, size=5)
    run_job(shop_corpus, table, folder)
    first = contents(folder)
    # Tonight's job takes the place of last night's, of whatever format, when it is done.
    table.write_text(table.read_text().replace("u1", "v1"))
    with pytest.raises(Killed):
        run_job(shop_corpus, table, folder, "parquet", answer=dies)
    assert first.items() <= contents(folder).items()
    run_job(shop_corpus, table, folder, "parquet")
    assert set(contents(folder)) == {"recommendations.parquet", "rejected.jsonl", "job.json"}


def test_what_differs_from_an_unfinished_job_is_named_with_both_values(tmp_path):
    before = {"decoding": {"num_beams": 20, "batch_size": 64, "top_k": 10}, "permitted": None, "input": "a" * 64 + " 5"}
    chunks.start(tmp_path, before)
    now = {
        "decoding": {"num_beams": 50, "top_k": 10},
        "permitted": "b",
        "input": "a" * 64 + " 6",
        "model": {"emb_dim": 8},
    }
    with pytest.raises(InputError) as raised:
        chunks.start(tmp_path, now)
    assert str(raised.value).split(": ", 1)[1].split(". Finish")[0].split("; ") == [
        "decoding.batch_size: not known now",  # as a version before wrote it
        "decoding.num_beams: 20 then, 50 now",
        f"input: {'a' * 12}... 5 then, {'a' * 12}... 6 now",
        "model: not known then",
        "permitted: None then, b now",
    ]


def test_a_finished_job_leaves_another_one_alone_that_is_not(shop_corpus, table, tmp_path):
    folder = tmp_path / "out"
    run_job(shop_corpus, table, folder)
    last_night, text = contents(folder), table.read_text()

    def dies(found, advance):
        raise Killed

    table.write_text(text.replace("u1", "v1"))
    with pytest.raises(Killed):
        run_job(shop_corpus, table, folder, answer=dies)
    chunks_of_tonight = contents(folder / "unfinished")
    table.write_text(text)
    run_job(shop_corpus, table, folder)  # is done, and does nothing
    assert contents(folder / "unfinished") == chunks_of_tonight
    assert last_night.items() <= contents(folder).items()


@pytest.mark.parametrize("file", ["rejected.jsonl", "recommendations.jsonl"])
def test_a_job_is_not_finished_beside_a_file_of_another(shop_corpus, table, calm, tmp_path, file):
    """One that was killed between the two files that it replaces."""
    folder = tmp_path / "out"
    run_job(shop_corpus, table, folder)
    (folder / file).write_text('{"of": "another"}\n')
    run_job(shop_corpus, table, folder)
    assert contents(folder) == calm["jsonl"]


def test_a_finished_job_that_was_killed_while_sweeping_up_is_not_in_the_way(shop_corpus, table, tmp_path):
    folder = tmp_path / "out"
    run_job(shop_corpus, table, folder)
    (folder / "unfinished").mkdir()
    about = json.loads((folder / "job.json").read_text())["job"]
    (folder / "unfinished" / "job.json").write_text(json.dumps(about))
    assert run_job(shop_corpus, table, folder, size=5)["users"] == 11
    assert set(contents(folder)) == {"recommendations.jsonl", "rejected.jsonl", "job.json"}

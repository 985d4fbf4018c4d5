"""`recalign infer` as a user types it, with a model of a few steps on a small rated shop, items as titles."""

import ast
import collections
import importlib.util
import json
import pathlib
import re
import sys

import jax
import numpy as np
import pytest
from pyarrow import parquet

from recalign_jax import cli
from recalign_jax.commands import common
from recalign_jax.commands import eval as eval_module
from recalign_jax.commands import infer as infer_module
from tests.corpora import prepare_shop

USERS, ITEMS, LENGTH = 40, 30, 6
TINY = ("--gin_file", "gin_configs/models/t5_tiny.gin")
pytestmark = pytest.mark.usefixtures("fast_compilation")


def item_id(number):
    return f"thing{number}"


@pytest.fixture(scope="module")
def histories():
    random = np.random.default_rng(0)
    return {f"user{user}": [item_id(item) for item in random.permutation(ITEMS)[:LENGTH]] for user in range(USERS)}


def rating_of(user, place):
    return 1 + (hash_of(user) + place) % 5


def hash_of(user):
    return int(user.removeprefix("user"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory, histories):
    """A corpus, a vocabulary and a model that has seen every family."""
    folder = tmp_path_factory.mktemp("rated")
    rows = [
        (user, item, place, rating_of(user, place))
        for user, items in histories.items()
        for place, item in enumerate(items)
    ]
    words = ("red", "small", "old", "loud", "soft"), ("kettle", "drum", "lamp", "chair", "boat", "hat")
    items = [
        {"item_id": item_id(n), "title": f"{words[0][n % 5]} {words[1][n % 6]}", "categories": [words[1][n % 6]]}
        for n in range(ITEMS)
    ]
    prepare_shop(folder, rows, items, 110)
    train = [*TINY, "--gin_file", "gin_configs/runs/finetune.gin", "--gin.MIXTURE_OR_TASK_NAME=shop_all"]
    train += ["--gin.TASK_FEATURE_LENGTHS={'inputs': 256, 'targets': 32}", "--gin.TRAIN_STEPS=4", "--gin.BATCH_SIZE=4"]
    train += ["--gin.InputOptions.window=64", "--gin.InputOptions.data_shards=2"]
    train += [f"--gin.VOCABULARY={folder / 'words.model'}", f"--gin.MODEL_DIR={folder / 'model'}"]
    assert cli.main(["train", "--data_dir", str(folder), *train]) == 0
    return folder


@pytest.fixture
def infer(folder, tmp_path, capsys):
    """Runs `recalign infer`; returns its object and its rows by user, or with status 2 the message."""

    def call(*arguments, task="shop_retrieval", status=0, rows=True):
        output = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        flags = [*TINY, "--gin_file", "gin_configs/runs/infer.gin", f"--gin.TASK_NAME={task}"]
        flags += [f"--gin.VOCABULARY={folder / 'words.model'}", f"--gin.CHECKPOINT_PATH={folder / 'model'}"]
        flags += [f"--gin.OUTPUT_DIR={output}", "--gin.BATCH_SIZE=16", "--gin.MAX_INPUT_TOKENS=256", "--json"]
        capsys.readouterr()
        assert cli.main(["infer", "--data_dir", str(folder), *flags, *arguments]) == status
        told = capsys.readouterr()
        if status:
            return told.err
        result = json.loads(told.out.splitlines()[-1])
        if not rows:
            return result, {}
        path = pathlib.Path(result["output"])
        if path.suffix == ".parquet":
            rows = parquet.read_table(path).to_pylist()
        else:
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        assert len({row["user"] for row in rows}) == len(rows) == result["users"]
        return result, {row["user"]: row for row in rows}

    return call


EVERYTHING = (f"--gin.TOP_K={ITEMS}", f"--gin.NUM_BEAMS={ITEMS}")  # a whole ranking of the catalogue


def table(tmp_path, rows):
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return f"--gin.INPUT={path}"


def assert_same_scores(row, other):
    assert collections.Counter(row["items"]) == collections.Counter(other["items"])
    found, wanted = (dict(zip(of["items"], of["scores"], strict=True)) for of in (row, other))
    for item, score in wanted.items():
        assert found[item] == pytest.approx(score, abs=2e-5)


def test_a_stranger_gets_what_a_user_with_that_history_gets(infer, histories, tmp_path):
    _, known = infer(*EVERYTHING, "--gin.SPLIT=all")
    assert set(known) == set(histories)
    rows = [{"user": f"new {user}", "items": items} for user, items in histories.items()]
    more = ("--gin.CHUNK_ROWS=7", "--gin.OUTPUT_FORMAT=parquet")
    result, strangers = infer(*EVERYTHING, table(tmp_path, [*rows, {"user": "nobody", "items": []}]), *more)
    assert (result["users"], result["rejected"], result["without_history"]) == (USERS + 1, 0, 1)
    for user, items in histories.items():
        assert_same_scores(strangers[f"new {user}"], known[user])
        assert not set(items) & set(known[user]["items"])
        assert len(known[user]["items"]) == ITEMS - LENGTH
    assert strangers["nobody"]["method"] == "popularity"


def test_filters_leave_of_the_ranking_what_passes(infer, tmp_path):
    _, full = infer(*EVERYTHING)
    (tmp_path / "allow.txt").write_text("".join(f"{item_id(n)}\n" for n in range(0, ITEMS, 2)))
    (tmp_path / "deny.txt").write_text(f"{item_id(4)}\n")
    filters = (f"--gin.ALLOW={tmp_path / 'allow.txt'}", f"--gin.DENY={tmp_path / 'deny.txt'}")
    _, filtered = infer(*EVERYTHING, *filters, "--gin.CATEGORY=['kettle', 'lamp', 'boat']")
    passing = {item_id(n) for n in range(0, ITEMS, 2) if n % 6 in (0, 2, 4) and n != 4}
    for user, row in filtered.items():
        scored = zip(full[user]["items"], full[user]["scores"], strict=True)
        kept = {item: score for item, score in scored if item in passing}
        assert row["items"]
        assert_same_scores(row, {"items": [*kept], "scores": [*kept.values()]})


def test_new_items_are_recommended_and_the_others_keep_their_scores(infer, histories, tmp_path):
    (tmp_path / "items.jsonl").write_text(
        '{"item_id": "N1", "title": "old chair"}\n{"item_id": "N2", "title": "hat"}\n'
    )
    items = f"--gin.ITEMS={tmp_path / 'items.jsonl'}"
    rows = [{"user": user, "items": found} for user, found in histories.items()] + [{"user": "u", "items": ["N1"]}]
    _, before = infer(*EVERYTHING, "--gin.SPLIT=all")
    _, after = infer("--gin.TOP_K=32", "--gin.NUM_BEAMS=32", items, table(tmp_path, rows))
    for user, row in before.items():
        found = dict(zip(after[user]["items"], after[user]["scores"], strict=True))
        assert set(found) == {*row["items"], "N1", "N2"}
        for item, score in zip(row["items"], row["scores"], strict=True):
            assert found[item] == pytest.approx(score, abs=2e-5)
    assert "N1" not in after["u"]["items"]
    assert after["u"]["method"] == "model"


def test_candidates_are_ranked_and_rated_as_eval_does(infer, folder, histories, tmp_path, capsys):
    """The rating of a test target is what `recalign eval` predicts for it."""
    flags = [
        *TINY,
        "--gin_file",
        "gin_configs/runs/eval.gin",
        "--gin.TASK_NAME=shop_rating",
        "--gin.EVAL_BATCH_SIZE=16",
    ]
    flags += [f"--gin.VOCABULARY={folder / 'words.model'}", f"--gin.CHECKPOINT_PATH={folder / 'model'}"]
    flags += [f"--gin.OUTPUT_DIR={tmp_path / 'eval'}", "--gin.MAX_INPUT_TOKENS=256"]
    assert cli.main(["eval", "--data_dir", str(folder), *flags]) == 0
    wanted = {row["user"]: row for row in parquet.read_table(tmp_path / "eval" / "rating.parquet").to_pylist()}
    rows = [
        {
            "user": user,
            "items": items[:-1],
            "ratings": [rating_of(user, place) for place in range(LENGTH - 1)],
            "candidates": [items[-1], *[item_id(n) for n in range(2 + hash_of(user) % 2)]],
        }
        for user, items in histories.items()
    ]
    _, found = infer(table(tmp_path, rows), "--gin.RATINGS=True", task="shop_ranking")
    for row in rows:
        answer = found[row["user"]]
        assert sorted(answer["items"]) == sorted(set(row["candidates"]))
        assert answer["scores"] == sorted(answer["scores"], reverse=True)
        ratings = dict(zip(answer["items"], answer["ratings"], strict=True))
        assert ratings[row["candidates"][0]] == pytest.approx(wanted[row["user"]]["expected"], abs=2e-5)


def test_a_job_goes_on_with_smaller_batches_but_with_nothing_else(infer, folder, tmp_path):
    output = f"--gin.OUTPUT_DIR={tmp_path / 'nightly'}"
    first = ("--gin.CHUNK_ROWS=8", "--gin.NUM_SHARDS=2", output)
    told, _ = infer(*first, rows=False)
    assert told["output"] is None  # the other shard's chunks are to be done
    error = infer(*first, "--gin.NUM_BEAMS=12", "--gin.T5Config.activation_dtype='bfloat16'", status=2)
    assert "decoding.num_beams: 20 then, 12 now; model.activation_dtype: float32 then, bfloat16 now." in error
    told, rows = infer(*first, "--gin.SHARD=1", "--gin.BATCH_SIZE=8", "--gin.T5Config.dropout_rate=0.5")
    assert len(rows) == told["users"] == USERS
    job = json.loads((tmp_path / "nightly" / "job.json").read_text())["job"]
    assert job["model"]["emb_dim"] == 64
    assert not {"batch_size", "dropout_rate", "remat"} & {*job["model"], *job["decoding"]}


@pytest.mark.parametrize("command", ["infer", "eval"])
def test_a_model_that_diverged_is_an_error(folder, tmp_path, capsys, monkeypatch, command):
    module = {"infer": infer_module, "eval": eval_module}[command]

    def load_model(*args):
        model = common.load_model(*args)
        return model._replace(params=jax.tree.map(lambda leaf: leaf * np.nan, model.params))

    monkeypatch.setattr(module, "load_model", load_model)
    flags = [*TINY, "--gin_file", f"gin_configs/runs/{command}.gin", "--gin.TASK_NAME=shop_retrieval"]
    flags += [f"--gin.VOCABULARY={folder / 'words.model'}", f"--gin.CHECKPOINT_PATH={folder / 'model'}"]
    flags += [f"--gin.OUTPUT_DIR={tmp_path / 'out'}", "--gin.SCORES=trie", "--gin.MAX_INPUT_TOKENS=256"]
    assert cli.main([command, "--data_dir", str(folder), *flags]) == 1
    assert "scores that are no numbers (NaN): it diverged" in capsys.readouterr().err
    assert not [*(tmp_path / "out").glob("*.json*"), *(tmp_path / "out").glob("*.parquet")]


@pytest.mark.parametrize(
    ("arguments", "task", "message"),
    [
        (["--gin.ON_UNKNOWN_ITEM=keep"], "shop_retrieval", "ON_UNKNOWN_ITEM is 'keep', not one of drop, reject"),
        (["--gin.OUTPUT_FORMAT=csv"], "shop_retrieval", "OUTPUT_FORMAT is 'csv', not one of jsonl, parquet"),
        (["--gin.SHARD=2", "--gin.NUM_SHARDS=2"], "shop_retrieval", "SHARD 2 of NUM_SHARDS 2"),
        (["--gin.SPLIT=train"], "shop_retrieval", "SPLIT is 'train', not one of test, validation, all"),
        ([], "shop_ranking", "give --gin.INPUT=PATH"),
        ([], "shop_rating", "give one that recommends, as shop_retrieval"),
        (["--gin.CATEGORY=ketle"], "shop_retrieval", "Did you mean 'kettle'?"),
        (["--gin.CATEGORY=kettle"], "shop_ranking", "a ranking task has its candidates"),
        (["--gin.INPUT=nowhere.csv"], "shop_retrieval", "nowhere.csv"),
    ],
)
def test_what_cannot_be_done_is_said(infer, arguments, task, message):
    assert message in infer(*arguments, task=task, status=2)


@pytest.mark.parametrize(
    ("corpus", "trained", "family", "taught"),
    [
        ("ranking_shop", "retrieval_aligned", "ranking", False),
        ("shop_allowed", "retrieval", "rating", False),
        ("shop", "all_token", "rating", True),
        ("shop", "ranking_aligned", "ranking", True),
        ("shop", "rating_random", "rating", True),
    ],
)
def test_a_family_that_a_model_was_not_taught_is_warned_of(tmp_path, capsys, corpus, trained, family, taught):
    (tmp_path / corpus / "arrays").mkdir(parents=True)
    (tmp_path / corpus / "corpus.json").touch()
    (tmp_path / corpus / "arrays" / "ratings.npy").touch()
    identity = {"MIXTURE_OR_TASK_NAME": f"'{corpus}_{trained}'"}
    model = common.Model(None, None, None, 1, None, "run", identity)
    infer_module._warn_untrained(model, family, str(tmp_path))
    assert ("nothing there taught it" in capsys.readouterr().err) == (not taught)


def test_the_guides_beam_pipeline_answers_as_the_command_does(infer, folder, histories, tmp_path, monkeypatch):
    beam = pytest.importorskip("apache_beam", reason="Apache Beam is not installed: pip install -e '.[beam]'")
    guide = (pathlib.Path(__file__).parents[1] / "docs" / "batch_inference.md").read_text(encoding="utf-8")
    [code] = re.findall(r"```python\n(.*?)```", guide, re.DOTALL)
    (tmp_path / "pipeline.py").write_text(code, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("pipeline", tmp_path / "pipeline.py")
    pipeline = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pipeline)

    rows = [{"user": user, "items": items} for user, items in histories.items()]
    _, wanted = infer(table(tmp_path, rows))
    gin_files = ["gin_configs/models/t5_tiny.gin", "gin_configs/runs/infer.gin"]
    names = {"TASK_NAME": "shop_retrieval", "VOCABULARY": folder / "words.model", "CHECKPOINT_PATH": folder / "model"}
    names |= {"BATCH_SIZE": 16, "MAX_INPUT_TOKENS": 256}
    bindings = [(name, str(value)) for name, value in names.items()]
    monkeypatch.setitem(sys.modules, "pipeline", pipeline)  # where Beam finds the class again
    with beam.Pipeline(runner="DirectRunner") as started:
        asked = started | beam.Create([*rows, {"user": "nobody"}])
        found = pipeline.recommendations(asked, gin_files, bindings, str(folder), 16)
        for part, name in zip(found, ("answers", "rejected"), strict=True):
            _ = part | name >> beam.io.WriteToText(str(tmp_path / name), shard_name_template="", num_shards=1)
    lines = (tmp_path / "answers").read_text(encoding="utf-8").splitlines()
    by_user = {row["user"]: row for row in map(ast.literal_eval, lines)}
    assert set(by_user) == set(wanted)
    for user, row in wanted.items():
        assert_same_scores(by_user[user], row)
    assert "no field 'items'" in (tmp_path / "rejected").read_text()

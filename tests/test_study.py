"""The study: rows differ in what their names say, the queue goes on where it stopped, the page says what was found."""

import fcntl
import functools
import itertools
import json
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from benchmarks import results, results_page, results_summary, study, study_records, study_verdicts
from benchmarks.study_claims import Claim, claims, tables
from benchmarks.study_verdicts import Judged
from recalign_jax import cli, gin_config
from recalign_jax.corpus import vocab
from recalign_jax.errors import InputError
from seqio_tasks import prompts
from tests.corpora import prepared, write_tables

pytestmark = pytest.mark.usefixtures("fast_compilation")
EXPERIMENTS = "gin_configs/experiments"
GIVEN = "--gin.TASK_FEATURE_LENGTHS={'inputs': 32, 'targets': 8}"


# The rows.


@functools.cache
def snapshot(*files: str) -> dict[str, str]:
    gin_config.parse([f"{EXPERIMENTS}/study_{name}.gin" if "/" not in name else name for name in files], [])
    return gin_config.snapshot()


def test_every_row_has_a_file_and_every_file_is_a_row():
    folder = gin_config.PROJECT_ROOT / EXPERIMENTS
    named = {path.stem.removeprefix("study_") for path in folder.glob("study_*.gin")}
    assert {name for name in named if not name.startswith("base")} == set(study.ROWS)
    assert {name for table in tables() for name in table.rows} == set(study.ROWS)


@pytest.mark.parametrize("row", study.ROWS)
def test_a_row_differs_from_the_base_in_what_its_name_says(row):
    base, found = snapshot("base"), snapshot(row)
    corpus, rest = next(
        (name, row.removeprefix(f"{name}_"))
        for name in ("beauty_shuffled", "beauty", "toys", "movielens")
        if row.startswith(f"{name}_")
    )
    item_format, task = rest.split("_", 1)
    long = {"title": ("{'inputs': 512, 'targets': 96}", "8"), "id": ("{'inputs': 128, 'targets': 16}", "32")}
    if task.startswith("rating"):
        long["token"] = ("{'inputs': 112, 'targets': 8}", "36")
    if task.startswith("ranking"):
        long["token"] = long["id"]
    expected = {}
    for ending, name, value in (
        ("_history_5", "HISTORY_LENGTH", "5"),
        ("_history_10", "HISTORY_LENGTH", "10"),
        ("_no_prefixes", "PREFIX_AUGMENTATION", "False"),
        ("_neighbours", "NEIGHBOURS", "5"),
        ("_equal", "MIXTURE_TEMPERATURE", "1000000.0"),
        ("_100", "RANKING_CANDIDATES", "100"),
        ("_dropout", "DROPOUT_RATE", "0.2"),
    ):
        if task.endswith(ending):
            task, expected[name] = task.removesuffix(ending), value
    if task.endswith("_long"):  # in so many epochs a model may learn its training split by heart
        task = task.removesuffix("_long")
        expected |= {"TRAIN_STEPS": "32000", "EVAL_PERIOD": "4000", "MAX_EVAL_USERS": "4000"}
        expected["BEST_METRIC"] = "'validation_ndcg@10'"
    if task.endswith("_wide"):
        task, long["token"] = task.removesuffix("_wide"), ("{'inputs': 256, 'targets': 48}", "16")
    if item_format in long:
        expected["TASK_FEATURE_LENGTHS"], expected["BATCH_SIZE"] = long[item_format]
    if item_format == "title":
        expected["SCORES"] = "'trie'"
    named = corpus if corpus == "movielens" else f"amazon_{corpus}"
    words = "movielens_1000" if corpus == "movielens" else f"{named.removesuffix('_shuffled')}_4000"
    suffix = "" if item_format == "title" else f"_{item_format}"
    expected["MIXTURE_OR_TASK_NAME"] = f"'{named}_{task}{suffix}'"
    expected["VOCABULARY"], expected["MODEL_DIR"] = f"'{words}.model'", f"'runs/study/{row}'"
    assert {name: value for name, value in found.items() if base.get(name) != value} == expected
    assert set(found) == set(base)


def test_a_step_has_as_many_places_for_tokens_in_every_format():
    places = set()
    for row in study.ROWS:
        found = snapshot(row)
        places.add(json.loads(found["TASK_FEATURE_LENGTHS"].replace("'", '"'))["inputs"] * int(found["BATCH_SIZE"]))
    assert max(places) < 1.03 * min(places)


@pytest.mark.parametrize("row", ["beauty_token_retrieval_aligned", "beauty_title_retrieval_aligned"])
def test_another_model_is_a_second_file(row):
    model = "gin_configs/models/flan_t5_base.gin"
    swapped, alone = snapshot(row, model), snapshot(model)
    assert {name: swapped[name] for name in alone} == alone
    assert gin_config.model_files([f"{EXPERIMENTS}/study_{row}.gin", model])[-1] == model
    plain = snapshot(row)
    assert all(swapped[name] == value for name, value in plain.items() if name not in alone)


# The queue.


def test_the_order_of_the_queue():
    every = study.queue(list(study.ROWS), None)
    assert len(set(every)) == len(every) == sum(len(seeds) for seeds in study.ROWS.values())
    corpora = [row.split("_")[0] for row, _ in every]
    assert [corpus for corpus, _ in itertools.groupby(corpora)] == ["beauty", "toys", "movielens"]
    for _, runs in itertools.groupby(every, key=lambda run: run[0].split("_")[0]):
        seeds = [seed for _, seed in runs]
        assert seeds == sorted(seeds)
    rows = ["toys_token_ranking", "beauty_id_retrieval"]
    assert study.queue(rows, [4, 3]) == [(rows[1], 3), (rows[1], 4), (rows[0], 3), (rows[0], 4)]


def test_the_evaluation_is_of_what_was_trained():
    bindings = ["--gin.T5Config.mlp_dim=32", "--gin.NUM_BEAMS=7", "--gin.MAX_EVAL_USERS=9"]
    place = (pathlib.Path("/data"), pathlib.Path("/out"), "test")
    job = study.make_job("beauty_token_retrieval_history_5", 2, *place, bindings)
    assert {"--gin.SEED=2", "--gin.MODEL_DIR=/out/beauty_token_retrieval_history_5/2", *bindings} <= set(job.train)
    assert {part for part in job.evaluate if part.startswith("--gin.")} == {
        *("--gin.TASK_NAME=amazon_beauty_retrieval_token", "--gin.SPLIT=test", "--gin.HISTORY_LENGTH=5"),
        *("--gin.CHECKPOINT_PATH=/out/beauty_token_retrieval_history_5/2", "--gin.VOCABULARY=amazon_beauty_4000.model"),
        *("--gin.OUTPUT_DIR=/out/beauty_token_retrieval_history_5/2/test", *bindings[:2]),
    }
    assert job.settings["LEARNING_RATE"] == snapshot("base")["LEARNING_RATE"]
    long = study.make_job("beauty_token_retrieval_long", 0, *place, [])
    assert "--gin.CHECKPOINT_PATH=/out/beauty_token_retrieval_long/0/best" in long.evaluate
    assert not any("MAX_EVAL_USERS" in part for part in long.evaluate)
    with pytest.raises(InputError, match="Did you mean 'LEARNING_RATE'"):
        study.make_job("beauty_id_retrieval", 0, *place, ["--gin.LEARNING_RAT=1"])


# Trains for 4 steps and logs 2 of them before it is killed, if it is told to be; evaluates to a constant.
STAND_IN = """
import json, os, pathlib, signal, sys, time
values = dict(argument.removeprefix("--gin.").split("=", 1) for argument in sys.argv if argument.startswith("--gin."))
here = pathlib.Path(__file__).parent
with (here / "calls").open("a") as calls:
    calls.write(sys.argv[1] + " " + values.get("MODEL_DIR", values.get("OUTPUT_DIR")) + "\\n")
if sys.argv[1] == "eval":
    folder = pathlib.Path(values["OUTPUT_DIR"])
    folder.mkdir()
    (folder / "metrics.json").write_text('{"retrieval": {}}')
    sys.exit()
log = pathlib.Path(values["MODEL_DIR"]) / "metrics.jsonl"
done = len(log.read_text().splitlines()) if log.exists() else 0
for step in range(done + 1, 5):
    time.sleep(0.1)
    with log.open("a") as file:
        rates = {} if step == done + 1 else {"tokens_per_second": 50.0 * step, "steps_per_second": 0.5}
        file.write(json.dumps({"step": step, **rates}) + "\\n")
    ill = here / "ill"
    if step == 2 and ill.exists():
        signals = ill.read_text()
        ill.unlink()
        os.kill(os.getpid(), int(signals)) if signals != "fail" else sys.exit(1)
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Runs the queue with a program that only pretends; gives its last JSON line, what was called, what was printed."""
    (tmp_path / "program.py").write_text(STAND_IN)
    monkeypatch.setattr(study, "PROGRAM", (sys.executable, str(tmp_path / "program.py")))
    for corpus in ("amazon_beauty", "amazon_toys"):
        (tmp_path / "data" / corpus).mkdir(parents=True)
        (tmp_path / "data" / corpus / "corpus.json").touch()

    def call(capsys, *arguments: str, rows=("beauty_token_retrieval",), status: int = 0):
        calls = tmp_path / "calls"
        calls.write_text("")
        where = ["--data_dir", str(tmp_path / "data"), "--output", str(tmp_path / "out")]
        where += ["--records", str(tmp_path / "records")]
        monkeypatch.setattr(sys, "argv", ["study.py", *where, "--rows", *rows, "--seeds", "0", *arguments])
        with pytest.raises(SystemExit) as ended:
            study.main()
        assert ended.value.code == status
        told = capsys.readouterr()
        called = calls.read_text().replace(f"{tmp_path}/out/", "").splitlines()
        return (json.loads(told.out) if status in (0, 1) else None), called, told.err

    return call


def test_the_queue_does_everything_once(stand_in, capsys):
    rows = ("toys_token_ranking", "beauty_token_retrieval")
    told, called, printed = stand_in(capsys, rows=rows)
    beauty, toys = "beauty_token_retrieval/0", "toys_token_ranking/0"
    assert called == [f"train {beauty}", f"eval {beauty}/test", f"train {toys}", f"eval {toys}/test"]
    assert printed.count("recalign train --data_dir") == printed.count("recalign eval --data_dir") == 2
    assert [(run["row"], run["seed"], run["steps"]) for run in told["runs"]] == [
        ("beauty_token_retrieval", 0, 4),
        ("toys_token_ranking", 0, 4),
    ]
    # 100, 150 and 200 tokens in twice as many seconds a step; the first step counts as their mean.
    assert told["runs"][0]["tokens"] == round((200 + 300 + 400) * 4 / 3)
    assert told["runs"][0]["seconds"] > 0.4
    assert stand_in(capsys, rows=rows)[:2] == (told, [])
    assert stand_in(capsys, "--split", "validation")[1] == [f"eval {beauty}/validation"]


@pytest.mark.parametrize(
    ("how", "status"), [(signal.SIGKILL, 1), (signal.SIGTERM, "Stopped; the same command goes on.")]
)
def test_the_queue_goes_on_where_it_stopped(stand_in, capsys, tmp_path, how, status):
    (tmp_path / "ill").write_text(str(int(how)))
    _, called, _ = stand_in(capsys, status=status)
    assert called == ["train beauty_token_retrieval/0"]
    record = json.loads((tmp_path / "out/beauty_token_retrieval/0/study.json").read_text())
    assert "steps" not in record
    first = (tmp_path / "out/beauty_token_retrieval/0/metrics.jsonl").stat().st_mtime - record["since"]
    time.sleep(0.5)
    begun = time.time()
    told, called, _ = stand_in(capsys)
    assert called == ["train beauty_token_retrieval/0", "eval beauty_token_retrieval/0/test"]
    # Both parts, but not the pause between them.
    assert 0.2 < first < told["runs"][0]["seconds"] <= first + time.time() - begun
    # Steps 2 and 4 have rates; 1 and 3 began a process.
    assert told["runs"][0]["tokens"] == round((200 + 400) * 4 / 2)


def test_a_failure_does_not_stop_the_others(stand_in, capsys, tmp_path):
    (tmp_path / "ill").write_text("fail")
    told, called, _ = stand_in(capsys, rows=("beauty_token_retrieval", "toys_token_ranking"), status=1)
    assert told["failed"] == ["beauty_token_retrieval/0"]
    assert [run["row"] for run in told["runs"]] == ["toys_token_ranking"]
    assert "eval beauty_token_retrieval/0/test" not in called
    assert stand_in(capsys)[0]["failed"] == []


def test_other_settings_are_refused_and_a_corpus_that_is_not_there_is_left_out(stand_in, capsys):
    stand_in(capsys)
    _, called, printed = stand_in(capsys, "--gin.LEARNING_RATE=0.5", status=2)
    assert called == []
    assert "beauty_token_retrieval/0 holds a run with other settings (LEARNING_RATE was 0.03, is 0.5)" in printed
    told, called, printed = stand_in(capsys, rows=["movielens_token_rating"])
    assert (told, called) == ({"runs": [], "failed": []}, [])
    assert "movielens_token_rating is left out: Unknown task 'movielens_rating_token'" in printed


def test_a_training_that_outlived_its_queue_is_waited_for(tmp_path):
    with study.locked(tmp_path) as lock:
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=[lock.fileno()])
    with (tmp_path / "lock").open() as lock, pytest.raises(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    subprocess.Popen(["sh", "-c", f"sleep 0.3; kill {child.pid}"])
    with study.locked(tmp_path):
        assert child.wait(1) is not None


def test_a_real_run(tmp_path, monkeypatch, capsys):
    """A row as it stands, but small: trained, evaluated, recorded and shown."""
    random = np.random.default_rng(0)
    rows = [
        (f"user{user}", f"thing{item}", time, 1 + (item + user) % 5)
        for user in range(20)
        for time, item in enumerate(random.permutation(15)[:6])
    ]
    items = [{"item_id": f"thing{n}", "title": f"thing number {n}"} for n in range(15)]
    data = tmp_path / "data"
    prepared("tables", write_tables(tmp_path / "raw", rows, items), data, "movielens")
    (data / "vocabularies").mkdir()
    texts = [f"thing number {n}" for n in range(15)]
    (data / "vocabularies/movielens_1000.model").write_bytes(vocab.train_vocabulary(texts, 120, prompts.literals()))
    monkeypatch.setattr(study, "call", lambda command, lock: cli.main(command[1:]))
    fast = ["--gin.TRAIN_STEPS=4", "--gin.LOG_PERIOD=2", "--gin.BATCH_SIZE=4", "--gin.WARMUP_STEPS=1"]
    fast += ["--gin.EVAL_PERIOD=0", "--gin.TASK_FEATURE_LENGTHS={'inputs': 160, 'targets': 8}"]
    fast += ["--gin.InputOptions.window=64", "--gin.InputOptions.data_shards=1"]
    where = ["--data_dir", str(data), "--output", str(tmp_path / "out"), "--rows", "movielens_token_rating_aligned"]
    monkeypatch.setattr(sys, "argv", ["study.py", *where, "--seeds", "5", *fast])
    with pytest.raises(SystemExit, match="0"):
        study.main()
    [told] = json.loads(capsys.readouterr().out.splitlines()[-1])["runs"]
    assert (told["row"], told["seed"], told["steps"]) == ("movielens_token_rating_aligned", 5, 4)
    log = [json.loads(line) for line in (tmp_path / "out" / told["row"] / "5/metrics.jsonl").read_text().splitlines()]
    steps = np.diff([0, *(record["step"] for record in log)])
    inputs = sum(steps * [record["packing_efficiency"] * 4 * 160 for record in log])
    assert inputs < told["tokens"] < 1.2 * inputs  # and targets
    results.keep(tmp_path / "out", None, "test", tmp_path / "records")
    found = study_records.read(tmp_path / "records", results.known_rows())
    page, drawn = results_page.render(found, {}, "results")
    figures = json.loads((tmp_path / "out" / told["row"] / "5/test/metrics.json").read_text())["rating"]
    assert f"| movielens_token_rating_aligned | **{figures['rmse']:.4f}** | **{figures['mae']:.4f}** | 1 | 4 |" in page
    assert list(drawn) == ["rating_on_movielens_100k.svg"]
    [squared] = study_records.per_user(found[told["row"]], "rating", "rmse")
    assert np.sqrt(squared.mean()) == pytest.approx(figures["rmse"])
    assert len(squared) == figures["users"]
    # The same run isn't done again, even where its folder is gone; one with other settings is.
    records = ["--records", str(tmp_path / "records"), "--output", str(tmp_path / "other")]
    monkeypatch.setattr(sys, "argv", ["study.py", *where, "--seeds", "5", *fast, *records])
    with pytest.raises(SystemExit, match="0"):
        study.main()
    told = capsys.readouterr()
    assert json.loads(told.out.splitlines()[-1]) == {"runs": [], "failed": []}
    assert f"movielens_token_rating_aligned/5 is kept in {tmp_path}/records already." in told.err
    assert not (tmp_path / "other").exists()
    record = found["movielens_token_rating_aligned"].records[0]
    settings, about = record["settings"], {name: record[name] for name in ("settings", "bindings")}
    place = ("movielens_token_rating_aligned", 5)
    assert study_records.is_kept(*place, "test", about, tmp_path / "records")
    newer = about | {"settings": settings | {"AN_OPTION_SINCE": "1"}}
    assert study_records.is_kept(*place, "test", newer, tmp_path / "records")
    other = about | {"settings": settings | {"DROPOUT_RATE": "0.2"}}
    assert not study_records.is_kept(*place, "test", other, tmp_path / "records")
    given = about | {"bindings": [*about["bindings"], "--gin.TaskOptions.test_negatives=9"]}
    assert not study_records.is_kept(*place, "test", given, tmp_path / "records")
    assert not study_records.is_kept(*place, "validation", about, tmp_path / "records")


# The page.


def test_claims_are_about_rows_and_baselines_that_there_are():
    known = {*study.ROWS, *(name for table in tables() for name in table.baselines)}
    assert {name for claim in claims() for name in (claim.better, claim.worse)} <= known
    assert len({claim.text for claim in claims()}) == len(claims())


@pytest.fixture
def folders(tmp_path):
    """Two rows of three and two seeds, and two baselines; recall@10 of a user is drawn, its ndcg half of it."""
    random = np.random.default_rng(0)
    runs, told = tmp_path / "runs", {}

    def write(folder: pathlib.Path, name: str, seed: int, chance: float, **more) -> None:
        folder.mkdir(parents=True)
        recall = (random.random(400) < chance).astype(np.float32)
        order = random.permutation(400)  # rows stand in any order
        columns = {"user": [f"u{n:03d}" for n in order], "recall@10": recall, "ndcg@10": recall / 2}
        columns["ndcg@10_unfiltered"] = recall / 4
        metrics = dict.fromkeys(study_records.METRICS["retrieval"], 0.0)
        columns |= {name: np.zeros(400) for name in metrics if name not in columns}
        parquet.write_table(pyarrow.table(columns), folder / "retrieval.parquet")
        metrics |= {metric: float(np.mean(columns[metric])) for metric in columns if metric in metrics}
        (folder / "metrics.json").write_text(json.dumps({"retrieval": metrics} | more))
        told[name, seed] = metrics, dict(zip(columns["user"], recall, strict=True))

    for name, seeds, chance in (("retrieval", 3, 0.3), ("retrieval_aligned", 2, 0.6)):
        for seed in range(seeds):
            row = f"beauty_token_{name}"
            write(runs / row / str(seed) / "test", row, seed, chance, step=7000 - 3000 * seed)
            record = {
                "settings": {"DROPOUT_RATE": "0.1"},
                "steps": 7000,
                "tokens": 80_000_000 + 10_000_000 * seed,
                "seconds": 600.0 * (seed + 1),
            }
            record |= {"cores": 2, "bindings": [GIVEN] if name == "retrieval" else []}
            (runs / row / str(seed) / "study.json").write_text(json.dumps(record))
    (runs / "beauty_token_retrieval_mim/0").mkdir(parents=True)  # has begun
    for name, chance in (("popularity", 0.1), ("sasrec", 0.6)):
        more = {"training_seconds": 30.0} if name == "sasrec" else {}
        write(tmp_path / "baselines/test/amazon_beauty" / name / "0", f"amazon_beauty/{name}", 0, chance, **more)
    (tmp_path / "README.md").write_text(f"Before.\n{results_summary.BEGIN}\n{results_summary.END}\nAfter.\n")
    return tmp_path, told


def kept(folder: pathlib.Path) -> dict[str, study_records.Runs]:
    results.keep(folder / "runs", folder / "baselines", "test", folder / "records")
    return study_records.read(folder / "records", results.known_rows())


def write_page(folder: pathlib.Path, monkeypatch, *arguments: str) -> str:
    where = ["--records", str(folder / "records"), "--output", str(folder / "results.md")]
    where += ["--readme", str(folder / "README.md")]
    monkeypatch.setattr(sys, "argv", ["results.py", *arguments, *where])
    results.main()
    return (folder / "results.md").read_text()


def test_the_page_has_the_numbers_of_the_folders(folders, monkeypatch, capsys):
    folder, told = folders
    arguments = ["--runs", str(folder / "runs"), "--baselines", str(folder / "baselines")]
    page = write_page(folder, monkeypatch, *arguments)
    said = json.loads(capsys.readouterr().out)
    assert said["figures"] == ["choices_on_beauty.svg", "retrieval_on_beauty.svg"]
    assert ("beauty_token_retrieval/0" in said["kept"], said["replaced"]) == (True, [])
    assert write_page(folder, monkeypatch, *arguments) == page
    assert json.loads(capsys.readouterr().out) == said | {"kept": [], "replaced": said["kept"]}
    # The records are enough.
    shutil.rmtree(folder / "runs")
    assert write_page(folder, monkeypatch) == page
    assert f"]({'results/retrieval_on_beauty.svg'})" in page
    assert (folder / "results/retrieval_on_beauty.svg").read_text().count("beauty_token_retrieval_aligned") == 1

    section = page.split("## Retrieval on Beauty\n")[1].split("\n## ")[0]
    cells = {line.split(" | ")[0][2:]: line.strip("| ").split(" | ") for line in section.splitlines() if "| " in line}
    header = cells.pop("")[0:]
    assert [*header[-4:]] == ["seeds", "steps", "tokens, M", "minutes"]
    assert list(cells) == [
        *("beauty_token_retrieval", "beauty_token_retrieval_aligned"),
        *("amazon_beauty/popularity", "amazon_beauty/sasrec"),
    ]
    values = {name: [told[name, seed][0]["ndcg@10"] for seed in range(3) if (name, seed) in told] for name in cells}
    column = len(cells["beauty_token_retrieval"]) - 4 - 3
    best = max(np.mean(list_of) for list_of in values.values())
    for name, ndcg in values.items():
        shown = f"{np.mean(ndcg):.4f}" + (f" ± {np.std(ndcg, ddof=1):.4f}" if len(ndcg) > 1 else "")
        assert cells[name][column] == (f"**{shown}**" if np.mean(ndcg) == best else shown)
    assert cells["beauty_token_retrieval"][-4:] == ["3", "7,000", "90.0", "20.0"]
    assert cells["beauty_token_retrieval_aligned"][-4:] == ["2", "7,000", "85.0", "15.0"]
    assert cells["amazon_beauty/popularity"][-4:] == ["1", "-", "-", "-"]
    assert cells["amazon_beauty/sasrec"][-4:] == ["1", "-", "-", "0.5"]
    # 80, 90, 100, 80 and 90 million in 7,000 steps.
    assert "7,000. Useful tokens a step: 12,571 on average, from -9.1 % to +13.6 % of it." in section

    found = {claim.text: line for line in page.splitlines() for claim in claims() if line.startswith(f"| {claim.text}")}
    aligned, alone = np.mean(values["beauty_token_retrieval_aligned"]), np.mean(values["beauty_token_retrieval"])
    line = found["MIM + MLM beside retrieval helps retrieval (Beauty, token)"]
    assert f"| {aligned - alone:+.4f} | " in line
    assert line.endswith("| 2 and 3 | supported |")
    assert found["The aligned model is above SASRec (Beauty, token)"].endswith("| undecided |")
    assert found["Leaving the items of the history out helps"].endswith("| 3 | supported |")
    assert len(found) == 3
    assert "- **Undecided:** The aligned model is above SASRec (Beauty, token)." in page

    every, missing = page.split("## Every run\n")[1].split("## Not run yet\n")
    assert every.count("\n| beauty_token") == 5
    assert "\n| beauty_token_retrieval | 0 | 7,000 | 80,000,000 | 600 | " in every
    assert "\n| beauty_token_retrieval | 1 | 7,000 (chosen: 4,000) | 90,000,000 | 1,200 | " in every
    assert "\n| amazon_beauty/sasrec | 0 | - | - | 30 | " in every
    place = "--gin_file gin_configs/experiments/study_beauty_token_retrieval.gin --gin.SEED=0"
    place += " --gin.MODEL_DIR=runs/study/beauty_token_retrieval/0"
    trained = f"recalign train --data_dir DIR {place} {shlex.quote(GIVEN)}"
    assert f"\n{trained}\nrecalign eval --data_dir DIR " in every
    assert "--gin.OUTPUT_DIR=runs/study/beauty_token_retrieval/0/test" in every
    assert "recalign baseline --data_dir DIR --corpus amazon_beauty --method sasrec --gin_file" in every
    assert "- beauty_token_retrieval_aligned: seed 2\n- beauty_token_ranking: seeds 0, 1, 2\n" in missing
    assert "- beauty_token_retrieval:" not in missing
    assert "- amazon_beauty/sasrec: seeds 1, 2\n" in missing
    assert "- amazon_beauty/popularity" not in missing

    summary = (folder / "README.md").read_text()
    assert summary.startswith(f"Before.\n{results_summary.BEGIN}\n\n| NDCG@10 of retrieval | alone |")
    assert summary.endswith(f"\n\n{results_summary.END}\nAfter.\n")
    shown = {name: cells[name][column].strip("*").replace("0.", ".") for name in cells}
    assert (
        f"| Beauty, items as tokens | {shown['beauty_token_retrieval']} |  |  | "
        f"▲ {shown['beauty_token_retrieval_aligned']} | {shown['amazon_beauty/popularity']} |  |  | "
        f"{shown['amazon_beauty/sasrec']} |\n"
    ) in summary
    assert "| Leaving the items of the history out helps | " in summary
    (folder / "README.md").write_text("No place.")
    with pytest.raises(InputError, match="README has no place for the tables"):
        write_page(folder, monkeypatch)


def test_a_verdict_of_one_seed_says_so():
    claim = next(claim for claim in claims() if claim.worse == "amazon_beauty/popularity")
    assert study_verdicts.of_one_seed(claim, Judged(0.1, 0.05, 0.15, (1, 1)))
    assert not study_verdicts.of_one_seed(claim, Judged(0.1, 0.05, 0.15, (3, 1)))  # popularity has no seed
    alone = next(claim for claim in claims() if claim.better == claim.worse)
    assert study_verdicts.of_one_seed(alone, Judged(0.1, 0.05, 0.15, (1, 1)))


def test_verdicts(folders):
    folder, told = folders
    found = kept(folder)
    popular, alone = "amazon_beauty/popularity", "beauty_token_retrieval"
    about = {"text": "", "family": "retrieval", "metric": "recall@10"}
    judged = study_verdicts.judge(Claim(better=popular, worse=alone, times=2.0, **about), found)
    means = [
        np.mean([told[name, n][0]["recall@10"] for n in range(seeds)]) for name, seeds in ((popular, 1), (alone, 3))
    ]
    assert judged.value == pytest.approx(means[0] - 2 * means[1])
    assert judged.low < judged.value < judged.high < 0
    assert (judged.verdict, judged.seeds) == ("contradicted", (1, 3))
    # Users are in the same order, wherever their rows stood.
    recall = study_records.per_user(found[alone], "retrieval", "recall@10")
    by_user = told[alone, 1][1]
    assert recall[1].tolist() == [by_user[user] for user in sorted(by_user)]
    others = {"user": ["u000"]} | {name: [1.0] for name in study_records.METRICS["retrieval"]}
    source = folder / "baselines/test" / popular / "0"
    parquet.write_table(pyarrow.table(others), source / "retrieval.parquet")
    with pytest.raises(InputError, match="were not evaluated on the same users"):
        study_verdicts.judge(Claim(better=popular, worse=alone, **about), kept(folder))


def test_a_lower_error_is_better(tmp_path):
    for name, error in (("good", 0.25), ("bad", 1.0)):
        folder = tmp_path / name
        folder.mkdir()
        table = {"user": ["a", "b"], "mse": [error, error], "mae": [0.0, 0.0]}
        parquet.write_table(pyarrow.table(table), folder / "rating.parquet")
        (folder / "metrics.json").write_text(json.dumps({"rating": {"rmse": error**0.5, "mae": 0.0}}))
        study_records.keep(folder, {"row": name, "seed": 0}, tmp_path / "records")
    found = study_records.read(tmp_path / "records", ["good", "bad", "neither"])
    claim = Claim("", "rating", "good", "bad", "rmse")
    judged = study_verdicts.judge(claim, found)
    assert (judged, judged.verdict) == (Judged(0.5, 0.5, 0.5, (1, 1)), "supported")
    claim = Claim("", "rating", "bad", "good", "rmse")
    judged = study_verdicts.judge(claim, found)
    assert (judged, judged.verdict) == (Judged(-0.5, -0.5, -0.5, (1, 1)), "contradicted")


def test_a_row_is_kept_with_one_set_of_settings(folders):
    folder, _ = folders
    kept(folder)
    record = folder / "runs/beauty_token_retrieval/1/study.json"
    changed = json.loads(record.read_text()) | {"settings": {"DROPOUT_RATE": "0.3"}}
    record.write_text(json.dumps(changed))
    with pytest.raises(
        InputError, match=r"other settings \(DROPOUT_RATE was 0.1, is 0.3\). Remove it, or give another"
    ):
        kept(folder)
    # What was given counts, also where the other run has no such setting.
    record.write_text(json.dumps(changed | {"settings": {"DROPOUT_RATE": "0.1"}, "bindings": []}))
    with pytest.raises(InputError, match=re.escape(f"(given was {GIVEN}, is nothing)")):
        kept(folder)


def test_what_was_judged_from_more_seeds_stays(folders):
    """Tables of old runs may be gone: then their claims stand as they were judged."""
    folder, _ = folders
    about = [claim for claim in claims() if claim.text.startswith("MIM + MLM beside retrieval helps")][:1]
    [text] = [claim.text for claim in about]
    before = study_verdicts.judge_all(about, kept(folder), {})
    assert before[text].seeds == (2, 3)
    study_verdicts.write_judged(before, folder / "records")
    assert study_verdicts.read_judged(folder / "records") == before
    (folder / "records/beauty_token_retrieval/2.parquet").unlink()
    found = study_records.read(folder / "records", results.known_rows())
    assert study_verdicts.judge_all(about, found, before) == before
    assert study_verdicts.judge_all(about, found, {})[text].seeds == (2, 2)
    # A baseline of which only the mean is known is shown, and no claim is judged by it.
    place = folder / "records/amazon_beauty/bprmf"
    place.mkdir()
    mean = {"mean": {"retrieval": {"ndcg@10": 0.1234}}, "deviation": {"retrieval": {"ndcg@10": 0.0011}}}
    (place / "mean.json").write_text(json.dumps(mean | {"seeds": 3, "seconds": 90.0}))
    found = study_records.read(folder / "records", results.known_rows())
    page, _ = results_page.render(found, before, "results")
    assert "| amazon_beauty/bprmf † | - | - | - | 0.1234 ± 0.0011 | - | - | 3 | - | - | 1.5 |" in page
    assert "| 2 and 3 | supported, *judged earlier* |" in page


def test_the_page_of_the_repository_is_what_its_records_say():
    found = study_records.read(study_records.RECORDS, results.known_rows())
    judged = study_verdicts.read_judged(study_records.RECORDS)
    page, drawn = results_page.render(found, judged, "results")
    docs = gin_config.PROJECT_ROOT / "docs"
    readme = (gin_config.PROJECT_ROOT / "README.md").read_text()
    assert results_summary.replaced(readme, results_summary.render(found, judged)) == readme
    assert page == (docs / "results.md").read_text()
    assert set(drawn) == {path.name for path in (docs / "results").glob("*.svg")}


def test_the_records_of_the_repository_are_of_the_rows_as_they_stand():
    """Whoever changes a row drops what is kept of it."""
    for path in study_records.RECORDS.glob("*/*.json"):
        row, seed = path.parent.name, int(path.stem)
        settings = {name: value for name, value in snapshot(row).items() if name not in ("SEED", "MODEL_DIR")}
        assert study_records.is_kept(row, seed, "test", {"settings": settings}, study_records.RECORDS), path


def test_the_interval_of_a_difference():
    random = np.random.default_rng(0)
    shared = random.normal(size=500)
    better, worse = (shared + random.normal(scale=0.2, size=500) + shift for shift in (0.1, 0.0))
    value, low, high = study_verdicts.difference(better[None], worse[None], np.asarray, 1.0)
    assert value == pytest.approx(better.mean() - worse.mean())
    # Paired: the normal approximation of the mean of the differences, not of two means.
    expected = 2 * 1.96 * np.std(better - worse) / np.sqrt(500)
    assert high - low == pytest.approx(expected, rel=0.1)
    # What seeds differ by is in the interval too: here users are all alike, and two seeds are 1 apart.
    # Drawn means are 0, .5 and 1, of variance 1 / 8; that of the mean of two such seeds is 1 / 4.
    seeds = np.array([[0.0], [1.0]])
    value, low, high = study_verdicts.difference(seeds, np.array([[0.0]]), np.asarray, 1.0)
    assert (value, low, high) == pytest.approx((0.5, 0.5 - 0.5**0.5, 0.5 + 0.5**0.5))
    # Of the same models a seed is drawn for both sides.
    told = study_verdicts.difference(seeds + 0.25, seeds, np.asarray, 1.0, same_models=True)
    assert told == pytest.approx((0.25, 0.25, 0.25))


def test_intervals_of_few_seeds_have_the_variance_of_their_mean():
    random = np.random.default_rng(0)
    seeds = random.normal(size=5)[:, None]
    _, low, high = study_verdicts.difference(seeds, np.zeros((1, 1)), np.asarray, 1.0)
    assert high - low == pytest.approx(2 * 1.96 * np.std(seeds, ddof=1) / 5**0.5, rel=0.1)

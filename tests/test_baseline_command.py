"""`recalign baseline` as a user types it: every method, resuming, files, and bad input."""

import json
import pathlib
import re
import shlex

import pytest
from pyarrow import parquet

from recalign_jax import cli, gin_config
from recalign_jax.commands import baseline, eval
from recalign_jax.evaluation import ranking, retrieval
from recalign_jax.evaluation.results import EvaluationOptions

ROOT = pathlib.Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.usefixtures("fast_compilation")

FAST = {
    "sasrec": ("--gin.SasrecOptions.epochs=2", "--gin.SasrecOptions.width=8", "--gin.SasrecOptions.length=8"),
    "bprmf": ("--gin.BprMfOptions.epochs=2",),
    "mf": ("--gin.MfOptions.epochs=2",),
}


@pytest.fixture
def run(shop_corpus, capsys):
    def run(method: str, *arguments: str, status: int = 0) -> dict:
        capsys.readouterr()
        command = ["baseline", "--data_dir", str(shop_corpus.directory.parent), "--corpus", "shop", "--method", method]
        assert cli.main([*command, *FAST.get(method, ()), *arguments, "--json"]) == status
        output = capsys.readouterr()
        return json.loads(output.out.splitlines()[-1]) if status == 0 else {"error": output.err}

    return run


@pytest.mark.parametrize("method", baseline.METHODS)
def test_every_method_has_the_keys_of_eval(run, tmp_path, shop_corpus, method):
    told = run(method, "--split", "validation", "--output_dir", str(tmp_path))
    families = {"mf": ["rating"]}.get(method, ["retrieval", "ranking"])
    metrics = {
        "retrieval": [f"{name}@{k}" for name in retrieval.METRICS for k in (5, 10)],
        "ranking": ranking.METRICS,
        "rating": ("rmse", "mae", "rmse_argmax"),
    }
    for family in families:
        assert told[family]["users"] == len(shop_corpus.evaluation_users)
        assert set(metrics[family]) <= told[family].keys()
        assert parquet.read_table(tmp_path / f"{family}.parquet").num_rows == told[family]["users"]
    assert told["split"] == "validation"
    assert json.loads((tmp_path / "metrics.json").read_text()) == told


def test_a_killed_evaluation_leaves_no_mixture_of_two(run, tmp_path, monkeypatch):
    whole = run("popularity", "--output_dir", str(tmp_path))
    assert whole["method_options"] == {"newest": 1.0}
    (tmp_path / "notes.txt").write_text("mine")

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(ranking, "evaluate", killed)
    run("itemknn", "--output_dir", str(tmp_path), status=130)
    assert {path.name for path in tmp_path.iterdir()} == {"retrieval.parquet", "notes.txt"}
    monkeypatch.undo()
    run("popularity", "--family", "ranking", "--output_dir", str(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {"ranking.parquet", "metrics.json", "notes.txt"}


def test_a_place_that_cannot_be_written_to_costs_no_training(run, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    monkeypatch.setattr(baseline, "load_corpus", None)
    assert "File exists" in run("sasrec", "--output_dir", str(tmp_path / "file"), status=2)["error"]
    assert "must be a folder" in run("sasrec", "--output_dir", "gs://bucket/x", status=2)["error"]


@pytest.mark.parametrize("method", FAST)
def test_a_model_dir_is_kept_and_gone_on_with(run, tmp_path, method, monkeypatch):
    folder = tmp_path / "model"
    monkeypatch.chdir(tmp_path)
    first = run(method, "--model_dir", "model", "--seed", "3")
    assert first["model_dir"] == str(folder)  # whoever reads it may be in another one
    assert first["seed"] == 3
    assert 1 <= first["best"]["step"] <= 2
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records][-1] == 2
    assert (
        first["best"]["value"]
        == next(r for r in records if r["step"] == first["best"]["step"])[first["best"]["metric"]]
    )
    assert "Options" in (folder / "config.gin").read_text()
    again = run(method, "--model_dir", str(folder), "--seed", "3")
    assert again == first
    assert "seed: 3 then, 0 now" in run(method, "--model_dir", str(folder), status=2)["error"]


def test_ratings_of_the_random_split_are_another_training(run, tmp_path, shop_corpus):
    told = run("mf", "--family", "rating_random", "--model_dir", str(tmp_path / "m"))
    assert told["rating"]["users"] == shop_corpus.num_interactions // 10
    error = run("mf", "--model_dir", str(tmp_path / "m"), status=2)["error"]
    assert "family: rating_random then, rating now" in error


@pytest.mark.parametrize(
    ("method", "arguments", "text"),
    [
        ("popularity", ("--model_dir", "x"), "popularity is counted, not trained"),
        ("popularity", ("--family", "rating"), "popularity doesn't answer rating; it answers retrieval and ranking"),
        ("mf", ("--family", "retrieval"), "mf doesn't answer retrieval"),
        ("sasrec", ("--gin.SasrecOptions.widht=8",), "widht"),
        ("sasrec", ("--gin.SasrecOptions.epochs=3.5",), "SasrecOptions.epochs is 3.5: must be a whole number"),
        ("itemknn", ("--gin.ItemKnnOptions.neighbours=abc",), "ItemKnnOptions.neighbours is 'abc': must be"),
        ("popularity", ("--gin.PopularityOptions.newest=half",), "PopularityOptions.newest is 'half': must be"),
    ],
)
def test_bad_input(run, method, arguments, text):
    assert text in run(method, *arguments, status=2)["error"]


def test_a_training_that_goes_wrong_ends(run, tmp_path):
    error = run("mf", "--gin.MfOptions.learning_rate=1e30", "--model_dir", str(tmp_path / "m"), status=1)["error"]
    assert "The validation_rmse of epoch 1 is nan" in error
    assert "smaller MfOptions.learning_rate" in error


@pytest.mark.parametrize("families", [["rating_random"], ["retrieval", "ranking", "rating"]])
def test_what_eval_says_to_type_next_runs(shop_corpus, capsys, families):
    options = EvaluationOptions(cutoffs=(5, 10, 20))
    command = eval.baseline_command("shop", families, "validation", str(shop_corpus.directory.parent), options)
    program, *arguments = shlex.split(command)
    assert program == "recalign"
    fast = FAST["sasrec" if "sasrec" in arguments else "mf"]
    assert cli.main([*arguments, *fast, "--json"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["split"] == "validation"
    found = {"retrieval", "ranking", "rating"} & told.keys()
    assert found == ({"retrieval", "ranking"} if len(families) > 1 else {families[0].removesuffix("_random")})
    assert ("retrieval" in found) == ("recall@20" in told.get("retrieval", ()))
    if families == ["rating_random"]:
        assert told["rating"]["users"] == shop_corpus.num_interactions // 10


def test_help_speaks_of_what_baselines_have(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["baseline", "--help"])
    text = capsys.readouterr().out
    assert "--gin.SasrecOptions.epochs=20" in text
    assert "TRAIN_STEPS" not in text


def test_ratings_of_a_corpus_without_any(beauty_corpus, capsys):
    folder = str(beauty_corpus.directory.parent)
    assert cli.main(["baseline", "--data_dir", folder, "--corpus", "amazon_beauty", "--method", "mf"]) == 2
    assert "amazon_beauty has no ratings" in capsys.readouterr().err


@pytest.mark.parametrize(
    "path", sorted((ROOT / "gin_configs/experiments").glob("baselines_*.gin")), ids=lambda p: p.stem
)
def test_every_file_of_settings_is_read(path):
    gin_config.parse([str(path)], [])
    made = [method.options() for method in baseline.METHODS.values()]
    text = path.read_text(encoding="utf-8")
    for options in made:
        for name, value in re.findall(rf"^{type(options).__name__}\.(\w+) = (.+)$", text, re.MULTILINE):
            assert str(getattr(options, name)) == value.strip("'")

"""`recalign runs`: what state runs are in, from what they left in their folders."""

import json
import os
import pathlib

import pytest

from recalign_jax import cli
from recalign_jax.checkpoint import saved
from recalign_jax.errors import RunError
from recalign_jax.reporting import runs


def write_run(folder: pathlib.Path, steps: int, of: int, *more: str, evaluations: dict[int, float] | None = None):
    """A folder as `recalign train` leaves it, but for the checkpoints."""
    folder.mkdir(parents=True)
    records = [
        {"step": step, "loss": 1.0} | ({"validation_ndcg@10": evaluations[step]} if step in (evaluations or {}) else {})
        for step in range(1, steps + 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    lines = [f"TRAIN_STEPS = {of}", "TrainOptions.train_steps = %TRAIN_STEPS", *more]
    (folder / "config.gin").write_text("\n".join([*lines, "train.mixture_or_task_name = 'shop_all'", ""]))


def listed(folder: pathlib.Path, capsys) -> dict[str, dict]:
    capsys.readouterr()
    assert cli.main(["runs", str(folder), "--json"]) == 0
    return {one["name"]: one for one in json.loads(capsys.readouterr().out.splitlines()[-1])["runs"]}


def age(folder: pathlib.Path, seconds: float):
    for path in [*folder.rglob("*"), folder]:
        status = path.stat()
        os.utime(path, (status.st_atime, status.st_mtime - seconds))


def test_states(tmp_path, capsys):
    write_run(tmp_path / "finished", 5, 5)
    write_run(tmp_path / "running", 3, 5)
    write_run(tmp_path / "stopped", 3, 5)
    patient = ("TrainOptions.best_metric = 'validation_ndcg@10'", "TrainOptions.early_stopping = 2")
    write_run(tmp_path / "early", 4, 9, *patient, evaluations={1: 0.1, 2: 0.3, 3: 0.2, 4: 0.2})
    for name in ("finished", "stopped", "early"):
        age(tmp_path / name, 2 * runs.RUNNING_SECONDS)
    found = listed(tmp_path, capsys)
    assert {name: one["state"] for name, one in found.items()} == {
        "finished": "finished", "running": "running", "stopped": "unfinished", "early": "finished",
    }  # fmt: skip
    assert found["early"]["best"] == {"step": 2, "metric": "validation_ndcg@10", "value": 0.3}
    assert (found["running"]["step"], found["running"]["last_step"]) == (3, 5)
    assert found["running"]["of"] == "shop_all"
    assert found["running"]["best"] is None


def test_runs_may_be_called_as_parts_of_runs_are(tmp_path, capsys):
    names = ("checkpoints", "profile", "tries", "damaged_checkpoints")
    for name in names:
        write_run(tmp_path / name, 5, 5)
        write_run(tmp_path / name / name, 5, 5)  # below a run it is what its name says
    assert set(listed(tmp_path, capsys)) == set(names)


def test_a_checkpoint_that_cannot_be_read_now_hides_no_run(tmp_path, capsys, monkeypatch):
    """As one of a colleague who lets nobody in."""
    write_run(tmp_path / "closed", 5, 5)
    (tmp_path / "closed" / "checkpoints" / "5").mkdir(parents=True)
    asked = []

    def refused(folder):
        asked.append(folder)
        raise RunError(f"Checkpoint {folder} can't be read now (Permission denied).")

    monkeypatch.setattr(saved, "read_metadata", refused)
    assert set(listed(tmp_path, capsys)) == {"closed"}
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("logged", "metric"),
    [
        (["validation_ranking_ndcg@10", "validation_ndcg@10"], "validation_ndcg@10"),
        (["validation_b_ranking_ndcg@10", "validation_b_ndcg@10"], "validation_b_ndcg@10"),
        (["validation_rating_rmse", "validation_b_ranking_ndcg@10"], "validation_b_ranking_ndcg@10"),
        (["validation_loss", "validation_rating_rmse"], "validation_rating_rmse"),
    ],
)
def test_the_best_is_of_retrieval_where_that_is_evaluated(logged, metric):
    run = runs.Run(pathlib.Path(), "", [dict.fromkeys(logged, 0.1) | {"step": 1}], "", {}, {}, {})
    assert run.metric == metric


def test_a_checkpoint_that_was_just_written_is_life(tmp_path, capsys):
    write_run(tmp_path / "slow", 3, 5)
    age(tmp_path / "slow", 2 * runs.RUNNING_SECONDS)
    (tmp_path / "slow" / "checkpoints" / "3").mkdir(parents=True)
    assert listed(tmp_path, capsys)["slow"]["state"] == "running"


def test_half_written_files(tmp_path, capsys):
    write_run(tmp_path / "a", 3, 5)
    with (tmp_path / "a" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    (tmp_path / "a" / "best.json").write_text("{")
    (tmp_path / "a" / "checkpoints" / "3" / "metadata").mkdir(parents=True)
    (tmp_path / "a" / "checkpoints" / "3" / "metadata" / "metadata").write_text('{"identity"')
    write_run(tmp_path / "b", 0, 5)
    (tmp_path / "b" / "config.gin").write_text("TRAIN_STEPS = ")
    found = listed(tmp_path, capsys)
    assert found["a"]["step"] == 3
    assert found["b"]["step"] == 0


def test_a_baseline_has_its_configuration_when_it_ends(tmp_path, capsys):
    write_run(tmp_path / "sasrec", 3, 5)
    (tmp_path / "sasrec" / "config.gin").unlink()
    one = listed(tmp_path, capsys)["sasrec"]
    assert (one["kind"], one["state"]) == ("baseline", "running")
    (tmp_path / "sasrec" / "config.gin").write_text("SasrecOptions.epochs = 9\n")
    one = listed(tmp_path, capsys)["sasrec"]
    assert (one["state"], one["last_step"]) == ("finished", 9)


def test_a_counted_baseline_is_its_evaluation(tmp_path, capsys):
    (tmp_path / "popularity").mkdir()
    told = {"retrieval": {"ndcg@10": 0.1, "users": 3}, "method": "popularity", "split": "test"}
    told["corpus"] = "shop"
    (tmp_path / "popularity" / "metrics.json").write_text(json.dumps(told))
    one = listed(tmp_path, capsys)["popularity"]
    assert (one["of"], one["state"], one["step"]) == ("popularity", "finished", None)
    assert one["corpora"] == ["shop"]


@pytest.mark.parametrize("told", [None, {"retrieval": {"ndcg@10": 0.1, "users": 3}, "split": "test"}, {"something": 1}])
def test_no_run_is_an_error_that_says_what_one_is(tmp_path, capsys, told):
    if told is not None:
        (tmp_path / "metrics.json").write_text(json.dumps(told))
    assert cli.main(["runs", str(tmp_path)]) == 2
    assert "a metrics.jsonl (MODEL_DIR" in capsys.readouterr().err


def test_evaluations_belong_to_the_run_they_are_of(tmp_path):
    told = {"retrieval": {"ndcg@10": 0.1, "users": 3}, "split": "test"}
    write_run(tmp_path / "a", 1, 1)
    write_run(tmp_path / "b", 1, 1)
    for folder, more in (("a/evaluation", {}), ("elsewhere", {"model_dir": str(tmp_path / "b")}), ("unknown", {})):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "metrics.json").write_text(json.dumps(told | more))
    _, evaluations = runs.find([str(tmp_path)])
    of = {evaluation.name: evaluation.run and evaluation.run.name for evaluation in evaluations}
    assert of == {"a/evaluation": "a", "elsewhere": "b", "unknown": None}

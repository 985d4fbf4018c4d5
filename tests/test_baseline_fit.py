"""The baselines' train loop on a problem of three numbers: resuming, early stopping, averaging, and what goes wrong."""

import json
import shutil
import types

import jax
import numpy as np
import optax
import pytest

from recalign_jax.baselines.fit import FitOptions, Problem, Run, fit, training_seconds
from recalign_jax.checkpoint import locations, saved
from recalign_jax.errors import InputError, RunError

STEPS = 5
OPTIONS = FitOptions(learning_rate=0.1, epochs=6, averaging=0.5)
IDENTITY = {"seed": 0}


def batches(epoch):
    random = np.random.default_rng(epoch)
    for _ in range(STEPS):
        yield {"x": random.normal(size=(4, 3)).astype(np.float32)}


def loss(params, batch, key):
    """Squares around what a batch holds, and something that only the key knows."""
    noise = jax.random.normal(key, (4, 3))
    return ((params["w"] - batch["x"] - noise) ** 2).sum(), np.float32(4)


def problem(validate=lambda params: {"validation_ndcg@10": -float((params["w"] ** 2).sum())}):
    return Problem(lambda key: {"w": jax.random.normal(key, (3,))}, loss, batches, validate, "validation_ndcg@10")


def hashes_of(model_dir):
    """Of parameters, their average and the optimizer's state in the newest checkpoint."""
    return saved.read_metadata(locations.folder_of(str(model_dir), locations.steps(str(model_dir))[0]))["fingerprints"]


@pytest.mark.parametrize("eval_period", [1, 2])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, capsys, eval_period):
    options = FitOptions(learning_rate=0.1, epochs=6, averaging=0.5, eval_period=eval_period)
    whole, parts, killed = tmp_path / "whole", tmp_path / "parts", tmp_path / "killed"
    params = fit(problem(), options, Run(str(whole), 0, IDENTITY))
    # A run that is killed in its fifth epoch, by the third or fourth evaluation.
    with pytest.raises(KeyboardInterrupt):
        fit(problem()._replace(batches=interrupted), options, Run(str(parts), 0, IDENTITY))
    # And one that is killed between an evaluation and its checkpoint: the log and best.json are ahead.
    shutil.copytree(parts, killed)
    lines = (whole / "metrics.jsonl").read_text().splitlines()
    (killed / "metrics.jsonl").write_text("\n".join(lines[: 4 // eval_period + 1]) + '\n{"step": 6, "lo')
    locations.write_best(str(killed), {"step": 6, "metric": "validation_ndcg@10", "value": 9.0})
    for folder in (parts, killed):
        again = fit(problem(), options, Run(str(folder), 0, IDENTITY))
        assert f"Resuming {folder} after epoch 4." in capsys.readouterr().out
        np.testing.assert_array_equal(again["w"], params["w"])
        assert hashes_of(folder) == hashes_of(whole)
        for name in ("metrics.jsonl", "best.json"):
            assert (folder / name).read_text() == (whole / name).read_text()


def test_the_seconds_of_all_parts_count(tmp_path, monkeypatch):
    """By a clock that goes on by one second whenever the model is validated; a killed epoch's seconds are lost."""
    clock = [0.0]
    monkeypatch.setattr("recalign_jax.baselines.fit.time", types.SimpleNamespace(monotonic=lambda: clock[0]))

    def validate(params):
        clock[0] += 1
        return {"validation_ndcg@10": 0.0}

    def late(epoch):
        clock[0] += 100 * (epoch == 5)
        yield from interrupted(epoch)

    run = Run(str(tmp_path), 0, IDENTITY)
    with pytest.raises(KeyboardInterrupt):
        fit(problem(validate)._replace(batches=late), OPTIONS, run)
    assert training_seconds(str(tmp_path)) == 4
    for _ in range(2):  # the second time there is nothing left to train
        clock[0] += 1000
        fit(problem(validate), OPTIONS, run)
        assert training_seconds(str(tmp_path)) == 6


def interrupted(epoch):
    if epoch == 5:
        raise KeyboardInterrupt
    yield from batches(epoch)


def test_what_is_kept_is_the_average_of_the_best_epoch(tmp_path):
    """Every step done again by hand."""
    best = fit(problem(), OPTIONS, Run(str(tmp_path), 3, IDENTITY))
    optimizer = optax.adamw(0.1, weight_decay=0.0)
    key = jax.random.key(3)
    params = problem().init(key)
    average, state, found = np.asarray(params["w"], np.float64), optimizer.init(params), []
    weight = np.exp(-1 / (OPTIONS.averaging * STEPS))
    for epoch in range(1, OPTIONS.epochs + 1):
        for number, batch in enumerate(batches(epoch)):
            drawn = jax.random.fold_in(jax.random.fold_in(key, epoch), number)
            gradients = jax.grad(lambda p, b=batch, k=drawn: loss(p, b, k)[0] / 4)(params)
            updates, state = optimizer.update(gradients, state, params)
            params = optax.apply_updates(params, updates)
            share = max(1 - weight, 1 / ((epoch - 1) * STEPS + number + 1))
            average = (1 - share) * average + share * np.asarray(params["w"], np.float64)
        found.append(average)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    values = [-float((average**2).sum()) for average in found]
    np.testing.assert_allclose([record["validation_ndcg@10"] for record in records], values, rtol=1e-4)
    np.testing.assert_allclose(best["w"], found[int(np.argmax(values))], rtol=1e-4)
    assert locations.read_best(str(tmp_path))["step"] == int(np.argmax(values)) + 1


def test_training_ends_when_nothing_gets_better(tmp_path):
    values = iter([0.1, 0.3, 0.2, 0.25, 0.9])
    options = FitOptions(epochs=9, patience=2)
    fit(problem(lambda params: {"validation_ndcg@10": next(values)}), options, Run(str(tmp_path), 0, IDENTITY))
    assert locations.read_best(str(tmp_path)) == {"step": 2, "metric": "validation_ndcg@10", "value": 0.3}
    assert locations.steps(str(tmp_path)) == [4, 2]  # the newest, and the best
    # With more patience the same run goes on.
    more = FitOptions(epochs=9, patience=3)
    fit(problem(lambda params: {"validation_ndcg@10": 0.0}), more, Run(str(tmp_path), 0, IDENTITY))
    assert locations.steps(str(tmp_path)) == [5, 2]


def six_epochs(tmp_path):
    """A run whose second epoch is the best, and its directory."""
    values = iter([0.1, 0.3, 0.2, 0.25, 0.1, 0.2])
    run = Run(str(tmp_path), 0, IDENTITY)
    fit(problem(lambda params: {"validation_ndcg@10": next(values)}), FitOptions(epochs=6), run)
    return run


@pytest.mark.parametrize("values", [{"epochs": 5}, {"epochs": 1}, {"epochs": 9, "patience": 3}])
def test_a_run_that_was_trained_longer_is_refused(tmp_path, values):
    run, options = six_epochs(tmp_path), FitOptions(**values)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    text = rf"trained for 6 epochs, .*\.epochs = {options.epochs} and .*\.patience = {options.patience} allow"
    with pytest.raises(InputError, match=text):
        fit(problem(), options, run)
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize(("epochs", "patience", "trained"), [(6, 10, 6), (9, 4, 6), (7, 5, 7)])
def test_a_run_may_be_made_longer(tmp_path, epochs, patience, trained):
    run = six_epochs(tmp_path)
    validate = {"validation_ndcg@10": 0.0}
    fit(problem(lambda params: validate), FitOptions(epochs=epochs, patience=patience), run)
    assert locations.steps(str(tmp_path)) == [trained, 2]


def test_another_run_is_refused(tmp_path):
    fit(problem(), OPTIONS, Run(str(tmp_path), 0, IDENTITY))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(
        InputError, match=r"(?s)another configuration.*seed: 0 then, 1 now.*or train in another folder\.$"
    ):
        fit(problem(), OPTIONS, Run(str(tmp_path), 1, {"seed": 1}))
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_loss_that_is_no_number_ends_the_run(tmp_path):
    broken = problem()._replace(loss=lambda params, batch, key: (params["w"].sum() * np.inf, np.float32(1)))
    with pytest.raises(
        RunError, match=r"The loss of epoch 1 is (nan|-?inf): try a smaller FitOptions.learning_rate, in another"
    ):
        fit(broken, OPTIONS, Run(str(tmp_path), 0, IDENTITY))
    assert locations.steps(str(tmp_path)) == []


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_validation_that_is_no_number_ends_the_run(tmp_path, value):
    values = iter([0.1, 0.2, value])
    broken = problem(lambda params: {"validation_ndcg@10": next(values)})
    with pytest.raises(RunError, match=f"The validation_ndcg@10 of epoch 3 is {value}: try a smaller FitOptions.learn"):
        fit(broken, OPTIONS, Run(str(tmp_path), 0, IDENTITY))
    assert locations.steps(str(tmp_path)) == [2]
    assert locations.read_best(str(tmp_path))["step"] == 2
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2]


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"epochs": 0}, "FitOptions.epochs is 0"),
        ({"averaging": -1.0}, "FitOptions.averaging is -1.0"),
        ({"learning_rate": 0.0}, "FitOptions.learning_rate is 0.0"),
    ],
)
def test_wrong_options(values, text):
    with pytest.raises(InputError, match=text):
        FitOptions(**values)

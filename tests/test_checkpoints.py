"""Checkpoints that were altered, cut short, or could not be written: found out, named, and none good is lost."""

import errno
import json
import os
import pathlib
import shutil
import signal

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from orbax.checkpoint._src.serialization import serialization

from recalign_jax.checkpoint import fingerprints as hashes
from recalign_jax.checkpoint import locations, saved, streaming, training
from recalign_jax.checkpoint.fingerprints import fingerprints
from recalign_jax.checkpoint.saved import DamagedCheckpoint
from recalign_jax.errors import InputError, Preempted, RunError
from recalign_jax.training import preemption
from tests.corpora import files_of_at_most


def trees(step: int):
    """(parameters, optimizer state) of a step."""
    random = np.random.default_rng(step)
    params = {
        "a": {"kernel": random.standard_normal((300, 40), np.float32)},
        "b": random.standard_normal(7, np.float32),
    }
    return params, ({"moment": random.standard_normal((300,), np.float32)}, np.int32(step))


def shapes(tree, sharding=None):
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(np.shape(leaf), np.asarray(leaf).dtype, sharding=sharding), tree
    )


def save(model_dir, steps, keep=3):
    with training.open_checkpoints(str(model_dir), keep) as checkpoints:
        for step in steps:
            training.save(checkpoints, step, *trees(step), {"identity": {"x": "1"}, "positions": [[0, 4]]})
        training.finish(checkpoints)


def restore(model_dir, sharding=None):
    with training.open_checkpoints(str(model_dir)) as checkpoints:
        return training.restore_newest(checkpoints, *shapes(trees(0), sharding), lambda metadata: None)


def check(restored, step):
    assert restored.step == step
    jax.tree.map(np.testing.assert_array_equal, (restored.params, restored.optimizer), trees(step))


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two") / "run"
    save(folder, [1, 2])
    return folder


def test_the_newest_is_restored(two_steps):
    check(restore(two_steps), 2)
    assert not list(two_steps.glob("damaged*"))


DAMAGES = {
    "cut": lambda data: data[: len(data) // 2],
    "emptied": lambda data: b"",
    "flipped": lambda data: data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :],
    "removed": None,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_to_any_file_is_found_or_does_no_harm(two_steps, tmp_path, damage, capsys):
    files = [path.relative_to(two_steps) for path in (two_steps / "checkpoints" / "2").rglob("*") if path.is_file()]
    assert len(files) > 8
    found = 0
    for number, file in enumerate(files):
        copy = tmp_path / str(number)
        shutil.copytree(two_steps, copy)
        alter = DAMAGES[damage]
        if alter is None:
            (copy / file).unlink()
        elif (data := (copy / file).read_bytes()) == alter(data):
            continue  # an empty file
        else:
            (copy / file).write_bytes(alter(data))
        restored = restore(copy)
        if restored.step == 1:
            found += 1
            assert f"{copy}/checkpoints/2 is damaged" in capsys.readouterr().err.replace("\n", "")
            assert (copy / "damaged_checkpoints" / "2").is_dir()
        check(restored, restored.step)
    assert found >= 4


def test_altered_numbers_are_named(two_steps, tmp_path):
    """Not by the file's own checksums: the arrays are written anew, with one bit changed."""
    shutil.copytree(two_steps, tmp_path / "run")
    params, optimizer = trees(2)
    params["a"]["kernel"].view(np.uint32)[17, 3] ^= 1
    with training.open_checkpoints(str(tmp_path / "forged")) as checkpoints:
        training.save(checkpoints, 2, params, optimizer, {"identity": {}, "positions": []})
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "2" / "params")
    shutil.copytree(tmp_path / "forged" / "checkpoints" / "2" / "params", tmp_path / "run/checkpoints/2/params")
    with pytest.raises(DamagedCheckpoint, match=r"params/a/kernel is not what was saved.*checkpoints/1 is there, too"):
        saved.load_params(str(tmp_path / "run"), shapes(params))
    check(restore(tmp_path / "run"), 1)


def test_altered_metadata_are_found(two_steps, tmp_path):
    shutil.copytree(two_steps, tmp_path / "run")
    file = tmp_path / "run" / "checkpoints" / "2" / "metadata" / "metadata"
    metadata = json.loads(file.read_text())
    metadata["positions"] = [[0, 5]]
    file.write_text(json.dumps(metadata))
    check(restore(tmp_path / "run"), 1)


def test_without_a_whole_one_nothing_is_begun_anew(two_steps, tmp_path):
    shutil.copytree(two_steps, tmp_path / "run")
    for step in ("1", "2"):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / step / "optimizer")
    for _ in range(2):  # a scheduler gives the same command again
        with pytest.raises(RunError, match=r"No checkpoint of .* is whole; they are in"):
            restore(tmp_path / "run")
        assert len(list((tmp_path / "run" / "damaged_checkpoints").iterdir())) == 2


@pytest.mark.parametrize("item", ["params", "optimizer", "a shard"])
def test_sigterm_while_a_checkpoint_is_read_is_no_damage(two_steps, tmp_path, item, monkeypatch):
    shutil.copytree(two_steps, tmp_path / "run")
    real = ocp.StandardCheckpointHandler.restore

    def restore_and_be_told(self, directory, *arguments, **named):
        if directory.name == item:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, directory, *arguments, **named)

    async def read_and_be_told(**named):
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(ocp.StandardCheckpointHandler, "restore", restore_and_be_told)
    if item == "a shard":  # Orbax wraps what is raised there
        monkeypatch.setattr(serialization, "_read_shard", read_and_be_told)
    with preemption.handled(), pytest.raises(Preempted):
        restore(tmp_path / "run", jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    assert not list((tmp_path / "run").glob("damaged*"))
    monkeypatch.undo()
    check(restore(tmp_path / "run"), 2)


@pytest.mark.parametrize("read", ["metadata", "parameters"])
def test_what_cannot_be_read_now_is_no_damage(two_steps, tmp_path, read, monkeypatch):
    """Too many open files, a file system that is away, ...: the newest checkpoint is not given up for an older one."""
    shutil.copytree(two_steps, tmp_path / "run")

    def refuse(*arguments, **named):
        raise OSError(errno.EMFILE, "Too many open files")

    if read == "metadata":
        monkeypatch.setattr(pathlib.Path, "read_text", refuse)
    else:
        monkeypatch.setattr(ocp.StandardCheckpointHandler, "restore", refuse)
    with pytest.raises(RunError, match=r"checkpoints/2 can't be read now .*Too many open files.*Run the same command"):
        restore(tmp_path / "run")
    assert not list((tmp_path / "run").glob("damaged*"))
    monkeypatch.undo()
    check(restore(tmp_path / "run"), 2)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"step": 3}', '{"step": 3, "metric": "x", "value": null}'])
def test_a_best_checkpoint_that_is_no_longer_known_is_not_given_up(tmp_path, text):
    save(tmp_path, [1])
    locations.write_best(str(tmp_path), {"step": 1, "metric": "validation_loss", "value": 0.5})
    (tmp_path / "best.json").write_text(text)
    with pytest.raises(InputError, match=r"best\.json is damaged. Write it again, as .*metrics\.jsonl has the values"):
        locations.locate(f"{tmp_path}/best")
    with pytest.raises(RunError, match=r"best\.json is damaged"):
        save(tmp_path, [2, 3], keep=1)
    assert 1 in locations.steps(str(tmp_path))


def without(tree, name):
    return {key: value for key, value in tree.items() if key != name}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda p, o: (p | {"b": np.zeros(9, np.float32)}, o), r"parameter b is \(7,\) there, \(9,\) here"),
        (lambda p, o: (p | {"c": np.zeros(9, np.float32)}, o), "parameter c is missing there"),
        # A model with tied embeddings, an optimizer without weight decay: what is stored has more.
        (lambda p, o: (without(p, "b"), o), "parameter b is there and not here. Give the model's own gin file"),
        (
            lambda p, o: (p, (o[0],)),
            "optimizer state 1 is there and not here. Give the optimizer .*INITIAL_CHECKPOINT=",
        ),
        (lambda p, o: (p, ({}, o[1])), "optimizer state 0/moment is there and not here"),
        # optax has parts without state, which Orbax stores as well.
        (lambda p, o: (p, (*o, optax.EmptyState())), "optimizer state 2 is here and not there"),
    ],
)
def test_another_model_is_no_damage(two_steps, change, says):
    params, optimizer = change(*trees(2))
    with training.open_checkpoints(str(two_steps)) as checkpoints, pytest.raises(InputError, match=says) as error:
        training.restore_newest(checkpoints, shapes(params), shapes(optimizer), lambda metadata: None)
    assert not isinstance(error.value, DamagedCheckpoint)
    assert locations.steps(str(two_steps)) == [2, 1]


def test_a_converted_model_is_no_damage(tmp_path):
    params, optimizer = trees(2)
    flat = {"a/kernel": params["a"]["kernel"], "b": params["b"]}
    metadata = {"identity": {"converted from": "x"}, "positions": []}
    streaming.save_streaming(str(tmp_path), 1, flat, metadata, lambda count: None)
    with (
        training.open_checkpoints(str(tmp_path)) as checkpoints,
        pytest.raises(InputError, match=rf"converted model.*another MODEL_DIR.*CHECKPOINT={tmp_path}/checkpoints/1"),
    ):
        training.restore_newest(checkpoints, shapes(params), shapes(optimizer), lambda metadata: None)
    assert locations.steps(str(tmp_path)) == [1]


@pytest.mark.parametrize("name", ["checkpoints", "checkpoints/7", "best"])
def test_a_run_may_be_called_as_what_lies_in_one(two_steps, tmp_path, name):
    run = shutil.copytree(two_steps, tmp_path / name)
    assert locations.locate(str(run)) == (str(run), 2)
    assert locations.locate(f"{run}/checkpoints") == (str(run), 2)
    assert locations.locate(f"{run}/checkpoints/1") == (str(run), 1)
    assert locations.model_dir_of(str(run)) == str(run)


def test_a_step_that_is_not_there_is_not_another_one(two_steps, tmp_path):
    assert locations.locate(f"{two_steps}/checkpoints/1") == (str(two_steps), 1)
    with pytest.raises(InputError, match=f"No checkpoint of step 3 at {two_steps}/checkpoints/3. Steps there: 2, 1"):
        locations.locate(f"{two_steps}/checkpoints/3")
    with pytest.raises(InputError, match="Steps there: none"):
        locations.locate(f"{tmp_path}/checkpoints/3")


def test_what_cannot_be_written_costs_no_good_one(tmp_path):
    model_dir = tmp_path / "run"
    save(model_dir, [1], keep=1)
    with (
        files_of_at_most(2**10),
        pytest.raises(RunError, match=r"could not be written .* newest whole one is of step 1"),
    ):
        save(model_dir, [2], keep=1)
    assert locations.steps(str(model_dir)) == [1]
    check(restore(model_dir), 1)
    save(model_dir, [2], keep=1)  # there is room again
    assert [path.name for path in (model_dir / "checkpoints").iterdir()] == ["2"]


def test_a_disk_without_room_is_not_filled_up(tmp_path, monkeypatch):
    save(tmp_path / "run", [1])
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=40_000))
    with pytest.raises(RunError, match=r"needs 0.0 MiB, and 0.0 MiB are free.* newest whole one is of step 1"):
        save(tmp_path / "run", [2])
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["1"]


def test_what_a_killed_process_left_half_written_is_removed(two_steps, tmp_path):
    shutil.copytree(two_steps, tmp_path / "run")
    half = tmp_path / "run" / "checkpoints" / "3.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / "run" / "checkpoints" / "2", half)
    check(restore(tmp_path / "run"), 2)
    save(tmp_path / "run", [3])
    assert {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()} == {"1", "2", "3"}


def test_hashes_do_not_depend_on_where_arrays_lie():
    tree = shapes(trees(2))
    assert fingerprints({"x": trees(2)}) == fingerprints({"x": jax.tree.map(jax.numpy.asarray, trees(2))})
    assert fingerprints({"x": trees(2)}) != fingerprints({"x": trees(1)})
    assert len(fingerprints(trees(2))) == len(jax.tree.leaves(tree))


@pytest.mark.parametrize("shape", [(), (0,), (1,), (7,), (5, 3), (4, 3, 2), (1, 6)])
@pytest.mark.parametrize("part", [4, 40, 2**26])
def test_hashes_of_parts_are_those_of_the_whole(shape, part, monkeypatch):
    array = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    monkeypatch.setattr(hashes, "PART_BYTES", part)
    assert hashes.one_by_one({"a": array}) == fingerprints({"a": jax.numpy.asarray(array)})
    assert hashes.one_by_one({"a": jax.numpy.asarray(array)}) == fingerprints({"a": jax.numpy.asarray(array)})

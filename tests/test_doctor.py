"""`recalign doctor`: all checks here, and what it says of what is broken."""

import importlib.metadata
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from recalign_jax import cli, hardware
from recalign_jax.commands import doctor
from recalign_jax.errors import InputError

pytestmark = pytest.mark.usefixtures("fast_compilation")
GIN = ("--gin_file", "gin_configs/models/t5_tiny.gin", "--gin_file", "gin_configs/runs/finetune.gin")


def run(capsys, *arguments: str, status: int = 0) -> dict:
    capsys.readouterr()
    assert cli.main(["doctor", "--json", *arguments]) == status
    output = capsys.readouterr().out.splitlines()
    result = json.loads(output[-1])
    result["lines"] = output[:-1]
    result["by_name"] = {check["name"]: check for check in result["checks"]}
    return result


def test_all_checks_pass_here(capsys, tmp_path):
    result = run(capsys, *GIN, f"--gin.MODEL_DIR={tmp_path / 'run'}", "--folder", str(tmp_path / "new" / "folder"))
    assert result["ok"]
    assert result["devices"] == jax.device_count()
    assert (result["processes"], result["platform"]) == (1, "cpu")
    assert {check["status"] for check in result["checks"]} <= {"ok", "warn"}  # a small machine is warned of
    for name in ("versions", "devices", "mesh", "matrix product", "train step", "checkpoint"):
        assert result["by_name"][name]["status"] == "ok", name
    assert "disk, MODEL_DIR" in result["by_name"]
    assert "TFLOP/s" in result["by_name"]["matrix product"]["text"]
    assert "bit for bit" in result["by_name"]["checkpoint"]["text"]
    assert [*(tmp_path / "new" / "folder").iterdir()] == []
    assert not (tmp_path / "run").exists()


def test_a_bad_mesh_is_one_failed_check_among_the_others(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "matrix_product", lambda: "not now")
    result = run(capsys, *GIN, f"--gin.MESH={{'data': {jax.device_count() + 1}}}", status=1)
    assert not result["ok"]
    assert result["by_name"]["mesh"]["status"] == "fail"
    assert "Set one axis to -1" in result["by_name"]["mesh"]["text"]
    assert result["by_name"]["train step"]["status"] == "warn"
    assert any(line.startswith("fail  mesh: MESH") for line in result["lines"])


def test_a_backend_that_is_not_there_is_failed_checks():
    command = [sys.executable, "-m", "recalign_jax.cli", "doctor", "--json"]
    environment = os.environ | {"JAX_PLATFORMS": "no_such_one"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert (result["ok"], result["devices"], result["platform"]) == (False, None, None)
    assert {check["name"]: check["status"] for check in result["checks"]}["devices"] == "fail"
    assert "Traceback" not in done.stderr


@pytest.fixture
def made():
    state = jax.device_put({"w": np.arange(6, dtype=np.float32)})
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    step = jax.device_put(np.int32(3))
    abstract = jax.ShapeDtypeStruct((), np.int32, sharding=step.sharding)
    return {"state": doctor.TrainState(step, state, state), "shapes": doctor.TrainState(abstract, shapes, shapes)}


def test_a_checkpoint_that_changes_on_the_disk(monkeypatch, tmp_path, made):
    assert "bit for bit" in doctor.checkpoint(str(tmp_path), made)
    restore = doctor.checkpointing.restore_newest

    def altered(*arguments):
        read = restore(*arguments)
        return read._replace(params=jax.tree.map(lambda x: x.at[2].add(1e-6), read.params))

    monkeypatch.setattr(doctor.checkpointing, "restore_newest", altered)
    with pytest.raises(RuntimeError, match="is not what was written"):
        doctor.checkpoint(str(tmp_path), made)
    assert [*tmp_path.iterdir()] == []


def test_a_folder_that_can_not_be_written(made, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(Exception, match="file"):
        doctor.checkpoint(str(tmp_path / "file"), made)


def test_parts_of_jax_that_do_not_fit(monkeypatch):
    versions = dict.fromkeys(doctor.PACKAGES, "1.0") | {"jax": "0.10.2", "jaxlib": "0.10.2"}

    def version(name):
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert doctor.versions().startswith("jax 0.10.2, jaxlib 0.10.2")
    versions["jax-cuda12-plugin"] = "0.9.0"
    with pytest.raises(doctor.Doubt, match=r"jax is 0\.10\.2, but jax-cuda12-plugin 0\.9\.0"):
        doctor.versions()
    del versions["flax"]
    with pytest.raises(doctor.Doubt, match="flax is not installed"):
        doctor.versions()


def test_an_accelerator_that_jax_does_not_use(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "DEVICE_FILES", ((str(tmp_path), "An NVIDIA GPU", "gpu"),))
    with pytest.raises(doctor.Doubt, match=r"An NVIDIA GPU is here .* '\.\[gpu\]'"):
        doctor.devices()


def test_a_slow_device(monkeypatch):
    monkeypatch.setattr(hardware, "peak_flops", lambda kind: 1e18)
    with pytest.raises(doctor.Doubt, match="TFLOP/s on the slowest device, of 1000000 at most"):
        doctor.matrix_product()


def test_little_room(monkeypatch, tmp_path):
    with pytest.raises(InputError, match="gs://somewhere/else: must be a folder that this machine has"):
        doctor.disk("gs://somewhere/else")
    monkeypatch.setattr(doctor, "LOW_DISK", 2**60)
    monkeypatch.setattr(doctor, "LOW_HOST_MEMORY", 2**60)
    with pytest.raises(doctor.Doubt, match="KEEP_CHECKPOINTS"):
        doctor.disk(str(tmp_path / "not" / "there"))
    with pytest.raises(doctor.Doubt, match="GiB are free"):
        doctor.host_memory()

"""`recalign doctor`: whether this machine can train; run it first on a new one."""

import argparse
import contextlib
import importlib.metadata
import os
import pathlib
import shutil
import tempfile
import time
from collections.abc import Callable
from typing import Any

import gin
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

import recalign_jax.commands.train  # noqa: F401 (what the gin files of a run configure)
from recalign_jax import distributed, files, hardware, partitioning, terminal
from recalign_jax.checkpoint import training as checkpointing
from recalign_jax.checkpoint.fingerprints import fingerprints
from recalign_jax.corpus.corpus import data_dir_or_default
from recalign_jax.errors import RecalignError
from recalign_jax.hardware import GIB
from recalign_jax.model import t5
from recalign_jax.model.config import T5Config
from recalign_jax.training import packing
from recalign_jax.training.optimizer import make_optimizer
from recalign_jax.training.step import StepOptions, TrainState, abstract_state, jit_train_step, make_train_step
from recalign_jax.training.train import TrainOptions

USES_GIN = True

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "seqio", "tensorflow")
# Accelerators of which the operating system knows, and what JAX needs to use them.
DEVICE_FILES = (
    ("/dev/nvidia0", "An NVIDIA GPU", "gpu"),
    ("/dev/accel0", "A TPU", "tpu"),
    ("/dev/vfio/0", "A TPU", "tpu"),
)
MATMUL_SIZE = {"cpu": 1024}  # elsewhere 8192
LOW_HOST_MEMORY, LOW_DISK = 8 * GIB, 10 * GIB
LOW_SHARE_OF_PEAK = 0.4
ROWS, INPUTS, TARGETS, VOCAB = 2, 64, 16, 512


class Doubt(Exception):
    """A check that found what may be wrong: a warning."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--folder", metavar="DIR", help="where to write a checkpoint and read it back (default: a temporary folder)"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Makes all checks; none of them keeps the next from being made."""
    checks: list[dict[str, str]] = []
    made: dict[str, Any] = {}  # what later checks use

    def check(name: str, function: Callable[..., str], *arguments: Any) -> None:
        start = time.monotonic()
        try:
            status, text = "ok", function(*arguments)
        except Doubt as doubt:
            status, text = "warn", str(doubt)
        except RecalignError as error:
            status, text = "fail", error.message
        except Exception as error:  # whatever a broken installation or device leads to
            status, text = "fail", f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
        checks.append({"name": name, "status": status, "text": text})
        line = f"{status:<5} {name}: {text} ({time.monotonic() - start:.1f} s)"
        if status == "fail" and not terminal.speaks():
            terminal.warn(line)  # of another process than the one that speaks
        terminal.say(line)

    check("versions", versions)
    check("devices", devices)
    check("mesh", mesh, made)
    check("device memory", device_memory)
    check("host memory", host_memory)
    for name, folder in folders(args).items():
        check(f"disk, {name}", disk, folder)
    check("matrix product", matrix_product)
    check("train step", train_step, made)
    check("checkpoint", checkpoint, args.folder, made)
    ok = all(check["status"] != "fail" for check in checks)
    terminal.say("All is well." if ok else "Something is broken: see the lines that begin with fail.")
    if ok:
        terminal.next_step("recalign", "prepare", "--help")
    about: dict[str, Any] = dict.fromkeys(("devices", "processes", "platform", "device_kind"))
    with contextlib.suppress(RuntimeError, AssertionError):  # no device: a check has told of it
        first = jax.devices()[0]
        about = {"devices": jax.device_count(), "processes": jax.process_count(), "platform": jax.default_backend()}
        about["device_kind"] = first.device_kind
    return {"ok": ok} | about | {"checks": checks}


def versions() -> str:
    """Packages, and whether JAX's parts fit together."""
    found = {}
    for name in (*PACKAGES, "libtpu", "jax-cuda12-plugin", "jax-cuda12-pjrt", "jax-cuda13-plugin", "jax-cuda13-pjrt"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            if name in PACKAGES:
                raise Doubt(f"{name} is not installed: pip install -c constraints.txt -e .") from None
    parts = [name for name in found if name == "jaxlib" or name.startswith("jax-cuda")]
    off = [f"{name} {found[name]}" for name in parts if found[name] != found["jax"]]
    if off:
        raise Doubt(
            f"jax is {found['jax']}, but {', '.join(off)}: parts of one version are needed. Install again with "
            "pip install -c constraints.txt -e '.[gpu]' (or '.[tpu]')."
        )
    return ", ".join(f"{name} {version}" for name, version in found.items())


def devices() -> str:
    """What JAX computes on; a doubt when it is the CPU where there is an accelerator."""
    found = jax.devices()
    text = f"{len(found)} x {found[0].device_kind} ({jax.default_backend()})"
    if jax.process_count() > 1:
        text += f", {jax.local_device_count()} of them in each of {jax.process_count()} processes"
    if jax.default_backend() == "cpu":
        for path, what, extra in DEVICE_FILES:
            if pathlib.Path(path).exists():
                raise Doubt(
                    f"{text}. {what} is here ({path}), but JAX doesn't use it: pip install -c constraints.txt -e "
                    f"'.[{extra}]', no JAX_PLATFORMS=cpu, and no other process on it."
                )
    return text


def mesh(made: dict[str, Any]) -> str:
    """The mesh that MESH gives."""
    made["mesh"] = partitioning.make_mesh(TrainOptions(model_dir="").mesh)
    return ", ".join(f"{axis} {size}" for axis, size in made["mesh"].shape.items())


def device_memory() -> str:
    """Of the first device here: what is free, as JAX has it."""
    device = jax.local_devices()[0]
    statistics = device.memory_stats() or {}
    if "bytes_limit" not in statistics:
        chip = hardware.chip(device.device_kind)
        return f"{chip.hbm_bytes / GIB:.1f} GiB by its kind" if chip else "that of the host"
    limit, used = statistics["bytes_limit"], statistics.get("bytes_in_use", 0)
    return f"{limit / GIB:.1f} GiB for JAX, {used / GIB:.2f} GiB in use; `recalign plan` tells what a model needs"


def host_memory() -> str:
    """What Linux can give to processes now."""
    lines = pathlib.Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    free, total = (int(fields[name].split()[0]) * 1024 for name in ("MemAvailable", "MemTotal"))
    text = f"{free / GIB:.1f} of {total / GIB:.1f} GiB are free"
    if free < LOW_HOST_MEMORY:
        raise Doubt(f"{text}: little for a checkpoint of a large model, which goes through the host's memory.")
    return text


def folders(args: argparse.Namespace) -> dict[str, str]:
    """Where a run will write, and what for."""
    given = args.data_dir or os.environ.get("RECALIGN_DATA_DIR")  # as it is, for `disk` to judge
    found = {"data_dir": os.path.expanduser(given) if given else str(data_dir_or_default(None))}
    try:
        model_dir = gin.query_parameter("%MODEL_DIR")
    except ValueError:  # no gin file defines it
        model_dir = None
    return found | ({"MODEL_DIR": str(model_dir)} if model_dir is not None else {})


def disk(folder: str) -> str:
    """What is free where a folder is, or would be made."""
    path = files.local_folder("A folder to write to", folder).absolute()
    there = next(parent for parent in (path, *path.parents) if parent.exists())
    free = shutil.disk_usage(there).free
    text = f"{free / GIB:.1f} GiB are free at {folder}"
    if free < LOW_DISK:
        raise Doubt(f"{text}: a checkpoint of FLAN-T5-Base has about 1 GiB, and KEEP_CHECKPOINTS of them are kept.")
    return text


def matrix_product() -> str:
    """Times one on every device of this process; all must give the same bits."""
    size = MATMUL_SIZE.get(jax.default_backend(), 8192)
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    x = np.random.default_rng(0).standard_normal((size, size), np.float32)
    times, sums = [], set()
    for device in jax.local_devices():
        there = jax.device_put(x, device).astype(dtype)
        product = jax.jit(lambda a: a @ a)
        product(there).block_until_ready()
        start = time.perf_counter()
        result = product(product(there) / size).block_until_ready()
        times.append((time.perf_counter() - start) / 2)
        sums.add(np.asarray(result).tobytes())
    if len(sums) > 1:
        raise RuntimeError("devices of one kind gave different products: one of them is broken.")
    rates = [2 * size**3 / seconds for seconds in times]
    text = f"{size} x {size} in {dtype.__name__}: {min(rates) / 1e12:.3g} TFLOP/s on the slowest device"
    peak = hardware.peak_flops(jax.local_devices()[0].device_kind)
    if peak and min(rates) < LOW_SHARE_OF_PEAK * peak:
        raise Doubt(f"{text}, of {peak / 1e12:.0f} at most: is something else running on it, or is it too hot?")
    return text


def train_step(made: dict[str, Any]) -> str:
    """The train loop's own step for a tiny model over the mesh: compiled, then timed."""
    if "mesh" not in made:
        raise Doubt("not tried: there is no mesh")
    over = made["mesh"]
    config = T5Config(
        emb_dim=64, num_heads=4, head_dim=16, num_encoder_layers=2, num_decoder_layers=2, mlp_dim=160, vocab_size=VOCAB
    )
    optimizer = make_optimizer("adafactor", 1e-3)
    initialize, shapes = abstract_state(config, optimizer, over)
    step = jit_train_step(make_train_step(t5.graph(config), optimizer, StepOptions(), 1, 0), shapes, over)
    batch = random_batch(ROWS * over.shape["data"] * over.shape["fsdp"], partitioning.batch_sharding(over))
    shardings = partitioning.shardings_of(shapes)
    state = jax.jit(initialize, out_shardings=shardings)(jax.random.key(0))
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        state, sums = step(state, batch, None)
        loss = float(sums["loss"] / sums["weight"])
        seconds.append(time.perf_counter() - start)
    if not np.isfinite(loss):
        raise RuntimeError(f"the loss is {loss}")
    made |= {"state": state, "shapes": shapes}
    return f"{seconds[0]:.1f} s with compilation, then {1000 * seconds[1]:.1f} ms; loss {loss:.3f}"


def random_batch(rows: int, sharding: jax.sharding.NamedSharding) -> dict[str, jax.Array]:
    """A batch of full rows, one sample each; every process makes its part of it."""
    random = np.random.default_rng(0)

    def make(name: str, shape: jax.ShapeDtypeStruct) -> jax.Array:
        whole = random.integers(2, VOCAB, shape.shape) if name.endswith("tokens") else np.ones(shape.shape)
        whole = (np.zeros(shape.shape) if name.endswith("task_ids") else whole).astype(shape.dtype)
        return jax.make_array_from_callback(shape.shape, sharding, lambda index: whole[index])

    return {name: make(name, shape) for name, shape in packing.batch_shapes(rows, INPUTS, TARGETS).items()}


def checkpoint(folder: str | None, made: dict[str, Any]) -> str:
    """Writes the tiny model's state and reads it back, bit for bit."""
    if "state" not in made:
        raise Doubt("not tried: there is no state to write")
    if folder is None and jax.process_count() > 1:
        raise Doubt("not tried: give --folder, one that all processes share")
    state, shapes = made["state"], made["shapes"]
    parent = pathlib.Path(folder or tempfile.gettempdir())
    if jax.process_count() == 1:
        parent.mkdir(parents=True, exist_ok=True)
        where = pathlib.Path(tempfile.mkdtemp(prefix="recalign_doctor_", dir=parent))
    else:  # one that all processes know the name of; a doctor that was killed may have left it
        distributed.check_shared("--folder", parent)
        where = parent / "recalign_doctor"
        if jax.process_index() == 0:
            shutil.rmtree(where, ignore_errors=True)
        multihost_utils.sync_global_devices("nothing is there")
    try:
        start = time.perf_counter()
        with checkpointing.open_checkpoints(str(where)) as checkpoints:
            checkpointing.save(checkpoints, 1, state.params, (state.opt_state, state.step), {"identity": {}})
            checkpointing.finish(checkpoints)
            written = time.perf_counter() - start
            read = checkpointing.restore_newest(
                checkpoints, shapes.params, (shapes.opt_state, shapes.step), lambda metadata: None
            )
        assert read is not None
        if fingerprints(TrainState(read.optimizer[1], read.params, read.optimizer[0])) != fingerprints(state):
            raise RuntimeError(f"what was read from {where} is not what was written")
        multihost_utils.sync_global_devices("all have read")
    finally:
        if jax.process_index() == 0:
            shutil.rmtree(where, ignore_errors=True)
    return f"written to {where} in {written:.1f} s, and read back bit for bit"

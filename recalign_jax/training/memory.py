"""What a train step needs of a device's memory, found by compiling it, and what makes it need less."""

import dataclasses
import math
import re
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import Mesh

from recalign_jax import partitioning
from recalign_jax.hardware import GIB
from recalign_jax.model import t5
from recalign_jax.model.config import T5Config
from recalign_jax.model.lora import LoraOptions
from recalign_jax.training import packing
from recalign_jax.training.input_pipeline import InputOptions
from recalign_jax.training.step import StepOptions, abstract_state, jit_train_step, make_train_step

Setting = dict[str, Any]  # macro -> value
LOGITS_CHUNKS = 8
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": GIB, "T": 2**40}
# How XLA says what it would have needed: of all memory, or of temporaries alone.
_NEEDED = (re.compile(r"Used ([\d.]+)([KMGT]?) of"), re.compile(r"temporaries \(([\d.]+)([KMGT]?)\)"))


@dataclasses.dataclass(frozen=True)
class Job:
    """All that a compiled train step depends on.

    Attributes:
      config: of the model, with its vocabulary's size.
      optimizer: from `make_optimizer`.
      mesh: over the devices of all processes.
      step_options: of the step.
      input_options: of the batches.
      lora_options: of the adapters.
    """

    config: T5Config
    optimizer: optax.GradientTransformation
    mesh: Mesh
    step_options: StepOptions
    input_options: InputOptions
    lora_options: LoraOptions = LoraOptions()  # noqa: RUF009 (frozen)


class Footprint(NamedTuple):
    """What the compiler says of a step.

    Attributes:
      hbm_bytes: of one device: arguments, outputs that don't take an argument's place, and temporaries.
      refused: whether the compiler found no place for it; `hbm_bytes` is then what it asked for.
      hlo: the compiled program; None if it was refused.
      seconds: it took to compile.
    """

    hbm_bytes: int
    refused: bool
    hlo: str | None
    seconds: float


def footprint(job: Job) -> Footprint:
    """Compiles the train loop's own step for the devices of the job's mesh, which need not be there."""
    _, state = abstract_state(job.config, job.optimizer, job.mesh, job.lora_options)
    lengths = job.input_options.task_feature_lengths
    batch = packing.batch_shapes(job.input_options.batch_size, lengths["inputs"], lengths["targets"])
    base = partitioning.with_shardings(t5.abstract_params(job.config), job.mesh) if job.lora_options.rank else None
    step = make_train_step(
        t5.graph(job.config), job.optimizer, job.step_options, num_tasks=1, seed=0, lora_options=job.lora_options
    )
    start = time.monotonic()
    try:
        compiled = jit_train_step(step, state, job.mesh).lower(state, batch, base).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return Footprint(_asked_for(str(error)), True, None, time.monotonic() - start)
    needs = compiled.memory_analysis()
    hbm_bytes = needs.argument_size_in_bytes + needs.output_size_in_bytes + needs.temp_size_in_bytes
    return Footprint(hbm_bytes - needs.alias_size_in_bytes, False, compiled.as_text(), time.monotonic() - start)


def _asked_for(message: str) -> int:
    found = next((match for pattern in _NEEDED if (match := pattern.search(message))), None)
    return int(float(found[1]) * _UNITS[found[2]]) if found else 0


def savings(job: Job) -> Iterator[tuple[Setting, Job]]:
    """Changes that need less memory, each by itself: (as gin has it, the job with it), the cheapest in time first."""
    options, rows, shape = job.step_options, job.input_options, dict(job.mesh.shape)
    if shape["data"] > 1:
        shape = {"data": 1, "fsdp": shape["data"] * shape["fsdp"], "model": shape["model"]}
        mesh = partitioning.make_mesh(shape, job.mesh.devices.flatten().tolist())
        yield {"MESH": shape}, dataclasses.replace(job, mesh=mesh)
    if job.config.remat != "full":
        yield with_remat(job, "full")
    shards = shape["data"] * shape["fsdp"]
    parts = 2 * options.gradient_accumulation
    if rows.batch_size % (parts * shards) == 0:
        changed = dataclasses.replace(options, gradient_accumulation=parts)
        yield {"GRADIENT_ACCUMULATION": parts}, dataclasses.replace(job, step_options=changed)
    chunks = math.gcd(rows.task_feature_lengths["targets"], LOGITS_CHUNKS)
    if options.logits_chunks < chunks:
        changed = dataclasses.replace(options, logits_chunks=chunks)
        yield {"LOGITS_CHUNKS": chunks}, dataclasses.replace(job, step_options=changed)
    if rows.batch_size % (parts * shards) == 0:
        yield with_batch_size(job, rows.batch_size // 2)


def with_remat(job: Job, remat: str) -> tuple[Setting, Job]:
    """What the backward pass computes again, changed."""
    return {"REMAT": remat}, dataclasses.replace(job, config=dataclasses.replace(job.config, remat=remat))


def with_batch_size(job: Job, batch_size: int) -> tuple[Setting, Job]:
    """The number of rows a step, changed."""
    rows = dataclasses.replace(job.input_options, batch_size=batch_size)
    return {"BATCH_SIZE": batch_size}, dataclasses.replace(job, input_options=rows)


def as_flags(setting: Setting) -> str:
    """A setting as it is given on the command line."""
    quote = {name: f'"{value}"' if isinstance(value, dict) else value for name, value in setting.items()}
    return " ".join(f"--gin.{name}={value}" for name, value in quote.items())


def advice(job: Job) -> str:
    """What to set when a step ran out of memory, and what each setting saves, one a line.

    Compiles the step once for every line, on the backend that is there.
    """
    whole = footprint(job).hbm_bytes
    lines = [f"A step of these settings needs {whole / GIB:.3g} GiB a device."]
    for setting, changed in savings(job):
        less = footprint(changed).hbm_bytes
        if less < whole:
            lines.append(f"  {as_flags(setting)} saves {(whole - less) / GIB:.3g} GiB of them.")
    if len(lines) == 1:
        lines.append("  No setting makes that less: take more devices, or a smaller model.")
    return "\n".join(lines)

"""What a train step would need and take on devices that aren't there."""

import math
import time
from collections.abc import Callable, Iterator
from typing import Any

from recalign_jax import hardware, host
from recalign_jax.errors import InputError
from recalign_jax.hardware import GIB, Chip
from recalign_jax.model import flops
from recalign_jax.training import collectives, memory
from recalign_jax.training.memory import Footprint, Job, Setting

EXAMPLES = "v5e:4x4, v5p:2x2x4, v6e:2x4"
# No further setting is compiled if that would end later than this, as the first one went.
SEARCH_SECONDS = 540


def topology_devices(name: str) -> list[Any]:
    """The devices of a TPU topology: they can be compiled for, not run on.

    Args:
      name: generation and shape, as `v5e:4x4`.

    Raises:
      InputError: for an unknown topology, or when libtpu isn't installed.
    """
    from jax.experimental import topologies

    host.tell_libtpu_of_no_tpu()
    try:
        devices: list[Any] = topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    except RuntimeError as error:
        message = str(error).splitlines()[0].removeprefix("INVALID_ARGUMENT: ")
        if "INVALID_ARGUMENT" not in str(error):
            raise InputError(
                f"recalign plan needs libtpu, the TPU compiler: pip install -e '.[plan]' in the project's folder "
                f"({message})."
            ) from None
        raise InputError(f"--topology {name}: {message}. Give a topology such as {EXAMPLES}.") from None
    if hardware.chip(devices[0].device_kind) is None:
        raise InputError(f"--topology {name}: {devices[0].device_kind} isn't known. Give one such as {EXAMPLES}.")
    return devices


def plan(job: Job, chip: Chip, say: Callable[[str], None]) -> dict[str, Any]:
    """Compiles the step, and then settings that need less memory until one fits, or that use memory left over.

    Args:
      job: what to compile; its mesh is of devices from `topology_devices`.
      chip: one of them.
      say: told of every compilation.

    Returns:
      What `recalign plan --json` prints.
    """
    started = time.monotonic()

    def compiled(setting: Setting, job: Job) -> tuple[Footprint, dict[str, Any]]:
        found = memory.footprint(job)
        fits = not found.refused and found.hbm_bytes <= chip.hbm_bytes
        say(
            f"{memory.as_flags(setting) or 'as given'}: {found.hbm_bytes / GIB:.2f} of {chip.hbm_bytes / GIB:.2f} GiB "
            f"a device{'' if fits else ', does not fit'} (compiled in {found.seconds:.0f} s)"
        )
        return found, {"setting": setting, "fits": fits, "hbm_bytes_per_device": found.hbm_bytes}

    found, given = compiled({}, job)
    tried: list[dict[str, Any]] = []
    for setting, changed in larger(job, found.hbm_bytes, chip) if given["fits"] else smaller(job):
        if time.monotonic() - started + found.seconds > SEARCH_SECONDS:
            break
        tried.append(compiled(setting, changed)[1])
        if not given["fits"] and tried[-1]["fits"]:
            break
    suggested = [one["setting"] for one in tried if one["fits"]]
    return {
        "fits": given["fits"],
        "hbm_bytes_per_device": found.hbm_bytes,
        "hbm_limit_bytes": chip.hbm_bytes,
        **cost(job, found, chip),
        "compile_seconds": found.seconds,
        "tried": tried,
        "suggestion": suggested[0] if suggested else None,
    }


def smaller(job: Job) -> Iterator[tuple[Setting, Job]]:
    """Settings that need less and less memory: each saving on top of those before it."""
    settings: Setting = {}
    while (step := next(memory.savings(job), None)) is not None:
        setting, job = step
        settings = settings | setting
        yield settings, job


def larger(job: Job, hbm_bytes: int, chip: Chip) -> Iterator[tuple[Setting, Job]]:
    """Settings that use memory that is left over: more rows (2, 4 or 8 times as many), and less computed again."""
    times = min(8, 2 ** int(math.log2(chip.hbm_bytes / hbm_bytes)))
    if times > 1:
        yield memory.with_batch_size(job, times * job.input_options.batch_size)
    if job.config.remat == "full":
        yield memory.with_remat(job, "minimal")


def cost(job: Job, found: Footprint, chip: Chip) -> dict[str, Any]:
    """FLOPs, bytes moved, and the time that a step takes at least, by a roofline: no device does better than its peaks.

    Products that REMAT computes again don't count, as the compiler leaves some of them out. Of the memory's bandwidth
    only this is counted: all that a step holds is written once and read once.
    """
    rows, lengths = job.input_options.batch_size, job.input_options.task_feature_lengths
    of_model = flops.train_step_flops(job.config, rows, lengths["inputs"], lengths["targets"], job.lora_options.trained)
    moved = collectives.bytes_moved(found.hlo) if found.hlo else None
    seconds = {
        "compute": of_model / job.mesh.size / chip.peak_flops,
        "memory": 2 * found.hbm_bytes / chip.hbm_bandwidth,
        # A device receives at half of what its links do both ways.
        "interconnect": sum(moved.values()) / (chip.interconnect / 2) if moved else None,
    }
    bound = max(value for value in seconds.values() if value is not None)
    return {
        "flops_per_step": of_model,
        "collectives": moved,
        "roofline_seconds": seconds | {"step": bound},
        "roofline_tokens_per_second": rows * (lengths["inputs"] + lengths["targets"]) / bound,
        "roofline_mfu": of_model / job.mesh.size / chip.peak_flops / bound,
    }

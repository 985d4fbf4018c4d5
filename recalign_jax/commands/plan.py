"""`recalign plan`: what the train step that gin describes needs on TPUs that aren't there."""

import argparse
import dataclasses
from typing import Any

import jax

import recalign_jax.commands.train  # noqa: F401 (what the gin files of a run configure)
from recalign_jax import hardware, partitioning, terminal
from recalign_jax.commands.common import model_config
from recalign_jax.hardware import GIB
from recalign_jax.model.lora import LoraOptions
from recalign_jax.training import memory, plan
from recalign_jax.training.input_pipeline import InputOptions
from recalign_jax.training.memory import Job
from recalign_jax.training.optimizer import make_optimizer
from recalign_jax.training.step import StepOptions, check_divides
from recalign_jax.training.train import TrainOptions

USES_GIN = True
NUM_TOKENS = 32_128  # T5's vocabulary: no corpus is needed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--topology", required=True, metavar="NAME", help=f"TPU generation and shape, as {plan.EXAMPLES}"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Compiles the step, prints what it needs, and tries settings that fit better."""
    jax.config.update("jax_platforms", "cpu")  # nothing runs on the devices that are here
    config = model_config(NUM_TOKENS)
    if config.activation_dtype == "auto":
        config = dataclasses.replace(config, activation_dtype="bfloat16")  # as it would be on a TPU
    devices = plan.topology_devices(args.topology)
    chip = hardware.chip(devices[0].device_kind)
    assert chip is not None
    mesh = partitioning.make_mesh(TrainOptions(model_dir="").mesh, devices)
    rows, options = InputOptions(), StepOptions()
    check_divides(options, rows.batch_size, rows.task_feature_lengths["targets"], mesh)
    job = Job(config, make_optimizer(), mesh, options, rows, LoraOptions())
    result = plan.plan(job, chip, terminal.say)
    _show(result, job, args.topology)
    about = {"topology": args.topology, "device_kind": devices[0].device_kind, "devices": mesh.size}
    return result | about | {"mesh": dict(mesh.shape), "batch_size": rows.batch_size, "remat": config.remat}


def _show(result: dict[str, Any], job: Job, topology: str) -> None:
    seconds = result["roofline_seconds"]
    share = result["hbm_bytes_per_device"] / result["hbm_limit_bytes"]
    lines = [
        ("fits", "yes" if result["fits"] else "no"),
        ("HBM a device, GiB", f"{result['hbm_bytes_per_device'] / GIB:.2f} ({share:.0%} of what it has)"),
        ("FLOPs of a step", f"{result['flops_per_step']:.3g}"),
        ("compilation, s", f"{result['compile_seconds']:.0f}"),
    ]
    for kind, moved in (result["collectives"] or {}).items():
        if moved:
            lines.append((f"{kind} a device and step, GiB", f"{moved / GIB:.3g}"))
    for name, value in seconds.items():
        if value is not None:
            lines.append((f"at least, by roofline: {name}, ms", f"{1000 * value:.3g}"))
    lines.append(("at most, by roofline: tokens a second", f"{result['roofline_tokens_per_second']:,.0f}"))
    terminal.table(f"{topology}, {job.input_options.batch_size} rows, remat {job.config.remat}", ("", ""), lines)
    if result["suggestion"] is not None:
        terminal.say(f"Suggested: {memory.as_flags(result['suggestion'])}")
    elif not result["fits"]:
        terminal.say("No setting that was tried fits: take more devices, or devices with more memory.")

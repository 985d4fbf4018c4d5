"""Our side of the benchmarks of training: what `recalign train` trains on, and its loop without log and checkpoints."""

import argparse
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from recalign_jax import gin_config, host, partitioning
from recalign_jax.commands.common import model_config
from recalign_jax.model import t5
from recalign_jax.model.config import T5Config
from recalign_jax.training import input_pipeline
from recalign_jax.training.input_pipeline import InputOptions, Stream
from recalign_jax.training.optimizer import make_optimizer
from recalign_jax.training.step import StepOptions, abstract_state, jit_train_step, make_train_step
from seqio_tasks import components, task_names

LEARNING_RATE = 1e-3

Batch = dict[str, Any]
Trainer = Callable[[int], tuple[int, float]]  # number of a round -> (useful tokens, seconds)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What is trained, and on what."""
    add_data_arguments(parser)
    parser.add_argument("--model", default="gin_configs/models/t5_mini.gin", help="gin file")
    parser.add_argument("--batch_size", type=int, default=8, help="packed rows of a step")


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Which samples."""
    parser.add_argument("--corpus", required=True)
    parser.add_argument("--vocabulary", required=True)
    parser.add_argument("--mixture", default="retrieval_aligned")
    parser.add_argument("--data_dir")
    parser.add_argument("--inputs", type=int, default=512)
    parser.add_argument("--targets", type=int, default=128)


def set_up(args: argparse.Namespace) -> tuple[str, Stream, T5Config]:
    """The mixture's name, its samples, and the model for its vocabulary; freed memory stays, as in `recalign train`."""
    host.keep_freed_memory()
    gin_config.parse([args.model], [])
    name, stream = set_up_data(args, batch_size=args.batch_size, data_shards=1)
    return name, stream, model_config(max(task.num_tokens for task in stream.tasks))


def set_up_data(args: argparse.Namespace, **options: Any) -> tuple[str, Stream]:
    """The mixture's name, and its samples; `options` are more of InputOptions."""
    name = str(task_names.split_name(f"{args.corpus}_{args.mixture}", args.data_dir))
    lengths = {"inputs": args.inputs, "targets": args.targets}
    tasks = components.of_corpora(name, args.vocabulary, args.data_dir)
    return name, input_pipeline.make_stream(tasks, "train", 0, InputOptions(lengths, **options))


def packed_batches(stream: Stream) -> Iterator[tuple[dict[str, np.ndarray], np.ndarray]]:
    """Batches from the beginning of a run, each with the position after it."""
    return input_pipeline.local_batches(stream, input_pipeline.start_positions(stream.options))


def one_device() -> jax.sharding.Mesh:
    return partitioning.make_mesh({}, jax.devices()[:1])


def on_device(stream: Stream) -> Iterator[tuple[Batch, np.ndarray]]:
    """The same on one device, as the train loop gets them."""
    sharding = partitioning.batch_sharding(one_device())
    return input_pipeline.on_device(packed_batches(stream), sharding)


def state_and_step(config: T5Config, optimizer_name: str, num_tasks: int) -> tuple[Any, Any]:
    """A new run's state on one device, and the real step under jit, still to be compiled."""
    mesh = one_device()
    optimizer = make_optimizer(optimizer_name, LEARNING_RATE)
    initialize, shapes = abstract_state(config, optimizer, mesh)
    step = make_train_step(t5.graph(config), optimizer, StepOptions(), num_tasks, 0)
    shardings = partitioning.shardings_of(shapes)
    state = jax.jit(initialize, out_shardings=shardings)(jax.random.key(0))
    return state, jit_train_step(step, shapes, mesh)


def our_trainer(state: Any, step: Any, batches: Iterator[tuple[Batch, Any]], steps: int) -> Trainer:
    """Trains as `train` does."""

    def train(turn: int) -> tuple[int, float]:
        nonlocal state
        del turn
        started, counts = time.perf_counter(), []
        for _ in range(steps):
            batch, _ = next(batches)
            state, sums = step(state, batch, None)
            counts.append(sums["input_tokens"] + sums["target_tokens"])
        jax.block_until_ready(state)
        return int(sum(counts)), time.perf_counter() - started

    return train

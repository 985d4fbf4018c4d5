"""What a run says, and leaves behind, when it fails in a step."""

import contextlib
import itertools
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Sharding

from recalign_jax.checkpoint import locations
from recalign_jax.errors import RunError
from recalign_jax.files import atomic_file
from recalign_jax.training import input_pipeline, memory
from recalign_jax.training.input_pipeline import Stream


def not_finite(
    step: int, sums: dict[str, Any], stream: Stream, positions: np.ndarray, sharding: Sharding, model_dir: str
) -> RunError:
    """Saves the batch of the first step whose loss or gradient is not finite; returns the error to raise.

    Args:
      step: the last step done.
      sums: of the steps since the last look at them, of which `nonfinite` went wrong. The last ones, since parameters
        that are not finite stay so.
      stream: of training samples.
      positions: of the data before these steps, of all shards or those of this process's part.
      sharding: of a batch.
      model_dir: of the run.
    """
    count, wrong = int(sums["steps"]), int(sums["nonfinite"])
    first = step - wrong + 1
    whole = np.asarray(input_pipeline.all_positions(stream, positions, sharding))
    batches = input_pipeline.local_batches(stream, whole, sharding)
    batch, _ = next(itertools.islice(batches, count - wrong, None))
    process = f"_process_{jax.process_index()}" * (jax.process_count() > 1)
    path = pathlib.Path(model_dir) / "not_finite" / f"step_{first}{process}.npz"
    with atomic_file(path) as aside, aside.open("wb") as file:
        np.savez_compressed(file, **batch)  # type: ignore[arg-type]
    newest = next(iter(locations.steps(model_dir)), None)
    multihost_utils.sync_global_devices("all parts of the batch are kept")  # the first to leave ends the others
    return RunError(
        f"Loss or gradient is not finite in steps {first} to {step}. The batch of step {first} is in {path}. "
        f"The newest checkpoint is {'not there yet' if newest is None else f'of step {newest}'}; a lower "
        "LEARNING_RATE, WARMUP_STEPS, or --gin.make_optimizer.max_gradient_norm=1.0 may help."
    )


@contextlib.contextmanager
def out_of_memory_explained(job: memory.Job) -> Iterator[None]:
    """Turns a device's lack of memory in training into advice."""
    with _out_of_memory("Out of memory", lambda: memory.advice(job)):
        yield


@contextlib.contextmanager
def out_of_memory_in_evaluation() -> Iterator[None]:
    """The same of an evaluation: nothing about the train step would help it."""
    advice = "Lower EVAL_BATCH_SIZE, NUM_BEAMS or MAX_INPUT_TOKENS; the same command goes on."
    with _out_of_memory("Out of memory in an evaluation", lambda: advice):
        yield


@contextlib.contextmanager
def _out_of_memory(what: str, advice: Callable[[], str]) -> Iterator[None]:
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise RunError(f"{what}: {str(error).splitlines()[0]}\n{advice()}") from error

"""The train loop, to be read from top to bottom."""

import collections
import dataclasses
import functools
import itertools
import math
import pathlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import gin
import jax
import jax.numpy as jnp
import numpy as np
import optax

from recalign_jax import partitioning, terminal
from recalign_jax.checkpoint import training as checkpointing
from recalign_jax.errors import InputError, RunError
from recalign_jax.files import atomic_file
from recalign_jax.model import lora, t5
from recalign_jax.model.config import T5Config
from recalign_jax.model.lora import LoraOptions
from recalign_jax.training import input_pipeline, log
from recalign_jax.training.input_pipeline import InputOptions
from recalign_jax.training.step import (
    StepOptions,
    TrainState,
    abstract_state,
    jit_train_step,
    make_eval_step,
    make_train_step,
)
from seqio_tasks.components import Component

VALIDATION_BATCHES, VALIDATION_WINDOW = 8, 256

# An evaluator is handed parameters and yields (name, value). The loop doesn't know which there are.
Evaluator = Callable[[Any], Iterable[tuple[str, float]]]


@gin.configurable
@dataclasses.dataclass(frozen=True)
class TrainOptions:
    """What a run is, beside model, optimizer and input.

    Attributes:
      model_dir: where everything goes; if it has a checkpoint, training goes on from there.
      train_steps: optimizer steps of the whole run.
      seed: of initialization, dropout, order and random parts of samples.
      log_period: steps between two logged ones.
      eval_period: steps between evaluations; 0 for none, and the last step is always evaluated otherwise.
      checkpoint_period: steps between checkpoints; the last step is always saved.
      keep_checkpoints: how many of the newest stay.
      mesh: devices along each axis; -1 is the rest.
    """

    model_dir: str
    train_steps: int = 1000
    seed: int = 0
    log_period: int = 20
    eval_period: int = 0
    checkpoint_period: int = 500
    keep_checkpoints: int = 3
    mesh: dict[str, int] = dataclasses.field(default_factory=lambda: {"data": -1, "fsdp": 1, "model": 1})

    def __post_init__(self) -> None:
        for name in ("train_steps", "log_period", "checkpoint_period", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise InputError(f"{name.upper()} is {getattr(self, name)}: must be at least 1.")


def train(
    options: TrainOptions,
    input_options: InputOptions,
    step_options: StepOptions,
    config: T5Config,
    optimizer: optax.GradientTransformation,
    mesh: jax.sharding.Mesh,
    components: Sequence[tuple[Component, float]],
    evaluators: Sequence[Evaluator],
    identity: dict[str, Any],
    initial_params: Callable[[Any], Any] | None = None,
    base: Any = None,
    lora_options: LoraOptions = LoraOptions(),  # noqa: B008 (frozen)
) -> dict[str, Any]:
    """Trains to `options.train_steps`, from the newest checkpoint in MODEL_DIR if there is one.

    Args:
      options: of the run.
      input_options: of the batches.
      step_options: of the step.
      config: of the model, with its vocabulary's size.
      optimizer: from `make_optimizer`.
      components: the tasks of the mixture and their rates.
      evaluators: called every `eval_period` steps.
      identity: what must not change when the run is resumed; JSON.
      initial_params: gives a new run's parameters for their shapes and shardings; None draws them.
      base: parameters that stay as they are while adapters of them are trained; None trains all parameters.
      lora_options: of the adapters.

    Returns:
      `step loss tokens_per_second packing_efficiency model_dir` of the last logged step.

    Raises:
      InputError: when the checkpoint there belongs to another run.
      RunError: when the loss is no finite number.
    """
    # ---------------------------------------------------------------- model and optimizer, as shapes and shardings
    graphdef = t5.graph(config)

    initialize, state_shapes = abstract_state(config, optimizer, mesh, lora_options)
    batch_sharding = partitioning.batch_sharding(mesh)
    terminal.say(_what_is_trained(state_shapes.params, base))

    # ---------------------------------------------------------------- input streams
    stream = input_pipeline.make_stream(components, "train", options.seed, input_options)
    held_out = None
    if options.eval_period:
        few = dataclasses.replace(input_options, window=VALIDATION_WINDOW)
        held_out = input_pipeline.make_stream(components, "validation", options.seed, few)

    # ---------------------------------------------------------------- the newest checkpoint, or a new run
    model_dir = pathlib.Path(options.model_dir)
    model_dir.mkdir(parents=True, exist_ok=True)
    checkpoints = checkpointing.open_checkpoints(options.model_dir, options.keep_checkpoints)
    first_step = checkpoints.latest_step() or 0
    positions = input_pipeline.start_positions(input_options)
    if first_step:
        metadata = checkpointing.read_metadata(checkpoints, first_step)
        _check_identity(metadata["identity"], identity, options.model_dir)
        if first_step >= options.train_steps:
            terminal.say(f"{options.model_dir} is trained to step {first_step} already.")
            return _result({"step": first_step, **(log.read(options.model_dir) or [{}])[-1]}, options.model_dir)
        positions = np.asarray(metadata["positions"], np.int64)
        params, (opt_state, step) = checkpointing.restore(
            checkpoints, first_step, state_shapes.params, (state_shapes.opt_state, state_shapes.step)
        )
        state = TrainState(step, params, opt_state)
        terminal.say(f"Resuming {options.model_dir} at step {first_step}.")
    else:
        # Every shard is drawn on the device that keeps it.
        shardings = jax.tree.map(lambda leaf: leaf.sharding, state_shapes)
        state = jax.jit(initialize, out_shardings=shardings)(jax.random.key(options.seed))
        if initial_params is not None:
            state = state._replace(params=initial_params(state_shapes.params))
    batches = _on_device(
        input_pipeline.PackedBatches(stream, positions, jax.process_index(), jax.process_count()), batch_sharding
    )

    # ---------------------------------------------------------------- the compiled steps
    num_tasks = len(stream.tasks)
    train_step = jit_train_step(
        make_train_step(graphdef, optimizer, step_options, num_tasks, options.seed, lora_options), state_shapes, mesh
    )
    eval_step = jax.jit(make_eval_step(graphdef, num_tasks), in_shardings=(None, batch_sharding))
    base_shardings = jax.tree.map(lambda leaf: leaf.sharding, base)
    merge = jax.jit(functools.partial(lora.merge, options=lora_options), out_shardings=base_shardings)
    add = jax.jit(lambda a, b: jax.tree.map(jnp.add, a, b), donate_argnums=0)

    # ---------------------------------------------------------------- the loop
    with atomic_file(model_dir / "config.gin") as aside:
        aside.write_text(gin.operative_config_str(), encoding="utf-8")
    run_log = log.RunLog(options.model_dir, first_step)
    names = [task.name for task in stream.tasks]
    sums, speed = None, _Speed()
    with terminal.progress("train", options.train_steps, "steps", done=first_step) as advance:
        for step in range(first_step + 1, options.train_steps + 1):
            with jax.transfer_guard("disallow"):
                batch, positions = next(batches)
                state, step_sums = train_step(state, batch, base)
                sums = step_sums if sums is None else add(sums, step_sums)
            advance()

            last = step == options.train_steps
            evaluates = options.eval_period and (step % options.eval_period == 0 or last)
            saves = step % options.checkpoint_period == 0 or last
            # The first step of a process is logged by itself: its time is the compiler's.
            if not (step == first_step + 1 or step % options.log_period == 0 or evaluates or saves):
                continue
            sums = jax.device_get(sums)  # waits for the device: the one synchronisation of the loop
            record = _metrics(sums, names) | speed.rates(sums)
            if not np.isfinite(record["loss"]):
                raise RunError(
                    f"The loss is {record['loss']} in steps {step - int(sums['steps']) + 1} to {step}. The newest "
                    f"checkpoint is of step {checkpoints.latest_step() or 'none'}; a lower LEARNING_RATE may help."
                )
            if evaluates and held_out is not None:
                params = state.params if base is None else merge(base, state.params)
                record |= _evaluate(eval_step, evaluators, params, held_out, batch_sharding, names)
                del params
            run_log.write(step, record)
            advance(0, note=f"loss {record['loss']:.3f}")
            if saves:
                metadata = {"identity": identity, "positions": _all_positions(positions).tolist()}
                metadata["model"] = dataclasses.asdict(config)
                checkpointing.save(checkpoints, step, state.params, (state.opt_state, state.step), metadata)
            sums = None
            speed.restart()

    # ---------------------------------------------------------------- done
    checkpoints.wait_until_finished()
    checkpoints.close()
    run_log.close()
    return _result({**record, "step": step, "tokens_per_second": speed.overall()}, options.model_dir)


def _what_is_trained(params: Any, base: Any) -> str:
    count, of = (f"{sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree)):,}" for tree in (params, base))
    if base is None:
        return f"Training all {count} parameters."
    return f"Training {count} parameters of adapters; the {of} of INITIAL_CHECKPOINT stay as they are."


def _on_device(batches: Iterator[tuple[Any, np.ndarray]], sharding: Any, ahead: int = 2) -> Iterator[tuple[Any, Any]]:
    """Moves batches to the devices a few steps before they are needed."""

    def put(item: tuple[Any, np.ndarray]) -> tuple[Any, np.ndarray]:
        batch, positions = item
        return jax.tree.map(lambda rows: jax.make_array_from_process_local_data(sharding, rows), batch), positions

    queue: collections.deque[tuple[Any, Any]] = collections.deque()
    for item in batches:
        queue.append(put(item))
        if len(queue) > ahead:
            yield queue.popleft()
    yield from queue


def _all_positions(positions: np.ndarray) -> np.ndarray:
    """The positions of every process's shards, [S, 2]."""
    if jax.process_count() == 1:
        return positions
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(positions)).reshape(-1, 2)


def _evaluate(
    eval_step: Callable[..., Any],
    evaluators: Sequence[Evaluator],
    params: Any,
    held_out: input_pipeline.Stream,
    sharding: Any,
    names: list[str],
) -> dict[str, float]:
    """Validation loss over the first few batches of held-out samples, then what the evaluators yield."""
    positions = input_pipeline.start_positions(held_out.options)
    batches = input_pipeline.PackedBatches(held_out, positions, jax.process_index(), jax.process_count())
    total: Any = None
    for batch, _ in _on_device(itertools.islice(batches, VALIDATION_BATCHES), sharding):
        sums = jax.device_get(eval_step(params, batch))
        total = sums if total is None else jax.tree.map(np.add, total, sums)
    values = {f"validation_{name}": value for name, value in _metrics(total, names).items() if "loss" in name}
    for evaluator in evaluators:
        values.update(evaluator(params))
    return values


def _metrics(sums: dict[str, np.ndarray], names: list[str]) -> dict[str, float]:
    """Means from sums: loss a sample (or token), overall and of each task, and how full the rows were."""
    values = {
        "loss": float(sums["loss"] / sums["weight"]),
        "z_loss": float(sums["z_loss"] / sums["weight"]),
        "packing_efficiency": float(sums["input_tokens"] / sums["slots"]),
    }
    if "steps" in sums:
        values["gradient_norm"] = float(sums["gradient_norm"] / sums["steps"])
    for task, name in enumerate(names):
        if len(names) > 1 and sums["task_weight"][task] > 0:
            values[f"loss/{name}"] = float(sums["task_loss"][task] / sums["task_weight"][task])
            values[f"target_token_share/{name}"] = float(sums["task_tokens"][task] / sums["target_tokens"])
    return values


class _Speed:
    """Useful tokens a second, without the time of compilation, evaluation and saving."""

    def __init__(self) -> None:
        self._since: float | None = None
        self._tokens = self._seconds = 0.0

    def restart(self) -> None:
        """Training goes on from here."""
        self._since = time.monotonic()

    def rates(self, sums: dict[str, np.ndarray]) -> dict[str, float]:
        """Since `restart`; nothing before the first one, since that time holds the compilation."""
        if self._since is None:
            return {}
        seconds = time.monotonic() - self._since
        tokens = float(sums["input_tokens"] + sums["target_tokens"])
        self._tokens += tokens
        self._seconds += seconds
        return {"tokens_per_second": tokens / seconds, "steps_per_second": float(sums["steps"]) / seconds}

    def overall(self) -> float | None:
        """Since the process began; None after a single step."""
        return self._tokens / self._seconds if self._seconds else None


def _check_identity(saved: dict[str, Any], identity: dict[str, Any], model_dir: str) -> None:
    changed = [
        f"  {name}: {saved.get(name, 'nothing')} then, {identity.get(name, 'nothing')} now"
        for name in sorted(saved.keys() | identity.keys())
        if saved.get(name) != identity.get(name)
    ]
    if changed:
        raise InputError(
            f"{model_dir} holds a run of another configuration; it can't be resumed with this one:\n"
            + "\n".join(changed)
            + "\nChange it back, or give another MODEL_DIR."
        )


def _result(record: dict[str, Any], model_dir: str) -> dict[str, Any]:
    names = ("step", "loss", "tokens_per_second", "packing_efficiency")
    return {name: record.get(name) for name in names} | {"model_dir": model_dir}

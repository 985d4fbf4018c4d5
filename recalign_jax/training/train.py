"""The train loop, to be read from top to bottom."""

import contextlib
import dataclasses
import functools
import itertools
import math
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import gin
import jax
import jax.numpy as jnp
import numpy as np
import optax

from recalign_jax import distributed, partitioning, terminal
from recalign_jax.checkpoint import locations, saved
from recalign_jax.checkpoint import training as checkpointing
from recalign_jax.checkpoint.saved import DamagedCheckpoint
from recalign_jax.errors import InputError, Preempted, check_kinds
from recalign_jax.files import atomic_file
from recalign_jax.model import flops, lora, t5
from recalign_jax.training import failures, input_pipeline, log, measures, packing, steering
from recalign_jax.training.input_pipeline import InputOptions
from recalign_jax.training.memory import Job
from recalign_jax.training.preemption import Preemption
from recalign_jax.training.step import (
    TrainState,
    abstract_state,
    jit_eval_step,
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
    """What a run is, beside model, optimizer, input and step.

    Attributes:
      model_dir: where everything goes; if it has a checkpoint, training goes on from there.
      train_steps: optimizer steps of the whole run.
      seed: of initialization, dropout, order and random parts of samples.
      log_period: steps between two logged ones.
      eval_period: steps between evaluations; 0 for none, and the last step is always evaluated otherwise. What is
        evaluated is saved first.
      checkpoint_period: steps between checkpoints; the last step is always saved.
      keep_checkpoints: how many of the newest stay; the best one stays as well.
      best_metric: by which of the evaluated values a checkpoint is the best, as `validation_recall@10`; None for none.
      early_stopping: after so many evaluations without a better one the run ends; None for never.
      profile: (steps of this process to let pass, steps to trace), as (10, 5); None for no trace.
      resume_changed: goes on with a run of another configuration, which it prints; False refuses.
      mesh: devices along each axis; -1 is the rest.
    """

    model_dir: str
    train_steps: int = 1000
    seed: int = 0
    log_period: int = 20
    eval_period: int = 0
    checkpoint_period: int = 500
    keep_checkpoints: int = 3
    best_metric: str | None = None
    early_stopping: int | None = None
    profile: tuple[int, int] | None = None
    resume_changed: bool = False
    mesh: dict[str, int] = dataclasses.field(default_factory=lambda: {"data": -1, "fsdp": 1, "model": 1})

    def __post_init__(self) -> None:
        check_kinds(self)
        for name in ("train_steps", "log_period", "checkpoint_period", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise InputError(f"{name.upper()} is {getattr(self, name)}: must be at least 1.")
        if self.eval_period < 0:
            raise InputError(f"EVAL_PERIOD is {self.eval_period}: give 0 for no evaluation.")
        if self.best_metric is not None and not self.best_metric.startswith("validation_"):
            raise InputError(
                f"BEST_METRIC is {self.best_metric!r}: what is evaluated is called validation_..., as validation_loss."
            )
        if self.best_metric is not None and not self.eval_period:
            raise InputError("BEST_METRIC needs evaluations: --gin.EVAL_PERIOD=STEPS.")
        if self.early_stopping is not None and (self.best_metric is None or self.early_stopping < 1):
            raise InputError("EARLY_STOPPING is a number of evaluations of at least 1, and needs BEST_METRIC.")
        if self.profile is not None and (len(self.profile) != 2 or min(self.profile) < 1):
            raise InputError(f"PROFILE is {self.profile}: give (steps to let pass, steps to trace), as (10, 5).")


def train(
    options: TrainOptions,
    job: Job,
    components: Sequence[tuple[Component, float]],
    evaluators: Sequence[Evaluator],
    identity: dict[str, Any],
    preemption: Preemption,
    initial_params: Callable[[Any], Any] | None = None,
    base: Any = None,
    schedule: optax.Schedule | None = None,
) -> dict[str, Any]:
    """Trains to `options.train_steps`, from the newest whole checkpoint in MODEL_DIR if there is one.

    Args:
      options: of the run.
      job: model, optimizer, mesh, and options of the step.
      components: the tasks of the mixture and their rates.
      evaluators: called every `eval_period` steps.
      identity: what must not change when the run is resumed; JSON.
      preemption: tells of SIGTERM.
      initial_params: gives a new run's parameters for their shapes and shardings; None draws them.
      base: parameters that stay as they are while adapters of them are trained; None trains all parameters.
      schedule: the learning rate by steps done, to be logged.

    Returns:
      `step loss tokens_per_second packing_efficiency model_dir` of the last logged step, and `best` if there is one.

    Raises:
      InputError: when the checkpoint there belongs to another run.
      Preempted: after SIGTERM, when all is saved.
      RunError: when a loss is no finite number, a checkpoint can't be written or none is whole, or memory runs out.
    """
    # ---------------------------------------------------------------- model and optimizer, as shapes and shardings
    config, optimizer, mesh = job.config, job.optimizer, job.mesh
    input_options, step_options, lora_options = job.input_options, job.step_options, job.lora_options
    graphdef = t5.graph(config)
    initialize, shapes = abstract_state(config, optimizer, mesh, lora_options)
    batch_sharding = partitioning.batch_sharding(mesh)
    terminal.say(_what_is_trained(shapes.params, base))

    # ---------------------------------------------------------------- input streams
    stream = input_pipeline.make_stream(components, "train", options.seed, input_options)
    names = [task.name for task in stream.tasks]
    held_out = _held_out(components, options, input_options, batch_sharding) if options.eval_period else []

    # ---------------------------------------------------------------- the newest checkpoint, or a new run
    model_dir = pathlib.Path(options.model_dir)
    model_dir.mkdir(parents=True, exist_ok=True)
    distributed.check_shared("MODEL_DIR", model_dir)
    records = distributed.from_first(lambda: log.read(options.model_dir))
    check = functools.partial(
        checkpointing.check_identity,
        identity=identity,
        model_dir=options.model_dir,
        resume_changed=options.resume_changed,
    )
    if _is_finished(options, records, check):
        terminal.say(f"{options.model_dir} is trained to step {records[-1]['step']} already.")
        return _result(records[-1], options)
    explained = functools.partial(failures.out_of_memory_explained, job)
    checkpoints = checkpointing.open_checkpoints(options.model_dir, options.keep_checkpoints)
    with explained():
        found = checkpointing.restore_newest(checkpoints, shapes.params, (shapes.opt_state, shapes.step), check)
    positions = input_pipeline.start_positions(input_options)
    if found:
        before = np.asarray(found.metadata["positions"], np.int64)
        window = found.metadata.get("window", input_options.window)
        positions = input_pipeline.resumed_positions(input_options, before, window)
    # From here on the first windows are rendered in threads, while parameters are drawn and the step is compiled.
    batches = input_pipeline.on_device(input_pipeline.local_batches(stream, positions, batch_sharding), batch_sharding)
    if found:
        first_step = found.step
        state = TrainState(found.optimizer[1], found.params, found.optimizer[0])
        terminal.say(f"Resuming {options.model_dir} at step {first_step}.")
    else:
        first_step = 0
        # Every shard is drawn on the device that keeps it.
        shardings = partitioning.shardings_of(shapes)
        with explained():
            state = jax.jit(initialize, out_shardings=shardings)(jax.random.key(options.seed))
            if initial_params is not None:
                state = state._replace(params=initial_params(shapes.params))

    # ---------------------------------------------------------------- the compiled steps
    train_step = jit_train_step(
        make_train_step(graphdef, optimizer, step_options, len(names), options.seed, lora_options), shapes, mesh
    )
    eval_step = jit_eval_step(make_eval_step(graphdef, len(names), step_options.logits_chunks), mesh)
    whole_shardings = partitioning.shardings_of(base)
    merge = jax.jit(functools.partial(lora.merge, options=lora_options), out_shardings=whole_shardings)
    add = jax.jit(lambda a, b: jax.tree.map(jnp.add, a, b), donate_argnums=0)

    # ---------------------------------------------------------------- what follows a logged step
    # A record counts once it is written: a run that was killed in an evaluation does it again when it is resumed.
    run_log = log.RunLog(options.model_dir, [record for record in records if record["step"] <= first_step])
    kept = distributed.from_first(lambda: locations.steps(options.model_dir))

    def has_checkpoint(record: dict[str, Any]) -> bool:
        """Whether it can be the best: with a metric that is new to a resumed run, earlier checkpoints may be gone."""
        return record["step"] > first_step or record["step"] in kept

    def conclude(step: int, record: dict[str, float], params: Any) -> None:
        """Evaluates if it is time to, and logs."""
        if _is_due(step, options.eval_period, options):
            whole = params if base is None else merge(base, params)
            with preemption.postponed(False), failures.out_of_memory_in_evaluation():  # what is evaluated is saved
                record = record | _evaluate(eval_step, evaluators, whole, held_out, batch_sharding, names)
            if options.best_metric is not None:
                checkpointing.finish(checkpoints)  # what is called the best is there, and not being written
        # First, so that whatever comes between the two, the evaluation is done again.
        evaluated = [*filter(has_checkpoint, run_log.records), {"step": step, **record}]
        steering.write_best(evaluated, options.best_metric, options.model_dir)
        run_log.write(step, record)

    # ---------------------------------------------------------------- the loop
    if jax.process_index() == 0:
        with atomic_file(model_dir / "config.gin") as aside:
            aside.write_text(gin.operative_config_str(), encoding="utf-8")
    lengths = input_options.task_feature_lengths
    batch_shapes = packing.batch_shapes(input_options.batch_size, lengths["inputs"], lengths["targets"])
    step_flops = flops.train_step_flops(
        config, input_options.batch_size, lengths["inputs"], lengths["targets"], lora_options.trained
    )
    speed = measures.Speed(mesh, step_flops)
    sums, positions_before, step = None, positions, first_step
    with (
        preemption.postponed(),
        _closing(checkpoints, run_log),
        explained(),
        measures.tracing(options.profile, options.model_dir) as trace,
        terminal.progress("train", options.train_steps, "steps", done=first_step) as advance,
    ):
        if found and (not run_log.records or run_log.records[-1]["step"] < first_step):
            conclude(first_step, found.metadata["record"], state.params)
        ended = _ends(step, run_log.records, options)
        if not ended:
            compiled_step = train_step.lower(state, batch_shapes, base).compile()
        while not ended:
            step += 1
            trace(step - first_step, state)
            with jax.transfer_guard("disallow"):
                with speed.waiting():
                    batch, positions = next(batches)
                state, step_sums = compiled_step(state, batch, base)
                sums = step_sums if sums is None else add(sums, step_sums)
            advance()

            leaves = preemption.requested(step)
            evaluates = _is_due(step, options.eval_period, options)
            saves = _is_due(step, options.checkpoint_period, options) or evaluates or leaves
            # The first step of a process is logged by itself: it waits for the first windows.
            if not (step == first_step + 1 or step % options.log_period == 0 or saves):
                continue
            sums = jax.device_get(sums)  # waits for the device: the one synchronisation of the loop
            record = measures.means(sums, names) | speed.rates(sums)
            if schedule is not None:
                record["learning_rate"] = float(schedule(step - 1))
            if sums["nonfinite"] > 0:
                raise failures.not_finite(step, sums, stream, positions_before, batch_sharding, options.model_dir)
            advance(0, note=f"loss {record['loss']:.3f}")
            if saves:
                metadata: dict[str, Any] = {"identity": identity, "model": dataclasses.asdict(config), "record": record}
                metadata["positions"] = input_pipeline.all_positions(stream, positions, batch_sharding)
                metadata["window"] = input_options.window
                checkpointing.save(checkpoints, step, state.params, (state.opt_state, state.step), metadata)
            if leaves and step < options.train_steps:
                raise Preempted(f"SIGTERM: saved step {step} in {options.model_dir}. The same command goes on.")
            conclude(step, record, state.params)
            ended = _ends(step, run_log.records, options)
            sums, positions_before = None, positions
            speed.restart()

    # ---------------------------------------------------------------- done
    if step < options.train_steps:
        terminal.say(f"Stopped early at step {step}: {options.early_stopping} evaluations brought nothing better.")
    return _result({**run_log.records[-1], "tokens_per_second": speed.overall()}, options)


def _held_out(
    components: Sequence[tuple[Component, float]], options: TrainOptions, input_options: InputOptions, sharding: Any
) -> list[dict[str, np.ndarray]]:
    """The batches of held-out samples of which the validation loss is."""
    window = max(VALIDATION_WINDOW, input_pipeline.smallest_window(len(components)))
    few = dataclasses.replace(input_options, window=window, workers=0)
    stream = input_pipeline.make_stream(components, "validation", options.seed, few)
    batches = input_pipeline.local_batches(stream, input_pipeline.start_positions(few), sharding)
    return [batch for batch, _ in itertools.islice(batches, VALIDATION_BATCHES)]


@contextlib.contextmanager
def _closing(checkpoints: Any, run_log: log.RunLog) -> Iterator[None]:
    """Whatever ends the loop: a checkpoint that is being written is written to its end."""
    try:
        yield
        checkpointing.finish(checkpoints)
    except Preempted:
        checkpointing.finish(checkpoints)
        raise
    finally:
        with contextlib.suppress(Exception):  # told of by `finish`, or another error is on its way
            checkpoints.close()
        run_log.close()


def _is_due(step: int, period: int, options: TrainOptions) -> bool:
    return period > 0 and (step % period == 0 or step == options.train_steps)


def _ends(step: int, records: Sequence[dict[str, Any]], options: TrainOptions) -> bool:
    """Whether training ends with a step that was evaluated, if it is one."""
    return step >= options.train_steps or steering.ends(records, options.best_metric, options.early_stopping)


def _is_finished(options: TrainOptions, records: list[dict[str, Any]], check: Callable[[dict[str, Any]], None]) -> bool:
    """Whether there is nothing left to do, which the log and the newest checkpoint say."""
    newest = next(iter(distributed.from_first(lambda: locations.steps(options.model_dir))), 0)
    if not records or newest != records[-1]["step"] or not _ends(newest, records, options):
        return False
    folder = locations.folder_of(options.model_dir, newest)
    try:
        check(saved.agreed(folder, functools.partial(saved.read_metadata, folder)))
    except DamagedCheckpoint:
        return False
    return True


def _what_is_trained(params: Any, base: Any) -> str:
    count, of = (f"{sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree)):,}" for tree in (params, base))
    if base is None:
        return f"Training all {count} parameters."
    return f"Training {count} parameters of adapters; the {of} of INITIAL_CHECKPOINT stay as they are."


def _evaluate(
    eval_step: Callable[..., Any],
    evaluators: Sequence[Evaluator],
    params: Any,
    held_out: Sequence[dict[str, np.ndarray]],
    sharding: Any,
    names: list[str],
) -> dict[str, float]:
    """Validation loss over a few batches of held-out samples, then what the evaluators yield."""
    sums = [jax.device_get(eval_step(params, input_pipeline.put(batch, sharding))) for batch in held_out]
    total = jax.tree.map(lambda *parts: np.sum(parts, axis=0), *sums)
    means = measures.means(total, names)
    values = {f"validation_{name}": means[name] for name in means if name == "loss" or name.startswith("loss/")}
    for evaluator in evaluators:
        values.update(evaluator(params))
    return values


def _result(record: dict[str, Any], options: TrainOptions) -> dict[str, Any]:
    names = ("step", "loss", "tokens_per_second", "packing_efficiency")
    result = {name: record.get(name) for name in names} | {"model_dir": options.model_dir}
    return result if options.best_metric is None else result | {"best": locations.read_best(options.model_dir)}

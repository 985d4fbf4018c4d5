"""The train loop of the baselines: epochs, evaluated on the validation split, until none was better for a while."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from recalign_jax import metrics, terminal
from recalign_jax.baselines import scores
from recalign_jax.baselines.scores import Scores
from recalign_jax.checkpoint import locations, saved
from recalign_jax.checkpoint import training as checkpointing
from recalign_jax.corpus.corpus import Corpus
from recalign_jax.errors import InputError, RunError, check_kinds, check_least
from recalign_jax.evaluation import retrieval
from recalign_jax.evaluation.results import EvaluationOptions
from recalign_jax.training import log, steering

Params = Any
Batch = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class FitOptions:
    """How a baseline is trained: by AdamW (Loshchilov and Hutter 2019), without decay Adam, at a constant rate.

    Attributes:
      learning_rate: of all steps.
      weight_decay: of all parameters, times the learning rate.
      epochs: at most so many.
      eval_period: epochs between two evaluations on the validation split; the last one is always evaluated.
      patience: after so many evaluations without a better one the training ends.
      averaging: what is evaluated and kept is a moving average of the parameters after every step, in which a step
        weighs 1/e of one that is so many epochs newer, and at first all weigh the same (after Polyak and Juditsky
        1992); 0 for the last parameters.
    """

    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    epochs: int = 200
    eval_period: int = 1
    patience: int = 10
    averaging: float = 0.0

    def __post_init__(self) -> None:
        check_kinds(self)
        check_least(self, 1, "epochs", "eval_period", "patience")
        check_least(self, 0, "averaging", "weight_decay")
        if not self.learning_rate > 0:
            raise InputError(f"{type(self).__name__}.learning_rate is {self.learning_rate}: must be above 0.")


class Run(NamedTuple):
    """Where a training goes, and what makes it this one."""

    model_dir: str
    seed: int
    identity: dict[str, Any]  # what must not change when it is resumed; JSON


class State(NamedTuple):
    """What a checkpoint holds: the average as its parameters, the rest as state of the optimizer."""

    average: Params
    params: Params
    optimizer: Any


class Problem(NamedTuple):
    """What is trained. All that is random comes from what these are handed, so that a resumed run repeats nothing."""

    init: Callable[[jax.Array], Params]  # of a key
    loss: Callable[[Params, Batch, jax.Array], tuple[jax.Array, jax.Array]]  # of a batch: sum, and number of summands
    batches: Callable[[int], Iterable[Batch]]  # of an epoch, from 1; all of one shape
    validate: Callable[[Params], dict[str, float]]  # metrics by names that begin with `validation_`
    metric: str  # the one of these that chooses the epoch


def fit(problem: Problem, options: FitOptions, run: Run) -> Params:
    """Trains, from the newest whole checkpoint in `run.model_dir` if there is one.

    The directory is that of `recalign train`, with epochs for steps: `metrics.jsonl`, `checkpoints/`, `best.json`.
    Options that are no part of the identity may let a resumed run train on, but not end where it is past already.

    Args:
      problem: what is trained.
      options: how.
      run: where to, and as which run.

    Returns:
      The parameters of the epoch that was best on the validation split.

    Raises:
      InputError: when the checkpoint there belongs to another run, or to one that was trained longer.
      RunError: when a loss or validation metric is no finite number, or a checkpoint can't be written.
    """
    start = time.monotonic()
    optimizer = optax.adamw(options.learning_rate, weight_decay=options.weight_decay)

    def initialize(key: jax.Array) -> State:
        params = problem.init(key)
        return State(jax.tree.map(jnp.copy, params), params, optimizer.init(params))

    @partial(jax.jit, donate_argnums=0)
    def step(state: State, batch: Batch, key: jax.Array, number: int, share: float) -> tuple[State, jax.Array]:
        def mean(params: Params) -> tuple[jax.Array, jax.Array]:
            total, count = problem.loss(params, batch, jax.random.fold_in(key, number))
            return total / jnp.maximum(count, 1), jnp.stack([total, count])

        gradients, sums = jax.grad(mean, has_aux=True)(state.params)
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        average = optax.incremental_update(params, state.average, share)
        return State(average, params, optimizer_state), sums

    # ---------------------------------------------------------------- the newest checkpoint, or a new run
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    key = jax.random.key(run.seed)
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), jax.eval_shape(initialize, key)
    )
    checkpoints = checkpointing.open_checkpoints(run.model_dir, keep=1)

    def check(metadata: dict[str, Any]) -> None:
        checkpointing.check_identity(metadata, run.identity, run.model_dir)
        check_length(metadata["records"], problem.metric, options, run.model_dir)

    with contextlib.closing(checkpoints):
        found = checkpointing.restore_newest(checkpoints, shapes.average, shapes[1:], check)
        if found:
            epoch, records, state = found.step, found.metadata["records"], State(found.params, *found.optimizer)
            start -= found.metadata.get("seconds", 0.0)  # as if it had never stopped
            terminal.say(f"Resuming {run.model_dir} after epoch {epoch}.")
        else:
            epoch, records, state = 0, [], jax.jit(initialize)(key)

        # ------------------------------------------------------------ the loop
        with (
            contextlib.closing(log.RunLog(run.model_dir, records)) as run_log,
            terminal.progress("train", options.epochs, "epochs", done=epoch) as advance,
        ):
            while epoch < options.epochs and not steering.ends(run_log.records, problem.metric, options.patience):
                epoch += 1
                of_epoch = jax.random.fold_in(key, epoch)
                batches, parts = list(problem.batches(epoch)), []
                share = -np.expm1(-1 / (options.averaging * len(batches))) if options.averaging else 1.0
                for number, batch in enumerate(batches):
                    so_far = (epoch - 1) * len(batches) + number
                    state, part = step(state, batch, of_epoch, number, max(share, 1 / (so_far + 1)))
                    parts.append(part)
                total, count = np.asarray(jax.device_get(parts), np.float64).sum(axis=0)
                if not count:
                    raise InputError("There is nothing to train on: no user has an item to be told from others.")
                record = {"loss": float(total / count)}
                check_finite(record, epoch, options)
                if epoch % options.eval_period and epoch != options.epochs:
                    advance()
                    continue
                record |= problem.validate(state.average)
                check_finite(record, epoch, options)
                run_log.write(epoch, record)
                steering.write_best(run_log.records, problem.metric, run.model_dir)
                # A copy of the records: they are written while the next epoch runs.
                metadata = {
                    "identity": run.identity,
                    "records": list(run_log.records),
                    "seconds": time.monotonic() - start,
                }
                checkpointing.save(checkpoints, epoch, state.average, state[1:], metadata)
                advance(note=f"loss {record['loss']:.4f}, {problem.metric} {record[problem.metric]:.4f}")
        checkpointing.finish(checkpoints)
    params, best = saved.load_params(f"{run.model_dir}/{locations.BEST}", shapes.average)
    terminal.say(f"Trained for {epoch} epochs; the best by {problem.metric} is {best}.")
    return params


def training_seconds(model_dir: str) -> float:
    """How long a training took up to its newest checkpoint, all its parts if it was interrupted and resumed."""
    newest = locations.folder_of(model_dir, locations.steps(model_dir)[0])
    return saved.read_metadata(newest).get("seconds", 0.0)


def check_length(records: Sequence[Mapping[str, Any]], metric: str, options: FitOptions, model_dir: str) -> None:
    """Raises InputError when a training went on where options with fewer epochs or less patience would have ended."""
    epoch, name = records[-1]["step"], type(options).__name__
    before = (records[:count] for count in range(len(records)))
    if epoch > options.epochs or any(steering.ends(part, metric, options.patience) for part in before):
        raise InputError(
            f"{model_dir} was trained for {epoch} epochs, longer than {name}.epochs = {options.epochs} and "
            f"{name}.patience = {options.patience} allow. Set them back, or train in another folder."
        )


def check_finite(record: Mapping[str, float], epoch: int, options: FitOptions) -> None:
    """Raises RunError when a loss or metric is no finite number."""
    for name, value in record.items():
        if not np.isfinite(value):
            rate = f"{type(options).__name__}.learning_rate"
            raise RunError(f"The {name} of epoch {epoch} is {value}: try a smaller {rate}, in another folder.")


def ranking_validation(corpus: Corpus, of_params: Callable[[Params], Scores]) -> Callable[[Params], dict[str, float]]:
    """Parameters -> recall and NDCG @10 on the validation split, all items ranked, without those of the history."""
    # All users, whatever is set for the evaluation that follows: the epoch that is chosen belongs to the run.
    queries = retrieval.evaluation_queries(corpus, "validation", EvaluationOptions(max_users=None))
    targets = np.asarray([query.target for query in queries], np.int32)
    excluded = [query.history for query in queries]

    def validate(params: Params) -> dict[str, float]:
        parts = list(scores.recommender(of_params(params), corpus.num_items)(queries, excluded))
        chosen, items = (np.concatenate([part[place] for part in parts]) for place in (0, 1))
        values = metrics.retrieval_values(items, targets[chosen], (10,))
        return {f"validation_{name}": float(np.mean(values[name])) for name in ("recall@10", "ndcg@10")}

    return validate

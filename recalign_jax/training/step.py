"""The train step: one pure function of (state, batch), and its evaluation twin."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import gin
import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from recalign_jax import partitioning
from recalign_jax.errors import InputError, check_kinds, check_number
from recalign_jax.model import lora, t5
from recalign_jax.model.config import T5Config
from recalign_jax.model.lora import LoraOptions
from recalign_jax.training import losses
from recalign_jax.training.optimizer import state_specs

Batch = dict[str, jax.Array]
Sums = dict[str, jax.Array]


@gin.configurable
@dataclasses.dataclass(frozen=True)
class StepOptions:
    """What a step computes, beside model and optimizer.

    Attributes:
      z_loss: coefficient of the z-loss.
      gradient_accumulation: microbatches that a batch is cut into, one after the other; the step is that of the batch.
      logits_chunks: parts of the target positions, of which one part's logits exist at a time.

    Raises:
      InputError: for values of another kind, a negative z-loss, and other numbers below 1.
    """

    z_loss: float = 1e-4
    gradient_accumulation: int = 1
    logits_chunks: int = 1

    def __post_init__(self) -> None:
        check_kinds(self)
        check_number("Z_LOSS", self.z_loss)
        for name in ("gradient_accumulation", "logits_chunks"):
            if getattr(self, name) < 1:
                raise InputError(f"{name.upper()} is {getattr(self, name)}: must be at least 1.")


def check_divides(options: StepOptions, batch_size: int, target_length: int, mesh: Mesh) -> None:
    """Raises InputError when a batch can't be cut as the options and the mesh say."""
    partitioning.check_batch_size("BATCH_SIZE", batch_size, mesh, options.gradient_accumulation)
    if target_length % options.logits_chunks:
        raise InputError(
            f"LOGITS_CHUNKS is {options.logits_chunks}: must divide the targets of TASK_FEATURE_LENGTHS, "
            f"{target_length}."
        )


class TrainState(NamedTuple):
    """All that a step changes: its number (int32 scalar), trained parameters, and the optimizer's state."""

    step: jax.Array
    params: Any
    opt_state: optax.OptState


def abstract_state(
    config: T5Config,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    lora_options: LoraOptions = LoraOptions(),  # noqa: B008 (frozen)
) -> tuple[Callable[[jax.Array], TrainState], TrainState]:
    """The state of a new run.

    Args:
      config: of the model.
      optimizer: from `make_optimizer`.
      mesh: from `make_mesh`.
      lora_options: a rank above 0 makes the parameters adapters of the model's.

    Returns:
      (key -> state, to be jitted with the shardings of the other; the state's `jax.ShapeDtypeStruct`s).
    """

    def initialize(key: jax.Array) -> TrainState:
        if lora_options.rank:
            params = lora.init_adapters(t5.abstract_params(config), lora_options, key)
        else:
            params = t5.init_params(config, key)
        return TrainState(jnp.int32(0), params, optimizer.init(params))

    shapes = jax.eval_shape(initialize, jax.random.key(0))
    return initialize, jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        state_shardings(shapes, optimizer, mesh),
    )


def state_shardings(state: TrainState, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """How a train state is laid out over the mesh; `state` is arrays or their shapes."""
    specs = partitioning.param_specs(state.params, mesh)
    tree: Any = (PartitionSpec(), specs, state_specs(optimizer, state.params, specs))
    named = jax.tree.map(lambda spec: NamedSharding(mesh, spec), tree, is_leaf=lambda x: isinstance(x, PartitionSpec))
    return TrainState(*named)


def jit_train_step(step: Callable[..., tuple[TrainState, Sums]], state: TrainState, mesh: Mesh) -> Any:
    """The step of `make_train_step` under jit, for states laid out as `state`, which it takes over (donation)."""
    shardings = partitioning.shardings_of(state)
    return jax.jit(
        partitioning.on_mesh(step, mesh),
        in_shardings=(shardings, partitioning.batch_sharding(mesh), None),
        out_shardings=(shardings, None),
        donate_argnums=0,
    )


def jit_eval_step(step: Callable[[Any, Batch], Sums], mesh: Mesh) -> Any:
    """The step of `make_eval_step` under jit, for parameters laid out over the mesh."""
    return jax.jit(partitioning.on_mesh(step, mesh), in_shardings=(None, partitioning.batch_sharding(mesh)))


def loss_sums(
    graphdef: nnx.GraphDef, params: Any, batch: Batch, options: StepOptions, num_tasks: int, dropout_key: Any
) -> tuple[jax.Array, Sums]:
    """The weighted loss of a packed batch, and the sums that make its metrics, see `losses.summed`.

    `dropout_key` None: no dropout. The first alone has a gradient.
    """
    model = nnx.merge(graphdef, params)
    hidden = model.hidden(
        batch["encoder_input_tokens"],
        batch["decoder_input_tokens"],
        batch["encoder_segment_ids"],
        batch["decoder_segment_ids"],
        dropout_key,
    )  # [B, T, D]

    def of_tokens(embeddings: jax.Array, hidden: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = t5.logits(model.config, hidden, embeddings)
        logits = partitioning.constrain(logits, "batch", None, "vocab")  # [B, t, V]
        return losses.cross_entropy(logits, targets, options.z_loss)

    total, entropy, z = losses.in_chunks(
        of_tokens,
        options.logits_chunks,
        model.output_embeddings(),
        hidden,
        batch["decoder_target_tokens"],
        batch["decoder_loss_weights"],
    )
    return total, losses.summed(batch, entropy, z, num_tasks)


def make_train_step(
    graphdef: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    options: StepOptions,
    num_tasks: int,
    seed: int,
    lora_options: LoraOptions = LoraOptions(),  # noqa: B008 (frozen)
) -> Callable[..., tuple[TrainState, Sums]]:
    """Returns the step `(state, batch, base=None) -> (state, sums)`.

    With a base, the state's parameters are adapters of it (see `lora.merge`), and the base stays as it is. Dropout
    depends on the seed, the step's number and the microbatches alone.
    """

    def train_step(state: TrainState, batch: Batch, base: Any = None) -> tuple[TrainState, Sums]:
        # The rbg generator costs a fraction of threefry's time on TPU and GPU; but every device draws all rows' noise.
        dropout_key = jax.random.fold_in(jax.random.key(seed, impl="rbg"), state.step)

        weight = jnp.sum(batch["decoder_loss_weights"])

        def loss(params: Any, rows: Batch, key: jax.Array) -> tuple[jax.Array, Sums]:
            """The share of some rows in the mean loss of the batch."""
            whole = lora.merge(base, params, lora_options)
            total, sums = loss_sums(graphdef, whole, rows, options, num_tasks, key)
            return total / weight, sums

        gradients, sums = accumulated(
            jax.grad(loss, has_aux=True), state.params, batch, dropout_key, options.gradient_accumulation
        )
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        sums["gradient_norm"] = optax.tree.norm(gradients)
        sums["steps"] = jnp.float32(1)
        finite = jnp.isfinite(sums["loss"]) & jnp.isfinite(sums["gradient_norm"])
        sums["nonfinite"] = 1.0 - finite.astype(jnp.float32)
        return TrainState(state.step + 1, params, opt_state), sums

    return train_step


def accumulated(
    gradients_and_sums: Callable[[Any, Batch, jax.Array], Any], params: Any, batch: Batch, key: jax.Array, parts: int
) -> Any:
    """The sum of `gradients_and_sums(params, rows, key)` over microbatches of B / parts rows, each with its own key."""
    if parts == 1:
        return gradients_and_sums(params, batch, key)
    # Microbatch i takes the rows i, i + parts, ...: each device has its share of every one, so that none moves.
    rows = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0), batch)
    inputs = (rows, jax.random.split(key, parts))

    def add(total: Any, part: tuple[Batch, jax.Array]) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, gradients_and_sums(params, *part)), None

    shapes = jax.eval_shape(lambda: gradients_and_sums(params, *jax.tree.map(lambda x: x[0], inputs)))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    return jax.lax.scan(add, zeros, inputs)[0]


def make_eval_step(graphdef: nnx.GraphDef, num_tasks: int, logits_chunks: int = 1) -> Callable[[Any, Batch], Sums]:
    """Returns `(params, batch) -> sums` without dropout and z-loss."""
    options = StepOptions(z_loss=0.0, logits_chunks=logits_chunks)

    def eval_step(params: Any, batch: Batch) -> Sums:
        return loss_sums(graphdef, params, batch, options, num_tasks, None)[1]

    return eval_step

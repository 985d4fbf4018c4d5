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
    """

    z_loss: float = 1e-4


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
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    return jax.jit(
        step,
        in_shardings=(shardings, partitioning.batch_sharding(mesh), None),
        out_shardings=(shardings, None),
        donate_argnums=0,
    )


def loss_and_sums(
    graphdef: nnx.GraphDef, params: Any, batch: Batch, z_loss: float, num_tasks: int, dropout_key: jax.Array | None
) -> tuple[jax.Array, Sums]:
    """The mean loss of a packed batch, and the sums it is made of (see `losses.summed`)."""
    logits = nnx.merge(graphdef, params)(
        batch["encoder_input_tokens"],
        batch["decoder_input_tokens"],
        batch["encoder_segment_ids"],
        batch["decoder_segment_ids"],
        dropout_key,
    )  # [B, T, V]
    entropy, z = losses.cross_entropy(logits, batch["decoder_target_tokens"], z_loss)
    sums = losses.summed(batch, entropy, z, num_tasks)
    return (sums["loss"] + sums["z_loss"]) / sums["weight"], sums


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
    depends on the seed and the step's number alone.
    """

    def train_step(state: TrainState, batch: Batch, base: Any = None) -> tuple[TrainState, Sums]:
        # The rbg generator costs a fraction of threefry's time on TPU and GPU.
        dropout_key = jax.random.fold_in(jax.random.key(seed, impl="rbg"), state.step)

        def loss(params: Any) -> tuple[jax.Array, Sums]:
            whole = lora.merge(base, params, lora_options)
            return loss_and_sums(graphdef, whole, batch, options.z_loss, num_tasks, dropout_key)

        gradients, sums = jax.grad(loss, has_aux=True)(state.params)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        sums["gradient_norm"] = optax.tree.norm(gradients)
        sums["steps"] = jnp.float32(1)
        return TrainState(state.step + 1, params, opt_state), sums

    return train_step


def make_eval_step(graphdef: nnx.GraphDef, num_tasks: int) -> Callable[[Any, Batch], Sums]:
    """Returns `(params, batch) -> sums` without dropout and z-loss."""

    def eval_step(params: Any, batch: Batch) -> Sums:
        return loss_and_sums(graphdef, params, batch, 0.0, num_tasks, None)[1]

    return eval_step

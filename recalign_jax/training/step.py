"""The train step: one pure function of (state, batch), and its evaluation twin."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from recalign_jax.model import lora
from recalign_jax.model.lora import LoraOptions
from recalign_jax.training import losses

Batch = dict[str, jax.Array]
Sums = dict[str, jax.Array]


class TrainState(NamedTuple):
    """All that a step changes: its number (int32 scalar), trained parameters, and the optimizer's state."""

    step: jax.Array
    params: Any
    opt_state: optax.OptState


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
    z_loss: float,
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
            return loss_and_sums(graphdef, whole, batch, z_loss, num_tasks, dropout_key)

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

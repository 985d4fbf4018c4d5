"""The optimizer and its learning rate, by name, for gin."""

from typing import Any

import gin
import jax
import optax
from jax import numpy as jnp
from jax.sharding import PartitionSpec

from recalign_jax.errors import InputError, check_choice, check_number
from recalign_jax.training.adafactor import Factored, adafactor, factored_specs, path_name

# The last part of the paths of parameters that weight decay leaves alone: norms, biases and embeddings.
NOT_DECAYED = ("scale", "bias", "embedding", "rel_embedding")
SCHEDULES = ("constant", "inverse_sqrt", "linear_warmup_cosine", "linear_warmup_linear_decay")


@gin.configurable
def make_schedule(
    kind: str = "constant", learning_rate: float = 1e-3, warmup_steps: int = 0, total_steps: int | None = None
) -> optax.Schedule:
    """The learning rate as a function of the number of updates done.

    Args:
      kind: one of SCHEDULES. `inverse_sqrt` is T5's, learning_rate / sqrt(max(step, warmup_steps)), flat at
        first (Raffel et al. 2020, section 3.1.2). The others rise linearly from 0 to `learning_rate` at
        `warmup_steps`, then stay, or fall to 0 at `total_steps` along half a cosine or a line.
      learning_rate: see `kind`.
      warmup_steps: see `kind`; 0 for none.
      total_steps: the length of the run; only the two that fall need it.

    Raises:
      InputError: for an unknown kind, what is no number or below 0, or steps that don't fit together.
    """
    check_choice("make_schedule.kind", kind, SCHEDULES)
    check_number("make_schedule.learning_rate", learning_rate)
    check_number("make_schedule.warmup_steps", warmup_steps, whole=True)
    if total_steps is not None:
        check_number("make_schedule.total_steps", total_steps, whole=True)
    if kind == "inverse_sqrt":
        return lambda step: learning_rate / jnp.sqrt(jnp.maximum(step, max(warmup_steps, 1)))
    if kind == "constant":
        schedule = optax.constant_schedule(learning_rate)
    elif total_steps is None or total_steps <= warmup_steps:
        raise InputError(
            f"make_schedule.total_steps is {total_steps}; {kind} needs more than its {warmup_steps} warmup_steps."
        )
    elif kind == "linear_warmup_cosine":
        schedule = optax.cosine_decay_schedule(learning_rate, total_steps - warmup_steps)
    else:
        schedule = optax.linear_schedule(learning_rate, 0.0, total_steps - warmup_steps)
    if warmup_steps == 0:
        return schedule
    return optax.join_schedules([optax.linear_schedule(0.0, learning_rate, warmup_steps), schedule], [warmup_steps])


@gin.configurable
def adamw(
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: float,
    weight_decay_mask: Any,
    b1: float = 0.9,
    b2: float = 0.999,
) -> optax.GradientTransformation:
    """optax's AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101)."""
    return optax.adamw(learning_rate, b1=b1, b2=b2, weight_decay=weight_decay, mask=weight_decay_mask)


OPTIMIZERS = {"adafactor": adafactor, "adamw": adamw}


@gin.configurable
def make_optimizer(
    name: str = "adafactor",
    schedule: optax.ScalarOrSchedule = 1e-3,
    weight_decay: float = 0.0,
    max_gradient_norm: float | None = None,
) -> optax.GradientTransformation:
    """The optimizer of a run; `update` needs the parameters. Details are set as `adafactor.beta1`, `adamw.b2`, ....

    Args:
      name: one of OPTIMIZERS.
      schedule: the learning rate, or a function of the number of updates done (`make_schedule`).
      weight_decay: an update also subtracts learning rate * weight_decay * parameter, for all but NOT_DECAYED.
      max_gradient_norm: gradients with a greater global norm are first scaled down to it; None for no clipping.

    Raises:
      InputError: for an unknown name, and for what is no number or below 0.
    """
    check_choice("make_optimizer.name", name, OPTIMIZERS)
    check_number("make_optimizer.weight_decay", weight_decay)
    if not callable(schedule):
        check_number("make_optimizer.schedule", schedule)
    if max_gradient_norm is not None:
        check_number("make_optimizer.max_gradient_norm", max_gradient_norm)
        if not max_gradient_norm:
            raise InputError("make_optimizer.max_gradient_norm is 0, so nothing would be learned: None doesn't clip.")
    optimizer = OPTIMIZERS[name](schedule, weight_decay=weight_decay, weight_decay_mask=decayed)
    if max_gradient_norm is None:
        return optimizer
    return optax.chain(optax.clip_by_global_norm(max_gradient_norm), optimizer)


def handed_schedule() -> optax.Schedule | None:
    """The learning rate that gin hands `make_optimizer`, by updates done; None if it hands none."""
    rate = gin.get_bindings(make_optimizer).get("schedule")
    return rate if rate is None or callable(rate) else optax.constant_schedule(rate)


def decayed(params: Any) -> Any:
    """A tree of bool like `params`: whether weight decay applies."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: path_name(path).rsplit("/", 1)[-1] not in NOT_DECAYED, params
    )


def state_specs(optimizer: optax.GradientTransformation, params: Any, specs: Any) -> Any:
    """How to lay out the optimizer's state over the mesh: each statistic as the axes of its parameter that it keeps.

    Args:
      optimizer: from `make_optimizer`.
      params: the parameters, or their shapes.
      specs: their PartitionSpecs, a tree like `params`.

    Returns:
      A tree of PartitionSpecs like `optimizer.init(params)`; counters are replicated.
    """

    def leaf(statistic: Any, parameter: Any, spec: PartitionSpec, path: str) -> Any:
        return factored_specs(path, parameter.shape, spec) if isinstance(statistic, Factored) else spec

    state = jax.eval_shape(optimizer.init, params)
    paths = jax.tree_util.tree_map_with_path(lambda path, _: path_name(path), params)
    return optax.tree_utils.tree_map_params(
        optimizer,
        leaf,
        state,
        params,
        specs,
        paths,
        transform_non_params=lambda _: PartitionSpec(),
        is_leaf=lambda node: isinstance(node, Factored),
    )

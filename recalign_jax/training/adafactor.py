"""Adafactor (Shazeer and Stern 2018, arXiv:1804.04235) as T5X runs it, for layers stacked in one array.

T5X gives every kernel of every layer statistics of its own. Here the layers of a stack share an array
[layers, ...], and so do their statistics, but no mean is ever taken over `layers`. `leaf_axes` says which axis of a
parameter is which.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import gin
import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

# A parameter has one leading axis more for each part of its path that is named here.
STACKED = ("layers",)


class LeafAxes(NamedTuple):
    """The axes of one parameter, in order: stacked, rows, columns. Vectors and scalars have no rows."""

    stacked: tuple[int, ...]
    rows: tuple[int, ...]
    columns: tuple[int, ...]


class Factored(NamedTuple):
    """Means of the squared gradients of a factored parameter."""

    row: jax.Array  # [*stacked, *rows], mean over the columns
    column: jax.Array  # [*stacked, *columns], mean over the rows


class AdafactorState(NamedTuple):
    """`moments` has the parameters' tree: a Factored for each factored one, else an array of its shape. All float32."""

    step: jax.Array  # int32 [], updates done
    moments: Any


def leaf_axes(path: str, shape: tuple[int, ...]) -> LeafAxes:
    """Which axes of the parameter `path` (its names joined by `/`) are stacked, rows and columns.

    Raises:
      ValueError: for a parameter of more than two axes.
    """
    stacked = sum(part in STACKED for part in path.split("/"))
    axes = tuple(range(stacked, len(shape)))
    if len(axes) > 2:
        raise ValueError(f"Adafactor: {path}, of shape {shape}, is no matrix; which of its axes are rows isn't known.")
    rows = 1 if len(axes) == 2 else 0
    return LeafAxes(tuple(range(stacked)), axes[:rows], axes[rows:])


def path_name(path: jax.tree_util.KeyPath) -> str:
    """A key path of a tree of parameters as names joined by `/`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def factored_specs(path: str, shape: tuple[int, ...], spec: PartitionSpec) -> Factored:
    """The statistics' PartitionSpecs, in a Factored, of a factored parameter that is laid out by `spec`."""
    axes = leaf_axes(path, shape)
    entries = [*spec, *[None] * (len(shape) - len(spec))]
    row, column = ([entries[axis] for axis in axes.stacked + kept] for kept in (axes.rows, axes.columns))
    return Factored(PartitionSpec(*row), PartitionSpec(*column))  # type: ignore[arg-type]


@gin.configurable
def adafactor(
    learning_rate: optax.ScalarOrSchedule,
    decay_rate: float = 0.8,
    beta1: float | None = None,
    multiply_by_parameter_scale: bool = True,
    clipping_threshold: float | None = 1.0,
    epsilon1: float = 1e-30,
    epsilon2: float = 1e-3,
    min_dim_size_to_factor: int = 128,
    weight_decay: float = 0.0,
    weight_decay_mask: Callable[[Any], Any] | None = None,
) -> optax.GradientTransformation:
    """T5X's Adafactor, with T5X's defaults. `update` needs the parameters.

    Args:
      learning_rate: a number, or a function of the number of updates done. 1e-3 is T5X's for fine-tuning.
      decay_rate: update t = 1, 2, ... decays the statistics by 1 - t ** -decay_rate.
      beta1: decay of a momentum, a float32 array a parameter; None for none.
      multiply_by_parameter_scale: whether the learning rate is relative to the parameter's RMS.
      clipping_threshold: an update with a greater RMS is scaled down to it; None for no clipping.
      epsilon1: added to squared gradients.
      epsilon2: the least parameter scale.
      min_dim_size_to_factor: a matrix with fewer rows or columns gets a statistic for every element. T5X's rules
        by axis name don't count for matrices, only this size does: relative position biases are small anyway.
      weight_decay: an update also subtracts learning rate * weight_decay * parameter. This is T5X's
        `weight_decay_rate` with a `weight_decay_rate_lr_exponent` of 1.
      weight_decay_mask: from parameters to a tree of bool, True where weights decay; None for everywhere, as T5X.
    """
    parts = [
        _scale_by_adafactor(
            decay_rate, multiply_by_parameter_scale, clipping_threshold, epsilon1, epsilon2, min_dim_size_to_factor
        ),
        optax.scale_by_learning_rate(learning_rate),
    ]
    if beta1 is not None:
        # After the learning rate, as in T5X: a step keeps the rate that it was made with.
        parts.append(optax.ema(beta1, debias=False, accumulator_dtype=jnp.float32))
    if weight_decay:
        rate = learning_rate if callable(learning_rate) else optax.constant_schedule(learning_rate)
        parts.append(optax.add_decayed_weights(lambda count: -weight_decay * rate(count), weight_decay_mask))
    return optax.chain(*parts)


def _scale_by_adafactor(
    decay_rate: float,
    multiply_by_parameter_scale: bool,
    clipping_threshold: float | None,
    epsilon1: float,
    epsilon2: float,
    min_dim_size_to_factor: int,
) -> optax.GradientTransformation:
    """Gradients to updates that lack only the learning rate."""

    def is_factored(axes: LeafAxes, shape: tuple[int, ...]) -> bool:
        sizes = [math.prod(shape[axis] for axis in kept) for kept in (axes.rows, axes.columns)]
        return bool(axes.rows) and min(sizes) >= min_dim_size_to_factor

    def init_leaf(path: jax.tree_util.KeyPath, parameter: jax.Array) -> Factored | jax.Array:
        shape = parameter.shape
        axes = leaf_axes(path_name(path), shape)
        if not is_factored(axes, shape):
            return jnp.zeros(shape, jnp.float32)
        row, column = ([shape[axis] for axis in axes.stacked + kept] for kept in (axes.rows, axes.columns))
        return Factored(jnp.zeros(row, jnp.float32), jnp.zeros(column, jnp.float32))

    def update_leaf(
        decay: jax.Array,
        path: jax.tree_util.KeyPath,
        parameter: jax.Array,
        gradient: jax.Array,
        moment: Factored | jax.Array,
    ) -> tuple[jax.Array, Factored | jax.Array]:
        axes = leaf_axes(path_name(path), parameter.shape)
        gradient = gradient.astype(jnp.float32)
        square = jnp.square(gradient) + epsilon1
        new: Factored | jax.Array
        if isinstance(moment, Factored):
            new = Factored(
                _decayed(moment.row, jnp.mean(square, axes.columns), decay),
                _decayed(moment.column, jnp.mean(square, axes.rows), decay),
            )
            # Algorithm 4: the estimate of the second moment is row * column / mean(row).
            mean = jnp.mean(new.row, axes.rows, keepdims=True)
            row_factor = jnp.expand_dims((new.row / mean) ** -0.5, axes.columns)
            update = gradient * row_factor * jnp.expand_dims(new.column**-0.5, axes.rows)
        else:
            new = _decayed(moment, square, decay)  # Algorithm 5
            update = gradient * new**-0.5
        if clipping_threshold is not None:  # section 6
            update /= jnp.maximum(1.0, _rms(update, axes) / clipping_threshold)
        if multiply_by_parameter_scale:  # section 8
            update *= jnp.maximum(_rms(parameter.astype(jnp.float32), axes), epsilon2)
        return update, new

    def init(params: Any) -> AdafactorState:
        return AdafactorState(jnp.zeros([], jnp.int32), jax.tree_util.tree_map_with_path(init_leaf, params))

    def update(gradients: Any, state: AdafactorState, params: Any = None) -> tuple[Any, AdafactorState]:
        if params is None:
            raise ValueError("Adafactor: update needs params, the current parameters.")
        decay = 1.0 - (state.step + 1.0) ** -decay_rate  # section 7.2; 0 for the first update
        both = jax.tree_util.tree_map_with_path(functools.partial(update_leaf, decay), params, gradients, state.moments)
        updates, moments = (jax.tree.map(lambda _, pair, part=part: pair[part], params, both) for part in (0, 1))
        return updates, AdafactorState(optax.safe_increment(state.step), moments)

    return optax.GradientTransformation(init, update)


def _decayed(old: jax.Array, new: jax.Array, decay: jax.Array) -> jax.Array:
    return decay * old + (1.0 - decay) * new


def _rms(x: jax.Array, axes: LeafAxes) -> jax.Array:
    """Root mean square over the matrix of each layer, [*stacked, 1, ...]."""
    return jnp.sqrt(jnp.mean(jnp.square(x), axes.rows + axes.columns, keepdims=True))

"""Packing: several samples a row, told apart by segment ids, a whole window of samples at a time."""

from collections.abc import Sequence

import jax
import numpy as np

LOSS_NORMALIZATIONS = ("samples", "tokens")
# What a batch is made of, [R, L] and [R, T]: T5X's names.
ARRAYS = (
    *("encoder_input_tokens", "encoder_segment_ids"),
    *("decoder_input_tokens", "decoder_target_tokens", "decoder_segment_ids"),
    *("decoder_task_ids", "decoder_loss_weights"),
)


def batch_shapes(batch_size: int, input_length: int, target_length: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of what `pack` gives, for `batch_size` rows."""
    sides = {"encoder": input_length, "decoder": target_length}
    dtypes = {"decoder_loss_weights": np.float32}
    return {
        name: jax.ShapeDtypeStruct((batch_size, sides[name.split("_")[0]]), dtypes.get(name, np.int32))
        for name in ARRAYS
    }


def assign_rows(sizes: np.ndarray, capacity: np.ndarray) -> np.ndarray:
    """First-fit decreasing over two sizes at once.

    Args:
      sizes: input and target length of each sample, int [n, 2].
      capacity: of a row, [2]; no sample may be larger.

    Returns:
      The row of each sample, int [n]; rows are numbered from zero without gaps.
    """
    order = np.argsort(-(sizes / capacity).max(axis=1), kind="stable")
    free = np.zeros((len(sizes), 2), np.int64)
    row_of = np.empty(len(sizes), np.int64)
    used = 0
    for sample in order:
        size = sizes[sample]
        fits = (free[:used, 0] >= size[0]) & (free[:used, 1] >= size[1])
        row = int(fits.argmax()) if used else 0
        if not used or not fits[row]:
            row = used
            free[row] = capacity
            used += 1
        free[row] -= size
        row_of[sample] = row
    return row_of


def pack(
    inputs: Sequence[np.ndarray],
    targets: Sequence[np.ndarray],
    tasks: np.ndarray,
    input_length: int,
    target_length: int,
    loss_normalization: str,
) -> dict[str, np.ndarray]:
    """Packs samples into as few rows as first-fit decreasing finds.

    Args:
      inputs: token ids of each sample's input, [n] of [l].
      targets: token ids of each sample's target, [n] of [t].
      tasks: number of each sample's task, int [n].
      input_length: L of a row.
      target_length: T of a row.
      loss_normalization: `samples`: the weights of a sample's target tokens sum to one, so that a sample
        counts once however long its target; `tokens`: every target token weighs one.

    Returns:
      Arrays of R rows in T5X's names: `encoder_input_tokens`, `encoder_segment_ids` [R, L];
      `decoder_input_tokens`, `decoder_target_tokens`, `decoder_segment_ids`, `decoder_task_ids`,
      `decoder_loss_weights` (float32) [R, T]. Segments count from one; 0 is padding.

    Raises:
      ValueError: when a sample is longer than a row.
    """
    input_sizes = np.fromiter(map(len, inputs), np.int64, len(inputs))
    target_sizes = np.fromiter(map(len, targets), np.int64, len(targets))
    sizes = np.stack([input_sizes, target_sizes], axis=1)
    capacity = np.asarray([input_length, target_length])
    if (sizes > capacity).any():
        raise ValueError(f"a sample of {sizes.max(axis=0)} tokens doesn't fit into a row of {capacity}")
    row_of = assign_rows(sizes, capacity)
    rows = int(row_of.max()) + 1 if len(row_of) else 0

    # Samples in order of row; `start_*` is where each begins in its row, `segment` its number there.
    order = np.argsort(row_of, kind="stable")
    row, sizes = row_of[order], sizes[order]
    first = np.searchsorted(row, row)
    before = np.cumsum(sizes, axis=0) - sizes
    starts = before - before[first]
    segment = np.arange(len(order)) - first + 1

    def scatter(values: np.ndarray, side: int, length: int, dtype: type) -> np.ndarray:
        out: np.ndarray = np.zeros(rows * length, dtype)
        out[places(side, length)] = values
        return out.reshape(rows, length)

    def places(side: int, length: int) -> np.ndarray:
        within = np.arange(sizes[:, side].sum()) - np.repeat(before[:, side], sizes[:, side])
        return np.repeat(row * length + starts[:, side], sizes[:, side]) + within

    flat_inputs = np.concatenate([inputs[i] for i in order]) if len(order) else np.zeros(0, np.int32)
    flat_targets = np.concatenate([targets[i] for i in order]) if len(order) else np.zeros(0, np.int32)
    # Decoder inputs are the targets one place later, each segment beginning with 0.
    shifted = np.concatenate([[0], flat_targets[:-1]]) if len(flat_targets) else flat_targets
    shifted[before[:, 1][sizes[:, 1] > 0]] = 0
    weight = 1.0 / np.maximum(sizes[:, 1], 1) if loss_normalization == "samples" else np.ones(len(order))
    lengths_in, lengths_out = sizes[:, 0], sizes[:, 1]
    return {
        "encoder_input_tokens": scatter(flat_inputs, 0, input_length, np.int32),
        "encoder_segment_ids": scatter(np.repeat(segment, lengths_in), 0, input_length, np.int32),
        "decoder_input_tokens": scatter(shifted, 1, target_length, np.int32),
        "decoder_target_tokens": scatter(flat_targets, 1, target_length, np.int32),
        "decoder_segment_ids": scatter(np.repeat(segment, lengths_out), 1, target_length, np.int32),
        "decoder_task_ids": scatter(np.repeat(tasks[order], lengths_out), 1, target_length, np.int32),
        "decoder_loss_weights": scatter(np.repeat(weight, lengths_out), 1, target_length, np.float32),
    }

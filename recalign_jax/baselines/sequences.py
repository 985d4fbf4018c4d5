"""Training sequences as packed rows: every item with the one after it, several users a row."""

from collections.abc import Iterator

import numpy as np

from recalign_jax.corpus.corpus import Corpus
from recalign_jax.training import packing

# Users that are packed together: enough for full rows, few enough to be fast.
WINDOW = 2048
ARRAYS = {
    "encoder_input_tokens": "items",
    "decoder_target_tokens": "targets",
    "encoder_segment_ids": "segments",
}


def batches(corpus: Corpus, length: int, rows: int, random: np.random.Generator) -> Iterator[dict[str, np.ndarray]]:
    """Every pair of an item and the next one in the training parts, once, in random order.

    A training part with more than `length` pairs is cut into pieces of at most that many, at places that `random`
    moves from epoch to epoch.

    Args:
      corpus: the corpus.
      length: L of a row.
      rows: R of a batch; the last one is filled up with empty rows.
      random: what to draw from.

    Returns:
      `items` and `targets` int32 [R, L], -1 where there is nothing; `segments` int32 [R, L]: which pieces stand in
      a row, from 1, each in consecutive places; 0 where there is nothing.
    """
    users = range(corpus.num_users)
    pieces = [piece for user in users for piece in cut(corpus.training_sequence(user), length, random)]
    pieces = [pieces[number] for number in random.permutation(len(pieces))]
    windows = []
    for start in range(0, len(pieces), WINDOW):
        some = pieces[start : start + WINDOW]
        # Packing takes 0 for padding.
        inputs, targets = [piece[:-1] + 1 for piece in some], [piece[1:] + 1 for piece in some]
        tasks = np.zeros(len(some), np.int64)
        packed = packing.pack(inputs, targets, tasks, length, length, "tokens")
        windows.append({new: packed[old] for old, new in ARRAYS.items()})
    table = {name: np.concatenate([window[name] for window in windows]) for name in ARRAYS.values()}
    table["items"] -= 1
    table["targets"] -= 1
    order = random.permutation(len(table["items"]))
    for start in range(0, len(order), rows):
        chosen = order[start : start + rows]
        missing = ((0, rows - len(chosen)), (0, 0))
        yield {
            name: np.pad(array[chosen], missing, constant_values=0 if name == "segments" else -1)
            for name, array in table.items()
        }


def cut(sequence: np.ndarray, length: int, random: np.random.Generator) -> list[np.ndarray]:
    """Pieces of at most `length` + 1 items, each but the first beginning with the last item of the one before."""
    pairs = len(sequence) - 1
    if pairs < 1:
        return []
    if pairs <= length:
        return [sequence]
    first = int(random.integers(1, length + 1))
    ends = [*range(first, pairs, length), pairs]
    return [sequence[start : end + 1] for start, end in zip([0, *ends], ends, strict=False)]

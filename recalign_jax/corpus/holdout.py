"""Leave-one-out by position: the one place that says which interaction belongs to which split.

Of a user's n interactions in time order, the last is the test target, the one before it the validation target,
and the rest are for training. The history of a target is all that stands before it, so the test history holds
the validation item. A user with fewer than three interactions cannot give both targets and something to train
on: all of theirs are for training, and they are never evaluated.
"""

import numpy as np

from recalign_jax import errors

MIN_INTERACTIONS = 3
SPLITS = ("train", "validation", "test")
HELD_OUT = SPLITS[1:]
_FROM_END = {"validation": 2, "test": 1}


def training_lengths(lengths: np.ndarray) -> np.ndarray:
    """Returns how many of each user's interactions, from the oldest on, are for training: int64 [U] to [U]."""
    return np.where(lengths >= MIN_INTERACTIONS, lengths - 2, lengths)


def target_positions(lengths: np.ndarray, split: str) -> np.ndarray:
    """Returns the position in the sequence of the target of `split` ("validation" or "test").

    Args:
      lengths: int64 [E], lengths of the sequences, each at least MIN_INTERACTIONS.
      split: InputError if it is another one.
    """
    if split not in _FROM_END:
        raise errors.InputError(f"No split {split!r} holds targets; there are validation and test.")
    return lengths - _FROM_END[split]


def random_parts(num_interactions: int) -> np.ndarray:
    """Returns the part of each interaction in a fixed random 8:1:1 split: uint8 [N], a position in SPLITS.

    The usual protocol of rating prediction. It cuts across leave-one-out, so no mixture may hold both.
    """
    order = np.random.default_rng([0, 811]).permutation(num_interactions)
    parts = np.zeros(num_interactions, np.uint8)
    tenth = num_interactions // 10
    parts[order[:tenth]] = 1
    parts[order[tenth : 2 * tenth]] = 2
    return parts

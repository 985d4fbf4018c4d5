"""A sample is a pure function of (task, split, index, epoch, seed), in numpy over pre-tokenized pieces.

No sample depends on the one before it, so the trainer finds sample n of a run by arithmetic, and SeqIO maps
over indices. Which examples there are is `examples`' to say; their random parts (windows, masks, negatives) are drawn
in `next_items` and `windows`; how they are written is `writing`'s.
"""

import zlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from recalign_jax.corpus import holdout
from seqio_tasks import examples, next_items, windows, writing
from seqio_tasks.specs import TaskSpec
from seqio_tasks.writing import NO_LIMITS, Limits, Sample


def num_examples(spec: TaskSpec, split: str) -> int:
    """Number of examples of a split; one epoch of training."""
    return _FAMILIES[spec.family].num_examples(spec, split)


def render(spec: TaskSpec, split: str, index: int, epoch: int = 0, seed: int = 0, limits: Limits = NO_LIMITS) -> Sample:
    """Writes one example.

    Args:
      spec: the task.
      split: one of `holdout.SPLITS`.
      index: 0 .. num_examples - 1.
      epoch: changes the random parts of training examples; held-out examples are the same in all.
      seed: of the run.
      limits: whole oldest items are dropped, fewer items masked and fewer candidates shown, until the sample fits.
        In training the target is always among the candidates shown; of held-out candidates, whose order is random,
        the first ones that fit are shown, be the target among them or not.

    Returns:
      The tokens. They exceed `limits` only where these are below `shortest_row`.
    """
    family = zlib.crc32(spec.family.encode())  # families don't share their draws
    where = (seed & 0xFFFFFFFF, epoch << 32 | index)
    if split != "train":
        where = (holdout.SPLITS.index(split) << 32, index)
    random = np.random.Generator(np.random.Philox(key=[where[0] ^ family << 32, where[1]]))
    return _FAMILIES[spec.family].render(spec, split, index, random, limits)


def shortest_row(spec: TaskSpec) -> dict[str, int]:
    """Tokens that a row must hold so that the question, one item, and its answer always fit."""
    return _FAMILIES[spec.family].shortest_row(spec)


def write_history(spec: TaskSpec, query: examples.Query, limit: int = writing.NO_LIMIT) -> np.ndarray:
    """The retrieval prompt for a history: int32 [L], with end of sequence, at most `limit` tokens."""
    return writing.history_prompt(spec, writing.held_out_wording(spec), query.history, query.user, limit)


def write_choice(
    spec: TaskSpec, query: examples.Query, candidates: np.ndarray, limit: int = writing.NO_LIMIT
) -> np.ndarray:
    """The ranking prompt for a history and candidates, of which the first ones that fit are shown: int32 [L]."""
    return next_items.choice_prompt(spec, writing.held_out_wording(spec), query, candidates, limit)


def shows(spec: TaskSpec, query: examples.Query, candidates: np.ndarray, limit: int) -> tuple[bool, bool]:
    """Whether `write_choice` has room for all candidates, and for all of the history that HISTORY_LENGTH allows."""
    return next_items.shows(spec, writing.held_out_wording(spec), query, candidates, limit)


def write_rating(spec: TaskSpec, query: examples.RatedQuery, limit: int = writing.NO_LIMIT) -> np.ndarray:
    """The prompt for the rating of `query.target`: int32 [L]."""
    return next_items.rating_prompt(spec, writing.held_out_wording(spec), query, limit)


class _Family(NamedTuple):
    num_examples: Callable[[TaskSpec, str], int]
    render: Callable[[TaskSpec, str, int, np.random.Generator, Limits], Sample]
    shortest_row: Callable[[TaskSpec], dict[str, int]]


_CHOICE = _Family(next_items.num_next, next_items.choice, next_items.shortest_choice)
_RATING = _Family(next_items.num_rating, next_items.rating, next_items.shortest_rating)
_FAMILIES = {
    "retrieval": _Family(next_items.num_next, next_items.retrieval, next_items.shortest_retrieval),
    "ranking": _CHOICE,
    "bpr": _CHOICE,
    "rating": _RATING,
    "rating_random": _RATING,
    "mim": _Family(windows.num_windows, windows.mim, windows.shortest_mim),
    "mlm": _Family(windows.num_windows, windows.mlm, windows.shortest_mlm),
}

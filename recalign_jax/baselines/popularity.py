"""The most popular items for everyone: the floor that every recommender must stand above."""

import dataclasses
import math

import gin
import numpy as np

from recalign_jax import terminal
from recalign_jax.baselines.scores import Scores
from recalign_jax.corpus.corpus import Corpus
from recalign_jax.errors import InputError, check_kinds


@gin.configurable
@dataclasses.dataclass(frozen=True)
class PopularityOptions:
    """What counts.

    Attributes:
      newest: the share of the interactions in training that counts, newest first by their timestamps; 1 is all time.
    """

    newest: float = 1.0

    def __post_init__(self) -> None:
        check_kinds(self)
        if not 0 < self.newest <= 1:
            raise InputError(f"PopularityOptions.newest is {self.newest}: give a share above 0, at most 1.")


def make(corpus: Corpus, options: PopularityOptions) -> Scores:
    """Scores items by how often they occur in the training parts."""
    popularity = counts(corpus, options).astype(np.float32)
    return lambda queries: np.broadcast_to(popularity, (len(queries), len(popularity)))


def counts(corpus: Corpus, options: PopularityOptions) -> np.ndarray:
    """How often each item occurs among the newest interactions in training: int64 [I].

    A timestamp counts as a whole: with the last interaction that the share lets in, all others of its timestamp. Where
    the source has no times but the places of the interactions within their users, "newest" means nothing; a warning
    says so.
    """
    timestamps, items = corpus.timestamps[corpus.in_training], corpus.items[corpus.in_training]
    if options.newest < 1 and _are_places(corpus):
        terminal.warn(
            f"The timestamps of {corpus.name} are the places of the interactions within their users, not times: "
            f"PopularityOptions.newest = {options.newest} counts the users' last interactions."
        )
    first = len(timestamps) - math.ceil(options.newest * len(timestamps))
    earliest = np.partition(timestamps, first)[first]
    return np.bincount(items[timestamps >= earliest], minlength=corpus.num_items)


def _are_places(corpus: Corpus) -> bool:
    """Whether every user's timestamps count on from one number, as 0, 1, 2 or 1, 2, 3."""
    places = np.arange(corpus.num_interactions) - np.repeat(corpus.user_offsets[:-1], corpus.lengths)
    return bool(np.all(corpus.timestamps - places == corpus.timestamps[0]))

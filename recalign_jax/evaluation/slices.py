"""Parts of the users of a result: by the length of their history, and by how popular their target is."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from recalign_jax import metrics
from recalign_jax.evaluation.results import Result
from recalign_jax.metrics import Estimate

# Fact -> name of a part -> the least that belongs to it; the next part begins where it ends. The history is the whole
# one, not what a prompt shows of it; popularity is interactions in training.
PARTS = {
    "history_length": {"0": 0, "1-4": 1, "5-9": 5, "10-19": 10, "20-49": 20, "50+": 50},
    "target_popularity": {"unseen": 0, "1-4": 1, "5-19": 5, "20-99": 20, "100+": 100},
}


class Slice(NamedTuple):
    """Some rows of a result, and its main metrics over them."""

    fact: str
    name: str
    rows: np.ndarray  # int64 [n]
    estimates: dict[str, Estimate]


def slices(result: Result) -> Iterator[Slice]:
    """The parts by every fact; each row is in one part by each. Parts that nobody is in are left out."""
    for fact, parts in PARTS.items():
        part_of = np.searchsorted(list(parts.values()), result.facts[fact], side="right") - 1
        for number, name in enumerate(parts):
            rows = np.flatnonzero(part_of == number)
            if len(rows):
                values = {metric: result.values[""][metric][rows] for metric in result.main}
                yield Slice(fact, name, rows, metrics.estimates(values))

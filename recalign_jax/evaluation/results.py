"""What the evaluators share: which examples count, and a result as columns with a row a user.

Metrics are computed from the columns of all users at once. The rows that fill up a batch never come here: whoever
answers queries drops them, and `gather` holds that every query was answered once.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import gin
import jax
import numpy as np

from recalign_jax import metrics, terminal
from recalign_jax.corpus.corpus import Corpus
from recalign_jax.corpus.holdout import HELD_OUT
from recalign_jax.errors import InputError, check_kinds
from recalign_jax.metrics import Estimate
from seqio_tasks.examples import Query, RatedQuery


@gin.configurable
@dataclasses.dataclass(frozen=True)
class EvaluationOptions:
    """What is evaluated.

    Attributes:
      filter_history: in retrieval, drop the items of the user's whole history from the ranked list for the figures
        without suffix. Figures without the filter are always there too, as `recall@10_unfiltered`.
      cutoffs: the K of retrieval's metrics, as recall@K, each once and in order; 10 is among them, which slices and
        reports show. Lists are as long as the last one says.
      max_users: evaluate only so many users: the first ones, which are a random sample, as users are numbered at random
        (those that `--extend` brought come last); of `rating_random` so many ratings, drawn at random, always the same.
        None for all.
    """

    filter_history: bool = True
    cutoffs: tuple[int, ...] = (5, 10)
    max_users: int | None = None

    def __post_init__(self) -> None:
        check_kinds(self)
        whole = all(isinstance(k, int) and k > 0 for k in self.cutoffs)
        if not whole or 10 not in self.cutoffs or list(self.cutoffs) != sorted(set(self.cutoffs)):
            raise InputError(
                f"CUTOFFS is {self.cutoffs}: give numbers of items in order, 10 among them, as (5, 10, 20)."
            )
        if self.max_users is not None and self.max_users < 1:
            raise InputError(f"The number of users to evaluate is {self.max_users}; give at least 1, or None for all.")


@dataclasses.dataclass(frozen=True)
class Result:
    """What an evaluation found; all arrays have a row a user (of `rating_random` a row a rating).

    Attributes:
      family: `retrieval`, `ranking` or `rating`.
      facts: what a row is about, and what was answered: `user` and `target` as numbers of the corpus,
        `history_length`, `target_popularity` (interactions in training; of `rating_random` in its own training part),
        and more; [N], or [N, k] for `items`.
      values: metrics by what ends their names, as "_unfiltered", and by name; float32 [N] each.
      main: the metrics that slices show, of `values[""]`.
      overall: numbers that are of all rows together, and not a mean over them.
      rows_of: what there is a row of each.
    """

    family: str
    facts: dict[str, np.ndarray]
    values: dict[str, dict[str, Any]]
    main: tuple[str, ...]
    overall: dict[str, float] = dataclasses.field(default_factory=dict)
    rows_of: str = "users"

    def __len__(self) -> int:
        return len(self.facts["user"])


def check_split(split: str) -> None:
    """Raises InputError when a split holds nothing to evaluate on."""
    if split not in HELD_OUT:
        raise InputError(f"SPLIT is {split!r}: evaluations are on {' or '.join(HELD_OUT)}.")


def num_evaluated(corpus: Corpus, split: str, held_out: int, options: EvaluationOptions) -> int:
    """How many of the examples that a split holds out are evaluated.

    Raises:
      InputError: when the split is none of HELD_OUT, or holds nothing.
    """
    check_split(split)
    if held_out == 0:
        raise InputError(f"Corpus {corpus.name} has no user with three interactions: nothing can be held out.")
    return min(held_out, options.max_users or held_out)


def gather(answers: Iterable[tuple[np.ndarray, ...]], count: int, what: str) -> list[np.ndarray]:
    """Puts answers in the order of their queries, and shows progress.

    Args:
      answers: parts (which queries [b], array [b, ...], ...), in any order.
      count: the number of queries.
      what: for the progress.

    Returns:
      The arrays after the first one, each [count, ...].
    """
    parts = []
    with terminal.progress(what, count, "users") as advance:
        for part in answers:
            parts.append(part)
            advance(len(part[0]))
    chosen, *arrays = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.argsort(chosen)
    assert np.array_equal(chosen[order], np.arange(count)), "every query is answered once"
    return [array[order] for array in arrays]


def facts(
    corpus: Corpus, queries: Sequence[Query] | Sequence[RatedQuery], popularity: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """What is known of queries before they are answered; see `Result.facts`.

    Args:
      corpus: what they are of.
      queries: the queries.
      popularity: interactions in training of each item, int64 [I]; None for the corpus's, of leave-one-out.
    """
    popularity = corpus.training_popularity if popularity is None else popularity
    target = np.asarray([query.target for query in queries], np.int32)
    return {
        "user": np.asarray([query.user for query in queries], np.int32),
        "target": target,
        "history_length": np.asarray([len(query.history) for query in queries], np.int32),
        "target_popularity": popularity[target],
    }


def ordered(values: Mapping[str, jax.Array], names: Sequence[str]) -> dict[str, Any]:
    """Some of the metrics that a compiled function gave (which sorts their names), as numpy's float32 [N]."""
    return {name: np.asarray(values[name]) for name in names}


def estimates(values: Mapping[str, Mapping[str, Any]]) -> dict[str, Estimate]:
    """The mean of every metric with its 95 % bootstrap interval over the rows, by whole name."""
    return {
        name + ending: estimate
        for ending, columns in values.items()
        for name, estimate in metrics.estimates(columns).items()
    }

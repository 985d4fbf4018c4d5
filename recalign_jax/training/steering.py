"""Which evaluation was the best, and when to stop early: functions of the run's log, so that a resumed run agrees."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from recalign_jax.checkpoint import locations
from recalign_jax.errors import RunError, did_you_mean

# Metrics that are better when they are lower: losses, also of one task, and errors. What stands before, as the name of
# a corpus, may be anything.
LOWER_IS_BETTER = re.compile(r"(?:^|_)(?:loss|loss/.*|(?:rmse|mae)(?:_argmax)?(?:_low|_high)?)$")


def best_evaluation(records: Sequence[Mapping[str, Any]], metric: str) -> tuple[dict[str, Any] | None, int]:
    """The best value of a metric, the first one of equals.

    Args:
      records: the logged steps, in order; those without the metric are no evaluations.
      metric: its name, as `validation_recall@10`.

    Returns:
      (`step`, `metric`, `value` of the best evaluation or None, how many evaluations there were after it).
    """
    sign = -1 if LOWER_IS_BETTER.search(metric) else 1
    evaluations = [record for record in records if metric in record]
    if not evaluations:
        return None, 0
    number = max(range(len(evaluations)), key=lambda n: (sign * evaluations[n][metric], -n))
    best = evaluations[number]
    return {"step": best["step"], "metric": metric, "value": best[metric]}, len(evaluations) - 1 - number


def ends(records: Sequence[Mapping[str, Any]], metric: str | None, patience: int | None) -> bool:
    """Whether `patience` evaluations brought nothing better than one before them; None is endless patience."""
    return metric is not None and patience is not None and best_evaluation(records, metric)[1] >= patience


def write_best(records: Sequence[Mapping[str, Any]], metric: str | None, model_dir: str) -> None:
    """Puts down the best evaluation so far for those who ask for it, after the last record was an evaluation.

    Raises RunError when it did not yield the metric.
    """
    if metric is None or not any(name.startswith("validation_") for name in records[-1]):
        return
    if metric not in records[-1]:
        others = ("_low", "_high", "users")  # of intervals, and counts
        there = [name for name in records[-1] if name.startswith("validation_") and not name.endswith(others)]
        raise RunError(
            f"BEST_METRIC {metric!r} is not among what was evaluated: {', '.join(there)}.{did_you_mean(metric, there)}"
        )
    best, _ = best_evaluation(records, metric)
    if best is not None and jax.process_index() == 0:
        locations.write_best(model_dir, best)

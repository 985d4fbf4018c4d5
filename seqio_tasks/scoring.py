"""Metrics of free decoding, for SeqIO's Evaluator and T5X: text in, numbers out.

They judge what a model writes without help: the best answer alone, and nothing keeps it inside the catalogue. Ranked
lists, candidates and expected ratings are `recalign eval`'s.
"""

import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from seqio_tasks import examples
from seqio_tasks.specs import TaskSpec

Metric = Callable[[Sequence[Any], Sequence[Any]], dict[str, float]]
_SENTINEL = re.compile(r"<extra_id_\d+>")


def postprocess_fn(spec: TaskSpec) -> Callable[..., Any]:
    """Decoded text -> what the metrics of the task compare: a number, spans, or text."""
    return _POSTPROCESS[spec.family]


def metric_fns(spec: TaskSpec) -> list[Metric]:
    """The metrics of a task.

    retrieval, ranking, bpr: `recall@1`, the share of answers that are the right item, and `in_catalogue`, the share
      that are any item. rating: `rmse` and `mae`, where an answer that is no number counts as the mean rating of the
      training parts, and `unreadable`, the share of these. mim: `exact`, the share of answers that are right as a
      whole. mlm: `exact`, and `span_recall`, the share of spans that are right.
    """
    return [_METRICS[spec.family](spec)]


def _text(decoded: str, **unused: Any) -> str:
    del unused
    return " ".join(decoded.split())


def _number(decoded: str, **unused: Any) -> float:
    """A finite number, or NaN."""
    del unused
    try:
        value = float(decoded.strip())
    except ValueError:
        return math.nan
    return value if math.isfinite(value) else math.nan


def _spans(decoded: str, **unused: Any) -> list[str]:
    del unused
    return [" ".join(span.split()) for span in _SENTINEL.split(decoded)[1:]]


def _item_metrics(spec: TaskSpec) -> Metric:
    @functools.cache
    def catalogue() -> frozenset[str]:
        tokens, lengths = spec.catalog.tokens, spec.catalog.lengths
        decoded = (spec.vocabulary.decode(row[: n - 1]) for row, n in zip(tokens, lengths, strict=True))
        return frozenset(_text(text) for text in decoded)

    def items(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
        right = [target == prediction for target, prediction in zip(targets, predictions, strict=True)]
        return {"recall@1": _mean(right), "in_catalogue": _mean([text in catalogue() for text in predictions])}

    return items


def _rating_metrics(spec: TaskSpec) -> Metric:
    @functools.cache
    def middle() -> float:
        ratings = spec.corpus.ratings
        assert ratings is not None
        if spec.family == "rating_random":
            return float(ratings[examples.random_part(spec.corpus, "train")].mean())
        return float(ratings[spec.corpus.in_training].mean())

    def ratings(targets: Sequence[float], predictions: Sequence[float]) -> dict[str, float]:
        answered = [middle() if math.isnan(value) else value for value in predictions]
        errors = [target - answer for target, answer in zip(targets, answered, strict=True)]
        return {
            "rmse": math.sqrt(_mean([error**2 for error in errors])),
            "mae": _mean([abs(error) for error in errors]),
            "unreadable": _mean([math.isnan(value) for value in predictions]),
        }

    return ratings


def _exact_metrics(spec: TaskSpec) -> Metric:
    del spec

    def exact(targets: Sequence[Any], predictions: Sequence[Any]) -> dict[str, float]:
        return {"exact": _mean([a == b for a, b in zip(targets, predictions, strict=True)])}

    return exact


def _span_metrics(spec: TaskSpec) -> Metric:
    whole = _exact_metrics(spec)

    def spans(targets: Sequence[list[str]], predictions: Sequence[list[str]]) -> dict[str, float]:
        right = [
            place < len(answer) and answer[place] == span
            for target, answer in zip(targets, predictions, strict=True)
            for place, span in enumerate(target)
        ]
        return {**whole(targets, predictions), "span_recall": _mean(right)}

    return spans


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


_POSTPROCESS = {
    **dict.fromkeys(("retrieval", "ranking", "bpr", "mim"), _text),
    **dict.fromkeys(("rating", "rating_random"), _number),
    "mlm": _spans,
}
_METRICS = {
    **dict.fromkeys(("retrieval", "ranking", "bpr"), _item_metrics),
    **dict.fromkeys(("rating", "rating_random"), _rating_metrics),
    "mim": _exact_metrics,
    "mlm": _span_metrics,
}

"""Which figures there are of a run's log, of comparisons and of a corpus."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from recalign_jax.corpus.corpus import Corpus
from recalign_jax.corpus.statistics import rating_counts
from recalign_jax.reporting import figures
from recalign_jax.reporting.comparisons import Comparison
from recalign_jax.reporting.figures import Panel, Series
from recalign_jax.reporting.runs import Run

# What is logged besides losses and what begins with `validation_`, and how it is called.
SPEED = {
    "tokens_per_second": "Tokens a second",
    "steps_per_second": "Steps a second",
    "packing_efficiency": "Packing efficiency",
    "input_wait_share": "Share of time waiting for input",
    "mfu": "Model FLOPs utilization",
}
# Of the logged metrics these are drawn, wherever several corpora or families put their names before.
_VALIDATED = re.compile(r"validation_(?!z_)(.+_)?(loss|recall@10|ndcg@10|hr@10|rmse)$")
METRIC_NAMES = {"recall": "Recall", "ndcg": "NDCG", "mrr": "MRR", "hr": "HR", "rmse": "RMSE", "mae": "MAE"}

Find = Callable[[Run], tuple[str, int]]  # label and number of the colour


def metric_name(metric: str) -> str:
    """How a metric is called: `ndcg@10_unfiltered` is "NDCG@10 unfiltered"."""
    first, *rest = re.split(r"(?=[@_])", metric, maxsplit=1)
    return METRIC_NAMES.get(first, first.capitalize()) + "".join(rest).replace("_", " ")


def losses(runs: Sequence[Run], find: Find) -> list[Panel]:
    """Training loss, and that of every task, by steps; of baselines, by epochs."""
    named = [(name, logged_title(name)) for name in _logged(runs) if name == "loss" or name.startswith("loss/")]
    return _panels(runs, find, named, "training")


def validations(runs: Sequence[Run], find: Find) -> list[Panel]:
    """Loss and metrics on the validation split, with intervals where they were logged."""
    return _panels(runs, find, [(name, logged_title(name)) for name in _logged(runs) if _VALIDATED.match(name)], "")


def speeds(runs: Sequence[Run], find: Find) -> list[Panel]:
    """Throughput, packing and waiting."""
    logged = _logged(runs)
    return _panels(runs, find, [(name, title) for name, title in SPEED.items() if name in logged], "", from_zero=True)


def bars(comparison: Comparison, color_of: Callable[[str], int]) -> Panel:
    """The main metric of every row, with its interval or its deviation over seeds."""
    rows = []
    for row in comparison.rows:
        cell = row.cells[comparison.main]
        low, high = cell.ends or (None, None)
        label = f"{row.label} ({row.detail})" if "seeds" in row.detail else row.label
        rows.append((label, color_of(row.label), f"{cell.value:.4f}", cell.value, low, high))
    title = f"{metric_name(comparison.main)}, {heading(comparison)}"
    told = "; ".join(f"{label} {text}" for label, _, text, *_ in rows)
    return Panel(f"bars_{_slug(heading(comparison))}", title, f"Bars. {title}: {told}.", figures.bars(rows))


def slices(comparison: Comparison, color_of: Callable[[str], int]) -> list[Panel]:
    """The main metric by the length of histories and by the popularity of targets."""
    rows = [row for row in comparison.rows if row.slices]
    panels = []
    for fact in dict.fromkeys(fact for row in rows for fact in row.slices):
        by_row = [row.slices.get(fact, {}) for row in rows]
        names = sorted({name for parts in by_row for name in parts}, key=_least)
        counts = {name: max(parts[name][1] for parts in by_row if name in parts) for name in names}
        series = []
        for row, parts in zip(rows, by_row, strict=True):
            there = [n for n, name in enumerate(names) if name in parts]
            cells = [parts[names[n]][0] for n in there]
            ends = [cell.ends or (cell.value, cell.value) for cell in cells]
            low, high = ([end[side] for end in ends] for side in (0, 1))
            series.append(Series(row.label, color_of(row.label), there, [cell.value for cell in cells], low, high))
        title = f"{metric_name(comparison.main)} by {fact.replace('_', ' ')}, {heading(comparison)}"
        marks = [f"{name}\n{counts[name]:,}" for name in names]
        figure = figures.points(series, marks)
        told = f"Points with intervals. {title}. The numbers stand in the table that follows."
        panels.append(Panel(f"slices_{_slug(heading(comparison))}_{fact}", title, told, figure))
    return panels


def of_corpus(corpus: Corpus) -> list[Panel]:
    """Histograms of how many interactions users have, and items in training; and of the ratings."""
    lengths, popularity = corpus.lengths, corpus.training_popularity
    found = [
        _histogram(corpus, "users", "Interactions of a user", lengths, "users"),
        _histogram(corpus, "items", "Interactions of an item in training", popularity, "items"),
    ]
    if corpus.ratings is not None:
        occurring = rating_counts(corpus.ratings)
        names, counts = list(occurring), np.array(list(occurring.values()))
        figure = figures.histogram(counts, names, "rating", "interactions")
        found.append(_counted(f"ratings_{corpus.name}", f"Ratings, {corpus.name}", names, counts, figure))
    return found


def heading(comparison: Comparison) -> str:
    """What is compared, as "retrieval, movielens, test"."""
    return ", ".join(filter(None, (comparison.family, comparison.corpus, comparison.split, comparison.part)))


def _histogram(corpus: Corpus, name: str, title: str, values: np.ndarray, y_name: str) -> Panel:
    """In bins that double, as both are skewed: 0, 1, 2-3, 4-7, ..."""
    bins = np.where(values > 0, np.floor(np.log2(np.maximum(values, 1))) + 1, 0).astype(int)
    first, last = int(bins.min()), int(bins.max())
    counts = np.bincount(bins, minlength=last + 1)[first:]
    edges = [(0, 0), *((2 ** (n - 1), 2**n - 1) for n in range(1, last + 1))][first:]
    names = [f"{low}" if low == high else f"{low}-{high}" for low, high in edges]
    figure = figures.histogram(counts, names, title.lower(), y_name)
    return _counted(f"{name}_{corpus.name}", f"{title}, {corpus.name}", names, counts, figure)


def _counted(name: str, title: str, names: Sequence[str], counts: np.ndarray, figure: Any) -> Panel:
    told = ", ".join(f"{part}: {count:,}" for part, count in zip(names, counts, strict=True))
    return Panel(name, title, f"Histogram. {title}: {told}.", figure)


def _panels(
    runs: Sequence[Run], find: Find, named: Sequence[tuple[str, str]], prefix: str, from_zero: bool = False
) -> list[Panel]:
    """A figure a logged name and unit: steps of the language model, epochs of baselines."""
    panels = []
    for kind, unit in (("train", "steps"), ("baseline", "epochs")):
        for name, title in named:
            series = [one for run in runs if run.kind == kind and len((one := _series(run, name, *find(run))).x)]
            if not series:
                continue
            whole = f"{title}, by {unit}" if kind == "baseline" else title
            ends = "; ".join(f"{one.label} from {one.y[0]:.4g} to {one.y[-1]:.4g}" for one in series)
            slug = _slug(f"{prefix} {name} {'' if kind == 'train' else unit}")
            figure = figures.lines(series, unit, from_zero)
            panels.append(Panel(slug, whole, f"Curves. {whole}: {ends}.", figure))
    return panels


def _series(run: Run, name: str, label: str, color: int) -> Series:
    records = [record for record in run.records if isinstance(record.get(name), int | float)]
    x, y = [record["step"] for record in records], [record[name] for record in records]
    low, high = (
        [record[name + end] for record in records] if all(name + end in record for record in records) else None
        for end in ("_low", "_high")
    )
    return Series(label, color, x, y, low, high)


def _logged(runs: Sequence[Run]) -> list[str]:
    return list(dict.fromkeys(name for run in runs for record in run.records for name in record))


def logged_title(name: str) -> str:
    """How a logged value is called: `validation_loss/shop_mim` is "Validation loss, shop_mim"."""
    split, name = ("Validation ", name.removeprefix("validation_")) if name.startswith("validation_") else ("", name)
    kind, _, task = name.partition("/")
    *before, metric = kind.rsplit("_", 1)
    shown = metric_name(metric) if metric != "loss" else "loss" if split else "Training loss"
    return ", ".join(filter(None, (split + shown, task, *before)))


def _least(part: str) -> int:
    """The least number in a part of `slices`: "unseen" and "0" are 0, "5-9" is 5, "50+" is 50."""
    found = re.match(r"\d+", part)
    return int(found[0]) if found else 0


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")

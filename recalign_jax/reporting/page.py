"""The page: what is known of runs, put into the template. Nothing of it depends on when or where it is made."""

import itertools
import pathlib
import platform
import statistics
import time
from collections.abc import Sequence
from importlib import metadata
from typing import Any, NamedTuple

import jinja2
import markupsafe

from recalign_jax import __version__
from recalign_jax.corpus.corpus import Corpus
from recalign_jax.corpus.statistics import statistics as corpus_statistics
from recalign_jax.errors import InputError
from recalign_jax.evaluation.report import EVALUATION_FILE
from recalign_jax.reporting import comparisons, corpora, curves, figures, recommendations
from recalign_jax.reporting.comparisons import Comparison, Row
from recalign_jax.reporting.figures import Panel
from recalign_jax.reporting.labels import labels_of
from recalign_jax.reporting.runs import Evaluation, Run

_TEMPLATES = pathlib.Path(__file__).parent / "templates"
_LIBRARIES = ("jinja2", "matplotlib", "numpy")


class Page(NamedTuple):
    """The page as HTML, and its figures."""

    html: str
    panels: list[Panel]


def make(runs: Sequence[Run], evaluations: Sequence[Evaluation], named: Sequence[str], data_dir: str | None) -> Page:
    """Writes the page about runs and evaluations.

    Args:
      runs: from `runs.find`.
      evaluations: likewise.
      named: corpora that evaluations may be of, beside those that the runs name.
      data_dir: where corpora are; what can't be had is said on the page.
    """
    found, missing_corpora = corpora.load(runs, evaluations, named, data_dir)
    everything: list[Run | Evaluation] = [*runs, *evaluations]
    of = {one: corpora.corpus_of(one, found) for one in everything}
    labels = labels_of(runs, evaluations, of.__getitem__)
    trained = sorted(runs, key=lambda run: (run.kind != "train", labels[run], run.name))
    ordered = dict.fromkeys([*(labels[run] for run in trained), *sorted(labels.values())])
    color = {label: number for number, label in enumerate(ordered)}
    compared = comparisons.compare(evaluations, labels, of.__getitem__, found)

    def look(run: Run) -> tuple[str, int]:
        return labels[run], color[labels[run]]

    panels = {
        "bars": [curves.bars(one, color.__getitem__) for one in compared],
        "losses": curves.losses(trained, look),
        "validations": curves.validations(trained, look),
        "slices": [panel for one in compared for panel in curves.slices(one, color.__getitem__)],
        "speeds": curves.speeds([run for run in trained if run.kind == "train"], look),
    }
    histograms = [curves.of_corpus(corpus) for corpus in found.values()]
    prompts, missing_prompts = _prompts(trained, labels, data_dir, found)
    shown = {
        "title": _title(runs, evaluations, of),
        "counted": _counted(runs, evaluations),
        "color": {label: number % len(figures.COLORS) for label, number in color.items()},
        "of_runs": [_of_run(run, labels[run]) for run in trained]
        + [_of_counted(e, labels[e], of[e]) for e in evaluations if e.run is None],
        "headlines": [_headline(one) for one in compared],
        "comparisons": compared,
        "sources": comparisons.sources(compared),
        "panels": {section: [_figure(panel) for panel in some] for section, some in panels.items()},
        "speed_names": curves.SPEED,
        "speeds": [(labels[run], run.name, medians) for run in trained if (medians := _medians(run))],
        "corpora": [
            (corpus, _flat(corpus_statistics(corpus)), [_figure(panel) for panel in some])
            for corpus, some in zip(found.values(), histograms, strict=True)
        ],
        "missing_corpora": missing_corpora,
        "prompts": prompts,
        "missing_prompts": missing_prompts,
        "recommended": [part for one in compared if (part := _recommended(one, found))],
        "configured": [run for run in trained if run.config],
        "differences": _differences([run for run in trained if run.kind == "train"]),
        "versions_of_runs": [(labels[run], run.versions) for run in trained if run.versions],
        "versions": [("recalign_jax", __version__), ("Python", platform.python_version())]
        + [(name, metadata.version(name)) for name in _LIBRARIES],
    }
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"metric": curves.metric_name, "logged": curves.logged_title, "heading": curves.heading}
    environment.filters |= {"fixed": _fixed, "count": _count}
    html = environment.get_template("page.html").render(shown)
    return Page(html, [panel for some in (*panels.values(), *histograms) for panel in some])


def _title(runs: Sequence[Run], evaluations: Sequence[Evaluation], of: dict[Any, str]) -> str:
    names = sorted({name for run in runs for name in run.corpora} | {of[one] for one in evaluations if of[one]})
    return f"Recommenders on {', '.join(names)}" if names else "Recommenders"


def _counted(runs: Sequence[Run], evaluations: Sequence[Evaluation]) -> str:
    numbers = [(len(runs), "training"), (len(evaluations), "evaluation")]
    counts = [f"{number} {name}{'s' * (number > 1)}" for number, name in numbers if number]
    newest = max([run.last_written for run in runs] + [_written(one) for one in evaluations])
    return f"{' and '.join(counts)}, the newest of {_utc(newest)} UTC"


def _written(one: Evaluation) -> float:
    return (one.folder / EVALUATION_FILE).stat().st_mtime


def _figure(panel: Panel) -> dict[str, Any]:
    # The figure is ours: matplotlib and ElementTree escape what names and titles bring along.
    return {"name": panel.name, "title": panel.title, "svg": markupsafe.Markup(figures.inline_svg(panel))}


def _of_run(run: Run, label: str) -> dict[str, Any]:
    return {
        "label": label,
        "name": run.name,
        "of": run.mixture or " ".join([run.method, *run.corpora]),
        "seed": run.seed,
        "state": "finished" if run.finished else "not finished",
        "step": run.step,
        "last_step": run.last_step,
        "unit": "steps" if run.kind == "train" else "epochs",
        "best": run.best,
        "written": _utc(run.last_written),
    }


def _of_counted(one: Evaluation, label: str, corpus: str) -> dict[str, Any]:
    """An evaluation whose run isn't there: of a baseline that is counted, or of a model from elsewhere."""
    of = " ".join(filter(None, [one.told.get("method", "evaluation"), corpus]))
    nothing = dict.fromkeys(("step", "last_step", "unit", "best"))
    told = {"label": label, "name": one.name, "of": of, "seed": one.told.get("seed"), "state": "evaluated"}
    return told | nothing | {"written": _utc(_written(one))}


def _headline(comparison: Comparison) -> dict[str, Any]:
    """The best row, and the one that comes next."""
    best, *others = comparison.rows
    return {"comparison": comparison, "best": best, "cell": best.cells[comparison.main], "next": others[:1]}


def _medians(run: Run) -> dict[str, float]:
    found = {name: [record[name] for record in run.records if name in record] for name in curves.SPEED}
    return {name: statistics.median(values) for name, values in found.items() if values and run.kind == "train"}


def _prompts(
    runs: Sequence[Run], labels: dict[Any, str], data_dir: str | None, found: dict[str, Corpus]
) -> tuple[list[tuple[list[str], list[corpora.Samples]]], list[str]]:
    """Samples of every mixture with the labels of its runs, of seeds the first one's; and why others are missing."""
    shown: list[tuple[list[str], list[corpora.Samples]]] = []
    missing: dict[str, None] = {}
    first: dict[str, Run] = {}
    for run in runs:
        if run.kind == "train":
            first.setdefault(labels[run], run)
    for label, run in first.items():
        try:
            drawn = corpora.prompts(run, data_dir, found)
        except (InputError, KeyError, TypeError) as error:  # a configuration of another version has other names
            missing[error.message if isinstance(error, InputError) else f"{run.name}: config.gin lacks {error}."] = None
            continue
        same = next((names for names, samples in shown if samples == drawn), None)
        if same is None:
            shown.append(([label], drawn))
        else:
            same.append(label)
    return shown, list(missing)


def _recommended(
    comparison: Comparison, found: dict[str, Corpus]
) -> tuple[Comparison, Row, list[recommendations.Recommended]] | None:
    corpus, row = found.get(comparison.corpus), recommendations.shown_row(comparison)
    if comparison.family != "retrieval" or corpus is None or row.evaluation is None:
        return None
    if corpora.fingerprint_of(row.evaluation, corpus.name) not in ("", corpus.fingerprint):
        return None
    if not corpora.is_of(row.evaluation, corpus):
        return None
    return comparison, row, recommendations.sample_users(comparison, corpus)


def _differences(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """The settings in which trainings differ, with the value of each; a parameter that a macro sets isn't repeated."""
    names = sorted({name for run in runs for name in run.values}, key=lambda name: ("." in name, name))
    found: dict[tuple[str, ...], str] = {}
    for name in names:
        values = tuple(repr(run.values.get(name)) for run in runs)
        if len(set(values)) > 1 and not name.endswith(("MODEL_DIR", "model_dir")):
            found.setdefault(values, name)
    return [(name, list(values)) for values, name in found.items()]


def _flat(numbers: dict[str, Any]) -> list[tuple[str, Any]]:
    """Statistics as rows; how often each rating occurs is a figure."""
    nested = [
        [(f"{key}: {name}", value) for name, value in part.items()] if isinstance(part, dict) else [(key, part)]
        for key, part in numbers.items()
        if key != "ratings"
    ]
    return [(name.replace("_", " "), value) for name, value in itertools.chain(*nested)]


def _fixed(value: float) -> str:
    return f"{value:.4f}"


def _count(value: float | None) -> str:
    if value is None:
        return "\u2013"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def _utc(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.gmtime(seconds))

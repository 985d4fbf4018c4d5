"""A result as JSON, as values of a training log, as tables, and as a Parquet file with a row a user."""

import json
import math
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np

from recalign_jax import terminal
from recalign_jax.corpus.corpus import Corpus
from recalign_jax.evaluation import results
from recalign_jax.evaluation.results import Result
from recalign_jax.evaluation.slices import slices
from recalign_jax.files import atomic_file, local_folder
from recalign_jax.metrics import Estimate

EVALUATION_FILE = "metrics.json"
FAMILIES = ("retrieval", "ranking", "rating")
# Columns of a table, by what ends the names of the metrics in them.
COLUMNS = {"": "value", "_unfiltered": "unfiltered", "_argmax": "most likely"}


def summary(result: Result) -> dict[str, Any]:
    """Values by name, `users`, `intervals` with [low, high] by name, and `slices` by fact and part; JSON."""
    parts: dict[str, dict[str, Any]] = {}
    for part in slices(result):
        parts.setdefault(part.fact, {})[part.name] = _as_json(part.estimates, len(part.rows))
    overall = {name: None if math.isnan(value) else value for name, value in result.overall.items()}
    return overall | _as_json(results.estimates(result.values), len(result)) | {"slices": parts}


def _as_json(estimates: dict[str, Estimate], count: int) -> dict[str, Any]:
    intervals = {name: [estimate.low, estimate.high] for name, estimate in estimates.items()}
    return {name: estimate.value for name, estimate in estimates.items()} | {"users": count, "intervals": intervals}


def logged(result: Result) -> Iterator[tuple[str, float]]:
    """(name, value) of a result's metrics, with the ends of intervals as `NAME_low` and `NAME_high`, and `users`.

    Retrieval's hr and map are left out: with one target a user they are recall and mrr.
    """
    for name, estimate in results.estimates(result.values).items():
        if result.family == "retrieval" and name.startswith(("hr@", "map@")):
            continue
        yield from ((name, estimate.value), (f"{name}_low", estimate.low), (f"{name}_high", estimate.high))
    yield from ((name, value) for name, value in result.overall.items() if not math.isnan(value))
    yield "users", len(result)


def output_folder(output_dir: str | None) -> pathlib.Path | None:
    """Makes the folder that `publish` writes to: to be called first, as a path that can't be shall cost no evaluation.

    Returns None where nothing is to be written, as in all processes but the first. Raises InputError, and OSError.
    """
    if output_dir is None or jax.process_index() > 0:
        return None
    folder = local_folder("OUTPUT_DIR", output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def publish(
    found: Iterable[tuple[str, Result]], corpus: Corpus, about: dict[str, Any], folder: pathlib.Path | None
) -> dict[str, Any]:
    """Tells results as they come.

    Args:
      found: each result with a title.
      corpus: what they are of.
      about: what else to say in the JSON.
      folder: from `output_folder`; gets `FAMILY.parquet` of every result, and then `metrics.json`. Those of an earlier
        evaluation go when the first result is there, so that a killed one leaves no mixture of both.

    Returns:
      Summaries by family, `about`, and the corpus's `fingerprint`.
    """
    told: dict[str, Any] = {}
    for title, result in found:
        if folder is not None and not told:
            for name in (EVALUATION_FILE, *(f"{family}.parquet" for family in FAMILIES)):
                (folder / name).unlink(missing_ok=True)
        told[result.family] = summary(result)
        show(title, told[result.family], result.rows_of)
        if folder is not None:
            write_users(result, corpus, folder / f"{result.family}.parquet")
    told |= about | {"fingerprint": corpus.fingerprint}
    if folder is not None:
        with atomic_file(folder / EVALUATION_FILE) as aside:
            aside.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    return told


def show(title: str, summary: dict[str, Any], rows_of: str = "users") -> None:
    """Prints a summary: a table of all metrics, and one of the slices; `rows_of` says what there is a row of each."""
    terminal.say(title)
    intervals = summary["intervals"]
    endings = [ending for ending in COLUMNS if any(name.endswith(ending) for name in intervals)]
    rows = [
        [name, *(cell for ending in endings for cell in _cells(summary, name + ending))]
        for name in intervals
        if not name.endswith(tuple(endings[1:]))
    ]
    overall = sorted(summary.keys() - intervals.keys() - {"users", "intervals", "slices"})
    empty = [""] * (2 * len(endings) - 1)
    rows += [[name, f"{summary[name]:.4f}", *empty] for name in overall if summary[name] is not None]
    header = ["", *(cell for ending in endings for cell in (COLUMNS[ending], "95 % interval"))]
    terminal.table(f"All {summary['users']} {rows_of}", header, rows)
    parts = [(fact, name, part) for fact, by_name in summary["slices"].items() for name, part in by_name.items()]
    rows = [
        [f"{fact.replace('_', ' ')} {name}", str(part["users"])]
        + [" ".join(_cells(part, metric)) for metric in part["intervals"]]
        for fact, name, part in parts
    ]
    terminal.table(f"By {rows_of}", ["", rows_of, *parts[0][2]["intervals"]], rows)


def _cells(summary: dict[str, Any], name: str) -> tuple[str, str]:
    return f"{summary[name]:.4f}", "[{:.4f}, {:.4f}]".format(*summary["intervals"][name])


def write_users(result: Result, corpus: Corpus, path: pathlib.Path) -> None:
    """Writes a Parquet file with a row a user (of `rating_random` a rating), whole or not at all.

    Columns are the result's facts, with users and items as ids of the source, and its metrics by name. A rank of a
    target that isn't in the list is null.
    """
    import pyarrow
    from pyarrow import parquet

    columns = {name: _column(name, array, corpus) for name, array in result.facts.items()}
    for ending, values in result.values.items():
        columns |= {name + ending: pyarrow.array(array) for name, array in values.items()}
    with atomic_file(path) as aside:
        parquet.write_table(pyarrow.table(columns), aside)


def _column(name: str, array: np.ndarray, corpus: Corpus) -> Any:
    import pyarrow

    if name == "user":
        return pyarrow.array([corpus.user_source_id(user) for user in array])
    if name == "target":
        return pyarrow.array([corpus.item_source_id(item) for item in array])
    if name == "items":
        return pyarrow.array([[corpus.item_source_id(item) for item in row[row >= 0]] for row in array])
    return pyarrow.array(array, mask=array == 0 if name.startswith("rank") else None)

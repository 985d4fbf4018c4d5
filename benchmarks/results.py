"""Writes docs/results.md and its figures from the folders of benchmarks/study.py and benchmarks/baselines.py.

    python benchmarks/results.py --runs DIR [--baselines DIR] [--split test] [--output docs/results.md]

Every number is read from the folders: metrics.json and the Parquet files with a row a user, and study.json for steps,
tokens and seconds. Rows whose runs aren't there are left out, and claims about them. Figures lie in a folder beside the
page that has its name.
"""

import argparse
import json
import pathlib
import shlex
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from pyarrow import parquet

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from benchmarks import baselines, study
from benchmarks.study_claims import Claim, Table, claims, tables
from recalign_jax.errors import InputError
from recalign_jax.evaluation.report import EVALUATION_FILE
from recalign_jax.files import atomic_file
from recalign_jax.reporting import figures
from recalign_jax.reporting.comparisons import MAIN
from recalign_jax.reporting.curves import metric_name
from recalign_jax.reporting.figures import Panel

# The metrics of tables.
METRICS = baselines.FAMILIES
RESAMPLES = 1000


class Runs(NamedTuple):
    """The runs of a row, one a seed."""

    name: str
    folders: list[pathlib.Path]  # with metrics.json and Parquet files
    told: list[dict[str, Any]]  # metrics.json
    records: list[dict[str, Any]]  # study.json; of a baseline only `seconds`


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", required=True, type=pathlib.Path, help="--output of benchmarks/study.py")
    parser.add_argument("--baselines", type=pathlib.Path, help="--output of benchmarks/baselines.py")
    parser.add_argument("--split", default="test", choices=("validation", "test"))
    parser.add_argument("--output", type=pathlib.Path, default=study.ROOT / "docs" / "results.md")
    args = parser.parse_args()
    page, drawn = render(read(args.runs, args.baselines, args.split), args.split, args.output.stem)
    for name, content in drawn.items():
        with atomic_file(args.output.with_suffix("") / name) as aside:
            aside.write_bytes(content)
    with atomic_file(args.output) as aside:
        aside.write_text(page, encoding="utf-8")
    print(json.dumps({"output": str(args.output), "figures": sorted(drawn)}))


# Reading.


def read(runs: pathlib.Path, conventional: pathlib.Path | None, split: str) -> dict[str, Runs]:
    """All finished runs, by the name of their row (of a baseline CORPUS/ROW)."""
    found = {}
    for name in study.ROWS:
        folders = [folder / split for folder in _seeds(runs / name) if (folder / split / EVALUATION_FILE).is_file()]
        records = [json.loads((folder.parent / study.RECORD).read_text(encoding="utf-8")) for folder in folders]
        if folders:
            found[name] = Runs(name, folders, _told(folders), records)
    names = dict.fromkeys(name for table in tables() for name in table.baselines)
    for name, place in [(name, conventional / split / name) for name in names] if conventional else ():
        folders = [folder for folder in _seeds(place) if (folder / EVALUATION_FILE).is_file()]
        told = _told(folders)
        if folders:
            found[name] = Runs(name, folders, told, [{"seconds": one.get("training_seconds")} for one in told])
    return found


def _seeds(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted((path for path in folder.glob("*") if path.name.isdigit()), key=lambda path: int(path.name))


def _told(folders: Sequence[pathlib.Path]) -> list[dict[str, Any]]:
    return [json.loads((folder / EVALUATION_FILE).read_text(encoding="utf-8")) for folder in folders]


def per_user(runs: Runs, family: str, metric: str) -> tuple[list[str], np.ndarray]:
    """The users, and a metric of each: float64 [seeds, users]."""
    rows = [
        parquet.read_table(folder / f"{family}.parquet", columns=["user", metric]).sort_by("user")
        for folder in runs.folders
    ]
    return rows[0]["user"].to_pylist(), np.asarray([table[metric].to_numpy() for table in rows], np.float64)


# Comparing.


def difference(better: np.ndarray, worse: np.ndarray, finish: Callable[[np.ndarray], np.ndarray], times: float) -> Any:
    """`better` less `times` `worse`, and its 95 % bootstrap interval over users and seeds.

    Users are drawn with replacement, the same ones for both sides (paired); of each side so many seeds as it has.

    Args:
      better: [seeds, users].
      worse: [seeds, users], of the same users.
      finish: what the mean over users becomes, as the root of RMSE.
      times: a factor.

    Returns:
      (difference, low, high).
    """
    random = np.random.default_rng(0)
    users = better.shape[1]
    drawn = []
    for _ in range(RESAMPLES):
        counts = np.bincount(random.integers(users, size=users), minlength=users) / users
        first, second = (finish(side @ counts)[random.integers(len(side), size=len(side))] for side in (better, worse))
        drawn.append(first.mean() - times * second.mean())
    value = finish(better.mean(axis=1)).mean() - times * finish(worse.mean(axis=1)).mean()
    return value, *np.percentile(drawn, [2.5, 97.5])


def judge(claim: Claim, found: dict[str, Runs]) -> tuple[float, float, float, str]:
    """Difference (above 0 where the claim holds), low, high, and `supported`, `contradicted` or `undecided`."""
    lower = claim.metric == "rmse"
    columns = ("mse" if lower else claim.metric, "mse" if lower else claim.other_metric or claim.metric)
    sides = zip((claim.better, claim.worse), columns, strict=True)
    (users, first), (others, second) = (per_user(found[name], claim.family, column) for name, column in sides)
    if users != others:
        raise InputError(f"{claim.better} and {claim.worse} were not evaluated on the same users.")
    if lower:
        value, high, low = (-end for end in difference(first, second, np.sqrt, claim.times))
    else:
        value, low, high = difference(first, second, np.asarray, claim.times)
    verdict = "supported" if low > 0 else "contradicted" if high < 0 else "undecided"
    return value, low, high, verdict


# Writing.


def render(found: dict[str, Runs], split: str, folder: str) -> tuple[str, dict[str, bytes]]:
    """The page as Markdown, and its figures by the names of their files in `folder` beside it."""
    parts, drawn = [_head(found, split), _claims(found)], {}
    for table in tables():
        if not any(name in found for name in table.rows):
            continue
        rows = [found[name] for name in (*table.rows, *table.baselines) if name in found]
        panel = bars(table, rows)
        drawn[f"{panel.name}.svg"] = figures.files(panel)[f"{panel.name}.svg"]
        image = f"![{panel.description}]({folder}/{panel.name}.svg)"
        parts.append(f"## {table.title}\n\n{_table(table, rows)}\n\n{_budget(table, found)}\n\n{image}")
    parts.append(_every_run(found))
    if missing := _missing(found):
        parts.append(f"## Not run yet\n\n{missing}")
    return "\n\n".join(parts) + "\n", drawn


def _head(found: dict[str, Runs], split: str) -> str:
    cores = sorted({record["cores"] for runs in found.values() for record in runs.records if "cores" in record})
    return (
        "# Results\n\nWritten by `benchmarks/results.py` from the runs of `benchmarks/study.py` and "
        "`benchmarks/baselines.py`: no number is typed by hand. Models are small and trained from scratch, on "
        f"{' or '.join('one CPU core' if count == 1 else f'{count} CPU cores' for count in cores)}. Figures "
        f"are of the {split} split, as `docs/protocol.md` says, and of the last checkpoint, or of the one that "
        "validation chose where the list of runs names its step; of a row with several seeds they are mean ± standard "
        "deviation over them, and the best of a column is bold. "
        "Tokens are those of inputs and targets that a row was trained on, without padding. Minutes are wall time of "
        "training with its evaluations, summed over all parts of an interrupted one, whatever else the machine did; of "
        "baselines those of their training alone."
    )


def _claims(found: dict[str, Runs]) -> str:
    lines = [
        "## What the experiments say\n",
        "The difference between two rows on the same users (NDCG@10 unless it says otherwise), above 0 where the "
        f"claim holds, with a 95 % paired bootstrap interval over users and seeds ({RESAMPLES:,} resamples). A claim "
        "is supported if the whole interval is above 0, contradicted if it is below, else undecided. At equal steps a "
        "mixture has fewer samples of each of its tasks than the task alone. Of a row with "
        "one seed the interval knows nothing of the spread over seeds.\n",
        "| claim | difference | 95 % interval | seeds | |\n|---|---|---|---|---|",
    ]
    verdicts: dict[str, list[str]] = {"supported": [], "contradicted": [], "undecided": []}
    for claim in claims():
        if claim.better not in found or claim.worse not in found:
            continue
        value, low, high, verdict = judge(claim, found)
        verdicts[verdict].append(claim.text)
        seeds = " and ".join(str(len(found[name].told)) for name in dict.fromkeys((claim.better, claim.worse)))
        metric = "" if claim.metric == "ndcg@10" else f" ({metric_name(claim.metric)})"
        lines.append(f"| {claim.text}{metric} | {value:+.4f} | [{low:+.4f}, {high:+.4f}] | {seeds} | {verdict} |")
    told = [f"- **{name.capitalize()}:** {'; '.join(texts)}." for name, texts in verdicts.items() if texts]
    return "\n".join([*lines, "", *told])


def _table(table: Table, rows: Sequence[Runs]) -> str:
    metrics = METRICS[table.family]
    figures_of = [{metric: _figures(runs, table.family, metric) for metric in metrics} for runs in rows]
    pick = min if table.family == "rating" else max
    best = {metric: pick(statistics.fmean(row[metric]) for row in figures_of) for metric in metrics}
    header = ["", *map(metric_name, metrics), "seeds", "steps", "tokens, M", "minutes"]
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for runs, row in zip(rows, figures_of, strict=True):
        cells = [runs.name]
        for metric in metrics:
            text = _spread(row[metric])
            cells.append(f"**{text}**" if statistics.fmean(row[metric]) == best[metric] else text)
        cells.append(str(len(runs.told)))
        for name, unit, digits in (("steps", 1, 0), ("tokens", 1e6, 1), ("seconds", 60, 1)):
            values = [record.get(name) for record in runs.records]
            known = [value / unit for value in values if value is not None]
            cells.append(f"{statistics.fmean(known):,.{digits}f}" if known else "-")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _figures(runs: Runs, family: str, metric: str) -> list[float]:
    return [told[family][metric] for told in runs.told]


def _spread(values: Sequence[float]) -> str:
    mean = f"{statistics.fmean(values):.4f}"
    return f"{mean} ± {statistics.stdev(values):.4f}" if len(values) > 1 else mean


def _budget(table: Table, found: dict[str, Runs]) -> str:
    """How far equal steps were equal tokens."""
    records = [record for name in table.rows if name in found for record in found[name].records]
    steps = sorted({record["steps"] for record in records})
    tokens = [record["tokens"] / record["steps"] for record in records if record["tokens"]]
    told = f"Steps of the rows of the study: {', '.join(f'{count:,}' for count in steps)}."
    if not tokens:
        return told
    mean = statistics.fmean(tokens)
    low, high = (100 * (end / mean - 1) for end in (min(tokens), max(tokens)))
    return f"{told} Useful tokens a step: {mean:,.0f} on average, from {low:+.1f} % to {high:+.1f} % of it."


def bars(table: Table, rows: Sequence[Runs]) -> Panel:
    """The main metric of every row, with its deviation over seeds."""
    metric = MAIN[table.family]
    drawn = []
    for runs in rows:
        values = _figures(runs, table.family, metric)
        mean = statistics.fmean(values)
        low, high = (mean + side * statistics.stdev(values) if len(values) > 1 else None for side in (-1, 1))
        color = 1 if runs.name in table.baselines else 0
        drawn.append((runs.name, color, _spread(values), mean, low, high))
    title = f"{metric_name(metric)}: {table.title}"
    told = "; ".join(f"{label} {text}" for label, _, text, *_ in drawn)
    slug = "_".join(table.title.lower().replace(",", "").replace("-", "_").split())
    return Panel(slug, title, f"{title}. {told}", figures.bars(drawn))


def _every_run(found: dict[str, Runs]) -> str:
    lines = ["## Every run\n", "| row | seed | steps | tokens | seconds | |\n|---|---|---|---|---|---|"]
    commands: dict[str, None] = {}
    for name in study.ROWS:
        for told, record in zip(found[name].told, found[name].records, strict=True) if name in found else ():
            family = next(family for family in METRICS if family in told)
            shown = ", ".join(f"{metric_name(metric)} {told[family][metric]:.4f}" for metric in METRICS[family])
            tokens = f"{record['tokens']:,}" if record["tokens"] else "-"
            chosen = f" (chosen: {told['step']:,})" if told["step"] != record["steps"] else ""
            lines.append(
                f"| {name} | {record['seed']} | {record['steps']:,}{chosen} | {tokens} | {record['seconds']:,.0f} | "
                f"{shown} |"
            )
            more = "".join(f" {shlex.quote(binding)}" for binding in record["bindings"])
            file = f"gin_configs/experiments/study_{name}.gin"
            commands[f"recalign train --gin_file {file} --gin.SEED={record['seed']}{more}"] = None
    return "\n".join([*lines, "\n```bash", *commands, "```"])


def _missing(found: dict[str, Runs]) -> str:
    """The seeds of the study's rows that have no finished run."""
    lines = []
    for name, seeds in study.ROWS.items():
        done = {record["seed"] for record in found[name].records} if name in found else set()
        if left := [str(seed) for seed in seeds if seed not in done]:
            lines.append(f"- {name}: {'seeds' if len(left) > 1 else 'seed'} {', '.join(left)}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()

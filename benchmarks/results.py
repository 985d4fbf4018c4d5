"""Writes docs/results.md and its figures from what is kept of benchmarks/study.py and benchmarks/baselines.py.

    python benchmarks/results.py [--runs DIR] [--baselines DIR] [--split test] [--records DIR] [--output FILE]

First keeps the finished runs of --runs and --baselines in RECORDS (benchmarks/study_records.py), and holds the claims
against all that is kept. Every number of the page is read from RECORDS. Rows without runs are left out, and claims
about them. Figures lie in a folder beside the page that has its name.
"""

import argparse
import json
import pathlib
import shlex
import statistics
import sys
from collections.abc import Sequence
from typing import NamedTuple

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from benchmarks import study, study_records, study_verdicts
from benchmarks.study_claims import Table, claims, tables
from benchmarks.study_records import METRICS, RECORDS, Runs
from benchmarks.study_verdicts import Judged
from recalign_jax.evaluation.report import EVALUATION_FILE
from recalign_jax.files import atomic_file
from recalign_jax.reporting import figures
from recalign_jax.reporting.comparisons import MAIN
from recalign_jax.reporting.curves import metric_name
from recalign_jax.reporting.figures import Panel

# What a record says of a run, of what its study.json says.
KEPT = ("bindings", "settings", "cores", "seconds", "steps", "tokens")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=pathlib.Path, help="--output of benchmarks/study.py")
    parser.add_argument("--baselines", type=pathlib.Path, help="--output of benchmarks/baselines.py")
    parser.add_argument("--split", default="test", choices=("validation", "test"), help="of --runs and --baselines")
    parser.add_argument("--records", type=pathlib.Path, default=RECORDS, help="what is kept, of one split")
    parser.add_argument("--output", type=pathlib.Path, default=study.ROOT / "docs" / "results.md")
    args = parser.parse_args()
    kept = keep(args.runs, args.baselines, args.split, args.records)
    found = study_records.read(args.records, known_rows())
    judged = study_verdicts.judge_all(claims(), found, study_verdicts.read_judged(args.records))
    study_verdicts.write_judged(judged, args.records)

    page, drawn = render(found, judged, args.output.stem)
    for name, content in drawn.items():
        with atomic_file(args.output.with_suffix("") / name) as aside:
            aside.write_bytes(content)
    with atomic_file(args.output) as aside:
        aside.write_text(page, encoding="utf-8")
    print(json.dumps({"output": str(args.output), "figures": sorted(drawn), **kept}))


# Keeping.


def known_rows() -> list[str]:
    """The rows of the study, and baselines as CORPUS/ROW."""
    return list(dict.fromkeys([*study.ROWS, *(name for table in tables() for name in table.baselines)]))


def keep(
    runs: pathlib.Path | None, conventional: pathlib.Path | None, split: str, records: pathlib.Path
) -> dict[str, list[str]]:
    """Keeps all finished runs of two folders; returns which are `kept` for the first time, and which `replaced`."""
    told: dict[str, list[str]] = {"kept": [], "replaced": []}
    for name in known_rows():
        is_baseline = "/" in name
        folder = conventional and conventional / split / name if is_baseline else runs and runs / name
        for seed in _seeds(folder) if folder else ():
            evaluated = seed if is_baseline else seed / split
            if not (evaluated / EVALUATION_FILE).is_file():
                continue
            source = evaluated / EVALUATION_FILE if is_baseline else seed / study.RECORD
            ran = json.loads(source.read_text(encoding="utf-8"))
            kept = {"seconds": "training_seconds"} if is_baseline else {part: part for part in KEPT}
            about = {"row": name, "seed": int(seed.name), "split": split}
            about |= {part: ran[source] for part, source in kept.items() if source in ran}
            known = (records / name / f"{seed.name}.json").exists()
            study_records.keep(evaluated, about, records)
            told["replaced" if known else "kept"].append(f"{name}/{seed.name}")
    return told


def _seeds(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted((path for path in folder.glob("*") if path.name.isdigit()), key=lambda path: int(path.name))


# Writing.


def render(found: dict[str, Runs], judged: dict[str, Judged], folder: str) -> tuple[str, dict[str, bytes]]:
    """The page as Markdown, and its figures by the names of their files in `folder` beside it."""
    parts, drawn = [_head(found), _claims(judged, found)], {}
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


def _head(found: dict[str, Runs]) -> str:
    split = " and the ".join(sorted({record["split"] for runs in found.values() for record in runs.records}))
    cores = sorted({record["cores"] for runs in found.values() for record in runs.records if "cores" in record})
    return (
        "# Results\n\nWritten by `benchmarks/results.py` from what is kept of the runs of `benchmarks/study.py` and "
        "`benchmarks/baselines.py` in `docs/results/runs`: no number is typed by hand. A row of the study is called "
        "after its corpus, how items stand in its prompts (`token`: one vocabulary entry each, `id`: the digits of "
        "their number, `title`), and what it is trained on: `retrieval` alone, with MIM or MLM, or `aligned` with "
        "both; `ranking` and `rating` alone or `aligned` with BPR. Models are small and trained "
        f"from scratch, on {' or '.join('one CPU core' if count == 1 else f'{count} CPU cores' for count in cores)}. "
        f"Figures are of the {split} split, as `docs/protocol.md` says, and of the last checkpoint, or of the one that "
        "validation chose where the list of runs names its step; of a row with several seeds they are mean ± standard "
        "deviation over them, and the best of a column is bold. "
        "Tokens are those of inputs and targets that a row was trained on, without padding. Minutes are wall time of "
        "training with its evaluations, summed over all parts of an interrupted one, whatever else the machine did; "
        "of baselines those of their training alone. Runs were made on several machines: minutes don't compare. "
        "Figures of runs without a table of users, and means of baselines without runs, were carried over from an "
        "earlier version of this page, with its four decimals."
    )


def _claims(judged: dict[str, Judged], found: dict[str, Runs]) -> str:
    lines = [
        "## What the experiments say\n",
        "The difference between two rows on the same users (NDCG@10 unless it says otherwise), above 0 where the "
        "claim holds, with a 95 % paired bootstrap interval over users and seeds "
        f"({study_verdicts.RESAMPLES:,} resamples). A claim "
        "is supported if the whole interval is above 0, contradicted if it is below, else undecided. At equal steps a "
        "mixture has fewer samples of each of its tasks than the task alone. Of a row with "
        "one seed the interval knows nothing of the spread over seeds. *Judged earlier*: from figures of users that "
        "are kept no longer, so this can't be repeated from the records.\n",
        "| claim | difference | 95 % interval | seeds | |\n|---|---|---|---|---|",
    ]
    verdicts: dict[str, list[str]] = {"supported": [], "contradicted": [], "undecided": []}
    for claim in (claim for claim in claims() if claim.text in judged):
        one = judged[claim.text]
        verdicts[one.verdict].append(claim.text)
        seeds = " and ".join(map(str, one.seeds if claim.better != claim.worse else one.seeds[:1]))
        metric = "" if claim.metric == "ndcg@10" else f" ({metric_name(claim.metric)})"
        caveat = f" ({claim.caveat})" if claim.caveat else ""
        interval = f"[{one.low:+.4f}, {one.high:+.4f}]"
        kept = study_verdicts.seeds_with_tables(claim, found) == one.seeds
        verdict = one.verdict if kept else f"{one.verdict}, *judged earlier*"
        lines.append(f"| {claim.text}{metric}{caveat} | {one.value:+.4f} | {interval} | {seeds} | {verdict} |")
    told = [f"- **{name.capitalize()}:** {'; '.join(texts)}." for name, texts in verdicts.items() if texts]
    return "\n".join([*lines, "", *told])


def _table(table: Table, rows: Sequence[Runs]) -> str:
    metrics = METRICS[table.family]
    figures_of = [{metric: _spread(runs, table.family, metric) for metric in metrics} for runs in rows]
    pick = min if table.family == "rating" else max
    best = {metric: pick(row[metric].mean for row in figures_of if row[metric]) for metric in metrics}
    header = ["", *map(metric_name, metrics), "seeds", "steps", "tokens, M", "minutes"]
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for runs, row in zip(rows, figures_of, strict=True):
        cells = [runs.name]
        for metric in metrics:
            spread = row[metric]
            text = "-" if spread is None else str(spread)
            cells.append(f"**{text}**" if spread and spread.mean == best[metric] else text)
        cells.append(str(runs.mean["seeds"] if runs.mean else len(runs.records)))
        for name, unit, digits in (("steps", 1, 0), ("tokens", 1e6, 1), ("seconds", 60, 1)):
            values = [record.get(name) for record in ([runs.mean] if runs.mean else runs.records)]
            known = [value / unit for value in values if value is not None]
            cells.append(f"{statistics.fmean(known):,.{digits}f}" if known else "-")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


class Spread(NamedTuple):
    """Mean and standard deviation over seeds; of one seed there is no deviation."""

    mean: float
    deviation: float | None

    def __str__(self) -> str:
        return f"{self.mean:.4f}" if self.deviation is None else f"{self.mean:.4f} ± {self.deviation:.4f}"


def _spread(runs: Runs, family: str, metric: str) -> Spread | None:
    if runs.mean:  # which may lack a metric
        mean, deviation = (runs.mean[part][family].get(metric) for part in ("mean", "deviation"))
        return None if mean is None else Spread(mean, deviation)
    values = [record["metrics"][family][metric] for record in runs.records]
    return Spread(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)


def _budget(table: Table, found: dict[str, Runs]) -> str:
    """How far equal steps were equal tokens."""
    records = [record for name in table.rows if name in found for record in found[name].records]
    steps = sorted({record["steps"] for record in records})
    tokens = [record["tokens"] / record["steps"] for record in records if record["tokens"]]
    told = f"Steps of the rows of the study: {', '.join(f'{count:,}' for count in steps)}."
    if not tokens:
        return told
    mean = statistics.fmean(tokens)
    told = f"{told} Useful tokens a step: {mean:,.0f}"
    if len(tokens) == 1:
        return f"{told}."
    low, high = (100 * (end / mean - 1) for end in (min(tokens), max(tokens)))
    return f"{told} on average, from {low:+.1f} % to {high:+.1f} % of it."


def bars(table: Table, rows: Sequence[Runs]) -> Panel:
    """The main metric of every row, with its deviation over seeds."""
    metric = MAIN[table.family]
    drawn = []
    for runs in rows:
        spread = _spread(runs, table.family, metric)
        assert spread is not None  # the main metric is always there
        ends = (None if spread.deviation is None else spread.mean + side * spread.deviation for side in (-1, 1))
        color = 1 if runs.name in table.baselines else 0
        drawn.append((runs.name, color, str(spread), spread.mean, *ends))
    title = f"{metric_name(metric)}: {table.title}"
    told = "; ".join(f"{label} {text}" for label, _, text, *_ in drawn)
    slug = "_".join(table.title.lower().replace(",", "").replace("-", "_").split())
    return Panel(slug, title, f"{title}. {told}", figures.bars(drawn))


def _every_run(found: dict[str, Runs]) -> str:
    lines = ["## Every run\n", "| row | seed | steps | tokens | seconds | |\n|---|---|---|---|---|---|"]
    commands: dict[str, None] = {}
    for name in study.ROWS:
        for record in found[name].records if name in found else ():
            [metrics] = record["metrics"].values()
            shown = ", ".join(f"{metric_name(metric)} {value:.4f}" for metric, value in metrics.items())
            tokens = f"{record['tokens']:,}" if record["tokens"] else "-"
            chosen = f" (chosen: {record['chosen']:,})" if record["chosen"] != record["steps"] else ""
            lines.append(
                f"| {name} | {record['seed']} | {record['steps']:,}{chosen} | {tokens} | {record['seconds']:,.0f} | "
                f"{shown} |"
            )
            more = "".join(f" {shlex.quote(binding)}" for binding in record["bindings"])
            file = f"gin_configs/experiments/study_{name}.gin"
            place = f"--gin.SEED={record['seed']} --gin.MODEL_DIR=runs/study/{name}/{record['seed']}"
            commands[f"recalign train --gin_file {file} {place}{more}"] = None
    queue = "python benchmarks/study.py --data_dir DIR --output runs/study"
    told = (
        f"\nEach is a training, here, and the `recalign eval` that it ends with; `{queue}` does both for all of them, "
        "and its first lines say which corpora and vocabularies they need.\n\n```bash"
    )
    return "\n".join([*lines, told, *commands, "```"])


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

"""Renders docs/results.md from what is kept of the runs (benchmarks/study_records.py) and how claims were judged."""

import pathlib
import shlex
import statistics
from collections.abc import Sequence

from benchmarks import baselines, study, study_verdicts
from benchmarks.study_claims import Claim, Table, claims, tables
from benchmarks.study_records import METRICS, Runs, spread
from benchmarks.study_verdicts import Judged
from recalign_jax.reporting import figures
from recalign_jax.reporting.comparisons import MAIN
from recalign_jax.reporting.curves import metric_name
from recalign_jax.reporting.figures import Panel

DATA, RUNS = pathlib.Path("DIR"), pathlib.Path("runs/study")  # of the commands on the page


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
        parts += [f"## {table.title}", _table(table, rows), f"{_budget(table, found)} {table.note}".rstrip(), image]
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
        f"both; `ranking` and `rating` alone or `aligned` with BPR. {_model(found)} on "
        f"{' or '.join('one CPU core' if count == 1 else f'{count} CPU cores' for count in cores)}. "
        "Optimizer and learning rate were chosen on validation for retrieval alone on Beauty, items as tokens, and are "
        "those of all rows; baselines were tuned on validation by themselves (`docs/baselines.md`). "
        f"Figures are of the {split} split, as `docs/protocol.md` says, and of the last checkpoint, or of the one that "
        "validation chose where the list of runs names its step; of a row with several seeds they are mean ± standard "
        "deviation over them, and the best of a column is bold. "
        "Tokens are those of inputs and targets that a row was trained on, without padding. Minutes are wall time of "
        "training with its evaluations, summed over all parts of an interrupted one, whatever else the machine did; "
        "of baselines those of their training alone. Runs were made on several machines and at several commits: "
        "minutes don't compare. "
        "† Of this row, or of some of its seeds, no figures of single users are kept: four decimals were carried over "
        "from an earlier version of this page."
    )


def _model(found: dict[str, Runs]) -> str:
    """What is trained, if all rows have the same."""
    settings = [record["settings"] for name in study.ROWS if name in found for record in found[name].records]
    names = ("num_encoder_layers", "num_decoder_layers", "emb_dim")
    sizes = {tuple(about.get(f"T5Config.{name}") for name in names) for about in settings}
    if len(sizes) != 1 or None in (size := sizes.pop()):
        return "Models are small and trained from scratch,"
    encoder, decoder, width = size
    return f"Models are T5s of {encoder} + {decoder} layers of width {width}, trained from scratch"


def _claims(judged: dict[str, Judged], found: dict[str, Runs]) -> str:
    about = [claim for claim in claims() if claim.text in judged]
    lines = [
        "## What the experiments say\n",
        "The difference between two rows on the same users (NDCG@10 unless it says otherwise), above 0 where the "
        "claim holds, with a 95 % paired bootstrap interval over users and seeds "
        f"({study_verdicts.RESAMPLES:,} resamples). A claim "
        "is supported if the whole interval is above 0, contradicted if it is below, else undecided. At equal steps a "
        "mixture has fewer samples of each of its tasks than the task alone. *One seed*: the interval knows nothing of "
        "the spread over seeds of a row with one; verdicts of one seed have changed here as more came. Intervals of "
        "two or three seeds are still short, as a deviation of so few is hardly known. *Judged earlier*: from figures "
        "of users that are kept no longer, so this can't be repeated from the records. Seeds: those with figures of "
        f"single users, of all. There are {len(about)} claims, and nothing is corrected for that.\n",
        "| claim | difference | 95 % interval | seeds | |\n|---|---|---|---|---|",
    ]
    verdicts: dict[str, list[str]] = {"supported": [], "contradicted": [], "undecided": []}
    for claim in about:
        one, marks = judged[claim.text], []
        if study_verdicts.of_one_seed(claim, one):
            marks.append("*one seed*")
        verdicts[one.verdict].append(" ".join([claim.text, *(f"({mark})" for mark in marks)]))
        if study_verdicts.seeds_with_tables(claim, found) != one.seeds:
            marks.append("*judged earlier*")
        seeds = " and ".join(_seeds(claim, one, found))
        metric = "" if claim.metric == "ndcg@10" else f" ({metric_name(claim.metric)})"
        caveat = f" ({claim.caveat})" if claim.caveat else ""
        interval = f"[{one.low:+.4f}, {one.high:+.4f}]"
        verdict = ", ".join([one.verdict, *marks])
        lines.append(f"| {claim.text}{metric}{caveat} | {one.value:+.4f} | {interval} | {seeds} | {verdict} |")
    told = [f"- **{name.capitalize()}:** {'; '.join(texts)}." for name, texts in verdicts.items() if texts]
    return "\n".join([*lines, "", *told])


def _seeds(claim: Claim, judged: Judged, found: dict[str, Runs]) -> list[str]:
    """From how many seeds a claim was judged, of how many if there are more; of one row once."""
    told = []
    for name, count in zip((claim.better, claim.worse), judged.seeds, strict=True):
        there = len(found[name].records) if name in found else count
        told.append(f"{count} of {there}" if there > count else str(count))
    return told[:1] if claim.better == claim.worse else told


def _table(table: Table, rows: Sequence[Runs]) -> str:
    metrics = METRICS[table.family]
    figures_of = [{metric: spread(runs, table.family, metric) for metric in metrics} for runs in rows]
    pick = min if table.family == "rating" else max
    best = {metric: pick(row[metric].mean for row in figures_of if row[metric]) for metric in metrics}
    header = ["", *map(metric_name, metrics), "seeds", "steps", "tokens, M", "minutes"]
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for runs, row in zip(rows, figures_of, strict=True):
        cells = [runs.name if runs.tables and len(runs.tables) == len(runs.records) else f"{runs.name} †"]
        for metric in metrics:
            one = row[metric]
            text = "-" if one is None else str(one)
            cells.append(f"**{text}**" if one and one.mean == best[metric] else text)
        cells.append(str(runs.mean["seeds"] if runs.mean else len(runs.records)))
        for name, unit, digits in (("steps", 1, 0), ("tokens", 1e6, 1), ("seconds", 60, 1)):
            values = [record.get(name) for record in ([runs.mean] if runs.mean else runs.records)]
            known = [value / unit for value in values if value is not None]
            cells.append(f"{statistics.fmean(known):,.{digits}f}" if known else "-")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


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
        one = spread(runs, table.family, metric)
        assert one is not None  # the main metric is always there
        ends = (None if one.deviation is None else one.mean + side * one.deviation for side in (-1, 1))
        color = 1 if runs.name in table.baselines else 0
        drawn.append((runs.name, color, str(one), one.mean, *ends))
    title = f"{metric_name(metric)}: {table.title}"
    told = "; ".join(f"{label} {text}" for label, _, text, *_ in drawn)
    slug = "_".join(table.title.lower().replace(",", "").replace("-", "_").split())
    return Panel(slug, title, f"{title}. {told}", figures.bars(drawn))


def _every_run(found: dict[str, Runs]) -> str:
    lines = ["## Every run\n", "| row | seed | steps | tokens | seconds | |\n|---|---|---|---|---|---|"]
    commands: list[str] = []
    of_baselines = [row.place for row in baselines.rows() if row.place in found]
    for name in (*study.ROWS, *of_baselines):
        for record in found[name].records if name in found else ():
            shown = ", ".join(
                f"{metric_name(metric)} {value:.4f}"
                for family in record["metrics"].values()
                for metric, value in family.items()
            )
            steps, tokens, seconds = (
                "-" if record.get(part) is None else f"{record[part]:,.0f}" for part in ("steps", "tokens", "seconds")
            )
            if name in study.ROWS and record["chosen"] != record["steps"]:
                steps += f" (chosen: {record['chosen']:,})"
            lines.append(f"| {name} | {record['seed']} | {steps} | {tokens} | {seconds} | {shown} |")
    for name in study.ROWS:
        for record in found[name].records[:1] if name in found else ():
            job = study.make_job(name, record["seed"], DATA, RUNS, record["split"], record["bindings"])
            commands += [shlex.join(job.train), shlex.join(job.evaluate)]
    for row in baselines.rows():
        for record in found[row.place].records[:1] if row.place in found else ():
            folder = RUNS / row.place / str(record["seed"])
            command = baselines.command_of(row, record["seed"], str(DATA), record["split"], folder)
            commands.append(shlex.join(command))
    told = (
        "\nThe commands of each row, of its first seed: a training and an evaluation, or a baseline. "
        "`python benchmarks/study.py --data_dir DIR --output runs/study --records runs/none` does all of the study "
        "(without `--records` only what isn't kept here), "
        "`python benchmarks/baselines.py --data_dir DIR --output runs/baselines` all baselines; their first lines say "
        "which corpora and vocabularies they need.\n\n```bash"
    )
    return "\n".join([*lines, told, *commands, "```"])


def _missing(found: dict[str, Runs]) -> str:
    """The seeds of rows that have no finished run, or of which only a mean is kept."""
    wanted = dict(study.ROWS)
    shown = {name for table in tables() for name in table.baselines}
    for row in baselines.rows():
        if row.place in shown:
            wanted[row.place] = baselines.SEEDS if row.trained else baselines.SEEDS[:1]
    lines = []
    for name, seeds in wanted.items():
        done = {record["seed"] for record in found[name].records} if name in found else set()
        if left := [str(seed) for seed in seeds if seed not in done]:
            mean = " (their mean is known)" if name in found and found[name].mean else ""
            lines.append(f"- {name}: {'seeds' if len(left) > 1 else 'seed'} {', '.join(left)}{mean}")
    return "\n".join(lines)

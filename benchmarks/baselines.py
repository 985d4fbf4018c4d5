"""The baselines of docs/baselines.md: every row trained with three seeds, and read on the test split once.

    python benchmarks/baselines.py --data_dir DIR --output DIR [--rows NAME ...]

DATA_DIR holds the corpora `amazon_beauty`, `amazon_toys`, and the same with `_shuffled` (prepared from the sets with
real timestamps by `--tie_break shuffle`), and `movielens`; a row whose corpus isn't there is left out. Each run is one
`recalign baseline`, which is printed and keeps its results in OUTPUT/SPLIT/CORPUS/ROW/SEED; what is there already isn't
run again, so the queue can be stopped at any time (of a training that was interrupted, `training_seconds` are the sum
of its parts up to their last checkpoints). Prints Markdown tables of means and standard deviations over the seeds, and
last one JSON line with `rows`, each with its `runs`, `mean` and `deviation`.
"""

import argparse
import json
import pathlib
import shlex
import statistics
import subprocess
import sys
from typing import Any, NamedTuple

ROOT = pathlib.Path(__file__).resolve().parents[1]
SEEDS = (0, 1, 2)
FAMILIES = {
    "retrieval": ("recall@5", "ndcg@5", "recall@10", "ndcg@10", "recall@10_unfiltered", "ndcg@10_unfiltered"),
    "ranking": ("hr@1", "hr@5", "hr@10", "ndcg@10"),
    "rating": ("rmse", "mae"),
}


class Row(NamedTuple):
    """One row of the tables."""

    name: str
    corpus: str
    method: str
    arguments: tuple[str, ...] = ()
    trained: bool = True
    settings: str = ""  # what ends the name of the gin file, if they are the row's own

    @property
    def place(self) -> str:
        """CORPUS/ROW: its folder, and its name beside rows of other corpora."""
        return f"{self.corpus}/{self.name}"

    @property
    def gin_file(self) -> str:
        return f"gin_configs/experiments/baselines_{self.corpus.removesuffix('_shuffled')}{self.settings}.gin"


def rows() -> list[Row]:
    """All rows, the quick ones first."""
    found = []
    for corpus in ("amazon_beauty", "amazon_toys", "amazon_beauty_shuffled", "amazon_toys_shuffled", "movielens"):
        found += [
            Row("popularity", corpus, "popularity", trained=False),
            Row("itemknn", corpus, "itemknn", trained=False),
        ]
        found += [Row("bprmf", corpus, "bprmf"), Row("sasrec", corpus, "sasrec")]
    sampled = ("--gin.SasrecOptions.loss=sampled_softmax",)
    found.append(Row("sasrec_sampled_softmax", "amazon_beauty", "sasrec", sampled))
    found.append(Row("sasrec_bce", "amazon_beauty", "sasrec", settings="_bce"))
    newest = ("--gin.PopularityOptions.newest=0.5",)
    found.append(Row("popularity_newest", "movielens", "popularity", newest, trained=False))
    for family in ("rating", "rating_random"):
        found.append(Row(f"mf_{family}", "movielens", "mf", ("--family", family)))
        biases = ("--family", family, "--gin.MfOptions.factors=0")
        found.append(Row(f"mf_{family}_biases", "movielens", "mf", biases))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--output", required=True, type=pathlib.Path)
    parser.add_argument("--rows", nargs="+", help="only these, as sasrec, or amazon_beauty/sasrec")
    parser.add_argument("--split", default="test", choices=("validation", "test"))
    args = parser.parse_args()
    # The runs have another working directory.
    args.data_dir, args.output = str(pathlib.Path(args.data_dir).resolve()), args.output.resolve() / args.split
    known = {name for row in rows() for name in (row.name, row.place)}
    if unknown := set(args.rows or ()) - known:
        parser.error(f"no rows {', '.join(sorted(unknown))}; there are {', '.join(sorted(known))}")
    table = []
    for row in rows():
        if args.rows and not {row.name, row.place} & set(args.rows):
            continue
        if not (pathlib.Path(args.data_dir) / row.corpus / "corpus.json").is_file():
            print(f"No corpus {row.corpus}: {row.place} is left out.", file=sys.stderr)
            continue
        runs = [run(row, seed, args) for seed in (SEEDS if row.trained else SEEDS[:1])]
        table.append({"corpus": row.corpus, "row": row.name} | summary(runs))
    for corpus in dict.fromkeys(row["corpus"] for row in table):
        print_tables(corpus, [row for row in table if row["corpus"] == corpus])
    print(json.dumps({"split": args.split, "rows": table}))


def run(row: Row, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """What `recalign baseline` says, from its file if it was run before."""
    folder = args.output / row.place / str(seed)
    result = folder / "metrics.json"
    if not result.is_file():
        command = command_of(row, seed, args.data_dir, args.split, folder)
        print(shlex.join(command), file=sys.stderr, flush=True)
        program = [sys.executable, "-m", "recalign_jax.cli", *command[1:]]
        subprocess.run(program, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return json.loads(result.read_text(encoding="utf-8"))


def command_of(row: Row, seed: int, data_dir: str, split: str, folder: pathlib.Path) -> list[str]:
    """The `recalign baseline` of a run whose results are to be in `folder`."""
    command = ["recalign", "baseline", "--data_dir", data_dir, "--corpus", row.corpus, "--method", row.method]
    command += ["--gin_file", row.gin_file, *row.arguments, "--split", split, "--output_dir", str(folder)]
    return [*command, "--seed", str(seed), "--model_dir", str(folder / "model")] if row.trained else command


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation of every figure over the seeds."""
    figures: dict[str, list[float]] = {}
    for found in runs:
        for family, names in FAMILIES.items():
            for name in names if family in found else ():
                figures.setdefault(f"{family} {name}", []).append(found[family][name])
        if "best" in found:
            figures.setdefault("epoch", []).append(found["best"]["step"])
            figures.setdefault("training_seconds", []).append(found["training_seconds"])
    return {
        "runs": len(runs),
        "mean": {name: statistics.fmean(values) for name, values in figures.items()},
        "deviation": {name: statistics.stdev(values) if len(values) > 1 else 0.0 for name, values in figures.items()},
    }


def print_tables(corpus: str, table: list[dict[str, Any]]) -> None:
    """A Markdown table a family: a row a method, a column a figure."""
    for family, names in FAMILIES.items():
        columns = {f"{family} {name}": name.replace("_unfiltered", ", unfiltered") for name in names}
        columns |= {"epoch": "epoch", "training_seconds": "seconds"}
        rows = [row for row in table if set(columns) & set(row["mean"]) - {"epoch", "training_seconds"}]
        if rows:
            print(f"\n{corpus}, {family}\n\n| | {' | '.join(columns.values())} |\n|---|{'---|' * len(columns)}")
        for row in rows:
            print(f"| {row['row']} | {' | '.join(cell(row, name) for name in columns)} |")


def cell(row: dict[str, Any], name: str) -> str:
    """Mean, and deviation where there are several runs."""
    if name not in row["mean"]:
        return ""
    if name in ("epoch", "training_seconds"):
        return f"{row['mean'][name]:.0f}"
    mean, deviation = (f"{row[part][name]:.4f}".removeprefix("0") for part in ("mean", "deviation"))
    return mean if row["runs"] == 1 else f"{mean} ± {deviation}"


if __name__ == "__main__":
    main()

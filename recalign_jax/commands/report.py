"""`recalign report`: one page about runs and evaluations."""

import argparse
import pathlib
from typing import Any

from recalign_jax import terminal
from recalign_jax.files import atomic_file
from recalign_jax.reporting import figures, page, runs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--runs", required=True, nargs="+", metavar="DIR", help="folders of runs and evaluations, or "
                        "folders that hold several")  # fmt: skip
    parser.add_argument("--output", required=True, metavar="FILE", help="the page, as report.html")
    parser.add_argument("--corpus", nargs="+", default=[], metavar="NAME", help="corpora of evaluations without a run")
    parser.add_argument("--plots", metavar="DIR", help="for every figure as PNG and SVG")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Writes the page, and with --plots its figures."""
    trained, evaluations = runs.find(args.runs)
    made = page.make(trained, evaluations, args.corpus, args.data_dir)
    with atomic_file(args.output) as aside:
        aside.write_text(made.html, encoding="utf-8")
    if args.plots:
        for panel in made.panels:
            for name, content in figures.files(panel).items():
                with atomic_file(pathlib.Path(args.plots) / name) as aside:
                    aside.write_bytes(content)
        terminal.say(f"{len(made.panels)} figures as PNG and SVG are in {args.plots}.")
    terminal.say(f"Next: open {args.output} in a browser")
    return {"output": args.output}

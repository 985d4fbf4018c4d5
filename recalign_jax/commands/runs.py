"""`recalign runs`: what was trained, and how far it is."""

import argparse
import time
from typing import Any

from recalign_jax import terminal
from recalign_jax.errors import InputError
from recalign_jax.evaluation.report import EVALUATION_FILE
from recalign_jax.reporting import runs
from recalign_jax.reporting.runs import Evaluation, Run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="DIR", help="a run, or a folder with runs below it")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Prints a table of the runs below a folder."""
    trained, evaluations = runs.find([args.folder])
    now = time.time()
    found = [_of_run(one, now) for one in trained]
    found += [_of_counted(one) for one in evaluations if one.run is None and "method" in one.told]
    if not found:
        raise InputError(f"No run below {args.folder}, only evaluations. A run of recalign train or recalign baseline "
                         "has a metrics.jsonl (MODEL_DIR, --model_dir).")  # fmt: skip
    found.sort(key=lambda one: one["name"])
    header = ["", "kind", "of", "state", "step", "best", "last written (UTC)"]
    terminal.table(f"Runs below {args.folder}", header, [_row(one) for one in found])
    if any(one["state"] == "unfinished" for one in found):
        terminal.say("An unfinished run that no process works on goes on with the command that began it.")
    terminal.next_step("recalign", "report", "--runs", args.folder, "--output", "report.html")
    return {"runs": found}


def _of_run(one: Run, now: float) -> dict[str, Any]:
    return {
        "name": one.name,
        "kind": one.kind,
        "of": one.mixture or one.method,
        "corpora": sorted(one.corpora),
        "state": runs.state(one, now),
        "step": one.step,
        "last_step": one.last_step,
        "best": one.best,
        "last_written": _utc(one.last_written),
    }


def _of_counted(one: Evaluation) -> dict[str, Any]:
    """A baseline without model_dir: all that is kept of it is its evaluation, written when it had ended."""
    corpora = [one.told["corpus"]] if "corpus" in one.told else []
    nothing: dict[str, Any] = {"corpora": corpora, "step": None, "last_step": None}
    written = _utc((one.folder / EVALUATION_FILE).stat().st_mtime)
    told = {"name": one.name, "kind": "baseline", "of": one.told["method"], "state": "finished"}
    return told | nothing | {"best": one.told.get("best"), "last_written": written}


def _utc(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(seconds))


def _row(one: dict[str, Any]) -> list[str]:
    best = one["best"]
    step = (
        "-" if one["step"] is None else f"{one['step']:,}" + (f" of {one['last_step']:,}" if one["last_step"] else "")
    )
    shown = f"{best['metric']} {best['value']:.4f} at {best['step']:,}" if best else "-"
    of = one["of"] if one["kind"] == "train" else " ".join([one["of"] or "?", *one["corpora"]])
    return [one["name"], one["kind"], of, one["state"], step, shown, one["last_written"]]

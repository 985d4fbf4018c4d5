"""Training next to T5X: the step, the input pipeline, and the loop of both, of the same model on the same tasks.

    python benchmarks/train_t5x.py --t5x_python T5X/bin/python --corpus amazon_beauty --vocabulary spiece.model

T5X lives in an environment of its own; docs/t5x.md says how to install it. Its side is built by T5X's gin files and
gin_configs/t5x/finetune.gin: its network in the dimensions of our model file, its trainer, its Adafactor, SeqIO's
pipeline with packing. Ours is that of `recalign train`. float32, dropout 0.1. The two are processes that take turns,
and neither does anything while it isn't its turn.

Prints one JSON line, medians over rounds:
  ratio         useful (non-padding) tokens a second of training, each from its own pipeline
  ratio_step    steps a second, both on the same packed rows that are on the device already
  ratio_input   samples a second of the pipeline alone, rows on the device
and `compile_seconds` of both train steps (tracing included), once each. The corpus must be prepared.
"""

import argparse
import itertools
import json
import pathlib
import statistics
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from benchmarks import our_training, turns

RATES = {"loop": "tokens", "step": "steps", "input": "samples"}  # question -> what is counted a second


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--t5x_python", required=True, help="the Python of an environment with T5X")
    our_training.add_arguments(parser)
    parser.add_argument("--steps", type=int, default=5, help="of a round, with each kind of rows")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    print(json.dumps({"model": pathlib.Path(args.model).stem} | run(args)))


def run(args: argparse.Namespace) -> dict[str, object]:
    with tempfile.TemporaryDirectory() as folder:
        ours = [sys.executable, "-m", "benchmarks.train_t5x_ours", json.dumps(vars(args) | {"folder": folder})]
        with turns.side(ours) as (told, ask_ours):
            theirs = [args.t5x_python, "-m", "benchmarks.train_t5x_peer", json.dumps(told)]
            with turns.side(theirs) as (told_by_t5x, ask_theirs):
                measured = compare({"ours": ask_ours, "t5x": ask_theirs}, args.rounds)
    return measured | {
        **{key: {"ours": told[key], "t5x": told_by_t5x[key]} for key in ("compile_seconds", "parameters")},
        **{key: told[key] for key in ("lengths", "batch_size")},
        "rounds": args.rounds,
    }


def compare(sides: dict[str, turns.Ask], rounds: int) -> dict[str, object]:
    """Asks both sides in turns; the first answers aren't counted."""
    rates: dict[tuple[str, str], list[float]] = {(side, question): [] for side in sides for question in RATES}
    filled: dict[str, list[float]] = {side: [] for side in sides}
    # One question after the other, the pipelines last: they would render ahead while the same program trains.
    for question, turn in itertools.product(RATES, range(rounds + 1)):
        for name, ask in sides.items():
            answer = ask(question)
            if turn:
                rates[name, question].append(answer[RATES[question]] / answer["seconds"])
            if question == "input":
                filled[name].append(answer["encoder_efficiency"])

    def ratio(question: str) -> float:
        pairs = zip(rates["ours", question], rates["t5x", question], strict=True)
        return round(statistics.median(a / b for a, b in pairs), 3)

    return {
        "ratio": ratio("loop"),
        "ratio_step": ratio("step"),
        "ratio_input": ratio("input"),
        **{
            f"{name}_{counted}_per_second": round(statistics.median(rates[name, question]), 3)
            for question, counted in RATES.items()
            for name in sides
        },
        **{f"{name}_packing_efficiency": round(statistics.mean(values), 3) for name, values in filled.items()},
    }


if __name__ == "__main__":
    main()

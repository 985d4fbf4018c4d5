"""Prints the quickstart's closing table: the model next to baselines, and recommendations for a few users.

    python launch/compare.py MODEL.json RECOMMENDATIONS.jsonl BASELINE.json ...

A baseline's file is called by its method.
"""

import json
import pathlib
import sys
from typing import Any

from recalign_jax import terminal

METRICS = ("recall@5", "ndcg@5", "recall@10", "ndcg@10", "recall@10_unfiltered")


def main(model_file: str, recommendations_file: str, *baseline_files: str) -> None:
    model = _retrieval(model_file)
    baselines = {pathlib.Path(file).stem: _retrieval(file) for file in baseline_files}
    rows = [
        [name, *(f"{values[metric]:.4f}" for metric in METRICS)]
        for name, values in {"T5, retrieval + MIM + MLM": model, **baselines}.items()
    ]
    terminal.table(f"MovieLens-100K, test split, {model['users']} users, all items ranked", ["", *METRICS], rows)
    for name, values in baselines.items():
        ratio = model["recall@10"] / max(values["recall@10"], 1e-9)
        terminal.say(f"Recall@10 is {ratio:.2f} times that of {name}.")
    for line in pathlib.Path(recommendations_file).read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        terminal.say(f"User {row['user']}: {'; '.join(row['titles'])}")


def _retrieval(file: str) -> dict[str, Any]:
    return json.loads(pathlib.Path(file).read_text(encoding="utf-8"))["retrieval"]


if __name__ == "__main__":
    main(*sys.argv[1:])

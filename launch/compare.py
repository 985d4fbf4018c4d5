"""Prints the quickstart's closing table: the model next to popularity, and recommendations for a few users."""

import json
import pathlib
import sys

from recalign_jax import terminal

METRICS = ("recall@5", "ndcg@5", "recall@10", "ndcg@10", "recall@10_unfiltered")


def main(model_file: str, popularity_file: str, recommendations_file: str) -> None:
    results = {
        name: json.loads(pathlib.Path(file).read_text(encoding="utf-8"))["retrieval"]
        for name, file in (("T5, retrieval + MIM + MLM", model_file), ("popularity", popularity_file))
    }
    rows = [[name, *(f"{values[metric]:.4f}" for metric in METRICS)] for name, values in results.items()]
    users = results["popularity"]["users"]
    terminal.table(f"MovieLens-100K, test split, {users} users, all items ranked", ["", *METRICS], rows)
    model, popularity = (values["recall@10"] for values in results.values())
    if model > popularity:
        terminal.say(f"Recall@10 is {model / max(popularity, 1e-9):.2f} times popularity's.")
    else:
        terminal.say(f"Recall@10 falls short of popularity's by {popularity - model:.4f}.")
    for line in pathlib.Path(recommendations_file).read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        terminal.say(f"User {row['user']}: {'; '.join(row['titles'])}")


if __name__ == "__main__":
    main(*sys.argv[1:])

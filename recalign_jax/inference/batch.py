"""Batch inference: the best items of every user, in one file."""

import json
import pathlib
from collections.abc import Sequence

import numpy as np

from recalign_jax import terminal
from recalign_jax.corpus.corpus import Corpus
from recalign_jax.files import atomic_file
from seqio_tasks import examples
from seqio_tasks.examples import Query, Recommend

OUTPUT_FILE = "recommendations.jsonl"
SPLITS = ("test", "validation", "all")


def user_queries(corpus: Corpus, split: str, max_users: int | None = None) -> list[Query]:
    """What to answer: for `test` and `validation` the history before that target; for `all` every user's whole
    history, which nothing follows yet (target -1)."""
    users = corpus.evaluation_users if split != "all" else np.arange(corpus.num_users)
    users = users[:max_users]
    if split == "all":
        return [Query(int(user), corpus.sequence(user), -1) for user in users]
    return [examples.next_item(corpus, split, index) for index in range(len(users))]


def write_recommendations(
    recommend: Recommend, corpus: Corpus, queries: Sequence[Query], output_dir: str, filter_history: bool = True
) -> pathlib.Path:
    """Writes one JSON object a user: `user`, `items` (ids of the source), `titles`, `scores`, best first.

    Args:
      recommend: the model, or a baseline.
      corpus: what the queries are of.
      queries: one a user.
      output_dir: gets `recommendations.jsonl`, whole or not at all, users in the order of the queries.
      filter_history: leave out what the user already has.
    """
    nothing = np.zeros(0, np.int32)
    rows: list[str] = [""] * len(queries)
    with terminal.progress("infer", len(queries), "users") as advance:
        for chosen, items, scores in recommend(queries, [q.history if filter_history else nothing for q in queries]):
            for number, ranked, score in zip(chosen, items, scores, strict=True):
                rows[number] = json.dumps(_row(corpus, queries[number], ranked[ranked >= 0], score[ranked >= 0]))
            advance(len(chosen))
    output = pathlib.Path(output_dir) / OUTPUT_FILE
    with atomic_file(output) as aside, aside.open("w", encoding="utf-8") as file:
        file.writelines(row + "\n" for row in rows)
    return output


def _row(corpus: Corpus, query: Query, items: np.ndarray, scores: np.ndarray) -> dict[str, object]:
    return {
        "user": corpus.user_source_id(query.user),
        "items": [corpus.item_source_id(item) for item in items],
        "titles": [corpus.item_text(item).title for item in items],
        "scores": [round(float(score), 6) for score in scores],
    }

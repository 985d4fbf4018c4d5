"""`recalign infer`: batch inference, the best items of every user of a corpus."""

import argparse
import time
from typing import Any

import gin

from recalign_jax import gin_config, terminal
from recalign_jax.commands.common import load_recommender
from recalign_jax.errors import InputError
from recalign_jax.inference import batch
from seqio_tasks import specs

USES_GIN = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All that a job is stands in gin."""
    del parser


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Writes the recommendations as gin says."""
    return infer_command(args.data_dir)


@gin.configurable("infer", module="recalign")
def infer_command(
    data_dir: str | None,
    task_name: str | None = None,
    split: str = "test",
    checkpoint_path: str | None = None,
    vocabulary: str | None = None,
    output_dir: str | None = None,
    max_users: int | None = None,
    filter_history: bool = True,
    mesh: dict[str, int] | None = None,
) -> dict[str, Any]:
    """Writes `OUTPUT_DIR/recommendations.jsonl`.

    Args:
      data_dir: where corpora are.
      task_name: a retrieval task.
      split: `test` or `validation` for the history before that target; `all` for every user's whole history.
      checkpoint_path: MODEL_DIR, or one checkpoint in it.
      vocabulary: path of a SentencePiece model.
      output_dir: OUTPUT_DIR.
      max_users: only so many users, a random sample.
      filter_history: leave out what the user already has.
      mesh: devices along each axis; None puts all along `data`.
    """
    task_name = gin_config.required("TASK_NAME", task_name, "movielens_retrieval_token")
    checkpoint_path = gin_config.required("CHECKPOINT_PATH", checkpoint_path, "DIR")
    vocabulary = gin_config.required("VOCABULARY", vocabulary, "PATH")
    output_dir = gin_config.required("OUTPUT_DIR", output_dir, "DIR")
    if split not in batch.SPLITS:
        raise InputError(f"SPLIT is {split!r}, not one of {', '.join(batch.SPLITS)}.")
    spec = specs.task_spec(task_name, vocabulary, data_dir)
    specs.check_family(spec, "retrieval")
    recommend, _ = load_recommender(spec, checkpoint_path, mesh, "BATCH_SIZE")
    start = time.monotonic()
    queries = batch.user_queries(spec.corpus, split, max_users)
    output = batch.write_recommendations(recommend, spec.corpus, queries, output_dir, filter_history)
    terminal.say(f"Recommendations for {len(queries)} users: {output}")
    return {"users": len(queries), "output": str(output), "seconds": round(time.monotonic() - start, 3)}

"""`recalign eval`: evaluates a checkpoint on a held-out split."""

import argparse
from typing import Any

import gin

from recalign_jax import gin_config, terminal
from recalign_jax.commands.common import load_recommender
from recalign_jax.evaluation import retrieval
from recalign_jax.evaluation.retrieval import RetrievalOptions
from seqio_tasks import specs

USES_GIN = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All that an evaluation is stands in gin."""
    del parser


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Evaluates as gin says, and prints a table."""
    return eval_command(args.data_dir)


@gin.configurable("eval", module="recalign")
def eval_command(
    data_dir: str | None,
    task_name: str | None = None,
    split: str = "test",
    checkpoint_path: str | None = None,
    vocabulary: str | None = None,
    mesh: dict[str, int] | None = None,
) -> dict[str, Any]:
    """Evaluates retrieval over the whole catalogue.

    Args:
      data_dir: where corpora are.
      task_name: a retrieval task.
      split: `validation` or `test`.
      checkpoint_path: MODEL_DIR, or one checkpoint in it.
      vocabulary: path of a SentencePiece model.
      mesh: devices along each axis; None puts all along `data`.
    """
    task_name = gin_config.required("TASK_NAME", task_name, "movielens_retrieval_token")
    checkpoint_path = gin_config.required("CHECKPOINT_PATH", checkpoint_path, "DIR")
    vocabulary = gin_config.required("VOCABULARY", vocabulary, "PATH")
    spec = specs.task_spec(task_name, vocabulary, data_dir)
    specs.check_family(spec, "retrieval")
    options = RetrievalOptions()
    queries = retrieval.evaluation_queries(spec.corpus, split, options.max_users)
    recommend, step = load_recommender(spec, checkpoint_path, mesh, "EVAL_BATCH_SIZE")
    values = retrieval.evaluate(recommend, queries, options)
    retrieval.show(f"{spec.name}, {split} split, step {step}, {values['users']} users", {"model": values})
    terminal.say(f"Next to it: recalign baseline --corpus {spec.corpus.name} --method popularity")
    return {"retrieval": values, "step": step, "split": split}

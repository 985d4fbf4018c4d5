"""`recalign baseline`: a conventional recommender under the same protocol."""

import argparse
from typing import Any

from recalign_jax.baselines import popularity
from recalign_jax.corpus.corpus import load_corpus
from recalign_jax.evaluation import retrieval
from recalign_jax.evaluation.retrieval import RetrievalOptions

METHODS = {"popularity": popularity.recommender}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--corpus", required=True, metavar="NAME")
    parser.add_argument("--method", required=True, choices=list(METHODS))
    parser.add_argument("--split", default="test", choices=("validation", "test"))
    parser.add_argument("--max_users", type=int, help="evaluate only so many users")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Evaluates the baseline, and prints a table."""
    corpus = load_corpus(args.corpus, args.data_dir)
    queries = retrieval.evaluation_queries(corpus, args.split, args.max_users)
    values = retrieval.evaluate(METHODS[args.method](corpus), queries, RetrievalOptions())
    retrieval.show(f"{corpus.name}, {args.split} split, {values['users']} users", {args.method: values})
    return {"retrieval": values, "split": args.split}

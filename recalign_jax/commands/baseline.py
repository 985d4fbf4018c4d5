"""`recalign baseline`: a conventional recommender under the same protocol."""

import argparse
from collections.abc import Iterator
from typing import Any

from recalign_jax.baselines import popularity
from recalign_jax.corpus.corpus import load_corpus
from recalign_jax.evaluation import ranking, report, results, retrieval
from recalign_jax.evaluation.results import EvaluationOptions, Result

METHODS = ("popularity",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--corpus", required=True, metavar="NAME")
    parser.add_argument("--method", required=True, choices=METHODS)
    parser.add_argument("--split", default="test", choices=results.SPLITS)
    parser.add_argument("--max_users", type=int, help="evaluate only so many users")
    parser.add_argument("--output_dir", metavar="DIR", help="for metrics.json and Parquet files with a row a user")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Evaluates the baseline, and prints tables."""
    corpus = load_corpus(args.corpus, args.data_dir)
    options = EvaluationOptions(max_users=args.max_users)
    queries = retrieval.evaluation_queries(corpus, args.split, options)

    def found() -> Iterator[tuple[str, Result]]:
        what = f"{corpus.name}, {args.split} split, {args.method}"
        yield f"retrieval, {what}", retrieval.evaluate(corpus, popularity.recommender(corpus), queries, options)
        candidates = ranking.candidates(corpus, args.split, queries)
        yield f"ranking, {what}", ranking.evaluate(corpus, popularity.scorer(corpus), queries, candidates)

    return report.publish(found(), corpus, {"split": args.split}, args.output_dir)

"""`recalign baseline`: trains a conventional recommender, and evaluates it under the same protocol."""

import argparse
import contextlib
import dataclasses
import pathlib
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import gin

from recalign_jax import terminal
from recalign_jax.baselines import bprmf, itemknn, mf, popularity, sasrec, scores
from recalign_jax.baselines.fit import FitOptions, Run, training_seconds
from recalign_jax.checkpoint import locations
from recalign_jax.corpus.candidates import CANDIDATE_SEED, NUM_TEST_NEGATIVES
from recalign_jax.corpus.corpus import Corpus, load_corpus
from recalign_jax.corpus.holdout import HELD_OUT
from recalign_jax.errors import InputError
from recalign_jax.evaluation import ranking, rating, report, retrieval
from recalign_jax.evaluation.results import EvaluationOptions, Result
from recalign_jax.files import atomic_file
from seqio_tasks import task_names

USES_GIN = True

# Options that may change when a training is resumed, to train on; see `fit`.
MAY_CHANGE = ("epochs", "patience")


class Method(NamedTuple):
    """A baseline: what gin sets, what makes it of corpus, options and run, and what it can be evaluated on."""

    options: type
    make: Callable[..., Any]
    families: tuple[str, ...] = ("retrieval", "ranking")


METHODS = {
    "popularity": Method(popularity.PopularityOptions, popularity.make),
    "itemknn": Method(itemknn.ItemKnnOptions, itemknn.make),
    "bprmf": Method(bprmf.BprMfOptions, bprmf.make),
    "mf": Method(mf.MfOptions, mf.make, task_names.RATED_FAMILIES),
    "sasrec": Method(sasrec.SasrecOptions, sasrec.make),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    families = sorted({family for method in METHODS.values() for family in method.families})
    parser.add_argument("--corpus", required=True, metavar="NAME")
    parser.add_argument("--method", required=True, choices=METHODS, help="options by gin: " + ", ".join(
                        f"{method.options.__name__} of {name}" for name, method in METHODS.items()) +
                        "; settings for some corpora are in gin_configs/experiments/baselines_*.gin")  # fmt: skip
    parser.add_argument("--family", choices=families, help="evaluate only this (default: retrieval and ranking; of mf, "
                        "rating; rating_random is the random 8:1:1 split)")  # fmt: skip
    parser.add_argument("--split", default="test", choices=HELD_OUT, help="to evaluate on (default test)")
    parser.add_argument("--max_users", type=int, help="evaluate only so many users")
    parser.add_argument("--seed", type=int, default=0, help="of a method that is trained (default 0)")
    parser.add_argument("--model_dir", metavar="DIR", help="for the log and checkpoints of a method that is trained; "
                        "the same command goes on there. Without it nothing is kept")  # fmt: skip
    parser.add_argument("--output_dir", metavar="DIR", help="for metrics.json and Parquet files with a row a user")
    parser.epilog = "--gin.NAME=value sets an option of the method, as --gin.SasrecOptions.epochs=20"


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Trains the baseline if it is one that is trained, evaluates it, and prints tables."""
    method = METHODS[args.method]
    families = [args.family] if args.family else [family for family in method.families if family != "rating_random"]
    if families[0] not in method.families:
        raise InputError(f"{args.method} doesn't answer {families[0]}; it answers {' and '.join(method.families)}.")
    folder = report.output_folder(args.output_dir)
    corpus = load_corpus(args.corpus, args.data_dir)
    evaluation = EvaluationOptions()
    if args.max_users is not None:
        evaluation = dataclasses.replace(evaluation, max_users=args.max_users)
    tasks = [f"{corpus.name}_{family}" for family in families]
    told = {"method": args.method, "corpus": corpus.name, "tasks": tasks, "split": args.split}
    of_candidates = {"test_negatives": NUM_TEST_NEGATIVES, "candidate_seed": CANDIDATE_SEED}
    told["options"] = {"filter_history": evaluation.filter_history} | of_candidates
    options = method.options()
    told["method_options"] = dataclasses.asdict(options)
    if isinstance(options, FitOptions):
        answers, of_training = _trained(args, method, options, corpus, families[0])
        told |= of_training
    elif args.model_dir:
        raise InputError(f"--model_dir: {args.method} is counted, not trained; nothing would stand there.")
    else:
        answers = method.make(corpus, options)

    def found() -> Iterator[tuple[str, Result]]:
        for family in families:
            title = f"{family}, {corpus.name}, {args.split} split, {args.method}"
            yield title, evaluate(corpus, family, answers, args.split, evaluation)

    told = report.publish(found(), corpus, told, folder)
    if args.output_dir:
        terminal.next_step("recalign", "report", "--runs", args.output_dir, "--output", "report.html")
    else:
        terminal.say("Next: the same with --output_dir DIR, for recalign report")
    return told


def _trained(
    args: argparse.Namespace, method: Method, options: Any, corpus: Corpus, family: str
) -> tuple[Any, dict[str, Any]]:
    """What `method.make` gives, and what to tell of its training."""
    identity = {"method": args.method, "seed": args.seed, f"corpus {corpus.name}": corpus.fingerprint}
    for name, value in dataclasses.asdict(options).items():
        if name not in MAY_CHANGE:
            identity[f"{method.options.__name__}.{name}"] = value
    rated = family in task_names.RATED_FAMILIES
    if rated:
        identity["family"] = family
    if args.seed < 0:
        raise InputError(f"--seed is {args.seed}: must not be negative.")
    with contextlib.ExitStack() as stack:
        model_dir = args.model_dir or stack.enter_context(tempfile.TemporaryDirectory())
        answers = method.make(corpus, options, Run(model_dir, args.seed, identity), *([family] if rated else []))
        with atomic_file(pathlib.Path(model_dir) / "config.gin") as aside:
            aside.write_text(gin.operative_config_str(), encoding="utf-8")
        seconds = round(training_seconds(model_dir), 1)
        told = {"seed": args.seed, "best": locations.read_best(model_dir), "training_seconds": seconds}
    # As `recalign eval` tells it: the evaluation is read in other folders.
    return answers, told | ({"model_dir": str(pathlib.Path(args.model_dir).absolute())} if args.model_dir else {})


def evaluate(corpus: Corpus, family: str, answers: Any, split: str, options: EvaluationOptions) -> Result:
    """Evaluates a baseline, Scores or PredictRatings, as the family asks."""
    if family in task_names.RATED_FAMILIES:
        return rating.evaluate(corpus, answers, rating.evaluation_queries(corpus, split, family, options), family)
    queries = retrieval.evaluation_queries(corpus, split, options)
    if family == "retrieval":
        recommend = scores.recommender(answers, corpus.num_items, options.cutoffs[-1])
        return retrieval.evaluate(corpus, recommend, queries, options)
    candidates = ranking.candidates(corpus, split, queries)
    return ranking.evaluate(corpus, scores.scorer(answers, corpus.num_items), queries, candidates)

"""`recalign inspect`: the statistics of a corpus, or samples of a task.

Samples are rendered with the default TaskOptions, whatever gin files a training has, and without limits of length:
a row of a training can be cut to fewer items.
"""

import argparse
import os
import re
from typing import Any

import numpy as np

from recalign_jax import terminal
from recalign_jax.corpus.corpus import VOCABULARIES, Corpus, corpora, data_dir_or_default, load_corpus
from recalign_jax.corpus.holdout import SPLITS
from recalign_jax.corpus.statistics import statistics
from recalign_jax.errors import InputError
from seqio_tasks import samples, specs, task_names, vocabulary


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--corpus", required=True, metavar="NAME", help="name of a prepared corpus")
    parser.add_argument(
        "--task",
        metavar="TASK",
        help="render samples of this task, as retrieval or NAME_mim_token, with default TaskOptions and not cut",
    )
    parser.add_argument(
        "--vocabulary",
        metavar="PATH",
        help="SentencePiece model for --task, or the name of one in DATA_DIR/vocabularies (default: "
        "$RECALIGN_VOCABULARY, then the newest of recalign vocab)",
    )
    parser.add_argument("--split", default="train", choices=SPLITS)
    parser.add_argument("-n", type=int, default=3, help="how many samples")
    parser.add_argument("--seed", type=int, default=0, help="of the choice and the random parts of the samples")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Prints statistics, or with --task samples and their token counts. A negative -n or --seed is an InputError."""
    for flag, value in (("-n", args.n), ("--seed", args.seed)):
        if value < 0:
            raise InputError(f"{flag} must not be negative, but is {value}.")
    if not args.task:
        return {"statistics": _show_statistics(load_corpus(args.corpus, args.data_dir))}
    whole = any(args.task.startswith(f"{name}_") for name in corpora(data_dir_or_default(args.data_dir)))
    task = args.task if whole else f"{args.corpus}_{args.task}"
    of = ".".join(task_names.split_name(task, args.data_dir).corpora)
    if of != args.corpus:
        raise InputError(f"--task {task} is of {of}, not of --corpus {args.corpus}.")
    spec = specs.task_spec(task, _vocabulary(args), args.data_dir)
    count = samples.num_examples(spec, args.split)
    chosen = np.random.default_rng(args.seed).permutation(count)[: args.n]
    found = []
    for index in chosen:
        sample = samples.render(spec, args.split, int(index), seed=args.seed)
        texts = {"inputs": spec.vocabulary.decode(sample.inputs), "targets": spec.vocabulary.decode(sample.targets)}
        found.append({**texts, "input_tokens": len(sample.inputs), "target_tokens": len(sample.targets)})
        terminal.say(f"\n[{spec.name}, {args.split} example {index}]")
        terminal.say(f"inputs ({len(sample.inputs)} tokens): {texts['inputs']}")
        terminal.say(f"targets ({len(sample.targets)} tokens): {texts['targets']}")
    shared = spec.catalog.num_collisions
    terminal.say(f"\n{count} {args.split} examples in all; {shared} items share their tokens with another item.")
    return {"samples": found, "examples": count, "collisions": shared}


def _vocabulary(args: argparse.Namespace) -> str:
    """The path of the vocabulary to tokenize with. Raises InputError when there is none."""
    given = args.vocabulary or os.environ.get("RECALIGN_VOCABULARY")
    if given:
        return vocabulary.find(given, args.data_dir)
    folder = data_dir_or_default(args.data_dir) / VOCABULARIES
    # As recalign vocab names them: the corpus `amazon` has none of those of `amazon_beauty`.
    of_corpus = [path for path in folder.glob("*.model") if re.fullmatch(rf"{re.escape(args.corpus)}_\d+", path.stem)]
    trained = sorted(of_corpus, key=lambda path: path.stat().st_mtime)
    if not trained:
        raise InputError(
            f"--task needs a vocabulary: --vocabulary PATH, or recalign vocab --corpus {args.corpus} first."
        )
    return str(trained[-1])


def _show_statistics(corpus: Corpus) -> dict[str, Any]:
    numbers = statistics(corpus)
    nested = {key: value for key, value in numbers.items() if isinstance(value, dict)}
    rows = [(key, value) for key, value in numbers.items() if key not in nested]
    rows += [(f"{key}: {name}", value) for key, part in nested.items() for name, value in part.items()]
    terminal.table(f"Corpus {corpus.name}", ["", "value"], [(key.replace("_", " "), _shown(n)) for key, n in rows])
    terminal.say(f"Next: recalign vocab --corpus {corpus.name}, or recalign train with T5's vocabulary")
    return numbers


def _shown(value: float | int | None) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.6g}"

"""`recalign vocab`: trains a SentencePiece vocabulary on the text of a corpus and of the prompts."""

import argparse
import pathlib
from typing import Any

from recalign_jax import files, terminal
from recalign_jax.corpus.corpus import VOCABULARIES, data_dir_or_default, load_corpus
from recalign_jax.corpus.vocab import TooManyPieces, corpus_text, train_vocabulary
from recalign_jax.errors import InputError
from seqio_tasks import prompts

DEFAULT_SIZE = 1000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the command."""
    parser.add_argument("--corpus", required=True, metavar="NAME", help="name of a prepared corpus")
    parser.add_argument(
        "--size",
        type=int,
        metavar="N",
        help=f"number of pieces (default: {DEFAULT_SIZE:,}, or as many as a smaller text gives)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace another vocabulary of that name")
    parser.add_argument(
        "--output", metavar="PATH", help=f"the model to write (default: DATA_DIR/{VOCABULARIES}/NAME_N.model)"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Trains and writes the vocabulary."""
    corpus = load_corpus(args.corpus, args.data_dir)
    size = DEFAULT_SIZE if args.size is None else args.size
    terminal.say(f"Training a vocabulary of {size:,} pieces on {corpus.num_items:,} items ...")
    texts, phrases = [*corpus_text(corpus)], prompts.literals()
    try:
        model = train_vocabulary(texts, size, phrases)
    except TooManyPieces as error:
        if args.size is not None:
            raise
        size = error.largest
        terminal.say(f"The text gives {size}.")
        model = train_vocabulary(texts, size, phrases)
    default = data_dir_or_default(args.data_dir) / VOCABULARIES / f"{corpus.name}_{size}.model"
    path = pathlib.Path(args.output).expanduser() if args.output else default
    if path.exists() and path.read_bytes() != model and not args.overwrite:
        raise InputError(
            f"{path} is another vocabulary, which models may have been trained with. Give another --output, or replace "
            "it with --overwrite."
        )
    with files.atomic_file(path) as aside:
        aside.write_bytes(model)
    terminal.say(f"Written to {path}.")
    gin_files = ("--gin_file=gin_configs/models/t5_tiny_tied.gin", "--gin_file=gin_configs/runs/from_scratch.gin")
    task = f"--gin.MIXTURE_OR_TASK_NAME={corpus.name}_retrieval_aligned_token"
    terminal.next_step("recalign", "train", *gin_files, task, f"--gin.VOCABULARY={path}", "--gin.MODEL_DIR=DIR")
    return {"path": str(path), "size": size}

"""`recalign prepare`: builds a corpus from raw data."""

import argparse
import pathlib
from typing import Any

from recalign_jax import errors, terminal
from recalign_jax.corpus import build
from recalign_jax.corpus.corpus import check_name, data_dir_or_default
from recalign_jax.corpus.prepare import SOURCES, PrepareOptions, prepare
from recalign_jax.corpus.sources import rejects

_COLUMNS = ("user", "item", "timestamp", "rating")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the command."""
    parser.add_argument("--source", required=True, choices=list(SOURCES), help="kind of the raw data")
    parser.add_argument("--input", required=True, metavar="DIR", help="folder with the raw data")
    parser.add_argument("--corpus", required=True, metavar="NAME", help="name of the corpus: [a-z0-9_]+")
    parser.add_argument(
        "--k_core",
        type=int,
        default=0,
        metavar="N",
        help="keep only users and items with at least N interactions, found iteratively (default 0: keep all, also "
        "items of the items table that nobody met)",
    )
    parser.add_argument(
        "--tie_break",
        choices=build.TIE_BREAKS,
        default="file",
        help="order of a user's interactions with equal timestamps: as in the file, or shuffled by --seed",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the numbering of users and items and of shuffled ties")
    parser.add_argument(
        "--on_error",
        choices=rejects.ON_ERROR,
        default="fail",
        help="stop at a bad row, or leave such rows out and list them in rejected.jsonl",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a corpus of this name")
    for name in _COLUMNS:
        parser.add_argument(f"--{name}_column", metavar="NAME", help=f"name of the {name} column (--source tables)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Builds the corpus and prints what was counted."""
    name = check_name(args.corpus)
    directory = data_dir_or_default(args.data_dir) / name
    _check_flags(args, directory)
    columns = {column: value for column in _COLUMNS if (value := getattr(args, f"{column}_column")) is not None}
    options = PrepareOptions(args.source, args.k_core, args.tie_break, args.seed, args.on_error, columns)
    counts, rejected = prepare(pathlib.Path(args.input).expanduser(), directory, options)
    terminal.table(f"Corpus {name}", ["", "count"], [(key.replace("_", " "), f"{n:,}") for key, n in counts.items()])
    terminal.say(f"Written to {directory}. Next: recalign inspect --corpus {name}")
    return {
        "users": counts["users"],
        "items": counts["items"],
        "interactions": counts["interactions"],
        "rejected_rows": rejected,
        "corpus_dir": str(directory),
    }


def _check_flags(args: argparse.Namespace, directory: pathlib.Path) -> None:
    for flag in ("k_core", "seed"):
        if getattr(args, flag) < 0:
            raise errors.InputError(f"--{flag} must not be negative, but is {getattr(args, flag)}.")
    if directory.exists():
        if not args.overwrite:
            raise errors.InputError(f"{directory} exists. Choose another name, or replace it with --overwrite.")
        if not (directory / "corpus.json").is_file():
            raise errors.InputError(f"{directory} exists and is not a corpus, so it will not be replaced.")

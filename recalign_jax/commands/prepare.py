"""`recalign prepare`: builds a corpus from raw data, or adds raw data to one."""

import argparse
import pathlib
from typing import Any

from recalign_jax import errors, terminal
from recalign_jax.corpus import build, download, prepare
from recalign_jax.corpus.corpus import check_name, data_dir_or_default, load_corpus
from recalign_jax.corpus.extend import OF_THE_CORPUS, SIZES, extend, is_nothing
from recalign_jax.corpus.prepare import SOURCES, PrepareOptions
from recalign_jax.corpus.sources import rejects, tables

MANY_REJECTED = 0.05  # of the rows of a table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the command."""
    parser.add_argument("--source", required=True, choices=list(SOURCES), help="kind of the raw data")
    raw = parser.add_mutually_exclusive_group(required=True)
    raw.add_argument("--input", metavar="DIR", help="folder with the raw data")
    names = "; ".join(f"{source}: {', '.join(known)}" for source, known in download.DOWNLOADS.items())
    raw.add_argument("--download", metavar="NAME", help=f"published raw data, kept in DATA_DIR/downloads ({names})")
    parser.add_argument("--corpus", required=True, metavar="NAME", help="name of the corpus: [a-z0-9_]+")
    parser.add_argument(
        "--k_core",
        type=int,
        metavar="N",
        help="keep only users and items with at least N interactions, found iteratively (default 0: keep all, also "
        "items of the items table that nobody met)",
    )
    parser.add_argument(
        "--tie_break",
        choices=build.TIE_BREAKS,
        help="order of a user's interactions with equal timestamps: as in the file (default), or shuffled by --seed",
    )
    parser.add_argument("--seed", type=int, help="of the numbering of users and items and of shuffled ties (default 0)")
    parser.add_argument(
        "--on_error",
        choices=rejects.ON_ERROR,
        default="fail",
        help="stop at a bad row, or leave such rows out and list them in rejected.jsonl",
    )
    replacing = parser.add_mutually_exclusive_group()
    replacing.add_argument("--overwrite", action="store_true", help="replace a corpus of this name")
    replacing.add_argument(
        "--extend",
        action="store_true",
        help="add new users, items and interactions to the corpus of this name, whose numbers stay; its own "
        "--k_core, --tie_break and --seed apply; rows that k-core drops are not kept for the next time",
    )
    for name in tables.Columns._fields:
        parser.add_argument(f"--{name}_column", metavar="NAME", help=f"name of the {name} column (--source tables)")
    parser.add_argument(
        "--rating_range",
        type=float,
        nargs=2,
        metavar=("MIN", "MAX"),
        help="a rating out of this range makes a bad row (--source tables; the other sources have ranges of their own)",
    )
    parser.add_argument(
        "--runner",
        metavar="NAME",
        help="parse the raw data on this Apache Beam runner (DirectRunner, FlinkRunner, ...), not in this process",
    )
    parser.add_argument(
        "--beam_options", default="", metavar="FLAGS", help='flags for it: --beam_options="--NAME=VALUE ..."'
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Builds or extends the corpus and prints what was counted."""
    name = check_name(args.corpus)
    data_dir = data_dir_or_default(args.data_dir)
    directory = data_dir / name
    _check_flags(args, directory)
    named = {column: getattr(args, f"{column}_column") for column in tables.Columns._fields}
    columns = {column: value for column, value in named.items() if value is not None}
    options = PrepareOptions(
        source=args.source,
        k_core=args.k_core or 0,
        tie_break=args.tie_break or build.TIE_BREAKS[0],
        seed=args.seed or 0,
        on_error=args.on_error,
        columns=columns,
        rating_range=args.rating_range and tuple(args.rating_range),
        runner=args.runner,
    )
    if args.download is not None:
        folder = download.fetch(args.source, args.download, data_dir)
    else:
        folder = pathlib.Path(args.input).expanduser()
    counts = (extend if args.extend else prepare.prepare)(folder, directory, options, args.beam_options)
    title = f"Added to corpus {name}" if args.extend else f"Corpus {name}"
    terminal.table(title, ["", "count"], [(key.replace("_", " "), f"{n:,}") for key, n in counts.items()])
    _advise(counts, args.extend)
    result = {
        **{size: counts[size] for size in SIZES},
        "rejected_rows": counts["interactions_rejected"] + counts["items_rejected"],
        "corpus_dir": str(directory),
    }
    if args.extend:
        total = load_corpus(name, args.data_dir).metadata["counts"]
        result |= {size: total[size] for size in SIZES} | {f"{size}_added": counts[size] for size in SIZES}
    if args.extend and is_nothing(counts):
        terminal.say(f"Nothing new: {directory} stays as it was.")
    else:
        terminal.say(f"Written to {directory}. Next: recalign inspect --corpus {name}")
    return result


def _advise(counts: dict[str, int], extended: bool) -> None:
    """Tells of counts that are seldom meant."""
    for what in ("interactions", "items"):
        read, rejected = counts[f"{what}_read"], counts[f"{what}_rejected"]
        if rejected > MANY_REJECTED * read:
            terminal.warn(
                f"{rejected:,} of {read:,} {what} were bad rows and are left out: rejected.jsonl says why. (Where it "
                "says that a column isn't there: the first row decides which are; --rating_column etc. name them.)"
            )
    if extended:
        if dropped := counts["interactions_dropped_by_k_core"]:
            terminal.say(
                f"The k-core of the corpus dropped {dropped:,} interactions, which are not kept. Give them again with "
                "the next --extend, where their users and items may have enough; what is known already is passed over."
            )
        return
    if 2 * counts["items_without_text"] >= counts["items"] - counts["items_never_met"] > 0:
        terminal.warn(
            f"{counts['items_without_text']:,} of {counts['items']:,} items have no text. If they should, see that ids "
            "are written in the same way in both tables (not 1.0 and 1), and name the columns: --title_column, "
            "--categories_column, --brand_column."
        )
    if 2 * counts["items_never_met"] > counts["items"]:
        terminal.warn(
            f"Nobody met {counts['items_never_met']:,} of {counts['items']:,} items. They are in the catalogue all the "
            "same: retrieval ranks them, negatives are drawn from them, and figures are not those of a corpus without "
            "them. --k_core 1 leaves them out, and nothing else."
        )


def _check_flags(args: argparse.Namespace, directory: pathlib.Path) -> None:
    for flag in ("k_core", "seed"):
        if (getattr(args, flag) or 0) < 0:
            raise errors.InputError(f"--{flag} must not be negative, but is {getattr(args, flag)}.")
    if args.rating_range is not None and not args.rating_range[0] < args.rating_range[1]:
        raise errors.InputError("--rating_range takes the lowest rating and then the highest.")
    if args.beam_options and args.runner is None:
        raise errors.InputError("--beam_options are for a --runner, and none is given.")
    if args.extend:
        given = [f"--{flag}" for flag in OF_THE_CORPUS if getattr(args, flag) is not None]
        if given:
            own = load_corpus(directory.name, directory.parent).metadata["options"]
            has = ", ".join(f"{flag} {own[flag]}" for flag in OF_THE_CORPUS)
            raise errors.InputError(f"{', '.join(given)} cannot change with --extend: the corpus has {has}.")
    elif directory.exists():
        if not args.overwrite:
            raise errors.InputError(
                f"{directory} exists. Choose another name, replace it with --overwrite, or add to it with --extend."
            )
        if not (directory / "corpus.json").is_file():
            raise errors.InputError(f"{directory} exists and is not a corpus, so it will not be replaced.")

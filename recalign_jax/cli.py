"""`recalign <command>`: one table of commands; each is imported only when it is called."""

import argparse
import contextlib
import errno
import importlib
import json
import logging
import os
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from typing import Any

from recalign_jax import __version__
from recalign_jax.errors import InputError, Preempted, RecalignError, RunError, did_you_mean

# command -> help. Its module in `commands` has add_arguments(parser) and run(args) -> dict; if its USES_GIN is
# true, gin is parsed before it runs.
COMMANDS = {
    "prepare": "build a corpus from raw data",
    "inspect": "statistics of a corpus, or rendered samples",
    "vocab": "train a vocabulary on the text of a corpus",
    "train": "train, or go on where MODEL_DIR stopped",
    "eval": "evaluate a checkpoint",
    "infer": "batch inference: the best items for every user",
    "convert": "between checkpoint formats",
    "baseline": "train and evaluate a conventional recommender",
    "plan": "compile the train step for a TPU topology that isn't there",
    "doctor": "check devices, mesh, memory, a step, a checkpoint",
    "runs": "list runs with state, step and best metric",
    "report": "one page about runs: curves, tables, samples",
}
# These may run as several processes.
RUNS_ON_DEVICES = ("train", "eval", "infer", "doctor")
# These do the same again and again, and on a CPU with the memory of the time before.
REPEATS = ("train", "eval", "infer", "baseline")
# Exit statuses of what the system says of a path that was given, and of a disk that has no room or is gone.
_OF_A_PATH = (errno.EEXIST, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.EACCES, errno.EPERM)
_OF_A_DISK = (errno.ENOENT, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_STATUS_OF = dict.fromkeys(_OF_A_PATH, InputError.exit_status) | dict.fromkeys(_OF_A_DISK, RunError.exit_status)


def _usage() -> str:
    lines = [f"  {name:<10} {text}" for name, text in COMMANDS.items()]
    return "\n".join(
        [
            f"recalign {__version__}: turns FLAN-T5 into a recommender.",
            "",
            "usage: recalign <command> [arguments]   (recalign <command> --help for the arguments)",
            "",
            *lines,
            "",
            "Every command takes --json: its last line on standard output is then one JSON object.",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status: 0 done, 1 failed run, 2 bad input, 75 stopped and saved."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(__version__)
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        print(
            f"recalign: unknown command {name!r}.{did_you_mean(name, COMMANDS)} See recalign --help.", file=sys.stderr
        )
        return 2
    # Late: rich's import would take half of the time of --help.
    from recalign_jax import distributed, terminal

    try:
        with _leaving_on_sigterm() if name == "train" else contextlib.nullcontext():
            ended = _run(name, rest)
        return distributed.end(ended, together=True)
    except RecalignError as error:
        print(f"recalign {name}: {terminal.prefix()}{error.message}", file=sys.stderr)
        return distributed.end(error.exit_status, error.message, together=isinstance(error, Preempted))
    except KeyboardInterrupt:
        print(f"recalign {name}: {terminal.prefix()}interrupted", file=sys.stderr)
        return distributed.end(130, "interrupted")
    except Exception as error:
        if isinstance(error, OSError) and (status := _STATUS_OF.get(error.errno or 0)):
            message = ": ".join(filter(None, (error.strerror, str(error.filename2 or error.filename or ""))))
            print(f"recalign {name}: {terminal.prefix()}{message}", file=sys.stderr)
            return distributed.end(status, message)
        distributed.await_others_failure()
        traceback.print_exc()
        return distributed.end(1, repr(error))


@contextlib.contextmanager
def _leaving_on_sigterm() -> Iterator[None]:
    """Before a run minds SIGTERM by itself (imports, gin files, waiting for other processes) nothing can be lost."""

    def leave(*_: object) -> None:
        # Not by an exception or print, which may not get through from wherever Python is.
        os.write(2, f"recalign train: {Preempted.nothing_to_save}\n".encode())
        os._exit(Preempted.exit_status)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        import jax

        if not jax.distributed.is_initialized():  # JAX has a handler of its own then
            signal.signal(signal.SIGTERM, before)


def _run(name: str, arguments: list[str]) -> int:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import absl.logging

    from recalign_jax import distributed, host, terminal

    if not host.has_tpu():
        host.tell_libtpu_of_no_tpu()
    if name in REPEATS and host.computes_on_cpu():
        host.keep_freed_memory()
    # SeqIO and Orbax tell of every step they take; an error is told of once, by us.
    absl.logging.set_verbosity(absl.logging.FATAL)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    if sys.unraisablehook is sys.__unraisablehook__:
        sys.unraisablehook = _without_closed_loops
    module = importlib.import_module(f"recalign_jax.commands.{name}")
    parser = argparse.ArgumentParser(prog=f"recalign {name}", description=COMMANDS[name], allow_abbrev=False)
    parser.add_argument("--json", action="store_true", help="last line on standard output: one JSON object")
    parser.add_argument("--data_dir", help="where corpora are (default: $RECALIGN_DATA_DIR, then ~/recalign_data)")
    uses_gin = getattr(module, "USES_GIN", False)
    if name in RUNS_ON_DEVICES:
        distributed.add_arguments(parser)
    if uses_gin:
        from recalign_jax import gin_config

        gin_config.add_arguments(parser)
    module.add_arguments(parser)
    if uses_gin:
        args, left = parser.parse_known_args(arguments)
        gin_config.parse(args.gin_file, gin_config.bindings_of(left))
    else:
        args = parser.parse_args(arguments)
    if name in RUNS_ON_DEVICES:
        distributed.start(args, saves_on_sigterm=name == "train")
    result = module.run(args)
    if args.json and terminal.speaks():
        print(json.dumps(result), flush=True)
    return 0 if result.get("ok", True) else 1


def _without_closed_loops(unraisable: Any) -> None:
    """Orbax closes its event loop at the first read that fails; all others under way would tell of that."""
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


if __name__ == "__main__":
    sys.exit(main())

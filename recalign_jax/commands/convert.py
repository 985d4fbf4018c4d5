"""`recalign convert`: from a checkpoint of any format that is read here to one that can be written."""

import argparse
import pathlib
import time
from typing import Any

from recalign_jax import terminal
from recalign_jax.checkpoint.convert import TARGETS, check_output, convert
from recalign_jax.checkpoint.formats import HUGGING_FACE, RECALIGN, Checkpoint, open_checkpoint
from recalign_jax.errors import InputError
from recalign_jax.reporting import gin_text
from seqio_tasks import vocabulary as vocabularies
from seqio_tasks.vocabulary import Vocabulary


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the command."""
    parser.add_argument(
        "--input",
        required=True,
        metavar="P",
        help="a MODEL_DIR or one checkpoint of it, a Hugging Face folder or hub name (google/flan-t5-base), or one "
        "step of T5X (a folder or gs://bucket/path); which one it is is found out",
    )
    parser.add_argument("--output", required=True, type=pathlib.Path, metavar="P", help="the folder to write")
    parser.add_argument("--to", required=True, choices=TARGETS)
    parser.add_argument(
        "--vocabulary", metavar="PATH", help="SentencePiece model of the checkpoint (default: that of the run)"
    )
    parser.add_argument(
        "--dtype", default="float32", choices=("float32", "bfloat16"), help="of the weights that are written"
    )
    parser.add_argument("--max_shard_size", type=float, default=5.0, metavar="GB", help="of a safetensors file")
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint at --output")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Converts."""
    began = time.monotonic()
    checkpoint = open_checkpoint(args.input)
    if args.to == RECALIGN and args.dtype != "float32":
        raise InputError(f"--dtype {args.dtype}: our own checkpoints are float32.")
    if args.max_shard_size <= 0:
        raise InputError(f"--max_shard_size {args.max_shard_size}: must be above 0.")
    output = args.output.expanduser()
    check_output(checkpoint, output, args.overwrite)
    words = _vocabulary(args.vocabulary, checkpoint, args.data_dir)
    # A folder's own tokenizer files are copied as they are.
    copies = checkpoint.input_format == HUGGING_FACE and not args.vocabulary
    if args.to == HUGGING_FACE and words is None and not copies:
        terminal.warn("No tokenizer files are written: give the SentencePiece model with --vocabulary.")
    count = convert(
        checkpoint,
        output,
        args.to,
        None if words is None or copies else pathlib.Path(words.path),
        _identity(checkpoint, args.input, words),
        args.dtype,
        round(args.max_shard_size * 1e9),
    )
    terminal.say(f"{args.input} ({checkpoint.input_format}), {count:,} parameters, written to {output}.")
    if args.to == HUGGING_FACE:
        terminal.next_step(
            "python", "-c", f"import transformers; transformers.T5ForConditionalGeneration.from_pretrained('{output}')"
        )
    elif args.to == RECALIGN:
        terminal.say(f"Next: recalign train ... --gin.INITIAL_CHECKPOINT={output}")
    else:
        [step] = output.glob("checkpoint_*")
        terminal.say(f"Next: python -m t5x.train ... --gin.INITIAL_CHECKPOINT_PATH=\"'{step.absolute()}'\"")
    return {
        "parameters": count,
        "input_format": checkpoint.input_format,
        "output": str(output),
        "seconds": round(time.monotonic() - began, 2),
    }


def _vocabulary(given: str | None, checkpoint: Checkpoint, data_dir: str | None) -> Vocabulary | None:
    """The vocabulary given, else that in the folder or that the run's config.gin names; None if it isn't known."""
    trained_with = checkpoint.identity.get("vocabulary")
    if given:
        words = vocabularies.load(vocabularies.find(given, data_dir))
        if trained_with not in (None, words.fingerprint):
            raise InputError(f"{checkpoint.path} was trained with another vocabulary than {given}.")
        return words
    if checkpoint.folder is None:
        return None
    if (checkpoint.folder / "spiece.model").is_file():
        return vocabularies.load(str(checkpoint.folder / "spiece.model"))
    for folder in (checkpoint.folder, *checkpoint.folder.absolute().parents[:2]):
        config = folder / "config.gin"
        named = gin_text.values(config.read_text(encoding="utf-8")).get("VOCABULARY") if config.is_file() else None
        if named:
            try:
                words = vocabularies.load(vocabularies.find(str(named), data_dir))
            except InputError:  # it isn't here, or no longer what it was
                return None
            return words if words.fingerprint == trained_with else None
    return None


def _identity(checkpoint: Checkpoint, path: str, words: Vocabulary | None) -> dict[str, Any]:
    """What one of our own checkpoints says of its run: that of the input, whose adapters are merged now."""
    known = {"vocabulary": words.fingerprint} if words else {}
    kept = {name: value for name, value in checkpoint.identity.items() if name not in ("base", "lora")}
    return {**known, **kept, "converted from": path}

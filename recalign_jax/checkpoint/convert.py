"""From a checkpoint of any format that is read here to a Hugging Face folder, one of our own or one of T5X."""

import dataclasses
import math
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

from recalign_jax import files, terminal
from recalign_jax.checkpoint import export_huggingface, export_t5x, locations, saved, streaming
from recalign_jax.checkpoint.arrays import Array
from recalign_jax.checkpoint.fingerprints import one_by_one
from recalign_jax.checkpoint.formats import HUGGING_FACE, RECALIGN, Checkpoint, our_params
from recalign_jax.checkpoint.hub import TOKENIZER_FILES
from recalign_jax.errors import InputError

# Of a folder of Hugging Face's, beside weights and tokenizer.
_MODEL_FILES = ("config.json", "generation_config.json", "model.safetensors.index.json")
T5X = "t5x"
TARGETS = (HUGGING_FACE, RECALIGN, T5X)
# Not 0: a run that is told to go on in such a folder must see that there is a checkpoint, and that it isn't its own.
STEP = 1


def check_output(checkpoint: Checkpoint, output: pathlib.Path, overwrite: bool) -> None:
    """Raises InputError when `output` is there already, or must not be overwritten."""
    if not output.exists():
        return
    if not overwrite:
        raise InputError(f"{output} is there already. Give another --output, or --overwrite.")
    for folder in _needed(checkpoint):
        if folder.resolve().is_relative_to(output.resolve()):
            what = "the input" if folder == checkpoint.folder else f"{folder}, which the input has adapters of and"
            raise InputError(f"{output} holds {what}, which would be lost. Give another --output.")
    if (output / "metrics.jsonl").is_file() or any((output / locations.DIRECTORY).glob("*/optimizer")):
        raise InputError(f"{output} holds a training run, which is not overwritten. Give another --output.")
    if not _is_written_by_convert(output):
        raise InputError(
            f"{output} holds no checkpoint, or other files beside it, so it is not overwritten. Give another --output."
        )


def _is_written_by_convert(folder: pathlib.Path) -> bool:
    """Whether a folder is a model of Hugging Face's, one of our own or one of T5X, and nothing more."""
    inside = {path.name for path in folder.iterdir()}
    if (folder / locations.DIRECTORY).is_dir():
        return inside == {locations.DIRECTORY} and bool(locations.steps(str(folder)))
    if any(folder.glob("checkpoint_*")):
        return len(inside) == 1 and bool(list(folder.glob("checkpoint_*/checkpoint")))
    beside = inside - {*TOKENIZER_FILES, *_MODEL_FILES}
    return any(folder.glob("*.safetensors")) and all(name.endswith(".safetensors") for name in beside)


def _needed(checkpoint: Checkpoint) -> list[pathlib.Path]:
    """The folders on this machine that a checkpoint is read from: its own, and those of what it has adapters of."""
    found = [] if checkpoint.folder is None else [checkpoint.folder]
    told = checkpoint.identity.get("base")
    while told is not None and pathlib.Path(told["path"]).is_absolute():
        found.append(pathlib.Path(told["path"]))
        is_run = locations.steps(locations.model_dir_of(told["path"]))
        told = saved.read_identity(told["path"]).get("base") if is_run else None
    return found


def convert(
    checkpoint: Checkpoint,
    output: pathlib.Path,
    to: str,
    vocabulary: pathlib.Path | None,
    identity: Mapping[str, Any],
    dtype: str,
    max_shard_bytes: int,
) -> int:
    """Converts a checkpoint, reading and writing one parameter at a time; `output` appears when it is whole.

    Args:
      checkpoint: from `open_checkpoint`.
      output: the folder to write.
      to: one of TARGETS.
      vocabulary: a SentencePiece model for the tokenizer files of a Hugging Face folder; None copies those of the input
        where it has some.
      identity: what one of our own checkpoints says of the run that it is from.
      dtype: of the weights, `float32` or `bfloat16`; one of our own checkpoints has float32 in any case.
      max_shard_bytes: of a safetensors file.

    Returns:
      The number of parameters written.

    Raises:
      InputError: when a parameter of the input is missing, left over, of an unexpected shape, or (of one of our own)
        not what was saved, or `to` can't run such a model.
    """
    config = checkpoint.config
    params: dict[str, Array] = our_params(checkpoint, config, seed=0)
    hashes = one_by_one(params) if checkpoint.fingerprints or to == RECALIGN else {}
    checkpoint.check_whole(hashes)
    optimizer, step = _adafactor_state(checkpoint) if to == T5X else ({}, 0)
    if to == HUGGING_FACE:
        params, config = export_huggingface.without_padding(params, config)
    with files.atomic_directory(output) as aside, terminal.progress("convert", len(params), "parameters") as advance:
        if to == RECALIGN:
            metadata = {"identity": dict(identity), "model": dataclasses.asdict(config), "positions": []}
            metadata["fingerprints"] = {f"params/{path}": value for path, value in hashes.items()}
            streaming.save_streaming(str(aside), STEP, params, saved.sealed(metadata), advance)
        elif to == T5X:
            (aside / f"checkpoint_{step}").mkdir()
            export_t5x.write_step(aside / f"checkpoint_{step}", params, config, dtype, step, optimizer, advance)
        else:
            export_huggingface.write_model(aside, params, config, dtype, max_shard_bytes, advance)
            if vocabulary is not None:
                export_huggingface.write_tokenizer(aside, vocabulary, config)
            elif checkpoint.input_format == HUGGING_FACE and checkpoint.folder is not None:
                for name in TOKENIZER_FILES:
                    if (checkpoint.folder / name).is_file():
                        shutil.copyfile(checkpoint.folder / name, aside / name)
    return sum(math.prod(array.shape) for array in params.values())


def _adafactor_state(checkpoint: Checkpoint) -> tuple[dict[str, Array], int]:
    """Adafactor's state by path, and the updates done, of a run that trained all parameters with it; else {} and 0."""
    folder = checkpoint.folder
    has_adapters = "base" in checkpoint.identity
    if checkpoint.input_format != RECALIGN or folder is None or has_adapters or not (folder / "optimizer").exists():
        return {}, 0
    state = saved.read_arrays(str(folder), "optimizer")
    if not export_t5x.is_adafactor(state):
        return {}, 0
    hashes = saved.read_metadata(folder).get("fingerprints", {})
    saved.check_hashes(folder, hashes, one_by_one({f"optimizer/{path}": array for path, array in state.items()}))
    return state, int(folder.name)

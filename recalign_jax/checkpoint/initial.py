"""Where a new run's parameters come from: a checkpoint in any format that is read here, found out by looking at it."""

import dataclasses
import pathlib
from types import ModuleType
from typing import Any

import jax
import numpy as np

from recalign_jax.checkpoint import huggingface, stacking, t5x, training
from recalign_jax.errors import InputError
from recalign_jax.model import t5
from recalign_jax.model.config import T5Config

# The two parameters with a row (or column) a token, and the axis of the tokens.
_TOKEN_AXES = {"token_embedder/embedding": 0, "decoder/logits_dense/kernel": 1}


def load_initial(path: str, config: T5Config, seed: int, params: Any) -> Any:
    """Reads parameters to start from.

    Args:
      path: a MODEL_DIR or checkpoint of `recalign train`, a Hugging Face folder, or a T5X checkpoint folder.
      config: of the model to be trained.
      seed: entries of the vocabulary that the checkpoint lacks (item tokens) are drawn as in a new model.
      params: its parameters' ShapeDtypeStructs with shardings.

    Returns:
      Parameters laid out as `params`.

    Raises:
      InputError: when the format isn't known, or a parameter is missing, left over or of another shape.
    """
    folder = pathlib.Path(path).expanduser()
    if (folder / "config.json").is_file():
        reader: ModuleType = huggingface
        _check_tied(huggingface.read_config(folder), config, path)
        arrays, embedding = huggingface.read_arrays(folder), "shared.weight"
    elif (folder / "checkpoint").is_file() or (folder / "state").is_dir():
        reader = t5x
        arrays, embedding = t5x.read_arrays(folder), "token_embedder/embedding"
    elif folder.is_dir():
        return training.load_params(path, params)[0]
    else:
        raise InputError(f"INITIAL_CHECKPOINT {path}: no such folder.")
    rows = len(arrays[embedding]) if embedding in arrays else config.vocab_size
    if rows > config.vocab_size:
        raise InputError(
            f"INITIAL_CHECKPOINT {path} has {rows} vocabulary rows, the model only {config.vocab_size}: "
            "give the VOCABULARY that it was trained with (FLAN-T5's spiece.model)."
        )
    loaded = stacking.flatten(
        reader.load_params(arrays, dataclasses.replace(config, vocab_size=rows, num_tokens=None), path)
    )
    if rows < config.vocab_size:
        new = stacking.flatten(jax.jit(lambda key: t5.init_params(config, key))(jax.random.key(seed)))
        for name in _TOKEN_AXES.keys() & loaded.keys():
            old, axis = loaded[name], _TOKEN_AXES[name]
            rest = np.take(np.asarray(new[name]), np.arange(rows, config.vocab_size), axis)
            loaded[name] = np.concatenate([old, rest], axis)
    flat = stacking.flatten(params)
    return stacking.unflatten({name: jax.device_put(array, flat[name].sharding) for name, array in loaded.items()})


def _check_tied(there: T5Config, config: T5Config, path: str) -> None:
    for field in ("logits_via_embedding", "scale_decoder_outputs"):
        if getattr(there, field) != getattr(config, field):
            raise InputError(
                f"INITIAL_CHECKPOINT {path} is a model with {field} {getattr(there, field)}, yours has "
                f"{getattr(config, field)}: set --gin.T5Config.{field}={getattr(there, field)}."
            )

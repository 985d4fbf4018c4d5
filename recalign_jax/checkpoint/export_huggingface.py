"""Writes a Hugging Face folder, one of our parameters in memory at a time.

safetensors' own writer takes all arrays of a file at once. The format is simple: the length of a JSON header in eight
bytes, the header, the arrays one after another (https://huggingface.co/docs/safetensors).
"""

import dataclasses
import json
import math
import pathlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from recalign_jax.checkpoint import huggingface, stacking
from recalign_jax.checkpoint.arrays import SAFETENSORS_DTYPES, Array, LazyArray, whole
from recalign_jax.checkpoint.formats import TOKEN_AXES
from recalign_jax.errors import InputError
from recalign_jax.model.config import T5Config

_DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
_ALIGNMENT = 8  # of the arrays in a file


def without_padding(params: Mapping[str, Array], config: T5Config) -> tuple[dict[str, Array], T5Config]:
    """Leaves out the rows of the vocabulary that stand for no token.

    We mask the logits of these rows, torch doesn't: with them, an untrained row could be its most likely token.
    """
    if config.num_tokens is None:
        return dict(params), config
    cut = dict(params)
    for path, axis in TOKEN_AXES.items():
        if path in cut:
            shape = list(cut[path].shape)
            shape[axis] = config.num_tokens
            cut[path] = LazyArray(tuple(shape), cut[path].dtype, cut[path].__getitem__)
    return cut, dataclasses.replace(config, vocab_size=config.num_tokens)


def write_model(
    folder: pathlib.Path,
    params: Mapping[str, Array],
    config: T5Config,
    dtype: Any,
    max_shard_bytes: int,
    advance: Callable[[int], None],
) -> None:
    """Writes config.json, generation_config.json and the weights as safetensors.

    Args:
      folder: to write into.
      params: our parameters by path.
      config: of their model.
      dtype: of the weights on disk.
      max_shard_bytes: the weights are split into files of at most this size (but for an array that is larger).
      advance: called with 1 for each of our parameters that is written.

    Raises:
      InputError: when transformers can't run such a model.
    """
    dtype, sources = np.dtype(dtype), huggingface.sources(config)
    _write_json(folder / "config.json", huggingface.config_values(config) | {"dtype": dtype.name})
    _write_json(folder / "generation_config.json", huggingface.GENERATION_VALUES)
    shapes = {name: array.shape for name, array in stacking.split(params, sources)}
    bytes_of = {name: math.prod(shape) * dtype.itemsize for name, shape in shapes.items()}
    shards = _shards(bytes_of, max_shard_bytes)
    file_of: dict[str, str] = {}
    for number, names in enumerate(shards):
        part = f"-{number + 1:05}-of-{len(shards):05}" if len(shards) > 1 else ""
        file_of |= dict.fromkeys(names, f"model{part}.safetensors")
        header = _header({name: shapes[name] for name in names}, bytes_of, _DTYPE_NAMES[dtype])
        (folder / file_of[names[0]]).write_bytes(header)
    for path, param in params.items():
        # Read once: of a stored array a layer may not be had without the others.
        _append(folder, stacking.split({path: whole(param)}, sources), file_of, dtype)
        advance(1)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(bytes_of.values())}, "weight_map": file_of}
        _write_json(folder / "model.safetensors.index.json", index)


def write_tokenizer(folder: pathlib.Path, vocabulary: pathlib.Path, config: T5Config) -> None:
    """Writes spiece.model, and tokenizer.json and tokenizer_config.json for it.

    Args:
      folder: to write into.
      vocabulary: a SentencePiece model in T5's layout.
      config: of the model. What the vocabulary and its 100 sentinels leave of `num_tokens` are item tokens,
        `<item_7>`.

    Raises:
      InputError: when the vocabulary has more tokens than the model.
    """
    import transformers
    from tokenizers import AddedToken

    shutil.copyfile(vocabulary, folder / "spiece.model")
    tokenizer = transformers.T5Tokenizer.from_pretrained(folder)
    num_tokens = config.num_tokens or config.vocab_size
    if num_tokens < len(tokenizer):
        raise InputError(f"{vocabulary} has {len(tokenizer)} tokens, the model only {num_tokens}: it is another one's.")
    if config.num_tokens is not None:
        items = range(num_tokens - len(tokenizer))
        tokenizer.add_tokens([AddedToken(f"<item_{item}>", normalized=False) for item in items])
    tokenizer.save_pretrained(folder)


def _append(folder: pathlib.Path, arrays: Iterator[tuple[str, Array]], file_of: Mapping[str, str], dtype: Any) -> None:
    """Writes arrays at the ends of their files. A function: nothing of them is kept when the next are read."""
    for name, array in arrays:
        raw = np.ascontiguousarray(whole(array), dtype).reshape(-1).view(np.uint8)
        with (folder / file_of[name]).open("ab") as file:
            file.write(memoryview(raw))


def _shards(bytes_of: Mapping[str, int], max_shard_bytes: int) -> list[list[str]]:
    """The names that go into each file, in their order."""
    shards: list[list[str]] = []
    free = 0
    for name, size in bytes_of.items():
        if not shards or size > free:
            shards.append([])
            free = max_shard_bytes
        shards[-1].append(name)
        free -= size
    return shards


def _header(shapes: Mapping[str, Sequence[int]], bytes_of: Mapping[str, int], dtype: str) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + bytes_of[name]
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _write_json(path: pathlib.Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")

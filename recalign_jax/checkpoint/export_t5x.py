"""Writes the folder of one step in T5X's own format, version 3, one of our parameters in memory at a time.

The format is a msgpack tree of the train state; large arrays are TensorStore specs in it, of zarr folders beside it
(t5x/checkpoints.py). T5X trains from no parameters without a state of its Adafactor, which ours is equal to.
"""

import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from flax import serialization, traverse_util

from recalign_jax.checkpoint import stacking, t5x
from recalign_jax.checkpoint.arrays import Array, whole
from recalign_jax.checkpoint.formats import TOKEN_AXES
from recalign_jax.corpus.catalog import PAD_ID
from recalign_jax.errors import InputError
from recalign_jax.model.config import T5Config

_CHUNK_ELEMENTS = 2**24  # of an array on disk
_ROW, _COLUMN = "v_row", "v_col"
_STATISTICS = (_ROW, _COLUMN, "v", "m")
_NONE = np.zeros(1, np.float32)  # T5X's for a statistic that a parameter has not
_MIN_DIM_SIZE_TO_FACTOR = 128  # T5X's default


def is_adafactor(optimizer: Mapping[str, Array]) -> bool:
    """Whether the arrays of an optimizer's state, by their paths, are those of our Adafactor."""
    return bool(_below("moments", optimizer))


def write_step(
    folder: pathlib.Path,
    params: Mapping[str, Array],
    config: T5Config,
    dtype: Any,
    step: int,
    optimizer: Mapping[str, Array],
    advance: Callable[[int], None],
) -> None:
    """Writes a train state.

    The rows of the vocabulary that stand for no token get the weights of padding: we mask the logits of these rows, T5X
    doesn't, so an untrained one could be its most likely token. No target is padding, so that one's logits are low.

    Args:
      folder: to write into.
      params: our parameters by path.
      config: of their model.
      dtype: of the parameters on disk.
      step: updates done.
      optimizer: the state of our Adafactor by path; empty for that before a first update, which is all zeros.
      advance: called with 1 for each of our parameters that is written.

    Raises:
      InputError: when T5X can't run such a model.
    """
    _check_is_t5xs(config)
    sources = t5x.sources(config)
    moments, momentum = _below("moments", optimizer), _below("ema", optimizer)

    def layers(path: str, array: Array) -> Iterator[tuple[str, np.ndarray]]:
        return ((name, whole(layer)) for name, layer in stacking.split({path: array}, sources))

    target: dict[str, Any] = {}
    states: dict[str, Any] = {}
    for path, param in params.items():
        stacked = int(sources[path].stacked)  # axes before those of one layer
        for name, layer in layers(path, _with_unused_rows(path, whole(param), config)):
            target[name] = _write_zarr(folder, f"target/{name}", layer.astype(dtype))
            states[name] = dict.fromkeys(_STATISTICS, _NONE)
        if optimizer:
            statistics = _statistics(path, param.shape[stacked:], moments, momentum)
        else:
            statistics = _before_first_update(param.shape[:stacked], param.shape[stacked:])
        for statistic, array in statistics.items():
            for name, layer in layers(path, array):
                place = f"state/param_states/{name}/{statistic}"
                small = statistic in (_ROW, _COLUMN)
                states[name][statistic] = layer if small else _write_zarr(folder, place, layer)
        advance(1)
    nested_target, nested_states = (traverse_util.unflatten_dict(flat, sep="/") for flat in (target, states))
    state = {"step": np.asarray(step, np.int32), "param_states": nested_states}
    tree = {"version": 3, "optimizer": {"target": nested_target, "state": state}}
    (folder / "checkpoint").write_bytes(serialization.msgpack_serialize(tree))


def _check_is_t5xs(config: T5Config) -> None:
    """Its network has these numbers in the code."""
    its = {"relative_attention_num_buckets": 32, "relative_attention_max_distance": 128, "layer_norm_epsilon": 1e-6}
    its["scale_decoder_outputs"] = config.logits_via_embedding
    for field, value in its.items():
        if getattr(config, field) != value:
            raise InputError(f"T5Config.{field} is {getattr(config, field)}: T5X has no such T5.1.1, only {value}.")


def _with_unused_rows(path: str, value: np.ndarray, config: T5Config) -> np.ndarray:
    if path not in TOKEN_AXES or config.num_tokens is None:
        return value
    value = value.copy()
    rows = np.moveaxis(value, TOKEN_AXES[path], 0)
    rows[config.num_tokens :] = rows[PAD_ID]
    return value


def _factors(matrix: tuple[int, ...]) -> tuple[str, str]:
    """T5X's names of our row and our column: its rows are the smaller dimension of a matrix, ours the first."""
    return (_ROW, _COLUMN) if sorted(matrix) == list(matrix) else (_COLUMN, _ROW)


def _before_first_update(layers: tuple[int, ...], shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    """The statistics of one parameter, of `shape` a layer, by T5X's names."""
    if len(shape) == 2 and min(shape) >= _MIN_DIM_SIZE_TO_FACTOR:
        sizes = zip(_factors(shape), shape, strict=True)
        return {kind: np.zeros((*layers, size), np.float32) for kind, size in sizes}
    return {"v": np.zeros(layers + shape, np.float32)}


def _statistics(
    path: str, shape: tuple[int, ...], moments: Mapping[str, Array], momentum: Mapping[str, Array]
) -> dict[str, np.ndarray]:
    """Those that a parameter, of `shape` a layer, has in our Adafactor's state, by T5X's names."""
    first, second = _factors(shape)
    found = {first: moments.get(f"{path}/row"), second: moments.get(f"{path}/column")}
    found |= {"v": moments.get(path), "m": momentum.get(path)}
    kept = {kind: whole(array) for kind, array in found.items() if array is not None}
    if "m" in kept:
        kept["m"] = -kept["m"]  # of what is subtracted there, of what is added here
    return kept


def _below(part: str, optimizer: Mapping[str, Array]) -> dict[str, Array]:
    """What an optimizer's state has below a field of it, wherever it stands in a chain, by the paths below that."""
    split = {name: f"/{name}".partition(f"/{part}/") for name in optimizer}
    return {below: optimizer[name] for name, (_, found, below) in split.items() if found}


def _write_zarr(folder: pathlib.Path, path: str, array: np.ndarray) -> dict[str, Any]:
    """Writes an array, and returns the spec that T5X finds it by: without the folder, so that it can be moved."""
    import tensorstore

    name = path.replace("/", ".") + "/"
    spec = {"driver": "zarr", "dtype": array.dtype.name, "kvstore": {"driver": "file", "path": name}}
    store = tensorstore.open(
        spec
        | {
            "kvstore": {"driver": "file", "path": f"{folder.absolute()}/{name}"},
            "metadata": {"compressor": {"id": "gzip"}},
            "schema": {"chunk_layout": {"chunk": {"elements": _CHUNK_ELEMENTS}}},
        },
        create=True,
        shape=array.shape,
    ).result()
    store.write(array).result()
    written = store.spec().to_json()["metadata"]
    return spec | {"metadata": {key: written[key] for key in ("chunks", "compressor", "shape")}}

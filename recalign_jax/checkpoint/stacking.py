"""From one array a layer, as other frameworks store them, to our parameters stacked over layers, and back.

A format is a table from our parameter's path to a `Source`; everything else is here. Nothing is read before a slice
of a parameter is asked for, and then only what the slice needs.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from flax import traverse_util

from recalign_jax.checkpoint.arrays import Array, Index, LazyArray, whole
from recalign_jax.errors import InputError, did_you_mean


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a parameter stands in a foreign checkpoint."""

    names: tuple[str, ...]  # one a layer if stacked, else one
    stacked: bool
    transposed: bool


def stack(
    arrays: Mapping[str, Array], sources: Mapping[str, Source], abstract: dict[str, Any], where: str
) -> dict[str, Array]:
    """Returns our parameters by path, as float32 arrays that are read from `arrays` in slices.

    Raises InputError, naming the parameter and `where`, for one that is missing, left over or of another shape than
    in `abstract` (nested shapes).
    """
    shapes = {path: tuple(leaf.shape) for path, leaf in flatten(abstract).items()}
    for path, shape in shapes.items():
        _check(arrays, sources[path], path, shape[1:] if sources[path].stacked else shape, where)
    left = sorted(set(arrays) - {name for source in sources.values() for name in source.names})
    if left:
        raise InputError(
            f"{where}: the model has no place for parameter {left[0]!r} ({len(left)} such). "
            "Is it the right model gin file?"
        )
    return {path: _stacked([arrays[name] for name in sources[path].names], sources[path], shape)
            for path, shape in shapes.items()}  # fmt: skip


def split(params: Mapping[str, Array], sources: Mapping[str, Source]) -> Iterator[tuple[str, Array]]:
    """The inverse of `stack`: the foreign checkpoint's arrays by name, read from `params` (by path) in slices."""
    for path, param in params.items():
        for layer, name in enumerate(sources[path].names):
            yield name, _layer(param, layer, sources[path])


def load(
    arrays: Mapping[str, Array], sources: Mapping[str, Source], abstract: dict[str, Any], where: str
) -> dict[str, Any]:
    """Returns parameters as numpy arrays in the nesting and shapes of `abstract`; raises as `stack` does."""
    return unflatten({path: whole(array) for path, array in stack(arrays, sources, abstract, where).items()})


def flatten(params: dict[str, Any]) -> dict[str, Any]:
    """{'encoder': {'encoder_norm': ...}} -> {'encoder/encoder_norm': ...}."""
    return traverse_util.flatten_dict(params, sep="/")


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`."""
    return traverse_util.unflatten_dict(dict(flat), sep="/")


def without(names: Iterable[str], arrays: Mapping[str, Array]) -> dict[str, Array]:
    """The arrays but those of `names`."""
    return {name: array for name, array in arrays.items() if name not in set(names)}


def _check(arrays: Mapping[str, Array], source: Source, path: str, expected: tuple[int, ...], where: str) -> None:
    """`expected`: the shape of one layer."""
    expected = _turned(expected, source)
    for name in source.names:
        if name not in arrays:
            raise InputError(f"{where}: no parameter {name!r}, needed for {path!r}.{did_you_mean(name, arrays)}")
        if tuple(arrays[name].shape) != expected:
            raise InputError(
                f"{where}: parameter {name!r} has shape {list(arrays[name].shape)}, the model expects "
                f"{list(expected)} (for {path!r}). Is it the right model gin file and vocabulary?"
            )


def _stacked(layers: list[Array], source: Source, shape: tuple[int, ...]) -> LazyArray:
    def read_layer(array: Array, index: Index) -> np.ndarray:
        return array[index[::-1]].T if source.transposed else array[index]

    def read(index: Index) -> np.ndarray:
        if not source.stacked:
            return read_layer(layers[0], index).astype(np.float32)
        bounds = [part.indices(size)[:2] for part, size in zip(index, shape, strict=True)]
        out = np.empty([stop - start for start, stop in bounds], np.float32)
        for place, array in zip(out, layers[index[0]], strict=True):
            place[...] = read_layer(array, index[1:])
        return out

    return LazyArray(shape, np.dtype(np.float32), read)


def _layer(param: Array, layer: int, source: Source) -> LazyArray:
    def read(index: Index) -> np.ndarray:
        index = index[::-1] if source.transposed else index
        array = param[(slice(layer, layer + 1), *index)][0] if source.stacked else param[index]
        return np.ascontiguousarray(array.T) if source.transposed else array

    return LazyArray(_turned(tuple(param.shape[1:] if source.stacked else param.shape), source), param.dtype, read)


def _turned(shape: tuple[int, ...], source: Source) -> tuple[int, ...]:
    return shape[::-1] if source.transposed else shape

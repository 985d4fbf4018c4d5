"""From one array a layer, as other frameworks store them, to our parameters stacked over layers, and back.

A format is a table from our parameter's path to a `Source`; everything else is here.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from flax import traverse_util

from recalign_jax.errors import InputError, did_you_mean


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a parameter stands in a foreign checkpoint."""

    names: tuple[str, ...]  # one a layer if stacked, else one
    stacked: bool
    transposed: bool


def load(
    arrays: Mapping[str, np.ndarray], sources: Mapping[str, Source], abstract: dict[str, Any], where: str
) -> dict[str, Any]:
    """Returns parameters as float32 numpy arrays in the nesting and shapes of `abstract`.

    `arrays` may read lazily: each name is looked up once. Raises InputError, naming the parameter and `where`,
    for one that is missing or of another shape.
    """
    params = {}
    for path, shape in ((path, leaf.shape) for path, leaf in flatten(abstract).items()):
        source = sources[path]
        params[path] = out = np.empty(shape, np.float32)
        for layer, name in enumerate(source.names):
            if name not in arrays:
                raise InputError(f"{where}: no parameter {name!r}, needed for {path!r}.{did_you_mean(name, arrays)}")
            array = arrays[name].T if source.transposed else arrays[name]
            target = out[layer] if source.stacked else out
            if array.shape != target.shape:
                found, expected = _shape(array.shape, source), _shape(target.shape, source)
                raise InputError(
                    f"{where}: parameter {name!r} has shape {found}, the model expects {expected} (for {path!r}). "
                    "Is it the right model gin file and vocabulary?"
                )
            target[...] = array
    return unflatten(params)


def unload(params: dict[str, Any], sources: Mapping[str, Source]) -> dict[str, np.ndarray]:
    """The inverse of `load`: the foreign checkpoint's arrays by name, float32."""
    arrays = {}
    for path, param in flatten(params).items():
        source, array = sources[path], np.asarray(param)
        for name, slice_ in zip(source.names, array if source.stacked else array[None], strict=True):
            arrays[name] = np.ascontiguousarray(slice_.T) if source.transposed else np.copy(slice_)
    return arrays


def check_nothing_left(names: Iterable[str], sources: Mapping[str, Source], where: str) -> None:
    """Raises InputError if the checkpoint holds parameters that the model has no place for (a layer too many, say)."""
    left = sorted(set(names) - {name for source in sources.values() for name in source.names})
    if left:
        raise InputError(
            f"{where}: the model has no place for parameter {left[0]!r} ({len(left)} such). "
            "Is it the right model gin file?"
        )


def flatten(params: dict[str, Any]) -> dict[str, Any]:
    """{'encoder': {'encoder_norm': ...}} -> {'encoder/encoder_norm': ...}."""
    return traverse_util.flatten_dict(params, sep="/")


def unflatten(flat: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`."""
    return traverse_util.unflatten_dict(flat, sep="/")


def _shape(shape: tuple[int, ...], source: Source) -> list[int]:
    return list(reversed(shape)) if source.transposed else list(shape)

"""Checkpoints that T5X wrote, in its own format (published FLAN-T5 is in it) or through Orbax, in a folder or a bucket.

A checkpoint is read into a flat dict {'encoder/layers_0/mlp/wo/kernel': array}. Our parameters have the same names,
with the layers stacked. (T5X's other network, `scalable_t5`, has a relative position bias in every layer, which is
another model.)
"""

import os
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import serialization, traverse_util

from recalign_jax.checkpoint import stacking
from recalign_jax.checkpoint.arrays import Array, open_orbax, open_store, open_zarrs, read_file
from recalign_jax.checkpoint.stacking import Source
from recalign_jax.errors import InputError
from recalign_jax.model.config import T5Config
from recalign_jax.model.t5 import abstract_params

LEGACY, ORBAX = "t5x_legacy", "t5x_orbax"


def which(path: str | os.PathLike[str]) -> str | None:
    """Returns LEGACY or ORBAX for the folder of one step, e.g. `.../checkpoint_1000`, None if it is neither."""
    store = open_store(str(path))
    if read_file(store, "checkpoint") is not None:
        return LEGACY
    return ORBAX if read_file(store, "state/_METADATA") is not None else None


def read_arrays(path: str | os.PathLike[str]) -> dict[str, Array]:
    """Opens the weights (not the optimizer state) of a T5X checkpoint, either format; nothing is read yet.

    Args:
      path: of one step: a folder, or `gs://bucket/path`.

    Raises:
      InputError: if it is neither format, or holds another network than T5.1.1.
    """
    path, found = str(path), which(path)
    if found is None:
        raise InputError(
            f"{path}: not a T5X checkpoint: neither a file 'checkpoint' (T5X's own format) nor 'state/_METADATA' "
            "(Orbax) is in it. Give the folder of one step, as in .../checkpoint_1000000."
        )
    arrays = _open_legacy(path) if found == LEGACY else _open_orbax(path)
    if any(name.startswith("encoder/encoder/") for name in arrays):
        raise InputError(
            f"{path}: a model of T5X's scalable_t5, which has a relative position bias in every layer. That is another "
            "model than T5.1.1 and can't be converted; t5x/examples/t5 is the network that can."
        )
    return arrays


def load_params(arrays: Mapping[str, Array], config: T5Config, where: str) -> dict[str, Any]:
    """Returns our parameters (float32 numpy) from arrays named as T5X names them; `where` is for messages.

    Raises InputError that names a parameter which is missing, left over or of another shape.
    """
    return stacking.load(arrays, sources(config), abstract_params(config), where)


def sources(config: T5Config) -> dict[str, Source]:
    """Where T5X has our parameters, by path."""
    layers, found = {"encoder": config.num_encoder_layers, "decoder": config.num_decoder_layers}, {}
    for path in stacking.flatten(abstract_params(config)):
        stack, stacked, rest = path.partition("/layers/")
        names = tuple(f"{stack}/layers_{layer}/{rest}" for layer in range(layers[stack])) if stacked else (path,)
        found[path] = Source(names, bool(stacked), transposed=False)
    return found


def stacked_shapes(arrays: Mapping[str, Array]) -> dict[str, tuple[int, ...]]:
    """The shapes that our parameters have when T5X's `arrays` are stacked, by path (for `sizes.infer`)."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, array in arrays.items():
        path, layers = re.subn(r"/layers_\d+/", "/layers/", name)
        shapes[path] = (shapes.get(path, (0,))[0] + 1, *array.shape) if layers else tuple(array.shape)
    return shapes


def _open_legacy(path: str) -> dict[str, Array]:
    """Version 3: a msgpack tree of the train state; large arrays are TensorStore specs of zarr folders beside it."""
    store, file = open_store(path), f"{path.rstrip('/')}/checkpoint"
    try:
        tree = serialization.msgpack_restore(read_file(store, "checkpoint") or b"")
        version, target = tree["version"], tree["optimizer"]["target"]
    except Exception as error:
        raise InputError(f"{file}: not a T5X checkpoint, or damaged ({error})") from None
    if version != 3:
        raise InputError(f"{file}: T5X checkpoint of version {version}; only version 3 is read")
    leaves = traverse_util.flatten_dict(target, sep="/", is_leaf=lambda _, node: _is_spec(node))
    base, specs = store.spec().to_json(), {}
    for name, leaf in leaves.items():
        if _is_spec(leaf):
            # The spec names the storage that the checkpoint was written to; the zarr folder's own name still holds.
            folder = leaf["kvstore"]["path"].rstrip("/").rsplit("/", 1)[-1]
            specs[name] = {"driver": leaf["driver"], "kvstore": base | {"path": f"{base['path']}{folder}/"}}
    opened = open_zarrs(specs)
    return {name: opened[name] if name in opened else np.asarray(leaf) for name, leaf in leaves.items()}


def _is_spec(node: Any) -> bool:
    return isinstance(node, dict) and {"driver", "kvstore"} <= set(node)


def _open_orbax(path: str) -> dict[str, Array]:
    where = f"{path.rstrip('/')}/state"
    arrays = open_orbax(open_store(where), where, "target/")
    if not arrays:
        raise InputError(f"{where}: not a T5X checkpoint: it has no 'target'.")
    return arrays

"""Checkpoints that T5X wrote, in its own format (published FLAN-T5 is in it) or through Orbax.

A checkpoint is read into a flat dict {'encoder/layers_0/mlp/wo/kernel': array}. Our parameters have the same names,
with the layers stacked. (T5X's other network, `scalable_t5`, stores stacked layers under other names and is not read.)
"""

import asyncio
import logging
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import serialization, traverse_util

from recalign_jax.checkpoint import stacking
from recalign_jax.checkpoint.stacking import Source
from recalign_jax.errors import InputError
from recalign_jax.model.config import T5Config
from recalign_jax.model.t5 import abstract_params


def read_arrays(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """Returns the weights (not the optimizer state) in a T5X checkpoint folder, e.g. `checkpoint_1000`, either format.

    Raises InputError if the folder is neither.
    """
    if (folder / "checkpoint").is_file():
        return _read_legacy(folder)
    if (folder / "state").is_dir():
        return _read_orbax(folder / "state")
    raise InputError(
        f"{folder}: not a T5X checkpoint: neither a file 'checkpoint' (T5X's own format) nor a folder 'state' (Orbax) "
        "is in it. Give the folder of one step, as in .../checkpoint_1000000."
    )


def load_params(arrays: Mapping[str, np.ndarray], config: T5Config, where: str) -> dict[str, Any]:
    """Returns our parameters (float32 numpy) from arrays named as T5X names them; `where` is for messages.

    Raises InputError that names a parameter which is missing, left over or of another shape.
    """
    layers = {"encoder": config.num_encoder_layers, "decoder": config.num_decoder_layers}
    abstract, sources = abstract_params(config), {}
    for path in stacking.flatten(abstract):
        stack, stacked, rest = path.partition("/layers/")
        names = tuple(f"{stack}/layers_{layer}/{rest}" for layer in range(layers[stack])) if stacked else (path,)
        sources[path] = Source(names, bool(stacked), transposed=False)
    stacking.check_nothing_left(arrays, sources, where)
    return stacking.load(arrays, sources, abstract, where)


def _read_legacy(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """Version 3: a msgpack tree of the train state; large arrays are TensorStore specs of zarr folders beside it."""
    try:
        tree = serialization.msgpack_restore((folder / "checkpoint").read_bytes())
        version, target = tree["version"], tree["optimizer"]["target"]
    except Exception as error:
        raise InputError(f"{folder / 'checkpoint'}: not a T5X checkpoint, or damaged ({error})") from None
    if version != 3:
        raise InputError(f"{folder / 'checkpoint'}: T5X checkpoint of version {version}; only version 3 is read")
    leaves = traverse_util.flatten_dict(target, sep="/", is_leaf=lambda _, node: _is_spec(node))

    async def read_all() -> list[np.ndarray]:
        return await asyncio.gather(*(_read_leaf(folder, name, leaf) for name, leaf in leaves.items()))

    return dict(zip(leaves, asyncio.run(read_all()), strict=True))


def _is_spec(node: Any) -> bool:
    return isinstance(node, dict) and {"driver", "kvstore"} <= set(node)


async def _read_leaf(folder: pathlib.Path, name: str, leaf: Any) -> np.ndarray:
    if not _is_spec(leaf):
        return np.asarray(leaf)
    import tensorstore

    # The spec names the storage that the checkpoint was written to; the zarr folder's own name is what still holds.
    path = folder / leaf["kvstore"]["path"].rstrip("/").rsplit("/", 1)[-1]
    try:
        store = await tensorstore.open({"driver": leaf["driver"], "kvstore": {"driver": "file", "path": str(path)}})
        return await store.read()
    except ValueError as error:
        raise InputError(f"{path}: parameter {name!r} can't be read: {error}") from None


def _read_orbax(state: pathlib.Path) -> dict[str, np.ndarray]:
    import jax
    import orbax.checkpoint as ocp

    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax warns of a file that T5X doesn't write
    checkpointer = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
    try:
        target = checkpointer.metadata(state).item_metadata.tree["target"]
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), target)
        restore = ocp.args.PyTreeRestore(
            item={"target": target}, restore_args={"target": as_numpy}, partial_restore=True
        )
        return stacking.flatten(checkpointer.restore(state, restore)["target"])
    except (KeyError, ValueError, FileNotFoundError) as error:
        raise InputError(f"{state}: not a T5X checkpoint written through Orbax, or damaged ({error})") from None

"""Writes a checkpoint without optimizer state (a converted model) one parameter at a time."""

import dataclasses
import logging
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax import traverse_util

from recalign_jax.checkpoint.arrays import Array, whole
from recalign_jax.checkpoint.locations import DIRECTORY

CHUNK_BYTES = 2**24  # what a parameter is written in, so that a reader of a few layers need not read them all


def save_streaming(
    model_dir: str, step: int, params: Mapping[str, Array], metadata: dict[str, Any], advance: Callable[[int], None]
) -> None:
    """Writes a checkpoint without optimizer state, one parameter in memory at a time.

    Args:
      model_dir: the folder to write into.
      step: the checkpoint's number.
      params: by path.
      metadata: as `checkpoint.saved` says.
      advance: called with 1 for each parameter that is written.
    """
    handlers = ocp.type_handlers
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax warns that it keeps no shardings
    registry = handlers.create_type_handler_registry((_Leaf, _StreamingHandler(advance)))
    tree = traverse_util.unflatten_dict({path: _Leaf(array) for path, array in params.items()}, sep="/")
    save_args = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), tree)
    with ocp.CheckpointManager(
        (pathlib.Path(model_dir) / DIRECTORY).absolute(),
        item_handlers={
            "params": ocp.PyTreeCheckpointHandler(type_handler_registry=registry),
            "metadata": ocp.JsonCheckpointHandler(),
        },
        options=ocp.CheckpointManagerOptions(create=True, enable_async_checkpointing=False),
    ) as checkpoints:
        checkpoints.save(
            step,
            args=ocp.args.Composite(
                params=ocp.args.PyTreeSave(tree, save_args=save_args), metadata=ocp.args.JsonSave(metadata)
            ),
        )


@dataclasses.dataclass(frozen=True, eq=False)
class _Leaf:
    """An array that Orbax has not seen yet."""

    array: Array


class _StreamingHandler(ocp.type_handlers.NumpyHandler):
    """Reads an array when its turn to be written comes, and lets go of it before the next."""

    def __init__(self, advance: Callable[[int], None]):
        super().__init__(deepcopy_host_arrays=False)
        self._advance = advance

    async def serialize(self, values: Any, infos: Any, args: Any = None) -> list[Any]:
        for leaf, info, arg in zip(values, infos, args, strict=True):
            writing = await super().serialize([whole(leaf.array)], [info], [arg])
            while writing:
                writing.pop().result()  # which holds the array
            self._advance(1)
        return []

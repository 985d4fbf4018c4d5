"""Training checkpoints through Orbax: `MODEL_DIR/checkpoints/STEP/{params,optimizer,metadata}`.

Orbax writes aside and renames, so a checkpoint that can be seen is whole. Parameters and optimizer state
are separate items: evaluation and inference read the parameters alone. The metadata is JSON: `identity`, what a resumed
run must have in common with the saved one; `positions` in the data; `model`, the model's configuration.
"""

import dataclasses
import logging
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax import traverse_util

from recalign_jax.checkpoint.arrays import Array, open_orbax, open_store, whole
from recalign_jax.errors import InputError

DIRECTORY = "checkpoints"
CHUNK_BYTES = 2**24  # what a parameter is written in, so that a reader of a few layers need not read them all


def open_checkpoints(model_dir: str, keep: int | None = 3) -> ocp.CheckpointManager:
    """Opens (and creates) the checkpoints of a run; `keep` is how many of the newest stay, None for all."""
    directory = (pathlib.Path(model_dir) / DIRECTORY).absolute()
    return ocp.CheckpointManager(
        directory,
        item_handlers={
            "params": ocp.StandardCheckpointHandler(),
            "optimizer": ocp.StandardCheckpointHandler(),
            "metadata": ocp.JsonCheckpointHandler(),
        },
        options=ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, enable_async_checkpointing=True),
    )


def save(checkpoints: ocp.CheckpointManager, step: int, params: Any, optimizer: Any, metadata: dict[str, Any]) -> None:
    """Starts to write a checkpoint; `checkpoints.wait_until_finished()` waits for it.

    Args:
      checkpoints: from `open_checkpoints`.
      step: optimizer steps done.
      params: tree of arrays.
      optimizer: tree of arrays.
      metadata: JSON: the data positions, and what the run must not change.
    """
    checkpoints.save(
        step,
        args=ocp.args.Composite(
            params=ocp.args.StandardSave(params),
            optimizer=ocp.args.StandardSave(optimizer),
            metadata=ocp.args.JsonSave(metadata),
        ),
        force=True,
    )


def restore(checkpoints: ocp.CheckpointManager, step: int, params: Any, optimizer: Any) -> tuple[Any, Any]:
    """Reads parameters and optimizer state into the shapes and shardings of the trees given (ShapeDtypeStructs)."""
    restored = checkpoints.restore(
        step,
        args=ocp.args.Composite(params=ocp.args.StandardRestore(params), optimizer=ocp.args.StandardRestore(optimizer)),
    )
    return restored["params"], restored["optimizer"]


def read_metadata(checkpoints: ocp.CheckpointManager, step: int) -> dict[str, Any]:
    """The metadata that was saved with a step."""
    return checkpoints.restore(step, args=ocp.args.Composite(metadata=ocp.args.JsonRestore()))["metadata"]


def locate(path: str) -> tuple[str, int]:
    """Finds a checkpoint: a MODEL_DIR or its `checkpoints` means the newest; a numbered folder below, that one.

    Returns:
      (model_dir, step).

    Raises:
      InputError: when there is none.
    """
    given = pathlib.Path(path).absolute()
    if given.name.isdigit() and given.parent.name == DIRECTORY and given.is_dir():
        return str(given.parent.parent), int(given.name)
    model_dir = given.parent if given.name == DIRECTORY else given
    directory = model_dir / DIRECTORY
    steps = [int(step.name) for step in directory.iterdir() if step.name.isdigit()] if directory.is_dir() else []
    if not steps:
        raise InputError(f"No checkpoint at {path}. Give a MODEL_DIR of recalign train, or MODEL_DIR/{DIRECTORY}/STEP.")
    return str(model_dir), max(steps)


def read_identity(path: str) -> dict[str, Any]:
    """What a checkpoint was trained with: gin values and fingerprints. Raises InputError when there is none."""
    model_dir, step = locate(path)
    with open_checkpoints(model_dir, keep=None) as checkpoints:
        return read_metadata(checkpoints, step)["identity"]


def read_model(path: str) -> dict[str, Any]:
    """The configuration of a checkpoint's model (fields of T5Config); empty if it doesn't say."""
    model_dir, step = locate(path)
    with open_checkpoints(model_dir, keep=None) as checkpoints:
        return read_metadata(checkpoints, step).get("model", {})


def read_arrays(path: str) -> dict[str, Array]:
    """Opens the parameters of a checkpoint by their paths; nothing is read yet.

    Raises InputError when there is none.
    """
    model_dir, step = locate(path)
    where = f"{model_dir}/{DIRECTORY}/{step}/params"
    return open_orbax(open_store(where), where)


def save_streaming(
    model_dir: str, step: int, params: Mapping[str, Array], metadata: dict[str, Any], advance: Callable[[int], None]
) -> None:
    """Writes a checkpoint without optimizer state, one parameter in memory at a time.

    Args:
      model_dir: the folder to write into.
      step: the checkpoint's number.
      params: by path.
      metadata: see the module.
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


def load_params(path: str, params: Any) -> tuple[Any, int]:
    """Reads the parameters of a checkpoint.

    Args:
      path: as `locate` takes it.
      params: tree of ShapeDtypeStructs with shardings, that the parameters must have.

    Returns:
      (parameters, step).

    Raises:
      InputError: when there is no checkpoint, or a parameter is missing or has another shape.
    """
    model_dir, step = locate(path)
    with open_checkpoints(model_dir, keep=None) as checkpoints:
        _check_shapes(checkpoints, step, params, path)
        restored = checkpoints.restore(step, args=ocp.args.Composite(params=ocp.args.StandardRestore(params)))
        return restored["params"], step


def _check_shapes(checkpoints: ocp.CheckpointManager, step: int, params: Any, path: str) -> None:
    stored = checkpoints.item_metadata(step)["params"].tree
    found = {
        jax.tree_util.keystr(key, simple=True, separator="/"): tuple(leaf.shape)
        for key, leaf in jax.tree_util.tree_leaves_with_path(stored)
    }
    wanted = {
        jax.tree_util.keystr(key, simple=True, separator="/"): tuple(leaf.shape)
        for key, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    for name, shape in wanted.items():
        if found.get(name) != shape:
            raise InputError(
                f"Checkpoint {path}: parameter {name} is {found.get(name, 'missing')} there, the model has {shape}. "
                "Give the model's own gin file and the vocabulary it was trained with."
            )

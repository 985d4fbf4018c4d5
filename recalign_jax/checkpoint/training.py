"""Training checkpoints through Orbax: `MODEL_DIR/checkpoints/STEP/{params,optimizer,metadata}`.

Orbax writes aside and renames, so a checkpoint that can be seen is whole. Parameters and optimizer state
are separate items: evaluation and inference read the parameters alone.
"""

import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp

from recalign_jax.errors import InputError

DIRECTORY = "checkpoints"


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

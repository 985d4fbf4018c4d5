"""The checkpoints of a run: saved while training goes on, and restored from the newest one that is whole.

Orbax writes aside and renames, so a checkpoint that can be seen was written to its end. What happens to its files
later shows in the hashes that are saved with it (`saved.read_tree`).
"""

import contextlib
import functools
import pathlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers as policies

from recalign_jax import distributed, terminal
from recalign_jax.checkpoint import locations, saved
from recalign_jax.checkpoint.fingerprints import fingerprints
from recalign_jax.checkpoint.locations import DIRECTORY
from recalign_jax.checkpoint.saved import DamagedCheckpoint
from recalign_jax.errors import InputError, RunError

DAMAGED = "damaged_checkpoints"


class Restored(NamedTuple):
    """A checkpoint in memory."""

    step: int
    params: Any
    optimizer: Any
    metadata: dict[str, Any]


def open_checkpoints(model_dir: str, keep: int = 3) -> ocp.CheckpointManager:
    """Opens (and creates) the checkpoints of a run, and removes what a killed process left half-written.

    Args:
      model_dir: of the run.
      keep: how many of the newest stay; the best one stays as well.
    """
    directory = (pathlib.Path(model_dir) / DIRECTORY).absolute()
    if directory.is_dir() and jax.process_index() == 0:
        # Orbax would do it in the background, and fail a later save where it meets another that does it, or a thread
        # of a save that failed in this process. What such a thread leaves is in no one's way.
        for path in directory.iterdir():
            if ocp.utils.is_tmp_checkpoint(path):
                shutil.rmtree(path, ignore_errors=True)
    return ocp.CheckpointManager(
        directory,
        item_handlers={
            "params": ocp.StandardCheckpointHandler(),
            "optimizer": ocp.StandardCheckpointHandler(),
            "metadata": ocp.JsonCheckpointHandler(),
        },
        options=ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep), _Best(model_dir)]),
            create=True,
            enable_async_checkpointing=True,
        ),
    )


def save(checkpoints: ocp.CheckpointManager, step: int, params: Any, optimizer: Any, metadata: dict[str, Any]) -> None:
    """Starts to write a checkpoint, after the one before it; `finish` waits for it.

    Args:
      checkpoints: from `open_checkpoints`.
      step: optimizer steps done.
      params: tree of arrays.
      optimizer: tree of arrays.
      metadata: JSON, see `saved`; hashes are added here.

    Raises:
      RunError: when this one or the one before it can't be written.
    """
    hashes = fingerprints({"params": params, "optimizer": optimizer})
    with _writing(checkpoints):
        checkpoints.wait_until_finished()
        _check_room(checkpoints.directory, (params, optimizer))
        checkpoints.save(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(params),
                optimizer=ocp.args.StandardSave(optimizer),
                metadata=ocp.args.JsonSave(saved.sealed({**metadata, "fingerprints": hashes})),
            ),
            force=True,
        )


def finish(checkpoints: ocp.CheckpointManager) -> None:
    """Waits until the last checkpoint is written. Raises RunError when it can't be."""
    with _writing(checkpoints):
        checkpoints.wait_until_finished()


def restore_newest(
    checkpoints: ocp.CheckpointManager, params: Any, optimizer: Any, check: Callable[[dict[str, Any]], None]
) -> Restored | None:
    """Reads the newest checkpoint that is whole; damaged ones are told of and moved to `damaged_checkpoints`.

    A checkpoint that doesn't fit is no damaged one, and stays where it is.

    Args:
      checkpoints: from `open_checkpoints`.
      params: ShapeDtypeStructs with shardings.
      optimizer: likewise.
      check: is handed the metadata before arrays are read; may raise.

    Returns:
      None when the run has no checkpoint yet.

    Raises:
      InputError: when the newest one that is whole has other arrays than `params` and `optimizer`.
      RunError: when it has or had some, but none is whole.
    """
    model_dir = str(checkpoints.directory.parent)
    found = distributed.from_first(lambda: locations.steps(model_dir))
    for step in found:
        folder = locations.folder_of(model_dir, step)
        try:
            metadata = saved.agreed(folder, functools.partial(saved.read_metadata, folder))
            check(metadata)
            read = functools.partial(saved.read_tree, folder, metadata=metadata)
            return Restored(step, read("params", params), read("optimizer", optimizer), metadata)
        except DamagedCheckpoint as error:
            terminal.warn(f"{error.message} It is moved to {_set_aside(folder, model_dir)}.")
            checkpoints.reload()
    # A scheduler gives the command again, which must not begin anew where there was a run.
    aside = pathlib.Path(model_dir) / DAMAGED
    if found or distributed.from_first(lambda: aside.is_dir() and any(aside.iterdir())):
        raise RunError(f"No checkpoint of {model_dir} is whole; they are in {aside}. Start anew in another folder.")
    return None


def check_identity(
    metadata: dict[str, Any], identity: dict[str, Any], model_dir: str, resume_changed: bool | None = None
) -> None:
    """Holds the run that a checkpoint is of against the one that would go on with it.

    Args:
      metadata: of the checkpoint.
      identity: of the run.
      model_dir: where it is, for the message.
      resume_changed: True warns only; None where the run has no such choice.

    Raises:
      InputError: says what differs.
    """
    saved_one = metadata["identity"]
    changed = [
        f"  {name}: {saved_one.get(name, 'nothing')} then, {identity.get(name, 'nothing')} now"
        for name in sorted(saved_one.keys() | identity.keys())
        if saved_one.get(name) != identity.get(name)
    ]
    if not changed:
        return
    what = f"{model_dir} holds a run of another configuration"
    if resume_changed:
        terminal.warn(f"{what}, as RESUME_CHANGED allows:\n" + "\n".join(changed))
        return
    choices = "Change it back, or train in another folder"
    choices += "." if resume_changed is None else "; --gin.RESUME_CHANGED=True goes on all the same."
    raise InputError(f"{what}; it can't be resumed with this one:\n" + "\n".join(changed) + f"\n{choices}")


class _Best(policies.PreservationPolicy):
    """Keeps the checkpoint of the best evaluation so far."""

    def __init__(self, model_dir: str):
        self._model_dir = model_dir

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        del context
        best = locations.read_best(self._model_dir)
        return [best is not None and checkpoint.step == best["step"] for checkpoint in checkpoints]


def _check_room(directory: Any, trees: Any) -> None:
    """Raises OSError before a disk is filled up for nothing."""
    if not pathlib.Path(directory).is_dir():  # no folder of this machine
        return
    # Orbax compresses: random float32 by some percent.
    needed = 0.9 * sum(leaf.nbytes for leaf in jax.tree.leaves(trees))
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise OSError(f"it needs {needed / 2**20:,.1f} MiB, and {free / 2**20:,.1f} MiB are free")


@contextlib.contextmanager
def _writing(checkpoints: ocp.CheckpointManager) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # whatever the file system or a library says
        good = locations.steps(str(checkpoints.directory.parent))
        newest = f"the newest whole one is of step {good[0]}" if good else "there is none yet"
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise RunError(
            f"A checkpoint could not be written to {checkpoints.directory} ({reason[:500]}); {newest}. "
            "See that there is room, and run the same command again."
        ) from error


def _set_aside(folder: pathlib.Path, model_dir: str) -> pathlib.Path:
    """Moves a checkpoint out of the way, without losing it."""
    target = pathlib.Path(model_dir) / DAMAGED / folder.name
    while target.exists():
        target = target.with_name(f"{target.name}_again")
    multihost_utils.sync_global_devices("damaged checkpoint is seen")
    if jax.process_index() == 0:
        target.parent.mkdir(exist_ok=True)
        folder.rename(target)
    multihost_utils.sync_global_devices("damaged checkpoint is moved")
    return target

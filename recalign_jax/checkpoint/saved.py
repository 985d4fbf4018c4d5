"""Checkpoints as those see them who use one: found, read, and held against the hashes that were saved with them.

A checkpoint is `MODEL_DIR/checkpoints/STEP/{params,optimizer,metadata}`. Parameters and optimizer state are separate
items: evaluation and inference read the parameters alone. The metadata is JSON:
  identity: what a resumed run must have in common with the saved one;
  model: the model's configuration (fields of T5Config);
  positions: of the data shards, and `window`, the samples of a window of them;
  record: what was measured up to the step;
  fingerprints: a hash of every array, `params/...` and `optimizer/...`;
  checksum: of all of this.
A converted model has no positions and no record, and only its parameters' hashes.
"""

import errno
import functools
import hashlib
import json
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from recalign_jax import distributed
from recalign_jax.checkpoint import locations
from recalign_jax.checkpoint.arrays import Array, open_orbax, open_store
from recalign_jax.checkpoint.fingerprints import by_path, fingerprints
from recalign_jax.errors import InputError, Preempted, RunError

_ADVICE = {
    "params": "Give the model's own gin file and the vocabulary it was trained with.",
    "optimizer": "Give the optimizer that it was saved with (OPTIMIZER, WEIGHT_DECAY, ...), or begin anew from its "
    "parameters: another MODEL_DIR and --gin.INITIAL_CHECKPOINT={folder}.",
}
# Errors of a machine or file system, which say nothing of what is in a file.
_PASSING = {
    *(errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.EINTR, errno.EIO, errno.EACCES, errno.EPERM),
    *(errno.ESTALE, errno.ETIMEDOUT, errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTDOWN, errno.ENOTCONN),
}
_Read = TypeVar("_Read")


class DamagedCheckpoint(InputError):
    """A checkpoint that can't be read, or whose bits are not those that were saved."""


def sealed(metadata: dict[str, Any]) -> dict[str, Any]:
    """Metadata with its checksum."""
    return {**metadata, "checksum": _checksum(metadata)}


def read_metadata(folder: pathlib.Path) -> dict[str, Any]:
    """The metadata of a checkpoint.

    Raises:
      DamagedCheckpoint: when they are not there, or not what was saved.
      RunError: when they can't be read now.
    """
    try:
        metadata = json.loads((folder / "metadata" / "metadata").read_text(encoding="utf-8"))
        checksum = metadata.pop("checksum", None)
        intact = checksum in (None, _checksum(metadata)) and isinstance(metadata["identity"], dict)
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        _raise_if_passing(folder, error)
        raise _damaged(folder, f"its metadata can't be read ({error})") from error
    if not intact:
        raise _damaged(folder, "its metadata are not those that were saved")
    return metadata


def agreed(folder: pathlib.Path, read: Callable[[], _Read]) -> _Read:
    """Returns read(), which all processes call: a checkpoint that is damaged to one of them is damaged to all.

    One alone would turn to another checkpoint while the others wait for it at this one.

    Args:
      folder: of the checkpoint.
      read: reads of it without a word to other processes; may raise DamagedCheckpoint.
    """
    if jax.process_count() == 1:
        return read()
    result: Any = None
    mine = None
    distributed.await_seen(folder.exists)
    try:
        result = read()
    except DamagedCheckpoint as error:
        mine = error
    damaged = np.flatnonzero(multihost_utils.process_allgather(np.asarray(mine is not None)))
    if mine is None and len(damaged):
        mine = _damaged(folder, f"to process {damaged[0]}, which says what is wrong")
    if mine is not None:
        raise mine
    return result


def read_tree(folder: pathlib.Path, item: str, tree: Any, metadata: dict[str, Any]) -> Any:
    """Reads one item of a checkpoint, and checks that it is what was saved; all processes call it.

    Args:
      folder: of the checkpoint.
      item: `params` or `optimizer`.
      tree: ShapeDtypeStructs with the shardings that its arrays shall have.
      metadata: of the checkpoint.

    Returns:
      The arrays, laid out as `tree`.

    Raises:
      InputError: when an array is missing, left over or of another shape.
      DamagedCheckpoint: when its files are damaged, or hold something else than was saved.
      RunError: when they can't be read now.
    """
    was_saved = any(name.startswith(f"{item}/") for name in metadata.get("fingerprints", {}))
    if not was_saved and not (folder / item).exists():
        raise InputError(
            f"{folder} holds a converted model, which has no {item} state to go on with: train in another MODEL_DIR, "
            f"with --gin.INITIAL_CHECKPOINT={folder}."
        )
    # The handler by itself: Orbax's Checkpointer makes all processes wait for one that failed.
    handler = ocp.StandardCheckpointHandler()

    def attempt(what: str, read: Callable[[], Any]) -> Any:
        def read_or_damaged() -> Any:
            try:
                return read()
            except Exception as error:  # whatever a library finds in a damaged file
                if told := next((cause for cause in _causes(error) if isinstance(cause, Preempted)), None):
                    raise told from None  # SIGTERM while it is read, which Orbax wraps
                _raise_if_passing(folder, error)
                if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
                    raise  # too little memory is no damage
                raise _damaged(folder, f"{item} can't be {what} ({_first_line(error)})") from error

        return agreed(folder, read_or_damaged)

    stored = attempt("opened", lambda: handler.metadata(folder / item).tree)
    _check_fits(folder, item, stored, tree)
    restored = attempt("read", lambda: handler.restore(folder / item, args=ocp.args.StandardRestore(tree)))
    saved = metadata.get("fingerprints")
    if saved is not None:
        found = fingerprints({item: restored})
        # One process alone may have read other bits.
        agreed(folder, functools.partial(check_hashes, folder, saved, found))
    return restored


def check_hashes(folder: pathlib.Path, saved: Mapping[str, int], found: Mapping[str, int]) -> None:
    """Raises DamagedCheckpoint when arrays of a checkpoint, by path, have other hashes than were saved with it."""
    if changed := sorted(name for name in found.keys() & saved.keys() if found[name] != saved[name]):
        raise _damaged(folder, f"{_some(changed)} is not what was saved")


def _check_fits(folder: pathlib.Path, item: str, stored: Any, tree: Any) -> None:
    """Raises InputError when the arrays of a checkpoint are others than those of `tree`, which is no damage."""
    there, here = _places(stored), _places(tree)
    kind = {"params": "parameter", "optimizer": "optimizer state"}[item]
    advice = _ADVICE[item].format(folder=folder)
    for name, leaf in by_path(tree).items():
        found = tuple(there[name].shape) if hasattr(there.get(name), "shape") else "missing"
        if found != tuple(leaf.shape):
            raise InputError(f"Checkpoint {folder}: {kind} {name} is {found} there, {tuple(leaf.shape)} here. {advice}")
    if left_over := sorted(there.keys() - here.keys()):
        raise InputError(f"Checkpoint {folder}: {kind} {_some(left_over)} is there and not here. {advice}")
    if missing := sorted(here.keys() - there.keys()):
        raise InputError(f"Checkpoint {folder}: {kind} {_some(missing)} is here and not there. {advice}")


def _places(tree: Any) -> dict[str, Any]:
    """What stands at each path of a tree: leaves, and what has none (which optimizers have, and Orbax counts)."""
    nodes = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda node: not jax.tree.leaves(node))
    return {jax.tree_util.keystr(path, simple=True, separator="/"): node for path, node in nodes}


def pinned(path: str) -> str:
    """The checkpoint that a path (as `locate` takes it) means now, in all processes: MODEL_DIR/checkpoints/STEP.

    Where its run goes on there is a newer one soon. Raises InputError when there is none.
    """
    folder = locations.folder_of(*distributed.from_first(lambda: locations.locate(path)))
    distributed.await_seen(folder.exists)
    return str(folder)


def read_identity(path: str) -> dict[str, Any]:
    """What a checkpoint was trained with: gin values and fingerprints. Raises InputError when there is none."""
    return read_metadata(locations.folder_of(*locations.locate(path)))["identity"]


def hashes_of_params(metadata: dict[str, Any]) -> dict[str, int]:
    """The hashes of a checkpoint's parameters by their paths, which it was saved with; empty if it has none."""
    saved = metadata.get("fingerprints", {})
    return {name.removeprefix("params/"): value for name, value in saved.items() if name.startswith("params/")}


def read_arrays(path: str, item: str = "params") -> dict[str, Array]:
    """Opens the arrays of one item (`params`, `optimizer`) of a checkpoint by their paths; nothing is read yet.

    Raises InputError when there is none.
    """
    where = str(locations.folder_of(*locations.locate(path)) / item)
    return open_orbax(open_store(where), where)


def load_params(path: str, params: Any) -> tuple[Any, int]:
    """Reads the parameters of a checkpoint.

    Args:
      path: as `locate` takes it.
      params: tree of ShapeDtypeStructs with shardings, that the parameters must have.

    Returns:
      (parameters, step).

    Raises:
      InputError: when there is no checkpoint, it is damaged, or a parameter is missing, left over or of another shape.
    """
    model_dir, step = locations.locate(path)
    folder = locations.folder_of(model_dir, step)
    return read_tree(folder, "params", params, read_metadata(folder)), step


def _damaged(folder: pathlib.Path, what: str) -> DamagedCheckpoint:
    others = [step for step in locations.steps(str(folder.parent.parent)) if step != int(folder.name)]
    hint = f" {folder.parent}/{others[0]} is there, too." if others else ""
    return DamagedCheckpoint(f"Checkpoint {folder} is damaged: {what}.{hint}")


def _some(names: Iterable[str]) -> str:
    first, *others = names
    return ", ".join([first, *others[:2]]) + " ..." * (len(others) > 2)


def _checksum(metadata: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(metadata, sort_keys=True).encode()).hexdigest()


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and those that it came from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _raise_if_passing(folder: pathlib.Path, error: BaseException) -> None:
    """Raises RunError for too many open files, a file system that is away, and the like: that is no damage."""
    for cause in _causes(error):
        if isinstance(cause, OSError) and cause.errno in _PASSING:
            raise RunError(
                f"Checkpoint {folder} can't be read now ({cause}). Run the same command again; if it stays so, move "
                "the checkpoint out of its folder, and an older one is taken."
            ) from error


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:300]

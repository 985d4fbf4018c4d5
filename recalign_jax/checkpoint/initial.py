"""Where parameters come from: a checkpoint of any format, placed shard by shard onto the devices that keep them."""

import functools
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax

from recalign_jax import distributed, partitioning
from recalign_jax.checkpoint import locations, saved, stacking
from recalign_jax.checkpoint.arrays import place
from recalign_jax.checkpoint.fingerprints import fingerprint, fingerprints
from recalign_jax.checkpoint.formats import check_base, check_model, open_base, open_checkpoint, our_params
from recalign_jax.errors import InputError
from recalign_jax.model import lora
from recalign_jax.model.config import T5Config
from recalign_jax.model.lora import LoraOptions

Check = Callable[[Mapping[str, Any]], None]


def load_initial(path: str, config: T5Config, seed: int, params: Any, check: Check = lambda identity: None) -> Any:
    """Reads parameters to start from; no process reads more of a parameter than its devices keep.

    Args:
      path: as `open_checkpoint` takes it.
      config: of the model to be trained.
      seed: entries of the vocabulary that the checkpoint lacks (item tokens) are drawn as in a new model.
      params: its parameters' ShapeDtypeStructs with shardings.
      check: is handed the identity of its run, empty if it is none of ours, before arrays are read; may raise.

    Returns:
      Parameters laid out as `params`.

    Raises:
      InputError: when there is no checkpoint, or a parameter is missing, left over, of another shape, or (of one of our
        own) not what was saved.
    """
    return _load(path, config, seed, params, check)[0]


def load_base(
    path: str, config: T5Config, seed: int, params: Any, check: Check = lambda identity: None
) -> tuple[Any, dict[str, Any]]:
    """Reads parameters to train adapters of.

    Args:
      path, config, seed, params, check: as `load_initial` takes them.

    Returns:
      (parameters, `base` of the run's identity, by which `load_trained` finds them again).

    Raises:
      InputError: as `load_initial`.
    """
    base, path = _load(path, config, seed, params, check)
    return base, {"path": path, "seed": seed, "fingerprint": fingerprint(base)}


def _load(path: str, config: T5Config, seed: int, params: Any, check: Check) -> tuple[Any, str]:
    """Returns (what `load_initial` does, the checkpoint's path as all processes read it)."""
    try:
        path = distributed.from_first(lambda: _of_now(path))
        if pathlib.Path(path).is_absolute():
            distributed.await_seen(pathlib.Path(path).exists)
        checkpoint = open_checkpoint(path)
        check(checkpoint.identity)
        placed = _placed(our_params(checkpoint, config, seed), params)
        # Not those that new rows were added to.
        stored = {name: leaf for name, leaf in stacking.flatten(placed).items() if name in checkpoint.fingerprints}
        stored = {name: leaf for name, leaf in stored.items() if leaf.shape == tuple(checkpoint.arrays[name].shape)}
        checkpoint.check_whole(fingerprints(stored))
        return placed, path
    except InputError as error:
        raise InputError(f"INITIAL_CHECKPOINT: {error.message}") from None


def _of_now(path: str) -> str:
    """A path as it is in other folders; of a run its checkpoint, since the newest or best will be another one day."""
    folder = pathlib.Path(path).expanduser()
    if locations.steps(locations.model_dir_of(str(folder))) and not (folder / "config.json").is_file():
        return str(locations.folder_of(*locations.locate(str(folder))))
    return str(folder.absolute()) if folder.is_dir() else path


def load_trained(path: str, config: T5Config, params: Any) -> tuple[Any, int]:
    """Reads the parameters of a checkpoint of `recalign train`; adapters are merged with their base.

    Args:
      path: as `locations.locate` takes it; of several processes `saved.pinned`.
      config: of the model.
      params: its parameters' ShapeDtypeStructs with shardings.

    Returns:
      (parameters laid out as `params`, step).

    Raises:
      InputError: when there is no checkpoint, it doesn't fit, it was trained with a model that computes something else,
        or the base of its adapters is gone or was changed.
    """
    folder = locations.folder_of(*locations.locate(path))
    metadata = saved.read_metadata(folder)
    identity = metadata["identity"]
    check_model(path, metadata.get("model", {}), config)
    if "base" not in identity:
        return saved.load_params(str(folder), params)
    options, told = LoraOptions(**identity["lora"]), identity["base"]
    base = _placed(our_params(open_base(path, told), config, told["seed"]), params)
    check_base(path, told, base)
    adapters = jax.eval_shape(lambda key: lora.init_adapters(params, options, key), jax.random.key(0))
    mesh = jax.tree.leaves(params)[0].sharding.mesh
    trained, step = saved.load_params(str(folder), partitioning.with_shardings(adapters, mesh))
    shardings = partitioning.shardings_of(params)
    merge = jax.jit(functools.partial(lora.merge, options=options), out_shardings=shardings, donate_argnums=0)
    return merge(base, trained), step


def _placed(arrays: Any, params: Any) -> Any:
    targets = stacking.flatten(params)
    return stacking.unflatten({path: place(array, targets[path]) for path, array in arrays.items()})

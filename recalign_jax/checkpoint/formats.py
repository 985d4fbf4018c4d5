"""Opens a checkpoint of any format that is read here; which one it is is found out by looking at it.

A run with adapters (`model.lora`) saves them alone, and in its identity what they belong to: `lora`, the options, and
`base`, a path, a seed and a fingerprint. Opening it opens that base as well, and what is read is merged.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from recalign_jax.checkpoint import hub, huggingface, locations, saved, sizes, stacking, t5x
from recalign_jax.checkpoint.arrays import Array, Index, LazyArray
from recalign_jax.checkpoint.fingerprints import fingerprint, one_by_one
from recalign_jax.checkpoint.stacking import Source
from recalign_jax.errors import InputError
from recalign_jax.model import t5
from recalign_jax.model.config import T5Config
from recalign_jax.model.lora import LoraOptions

HUGGING_FACE, RECALIGN = "huggingface", "recalign"

# The two parameters with a row (or column) a token, and the axis of the tokens.
TOKEN_AXES = {"token_embedder/embedding": 0, "decoder/logits_dense/kernel": 1}

# What changes a model's answers and may leave no trace in the shapes of its parameters; the first two mostly do.
_TOLD_BY_SHAPES = ("logits_via_embedding", "scale_decoder_outputs")
_UNSEEN = (*_TOLD_BY_SHAPES, "mlp_activations", "relative_attention_max_distance", "layer_norm_epsilon")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose parameters are not read yet.

    Attributes:
      path: as it was given, for messages.
      input_format: `huggingface`, `t5x_legacy`, `t5x_orbax` or `recalign`.
      config: of its model, as far as the checkpoint tells it.
      arrays: by the names of its format.
      sources: where the format has our parameters.
      folder: on this machine, None if it is elsewhere; of one of our own MODEL_DIR/checkpoints/STEP.
      identity: of the run, if it is of `recalign train`.
      model: the fields of `config` that the checkpoint tells; others are T5.1.1's.
      fingerprints: hashes of its parameters by path, if it is one of our own that holds them all; see `check_whole`.
    """

    path: str
    input_format: str
    config: T5Config
    arrays: Mapping[str, Array]
    sources: Callable[[T5Config], Mapping[str, Source]]
    folder: pathlib.Path | None
    identity: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    model: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    fingerprints: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def check_whole(self, found: Mapping[str, int]) -> None:
        """Raises DamagedCheckpoint when parameters that were read have other hashes than were saved with them."""
        if self.fingerprints and self.folder is not None:
            saved.check_hashes(self.folder, self.fingerprints, found)


def open_checkpoint(path: str) -> Checkpoint:
    """Opens a checkpoint.

    Args:
      path: a MODEL_DIR of `recalign train`, its `best` or one of its checkpoints, a Hugging Face folder or the name of
        a model of the hub, or the folder of one step of T5X, which may also be `gs://bucket/path`.

    Raises:
      InputError: when there is none, it is damaged, or of no known format.
    """
    if "://" in path:
        return _open_t5x(path, None)
    folder = pathlib.Path(path).expanduser()
    if folder.is_file():
        raise InputError(f"{path} is a file: give the folder that it is in.")
    best_of_run = folder.name == locations.BEST and (folder.parent / locations.DIRECTORY).is_dir()
    if not folder.is_dir() and not best_of_run:
        if not hub.is_name(path):
            raise InputError(f"{path}: no such folder, and no name of the form of google/flan-t5-base.")
        folder = hub.download(path)
    if (folder / "config.json").is_file():
        config = huggingface.read_config(folder)
        arrays = huggingface.read_arrays(folder)
        told = dataclasses.asdict(config)
        return Checkpoint(path, HUGGING_FACE, config, arrays, huggingface.sources, folder, model=told)
    if (folder / "checkpoint").is_file() or (folder / "state").is_dir():
        return _open_t5x(str(folder), folder)
    if steps := sorted(folder.glob("checkpoint_*")):
        raise InputError(f"{path}: the folder of a T5X run. Give one step of it, as {steps[-1]}.")
    return _open_own(path, folder)


def our_params(checkpoint: Checkpoint, config: T5Config, seed: int) -> dict[str, Array]:
    """Returns a checkpoint's parameters by path, for slices of them to be read.

    Args:
      checkpoint: from `open_checkpoint`.
      config: of the model that they are for.
      seed: rows of the vocabulary that the checkpoint lacks (item tokens) are drawn as in a new model of this seed.

    Raises:
      InputError: when a parameter is missing, left over or of another shape, or the checkpoint's model is another.
    """
    path, rows = checkpoint.path, checkpoint.config.vocab_size
    check_model(path, checkpoint.model, config)
    if rows > config.vocab_size:
        raise InputError(
            f"{path} has {rows} vocabulary rows, the model only {config.vocab_size}: "
            "give the VOCABULARY that it was trained with (FLAN-T5's spiece.model)."
        )
    stored = dataclasses.replace(config, vocab_size=rows, num_tokens=None)
    params = stacking.stack(checkpoint.arrays, checkpoint.sources(stored), t5.abstract_params(stored), path)
    if rows == config.vocab_size:
        return params
    new_rows = functools.cache(lambda: _draw_rows(config, seed, rows))
    for name in TOKEN_AXES.keys() & params.keys():
        params[name] = _extended(params[name], name, config.vocab_size, new_rows)
    return params


def check_model(path: str, there: Mapping[str, Any], here: T5Config) -> None:
    """Raises InputError when a checkpoint's model computes something else than this one with the same parameters.

    Args:
      path: of the checkpoint, for the message.
      there: its configuration, as far as it is told (fields of T5Config).
      here: of the model that its parameters are for.
    """
    for field in _UNSEEN:
        ours, theirs = getattr(here, field), there.get(field, getattr(here, field))
        theirs = tuple(theirs) if isinstance(theirs, list) else theirs  # JSON has no tuples
        if theirs != ours:
            raise InputError(
                f"{path} is a model with {field} {theirs}, yours has {ours}: set --gin.T5Config.{field}={theirs}."
            )


def _open_t5x(path: str, folder: pathlib.Path | None) -> Checkpoint:
    arrays = t5x.read_arrays(path)
    config = sizes.infer(t5x.stacked_shapes(arrays), path)
    return Checkpoint(path, t5x.which(path) or "", config, arrays, t5x.sources, folder, model=_seen(config))


def _open_own(path: str, given: pathlib.Path) -> Checkpoint:
    # Once: where its run goes on, another one is the newest soon.
    folder = locations.folder_of(*locations.locate(str(given)))
    metadata = saved.read_metadata(folder)
    identity, model = metadata["identity"], metadata.get("model", {})
    arrays, hashes = saved.read_arrays(str(folder)), saved.hashes_of_params(metadata)
    config = T5Config(**model | {"mlp_activations": tuple(model["mlp_activations"])}) if model else None
    if "base" in identity:
        saved.check_hashes(folder, hashes, one_by_one(arrays))
        hashes = {}  # of the adapters
        arrays = _merged(path, arrays, LoraOptions(**identity["lora"]), identity["base"], config)
    if config is None:
        config = sizes.infer({name: tuple(array.shape) for name, array in arrays.items()}, path)
        model = _seen(config)

    def sources(config: T5Config) -> dict[str, Source]:
        paths = stacking.flatten(t5.abstract_params(config))
        return {path: Source((path,), stacked=False, transposed=False) for path in paths}

    return Checkpoint(path, RECALIGN, config, arrays, sources, folder, identity, model, hashes)


def _seen(config: T5Config) -> dict[str, Any]:
    """What `sizes.infer` found rather than assumed."""
    return {field: getattr(config, field) for field in _TOLD_BY_SHAPES}


# ---------------------------------------------------------------- adapters


def _merged(
    path: str, adapters: Mapping[str, Array], options: LoraOptions, told: Mapping[str, Any], config: T5Config | None
) -> dict[str, Array]:
    base = open_base(path, told)
    params = our_params(base, config or base.config, told["seed"])
    check_base(path, told, params)

    def merged(kernel: Array, a: Array, b: Array) -> LazyArray:
        def read(index: Index) -> np.ndarray:
            *layers, inputs, outputs = index
            rank = slice(0, options.rank)
            product = a[(*layers, inputs, rank)] @ b[(*layers, rank, outputs)]
            return kernel[index] + np.float32(options.alpha / options.rank) * product

        return LazyArray(tuple(kernel.shape), np.dtype(np.float32), read)

    for name in {name.rsplit("/", 1)[0] for name in adapters}:
        params[name] = merged(params[name], adapters[f"{name}/a"], adapters[f"{name}/b"])
    return params


def open_base(path: str, told: Mapping[str, Any]) -> Checkpoint:
    """Opens what the adapters in the checkpoint at `path` belong to, by the `base` of its identity."""
    if pathlib.Path(told["path"]).is_absolute() and not pathlib.Path(told["path"]).exists():
        raise InputError(f"{path} holds adapters of {told['path']}, which is not there. Put it back, or a link to it.")
    return open_checkpoint(told["path"])


def check_base(path: str, told: Mapping[str, Any], params: Any) -> None:
    """Raises InputError when `params` are not those that the adapters in the checkpoint at `path` were trained on."""
    if fingerprint(params) != told["fingerprint"]:
        raise InputError(
            f"{path} holds adapters of {told['path']}, which has other parameters now than when they were trained."
        )


# ---------------------------------------------------------------- a vocabulary that grew


def _draw_rows(config: T5Config, seed: int, rows: int) -> dict[str, np.ndarray]:
    """The rows from `rows` on of the parameters with a row a token, as a new model has them."""

    def draw(key: jax.Array) -> dict[str, jax.Array]:
        new = stacking.flatten(t5.init_params(config, key))
        return {
            name: jnp.take(new[name], jnp.arange(rows, config.vocab_size), axis)
            for name, axis in TOKEN_AXES.items()
            if name in new
        }

    return jax.device_get(jax.jit(draw)(jax.random.key(seed)))


def _extended(stored: Array, name: str, size: int, new_rows: Callable[[], dict[str, np.ndarray]]) -> LazyArray:
    """`stored` with new rows on top, `size` in all."""
    axis, rows = TOKEN_AXES[name], stored.shape[TOKEN_AXES[name]]
    shape = (*stored.shape[:axis], size, *stored.shape[axis + 1 :])

    def read(index: Index) -> np.ndarray:
        def along(start: int, stop: int) -> Index:
            return (*index[:axis], slice(start, stop), *index[axis + 1 :])

        start, stop, _ = index[axis].indices(size)
        parts = []
        if start < rows:
            parts.append(stored[along(start, min(stop, rows))])
        if stop > rows:
            parts.append(new_rows()[name][along(max(start, rows) - rows, stop - rows)])
        return np.concatenate(parts, axis)

    return LazyArray(shape, np.dtype(np.float32), read)

"""What several commands put together in the same way."""

import dataclasses

import gin

from recalign_jax import gin_config, partitioning, terminal
from recalign_jax.checkpoint import saved
from recalign_jax.checkpoint.initial import load_trained
from recalign_jax.errors import InputError
from recalign_jax.model import t5
from recalign_jax.model.config import T5Config
from recalign_jax.recommender import DecodingOptions, make_recommender
from seqio_tasks.examples import Recommend
from seqio_tasks.specs import TaskSpec

# Embedding rows come in multiples of this, whatever the mesh, so that a checkpoint fits every one: it suits the matrix
# units, and is divided by every model axis of a power of two up to it.
ROW_MULTIPLE = 128


def model_config(num_tokens: int) -> T5Config:
    """The model that gin holds, for a vocabulary of `num_tokens` entries; the rows above them are masked.

    Raises:
      InputError: when no model gin file was given.
    """
    if "T5Config.emb_dim" not in gin_config.snapshot():
        raise InputError("No model given: --gin_file gin_configs/models/t5_tiny.gin, or another one there.")
    rows = -(-num_tokens // ROW_MULTIPLE) * ROW_MULTIPLE
    return dataclasses.replace(gin.get_configurable(T5Config)(), vocab_size=rows, num_tokens=num_tokens)


def fingerprints(specs: list[TaskSpec]) -> dict[str, str]:
    """What the weights depend on: `vocabulary`, and corpus and catalogue of every corpus in the mixture."""
    found = {}
    for spec in specs:
        found["vocabulary"] = spec.vocabulary.fingerprint
        found[f"corpus {spec.corpus.name}"] = spec.corpus.fingerprint
        found[f"catalog {spec.corpus.name} {spec.catalog.item_format}"] = spec.catalog.fingerprint
    return found


def load_recommender(
    spec: TaskSpec, checkpoint_path: str, mesh_shape: dict[str, int] | None, batch_macro: str
) -> tuple[Recommend, int]:
    """Loads a checkpoint of `recalign train` as a recommender for a task.

    Args:
      spec: a retrieval task.
      checkpoint_path: MODEL_DIR, or one checkpoint in it.
      mesh_shape: devices along each axis; None puts all along `data`.
      batch_macro: the gin name of the batch size, for its message.

    Returns:
      (recommender, step).

    Raises:
      InputError: when there is no checkpoint, it was trained with another model, vocabulary or (token format)
        catalogue, or the mesh or batch size doesn't fit.
    """
    mesh = partitioning.make_mesh(mesh_shape or {"data": -1})
    decoding = DecodingOptions()
    partitioning.check_batch_size(batch_macro, decoding.batch_size, mesh)
    config = model_config(spec.num_tokens)
    _check_trained_for(spec, checkpoint_path)
    shapes = partitioning.with_shardings(t5.abstract_params(config), mesh)
    params, step = load_trained(checkpoint_path, config, shapes)
    return make_recommender(spec, t5.graph(config), decoding, partitioning.batch_sharding(mesh))(params), step


def _check_trained_for(spec: TaskSpec, checkpoint_path: str) -> None:
    trained = saved.read_identity(checkpoint_path)
    item_format = spec.catalog.item_format
    formats = {name.split()[-1] for name in trained if name.startswith("catalog ")}
    if trained.get("vocabulary", spec.vocabulary.fingerprint) != spec.vocabulary.fingerprint:
        raise InputError(
            f"Checkpoint {checkpoint_path} was trained with another vocabulary than {spec.vocabulary.path}."
        )
    if not formats and item_format != "token":
        terminal.warn(f"{checkpoint_path} was not trained here, so nothing tells whether it knows such prompts.")
        return
    if not formats:
        raise InputError(f"Checkpoint {checkpoint_path} was not trained here, so it has no item tokens.")
    if item_format not in formats:
        raise InputError(
            f"Checkpoint {checkpoint_path} was trained with items as {' and '.join(sorted(formats))}, "
            f"but {spec.name} has them as {item_format}."
        )
    extended = {extension["before"]["fingerprint"] for extension in spec.corpus.metadata.get("extensions", [])}
    if trained.get(f"corpus {spec.corpus.name}") in extended:
        if item_format == "token":
            raise InputError(
                f"Checkpoint {checkpoint_path} was trained before {spec.corpus.name} was extended: it has no tokens "
                f"for the new items. Train on from it with --gin.INITIAL_CHECKPOINT={checkpoint_path}."
            )
    elif trained.get(f"catalog {spec.corpus.name} {item_format}") != spec.catalog.fingerprint:
        where = f"another catalogue than that of {spec.corpus.directory}"
        if item_format == "token":
            raise InputError(f"Checkpoint {checkpoint_path} was trained on {where}: its item tokens are other items.")
        terminal.warn(f"{checkpoint_path} was trained on {where}.")

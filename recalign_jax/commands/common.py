"""What several commands put together in the same way."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import gin
import jax
import numpy as np
from flax import nnx

from recalign_jax import gin_config, partitioning, recommender, terminal
from recalign_jax.checkpoint import locations, saved
from recalign_jax.checkpoint.initial import load_trained
from recalign_jax.errors import InputError
from recalign_jax.evaluation import ranking, rating, retrieval
from recalign_jax.evaluation.results import EvaluationOptions, Result
from recalign_jax.model import t5
from recalign_jax.model.config import T5Config
from recalign_jax.recommender import DecodingOptions
from seqio_tasks import samples, task_names
from seqio_tasks.specs import TaskSpec
from seqio_tasks.vocabulary import embedding_rows

# The families that recommend; the others help to learn it.
EVALUATED = ("retrieval", "ranking", "rating", "rating_random")
# Shares of prompts of ranking, which can be too short, and what they have no room for. Candidates go before history.
SHARES_SHOWN = {
    "prompts_with_all_candidates": "all candidates (all are scored)",
    "prompts_with_whole_history": "the whole history beside them",
}
# What prompts look like: a checkpoint that was trained with others answers worse.
PROMPT_SETTINGS = ("HISTORY_LENGTH", "MAX_ITEM_TOKENS", "ITEM_FIELDS", "NEIGHBOURS", "RATING_HISTORY")


class Model(NamedTuple):
    """A trained model, the MODEL_DIR it comes from, and what it was trained with."""

    config: T5Config
    graphdef: nnx.GraphDef
    params: Any
    step: int
    mesh: jax.sharding.Mesh
    model_dir: str
    identity: dict[str, Any]


def model_config(num_tokens: int) -> T5Config:
    """The model that gin holds, for a vocabulary of `num_tokens` entries; the rows above them are masked.

    Raises:
      InputError: when no model gin file was given.
    """
    if "T5Config.emb_dim" not in gin_config.snapshot():
        raise InputError("No model given: --gin_file gin_configs/models/t5_tiny.gin, or another one there.")
    config = gin.get_configurable(T5Config)()
    return dataclasses.replace(config, vocab_size=embedding_rows(num_tokens), num_tokens=num_tokens)


def task_fingerprints(specs: list[TaskSpec]) -> dict[str, str]:
    """What the weights depend on: `vocabulary`, and corpus and catalogue of every corpus in the mixture."""
    found = {}
    for spec in specs:
        found["vocabulary"] = spec.vocabulary.fingerprint
        found[f"corpus {spec.corpus.name}"] = spec.corpus.fingerprint
        found[f"catalog {spec.corpus.name} {spec.catalog.item_format}"] = spec.catalog.fingerprint
    return found


def load_model(spec: TaskSpec, checkpoint_path: str, mesh_shape: dict[str, int] | None, batch_macro: str) -> Model:
    """Loads a checkpoint of `recalign train` to use it for a task.

    Args:
      spec: of any family.
      checkpoint_path: MODEL_DIR, or one checkpoint in it.
      mesh_shape: devices along each axis; None puts all along `data`.
      batch_macro: the gin name of the batch size, for its message.

    Raises:
      InputError: when there is no checkpoint, it was trained with another model, vocabulary or (token format)
        catalogue, or the mesh or batch size doesn't fit.
    """
    mesh = partitioning.make_mesh(mesh_shape or {"data": -1})
    partitioning.check_batch_size(batch_macro, DecodingOptions().batch_size, mesh)
    config = model_config(spec.num_tokens)
    checkpoint_path = saved.pinned(checkpoint_path)
    identity = saved.read_identity(checkpoint_path)
    _check_trained_for(spec, checkpoint_path, identity)
    shapes = partitioning.with_shardings(t5.abstract_params(config), mesh)
    params, step = load_trained(checkpoint_path, config, shapes)
    return Model(config, t5.graph(config), params, step, mesh, locations.model_dir_of(checkpoint_path), identity)


def make_evaluation(
    spec: TaskSpec, split: str, graphdef: nnx.GraphDef, mesh: jax.sharding.Mesh, model_dir: str | None = None
) -> Callable[[Any], Result]:
    """Returns parameters -> result, for a task of a family that is EVALUATED; compiles on first use.

    Args:
      spec: the task.
      split: `validation` or `test`.
      graphdef: of the model.
      mesh: of the parameters.
      model_dir: where a saved trie may be.

    Raises:
      InputError: when the split is none of validation and test, or holds nothing, or there are fewer beams than the
        lists of retrieval's metrics have items.
    """
    corpus, options, decoding = spec.corpus, EvaluationOptions(), DecodingOptions()
    sharding = partitioning.batch_sharding(mesh)
    if spec.family in task_names.RATED_FAMILIES:
        predictor = recommender.make_rater(spec, graphdef, decoding, sharding)
        rated = rating.evaluation_queries(corpus, split, spec.family, options)
        return lambda params: rating.evaluate(corpus, predictor(params), rated, spec.family)

    queries = retrieval.evaluation_queries(corpus, split, options)
    if spec.family == "retrieval":
        lists = dataclasses.replace(decoding, top_k=options.cutoffs[-1])
        recommend = recommender.make_recommender(spec, graphdef, lists, sharding, model_dir)
        return lambda params: retrieval.evaluate(corpus, recommend(params), queries, options)

    score = recommender.make_scorer(spec, graphdef, decoding, sharding, model_dir)
    seed, negatives = spec.options.candidate_seed, spec.options.test_negatives
    candidates = ranking.candidates(corpus, split, queries, negatives, seed)
    limit = decoding.max_input_tokens
    pairs = zip(queries, (row[row >= 0] for row in candidates), strict=True)
    shown = np.mean([samples.shows(spec, query, items, limit) for query, items in pairs], axis=0)

    def evaluate(params: Any) -> Result:
        result = ranking.evaluate(corpus, score(params), queries, candidates)
        return dataclasses.replace(result, overall=dict(zip(SHARES_SHOWN, shown.tolist(), strict=True)))

    return evaluate


def _in_force(bound: Mapping[str, str], macro: str) -> str | None:
    """The value of an option of tasks, set by its macro or without it."""
    value = bound.get(f"TaskOptions.{macro.lower()}", f"%{macro}")
    return bound.get(value[1:]) if value.startswith("%") else value


def _check_trained_for(spec: TaskSpec, checkpoint_path: str, trained: dict[str, Any]) -> None:
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
    bound = gin_config.snapshot()
    for name in PROMPT_SETTINGS:
        then, now = _in_force(trained, name), _in_force(bound, name)
        if None not in (then, now) and then != now:
            terminal.warn(f"{checkpoint_path} was trained with {name} {then}; here it is {now}.")
    extended = {extension["before"]["fingerprint"] for extension in spec.corpus.metadata.get("extensions", [])}
    if trained.get(f"corpus {spec.corpus.name}") in extended:
        if item_format == "token":
            raise InputError(
                f"Checkpoint {checkpoint_path} was trained before {spec.corpus.name} was extended: it has no tokens "
                f"for the new items. Train on from it with --gin.INITIAL_CHECKPOINT={checkpoint_path}."
            )
    elif trained.get(f"catalog {spec.corpus.name} {item_format}") != spec.catalog.fingerprint:
        where = f"another catalogue than that of {spec.corpus.directory}"
        # Tokens and digits are numbers of items, which a corpus that is the same has as they were.
        if item_format != "title" and trained.get(f"corpus {spec.corpus.name}") != spec.corpus.fingerprint:
            raise InputError(f"Checkpoint {checkpoint_path} was trained on {where}: its item numbers are other items.")
        terminal.warn(f"{checkpoint_path} was trained on {where}.")

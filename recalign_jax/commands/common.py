"""What several commands put together in the same way."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import gin
import jax
import numpy as np
from flax import nnx

from recalign_jax import gin_config, partitioning, recommender
from recalign_jax.checkpoint import locations, saved
from recalign_jax.checkpoint.initial import load_trained
from recalign_jax.commands import trained_on
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
    trained_on.check_use(spec, checkpoint_path, identity)
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

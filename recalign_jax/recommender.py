"""The trained language model as a recommender: queries in; ranked items, scores of candidates or ratings out.

Evaluation and inference are handed what this makes; they don't know what is behind it.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import gin
import jax
import numpy as np
from flax import nnx

from recalign_jax.corpus.catalog import EOS_ID, PAD_ID, Catalog
from recalign_jax.decoding import trie_file
from recalign_jax.decoding.retrieve import Generate, make_generate, padded, retrieve
from recalign_jax.decoding.scoring import SCORES
from recalign_jax.decoding.trie import Trie, build_trie
from recalign_jax.errors import InputError, check_choice, check_kinds, check_least
from seqio_tasks import samples, writing
from seqio_tasks.examples import (
    Predicted,
    PredictRatings,
    Query,
    Ranked,
    RatedQuery,
    Recommend,
    ScoreCandidates,
    Scored,
)
from seqio_tasks.specs import TaskSpec


@gin.configurable
@dataclasses.dataclass(frozen=True)
class DecodingOptions:
    """How items are decoded.

    Attributes:
      num_beams: K; wider finds better items and takes longer.
      top_k: items returned; at most num_beams.
      batch_size: users at a time, over all devices.
      length_penalty: see `beam_search`; of candidates, too.
      scores: see `make_generate`; of candidates, too.
      max_input_tokens: longest prompt; whole oldest items are dropped to fit.
    """

    num_beams: int = 20
    top_k: int = 10
    batch_size: int = 64
    length_penalty: float = 0.0
    scores: str = "vocabulary"
    max_input_tokens: int = 512

    def __post_init__(self) -> None:
        check_kinds(self)
        check_choice("SCORES", self.scores, SCORES)
        check_least(self, 1, "num_beams", "top_k", "batch_size", "max_input_tokens")
        if self.length_penalty < 0:
            raise InputError(f"LENGTH_PENALTY is {self.length_penalty}: must be at least 0.")
        if self.top_k > self.num_beams:
            raise InputError(
                f"TOP_K is {self.top_k}, and {self.num_beams} beams may not find so many: --gin.NUM_BEAMS={self.top_k} "
                "or more."
            )


@functools.lru_cache(maxsize=4)
def _item_trie(catalog: Catalog, num_tokens: int, saved: pathlib.Path | None, fingerprint: str) -> Trie:
    if saved is not None and (trie := trie_file.load(saved, fingerprint)):
        return trie
    return build_trie(catalog.tokens, catalog.lengths, catalog.popularity, num_tokens)


def item_trie(spec: TaskSpec, model_dir: str | None = None) -> Trie:
    """The catalogue of a task: as a MODEL_DIR has it, if that is of the same items and popularities, or built anew.

    Tasks of one catalogue share it, on the devices too.
    """
    saved = None if model_dir is None else _trie_path(spec, model_dir)
    return _item_trie(spec.catalog, spec.num_tokens, saved, _trie_fingerprint(spec))


def save_trie(spec: TaskSpec, model_dir: str) -> None:
    """Puts the catalogue of a task beside its checkpoints, unless it is there already."""
    path, fingerprint = _trie_path(spec, model_dir), _trie_fingerprint(spec)
    if trie_file.load(path, fingerprint) is None:
        trie_file.save(item_trie(spec), path, fingerprint)


def make_recommender(
    spec: TaskSpec,
    graphdef: nnx.GraphDef,
    options: DecodingOptions,
    sharding: jax.sharding.NamedSharding,
    model_dir: str | None = None,
    permitted: np.ndarray | None = None,
) -> Callable[[Any], Recommend]:
    """Returns parameters -> recommender, for a task's corpus, item format and vocabulary; compiles on first use.

    Args:
      spec: a retrieval task.
      graphdef: of the model.
      options: of the search.
      sharding: of the users of a batch.
      model_dir: where a saved trie may be.
      permitted: the only items that are recommended to anyone, int32 ascending; None for all. They get a trie of
        their own, so that no beam is spent on others; scores over the trie are then over theirs.
    """
    catalog = spec.catalog
    if permitted is None:
        trie = item_trie(spec, model_dir)
    else:
        tokens, lengths = catalog.tokens[permitted], catalog.lengths[permitted]
        trie = build_trie(tokens, lengths, catalog.popularity[permitted], spec.num_tokens)
    generate = make_generate(
        graphdef, options.num_beams, options.top_k, options.length_penalty, options.scores, sharding.mesh
    )

    def with_params(params: Any) -> Recommend:
        def recommend(queries: Sequence[Query], excluded: Sequence[np.ndarray]) -> Ranked:
            prompts = [samples.write_history(spec, query, options.max_input_tokens) for query in queries]
            if permitted is None:
                yield from retrieve(generate, params, trie, prompts, excluded, options.batch_size, sharding)
                return
            places = [_places(permitted, items) for items in excluded]
            for chosen, found, scores in retrieve(
                generate, params, trie, prompts, places, options.batch_size, sharding
            ):
                yield chosen, np.where(found >= 0, permitted[found], -1), scores

        return recommend

    return with_params


def make_scorer(
    spec: TaskSpec,
    graphdef: nnx.GraphDef,
    options: DecodingOptions,
    sharding: jax.sharding.NamedSharding,
    model_dir: str | None = None,
) -> Callable[[Any], ScoreCandidates]:
    """Returns parameters -> scorer for a ranking task: log-likelihoods of the candidates after a prompt with them.

    It is a search restricted to the candidates, with a beam for each, so that none is missed. All are scored,
    also those that a prompt of `max_input_tokens` leaves out. `num_beams` and `top_k` don't count. There is a program
    for every number of candidates that it is called with, padding counted.
    """
    trie = item_trie(spec, model_dir)

    @functools.cache
    def generate_for(beams: int) -> Generate:
        return make_generate(graphdef, beams, beams, options.length_penalty, options.scores, sharding.mesh)

    def with_params(params: Any) -> ScoreCandidates:
        def score(queries: Sequence[Query], candidates: np.ndarray) -> Scored:
            allowed = [row[row >= 0] for row in candidates]
            prompts = [
                samples.write_choice(spec, query, items, options.max_input_tokens)
                for query, items in zip(queries, allowed, strict=True)
            ]
            nothing = [np.zeros(0, np.int32)] * len(queries)
            generate = generate_for(candidates.shape[1])
            parts = retrieve(generate, params, trie, prompts, nothing, options.batch_size, sharding, allowed=allowed)
            for chosen, items, scores in parts:
                yield chosen, _scores_of(candidates[chosen], items, scores)

        return score

    return with_params


def make_rater(
    spec: TaskSpec, graphdef: nnx.GraphDef, options: DecodingOptions, sharding: jax.sharding.NamedSharding
) -> Callable[[Any], PredictRatings]:
    """Returns parameters -> predictor for a rating task: from the likelihoods of all ratings that the corpus has.

    Their probabilities are the likelihoods divided by their sum. `num_beams`, `top_k`, `length_penalty` and `scores`
    don't count.
    """
    values, trie = _rating_trie(spec)
    generate = make_generate(graphdef, len(values), len(values), mesh=sharding.mesh)

    def with_params(params: Any) -> PredictRatings:
        def predict(queries: Sequence[RatedQuery]) -> Predicted:
            prompts = [samples.write_rating(spec, query, options.max_input_tokens) for query in queries]
            nothing = [np.zeros(0, np.int32)] * len(queries)
            for chosen, found, scores in retrieve(
                generate, params, trie, prompts, nothing, options.batch_size, sharding
            ):
                every = np.broadcast_to(np.arange(len(values)), found.shape)
                scores = _scores_of(every, found, scores).astype(np.float64)
                likelihoods = np.exp(scores - scores.max(axis=1, keepdims=True))
                expected = likelihoods @ values / likelihoods.sum(axis=1)
                yield chosen, expected.astype(np.float32), values[scores.argmax(axis=1)]

        return predict

    return with_params


def _trie_path(spec: TaskSpec, model_dir: str) -> pathlib.Path:
    return pathlib.Path(model_dir) / "tries" / f"{spec.corpus.name}_{spec.catalog.item_format}.npz"


def _trie_fingerprint(spec: TaskSpec) -> str:
    return f"{spec.catalog.fingerprint} {spec.corpus.fingerprint} {spec.num_tokens}"


def _rating_trie(spec: TaskSpec) -> tuple[np.ndarray, Trie]:
    """The ratings that a corpus has, float32 [n] ascending, and the trie of how they are written."""
    assert spec.corpus.ratings is not None, "specs offers no rating task of a corpus without ratings"
    values = np.unique(spec.corpus.ratings)
    rows = [np.append(writing.rating_tokens(spec.vocabulary, float(value)), EOS_ID) for value in values]
    lengths = np.asarray([len(row) for row in rows])
    tokens = padded(rows, len(rows), int(lengths.max()), fill=PAD_ID)
    return values, build_trie(tokens, lengths, np.zeros(len(rows)), spec.num_tokens)


def _places(rising: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Where those of the values that are in a rising array stand in it."""
    places = np.searchsorted(rising, values)
    return places[rising[np.minimum(places, len(rising) - 1)] == values]


def _scores_of(wanted: np.ndarray, items: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """The scores [b, K] of items [b, K] in the order of those wanted [b, C], -inf for what isn't there: [b, C]."""
    same = (wanted[:, :, None] == items[:, None, :]) & (items >= 0)[:, None, :]
    return np.where(same, scores[:, None, :], -np.inf).max(axis=2)

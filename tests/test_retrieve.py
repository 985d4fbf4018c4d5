"""From prompts to items with the real model: the ranking is that of every item's likelihood, computed one by one."""

import dataclasses
import functools

import gin
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from recalign_jax import partitioning, recommender
from recalign_jax.commands import common
from recalign_jax.errors import InputError, RunError
from recalign_jax.evaluation import retrieval
from recalign_jax.evaluation.results import EvaluationOptions
from recalign_jax.model import t5
from recalign_jax.model.config import T5Config
from recalign_jax.recommender import DecodingOptions, make_recommender
from seqio_tasks import samples, specs
from tests.reference_scores import sequence_scores

BATCH = 8

pytestmark = pytest.mark.usefixtures("fast_compilation")


@pytest.fixture(scope="module", params=["title", "token"])
def spec(request, shop_corpus, shop_words):
    return specs.make_spec(shop_corpus, "retrieval", request.param, shop_words, specs.TaskOptions())


@pytest.fixture(scope="module")
def model(spec):
    config = T5Config(
        emb_dim=16, num_heads=2, head_dim=8, num_encoder_layers=1, num_decoder_layers=2, mlp_dim=32,
        vocab_size=384, num_tokens=spec.num_tokens, activation_dtype="float32",
    )  # fmt: skip
    random = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(random.normal(0, 0.5, leaf.shape), jnp.float32), t5.abstract_params(config)
    )
    return t5.graph(config), params


def likelihoods(spec, graphdef, params, query) -> np.ndarray:
    """log p(item | history) of every item, teacher-forced: [I]."""
    prompt = samples.write_history(spec, query, 512)
    prompt = np.pad(prompt, (0, -len(prompt) % 128))  # so that few programs are compiled
    return np.array(score_all(graphdef, params, prompt, spec.catalog.tokens))


@functools.partial(jax.jit, static_argnums=0)
def score_all(graphdef, params, prompt, targets):
    tokens = jnp.tile(prompt[None], (len(targets), 1))
    inputs = jnp.pad(targets, ((0, 0), (1, 0)))[:, :-1]
    return sequence_scores(nnx.merge(graphdef, params)(tokens, inputs), targets)


def test_ranking_equals_exhaustive_likelihood(spec, model):
    graphdef, params = model
    sharding = partitioning.batch_sharding(partitioning.make_mesh({"data": -1}))
    options = DecodingOptions(num_beams=64, top_k=12, batch_size=BATCH)
    recommend = make_recommender(spec, graphdef, options, sharding)(params)
    queries = retrieval.evaluation_queries(spec.corpus, "test", EvaluationOptions())[:11]  # one batch and a part of one
    excluded = [query.history for query in queries]
    seen = []
    for chosen, items, scores in recommend(queries, excluded):
        for number, ranked, score in zip(chosen, items, scores, strict=True):
            expected = likelihoods(spec, graphdef, params, queries[number])
            expected[excluded[number]] = -np.inf
            best = np.sort(expected[np.isfinite(expected)])[::-1][: options.top_k]
            seen.append(number)
            found = ranked[ranked >= 0]
            assert len(found) == len(best) == len(set(found.tolist()))
            assert not set(found.tolist()) & set(excluded[number].tolist())
            np.testing.assert_allclose(score[: len(found)], best, atol=1e-4)
            np.testing.assert_allclose(score[: len(found)], expected[found], atol=1e-4)
    assert sorted(seen) == list(range(len(queries)))


@pytest.mark.parametrize("scores", ["vocabulary", "trie"])
def test_a_model_of_nan_is_an_error_and_a_user_who_may_get_nothing_is_none(spec, model, scores):
    graphdef, params = model
    sharding = partitioning.batch_sharding(partitioning.make_mesh({"data": -1}))
    options = DecodingOptions(num_beams=10, batch_size=BATCH, scores=scores)
    make = make_recommender(spec, graphdef, options, sharding)
    queries = retrieval.evaluation_queries(spec.corpus, "test", EvaluationOptions())[:3]
    everything = [np.arange(spec.corpus.num_items)] * 3
    for _, items, found in make(params)(queries, everything):
        assert (items == -1).all()
        assert (found == -np.inf).all()
    broken = jax.tree.map(lambda leaf: leaf * jnp.nan, params)
    nothing = [np.zeros(0, np.int32)] * 3
    with pytest.raises(RunError, match=r"gave 3 of 3 prompts scores that are no numbers \(NaN\): it diverged"):
        list(make(broken)(queries, nothing))


def test_a_saved_catalogue_is_used_if_it_is_that_of_the_task(spec, tmp_path, monkeypatch):
    built = recommender.item_trie(spec)
    recommender.save_trie(spec, str(tmp_path))
    calls = []
    monkeypatch.setattr(recommender, "build_trie", lambda *arguments: calls.append(arguments))
    found = recommender.item_trie(spec, str(tmp_path))
    assert not calls
    assert jax.tree.structure(found) == jax.tree.structure(built)
    for before, after in zip(jax.tree.leaves(built), jax.tree.leaves(found), strict=True):
        np.testing.assert_array_equal(before, after)
    # Items that came later: another corpus, so another trie.
    extended = dataclasses.replace(spec, catalog=dataclasses.replace(spec.catalog, fingerprint="another"))
    recommender.item_trie(extended, str(tmp_path))
    assert len(calls) == 1
    recommender.item_trie(dataclasses.replace(spec, family="ranking"), str(tmp_path))
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_beams": 5}, r"TOP_K is 10, and 5 beams may not find so many: --gin\.NUM_BEAMS=10 or more\."),
        ({"length_penalty": -1}, "LENGTH_PENALTY is -1"),
        ({"top_k": 0}, r"DecodingOptions\.top_k is 0"),
        ({"num_beams": None}, r"DecodingOptions\.num_beams is None: must be a whole number\."),
        ({"scores": "tri"}, "Did you mean 'trie'"),
    ],
)
def test_options_that_cannot_be(changed, message):
    with pytest.raises(InputError, match=message):
        DecodingOptions(**changed)


@pytest.mark.parametrize("cutoffs", [(5,), (10, 5), (5, 10, 10), (0, 10), (5, 10.0), ()])
def test_cutoffs_that_cannot_be(cutoffs):
    with pytest.raises(InputError, match=r"CUTOFFS is .* 10 among them"):
        EvaluationOptions(cutoffs=cutoffs)


def test_lists_are_as_long_as_the_last_cutoff(spec, model):
    """The first places are those of shorter lists; fewer beams than places are refused."""
    graphdef, params = model
    mesh, found = partitioning.make_mesh({"data": -1}), []
    for cutoffs in ((5, 10), (1, 10, 15)):
        with gin.unlock_config():
            gin.bind_parameter("EvaluationOptions.cutoffs", cutoffs)
        found.append(common.make_evaluation(spec, "test", graphdef, mesh)(params))
    with gin.unlock_config():
        gin.bind_parameter("EvaluationOptions.cutoffs", (10, 21))
    with pytest.raises(InputError, match="TOP_K is 21, and 20 beams may not find so many"):
        common.make_evaluation(spec, "test", graphdef, mesh)
    gin.clear_config()
    short, long = found
    assert long.facts["items"].shape == (len(short), 15)
    np.testing.assert_array_equal(long.facts["items"][:, :10], short.facts["items"])
    assert short.overall == long.overall
    for ending in ("", "_unfiltered"):
        assert list(long.values[ending])[::5] == ["recall@1", "recall@10", "recall@15"]
        for name in retrieval.METRICS:
            np.testing.assert_array_equal(long.values[ending][f"{name}@10"], short.values[ending][f"{name}@10"])
    hits = (long.facts["items"] == long.facts["target"][:, None]).any(axis=1)
    np.testing.assert_array_equal(long.values[""]["recall@15"], hits)
    np.testing.assert_array_equal(long.facts["rank"] > 0, hits)

"""Metrics against ranx, scikit-learn, SciPy and brute force."""

import os

os.environ["NUMBA_DISABLE_JIT"] = "1"  # ranx as plain Python: compiling it takes longer than all the tests

import jax
import numpy as np
import pytest
import ranx
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import mean_absolute_error, ndcg_score, root_mean_squared_error

from benchmarks import metrics as benchmark
from recalign_jax import metrics

KS = (1, 3, 5, 10)
RANX_NAMES = {"recall": "recall", "hr": "hit_rate", "ndcg": "ndcg", "mrr": "mrr", "map": "map"}


def random_lists(seed, users, items=30, length=12):
    """Ranked lists of distinct items, some cut short by -1, some of them empty."""
    rng = np.random.default_rng(seed)
    ranked = np.stack([rng.permutation(items)[:length] for _ in range(users)]).astype(np.int32)
    ranked[np.arange(length) >= rng.integers(0, length + 1, users)[:, None]] = -1
    return ranked


def random_targets(seed, users, items=30, most=6):
    """One to `most` relevant items a user, padded with -1."""
    rng = np.random.default_rng([seed, 1])
    targets = np.stack([rng.permutation(items)[:most] for _ in range(users)]).astype(np.int32)
    targets[np.arange(most) >= rng.integers(1, most + 1, users)[:, None]] = -1
    return targets


def names(row):
    return [f"i{item}" for item in row if item >= 0]


def ranx_values(run, targets, ks=KS):
    """What ranx has for each user: `run` holds a dictionary of scores a user, `targets` is [N, R]."""
    users = [f"u{user:03}" for user in range(len(targets))]
    # ranx wants at least one judgement and one result a user: one that is irrelevant, one that nobody looks for.
    relevant = [dict.fromkeys(names(row), 1) or {"none": 0} for row in targets]
    qrels = ranx.Qrels(dict(zip(users, relevant, strict=True)))
    run = ranx.Run(dict(zip(users, [scores or {"nothing": 0.0} for scores in run], strict=True)))
    wanted = {f"{ours}@{k}": f"{theirs}@{k}" for ours, theirs in RANX_NAMES.items() for k in ks}
    values = ranx.evaluate(qrels, run, list(wanted.values()), return_mean=False)
    return {ours: values[theirs] for ours, theirs in wanted.items()}, run


def as_run(ranked):
    return [{name: -float(rank) for rank, name in enumerate(names(row))} for row in ranked]


def assert_equal(ours, expected):
    assert set(ours) == set(expected)
    for name, values in expected.items():
        assert ours[name].dtype == np.float32
        np.testing.assert_allclose(ours[name], values, atol=1e-6, rtol=0, err_msg=name)


@settings(max_examples=15)
@given(st.integers(0, 2**32 - 1), st.integers(1, 4))
def test_retrieval_equals_ranx(seed, most):
    ranked, targets = random_lists(seed, 25), random_targets(seed, 25, most=4)
    targets[:, most:] = -1
    targets[0] = -1  # nothing is relevant
    ranked[1] = -1  # nothing was found
    ranked[2, :4], targets[2, :2] = [5, 7, -1, -1], [6, 8]  # a short list without a hit
    ranked[2, 4:], targets[2, 2:] = -1, -1
    assert_equal(metrics.retrieval_values(ranked, targets, KS), ranx_values(as_run(ranked), targets)[0])


def test_one_relevant_item_needs_no_second_axis():
    ranked, targets = random_lists(5, 50), random_targets(5, 50, most=1)
    ours = metrics.retrieval_values(ranked, targets[:, 0])
    assert_equal(ours, ranx_values(as_run(ranked), targets, ks=(5, 10))[0])
    for k in (5, 10):
        assert np.array_equal(ours[f"recall@{k}"], ours[f"hr@{k}"])
        np.testing.assert_allclose(ours[f"map@{k}"], ours[f"mrr@{k}"], rtol=1e-6)


@settings(max_examples=10)
@given(st.integers(0, 2**32 - 1))
def test_tied_scores_in_the_order_of_ranx(seed):
    rng = np.random.default_rng(seed)
    targets = random_targets(seed, 20)
    scores = rng.integers(0, 4, (20, 30)).astype(float)  # four values for 30 items
    run = [{f"i{item}": score for item, score in enumerate(row)} for row in scores]
    expected, sorted_run = ranx_values(run, targets)
    ranked = [[int(name[1:]) for name in sorted_run.run[user]] for user in sorted_run.get_query_ids()]
    assert_equal(metrics.retrieval_values(np.int32(ranked), targets, KS), expected)


def test_ndcg_equals_scikit_learn():
    """Over lists of the whole catalogue: scikit-learn ranks all items."""
    rng = np.random.default_rng(3)
    scores, targets = rng.permuted(np.tile(np.arange(20.0), (40, 1)), axis=1), random_targets(3, 40, items=20)
    relevance = (np.arange(20) == targets[:, :, None]).any(axis=1)
    ours = metrics.retrieval_values(np.argsort(-scores, axis=1), targets, KS)
    for k in KS:
        expected = ndcg_score(relevance, scores, k=k, ignore_ties=True)
        assert np.mean(np.asarray(ours[f"ndcg@{k}"], np.float64)) == pytest.approx(expected, abs=1e-6)


def test_ranks():
    items = np.array([[4, 2, -1], [4, 2, 7], [-1, -1, -1], [-1, -1, -1]])
    assert metrics.target_ranks(items, np.array([2, 5, 0, -1])).tolist() == [1, 3, 3, 3]


def test_lists_shorter_than_the_cutoff():
    items, targets = np.zeros((2, 5), np.int32), np.zeros(2, np.int32)
    with pytest.raises(ValueError, match="at 10 need"):
        metrics.retrieval_values(items, targets)
    with pytest.raises(ValueError, match="at 6 need"):
        metrics.coverage(items, 3, 6)
    with pytest.raises(ValueError, match="at 6 need"):
        metrics.popularity_bias(items, targets, np.ones(3), 6)


def test_rating_equals_scikit_learn():
    rng = np.random.default_rng(0)
    predictions, ratings = rng.normal(3, 1, 101).astype(np.float32), rng.integers(1, 6, 101).astype(np.float32)
    values = metrics.rating_values(predictions, ratings)
    assert {name: value.shape for name, value in values.items()} == {"mse": (101,), "mae": (101,)}
    ours = metrics.estimates(values)
    assert set(ours) == {"rmse", "mae"}
    assert ours["rmse"].value == pytest.approx(root_mean_squared_error(ratings, predictions), abs=1e-6)
    assert ours["mae"].value == pytest.approx(mean_absolute_error(ratings, predictions), abs=1e-6)


@settings(max_examples=10)
@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 5, 12]))
def test_coverage_and_popularity_by_brute_force(seed, k):
    ranked, targets = random_lists(seed, 15), random_targets(seed, 15, most=1)[:, 0]
    ranked[0] = -1
    ranked[1, 0] = 29  # the last item, beside which -1 would count
    popularity = np.random.default_rng(seed).integers(1, 1000, 30)
    lists = [[item for item in row if item >= 0] for row in ranked[:, :k].tolist()]
    seen = {item for items in lists for item in items}
    assert float(metrics.coverage(ranked, 30, k)) == pytest.approx(len(seen) / 30, abs=1e-6)
    recommended = np.mean([np.mean(popularity[items]) for items in lists if items])
    expected = recommended / np.mean(popularity[targets])
    assert float(metrics.popularity_bias(ranked, targets, popularity, k)) == pytest.approx(expected, rel=1e-5)


def test_popularity_bias_of_nothing():
    empty, targets = np.full((3, 5), -1), np.arange(3)
    assert metrics.coverage(empty, 4, 5) == 0
    assert np.isnan(metrics.popularity_bias(empty, targets, np.arange(1, 5), 5))
    unseen = np.array([0, 0, 0, 7])
    assert np.isnan(metrics.popularity_bias(np.full((3, 5), 3), targets, unseen, 5))
    assert metrics.popularity_bias(np.full((3, 5), 3), np.full(3, 3), unseen, 5) == 1


def test_interval_is_scipys_bootstrap():
    rng = np.random.default_rng(0)
    values = {"skewed": rng.exponential(size=300), "hit": rng.random(300) < 0.1}
    for name, ours in metrics.estimates(values, resamples=4000, confidence=0.9).items():
        theirs = scipy.stats.bootstrap(
            (values[name],), np.mean, n_resamples=4000, confidence_level=0.9, method="percentile", rng=rng
        ).confidence_interval
        assert ours.value == pytest.approx(np.mean(values[name]), abs=1e-9)
        # The ends are quantiles of 4,000 draws, sure to about 4 % of the width.
        assert (ours.low, ours.high) == pytest.approx(tuple(theirs), abs=0.1 * (theirs.high - theirs.low))


def test_metrics_share_their_resamples():
    hits = np.random.default_rng(0).integers(0, 2, 50).astype(float)
    ours = metrics.estimates({"hits": hits, "three": 3 * hits, "none": 1 - hits})
    assert ours["three"][:3] == pytest.approx(tuple(3 * x for x in ours["hits"][:3]), abs=1e-6)
    assert ours["none"].low == pytest.approx(1 - ours["hits"].high, abs=1e-6)


def test_interval_of_the_root():
    squares = np.random.default_rng(0).exponential(size=200)
    ours = metrics.estimates({"mse": squares, "plain": squares})
    assert set(ours) == {"rmse", "plain"}
    assert ours["rmse"].value == pytest.approx(np.sqrt(squares.mean()), abs=1e-9)
    assert ours["rmse"].low == pytest.approx(np.sqrt(ours["plain"].low), rel=1e-4)  # up to where quantiles interpolate
    assert ours["rmse"].high == pytest.approx(np.sqrt(ours["plain"].high), rel=1e-4)
    # One error in a thousand: the resamples that miss it have no error, up to rounding.
    rare = metrics.estimates({"mse": np.eye(1000)[0]})["rmse"]
    assert rare.low == pytest.approx(0, abs=1e-4)


def test_95_of_100_intervals_hold_the_mean():
    rng = np.random.default_rng(0)
    draws = {str(i): column for i, column in enumerate(rng.random((400, 200)).T < 0.3)}  # 200 samples of 400 users
    held = [estimate.low <= 0.3 <= estimate.high for estimate in metrics.estimates(draws).values()]
    assert 0.90 <= np.mean(held) <= 0.985  # 0.95, and three standard errors


def test_seeds():
    values = {"x": np.random.default_rng(0).random(100)}
    assert metrics.estimates(values, seed=1) == metrics.estimates(values, seed=1)
    assert metrics.estimates(values, seed=1)["x"].low != metrics.estimates(values, seed=2)["x"].low


def test_means_of_many_users_are_exact():
    values = np.random.default_rng(0).random(100_000).astype(np.float32) + 10
    ours = metrics.estimates({"x": values}, resamples=20)["x"]
    assert ours.value == pytest.approx(np.mean(values, dtype=np.float64), abs=1e-9)
    resampled = [_resampled_mean(values, key) for key in jax.random.split(jax.random.key(0), 20)]
    expected = np.quantile(resampled, [0.025, 0.975])
    assert (ours.low, ours.high) == pytest.approx(tuple(expected), abs=1e-6)


def _resampled_mean(values, key):
    users = np.asarray(jax.random.bits(key, (131_072,), np.uint32))[: len(values)] % len(values)
    return np.mean(values[users], dtype=np.float64)


def test_only_users_are_drawn():
    values = np.float32([[1], [1], [1], [1000]])  # the last row fills up
    assert np.all(metrics._resampled_sums(values, np.uint32(3), 0, 50) == 3)


def test_one_user_and_none():
    assert metrics.estimates({"x": np.array([0.25]), "mse": np.array([4.0])}) == {
        "x": (0.25, 0.25, 0.25),
        "rmse": (2.0, 2.0, 2.0),
    }
    with pytest.raises(ValueError, match="not one user"):
        metrics.estimates({"x": np.zeros(0)})


def test_the_benchmark_compares_like_with_like():
    result = benchmark.compare(users=60, items=50, depth=10, rounds=1)
    assert result["largest_difference"] < 1e-6
    assert result["ratio"] > 0

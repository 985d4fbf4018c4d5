"""Metrics against ranx and scikit-learn."""

import os

os.environ["NUMBA_DISABLE_JIT"] = "1"  # ranx as plain Python: compiling it takes longer than all the tests

import jax.numpy as jnp
import numpy as np
import pytest
import ranx
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import mean_absolute_error, ndcg_score, root_mean_squared_error

from recalign_jax import metrics


def random_lists(seed, users, items=30, length=12):
    """Ranked lists of distinct items, some cut short by -1, and a target each."""
    rng = np.random.default_rng(seed)
    ranked = np.stack([rng.permutation(items)[:length] for _ in range(users)]).astype(np.int32)
    lengths = rng.integers(0, length + 1, users)
    ranked[np.arange(length) >= lengths[:, None]] = -1
    return ranked, rng.integers(0, items, users).astype(np.int32)


def ranx_means(ranked, targets, names):
    users = range(len(targets))
    qrels = ranx.Qrels({f"u{u}": {f"i{targets[u]}": 1} for u in users})
    # ranx wants at least one result a user: an empty list is one item that nobody looks for.
    run = ranx.Run(
        {f"u{u}": {f"i{i}": -float(r) for r, i in enumerate(ranked[u]) if i >= 0} or {"none": 0.0} for u in users}
    )
    return ranx.evaluate(qrels, run, names)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_retrieval_equals_ranx(seed):
    ranked, targets = random_lists(seed, users=60)
    assert (ranked[:, 0] < 0).any()  # some lists are empty
    ours = metrics.mean_metrics([metrics.retrieval_metrics(ranked, targets, np.ones(60, np.float32))])
    names = ["recall@5", "recall@10", "ndcg@5", "ndcg@10", "mrr@10"]
    assert set(ours) == {*names, "count"}
    assert ours["count"] == 60
    for name, value in ranx_means(ranked, targets, names).items():
        assert ours[name] == pytest.approx(value, abs=1e-6)


def test_recall_is_the_hit_rate():
    ranked, targets = random_lists(5, users=50)
    ours = metrics.mean_metrics([metrics.retrieval_metrics(ranked, targets, np.ones(50, np.float32), ks=(3,))])
    assert ours["recall@3"] == pytest.approx(ranx_means(ranked, targets, ["hit_rate@3"]), abs=1e-6)


def test_ndcg_equals_scikit_learn():
    ranked, targets = random_lists(3, users=40, items=12)
    ours = metrics.ndcg_at_k(metrics.target_ranks(ranked, targets), 10)
    for user in range(40):
        relevance, scores = np.zeros((1, 40)), np.zeros((1, 40))
        relevance[0, targets[user]] = 1
        for rank, item in enumerate(ranked[user]):
            if item >= 0:
                scores[0, item] = 100 - rank
        # scikit-learn ranks all items; those that are not in the list must not count as results.
        expected = ndcg_score(relevance, scores, k=10, ignore_ties=True) if targets[user] in ranked[user] else 0
        assert float(ours[user]) == pytest.approx(expected, abs=1e-6)


def test_ranks():
    items = jnp.array([[4, 2, -1], [4, 2, 7], [-1, -1, -1], [-1, -1, -1]])
    assert metrics.target_ranks(items, jnp.array([2, 5, 0, -1])).tolist() == [1, 3, 3, 3]


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1), st.lists(st.booleans(), min_size=24, max_size=24).filter(any))
def test_padding_never_counts_and_batches_add_up(seed, real):
    ranked, targets = random_lists(seed, users=24)
    real = np.array(real)
    ranked[~real], targets[~real] = 3, 3  # rows of padding would be hits
    sums = metrics.retrieval_metrics(ranked, targets, real.astype(np.float32))
    assert float(sums["count"]) == real.sum()
    batches = [slice(0, 8), slice(8, 16), slice(16, 24)]
    ours = metrics.mean_metrics(
        metrics.retrieval_metrics(ranked[b], targets[b], real[b].astype(np.float32)) for b in batches
    )
    ranks = np.array(
        [list(r).index(t) if t in r else 99 for r, t in zip(ranked[real], targets[real], strict=True)], float
    )
    assert ours["count"] == real.sum()
    for k in (5, 10):
        assert ours[f"recall@{k}"] == pytest.approx(np.mean(ranks < k), abs=1e-6)
        assert ours[f"ndcg@{k}"] == pytest.approx(np.mean((ranks < k) / np.log2(ranks + 2)), abs=1e-6)
    assert ours["mrr@10"] == pytest.approx(np.mean((ranks < 10) / (ranks + 1)), abs=1e-6)


def test_nothing_to_count():
    ranked, targets = random_lists(0, users=8)
    with pytest.raises(ValueError, match="not one row"):
        metrics.mean_metrics([metrics.retrieval_metrics(ranked, targets, np.zeros(8, np.float32))])
    with pytest.raises(ValueError, match="not one row"):
        metrics.mean_metrics([])


def test_lists_shorter_than_the_cutoff():
    with pytest.raises(ValueError, match="at 10 need"):
        metrics.retrieval_metrics(np.zeros((2, 5), np.int32), np.zeros(2, np.int32), np.ones(2, np.float32))


def test_rating_equals_scikit_learn():
    rng = np.random.default_rng(0)
    predictions, ratings = rng.normal(3, 1, 101).astype(np.float32), rng.integers(1, 6, 101).astype(np.float32)
    weights = np.ones(101, np.float32)
    weights[90:], predictions[90:] = 0, np.nan  # padding
    ours = metrics.mean_metrics(
        metrics.rating_metrics(predictions[b], ratings[b], weights[b]) for b in (slice(0, 50), slice(50, 101))
    )
    assert ours["count"] == 90
    assert ours["rmse"] == pytest.approx(root_mean_squared_error(ratings[:90], predictions[:90]), abs=1e-6)
    assert ours["mae"] == pytest.approx(mean_absolute_error(ratings[:90], predictions[:90]), abs=1e-6)

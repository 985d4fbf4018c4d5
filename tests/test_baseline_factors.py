"""BPR-MF and biased MF: losses against sums by hand, draws against sets, ratings against scikit-learn's ridge."""

import dataclasses
from unittest import mock

import jax
import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import Ridge

from recalign_jax.baselines import bprmf, mf, minibatches
from recalign_jax.baselines.bprmf import BprMfOptions
from recalign_jax.baselines.fit import Run
from recalign_jax.baselines.mf import MfOptions
from recalign_jax.checkpoint import locations, saved
from recalign_jax.errors import InputError
from recalign_jax.evaluation import rating
from recalign_jax.evaluation.results import EvaluationOptions
from seqio_tasks import examples
from seqio_tasks.examples import Query, RatedQuery
from tests.corpora import corpus_in_memory, training_part

FAMILIES = ("rating", "rating_random")


def asked(user, item, split_rating=0.0):
    return RatedQuery(user, np.zeros(0, np.int32), np.zeros(0, np.float32), item, split_rating)


def predicted(predict, queries):
    """(expected, most likely) in the order of the queries."""
    [(chosen, expected, likely)] = predict(queries)
    np.testing.assert_array_equal(chosen, np.arange(len(queries)))
    return expected, likely


def newest(model_dir):
    """Hashes of all parameters and of the optimizer's state in a run's newest checkpoint."""
    return saved.read_metadata(locations.folder_of(str(model_dir), locations.steps(str(model_dir))[0]))["fingerprints"]


def filled(random, shapes):
    return {name: random.normal(0, 1, shape).astype(np.float32) for name, shape in shapes.items()}


def close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)


# ---------------------------------------------------------------- batches


@given(st.integers(1, 30), st.integers(1, 12), st.integers(0, 9))
def test_an_epoch_has_every_row_once_in_batches_of_one_shape(rows, size, seed):
    table = {"a": np.arange(rows), "b": np.arange(rows) * 10}
    batches = list(minibatches.shuffled(table, size, np.random.default_rng(seed)))
    assert {array.shape for batch in batches for array in batch.values()} == {(size,)}
    a, b, weight = (np.concatenate([batch[name] for batch in batches]) for name in ("a", "b", "weight"))
    assert sorted(a[weight == 1]) == list(range(rows))
    assert np.all(b == 10 * a)
    assert set(weight) <= {0, 1}


def test_epochs_have_other_orders():
    table = {"a": np.arange(100)}
    orders = [next(minibatches.shuffled(table, 100, np.random.default_rng([0, epoch])))["a"] for epoch in (1, 2)]
    assert np.mean(orders[0] == orders[1]) < 0.1


# ---------------------------------------------------------------- BPR-MF: what it is trained on

ITEMS = 7
SEQUENCES = st.lists(st.lists(st.integers(0, ITEMS - 1), min_size=1, max_size=12), min_size=1, max_size=6)


@given(SEQUENCES)
def test_pairs_are_those_of_the_training_parts_that_have_a_negative(sequences):
    pairs = bprmf.training_pairs(corpus_in_memory(sequences, ITEMS))
    parts = [set(training_part(sequence)) for sequence in sequences]
    expected = [user * ITEMS + item for user, part in enumerate(parts) if len(part) < ITEMS for item in sorted(part)]
    assert pairs.tolist() == expected


@given(SEQUENCES)
def test_negatives_are_uniform_over_what_is_not_in_the_training_part(sequences):
    """A uniform number below n becomes one of the n items that are left, each number another one."""
    pairs = bprmf.training_pairs(corpus_in_memory(sequences, ITEMS))
    left = [ITEMS - len(set(training_part(sequences[pair // ITEMS]))) for pair in pairs]
    random = mock.Mock()
    found = []
    for number in range(ITEMS):
        random.integers = lambda high, number=number: np.minimum(number, high - 1)
        found.append(bprmf.draw_negatives(pairs, ITEMS, random))
        np.testing.assert_array_equal(ITEMS - np.bincount(pairs // ITEMS)[pairs // ITEMS], left)
    for place, (pair, count) in enumerate(zip(pairs, left, strict=True)):
        negatives = [drawn[place] for drawn in found[:count]]
        assert len(set(negatives)) == count
        assert set(negatives) == set(range(ITEMS)) - set(training_part(sequences[pair // ITEMS]))


def test_drawn_negatives_are_uniform_and_held_out_items_among_them():
    sequences = [[3, 1, 4, 9, 5], [2, 6, 5, 3, 7, 8, 0]]  # 9 and 5, 8 and 0 are held out
    pairs = bprmf.training_pairs(corpus_in_memory(sequences, 10))
    random = np.random.default_rng(0)
    drawn = np.stack([bprmf.draw_negatives(pairs, 10, random) for _ in range(5000)])
    for user, allowed in enumerate([[0, 2, 5, 6, 7, 8, 9], [0, 1, 4, 8, 9]]):
        counts = np.bincount(drawn[:, pairs // 10 == user].ravel(), minlength=10)
        assert np.flatnonzero(counts).tolist() == allowed
        assert scipy.stats.chisquare(counts[allowed]).pvalue > 0.01


# ---------------------------------------------------------------- BPR-MF: loss and learning


def test_bpr_loss_and_gradients_are_those_of_sums_by_hand():
    random = np.random.default_rng(0)
    params = filled(random, {"users": (4, 3), "items": (5, 3), "biases": (5,)})
    batch = {
        "user": np.array([0, 2, 2, 1, 3]),
        "item": np.array([1, 1, 4, 0, 2]),
        "negative": np.array([3, 4, 0, 1, 3]),
        "weight": np.array([1, 1, 1, 1, 0], np.float32),
    }
    l2, total = 0.3, 0.0
    gradient = {name: np.zeros(array.shape) for name, array in params.items()}
    for u, i, j in [(0, 1, 3), (2, 1, 4), (2, 4, 0), (1, 0, 1)]:
        p, q, r = (params[name][of].astype(np.float64) for name, of in (("users", u), ("items", i), ("items", j)))
        b, c = (float(params["biases"][of]) for of in (i, j))
        x = p @ q + b - p @ r - c
        total += np.log(1 + np.exp(-x)) + l2 / 2 * (p @ p + q @ q + r @ r + b * b + c * c)
        slope = -1 / (1 + np.exp(x))
        gradient["users"][u] += slope * (q - r) + l2 * p
        gradient["items"][i] += slope * p + l2 * q
        gradient["items"][j] += -slope * p + l2 * r
        gradient["biases"][i] += slope + l2 * b
        gradient["biases"][j] += -slope + l2 * c
    (found, count), found_gradient = jax.value_and_grad(bprmf.loss, has_aux=True)(params, batch, l2)
    close(found, total)
    assert count == 4
    for name, array in gradient.items():
        close(found_gradient[name], array)


BLOCKS, IN_BLOCK = 4, 10


def block_corpus(change_held_out=False):
    """Every user has 7 of the 10 items of a block, two of them held out."""
    random = np.random.default_rng(0)
    sequences = []
    for user in range(80):
        own = random.permutation(IN_BLOCK)[:7] + IN_BLOCK * (user % BLOCKS)
        held_out = random.permutation(IN_BLOCK)[:2] + IN_BLOCK * ((user + 1) % BLOCKS)
        sequences.append(np.append(own[:5], held_out) if change_held_out else own)
    return corpus_in_memory(sequences, BLOCKS * IN_BLOCK)


BPR = BprMfOptions(width=8, batch=64, learning_rate=0.02, epochs=30, eval_period=30)


def test_bpr_mf_ranks_the_rest_of_a_users_block_above_all_other_items(tmp_path):
    corpus = block_corpus()
    scores = bprmf.make(corpus, BPR, Run(str(tmp_path), 0, {}))
    queries = [Query(user, np.zeros(0, np.int32), 0) for user in range(corpus.num_users)]
    ordered = 0
    for user, of_items in enumerate(np.asarray(scores(queries))):
        blocks = np.arange(corpus.num_items) // IN_BLOCK
        met = np.isin(np.arange(corpus.num_items), corpus.training_sequence(user))
        rest, others = of_items[(blocks == user % BLOCKS) & ~met], of_items[blocks != user % BLOCKS]
        ordered += rest.min() > others.max()
    assert ordered >= 0.95 * corpus.num_users  # by chance 5 of 35 are the best once in 324,632


def test_bpr_mf_says_that_it_has_no_vectors_for_other_users(tmp_path):
    corpus = block_corpus()
    scores = bprmf.make(corpus, dataclasses.replace(BPR, epochs=1), Run(str(tmp_path), 0, {}))
    with pytest.raises(InputError, match="users of corpus small only"):
        scores([Query(0, np.zeros(0, np.int32), 0), Query(-1, np.zeros(0, np.int32), 0)])


def test_bpr_mf_wants_something_to_train_on(tmp_path):
    corpus = corpus_in_memory([[0, 1, 2, 2, 1]], 3)
    with pytest.raises(InputError, match="no user with an item to train on"):
        bprmf.make(corpus, BPR, Run(str(tmp_path), 0, {}))


# ---------------------------------------------------------------- both: resumed runs, and leaks


def rated_corpus(change=lambda ratings: ratings):
    """60 users with 12 of 30 items each, ratings 1 to 5; `change` is applied to the ratings of all, [N]."""
    random = np.random.default_rng(1)
    sequences = [random.permutation(30)[:12] for _ in range(60)]
    ratings = change(random.integers(1, 6, (60, 12)).astype(np.float32).ravel())
    return corpus_in_memory(sequences, 30, [ratings])


MF = MfOptions(factors=4, batch=100, learning_rate=0.01, epochs=4, eval_period=2)
METHODS = {
    "bprmf": lambda run, epochs: bprmf.make(block_corpus(), dataclasses.replace(BPR, epochs=epochs), run),
    "rating": lambda run, epochs: mf.make(rated_corpus(), dataclasses.replace(MF, epochs=epochs), run, "rating"),
}


@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_is_bit_identical_to_one_without_a_break(method, tmp_path):
    make = METHODS[method]
    run, broken = (Run(str(tmp_path / name), 3, {}) for name in ("run", "broken"))
    make(run, 4)
    make(broken, 2)
    after_two = newest(broken.model_dir)
    make(broken, 4)
    assert newest(broken.model_dir) == newest(run.model_dir) != after_two
    make(other := Run(str(tmp_path / "other"), 4, {}), 4)
    assert newest(other.model_dir) != newest(run.model_dir)


def test_held_out_items_do_not_change_what_bpr_mf_learns(tmp_path):
    runs = [Run(str(tmp_path / name), 0, {}) for name in ("run", "changed")]
    for run, changed in zip(runs, (False, True), strict=True):
        bprmf.make(block_corpus(changed), dataclasses.replace(BPR, epochs=2), run)
    assert newest(runs[0].model_dir) == newest(runs[1].model_dir)


@pytest.mark.parametrize("family", FAMILIES)
def test_held_out_ratings_do_not_change_what_mf_learns(family, tmp_path):
    corpus = rated_corpus()
    held_out = [examples.random_part(corpus, split) for split in ("validation", "test")]
    if family == "rating":
        held_out = [corpus.user_offsets[1:] - 2, corpus.user_offsets[1:] - 1]

    def change(ratings):
        ratings[np.concatenate(held_out)] = 9
        return ratings

    runs = [Run(str(tmp_path / name), 0, {}) for name in ("run", "changed", "trained_on_them")]
    mf.make(corpus, MF, runs[0], family)
    mf.make(rated_corpus(change), MF, runs[1], family)
    assert newest(runs[0].model_dir) == newest(runs[1].model_dir)
    # The same test sees a change of one rating in training.
    held_out = [np.setdiff1d(np.arange(corpus.num_interactions), np.concatenate(held_out))[:1]]
    mf.make(rated_corpus(change), MF, runs[2], family)
    assert newest(runs[0].model_dir) != newest(runs[2].model_dir)


# ---------------------------------------------------------------- MF


def test_mf_loss_and_gradients_are_those_of_sums_by_hand():
    random = np.random.default_rng(0)
    params = filled(random, {"users": (3, 2), "items": (4, 2), "user_biases": (3,), "item_biases": (4,)})
    batch = {
        "user": np.array([0, 2, 2, 1]),
        "item": np.array([1, 1, 3, 0]),
        "rating": np.array([4, 1, 5, 2], np.float32),
        "weight": np.array([1, 1, 1, 0], np.float32),
    }
    mean, l2, total = 3.2, 0.4, 0.0
    gradient = {name: np.zeros(array.shape) for name, array in params.items()}
    for u, i, r in [(0, 1, 4), (2, 1, 1), (2, 3, 5)]:
        p, q, b, c = (
            params[name][of].astype(np.float64)
            for name, of in (("users", u), ("items", i), ("user_biases", u), ("item_biases", i))
        )
        error = r - (mean + b + c + p @ q)
        total += error**2 + l2 * (p @ p + q @ q + b * b + c * c)
        gradient["users"][u] += -2 * error * q + 2 * l2 * p
        gradient["items"][i] += -2 * error * p + 2 * l2 * q
        gradient["user_biases"][u] += -2 * error + 2 * l2 * b
        gradient["item_biases"][i] += -2 * error + 2 * l2 * c
    (found, count), found_gradient = jax.value_and_grad(mf.loss, has_aux=True)(params, batch, mean, l2)
    close(found, total)
    assert count == 3
    for name, array in gradient.items():
        close(found_gradient[name], array)


@pytest.mark.parametrize("family", FAMILIES)
def test_biases_alone_are_a_ridge_regression(family, tmp_path):
    corpus, l2 = rated_corpus(), 0.2
    chosen = examples.random_part(corpus, "train") if family == "rating_random" else np.flatnonzero(corpus.in_training)
    users, items = np.repeat(np.arange(60), 12)[chosen], corpus.items[chosen]
    ratings = corpus.ratings[chosen].astype(np.float64)
    # Every rating pays for its two biases: b^2 * count. Ridge pays once for w, so b = w / sqrt(count).
    hot = np.zeros((len(chosen), 90))
    hot[np.arange(len(chosen)), users] = hot[np.arange(len(chosen)), 60 + items] = 1
    scale = 1 / np.sqrt(np.maximum(hot.sum(axis=0), 1))
    ridge = Ridge(alpha=l2, fit_intercept=False, solver="cholesky").fit(hot * scale, ratings - ratings.mean())
    biases = ridge.coef_ * scale

    # All ratings a step, so that nothing is random.
    options = MfOptions(factors=0, batch=len(chosen), l2=l2, learning_rate=0.01, epochs=1000, eval_period=1000)
    mf.make(corpus, options, Run(str(tmp_path), 0, {}), family)
    found = saved.read_arrays(str(tmp_path))
    np.testing.assert_allclose(found["user_biases"], biases[:60], atol=1e-5)
    np.testing.assert_allclose(found["item_biases"], biases[60:], atol=1e-5)


def test_factors_find_a_low_rank_matrix_that_biases_miss(tmp_path):
    random = np.random.default_rng(0)
    true = 3 + random.normal(0, 1, (80, 2)) @ random.normal(0, 1, (2, 40))
    sequences = [random.permutation(40)[:30] for _ in range(80)]
    corpus = corpus_in_memory(sequences, 40, [true[user, items] for user, items in enumerate(sequences)])
    rmse = []
    for factors in (0, 4):
        options = MfOptions(factors=factors, batch=256, l2=0.01, learning_rate=0.02, epochs=40, eval_period=40)
        predict = mf.make(corpus, options, Run(str(tmp_path / str(factors)), 0, {}), "rating")
        queries = rating.evaluation_queries(corpus, "test", "rating", EvaluationOptions())
        expected, _ = predicted(predict, queries)
        rmse.append(np.sqrt(np.mean((expected - [query.rating for query in queries]) ** 2)))
    assert rmse[0] > 1  # the spread of the products
    assert rmse[1] < 0.3


def test_mf_falls_back_on_what_it_knows(tmp_path):
    """Item 3 occurs held out only; no user -1 is known; users and items in training have biases and vectors."""
    sequences = [[0, 1, 2, 3, 3], [1, 2, 0, 1, 3], [2, 0, 1, 3, 0]]
    ratings = [[1, 2, 2, 4, 4], [2, 4, 4, 5, 5], [2, 2, 1, 5, 5]]
    corpus = corpus_in_memory(sequences, 5, ratings)
    options = MfOptions(factors=3, l2=0.01, learning_rate=0.05, epochs=20, eval_period=20)
    predict = mf.make(corpus, options, Run(str(tmp_path), 0, {}), "rating")
    params = {
        name: array[(slice(None),) * len(array.shape)] for name, array in saved.read_arrays(str(tmp_path)).items()
    }
    mean = np.mean([1, 2, 2, 2, 4, 4, 2, 2, 1])
    for user in range(3):
        expected, _ = predicted(predict, [asked(user, 3), asked(user, 1), asked(-1, 1), asked(-1, 4)])
        of_user, of_item = params["user_biases"][user], params["item_biases"][1]
        whole = mean + of_user + of_item + params["users"][user] @ params["items"][1]
        close(expected, np.clip([mean + of_user, whole, mean + of_item, mean], 1, 4))
        assert of_user != 0 != of_item


def test_the_expected_rating_is_clipped_and_the_most_likely_one_occurs_in_training(tmp_path):
    """Sums of biases go beyond 1 and 4; 5 is held out only."""
    sequences = [[0, 1, 2, 3, 0]] * 3
    ratings = [[1, 1, 4, 5, 5], [1, 4, 4, 5, 5], [2, 3.5, 4, 5, 5]]
    options = MfOptions(factors=0, l2=0.0, learning_rate=0.05, epochs=100, eval_period=100)
    predict = mf.make(corpus_in_memory(sequences, 4, ratings), options, Run(str(tmp_path), 0, {}), "rating")
    expected, likely = predicted(predict, [asked(user, item) for user in range(3) for item in range(4)])
    assert expected.min() == 1
    assert expected.max() == 4
    values = np.array([1, 2, 3.5, 4])
    np.testing.assert_array_equal(likely, values[np.argmin(np.abs(values - expected[:, None]), axis=1)])
    assert len(set(likely)) > 2


def test_a_random_split_wants_ten_ratings(tmp_path):
    corpus = corpus_in_memory([[0, 1, 2, 3], [3, 2, 1, 0, 4]], 5, [[1, 2, 3, 4], [5, 4, 3, 2, 1]])
    with pytest.raises(InputError, match="small has 9 ratings: with fewer than ten"):
        mf.make(corpus, MF, Run(str(tmp_path), 0, {}), "rating_random")


def test_mf_wants_ratings(tmp_path):
    with pytest.raises(InputError, match="small has no ratings"):
        mf.make(block_corpus(), MF, Run(str(tmp_path), 0, {}), "rating")


@pytest.mark.parametrize(
    ("options", "values"),
    [
        (BprMfOptions, {"width": 0}),
        (BprMfOptions, {"batch": 0}),
        (BprMfOptions, {"l2": -1.0}),
        (MfOptions, {"factors": -1}),
        (MfOptions, {"batch": 0}),
        (MfOptions, {"l2": -0.1}),
        (MfOptions, {"epochs": 0}),
    ],
)
def test_options_that_can_not_be_are_refused(options, values):
    [name] = values
    with pytest.raises(InputError, match=rf"{options.__name__}\.{name} is {values[name]}"):
        options(**values)

"""Popularity, item-kNN, and what lists and candidates are made of scores: against counting, sorting, scikit-learn."""

import functools
import math
from collections import Counter
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics.pairwise import cosine_similarity

from recalign_jax.baselines import itemknn, popularity, scores
from recalign_jax.baselines.itemknn import ItemKnnOptions
from recalign_jax.baselines.popularity import PopularityOptions
from recalign_jax.errors import InputError
from recalign_jax.evaluation import results
from seqio_tasks.examples import Query
from tests.corpora import corpus_in_memory, training_part

ITEMS = 9
ITEM = st.integers(0, ITEMS - 1)
SEQUENCES = st.lists(st.lists(ITEM, min_size=1, max_size=9), min_size=1, max_size=9)
OPTIONS = st.builds(
    ItemKnnOptions, st.integers(1, ITEMS), st.sampled_from([0.0, 0.5, 10.0]), st.sampled_from([1.0, 0.9, 0.3])
)


corpus_of = functools.partial(corpus_in_memory, num_items=ITEMS)


def query(history, user=-1):
    return Query(user, np.asarray(history, np.int32), 0)


# ---------------------------------------------------------------- popularity


@given(st.data(), SEQUENCES, st.integers(1, 20))
def test_popularity_counts_the_newest_interactions_in_training(data, sequences, twentieths):
    times = [sorted(data.draw(st.lists(st.integers(0, 9), min_size=len(s), max_size=len(s)))) for s in sequences]
    found = popularity.counts(corpus_of(sequences, timestamps=times), PopularityOptions(newest=twentieths / 20))
    timed = zip(sequences, times, strict=True)
    pairs = [pair for s, t in timed for pair in zip(training_part(t), training_part(s), strict=True)]
    pairs.sort(reverse=True)
    last = pairs[math.ceil(twentieths / 20 * len(pairs)) - 1][0]
    expected = Counter(item for time, item in pairs if time >= last)
    assert found.tolist() == [expected[item] for item in range(ITEMS)]


@given(SEQUENCES)
def test_all_of_the_newest_is_the_training_popularity(sequences):
    corpus = corpus_of(sequences)
    found = popularity.counts(corpus, PopularityOptions())
    assert found.dtype == corpus.training_popularity.dtype
    assert found.tolist() == corpus.training_popularity.tolist()
    table = popularity.make(corpus, PopularityOptions())([query([0]), query([1, 2])])
    assert np.asarray(table).tolist() == [corpus.training_popularity.tolist()] * 2


def test_places_for_timestamps_are_warned_of_where_they_matter(capfd):
    sequences = [[0, 1, 2, 3], [2, 1, 0]]
    times = [[7, 7, 8, 9], [1, 2, 8]]
    popularity.counts(corpus_of(sequences), PopularityOptions())
    popularity.counts(corpus_of(sequences, timestamps=times), PopularityOptions(newest=0.5))
    assert capfd.readouterr().err == ""
    for first in (0, 1):
        places = [np.arange(len(sequence)) + first for sequence in sequences]
        popularity.counts(corpus_of(sequences, timestamps=places), PopularityOptions(newest=0.5))
        assert "warning: The timestamps of small are" in capfd.readouterr().err


# ---------------------------------------------------------------- item-kNN


def similarities_by_hand(sequences, options, num_items=ITEMS):
    """item -> {neighbour: similarity}"""
    users = [{user for user, s in enumerate(sequences) if item in training_part(s)} for item in range(num_items)]
    found = {}
    for item, own in enumerate(users):
        similar = {
            other: np.float32(len(own & theirs) / (math.sqrt(len(own) * len(theirs)) + options.shrink))
            for other, theirs in enumerate(users)
            if other != item and own & theirs
        }
        nearest = sorted(similar, key=lambda other: (-similar[other], other))[: options.neighbours]
        found[item] = {other: similar[other] for other in nearest}
    return found


@given(SEQUENCES, OPTIONS, st.integers(1, 60))
def test_similarities_are_the_formulas_whatever_is_counted_at_once(sequences, options, pairs_at_once):
    with mock.patch.object(itemknn, "PAIRS_AT_ONCE", pairs_at_once):
        found = itemknn.similarities(corpus_of(sequences), options)
    assert found.dtype == np.float32
    by_hand = similarities_by_hand(sequences, options)
    expected = [[by_hand[item].get(other, 0) for other in range(ITEMS)] for item in range(ITEMS)]
    assert found.toarray().tolist() == expected


def test_similarities_are_cosines_without_shrinkage():
    random = np.random.default_rng(0)
    has = random.random((300, 80)) < random.random(80) / 4
    has[:, 0] = True  # nobody without an item
    sequences = [[*random.permutation(np.flatnonzero(row)), 1, 2] for row in has]
    found = itemknn.similarities(corpus_of(sequences, num_items=80), ItemKnnOptions(neighbours=80, shrink=0.0))
    has = np.stack([np.isin(np.arange(80), training_part(sequence)) for sequence in sequences])
    expected = cosine_similarity(has.T.astype(float)) * ~np.eye(80, dtype=bool)
    np.testing.assert_allclose(found.toarray(), expected, rtol=1e-6, atol=1e-7)


@given(SEQUENCES, OPTIONS, st.lists(st.lists(ITEM, min_size=1, max_size=12), min_size=1, max_size=5))
def test_scores_are_sums_over_the_history_and_else_popularity(sequences, options, histories):
    corpus = corpus_of(sequences)
    found = np.asarray(itemknn.make(corpus, options)([query(history) for history in histories]))
    assert found.dtype == np.float32
    by_hand = similarities_by_hand(sequences, options)
    counts = corpus.training_popularity
    for row, history in zip(found, histories, strict=True):
        expected = np.zeros(ITEMS)
        for age, item in enumerate(reversed(history)):
            for other, similarity in by_hand[item].items():
                expected[other] += options.decay**age * similarity
        np.testing.assert_allclose(row[expected > 0], expected[expected > 0], rtol=1e-5)
        others = np.flatnonzero(expected == 0)
        assert np.all(row[others] < 0)
        assert np.array_equal(np.sign(row[others, None] - row[others]), np.sign(counts[others, None] - counts[others]))


def test_the_oldest_item_of_a_long_history_still_counts():
    # 0 and 1 stand together; 2, far more popular, with none of the history but itself.
    corpus = corpus_of([[0, 1], *[[2]] * 50, [3]])
    [row] = np.asarray(itemknn.make(corpus, ItemKnnOptions(decay=0.1))([query([0] + [3] * 2000)]))
    assert np.argsort(-row, kind="stable").tolist()[:3] == [1, 2, 0]


def test_item_knn_answers_from_the_history_alone():
    corpus = corpus_of([[0, 1, 2, 3, 4], [0, 2, 5, 6, 7], [1, 5, 0, 2, 8]])
    score = itemknn.make(corpus, ItemKnnOptions())
    known, unknown = np.asarray(score([query([0, 1, 2], user=0), query([0, 1, 2])]))
    assert known.tolist() == unknown.tolist()


@given(SEQUENCES, st.data())
def test_what_is_held_out_changes_nothing(sequences, data):
    def tables(sequences):
        # Times that tell users apart, so that "newest" means something.
        corpus = corpus_of(sequences, timestamps=[np.arange(len(s)) * (user + 2) for user, s in enumerate(sequences)])
        similarities = itemknn.similarities(corpus, ItemKnnOptions()).toarray()
        answer = itemknn.make(corpus, ItemKnnOptions())([query([0])])
        counts = popularity.counts(corpus, PopularityOptions(newest=0.5))
        return [np.asarray(table).tolist() for table in (similarities, answer, counts)]

    kept = [training_part(sequence) for sequence in sequences]
    others = [
        part + data.draw(st.lists(ITEM, min_size=len(s) - len(part), max_size=len(s) - len(part)))
        for part, s in zip(kept, sequences, strict=True)
    ]
    assert tables(sequences) == tables(others)


def test_a_catalogue_of_a_million_items_takes_no_square_of_that():
    random = np.random.default_rng(0)
    sequences = random.integers(0, 10**6, (5000, 8)).tolist()
    corpus = corpus_of(sequences, num_items=10**6)
    assert itemknn.similarities(corpus, ItemKnnOptions()).nnz <= 5000 * 6 * 5
    [row] = itemknn.make(corpus, ItemKnnOptions())([query(sequences[0][:1])])
    assert set(sequences[0][1:6]) <= set(np.argsort(-row)[:5].tolist())


@pytest.mark.parametrize(
    ("options", "wrong"),
    [
        (ItemKnnOptions, {"neighbours": 0}),
        (ItemKnnOptions, {"shrink": -0.5}),
        (ItemKnnOptions, {"shrink": math.nan}),
        (ItemKnnOptions, {"decay": 0.0}),
        (ItemKnnOptions, {"decay": 1.5}),
        (PopularityOptions, {"newest": 0.0}),
        (PopularityOptions, {"newest": 1.1}),
    ],
)
def test_options_that_cannot_be_are_named(options, wrong):
    [(name, value)] = wrong.items()
    with pytest.raises(InputError, match=rf"{options.__name__}\.{name} is {value}"):
        options(**wrong)


# ---------------------------------------------------------------- scores as lists and candidates


def drawn(num_items, num_queries):
    """Scores with many ties, of queries that are told apart by their user; and what to exclude."""
    random = np.random.default_rng([num_items, num_queries])
    table = random.integers(-3, 4, (num_queries, num_items)).astype(np.float32)
    excluded = [random.integers(-1, num_items, random.integers(0, 8)).astype(np.int32) for _ in range(num_queries)]
    queries = [query([0], user) for user in range(num_queries)]
    return lambda batch: table[[each.user for each in batch]], table, queries, excluded


@pytest.mark.parametrize("num_queries", [1, 4, 11])
@pytest.mark.parametrize(("num_items", "top_k"), [(40, 10), (6, 10), (10, 10), (1, 3)])
def test_recommender_gives_the_best_that_are_not_excluded(monkeypatch, num_items, top_k, num_queries):
    monkeypatch.setattr(scores, "MAX_BATCH", 4)
    of, table, queries, excluded = drawn(num_items, num_queries)
    parts = scores.recommender(of, num_items, top_k)(queries, excluded)
    items, found = results.gather(parts, num_queries, "")
    assert items.shape == found.shape == (num_queries, top_k)
    for row, out, ranked, values in zip(table, excluded, items, found, strict=True):
        best = sorted(set(range(num_items)) - set(out.tolist()), key=lambda item: (-row[item], item))[:top_k]
        empty = top_k - len(best)
        assert ranked.tolist() == best + [-1] * empty
        assert values.tolist() == [row[item] for item in best] + [-math.inf] * empty


@pytest.mark.parametrize("num_queries", [1, 4, 11])
def test_scorer_gives_the_candidates_scores(monkeypatch, num_queries):
    monkeypatch.setattr(scores, "MAX_BATCH", 4)
    of, table, queries, _ = drawn(40, num_queries)
    candidates = np.random.default_rng(1).integers(-1, 40, (num_queries, 7)).astype(np.int32)
    [found] = results.gather(scores.scorer(of, 40)(queries, candidates), num_queries, "")
    assert found.dtype == np.float32
    for row, wanted, values in zip(table, candidates, found, strict=True):
        assert values.tolist() == [row[item] if item >= 0 else -math.inf for item in wanted]


def test_the_newest_of_histories():
    found = scores.newest([query([1, 2, 3, 4]), query([5]), query([6, 7, 8])], 3)
    assert found.tolist() == [[2, 3, 4], [5, -1, -1], [6, 7, 8]]


def test_scores_of_a_batch_are_bounded():
    assert [scores.batch_size(items) for items in (5, 12_101, 10**6, 10**9)] == [1024, 1024, 16, 1]

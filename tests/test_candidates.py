"""Negatives and held-out candidates, and collaborative neighbours, against brute force on sets and dicts."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recalign_jax.corpus import candidates
from recalign_jax.corpus.neighbours import NUM_KEPT, co_occurrence, neighbours_of
from recalign_jax.errors import InputError
from tests.corpora import prepared, write_tables


def draw(corpus, positive, met, count, kind="uniform", seed=0):
    random = np.random.default_rng(seed)
    return candidates.negatives(corpus, positive, np.asarray(met, np.int32), count, random, kind).tolist()


@settings(max_examples=200)
@given(
    positive=st.integers(0, 59),
    met=st.lists(st.integers(0, 59), max_size=80),
    count=st.integers(1, 99),
    kind=st.sampled_from(sorted(candidates.NEGATIVES)),
    seed=st.integers(0, 2**32 - 1),
)
def test_negatives_are_distinct_and_new_and_as_many_as_there_are(shop_corpus, positive, met, count, kind, seed):
    found = draw(shop_corpus, positive, met, count, kind, seed)
    outside = set(range(60)) - {positive, *met}
    assert len(found) == len(set(found)) == min(count, len(outside))
    assert set(found) <= outside
    assert found == draw(shop_corpus, positive, met, count, kind, seed)


def test_negatives_are_drawn_as_their_kind_says(beauty_corpus):
    popularity = beauty_corpus.training_popularity
    for kind, expected in (("uniform", popularity.mean()), ("popularity", (popularity**2).sum() / popularity.sum())):
        found = np.concatenate([draw(beauty_corpus, 0, [], 1, kind, seed) for seed in range(4000)])
        deviation = popularity[found].std() / len(found) ** 0.5
        assert abs(popularity[found].mean() - expected) < 4 * deviation
    texts = [beauty_corpus.item_text(item).categories[-1:] for item in range(beauty_corpus.num_items)]
    members = Counter(texts)
    item = next(item for item in range(beauty_corpus.num_items) if texts[item] and members[texts[item]] > 200)
    assert {texts[other] for other in draw(beauty_corpus, item, [], 20, "category")} == {texts[item]}


def test_a_small_category_is_filled_up_without_looking_at_all_items(beauty_corpus, monkeypatch):
    texts = [beauty_corpus.item_text(item).categories[-1:] for item in range(beauty_corpus.num_items)]
    members = Counter(texts)
    item = next(item for item in range(beauty_corpus.num_items) if texts[item] and members[texts[item]] == 4)

    def looked_at_all(*args):
        raise AssertionError("time for every item of the corpus")

    monkeypatch.setattr(np, "setdiff1d", looked_at_all)
    found = draw(beauty_corpus, item, [], 20, "category")
    assert len(set(found)) == 20
    assert sum(texts[other] == texts[item] for other in found) == 3
    assert found == draw(beauty_corpus, item, [], 20, "category")


def test_kinds_count_where_few_items_are_left(beauty_corpus):
    texts = [beauty_corpus.item_text(item).categories[-1:] for item in range(beauty_corpus.num_items)]
    category = next(text for text, members in Counter(texts).items() if text and 40 < members < 60)
    members = [item for item, text in enumerate(texts) if text == category]
    others = [item for item, text in enumerate(texts) if text != category][:20]
    met = sorted(set(range(beauty_corpus.num_items)) - {*members, *others})
    found = draw(beauty_corpus, members[0], met, 20, "category")
    assert {texts[item] for item in found} == {category}


def test_an_unknown_kind_is_an_input_error(shop_corpus):
    with pytest.raises(InputError, match=r"NEGATIVES is 'unifrom'.*Did you mean 'uniform'"):
        draw(shop_corpus, 0, [], 1, "unifrom")


def test_held_out_candidates_are_the_target_and_others_that_the_user_never_met(shop_corpus):
    lists = {}
    for split in ("validation", "test"):
        for user, target in zip(shop_corpus.evaluation_users, shop_corpus.targets(split), strict=True):
            found = candidates.held_out_candidates(shop_corpus, split, user, target, 15).tolist()
            assert len(found) == len(set(found)) == 16
            assert set(found) & set(shop_corpus.sequence(user).tolist()) == {target}
            lists[split, user] = found
    again = {key: candidates.held_out_candidates(shop_corpus, *key, lists[key][0], 15).tolist() for key in lists}
    assert all(set(again[key]) - {lists[key][0]} <= set(range(60)) for key in lists)
    assert len({tuple(sorted(found)) for found in lists.values()}) == len(lists)
    user, target = shop_corpus.evaluation_users[3], shop_corpus.targets("test")[3]
    first = candidates.held_out_candidates(shop_corpus, "test", user, target, 15)
    assert first.tolist() == lists["test", user]
    assert first.tolist() != candidates.held_out_candidates(shop_corpus, "test", user, target, 15, seed=1).tolist()


def test_the_target_stands_anywhere_among_its_candidates(beauty_corpus):
    targets = beauty_corpus.targets("test")
    places = Counter(
        candidates.held_out_candidates(beauty_corpus, "test", user, target).tolist().index(target)
        for user, target in zip(beauty_corpus.evaluation_users[:3000], targets[:3000], strict=True)
    )
    assert len(places) == 100
    assert max(places.values()) < 30 + 5 * 30**0.5


# Neighbours.


def brute_force(parts, user, history) -> dict[int, float]:
    """Every other item's similarity to a history, from the definition, with all numbers of the other users alone.

    But for how similar an item must be to be one of another's NUM_KEPT nearest, which is of all users.
    """
    found: dict[int, float] = {}
    whole = [set(part) for part in parts]
    others = [part for owner, part in enumerate(whole) if owner != user]

    def similarities(item, users) -> dict[int, float]:
        beside = Counter(other for part in users if item in part for other in part if other != item)
        return {other: both / sum(other in part for part in users) ** 0.5 for other, both in beside.items()}

    for item in history:
        of_all = similarities(item, whole)
        nearest = sorted(of_all, key=lambda other: (-of_all[other], other))
        least = of_all[nearest[NUM_KEPT - 1]] if len(nearest) > NUM_KEPT else 0.0
        popularity = sum(item in part for part in others)
        for other, similarity in similarities(item, others).items():
            if other not in history and other in nearest[:NUM_KEPT] and similarity >= least:
                found[other] = found.get(other, 0.0) + similarity / popularity**0.5
    return found


@settings(max_examples=60)
@given(user=st.integers(0, 49), length=st.integers(1, 12), count=st.integers(1, 6), other=st.booleans())
def test_neighbours_are_those_of_brute_force(shop_corpus, user, length, count, other):
    assert shop_corpus.num_items - 1 > NUM_KEPT
    assert (co_occurrence(shop_corpus).least > 0).any()  # some lists are cut
    parts = [shop_corpus.training_sequence(owner).tolist() for owner in range(shop_corpus.num_users)]
    history = np.unique(shop_corpus.sequence(user)[:length])
    user = -1 if other else user
    found = neighbours_of(shop_corpus, history, count, user).tolist()
    expected = brute_force(parts, user, set(history.tolist()))
    assert not set(found) & set(history.tolist())
    assert len(found) == min(count, len(expected))
    best = sorted(expected.values(), reverse=True)[:count]
    assert [expected[item] for item in found] == pytest.approx(best)


def test_a_user_changes_nothing_of_which_neighbours_count(tmp_path):
    """An item is among the nearest because of the user alone: with the count of others it is none."""
    rows, time = [], iter(range(10**6))
    for n in range(NUM_KEPT):  # p stands beside each of these twice
        rows += [(f"user{n}{again}", item, next(time)) for again in "ab" for item in ("p", f"near{n}", "x", "y")]
    for owner in ("first", "second"):
        rows += [(owner, item, next(time)) for item in ("p", "next", "x", "y")]
    rows += [("third", item, next(time)) for item in ("q", "next", "x", "y")]
    rows += [("own", item, next(time)) for item in ("p", "next", "next", "x", "y")]
    corpus = prepared("tables", write_tables(tmp_path / "raw", rows), tmp_path, "cut")
    number = {corpus.item_source_id(item): item for item in range(corpus.num_items)}
    user = next(user for user in range(corpus.num_users) if corpus.user_source_id(user) == "own")
    history = np.asarray([number["p"]])
    assert number["next"] in neighbours_of(corpus, history, 1000)
    assert number["next"] not in neighbours_of(corpus, history, 1000, user)


def test_the_next_item_of_the_user_alone_is_no_neighbour(tmp_path):
    rows = [("a", item, time) for time, item in enumerate("pqrsxy")] + [
        ("b", item, time) for time, item in enumerate("pqtuvw")
    ]
    corpus = prepared("tables", write_tables(tmp_path / "raw", rows), tmp_path, "pair")
    number = {corpus.item_source_id(item): item for item in range(corpus.num_items)}
    user = next(user for user in range(2) if corpus.user_source_id(user) == "a")
    names = {item: name for name, item in number.items()}
    history = np.asarray([number["p"], number["q"]])
    # Only user a has r and s beside p and q: for that user they are no neighbours, for others they are.
    assert {names[item] for item in neighbours_of(corpus, history, 9, user)} == {"t", "u"}
    assert {names[item] for item in neighbours_of(corpus, history, 9)} == {"r", "s", "t", "u"}
    held_out = {number[name] for name in "xyvw"}
    assert not held_out & set(co_occurrence(corpus).items.ravel().tolist())

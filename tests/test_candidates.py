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


def brute_force(sequences, history, count, own) -> list[tuple[int, float]]:
    """Every other item's similarity to the history, from the definition; the user's own part is left out of counts."""
    popularity = Counter(item for part in sequences for item in set(part))
    found = {}
    for other in popularity:
        if other in history:
            continue
        score = 0.0
        for item in history:
            both = sum(item in part and other in part for part in sequences) - (item in own and other in own)
            score += both / (popularity[item] * popularity[other]) ** 0.5 if popularity[item] else 0.0
        if score > 1e-9:
            found[other] = score
    return sorted(found.items(), key=lambda pair: (-pair[1], pair[0]))[:count]


@settings(max_examples=60)
@given(user=st.integers(0, 49), length=st.integers(1, 12), count=st.integers(1, 6), other=st.booleans())
def test_neighbours_are_those_of_brute_force(shop_corpus, user, length, count, other):
    assert shop_corpus.num_items - 1 > NUM_KEPT  # some lists are cut, and cosine ranks them
    parts = [shop_corpus.training_sequence(owner).tolist() for owner in range(shop_corpus.num_users)]
    history = shop_corpus.sequence(user)[:length]
    own = [] if other else parts[user]
    found = neighbours_of(shop_corpus, history, count, -1 if other else user).tolist()
    expected = brute_force(parts, set(history.tolist()), 60, set(own))
    scores = dict(expected)
    # Only the 50 best of each item are known, so the last places may differ where the catalogue is that small.
    assert not set(found) & set(history.tolist())
    assert all(item in scores for item in found)
    if length <= 2:
        assert [scores[item] for item in found[:3]] == pytest.approx([score for _, score in expected[: min(3, count)]])


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

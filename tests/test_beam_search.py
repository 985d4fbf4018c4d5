"""Constrained beam search against exhaustive likelihoods and a beam search in plain Python."""

import gzip
import itertools
import json
import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from recalign_jax.corpus.catalog import EOS_ID
from recalign_jax.decoding.beam_search import beam_search
from recalign_jax.decoding.scoring import SCORES, Decoder, log_normalizer
from recalign_jax.decoding.trie import build_trie
from tests.reference_scores import sequence_scores
from tests.shared_data import shared
from tests.test_trie import VOCAB, build, pad, padded, random_catalogue, seeds

BATCH, WIDTH, MAX_LENGTH, ITEMS = 6, 6, 8, 40


def toy_model(seed, vocab=VOCAB):
    """Weights of a random decoder whose logits depend on the user, the position and every token so far, in order."""
    rng = np.random.default_rng(seed)
    return {
        "embed": rng.normal(size=(vocab, WIDTH)),
        "recur": rng.normal(size=(2, WIDTH, WIDTH)) / 2,
        "position": rng.normal(size=(MAX_LENGTH, WIDTH)),
        "attend": rng.normal(size=(MAX_LENGTH, MAX_LENGTH)),
        "output": rng.normal(size=(WIDTH, vocab)),
        "user": rng.normal(size=(BATCH, 1, WIDTH)),
    }


def decoder_of(step):
    """A decoder whose hidden state is its logits, from a step of one token."""

    def steps(tokens, position, cache):
        hidden = []
        for number in range(tokens.shape[2]):
            logits, cache = step(tokens[:, :, number], position + number, cache)
            hidden.append(logits)
        return jnp.stack(hidden, axis=2), cache

    return Decoder(steps, lambda hidden: hidden, lambda hidden, tokens: jnp.take_along_axis(hidden, tokens, axis=-1))


def toy_step(w, tokens, position, cache):
    """The decoder in JAX. Its recurrent state and its history are the cache: another beam's gives wrong scores."""
    new = w["embed"][tokens] + w["position"][position] + w["user"]  # [B, k, D]
    lower = jnp.tanh(cache["state"][0] @ w["recur"][0] + new)
    upper = jnp.tanh(cache["state"][1] @ w["recur"][1] + lower)
    history = cache["history"].at[0, :, :, position].set(new)
    attended = jnp.einsum("bktd,t->bkd", history[0], w["attend"][position])
    return (upper + attended) @ w["output"], {"state": jnp.stack([lower, upper]), "history": history}


def toy_log_probs(w, user, prefix):
    """The decoder in numpy, for one user and one prefix: log-probabilities of the next token, [V] float64."""
    state, history = np.zeros((2, WIDTH)), np.zeros((MAX_LENGTH, WIDTH))
    for position, token in enumerate([0, *prefix]):
        history[position] = w["embed"][token] + w["position"][position] + w["user"][user, 0]
        state[0] = np.tanh(state[0] @ w["recur"][0] + history[position])
        state[1] = np.tanh(state[1] @ w["recur"][1] + state[0])
        logits = (state[1] + w["attend"][position] @ history) @ w["output"]
    return logits - np.log(np.sum(np.exp(logits)))


def following(sequences):
    """{prefix: the tokens that go on to an item, end-of-sequence among them}."""
    found = {}
    for sequence in sequences:
        for position, token in enumerate([*sequence, EOS_ID]):
            found.setdefault(tuple(sequence[:position]), set()).add(token)
    return {prefix: sorted(tokens) for prefix, tokens in found.items()}


def exhaustive_scores(weights, sequences, length_penalty=0.0, scores="vocabulary"):
    """Scores of all items for every user, [B, I], from one full likelihood an item."""
    values, after = np.zeros((BATCH, len(sequences))), following(sequences)
    for user in range(BATCH):
        known = {}
        for item, sequence in enumerate(sequences):
            for position, token in enumerate([*sequence, EOS_ID]):
                prefix = tuple(sequence[:position])
                if prefix not in known:
                    log_probs = toy_log_probs(weights, user, prefix)
                    if scores == "trie":
                        log_probs -= np.log(np.exp(log_probs[after[prefix]]).sum())
                    known[prefix] = log_probs
                values[user, item] += known[prefix][token]
            values[user, item] /= (len(sequence) + 1) ** length_penalty
    return values


# Compiling is nearly all that these tests do, so it may be the quick way; the real titles are compiled as usual.
@partial(
    jax.jit,
    static_argnames=("num_beams", "top_k", "length_penalty", "scores"),
    compiler_options={"xla_backend_optimization_level": 0},
)
def search_toy(weights, trie, excluded_items, allowed_items, num_beams, top_k, length_penalty, scores):
    users = len(weights["user"])
    cache = {"state": jnp.zeros((2, users, 1, WIDTH)), "history": jnp.zeros((1, users, 1, MAX_LENGTH, WIDTH))}
    return beam_search(
        decoder_of(partial(toy_step, weights)),
        cache,
        trie,
        num_beams=num_beams,
        top_k=top_k,
        excluded_items=excluded_items,
        allowed_items=allowed_items,
        length_penalty=length_penalty,
        scores=scores,
    )


def search(weights, trie, *, num_beams, top_k, excluded_items=None, allowed_items=None, **options):
    weights = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), weights)
    options = {"length_penalty": 0.0, "scores": "vocabulary"} | options
    return map(np.asarray, search_toy(weights, trie, excluded_items, allowed_items, num_beams, top_k, **options))


def reference_search(case, user, num_beams, top_k, scores):
    """Beam search in plain Python over the items that may be returned; returns items, or None at a tie.

    With scores over the trie a prefix that one sequence of the catalogue alone follows is finished.
    """
    sequences, popularity, leaves = case["sequences"], case["popularity"], {}
    after = following(sequences)
    allowed = set(case["allowed"][user]) if "allowed" in case else set(range(ITEMS))
    for item in sorted(allowed - set(case["excluded"][user]), key=lambda i: (-popularity[i], i)):
        leaves.setdefault(tuple(sequences[item]), []).append(item)
    beams, finished = [((), 0.0)], []
    while beams:
        children = []
        for prefix, score in beams:
            log_probs = toy_log_probs(case["weights"], user, prefix)
            if scores == "trie":
                log_probs -= np.log(np.exp(log_probs[after[prefix]]).sum())
            if prefix in leaves:
                finished.append((score + log_probs[EOS_ID], leaves[prefix]))
            tokens = {s[len(prefix)] for s in leaves if len(s) > len(prefix) and s[: len(prefix)] == prefix}
            for token in tokens:
                child, score_of_child = (*prefix, token), score + log_probs[token]
                below = {tuple(s) for s in sequences if tuple(s[: len(child)]) == child}
                if scores == "trie" and len(below) == 1:
                    finished.append((score_of_child, leaves[below.pop()]))
                else:
                    children.append((child, score_of_child))
        children.sort(key=lambda child: -child[1])
        if len(children) > num_beams and children[num_beams - 1][1] - children[num_beams][1] < 1e-4:
            return None
        beams = children[:num_beams]
    finished.sort(key=lambda leaf: -leaf[0])
    if any(a[0] - b[0] < 1e-4 for a, b in itertools.pairwise(finished)):
        return None
    return [item for _, items in finished for item in items][:top_k]


def check(items, scores, expected_scores, excluded, top_k):
    """What holds for every result: catalogue items, distinct, not excluded, scored exactly, best first."""
    for user in range(len(items)):
        found = items[user][items[user] >= 0]
        assert (items[user][len(found) :] == -1).all()
        assert (scores[user][len(found) :] == -np.inf).all()
        assert len(set(found)) == len(found) <= top_k
        assert (found < expected_scores.shape[1]).all()
        assert not set(found) & set(excluded[user])
        np.testing.assert_allclose(scores[user][: len(found)], expected_scores[user][found], atol=1e-5, rtol=1e-5)
        assert (np.diff(scores[user][: len(found)]) <= 0).all()


def as_excluded(excluded, width):
    return np.array([[*items, *[-1] * (width - len(items))] for items in excluded], np.int32)


def random_case(seed):
    """A catalogue, a model, and exclusions from none to everything, with duplicates."""
    rng = np.random.default_rng(seed)
    sequences, popularity = random_catalogue(rng, ITEMS)
    return {
        "sequences": sequences, "popularity": popularity, "excluded": random_lists(rng), "weights": toy_model(seed)
    }  # fmt: skip


def random_lists(rng):
    """A list of items a user: of any length with duplicates, none, all but one, all."""
    some = [rng.integers(0, ITEMS, rng.integers(0, ITEMS + 1)).tolist() for _ in range(BATCH - 3)]
    return [*some, [], rng.permutation(ITEMS)[1:].tolist(), rng.permutation(ITEMS).tolist()]


def search_case(case, **options):
    """Searches with shapes and bounds that all cases share, so that they share a compiled program as well."""
    trie = build(case["sequences"], case["popularity"])
    trie = padded(trie, ITEMS * MAX_LENGTH, root_branch=VOCAB, max_branch=VOCAB, max_depth=MAX_LENGTH)
    allowed = as_excluded(case["allowed"], ITEMS) if "allowed" in case else None
    return search(
        case["weights"], trie, excluded_items=as_excluded(case["excluded"], ITEMS), allowed_items=allowed, **options
    )


@settings(max_examples=80, deadline=None)
@given(seeds, st.sampled_from([("vocabulary", 1, 3, False), ("vocabulary", 4, 12, True), ("trie", 4, 12, False)]))
def test_equals_a_beam_search_in_python(seed, options):
    case, (scored, num_beams, top_k, with_allowed) = random_case(seed), options
    if with_allowed:
        case["allowed"] = random_lists(np.random.default_rng(seed + 1))
    items, scores = search_case(case, num_beams=num_beams, top_k=top_k, scores=scored)
    expected = exhaustive_scores(case["weights"], case["sequences"], scores=scored)
    check(items, scores, expected, case["excluded"], top_k)
    for user in range(BATCH):
        expected = reference_search(case, user, num_beams, top_k, scored)
        if expected is not None:
            assert items[user][items[user] >= 0].tolist() == expected


@settings(max_examples=50, deadline=None)
@given(seeds, st.sampled_from([("vocabulary", False), ("trie", True)]))
def test_enough_beams_rank_exhaustively(seed, options):
    case, (scored, with_allowed) = random_case(seed), options
    if with_allowed:
        case["allowed"] = random_lists(np.random.default_rng(seed + 1))
    sequences, popularity = case["sequences"], case["popularity"]
    options = {"length_penalty": 0.6, "scores": scored}
    items, scores = search_case(case, num_beams=ITEMS, top_k=ITEMS, **options)
    check(items, scores, exhaustive_scores(case["weights"], sequences, **options), case["excluded"], ITEMS)
    for user in range(BATCH):
        found = items[user][items[user] >= 0].tolist()
        allowed = set(case["allowed"][user]) if with_allowed else set(range(ITEMS))
        assert set(found) == allowed - set(case["excluded"][user])
        for before, after in itertools.pairwise(found):
            if sequences[before] == sequences[after]:
                assert (-popularity[before], before) < (-popularity[after], after)


def test_a_list_of_exclusions_without_padding_closes_only_what_it_fills():
    """The first and the last item below a node are excluded, the ones between are not."""
    sequences = [[2, token] for token in range(2, 8)]
    excluded = [[0, 5]] * BATCH
    items, _ = search(toy_model(0), build(sequences), num_beams=6, top_k=6, excluded_items=as_excluded(excluded, 2))
    assert [sorted(found) for found in items.tolist()] == [[-1, -1, 1, 2, 3, 4]] * BATCH


def test_a_title_that_begins_another_and_collisions():
    sequences = [[2, 3, 4], [2, 3], [2, 3], [5], [2, 3, 4, 6], [2, 3]]
    popularity = [1, 1, 9, 1, 1, 4]
    model = toy_model(0)
    items, scores = search(model, build(sequences, popularity), num_beams=6, top_k=8)
    check(items, scores, exhaustive_scores(model, sequences), [[]] * BATCH, 8)
    for found in items.tolist():
        assert sorted(found[:6]) == list(range(6))
        at = found.index(2)
        assert found[at : at + 3] == [2, 5, 1]


def test_exclusions_change_the_ranking_and_not_the_scores():
    rng = np.random.default_rng(1)
    sequences = rng.integers(2, VOCAB, (30, 3)).tolist()
    model, trie = toy_model(1), build(sequences)
    nothing = as_excluded([[]] * BATCH, 5)
    items, scores = search(model, trie, num_beams=30, top_k=30, excluded_items=nothing)
    fewer, fewer_scores = search(model, trie, num_beams=30, top_k=30, excluded_items=items[:, :5])
    assert fewer[:, :25].tolist() == items[:, 5:].tolist()
    np.testing.assert_array_equal(fewer_scores[:, :25], scores[:, 5:])


def test_excluded_branches_cost_no_beams():
    """One beam still finds the only item left, wherever it is, as all other branches are closed from the start."""
    sequences = [[a, b, c] for a in range(2, 6) for b in range(2, 6) for c in range(2, 6)]
    model, trie = toy_model(2), build(sequences)
    left = [0, 37, 63, 1, 21, 62]
    excluded = [[i for i in range(64) if i != item] for item in left]
    items, scores = search(model, trie, num_beams=1, top_k=2, excluded_items=as_excluded(excluded, 64))
    assert items.tolist() == [[item, -1] for item in left]
    check(items, scores, exhaustive_scores(model, sequences), excluded, 2)


def test_everything_excluded():
    sequences = [[2, 3], [2, 3], [4], [5, 6, 7]]
    excluded = [[0, 1, 2, 3], [3, 2, 1, 0]] * (BATCH // 2)
    items, scores = search(
        toy_model(3), build(sequences), num_beams=5, top_k=3, excluded_items=as_excluded(excluded, 64)
    )
    assert (items == -1).all()
    assert (scores == -np.inf).all()


def test_exclusion_lists_may_hold_duplicates_padding_and_unknown_items():
    sequences = [[2, 3], [2, 3], [4], [5, 6, 7]]
    model, trie = toy_model(3), build(sequences)
    excluded = np.array([[-1, 0, 0, -1, 99], [-1, -1, -1, -1, -1], [4, 2, 2, 3, 2]] * 2, np.int32)
    items, _ = search(model, trie, num_beams=5, top_k=4, excluded_items=excluded)
    assert [sorted(found) for found in items.tolist()] == [[-1, 1, 2, 3], [0, 1, 2, 3], [-1, -1, 0, 1]] * 2


def test_users_do_not_depend_on_each_other():
    """The loop goes on for the slowest user; the others' results are what they would be alone."""
    rng = np.random.default_rng(4)
    sequences = [rng.integers(2, VOCAB, rng.integers(1, 7)).tolist() for _ in range(60)]
    model, trie = toy_model(4), build(sequences)
    items, scores = search(model, trie, num_beams=4, top_k=3)
    for user in range(BATCH):
        alone = {**model, "user": model["user"][user : user + 1]}
        alone_items, alone_scores = search(alone, trie, num_beams=4, top_k=3)
        assert alone_items[0].tolist() == items[user].tolist()
        np.testing.assert_allclose(alone_scores[0], scores[user], atol=1e-5)


@pytest.mark.parametrize("scored", SCORES)
def test_nan_of_one_user_is_told_and_changes_no_other(scored):
    """Also of a user who may get nothing; one of a finite model who may get nothing is no error."""
    rng = np.random.default_rng(6)
    trie = build([rng.integers(2, VOCAB, rng.integers(1, 7)).tolist() for _ in range(60)])
    allowed = np.tile(np.arange(60, dtype=np.int32), (BATCH, 1))
    allowed[[1, 2]] = -1
    options = {"num_beams": 4, "top_k": 3, "scores": scored, "allowed_items": allowed}
    model = toy_model(6)
    items, scores = search(model, trie, **options)
    assert not np.isnan(scores).any()
    assert (items[[1, 2]] == -1).all()
    broken = {**model, "user": model["user"].copy()}
    broken["user"][[0, 2], 0, 3] = np.nan
    found_items, found_scores = search(broken, trie, **options)
    assert np.isnan(found_scores[[0, 2]]).all()
    assert (found_items[[0, 2]] == -1).all()
    np.testing.assert_array_equal(found_items[[1, 3, 4, 5]], items[[1, 3, 4, 5]])
    np.testing.assert_array_equal(found_scores[[1, 3, 4, 5]], scores[[1, 3, 4, 5]])


@pytest.mark.parametrize("sign", [1, -1])  # an accelerator's NaN, and that of x86
@pytest.mark.parametrize(
    ("scored", "sequences"),
    [
        ("vocabulary", [[2, 3, 4, 5], [2, 3, 4, 6], [7]]),
        ("vocabulary", [[2, 3, 4, 5], [7]]),  # one sequence alone is followed
        ("trie", [[2, 3, 4, 5], [2, 3, 4, 6], [7]]),
    ],
)
def test_nan_that_comes_late_in_the_search_is_told(scored, sequences, sign):
    model = toy_model(7)
    model["position"][3] = np.copysign(np.nan, sign)
    items, scores = search(model, build(sequences), num_beams=4, top_k=4, scores=scored)
    assert np.isnan(scores).all()
    assert (items == -1).all()


@pytest.mark.devices8
@pytest.mark.parametrize("scored", SCORES)
def test_users_on_eight_devices(scored):
    """The results of one device, and no device sees another's caches."""
    rng = np.random.default_rng(5)
    sequences = [rng.integers(2, VOCAB, rng.integers(1, 7)).tolist() for _ in range(60)]
    model = {**toy_model(5), "user": rng.normal(size=(8, 1, WIDTH))}
    trie, excluded = build(sequences), rng.integers(0, 60, (8, 9)).astype(np.int32)
    options = {"num_beams": 4, "top_k": 3, "length_penalty": 0.0, "scores": scored}
    items, scores = search(model, trie, excluded_items=excluded, **options)

    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    everywhere, by_user = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("data",)))
    weights = {
        name: jax.device_put(jnp.asarray(leaf, jnp.float32), by_user if name == "user" else everywhere)
        for name, leaf in model.items()
    }
    arguments = weights, jax.device_put(trie, everywhere), jax.device_put(excluded, by_user), None
    compiled = search_toy.lower(*arguments, **options).compile()
    result = compiled(*arguments)
    assert result.items.tolist() == items.tolist()
    np.testing.assert_allclose(result.scores, scores, atol=1e-5)
    exchanged = re.findall(r"= \w+\[([\d,]*)\]\S* (?:all-|collective-)", compiled.as_text())
    assert exchanged  # whether to stop, at least
    assert all(len(shape.split(",")) <= 2 for shape in exchanged)  # caches have more axes


def counted_steps(trie, logits, num_beams, top_k, scores="vocabulary"):
    """Runs a search whose logits [V] are always the same; returns the shape of the tokens of every decoder call."""
    shapes = []

    def step(tokens, position, cache):
        jax.debug.callback(lambda p, t: shapes.append((int(p), t.shape)), position, tokens, ordered=True)
        return jnp.broadcast_to(logits, (*tokens.shape, VOCAB)), cache

    decoder, cache = decoder_of(None)._replace(step=step), jnp.zeros((1, 2, 1))
    search = jax.jit(lambda: beam_search(decoder, cache, trie, num_beams=num_beams, top_k=top_k, scores=scores))
    jax.block_until_ready(search())
    jax.effects_barrier()
    return shapes


def test_one_token_items_take_two_steps_the_first_with_one_beam():
    trie = build([[token] for token in range(2, VOCAB)])
    shapes = counted_steps(trie, jnp.zeros(VOCAB), num_beams=3, top_k=3)
    assert shapes == [(0, (2, 1, 1)), (1, (2, 3, 1))]
    assert counted_steps(trie, jnp.zeros(VOCAB), num_beams=3, top_k=3, scores="trie") == shapes[:1]


def test_what_is_certain_is_decoded_in_few_calls():
    """Two items with eleven tokens after the one that tells them apart; their end makes it twelve."""
    trie = build([[2, 2, *[3] * 11], [2, 4, *[5] * 11]])
    shapes = counted_steps(trie, jnp.zeros(VOCAB), num_beams=2, top_k=2)
    assert shapes == [(0, (2, 1, 1)), (1, (2, 2, 1)), (2, (2, 2, 4)), (6, (2, 2, 4)), (10, (2, 2, 4))]
    assert counted_steps(trie, jnp.zeros(VOCAB), num_beams=2, top_k=2, scores="trie") == shapes[:2]


def test_stops_when_no_beam_can_win():
    """The short item has probability one half; all that is left of the long one is less."""
    trie = build([[2], [3] * 11])
    likely = jnp.log(jnp.array([0, 0.7, 0.7, 0.1, *[0.0] * (VOCAB - 4)]))
    assert len(counted_steps(trie, likely, 2, top_k=1)) == 2
    assert len(counted_steps(trie, likely, 2, top_k=2)) == 4
    # The same with something to choose on the way.
    trie = build([[2], [3] * 6, [3, 3, 3, 3, 2]])
    assert len(counted_steps(trie, likely, 2, top_k=1, scores="trie")) == 1
    assert len(counted_steps(trie, likely, 2, top_k=3, scores="trie")) == 5


def test_goes_on_for_a_long_item_that_wins_by_its_mean():
    trie = build([[2], [3] * 6])
    likely = jnp.log(jnp.array([0, 0.3, 0.1, 0.6, *[0.0] * (VOCAB - 4)]))

    def step(tokens, position, cache):
        return jnp.broadcast_to(likely, (*tokens.shape, VOCAB)), cache

    for length_penalty, best, score in ((0.0, 0, math.log(0.03)), (1.0, 1, math.log(0.6**6 * 0.3) / 7)):
        options = {"num_beams": 2, "top_k": 1, "length_penalty": length_penalty}
        result = jax.jit(partial(beam_search, decoder_of(step), **options))(jnp.zeros((1, 1, 1)), trie)
        assert result.items.tolist() == [[best]]
        assert result.scores.item() == pytest.approx(score, abs=1e-6)


def test_impossible_items_are_not_returned():
    """A token with logit -inf (a padding row of the vocabulary) leads nowhere."""
    logits = jnp.where(jnp.arange(VOCAB) == 3, -jnp.inf, 0.0)

    def step(tokens, position, cache):
        return jnp.broadcast_to(logits, (*tokens.shape, VOCAB)), cache

    trie = build([[2], [3], [4, 3]])
    result = jax.jit(lambda: beam_search(decoder_of(step), jnp.zeros((1, 1, 1)), trie, num_beams=3, top_k=3))()
    assert result.items.tolist() == [[0, -1, -1]]
    assert result.scores.tolist() == [[pytest.approx(-2 * math.log(VOCAB - 1), abs=1e-6), -math.inf, -math.inf]]


def test_bad_options():
    trie = build([[2], [3]])

    def step(tokens, position, cache):
        return jnp.zeros((*tokens.shape, VOCAB - 1)), cache

    with pytest.raises(ValueError, match=f"logits over {VOCAB - 1} tokens for a trie over {VOCAB}"):
        beam_search(decoder_of(step), jnp.zeros((1, 1, 1)), trie, num_beams=2, top_k=2)
    with pytest.raises(ValueError, match="negative"):
        beam_search(decoder_of(step), jnp.zeros((1, 1, 1)), trie, num_beams=2, top_k=2, length_penalty=-1)


def test_real_titles():
    """Beauty's titles, a random model, histories excluded: catalogue items, distinct, allowed, scored exactly."""
    sentencepiece = pytest.importorskip("sentencepiece")
    titles = shared("data/amazon_beauty/items.jsonl.gz")
    vocabulary = sentencepiece.SentencePieceProcessor(model_file=str(shared("data/t5_vocabulary/spiece.model")))
    with gzip.open(titles) as lines:
        texts = [json.loads(line).get("title") or "unknown" for line in lines]
    sequences = [tokens[:47] for tokens in vocabulary.encode(texts)]
    users, num_beams, top_k, vocab = 3, 5, 5, 32128
    trie = build_trie(*pad(sequences), np.zeros(len(sequences)), vocab)
    rng = np.random.default_rng(0)
    table = jnp.asarray(rng.normal(size=(101, vocab)) * 2, jnp.float32)

    def state(tokens, position):  # of a Markov model; works on rows of tokens [B, ...]
        return (tokens * 31 + position * 17 + np.arange(users).reshape(-1, *[1] * (tokens.ndim - 1))) % 101

    @jax.jit
    def run(table, trie, excluded_items):
        def step(tokens, position, cache):
            return table[state(tokens, position)], cache

        cache = jnp.zeros((1, users, 1))
        return beam_search(
            decoder_of(step), cache, trie, num_beams=num_beams, top_k=top_k, excluded_items=excluded_items
        )

    excluded = np.full((users, 50), -1, np.int32)
    for _ in range(2):  # the second time without the best of the first
        items, scores = map(np.asarray, run(table, trie, excluded))
        assert (items >= 0).all()
        for user in range(users):
            assert len(set(items[user])) == top_k
            assert not set(items[user]) & set(excluded[user])
        targets = pad([sequences[i] for i in items.ravel()])[0].reshape(users, top_k, -1)
        inputs = np.pad(targets, ((0, 0), (0, 0), (1, 0)))[..., :-1]
        for user in range(users):
            logits = table[state(inputs, np.arange(inputs.shape[-1]))[user]]
            np.testing.assert_allclose(sequence_scores(logits, targets[user]), scores[user], atol=1e-4, rtol=1e-5)
        excluded = np.concatenate([items, excluded], axis=1)[:, :50]


@pytest.mark.parametrize("vocab", [1000, 32_768, 40_000, 40_064])
def test_log_normalizer(vocab):
    logits = np.random.default_rng(0).normal(size=(2, 3, vocab)) * 5
    logits[..., -200:] = -np.inf
    expected = np.log(np.exp(logits).sum(-1))
    np.testing.assert_allclose(log_normalizer(jnp.asarray(logits, jnp.float32)), expected, rtol=1e-6)

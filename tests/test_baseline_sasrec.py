"""SASRec: losses against plain formulas, the encoder against torch, packed rows against single users."""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from recalign_jax.baselines import losses, sasrec, sequences
from recalign_jax.baselines.fit import Run
from recalign_jax.baselines.sasrec import Sasrec, SasrecOptions
from recalign_jax.baselines.scores import recommender
from recalign_jax.checkpoint import locations, saved
from recalign_jax.errors import InputError
from seqio_tasks import examples
from seqio_tasks.examples import Query
from tests.corpora import corpus_in_memory, prepared, write_tables

pytestmark = pytest.mark.usefixtures("fast_compilation")

SMALL = SasrecOptions(
    width=8, heads=2, layers=2, dropout=0.3, length=6, rows=4, learning_rate=0.01, epochs=4, eval_period=1
)


# Losses.


def places(count: int, num_items: int = 37, width: int = 5):
    random = np.random.default_rng(count)
    draw = lambda *shape: jnp.asarray(random.normal(size=shape), jnp.float32)  # noqa: E731
    weights = jnp.asarray(random.integers(0, 3, count), jnp.float32)
    return draw(count, width), draw(num_items, width), jnp.asarray(random.integers(0, num_items, count)), weights


@pytest.mark.parametrize("count", [1, 7, 128, 300])
def test_full_softmax_and_its_gradients_are_those_of_the_formula(count):
    hidden, vectors, targets, weights = places(count)

    def formula(hidden, vectors):
        log_probabilities = jax.nn.log_softmax(hidden @ vectors.T)
        return -jnp.sum(weights * jnp.take_along_axis(log_probabilities, targets[:, None], axis=1)[:, 0])

    loss, gradients = jax.value_and_grad(lambda h, v: 3 * losses.full_softmax(h, v, targets, weights), argnums=(0, 1))(
        hidden, vectors
    )
    expected, expected_gradients = jax.value_and_grad(lambda h, v: 3 * formula(h, v), argnums=(0, 1))(hidden, vectors)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    for found, right in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(found, right, rtol=1e-4, atol=1e-5)


def test_sampled_softmax_is_that_of_the_formula():
    hidden, vectors, targets, weights = places(9)
    negatives = np.asarray([3, 3, 8, int(targets[0]), 20])
    total = 0.0
    for place in range(9):
        scores = np.asarray(vectors) @ np.asarray(hidden[place])
        others = sum(37 / 5 * np.exp(scores[n]) for n in negatives if n != targets[place])
        own = np.exp(scores[targets[place]])
        total -= float(weights[place]) * np.log(own / (own + others))
    assert losses.sampled_softmax(hidden, vectors, targets, weights, jnp.asarray(negatives)) == pytest.approx(
        total, rel=1e-5
    )


def test_all_items_sampled_once_make_the_full_softmax():
    hidden, vectors, targets, weights = places(9)
    # I draws of I items: each stands for itself, the correction is log(1); the target's own draw doesn't count.
    sampled = losses.sampled_softmax(hidden, vectors, targets, weights, jnp.arange(37))
    np.testing.assert_allclose(sampled, losses.full_softmax(hidden, vectors, targets, weights), rtol=1e-5)


def test_binary_cross_entropy_is_that_of_the_formula():
    hidden, vectors, targets, weights = places(9)
    negatives = jnp.arange(9)
    total = 0.0
    for place in range(9):
        scores = np.asarray(vectors) @ np.asarray(hidden[place])
        right, wrong = scores[targets[place]], scores[negatives[place]]
        total -= float(weights[place]) * (np.log(1 / (1 + np.exp(-right))) + np.log(1 - 1 / (1 + np.exp(-wrong))))
    found = losses.binary_cross_entropy(hidden, vectors, targets, weights, negatives)
    np.testing.assert_allclose(found, total, rtol=1e-5)


# Packed rows.


def pairs_in(batch: dict[str, np.ndarray]):
    """Every place as (history within its piece, target)."""
    for items, targets, segments in zip(batch["items"], batch["targets"], batch["segments"], strict=True):
        for segment in range(1, segments.max(initial=0) + 1):
            here = np.flatnonzero(segments == segment)
            assert (np.diff(here) == 1).all()
            for last in here:
                yield (*items[here[0] : last + 1].tolist(), int(targets[last]))


@settings(max_examples=20, deadline=None)
@given(length=st.integers(2, 9), rows=st.integers(1, 5), seed=st.integers(0, 99))
def test_every_pair_stands_once_with_what_came_before_it(shop_corpus, length, rows, seed):
    found = []
    for batch in sequences.batches(shop_corpus, length, rows, np.random.default_rng(seed)):
        assert {array.shape for array in batch.values()} == {(rows, length)}
        assert (batch["items"][batch["segments"] == 0] == -1).all()
        assert (batch["targets"][batch["segments"] == 0] == -1).all()
        found += pairs_in(batch)
    expected = [
        examples.next_item(shop_corpus, "train", n) for n in range(examples.num_next_items(shop_corpus, "train"))
    ]
    assert sorted(pair[-2:] for pair in found) == sorted((int(q.history[-1]), q.target) for q in expected)
    whole = {(*query.history.tolist(), query.target) for query in expected}
    for *history, target in found:
        assert any(prefix[-len(history) - 1 :] == (*history, target) for prefix in whole)
    if length >= shop_corpus.training_lengths.max() - 1:
        assert set(found) == whole


# The encoder.


@pytest.fixture(scope="module")
def model():
    model = Sasrec(30, dataclasses.replace(SMALL, length=12), nnx.Rngs(0))
    random = np.random.default_rng(0)
    graphdef, params = nnx.split(model)
    noise = jax.tree.map(lambda leaf: leaf + jnp.asarray(random.normal(0, 0.3, leaf.shape), leaf.dtype), params)
    return nnx.merge(graphdef, noise)


def test_a_packed_row_is_its_users_by_themselves(model):
    histories = [[3, 1, 4], [1, 5, 9, 2, 6], [7, 3]]
    items, segments = np.full((1, 12), -1), np.zeros((1, 12), np.int32)
    items[0, :10] = np.concatenate(histories)
    segments[0, :10] = np.repeat([1, 2, 3], [3, 5, 2])
    packed = np.asarray(model(items, segments))[0]
    start = 0
    for history in histories:
        alone = np.asarray(model(np.asarray([history]), np.ones((1, len(history)), np.int32)))[0]
        np.testing.assert_allclose(packed[start : start + len(history)], alone, atol=1e-5)
        start += len(history)


def test_the_encoder_is_torchs(model):
    """torch's own pre-norm blocks with the same weights and a causal mask."""
    torch = pytest.importorskip("torch")
    gelu = functools.partial(torch.nn.functional.gelu, approximate="tanh")  # as jax.nn has it

    def tensor(leaf):
        return torch.from_numpy(np.array(leaf[...]))

    items = torch.tensor([[3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8]])
    x = tensor(model.items.embedding)[items] + tensor(model.places.embedding)[-6:]
    for block in model.blocks:
        layer = torch.nn.TransformerEncoderLayer(
            8, 2, dim_feedforward=block.inner.kernel.shape[1], dropout=0.0, activation=gelu, layer_norm_eps=1e-6,
            batch_first=True, norm_first=True,
        )  # fmt: skip
        attention = block.attention
        parts = [getattr(attention, name) for name in ("query", "key", "value")]
        state = {
            "self_attn.in_proj_weight": torch.cat([tensor(part.kernel).reshape(8, 8).T for part in parts]),
            "self_attn.in_proj_bias": torch.cat([tensor(part.bias).reshape(8) for part in parts]),
            "self_attn.out_proj.weight": tensor(attention.out.kernel).reshape(8, 8).T,
            "self_attn.out_proj.bias": tensor(attention.out.bias),
            "linear1.weight": tensor(block.inner.kernel).T,
            "linear1.bias": tensor(block.inner.bias),
            "linear2.weight": tensor(block.outer.kernel).T,
            "linear2.bias": tensor(block.outer.bias),
        }
        for number, norm in ((1, block.attention_norm), (2, block.mlp_norm)):
            state |= {f"norm{number}.weight": tensor(norm.scale), f"norm{number}.bias": tensor(norm.bias)}
        layer.load_state_dict(state)
        layer.eval()
        x = layer(x, src_mask=torch.nn.Transformer.generate_square_subsequent_mask(6))
    x = torch.nn.functional.layer_norm(x, (8,), tensor(model.norm.scale), tensor(model.norm.bias), 1e-6)
    found = model(items.numpy(), np.ones((2, 6), np.int32))
    np.testing.assert_allclose(found, x.detach().numpy(), atol=1e-4)


def test_negatives_that_the_user_has_are_found():
    batch = {
        "items": jnp.asarray([[1, 2, 7, 8, -1]]),
        "targets": jnp.asarray([[2, 3, 8, 9, -1]]),
        "segments": jnp.asarray([[1, 1, 2, 2, 0]]),
    }
    negatives = jnp.asarray([[3, 8, 9, 1, 5]])
    assert sasrec.met(negatives, batch).tolist() == [[True, False, True, False, False]]


# Training.


@pytest.fixture(scope="module")
def chains(tmp_path_factory):
    """Items in a circle; every user starts anywhere and takes the next one each time."""
    folder = tmp_path_factory.mktemp("chains")
    rows = [
        (f"u{user}", f"i{(start + step) % 40:02d}", step)
        for user in range(120)
        for start in [user * 7 % 40]
        for step in range(5 + user % 6)
    ]
    return prepared("tables", write_tables(folder / "raw", rows), folder / "data", "chains")


@pytest.mark.parametrize("loss", sasrec.LOSSES)
def test_learns_what_follows(chains, tmp_path, loss):
    options = dataclasses.replace(
        SMALL, width=16, epochs=60, dropout=0.1, rows=8, length=10, loss=loss, negatives=30, eval_period=20
    )
    scores = sasrec.make(chains, options, Run(str(tmp_path), 0, {}))
    queries = [examples.next_item(chains, "test", number) for number in range(len(chains.evaluation_users))]
    [(chosen, best, _)] = recommender(scores, chains.num_items, 2)(queries, [query.history for query in queries])
    assert np.mean([queries[number].target in row for number, row in zip(chosen, best, strict=True)]) > 0.9


def test_the_items_of_a_long_history_are_the_newest(chains, tmp_path):
    scores = sasrec.make(chains, dataclasses.replace(SMALL, epochs=1), Run(str(tmp_path), 0, {}))
    long = np.arange(11, dtype=np.int32)
    np.testing.assert_array_equal(scores([Query(-1, long, 0)]), scores([Query(-1, long[-6:], 0)]))
    empty = scores([Query(-1, long[:0], 0)])  # one score for every item all the same
    assert np.isfinite(np.asarray(empty)).all()


def hashes_of(model_dir: pathlib.Path) -> dict[str, str]:
    newest = locations.folder_of(str(model_dir), locations.steps(str(model_dir))[0])
    return saved.read_metadata(newest)["fingerprints"]


def test_held_out_items_are_not_looked_at(chains, tmp_path):
    items = chains.items.copy()
    held_out = ~chains.in_training
    items[held_out] = (items[held_out] + 17) % chains.num_items
    other = dataclasses.replace(chains, items=items)
    # The epoch is chosen on the validation split: with one epoch there is nothing to choose.
    once = dataclasses.replace(SMALL, epochs=1)
    for number, corpus in enumerate((chains, other)):
        sasrec.make(corpus, once, Run(str(tmp_path / str(number)), 0, {}))
    assert hashes_of(tmp_path / "0") == hashes_of(tmp_path / "1")


def test_a_corpus_without_a_next_item(tmp_path):
    corpus = corpus_in_memory([[0, 1, 2], [1], [2, 0, 1]], 3)  # one item each to train on
    with pytest.raises(InputError, match="small has no user with two items to train on"):
        sasrec.make(corpus, SMALL, Run(str(tmp_path), 0, {}))


def test_a_corpus_without_an_item_to_tell_a_target_from(tmp_path):
    corpus = corpus_in_memory([[0, 1, 2, 0, 1], [2, 1, 0, 2, 0]], 3)
    with pytest.raises(InputError, match="nothing to train on"):
        sasrec.make(corpus, dataclasses.replace(SMALL, loss="bce"), Run(str(tmp_path), 0, {}))


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"loss": "full_softmx"}, "SasrecOptions.loss is 'full_softmx'.*Did you mean 'full_softmax'"),
        ({"width": 9}, "SasrecOptions.width 9 is no multiple of 2 heads"),
        ({"epochs": 0}, "SasrecOptions.epochs is 0"),
        ({"rows": 0}, "SasrecOptions.rows is 0"),
        ({"dropout": 1.0}, "SasrecOptions.dropout is 1.0"),
    ],
)
def test_wrong_options(values, text):
    with pytest.raises(InputError, match=text):
        dataclasses.replace(SMALL, **values)

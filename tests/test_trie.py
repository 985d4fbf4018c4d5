"""The catalogue trie against a trie of Python dictionaries."""

import dataclasses

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recalign_jax.corpus.catalog import EOS_ID
from recalign_jax.decoding import trie_file
from recalign_jax.decoding.trie import Trie, build_trie
from recalign_jax.errors import InputError

VOCAB = 9


def pad(sequences):
    """Lists of tokens without end-of-sequence -> tokens [I, T], lengths [I]."""
    lengths = np.array([len(s) + 1 for s in sequences])
    tokens = np.zeros((len(sequences), lengths.max()), np.int32)
    for row, sequence in zip(tokens, sequences, strict=True):
        row[: len(sequence) + 1] = [*sequence, EOS_ID]
    return tokens, lengths


def build(sequences, popularity=None, vocab_size=VOCAB):
    return build_trie(*pad(sequences), np.zeros(len(sequences)) if popularity is None else popularity, vocab_size)


def walk(trie: Trie):
    """Yields (prefix, node, one past the last rank at or below the node), from the arrays alone."""
    host = jax.tree.map(np.asarray, trie)
    queue = [((), 0, len(host.item_of_rank))]
    for prefix, node, end in queue:
        yield prefix, node, end
        first, last = host.first_child[node], host.first_child[node + 1]
        for child in range(first, last):
            child_end = host.first_item[child + 1] if child + 1 < last else end
            queue.append(((*prefix, int(host.token[child])), child, child_end))


def padded(trie: Trie, nodes: int, **bounds) -> Trie:
    """The same trie in arrays for `nodes` nodes and with other bounds, so that tries share a compiled program."""
    count, spare = len(trie.token), (0, nodes - len(trie.token))
    arrays = {name: np.pad(getattr(trie, name), spare) for name in ("token", "first_item", "forced")}
    first_child = np.pad(trie.first_child, spare, constant_values=count)
    return dataclasses.replace(trie, first_child=first_child, **arrays, **bounds)


def random_catalogue(rng, items=40):
    """Sequences and popularities: short over few tokens, so many prefixes of one another and collisions."""
    tokens, longest, distinct = rng.integers(1, VOCAB - 1), rng.integers(0, 7), rng.integers(1, 80)
    pool = [rng.integers(2, 2 + tokens, rng.integers(0, longest + 1)).tolist() for _ in range(distinct)]
    return [pool[i] for i in rng.integers(0, distinct, items)], rng.integers(0, 4, items)


# Hypothesis draws the seed alone: left to it, most catalogues would be next to empty.
seeds = st.integers(0, 2**32 - 1)


@settings(max_examples=150, deadline=None)
@given(seeds)
def test_equals_a_trie_of_dictionaries(seed):
    sequences, popularity = random_catalogue(np.random.default_rng(seed))
    trie = build(sequences, popularity)
    first_item, items = np.asarray(trie.first_item), np.asarray(trie.item_of_rank)

    children, below = {}, {}
    for item, sequence in enumerate(map(tuple, sequences)):
        for length in range(len(sequence) + 1):
            children.setdefault(sequence[:length], set())
            below.setdefault(sequence[:length], []).append(item)
        for length in range(len(sequence)):
            children[sequence[:length]].add(sequence[length])

    found = {}
    for prefix, node, end in walk(trie):
        assert prefix not in found
        found[prefix] = node
        run = items[first_item[node] : end]
        expected = sorted(below[prefix], key=lambda i: (tuple(sequences[i]), -popularity[i], i))
        assert run.tolist() == expected
        assert bool(trie.forced[node]) == (len({tuple(sequences[i]) for i in expected}) == 1)
    assert sorted(found) == sorted(children)
    assert sorted(found.values()) == list(range(len(children))) == list(range(len(trie.token)))

    assert np.asarray(trie.rank_of_item)[items].tolist() == list(range(len(sequences)))
    assert np.asarray(trie.length_of_rank).tolist() == [len(sequences[i]) + 1 for i in items]
    assert trie.root_branch == len(children[()])
    assert trie.max_branch == max((len(c) for prefix, c in children.items() if prefix), default=0)
    assert trie.max_depth == max(map(len, sequences)) + 1


def test_is_a_pytree_of_lean_arrays():
    trie = build([[2, 3], [2, 3, 4], [5]])
    leaves = jax.tree.leaves(trie)
    assert all(isinstance(leaf, jax.Array) for leaf in leaves)
    assert sorted(leaf.dtype.name for leaf in leaves) == ["bool", *["int32"] * 6]
    same = jax.jit(lambda t: dataclasses.replace(t, token=t.token + 0))(trie)
    assert (same.max_branch, same.max_depth, same.root_branch, same.vocab_size) == (1, 4, 2, VOCAB)


def test_unsigned_popularity():
    trie = build([[2], [2], [2]], np.array([0, 7, 3], np.uint32))
    assert np.asarray(trie.item_of_rank).tolist() == [1, 2, 0]


@pytest.mark.parametrize(
    ("tokens", "lengths", "message"),
    [
        ([[2, 1], [0, 0]], [2, 0], "item 1: length 0"),
        ([[2, 1], [3, 1]], [2, 3], "item 1: length 3"),
        ([[2, 1], [VOCAB, 1]], [2, 2], f"item 1: token {VOCAB} at position 0.*from 2 to {VOCAB - 1}"),
        ([[2, 1, 0], [2, 1, 1]], [2, 3], "item 1: token 1 at position 1"),
        ([[2, 1, 0], [0, 3, 1]], [2, 3], "item 1: token 0 at position 0"),
        ([[2, 1], [-5, 1]], [2, 2], "item 1: token -5 at position 0"),
        ([[2, 1, 0], [2, 3, 0]], [2, 3], "item 1: token 0 at position 2.*expected end-of-sequence"),
        ([[2, 1, 0], [2, 1, 4]], [2, 2], "item 1: token 4 at position 2.*expected padding"),
        (np.zeros((0, 3)), np.zeros(0), "at least one item"),
        ([[2, 1], [3, 1]], [2], "as many lengths"),
    ],
)
def test_bad_sequences_name_the_item(tokens, lengths, message):
    with pytest.raises(InputError, match=message):
        build_trie(np.array(tokens), np.array(lengths), np.zeros(len(tokens)), VOCAB)


def test_a_saved_trie_is_the_same(tmp_path):
    trie = build(*random_catalogue(np.random.default_rng(0)))
    path = tmp_path / "trie.npz"
    trie_file.save(trie, path, "of this catalogue")
    found = trie_file.load(path, "of this catalogue")
    for field in dataclasses.fields(Trie):
        before, after = getattr(trie, field.name), getattr(found, field.name)
        assert type(before) is type(after)
        assert np.asarray(before).dtype == np.asarray(after).dtype
        np.testing.assert_array_equal(before, after)
    assert trie_file.load(path, "of another") is None
    assert trie_file.load(tmp_path / "none.npz", "of this catalogue") is None


def test_a_damaged_trie_is_named_and_built_again(tmp_path, capsys):
    path, rng = tmp_path / "trie.npz", np.random.default_rng(0)
    trie_file.save(build(*random_catalogue(rng)), path, "")
    whole = path.read_bytes()
    for damaged in (b"", whole[: len(whole) // 2], b"PK" + whole[2000:]):
        path.write_bytes(damaged)
        assert trie_file.load(path, "") is None
        assert "trie.npz is no trie, or damaged" in capsys.readouterr().err.replace("\n", "")
    # A changed byte is found, or it changes nothing that is read.
    for place in rng.integers(0, len(whole), 200):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :])
        if (found := trie_file.load(path, "")) is not None:
            path.write_bytes(whole)
            same = trie_file.load(path, "")
            assert jax.tree.structure(found) == jax.tree.structure(same)
            assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(same), strict=True))

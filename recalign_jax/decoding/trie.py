"""The catalogue as a trie of token sequences, in a few flat arrays on the device.

Nodes are numbered level by level, within a level in lexicographic order of the prefixes they stand for. So the
children of a node are consecutive numbers (a CSR with implicit targets: one offset and one token a node), and the
root's children are nodes 1 to `root_branch`. End-of-sequence is an edge like any other, but its leaf needs no node:
items are ranked in the lexicographic order of their sequences, the items below a node are one run of ranks, and those
that end at the node itself come first in it, because end-of-sequence is the smallest token.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from recalign_jax.corpus.catalog import EOS_ID, PAD_ID
from recalign_jax.errors import InputError


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Trie:
    """A catalogue of I items as a trie of N nodes; 13 bytes a node and 12 an item.

    Attributes:
      token: int32 [N], the token on the edge into each node (the root, node 0, has padding).
      first_child: int32 [N + 1]; the children of node n are first_child[n] to first_child[n + 1] - 1.
      first_item: int32 [N], the smallest rank of an item at or below each node.
      forced: bool [N], whether one sequence alone lies at or below the node: all that follows is certain.
      item_of_rank: int32 [I], item indices by rank; items with the same sequence stand side by side, the most popular
        first, ties by index.
      rank_of_item: int32 [I], the inverse.
      length_of_rank: int32 [I], lengths of the sequences, end-of-sequence included.
      vocab_size: all tokens are below it.
      root_branch: number of children of the root.
      max_branch: largest number of children of any other node.
      max_depth: length of the longest sequence, end-of-sequence included.
    """

    token: jax.Array
    first_child: jax.Array
    first_item: jax.Array
    forced: jax.Array
    item_of_rank: jax.Array
    rank_of_item: jax.Array
    length_of_rank: jax.Array
    vocab_size: int = dataclasses.field(metadata={"static": True})
    root_branch: int = dataclasses.field(metadata={"static": True})
    max_branch: int = dataclasses.field(metadata={"static": True})
    max_depth: int = dataclasses.field(metadata={"static": True})


def build_trie(tokens: np.ndarray, lengths: np.ndarray, popularity: np.ndarray, vocab_size: int) -> Trie:
    """Builds the trie of a catalogue.

    Args:
      tokens: int [I, T], a sequence an item, ended by EOS_ID and padded with PAD_ID.
      lengths: int [I], lengths of the sequences, end-of-sequence included.
      popularity: [I], orders items whose sequences are equal (more popular first).
      vocab_size: size of the vocabulary.

    Raises:
      InputError: no items, shapes that disagree, or an item whose sequence breaks the rules above.
    """
    tokens, lengths, popularity = np.asarray(tokens), np.asarray(lengths), np.asarray(popularity)
    _check_sequences(tokens, lengths, popularity, vocab_size)
    num_items, width = tokens.shape

    # lexsort takes its keys from the last to the first; it is stable, so ties stay in the order of the index.
    item_of_rank = np.lexsort((np.negative(popularity, dtype=np.float64), *tokens.T[::-1])).astype(np.int32)
    tokens, lengths = tokens[item_of_rank], lengths[item_of_rank]
    rank_of_item = np.empty_like(item_of_rank)
    rank_of_item[item_of_rank] = np.arange(num_items, dtype=np.int32)

    level_tokens, level_items, level_ends = [np.array([PAD_ID])], [np.array([0])], [np.array([num_items])]  # the root
    level_children = []
    differs = np.zeros(num_items, bool)  # from the item before, in the prefix up to the current position
    differs[0] = True
    nodes = 1
    for position in range(width):
        differs[1:] |= tokens[1:, position] != tokens[:-1, position]
        starts = np.flatnonzero(differs & (position < lengths - 1))  # the ranks that open a node of this level
        level_children.append(nodes + np.searchsorted(starts, level_items[-1]))
        level_tokens.append(tokens[starts, position])
        level_items.append(starts)
        opens = np.append(np.flatnonzero(differs), num_items)
        level_ends.append(opens[np.searchsorted(opens, starts, side="right")])
        nodes += len(starts)
    # No sequence goes on after the last position, so the last level is empty and `nodes` closes the offsets.
    first_child = np.concatenate([*level_children, [nodes]]).astype(np.int32)
    branch = np.diff(first_child)
    first_item, ends = np.concatenate(level_items), np.concatenate(level_ends)
    sequence_of_rank = np.cumsum(differs)

    return Trie(
        token=jnp.asarray(np.concatenate(level_tokens).astype(np.int32)),
        first_child=jnp.asarray(first_child),
        first_item=jnp.asarray(first_item.astype(np.int32)),
        forced=jnp.asarray(sequence_of_rank[first_item] == sequence_of_rank[ends - 1]),
        item_of_rank=jnp.asarray(item_of_rank),
        rank_of_item=jnp.asarray(rank_of_item),
        length_of_rank=jnp.asarray(lengths.astype(np.int32)),
        vocab_size=int(vocab_size),
        root_branch=int(branch[0]),
        max_branch=int(branch[1:].max(initial=0)),
        max_depth=int(lengths.max()),
    )


def _check_sequences(tokens: np.ndarray, lengths: np.ndarray, popularity: np.ndarray, vocab_size: int) -> None:
    """Raises InputError at the first item that is not tokens in [2, vocab_size), end-of-sequence, padding."""
    if tokens.ndim != 2 or not len(tokens):
        raise InputError(f"a trie needs token sequences of shape [items, length] and at least one item: {tokens.shape}")
    if lengths.shape != tokens.shape[:1] or popularity.shape != tokens.shape[:1]:
        raise InputError(
            f"a trie of {len(tokens)} items needs as many lengths and popularities: {lengths.shape}, {popularity.shape}"
        )
    wrong_length = np.flatnonzero((lengths < 1) | (lengths > tokens.shape[1]))
    if len(wrong_length):
        item = wrong_length[0]
        raise InputError(f"item {item}: length {lengths[item]} is not between 1 and {tokens.shape[1]}")
    for position in range(tokens.shape[1]):  # a column at a time: no temporary as large as the catalogue
        column = tokens[:, position]
        ends = position - (lengths - 1)  # below 0: inside; 0: end-of-sequence; above: padding
        wrong = np.where(
            ends < 0,
            (column <= EOS_ID) | (column >= vocab_size),
            column != np.where(ends == 0, EOS_ID, PAD_ID),
        )
        if wrong.any():
            item = np.flatnonzero(wrong)[0]
            expected = (
                f"a token from {EOS_ID + 1} to {vocab_size - 1}"
                if ends[item] < 0
                else f"end-of-sequence ({EOS_ID})"
                if ends[item] == 0
                else f"padding ({PAD_ID})"
            )
            raise InputError(
                f"item {item}: token {column[item]} at position {position} of a sequence of length {lengths[item]}; "
                f"expected {expected}"
            )

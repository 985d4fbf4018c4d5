"""Items that a user must not get, as sorted ranks, and what follows for a node of the trie.

Below a node lies one run of ranks, so a node is dead when the excluded ranks fill that run. That is exact for
whatever the trie looks like: no beam is ever spent on a branch in which nothing may be returned.
"""

import jax
import jax.numpy as jnp

from recalign_jax.decoding.trie import Trie


def excluded_ranks(trie: Trie, items: jax.Array) -> jax.Array:
    """Turns item indices int32 [B, X] (those outside the catalogue, as -1, are padding) into ranks int32 [B, X].

    The result is strictly increasing along X: duplicates and padding become numbers from I on, at the end.
    """
    num_items = len(trie.rank_of_item)
    known = (items >= 0) & (items < num_items)
    ranks = jnp.sort(jnp.where(known, trie.rank_of_item[jnp.where(known, items, 0)], num_items), axis=1)
    repeated = jnp.pad(ranks[:, 1:] == ranks[:, :-1], ((0, 0), (1, 0)))[:, : ranks.shape[1]]
    ranks = jnp.sort(jnp.where(repeated, num_items, ranks), axis=1)
    return jnp.where(ranks < num_items, ranks, num_items + jnp.arange(ranks.shape[1]))


def allowed_before(excluded: jax.Array, ranks: jax.Array) -> jax.Array:
    """Counts the ranks below each of `ranks` [B, K] that are not excluded; int32 [B, K]."""
    return ranks - jax.vmap(jnp.searchsorted)(excluded, ranks).astype(ranks.dtype)


def nth_allowed(excluded: jax.Array, n: jax.Array) -> jax.Array:
    """Returns the n-th rank (from 0) that is not excluded, for n int32 [B, K]; the inverse of `allowed_before`."""
    allowed_below = excluded - jnp.arange(excluded.shape[1])  # never decreases: `excluded` strictly increases
    skipped = jax.vmap(lambda sorted_, query: jnp.searchsorted(sorted_, query, side="right"))(allowed_below, n)
    return n + skipped.astype(n.dtype)


def dead_children(trie: Trie, excluded: jax.Array, node: jax.Array, end: jax.Array, width: int) -> jax.Array:
    """Finds the children below which everything is excluded; bool [B, K, width].

    The work is a few steps for each excluded rank, not for each child.

    Args:
      trie: the catalogue.
      excluded: int32 [B, X] from `excluded_ranks`.
      node: int32 [B, K], distinct nodes of one level.
      end: int32 [B, K], one past the largest rank at or below each node; 0 takes a beam out.
      width: no node has more children.
    """
    num_excluded = excluded.shape[1]
    ranks = excluded[:, :, None]
    inside = (trie.first_item[node][:, None, :] <= ranks) & (ranks < end[:, None, :])  # [B, X, K]
    beam = jnp.argmax(inside, axis=2)
    parent = jnp.take_along_axis(node, beam, axis=1)
    parent_end = jnp.take_along_axis(end, beam, axis=1)

    # The child with the rank in its run: the last one whose run starts at or before it.
    first, last = trie.first_child[parent], trie.first_child[parent + 1]
    low, high = first, last
    for _ in range(width.bit_length()):
        middle = (low + high) // 2
        before = (low < high) & (trie.first_item[middle] <= excluded)
        low, high = jnp.where(before, middle + 1, low), jnp.where(before, high, middle)
    child = low - 1

    start = trie.first_item[child]
    stop = jnp.where(child + 1 < last, trie.first_item[child + 1], parent_end)
    # Excluded ranks strictly increase, so they fill the run if the first is at its start and the right one at its end.
    at_stop = jnp.arange(num_excluded) + stop - start - 1
    fills = jnp.take_along_axis(excluded, jnp.minimum(at_stop, num_excluded - 1), axis=1) == stop - 1
    dead = inside.any(axis=2) & (child >= first) & (excluded == start) & (at_stop < num_excluded) & fills
    slot = jnp.where(dead, child - first, width)  # `width` is out of bounds: dropped
    nowhere = jnp.zeros((*node.shape, width), bool)
    return jax.vmap(lambda marks, beam, slot: marks.at[beam, slot].set(True, mode="drop"))(nowhere, beam, slot)

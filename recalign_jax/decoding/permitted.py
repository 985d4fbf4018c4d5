"""Which items a user may get, as sorted ranks, and what follows for a node of the trie.

Below a node lies one run of ranks. So with a list of excluded ranks a node is closed when they fill its run, and with
a list of allowed ranks when none of them is in it. Both are exact for whatever the trie looks like: no beam is ever
spent on a branch in which nothing may be returned.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from recalign_jax.decoding.trie import Trie


class Permitted(NamedTuple):
    """What each user may get: everything but `ranks`, or (only) nothing else.

    Attributes:
      ranks: int32 [B, X], strictly increasing along X; numbers from I on, at the end, are padding.
      only: whether `ranks` are the allowed items; else they are the excluded ones.
    """

    ranks: jax.Array
    only: bool


def from_items(trie: Trie, excluded_items: jax.Array, allowed_items: jax.Array | None = None) -> Permitted:
    """From item numbers int32 [B, X] and [B, A]; those outside the catalogue, as -1, are padding.

    With `allowed_items` a user gets those of them that are not excluded; a row of padding allows nothing.
    """
    excluded = _sorted_ranks(trie, excluded_items)
    if allowed_items is None:
        return Permitted(excluded, only=False)
    allowed = _sorted_ranks(trie, allowed_items)
    if excluded.shape[1]:
        place = jnp.minimum(jax.vmap(jnp.searchsorted)(excluded, allowed), excluded.shape[1] - 1)
        is_excluded = jnp.take_along_axis(excluded, place, axis=1) == allowed
        allowed = _pushed_back(trie, jnp.where(is_excluded, len(trie.rank_of_item), allowed))
    return Permitted(allowed, only=True)


def allowed_before(permitted: Permitted, ranks: jax.Array) -> jax.Array:
    """Counts the allowed ranks below each of `ranks` [B, K]; int32 [B, K]."""
    listed = jax.vmap(jnp.searchsorted)(permitted.ranks, ranks).astype(ranks.dtype)
    return listed if permitted.only else ranks - listed


def nth_allowed(permitted: Permitted, n: jax.Array) -> jax.Array:
    """Returns the n-th allowed rank (from 0), for n int32 [B, K]; the inverse of `allowed_before`."""
    ranks = permitted.ranks
    if permitted.only:
        return jnp.take_along_axis(ranks, jnp.clip(n, 0, ranks.shape[1] - 1), axis=1)
    allowed_below = ranks - jnp.arange(ranks.shape[1])  # never decreases: `ranks` strictly increases
    skipped = jax.vmap(lambda sorted_, query: jnp.searchsorted(sorted_, query, side="right"))(allowed_below, n)
    return n + skipped.astype(n.dtype)


def open_children(trie: Trie, permitted: Permitted, node: jax.Array, end: jax.Array, width: int) -> jax.Array:
    """Finds the children below which something is allowed; bool [B, K, width], for children that there are.

    The work is a few steps for each listed rank, not for each child.

    Args:
      trie: the catalogue.
      permitted: from `from_items`.
      node: int32 [B, K], distinct nodes of one level.
      end: int32 [B, K], one past the largest rank at or below each node; 0 takes a beam out.
      width: no node has more children.
    """
    listed = permitted.ranks
    ranks = listed[:, :, None]
    inside = (trie.first_item[node][:, None, :] <= ranks) & (ranks < end[:, None, :])  # [B, X, K]
    beam = jnp.argmax(inside, axis=2)
    parent = jnp.take_along_axis(node, beam, axis=1)
    parent_end = jnp.take_along_axis(end, beam, axis=1)

    # The child with the rank in its run: the last one whose run starts at or before it.
    first, last = trie.first_child[parent], trie.first_child[parent + 1]
    low, high = first, last
    for _ in range(width.bit_length()):
        middle = (low + high) // 2
        before = (low < high) & (trie.first_item[middle] <= listed)
        low, high = jnp.where(before, middle + 1, low), jnp.where(before, high, middle)
    child = low - 1
    marked = inside.any(axis=2) & (child >= first)
    if not permitted.only:
        # Excluded ranks strictly increase: they fill a run if the first is at its start and the right one at its end.
        start = trie.first_item[child]
        stop = jnp.where(child + 1 < last, trie.first_item[child + 1], parent_end)
        at_stop = jnp.arange(listed.shape[1]) + stop - start - 1
        fills = jnp.take_along_axis(listed, jnp.minimum(at_stop, listed.shape[1] - 1), axis=1) == stop - 1
        marked &= (listed == start) & (at_stop < listed.shape[1]) & fills
    slot = jnp.where(marked, child - first, width)  # `width` is out of bounds: dropped
    unmarked = jnp.full((*node.shape, width), not permitted.only)
    mark = jax.vmap(lambda marks, beam, slot: marks.at[beam, slot].set(permitted.only, mode="drop"))
    return mark(unmarked, beam, slot)


def _sorted_ranks(trie: Trie, items: jax.Array) -> jax.Array:
    """Item numbers int32 [B, X] as strictly increasing ranks; duplicates and padding become numbers from I on."""
    num_items = len(trie.rank_of_item)
    known = (items >= 0) & (items < num_items)
    ranks = jnp.sort(jnp.where(known, trie.rank_of_item[jnp.where(known, items, 0)], num_items), axis=1)
    repeated = jnp.pad(ranks[:, 1:] == ranks[:, :-1], ((0, 0), (1, 0)))[:, : ranks.shape[1]]
    return _pushed_back(trie, jnp.where(repeated, num_items, ranks))


def _pushed_back(trie: Trie, ranks: jax.Array) -> jax.Array:
    """Puts the ranks I, which stand for nothing, to the end and makes them differ."""
    num_items = len(trie.rank_of_item)
    ranks = jnp.sort(ranks, axis=1)
    return jnp.where(ranks < num_items, ranks, num_items + jnp.arange(ranks.shape[1]))

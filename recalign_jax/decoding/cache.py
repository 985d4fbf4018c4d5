"""Decoder caches that move with their beams, as little as can be.

A cache is by far the largest thing a beam owns, and most beams have one child. So the best child of a beam takes the
beam's own slot, where its cache lies already; only a second child moves, into the slot of a beam that has none.
"""

from typing import Any

import jax
import jax.numpy as jnp

Cache = Any  # a pytree of arrays [layers, B, K, ...]


def slot_order(parent: jax.Array, alive: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Gives new beams their slots.

    Args:
      parent: int32 [B, K], the slot that each new beam goes on from; best beam first.
      alive: bool [B, K].

    Returns:
      (which of the new beams goes to each slot, its parent), both int32 [B, K]. A living parent keeps its slot for its
      best child; the parent of a dead beam is its own slot.
    """
    return jax.vmap(_slot_order)(parent, alive)


def _slot_order(parent: jax.Array, alive: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`slot_order` of one user, [K]; without a sort, and without comparing all with all."""
    count = len(parent)
    slots = jnp.arange(count)
    best = jnp.full(count, count).at[parent].min(jnp.where(alive, slots, count))  # of each slot's children
    stays, moves = best < count, best[parent] != slots
    # The n-th new beam that is no best child goes to the n-th free slot.
    moving = jnp.zeros_like(slots).at[jnp.where(moves, jnp.cumsum(moves) - 1, count)].set(slots, mode="drop")
    order = jnp.where(stays, best, moving[jnp.cumsum(~stays) - 1])
    return order, jnp.where(alive[order], parent[order], slots)


def follow_parents(cache: Cache, parent: jax.Array) -> Cache:
    """Gives every beam its parent's cache. A beam that stays costs nothing.

    No copy overwrites what a later one reads: a parent keeps its slot for its best child (`slot_order`).
    """
    moved = parent != jnp.arange(parent.shape[1])
    order = jnp.argsort(~moved, axis=1)  # stable: the beams that move come first

    def move(n, cache):
        """Copies the n-th moving beam of every user; a user with fewer copies a beam that stays onto itself."""
        to = order[:, n, None]
        source = jnp.take_along_axis(parent, to, axis=1)
        return jax.tree.map(lambda leaf: _copy_beam(leaf, source, to), cache)

    return jax.lax.fori_loop(0, moved.sum(axis=1).max(), move, cache)


def _copy_beam(leaf: jax.Array, source: jax.Array, to: jax.Array) -> jax.Array:
    """Copies beam source [B, 1] of each user over beam to [B, 1], in place; leaf [layers, B, K, ...].

    Spelled out for XLA: plain indexing hides that users are independent (devices would exchange caches), and `vmap`
    over axis 1 transposes the whole cache.
    """
    others = tuple(axis for axis in range(leaf.ndim - 1) if axis != 1)  # of a slice [layers, B, ...]
    gather = jax.lax.GatherDimensionNumbers(
        offset_dims=others,
        collapsed_slice_dims=(2,),
        start_index_map=(2,),
        operand_batching_dims=(1,),
        start_indices_batching_dims=(0,),
    )
    scatter = jax.lax.ScatterDimensionNumbers(
        update_window_dims=others,
        inserted_window_dims=(2,),
        scatter_dims_to_operand_dims=(2,),
        operand_batching_dims=(1,),
        scatter_indices_batching_dims=(0,),
    )
    one_beam = jax.lax.gather(leaf, source, gather, (leaf.shape[0], 1, 1, *leaf.shape[3:]))
    return jax.lax.scatter(leaf, to, one_beam, scatter, unique_indices=True)

"""Sequences that are finished: the best so far of each user, and the items that they stand for."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from recalign_jax.decoding import permitted
from recalign_jax.decoding.permitted import Permitted
from recalign_jax.decoding.trie import Trie


class BeamResult(NamedTuple):
    """The best items of each user, best first.

    Attributes:
      items: int32 [B, top_k], distinct item indices; -1 where there are no more.
      scores: float32 [B, top_k]; -inf where there is no item. Of a user whose search met NaN all are NaN, and there
        are no items.
    """

    items: jax.Array
    scores: jax.Array


class Finished(NamedTuple):
    """The best sequences so far, best first. F is top_k: every one gives at least one item.

    Attributes:
      score: float32 [B, F], -inf where there is none. NaN throughout once the user's search met NaN: no beam beats it,
        so that search ends.
      first: int32 [B, F], how many allowed items have a smaller rank than those of the sequence.
      size: int32 [B, F], how many allowed items the sequence has.
    """

    score: jax.Array
    first: jax.Array
    size: jax.Array


def none(batch: int, count: int) -> Finished:
    """Nothing finished yet."""
    nothing = jnp.zeros((batch, count), jnp.int32)
    return Finished(jnp.full((batch, count), -jnp.inf), nothing, nothing)


def of_run(permitted_items: Permitted, score: jax.Array, start: jax.Array, stop: jax.Array) -> Finished:
    """Sequences whose items have the ranks from `start` to `stop` - 1; -inf where none of them is allowed.

    A score of NaN stays: that nothing ends there must not hide it.
    """
    first = permitted.allowed_before(permitted_items, start)
    size = permitted.allowed_before(permitted_items, stop) - first
    return Finished(jnp.where((size > 0) | jnp.isnan(score), score, -jnp.inf), first, size)


def best(kept: Finished, new: Finished) -> Finished:
    """The best of both, as many as were kept; NaN if any is."""
    both = jax.tree.map(lambda *arrays: jnp.concatenate(arrays, axis=1), kept, new)
    _, order = jax.lax.top_k(both.score, kept.score.shape[1])
    found = jax.tree.map(lambda array: jnp.take_along_axis(array, order, axis=1), both)
    is_nan = jnp.isnan(both.score).any(axis=1, keepdims=True)  # where top_k puts it depends on its sign
    return found._replace(score=jnp.where(is_nan, jnp.nan, found.score))


def items_of(trie: Trie, permitted_items: Permitted, finished: Finished) -> BeamResult:
    """Reads the items off the sequences: as many results as sequences were kept."""
    size = jnp.where(finished.score > -jnp.inf, finished.size, 0)
    stop = jnp.cumsum(size, axis=1)  # [B, F]
    place = jnp.arange(size.shape[1])
    leaf = jnp.sum(stop[:, None, :] <= place[:, None], axis=2)  # [B, top_k]
    there = leaf < size.shape[1]
    leaf = jnp.minimum(leaf, size.shape[1] - 1)
    first, size, stop, score = (
        jnp.take_along_axis(array, leaf, axis=1) for array in (finished.first, size, stop, finished.score)
    )
    rank = permitted.nth_allowed(permitted_items, first + place - (stop - size))
    items = trie.item_of_rank[jnp.clip(rank, 0, len(trie.item_of_rank) - 1)]
    no_score = jnp.where(jnp.isnan(finished.score), jnp.nan, -jnp.inf)
    return BeamResult(jnp.where(there, items, -1), jnp.where(there, score, no_score))

"""Beam search over the sequences of a catalogue: whatever it returns is an item."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from recalign_jax.decoding import exclusion
from recalign_jax.decoding.cache import Cache, follow_parents, slot_order
from recalign_jax.decoding.likelihood import log_normalizer
from recalign_jax.decoding.trie import EOS_ID, PAD_ID, Trie

Step = Callable[[jax.Array, jax.Array, Cache], tuple[jax.Array, Cache]]


class BeamResult(NamedTuple):
    """The best items of each user, best first.

    Attributes:
      items: int32 [B, top_k], distinct item indices; -1 where there are no more.
      scores: float32 [B, top_k]; -inf where there is no item.
    """

    items: jax.Array
    scores: jax.Array


class _Beams(NamedTuple):
    """Prefixes that are still growing, one a beam. All have the same length; a dead beam has the score -inf."""

    score: jax.Array  # float32 [B, K], log p(prefix)
    node: jax.Array  # int32 [B, K]
    end: jax.Array  # int32 [B, K], one past the largest rank at or below the node; 0 for a dead beam
    parent: jax.Array  # int32 [B, K], the beam of the step before that this one goes on from


class _Finished(NamedTuple):
    """The best leaves so far, best first. F is top_k: every leaf gives at least one item."""

    score: jax.Array  # float32 [B, F], -inf where there is none
    first: jax.Array  # int32 [B, F], how many allowed items have a smaller rank than those of the leaf
    size: jax.Array  # int32 [B, F], how many allowed items the leaf has


def beam_search(
    step: Step,
    cache: Cache,
    trie: Trie,
    *,
    num_beams: int,
    top_k: int,
    excluded_items: jax.Array | None = None,
    length_penalty: float = 0.0,
) -> BeamResult:
    """Finds each user's most likely items.

    An item's score is log p(its tokens, end-of-sequence included), with the softmax over the whole vocabulary, divided
    by (its number of tokens) ** length_penalty. Exclusions change which items are returned, not their scores. Items
    that share a sequence share its score and come by popularity. With at least as many beams as the trie has nodes on
    any level the search is exhaustive.

    Call it inside the `jax.jit` that computes what `step` closes over; all shapes are static. It stops as soon as no
    beam can change any user's result.

    Args:
      step: (tokens int32 [B, k], position int32 scalar, cache) -> (logits [B, k, V], cache), where logits are those of
        the next token. k is 1 at position 0, whose token is PAD_ID, and num_beams from then on. What a user's beams
        share (encoder state) it closes over.
      cache: the cache before position 0, a pytree of arrays [layers, B, k, ...]. Only its first beam is read.
      trie: the catalogue.
      num_beams: K.
      top_k: results a user; it may exceed num_beams.
      excluded_items: int32 [B, X] item indices that a user must not get, padded with -1.
      length_penalty: 0 for plain log-likelihood, 1 for the mean of a token.

    Raises:
      ValueError: a negative length penalty, or logits narrower than the trie's vocabulary.
    """
    if length_penalty < 0:
        raise ValueError(f"length_penalty {length_penalty} is negative; shorter items already score higher at 0")
    batch = jax.tree.leaves(cache)[0].shape[1]
    num_items = len(trie.item_of_rank)
    if excluded_items is None:
        excluded_items = jnp.zeros((batch, 0), jnp.int32)
    excluded = exclusion.excluded_ranks(trie, excluded_items)

    def advance(depth, tokens, beams, finished, cache, num_children):
        """One decoder step: beams of `depth` tokens are finished where an item ends, and go on by a token."""
        logits, cache = step(tokens, depth, cache)
        if logits.shape[-1] < trie.vocab_size:
            raise ValueError(f"logits over {logits.shape[-1]} tokens for a trie over {trie.vocab_size}")
        logits = logits.astype(jnp.float32)
        base = beams.score - log_normalizer(logits)  # [B, k]; no normalised copy of the logits
        ended = _ended(trie, excluded, beams, (base + logits[..., EOS_ID]) / (depth + 1.0) ** length_penalty)
        return _go_on(trie, excluded, beams, base, logits, num_children, num_beams), _best(finished, ended), cache

    root = _Beams(
        score=jnp.zeros((batch, 1)),
        node=jnp.zeros((batch, 1), jnp.int32),
        end=jnp.full((batch, 1), num_items, jnp.int32),
        parent=jnp.zeros((batch, 1), jnp.int32),
    )
    nothing = _Finished(
        score=jnp.full((batch, top_k), -jnp.inf),
        first=jnp.zeros((batch, top_k), jnp.int32),
        size=jnp.zeros((batch, top_k), jnp.int32),
    )
    cache = jax.tree.map(lambda leaf: leaf[:, :, :1], cache)
    start = jnp.full((batch, 1), PAD_ID, jnp.int32)
    beams, finished, cache = advance(jnp.int32(0), start, root, nothing, cache, trie.root_branch)
    cache = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (*leaf.shape[:2], num_beams, *leaf.shape[3:])), cache)
    beams = beams._replace(parent=jnp.broadcast_to(jnp.arange(num_beams), (batch, num_beams)))

    def may_improve(state):
        depth, beams, finished, _ = state
        # Log-probabilities only fall, and dividing by the greatest length makes the most of what there is.
        bound = beams.score.max(axis=1) / float(trie.max_depth) ** length_penalty
        return (depth < trie.max_depth) & jnp.any(bound > finished.score[:, -1])

    def body(state):
        depth, beams, finished, cache = state
        cache = follow_parents(cache, beams.parent)
        beams, finished, cache = advance(depth, trie.token[beams.node], beams, finished, cache, trie.max_branch)
        return depth + 1, beams, finished, cache

    finished = jax.lax.while_loop(may_improve, body, (jnp.int32(1), beams, finished, cache))[2]
    return _items_of(trie, excluded, finished, top_k)


def _ended(trie: Trie, excluded: jax.Array, beams: _Beams, score: jax.Array) -> _Finished:
    """The leaves at the end-of-sequence edges of the beams, [B, k]; -inf where no allowed item ends."""
    first_child = trie.first_child[beams.node]
    has_children = first_child < trie.first_child[beams.node + 1]
    children_start = trie.first_item[jnp.minimum(first_child, len(trie.first_item) - 1)]
    end = jnp.where(has_children, children_start, beams.end)
    first = exclusion.allowed_before(excluded, trie.first_item[beams.node])
    size = exclusion.allowed_before(excluded, end) - first
    return _Finished(jnp.where(size > 0, score, -jnp.inf), first, size)


def _best(kept: _Finished, new: _Finished) -> _Finished:
    """The best of both, as many as were kept."""
    both = jax.tree.map(lambda *arrays: jnp.concatenate(arrays, axis=1), kept, new)
    _, order = jax.lax.top_k(both.score, kept.score.shape[1])
    return jax.tree.map(lambda array: jnp.take_along_axis(array, order, axis=1), both)


def _go_on(
    trie: Trie,
    excluded: jax.Array,
    beams: _Beams,
    base: jax.Array,
    logits: jax.Array,
    num_children: int,
    num_beams: int,
) -> _Beams:
    """The `num_beams` best children of the beams. base [B, k] is what to add to logits [B, k, V] for log p(prefix)."""
    num_children = max(num_children, 1)  # arrays of width 0 have no maximum
    first, last = trie.first_child[beams.node], trie.first_child[beams.node + 1]
    child = first[..., None] + jnp.arange(num_children)  # [B, k, W]
    token = trie.token[jnp.minimum(child, len(trie.token) - 1)]
    score = base[..., None] + jnp.take_along_axis(logits, token, axis=-1)
    dead = exclusion.dead_children(trie, excluded, beams.node, beams.end, num_children)
    score = jnp.where((child < last[..., None]) & ~dead, score, -jnp.inf)

    batch = score.shape[0]
    score, flat = jax.lax.top_k(score.reshape(batch, -1), min(num_beams, score[0].size))
    spare = ((0, 0), (0, num_beams - score.shape[1]))
    score, flat = jnp.pad(score, spare, constant_values=-jnp.inf), jnp.pad(flat, spare)
    parent = flat // num_children
    last, parent_end = (jnp.take_along_axis(array, parent, axis=1) for array in (last, beams.end))
    node = jnp.take_along_axis(child.reshape(batch, -1), flat, axis=1)
    alive = score > -jnp.inf
    node = jnp.where(alive, node, 0)
    sibling_start = trie.first_item[jnp.minimum(node + 1, len(trie.first_item) - 1)]
    end = jnp.where(alive, jnp.where(node + 1 < last, sibling_start, parent_end), 0)
    slots, parent = slot_order(parent, alive)
    score, node, end = (jnp.take_along_axis(array, slots, axis=1) for array in (score, node, end))
    return _Beams(score, node, end, parent)


def _items_of(trie: Trie, excluded: jax.Array, finished: _Finished, top_k: int) -> BeamResult:
    """Reads the items off the leaves."""
    size = jnp.where(finished.score > -jnp.inf, finished.size, 0)
    stop = jnp.cumsum(size, axis=1)  # [B, F]
    place = jnp.arange(top_k)
    leaf = jnp.sum(stop[:, None, :] <= place[:, None], axis=2)  # [B, top_k]
    there = leaf < size.shape[1]
    leaf = jnp.minimum(leaf, size.shape[1] - 1)
    first, size, stop, score = (
        jnp.take_along_axis(array, leaf, axis=1) for array in (finished.first, size, stop, finished.score)
    )
    rank = exclusion.nth_allowed(excluded, first + place - (stop - size))
    items = trie.item_of_rank[jnp.clip(rank, 0, len(trie.item_of_rank) - 1)]
    return BeamResult(jnp.where(there, items, -1), jnp.where(there, score, -jnp.inf))

"""Beam search over the sequences of a catalogue: whatever it returns is an item."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from recalign_jax.corpus.catalog import PAD_ID
from recalign_jax.decoding import finished as finished_sequences
from recalign_jax.decoding import forced, permitted
from recalign_jax.decoding.cache import Cache, follow_parents, slot_order
from recalign_jax.decoding.finished import BeamResult, Finished
from recalign_jax.decoding.permitted import Permitted
from recalign_jax.decoding.scoring import SCORES, Decoder
from recalign_jax.decoding.trie import Trie

# Children are looked at in arrays of the first of these widths that holds those of every beam (or of the trie's own).
_WIDTHS = (16, 256, 4096)


class Beams(NamedTuple):
    """Prefixes that are still growing, one a beam. All have the same length; a dead beam has the score -inf."""

    score: jax.Array  # float32 [B, K], log p(prefix)
    node: jax.Array  # int32 [B, K]
    end: jax.Array  # int32 [B, K], one past the largest rank at or below the node; 0 for a dead beam
    parent: jax.Array  # int32 [B, K], the beam of the step before that this one goes on from


class _Children(NamedTuple):
    """Children of the beams of each user, best first."""

    score: jax.Array  # float32 [B, n], -inf where there are no more
    parent: jax.Array  # int32 [B, n], the beam
    nth: jax.Array  # int32 [B, n], which of its children


def beam_search(
    decoder: Decoder,
    cache: Cache,
    trie: Trie,
    *,
    num_beams: int,
    top_k: int,
    excluded_items: jax.Array | None = None,
    allowed_items: jax.Array | None = None,
    length_penalty: float = 0.0,
    scores: str = "vocabulary",
) -> BeamResult:
    """Finds each user's most likely items.

    An item's score is log p(its tokens, end-of-sequence included), divided by (its number of tokens) **
    length_penalty. With scores over the 'vocabulary' p is the model's own, a softmax over all tokens. With scores over
    the 'trie' the softmax of a step is over the tokens that go on to an item (end-of-sequence among them where one
    ends): a token without an alternative has probability one, and a beam that one sequence alone follows is finished.

    Lists of excluded or allowed items change which items are returned, not their scores. Items that share a sequence
    share its score and come by popularity. With at least as many beams as the trie has (allowed) nodes on any level,
    so with as many as there are items, the search is exhaustive.

    Call it inside the `jax.jit` that computes what the decoder closes over; all shapes are static. It stops as soon as
    no beam can change any user's result.

    Args:
      decoder: of the next token.
      cache: the cache before position 0, a pytree of arrays [layers, B, k, ...]. Only its first beam is read.
      trie: the catalogue.
      num_beams: K.
      top_k: results a user; it may exceed num_beams.
      excluded_items: int32 [B, X] item indices that a user must not get, padded with -1.
      allowed_items: int32 [B, A], A >= 1, the only ones that a user may get, padded with -1; None for all.
      length_penalty: 0 for plain log-likelihood, 1 for the mean of a token.
      scores: one of SCORES.

    Raises:
      ValueError: a negative length penalty, unknown `scores`, or logits narrower than the trie's vocabulary.
    """
    if length_penalty < 0:
        raise ValueError(f"length_penalty {length_penalty} is negative; shorter items already score higher at 0")
    if scores not in SCORES:
        raise ValueError(f"scores {scores!r} is not one of {', '.join(SCORES)}")
    batch = jax.tree.leaves(cache)[0].shape[1]
    if excluded_items is None:
        excluded_items = jnp.zeros((batch, 0), jnp.int32)
    permitted_items = permitted.from_items(trie, excluded_items, allowed_items)

    step = partial(
        advance, decoder, trie, permitted_items, num_beams=num_beams, length_penalty=length_penalty, scores=scores
    )
    root = Beams(
        score=jnp.zeros((batch, 1)),
        node=jnp.zeros((batch, 1), jnp.int32),
        end=jnp.full((batch, 1), len(trie.item_of_rank), jnp.int32),
        parent=jnp.zeros((batch, 1), jnp.int32),
    )
    nothing = finished_sequences.none(batch, top_k)
    cache = jax.tree.map(lambda leaf: leaf[:, :, :1], cache)
    start = jnp.full((batch, 1), PAD_ID, jnp.int32)
    beams, finished, cache = step(jnp.int32(0), start, root, nothing, cache, widths=[max(trie.root_branch, 1)])
    cache = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (*leaf.shape[:2], num_beams, *leaf.shape[3:])), cache)
    beams = beams._replace(parent=jnp.broadcast_to(jnp.arange(num_beams), (batch, num_beams)))

    def may_win(depth, beams, finished):
        """Which beams can still change their user's result, [B, K]."""
        # Log-probabilities only fall, and dividing by the greatest length makes the most of what there is.
        bound = beams.score / float(trie.max_depth) ** length_penalty
        return (depth < trie.max_depth) & (bound > finished.score[:, -1:])

    def must_choose(state):
        depth, beams, finished, _ = state
        return jnp.any(may_win(depth, beams, finished) & ~trie.forced[beams.node])

    def body(state):
        depth, beams, finished, cache = state
        cache = follow_parents(cache, beams.parent)
        tokens = trie.token[beams.node]
        beams, finished, cache = step(depth, tokens, beams, finished, cache, widths=widths_of(trie))
        return depth + 1, beams, finished, cache

    state = jax.lax.while_loop(must_choose, body, (jnp.int32(1), beams, finished, cache))
    depth, beams, finished, cache = state
    if scores == "vocabulary":
        score = jnp.where(may_win(depth, beams, finished), beams.score, -jnp.inf)
        cache = follow_parents(cache, beams.parent)
        finished = forced.finish(
            decoder, trie, permitted_items, depth, score, beams.node, beams.end, finished, cache, length_penalty
        )
    return finished_sequences.items_of(trie, permitted_items, finished)


def widths_of(trie: Trie) -> list[int]:
    """How many children of a beam `advance` looks at: the first of these that is enough for all, after the root."""
    return [*(width for width in _WIDTHS if width < trie.max_branch), max(trie.max_branch, 1)]


def advance(
    decoder: Decoder,
    trie: Trie,
    permitted_items: Permitted,
    depth: jax.Array,
    tokens: jax.Array,
    beams: Beams,
    finished: Finished,
    cache: Cache,
    *,
    widths: Sequence[int],
    num_beams: int,
    length_penalty: float,
    scores: str,
) -> tuple[Beams, Finished, Cache]:
    """One decoder step: beams of `depth` tokens, `tokens` the last, are finished where an item ends, or go on.

    The cache is in the beams' order before and after; `follow_parents` takes it to that of the new beams. No beam has
    more children than the last of `widths`, which ascend. The rest is as in `beam_search`.
    """
    hidden, cache = decoder.step(tokens[..., None], depth, cache)
    score_next = SCORES[scores](trie, decoder, hidden[:, :, 0])
    first, last = trie.first_child[beams.node], trie.first_child[beams.node + 1]
    children_start = trie.first_item[jnp.minimum(first, len(trie.first_item) - 1)]
    # End-of-sequence is the smallest token: what ends at a node has smaller ranks than what goes on.
    start, stop = trie.first_item[beams.node], jnp.where(first < last, children_start, beams.end)

    def look_ahead(width: int) -> tuple[jax.Array, _Children, _Children | None]:
        """log p(end-of-sequence) [B, k]; the best children; those whose sequence is certain, if they finish."""
        child = first[..., None] + jnp.arange(width)  # [B, k, W]
        exist = child < last[..., None]
        node = jnp.minimum(child, len(trie.token) - 1)
        child_score, end_score = score_next(trie.token[node], exist, start < stop)
        is_open = exist & permitted.open_children(trie, permitted_items, beams.node, beams.end, width)
        score = jnp.where(is_open, beams.score[..., None] + child_score, -jnp.inf)
        if scores == "vocabulary":
            return end_score, _best_children(score, num_beams), None
        certain = trie.forced[node]
        length = trie.length_of_rank[trie.first_item[node]].astype(jnp.float32)
        done = jnp.where(certain, score / length**length_penalty, -jnp.inf)
        going_on = _best_children(jnp.where(certain, -jnp.inf, score), num_beams)
        return end_score, going_on, _best_children(done, finished.score.shape[1])

    rung = jnp.sum(jnp.array(widths) < jnp.where(beams.end > 0, last - first, 0).max())
    # Only what depends on the width: XLA runs nothing beside a switch.
    end_score, children, certain = jax.lax.switch(rung, [partial(look_ahead, width) for width in widths])

    end_score = (beams.score + end_score) / (depth + 1.0) ** length_penalty
    finished = finished_sequences.best(finished, finished_sequences.of_run(permitted_items, end_score, start, stop))
    if certain is not None:
        node, end = _nodes(trie, beams, certain)
        sequences = finished_sequences.of_run(permitted_items, certain.score, trie.first_item[node], end)
        finished = finished_sequences.best(finished, sequences)
    slots, parent = slot_order(children.parent, children.score > -jnp.inf)
    children = jax.tree.map(lambda array: jnp.take_along_axis(array, slots, axis=1), children)
    return Beams(children.score, *_nodes(trie, beams, children), parent), finished, cache


def _best_children(score: jax.Array, count: int) -> _Children:
    """The best `count`, by scores [B, k, W]."""
    width = score.shape[2]
    score = score.reshape(len(score), -1)
    best, flat = jax.lax.top_k(score, min(count, score.shape[1]))
    spare = ((0, 0), (0, count - best.shape[1]))
    best, flat = jnp.pad(best, spare, constant_values=-jnp.inf), jnp.pad(flat, spare)
    return _Children(best, flat // width, flat % width)


def _nodes(trie: Trie, beams: Beams, children: _Children) -> tuple[jax.Array, jax.Array]:
    """Nodes of children and one past the largest rank at or below each, [B, n]; 0 where there is no child."""
    parent, parent_end = (jnp.take_along_axis(array, children.parent, axis=1) for array in (beams.node, beams.end))
    node = trie.first_child[parent] + children.nth
    sibling_start = trie.first_item[jnp.minimum(node + 1, len(trie.first_item) - 1)]
    end = jnp.where(node + 1 < trie.first_child[parent + 1], sibling_start, parent_end)
    there = children.score > -jnp.inf
    return jnp.where(there, node, 0), jnp.where(there, end, 0)

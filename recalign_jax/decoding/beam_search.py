"""Beam search over the sequences of a catalogue: whatever it returns is an item."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from recalign_jax.decoding import finished as finished_sequences
from recalign_jax.decoding import forced, permitted
from recalign_jax.decoding.cache import Cache, follow_parents, slot_order
from recalign_jax.decoding.finished import BeamResult, Finished
from recalign_jax.decoding.permitted import Permitted
from recalign_jax.decoding.scoring import SCORES, Decoder, ScoreNext
from recalign_jax.decoding.trie import PAD_ID, Trie

# Children are looked at in arrays of the first of these widths that holds those of every beam (or of the trie's own).
_WIDTHS = (16, 256, 4096)


class _Beams(NamedTuple):
    """Prefixes that are still growing, one a beam. All have the same length; a dead beam has the score -inf."""

    score: jax.Array  # float32 [B, K], log p(prefix)
    node: jax.Array  # int32 [B, K]
    end: jax.Array  # int32 [B, K], one past the largest rank at or below the node; 0 for a dead beam
    parent: jax.Array  # int32 [B, K], the beam of the step before that this one goes on from


class _Children(NamedTuple):
    """The children of all beams, in one row a user; W a beam, where it has them."""

    score: jax.Array  # float32 [B, k * W], log p(prefix); -inf where there is no child, or nothing allowed below it
    node: jax.Array  # int32 [B, k * W]
    width: int  # W
    last: jax.Array  # int32 [B, k], one past the last child
    end: jax.Array  # int32 [B, k], of the beams

    def take(self, trie: Trie, flat: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(node, end, parent) of the children numbered `flat` [B, n]; each [B, n]."""
        parent = flat // self.width
        last, parent_end = (jnp.take_along_axis(array, parent, axis=1) for array in (self.last, self.end))
        node = jnp.take_along_axis(self.node, flat, axis=1)
        sibling_start = trie.first_item[jnp.minimum(node + 1, len(trie.first_item) - 1)]
        return node, jnp.where(node + 1 < last, sibling_start, parent_end), parent


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
    allowed = permitted.permitted(trie, excluded_items, allowed_items)

    def advance(depth, tokens, beams, finished, cache, widths):
        """One decoder step: beams of `depth` tokens are finished where an item ends, and go on by a token."""
        hidden, cache = decoder.step(tokens[..., None], depth, cache)
        score_next = SCORES[scores](trie, decoder, hidden[:, :, 0])

        def choose(width):
            ended, children = _look_ahead(trie, allowed, beams, score_next, width)
            kept = finished_sequences.best(
                finished, ended._replace(score=ended.score / (depth + 1.0) ** length_penalty)
            )
            if scores == "trie":
                children, certain = _split_forced(trie, allowed, children, top_k, length_penalty)
                kept = finished_sequences.best(kept, certain)
            return _go_on(trie, children, num_beams), kept

        branch = jnp.where(beams.end > 0, trie.first_child[beams.node + 1] - trie.first_child[beams.node], 0)
        rung = jnp.searchsorted(jnp.array(widths), branch.max())
        return *jax.lax.switch(rung, [partial(choose, width) for width in widths]), cache

    root = _Beams(
        score=jnp.zeros((batch, 1)),
        node=jnp.zeros((batch, 1), jnp.int32),
        end=jnp.full((batch, 1), len(trie.item_of_rank), jnp.int32),
        parent=jnp.zeros((batch, 1), jnp.int32),
    )
    nothing = finished_sequences.none(batch, top_k)
    cache = jax.tree.map(lambda leaf: leaf[:, :, :1], cache)
    start = jnp.full((batch, 1), PAD_ID, jnp.int32)
    beams, finished, cache = advance(jnp.int32(0), start, root, nothing, cache, [max(trie.root_branch, 1)])
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

    widths = [*(width for width in _WIDTHS if width < trie.max_branch), max(trie.max_branch, 1)]

    def body(state):
        depth, beams, finished, cache = state
        cache = follow_parents(cache, beams.parent)
        beams, finished, cache = advance(depth, trie.token[beams.node], beams, finished, cache, widths)
        return depth + 1, beams, finished, cache

    state = jax.lax.while_loop(must_choose, body, (jnp.int32(1), beams, finished, cache))
    depth, beams, finished, cache = state
    if scores == "vocabulary":
        score = jnp.where(may_win(depth, beams, finished), beams.score, -jnp.inf)
        cache = follow_parents(cache, beams.parent)
        finished = forced.finish(
            decoder, trie, allowed, depth, score, beams.node, beams.end, finished, cache, length_penalty
        )
    return finished_sequences.items_of(trie, allowed, finished)


def _look_ahead(
    trie: Trie, allowed: Permitted, beams: _Beams, score_next: ScoreNext, width: int
) -> tuple[Finished, _Children]:
    """What the beams may become: the sequences that end at them, with plain scores, and their children."""
    first, last = trie.first_child[beams.node], trie.first_child[beams.node + 1]
    child = first[..., None] + jnp.arange(width)  # [B, k, W]
    exist = child < last[..., None]
    children_start = trie.first_item[jnp.minimum(first, len(trie.first_item) - 1)]
    # End-of-sequence is the smallest token: what ends at a node has smaller ranks than what goes on.
    stop = jnp.where(first < last, children_start, beams.end)
    start = trie.first_item[beams.node]
    token = trie.token[jnp.minimum(child, len(trie.token) - 1)]
    child_score, end_score = score_next(token, exist, start < stop)

    ended = finished_sequences.of_run(allowed, beams.score + end_score, start, stop)
    is_open = exist & permitted.open_children(trie, allowed, beams.node, beams.end, width)
    score = jnp.where(is_open, beams.score[..., None] + child_score, -jnp.inf)
    batch = score.shape[0]
    return ended, _Children(score.reshape(batch, -1), child.reshape(batch, -1), width, last, beams.end)


def _split_forced(
    trie: Trie, allowed: Permitted, children: _Children, count: int, length_penalty: float
) -> tuple[_Children, Finished]:
    """Takes the children out whose sequence is certain: (the others, the best `count` of them, finished)."""
    is_node = jnp.minimum(children.node, len(trie.token) - 1)
    certain = trie.forced[is_node]
    length = trie.length_of_rank[trie.first_item[is_node]].astype(jnp.float32)
    score = jnp.where(certain, children.score / length**length_penalty, -jnp.inf)
    score, flat = jax.lax.top_k(score, min(count, score.shape[1]))
    node, end, _ = children.take(trie, flat)
    finished = finished_sequences.of_run(allowed, score, trie.first_item[jnp.minimum(node, len(trie.token) - 1)], end)
    return children._replace(score=jnp.where(certain, -jnp.inf, children.score)), finished


def _go_on(trie: Trie, children: _Children, num_beams: int) -> _Beams:
    """The `num_beams` best children."""
    score, flat = jax.lax.top_k(children.score, min(num_beams, children.score.shape[1]))
    spare = ((0, 0), (0, num_beams - score.shape[1]))
    score, flat = jnp.pad(score, spare, constant_values=-jnp.inf), jnp.pad(flat, spare)
    node, end, parent = children.take(trie, flat)
    alive = score > -jnp.inf
    node, end = jnp.where(alive, node, 0), jnp.where(alive, end, 0)
    slots, parent = slot_order(parent, alive)
    score, node, end = (jnp.take_along_axis(array, slots, axis=1) for array in (score, node, end))
    return _Beams(score, node, end, parent)

"""Beams that one sequence alone follows: with nothing left to choose, many tokens go through the decoder at once."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from recalign_jax.corpus.catalog import EOS_ID
from recalign_jax.decoding.cache import Cache
from recalign_jax.decoding.finished import Finished, best, of_run
from recalign_jax.decoding.permitted import Permitted
from recalign_jax.decoding.scoring import Decoder, log_normalizer
from recalign_jax.decoding.trie import Trie

_RUN = 4  # tokens of a beam a call; after each call the search may end, as the beams that go on can't win any more


def run_length(trie: Trie) -> int:
    """Tokens of a beam a call: no more than may be left after the first one."""
    return min(_RUN, max(trie.max_depth - 1, 1))


class _State(NamedTuple):
    depth: jax.Array  # int32 scalar, tokens of a prefix
    score: jax.Array  # float32 [B, K], log p(prefix); -inf for a beam that is finished
    node: jax.Array  # int32 [B, K]
    finished: Finished
    cache: Cache


def finish(
    decoder: Decoder,
    trie: Trie,
    permitted_items: Permitted,
    depth: jax.Array,
    score: jax.Array,
    node: jax.Array,
    end: jax.Array,
    finished: Finished,
    cache: Cache,
    length_penalty: float,
) -> Finished:
    """Decodes all that follows beams on forced nodes, with the scores that token after token would give.

    Args:
      decoder: of the next token; its cache has room for `trie.max_depth + run_length(trie) - 1` positions.
      trie: the catalogue.
      permitted_items: what may be returned.
      depth: int32 scalar, tokens of the beams' prefixes.
      score: float32 [B, K], log p(prefix); -inf takes a beam out.
      node: int32 [B, K], forced ones where the score is not -inf.
      end: int32 [B, K], one past the largest rank below each node.
      finished: the best so far.
      cache: of the beams.
      length_penalty: see `beam_search`.

    Returns:
      The best of `finished` and the beams' sequences.
    """
    start = trie.first_item[node]
    length = trie.length_of_rank[start]  # [B, K], end-of-sequence included
    penalty = length.astype(jnp.float32) ** length_penalty

    def may_improve(state: _State) -> jax.Array:
        return jnp.any(state.score / penalty > state.finished.score[:, -1:])

    size = run_length(trie)

    def run(state: _State) -> _State:
        nodes = [state.node]
        for _ in range(size):
            child = trie.first_child[nodes[-1]]
            nodes.append(jnp.where(child < trie.first_child[nodes[-1] + 1], child, nodes[-1]))
        path = jnp.stack(nodes, axis=2)  # [B, K, size + 1]
        tokens = trie.token[path]
        steps = state.depth + jnp.arange(size)
        following = jnp.where(steps == length[..., None] - 1, EOS_ID, tokens[..., 1:])
        hidden, cache = decoder.step(tokens[..., :-1], state.depth, state.cache)

        def log_prob(inputs: tuple[jax.Array, jax.Array]) -> jax.Array:
            logits = decoder.logits(inputs[0]).astype(jnp.float32)
            return jnp.take_along_axis(logits, inputs[1][..., None], axis=-1)[..., 0] - log_normalizer(logits)

        # Logits of one position at a time: those of all would be the largest array of the search.
        log_probs = jax.lax.map(log_prob, (jnp.moveaxis(hidden, 2, 0), jnp.moveaxis(following, 2, 0)))
        inside = steps[:, None, None] < length
        score = state.score + jnp.sum(jnp.where(inside, log_probs, 0.0), axis=0)
        done = length <= state.depth + size
        new = of_run(permitted_items, jnp.where(done | jnp.isnan(score), score / penalty, -jnp.inf), start, end)
        going = jnp.where(done, -jnp.inf, score)
        return _State(state.depth + size, going, path[..., -1], best(state.finished, new), cache)

    return jax.lax.while_loop(may_improve, run, _State(depth, score, node, finished, cache)).finished

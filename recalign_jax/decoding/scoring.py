"""What a decoder says of the next token: over the whole vocabulary, or over what goes on to an item."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from recalign_jax.corpus.catalog import EOS_ID
from recalign_jax.decoding.cache import Cache
from recalign_jax.decoding.trie import Trie

# XLA's CPU reduction with an exponential takes about eight times as long per element on rows wider than this.
_WIDE_ROW = 32_768
_LANES = 128  # vocabularies are padded to a multiple of it


class Decoder(NamedTuple):
    """A decoder as the search sees it. What a user's beams share (encoder state) it closes over.

    Attributes:
      step: (tokens int32 [B, k, S], position of the first of them, int32 scalar, cache) -> (hidden [B, k, S, D],
        cache). The first call is of one beam and PAD_ID at position 0, all others are of the number of beams.
      logits: hidden [..., D] -> [..., V], of the next token.
      token_logits: (hidden [..., D], tokens int32 [..., W]) -> [..., W], those logits alone.
    """

    step: Callable[[jax.Array, jax.Array, Cache], tuple[jax.Array, Cache]]
    logits: Callable[[jax.Array], jax.Array]
    token_logits: Callable[[jax.Array, jax.Array], jax.Array]


# (tokens [B, k, W], which of them there are, whether an item ends here [B, k]) -> log p(token) and log
# p(end-of-sequence), given the prefix.
ScoreNext = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


def over_vocabulary(trie: Trie, decoder: Decoder, hidden: jax.Array) -> ScoreNext:
    """The softmax over the whole vocabulary; hidden [B, k, D].

    Raises:
      ValueError: logits narrower than the trie's vocabulary.
    """
    logits = decoder.logits(hidden).astype(jnp.float32)
    if logits.shape[-1] < trie.vocab_size:
        raise ValueError(f"logits over {logits.shape[-1]} tokens for a trie over {trie.vocab_size}")
    base = -log_normalizer(logits)  # [B, k]; no normalised copy of the logits

    def score(tokens: jax.Array, exist: jax.Array, ends: jax.Array) -> tuple[jax.Array, jax.Array]:
        del exist, ends
        return base[..., None] + jnp.take_along_axis(logits, tokens, axis=-1), base + logits[..., EOS_ID]

    return score


def over_trie(trie: Trie, decoder: Decoder, hidden: jax.Array) -> ScoreNext:
    """The softmax over what goes on to an item, be that item allowed or not; hidden [B, k, D]."""
    del trie

    def score(tokens: jax.Array, exist: jax.Array, ends: jax.Array) -> tuple[jax.Array, jax.Array]:
        tokens = jnp.append(tokens, jnp.full((*tokens.shape[:2], 1), EOS_ID), axis=-1)
        exist = jnp.append(exist, ends[..., None], axis=-1)
        logits = jnp.where(exist, decoder.token_logits(hidden, tokens).astype(jnp.float32), -jnp.inf)
        log_probs = jax.nn.log_softmax(logits, axis=-1)
        return log_probs[..., :-1], log_probs[..., -1]

    return score


SCORES = {"vocabulary": over_vocabulary, "trie": over_trie}


def log_normalizer(logits: jax.Array) -> jax.Array:
    """Returns log sum exp of logits [..., V] over the whole vocabulary: float32 [...]."""
    logits = logits.astype(jnp.float32)
    if logits.shape[-1] > _WIDE_ROW and logits.shape[-1] % _LANES == 0:
        logits = jax.nn.logsumexp(logits.reshape(*logits.shape[:-1], -1, _LANES), axis=-1)
    return jax.nn.logsumexp(logits, axis=-1)

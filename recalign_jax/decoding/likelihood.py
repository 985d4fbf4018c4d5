"""Likelihood of given token sequences, from the logits of a teacher-forced decoder."""

import jax
import jax.numpy as jnp

from recalign_jax.decoding.trie import PAD_ID

# XLA's CPU reduction with an exponential takes about eight times as long per element on rows wider than this.
_WIDE_ROW = 32_768
_LANES = 128  # vocabularies are padded to a multiple of it


def log_normalizer(logits: jax.Array) -> jax.Array:
    """Returns log sum exp of logits [..., V] over the whole vocabulary: float32 [...]."""
    logits = logits.astype(jnp.float32)
    if logits.shape[-1] > _WIDE_ROW and logits.shape[-1] % _LANES == 0:
        logits = jax.nn.logsumexp(logits.reshape(*logits.shape[:-1], -1, _LANES), axis=-1)
    return jax.nn.logsumexp(logits, axis=-1)


def sequence_scores(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Sums the log-probabilities of the target tokens, end-of-sequence included, padding not.

    Args:
      logits: [..., T, V], at each position for the token of that position.
      targets: int32 [..., T], padded with PAD_ID.

    Returns:
      float32 [...], log p(sequence) with the softmax over the whole vocabulary.
    """
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0].astype(jnp.float32)  # [..., T]
    # Not a product with the mask: a masked logit of -inf at a padded position would make it NaN.
    return jnp.sum(jnp.where(targets != PAD_ID, chosen - log_normalizer(logits), 0.0), axis=-1)

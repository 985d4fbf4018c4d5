"""The plain formula of a score, which searches and evaluations are held against."""

import jax
import jax.numpy as jnp

from recalign_jax.corpus.catalog import PAD_ID


def sequence_scores(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Sums the log-probabilities of the target tokens, end of sequence included, padding not.

    Args:
      logits: [..., T, V], at each position for the token of that position.
      targets: int32 [..., T], padded with PAD_ID.

    Returns:
      float32 [...], log p(sequence) with the softmax over the whole vocabulary.
    """
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0].astype(jnp.float32)  # [..., T]
    # Not a product with the mask: a masked logit of -inf at a padded position would make it NaN.
    log_probs = chosen - jax.nn.logsumexp(logits.astype(jnp.float32), axis=-1)
    return jnp.sum(jnp.where(targets != PAD_ID, log_probs, 0.0), axis=-1)

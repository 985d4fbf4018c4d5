"""Cross-entropy with z-loss, and sums that add up over rows, hosts and steps."""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def cross_entropy(logits: jax.Array, targets: jax.Array, z_loss: float) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy and z-loss of every token.

    With Z the softmax's normaliser, the z-loss `z_loss * log(Z)**2` keeps log(Z) near zero (T5X's
    `cross_entropy_with_logits`; Mesh TensorFlow before it).

    Args:
      logits: [..., V] float32.
      targets: [...] int.
      z_loss: its coefficient; T5X trains with 1e-4.

    Returns:
      (cross-entropy, z-loss), both [...]; the training loss is their sum.
    """
    log_z = jax.nn.logsumexp(logits, axis=-1)
    target_logits = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return log_z - target_logits, z_loss * jnp.square(log_z)


def in_chunks(
    of_tokens: Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]],
    hidden: jax.Array,
    targets: jax.Array,
    chunks: int,
) -> tuple[jax.Array, jax.Array]:
    """`of_tokens(hidden, targets)`, a part of the target positions at a time.

    What it computes on the way (the logits) exists for one part only, also in the backward pass, which computes it
    again.

    Args:
      of_tokens: from [B, t, D] and [B, t] to two arrays [B, t].
      hidden: [B, T, D].
      targets: [B, T].
      chunks: parts; must divide T.

    Returns:
      Two arrays [B, T].
    """
    if chunks == 1:
        return of_tokens(hidden, targets)
    # By positions, not by rows: rows are split over devices, and every device has its share of every part.
    batch, length = targets.shape
    parts = jax.tree.map(
        lambda x: jnp.moveaxis(x.reshape(batch, chunks, -1, *x.shape[2:]), 1, 0), (hidden, targets)
    )  # [chunks, B, T / chunks, ...]
    values = jax.lax.map(lambda part: jax.checkpoint(of_tokens)(*part), parts)
    entropy, z = (jnp.moveaxis(x, 0, 1).reshape(batch, length) for x in values)
    return entropy, z


def summed(batch: dict[str, jax.Array], entropy: jax.Array, z: jax.Array, num_tasks: int) -> dict[str, jax.Array]:
    """Weighted sums of a batch: `metrics` divides them, after any number of them were added.

    Args:
      batch: rows as `packing.pack` writes them.
      entropy: cross-entropy of every target token, [B, T].
      z: its z-loss, [B, T].
      num_tasks: of the mixture.

    Returns:
      Scalars `loss`, `z_loss`, `weight` (samples or tokens, as the batch is normalised), `input_tokens`,
      `target_tokens`, `slots` (input tokens and padding), and [num_tasks] `task_loss`, `task_weight`, `task_tokens`.
    """
    weights = batch["decoder_loss_weights"]
    real = batch["decoder_segment_ids"] > 0
    tasks = batch["decoder_task_ids"].ravel()

    def by_task(values: jax.Array) -> jax.Array:
        return jax.ops.segment_sum(values.ravel().astype(jnp.float32), tasks, num_tasks)

    return {
        "loss": jnp.sum(weights * entropy),
        "z_loss": jnp.sum(weights * z),
        "weight": jnp.sum(weights),
        "input_tokens": jnp.sum(batch["encoder_segment_ids"] > 0, dtype=jnp.float32),
        "target_tokens": jnp.sum(real, dtype=jnp.float32),
        "slots": jnp.float32(batch["encoder_segment_ids"].size),
        "task_loss": by_task(weights * entropy),
        "task_weight": by_task(weights),
        "task_tokens": by_task(real),
    }

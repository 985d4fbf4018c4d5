"""Cross-entropy with z-loss, and sums that add up over rows, hosts and steps."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

OfTokens = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]
Part = tuple[jax.Array, ...]


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


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def in_chunks(
    of_tokens: OfTokens, chunks: int, embeddings: jax.Array, hidden: jax.Array, targets: jax.Array, weights: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The weighted loss of all target tokens, a part of the target positions at a time.

    Where gradients are asked for, those of a part are computed with its loss. So what lies between (the logits) exists
    for one part only and is computed once, and with parts that fit a processor's cache isn't written to memory.

    Args:
      of_tokens: pure, from (embeddings, [B, t, D], [B, t]) to cross-entropy and z-loss, [B, t] each.
      chunks: parts; must divide T.
      embeddings: what else the logits are made of, [V, D].
      hidden: [B, T, D].
      targets: [B, T].
      weights: [B, T].

    Returns:
      (the sum of weight * (cross-entropy + z-loss), which alone has a gradient; cross-entropy [B, T]; z-loss [B, T]).
    """
    of_part = _of_part(of_tokens)
    total, (entropy, z) = jax.lax.map(lambda part: of_part(embeddings, *part), _parts(chunks, hidden, targets, weights))
    return total.sum(), _joined(entropy), _joined(z)


def _in_chunks_forward(
    of_tokens: OfTokens, chunks: int, embeddings: jax.Array, hidden: jax.Array, targets: jax.Array, weights: jax.Array
) -> tuple[tuple[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    with_gradients = jax.value_and_grad(_of_part(of_tokens), argnums=(0, 1), has_aux=True)

    def add(carry: tuple[jax.Array, jax.Array], part: Part) -> tuple[tuple[jax.Array, jax.Array], Part]:
        total, of_embeddings = carry
        (of_this, (entropy, z)), (more, of_hidden) = with_gradients(embeddings, *part)
        return (total + of_this, of_embeddings + more), (entropy, z, of_hidden)

    zero = (jnp.zeros((), jnp.float32), jnp.zeros_like(embeddings))
    (total, of_embeddings), outputs = jax.lax.scan(add, zero, _parts(chunks, hidden, targets, weights))
    entropy, z, of_hidden = map(_joined, outputs)
    return (total, entropy, z), (of_embeddings, of_hidden)


def _in_chunks_backward(
    _: OfTokens, __: int, gradients: tuple[jax.Array, jax.Array], cotangents: tuple[jax.Array, ...]
) -> tuple[jax.Array, jax.Array, None, None]:
    of_embeddings, of_hidden = gradients
    of_total = cotangents[0]
    return of_total * of_embeddings, (of_total * of_hidden).astype(of_hidden.dtype), None, None


in_chunks.defvjp(_in_chunks_forward, _in_chunks_backward)


def _of_part(of_tokens: OfTokens) -> Callable[..., tuple[jax.Array, tuple[jax.Array, jax.Array]]]:
    def of_part(
        embeddings: jax.Array, hidden: jax.Array, targets: jax.Array, weights: jax.Array
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        entropy, z = of_tokens(embeddings, hidden, targets)
        return jnp.sum(weights * (entropy + z)), (entropy, z)

    return of_part


def _parts(chunks: int, *arrays: jax.Array) -> Part:
    """[B, T, ...] as [chunks, B, T / chunks, ...]."""
    # By positions, not by rows: rows are split over devices, and every device has its share of every part.
    return tuple(jnp.moveaxis(x.reshape(len(x), chunks, -1, *x.shape[2:]), 1, 0) for x in arrays)


def _joined(x: jax.Array) -> jax.Array:
    """[chunks, B, t, ...] as [B, chunks * t, ...]."""
    return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:])


def summed(batch: dict[str, jax.Array], entropy: jax.Array, z: jax.Array, num_tasks: int) -> dict[str, jax.Array]:
    """Weighted sums of a batch: `measures.means` divides them, after any number of them were added.

    None has a gradient: the total of `in_chunks` has.

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

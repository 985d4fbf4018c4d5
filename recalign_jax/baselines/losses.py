"""Losses of the next item: softmax over all items, over sampled ones, and binary cross-entropy.

Each takes hidden states [P, D], the items' vectors [I, D], targets [P] and weights [P] (0 for places that don't
count), and gives the weighted sum. A score is the dot product of hidden state and vector.
"""

import jax
import jax.numpy as jnp

# Scores that exist at the same time: 8 MB, which stay in a processor's cache. With very many items it is more, as
# products of matrices want some rows.
SCORES_AT_ONCE = 2**21
MIN_PLACES, MAX_PLACES = 16, 128

Sums = tuple[jax.Array, jax.Array]  # of losses, and the derivative by the vectors


@jax.custom_vjp
def full_softmax(hidden: jax.Array, vectors: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
    """Cross-entropy over all items.

    The scores of a few places at a time: loss and gradients are computed in the same pass, so that no [P, I] array
    is ever written to memory. On a CPU that is where most of the time of the plain formula goes.
    """
    return _full_softmax(hidden, vectors, targets, weights)[0]


def _full_softmax(
    hidden: jax.Array, vectors: jax.Array, targets: jax.Array, weights: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    size = min(len(hidden), max(MIN_PLACES, min(MAX_PLACES, SCORES_AT_ONCE // len(vectors))))
    missing = -len(hidden) % size
    parts = [jnp.pad(x, ((0, missing),) + ((0, 0),) * (x.ndim - 1)) for x in (hidden, targets, weights)]
    parts = [x.reshape(-1, size, *x.shape[1:]) for x in parts]

    def some(carry: Sums, part: list[jax.Array]) -> tuple[Sums, jax.Array]:
        (total, of_vectors), (h, target, weight) = carry, part
        scores = h @ vectors.T  # [p, I]
        highest = scores.max(axis=1, keepdims=True)
        exponentials = jnp.exp(scores - highest)
        normalizer = exponentials.sum(axis=1, keepdims=True)
        scores_of_targets = jnp.sum(h * vectors[target], axis=1)
        losses = highest[:, 0] + jnp.log(normalizer[:, 0]) - scores_of_targets
        # The derivative by the scores is (softmax - one at the target) * weight.
        scaled = exponentials * (weight[:, None] / normalizer)
        of_hidden = scaled @ vectors - weight[:, None] * vectors[target]
        of_vectors = (of_vectors + scaled.T @ h).at[target].add(-weight[:, None] * h)
        return (total + jnp.sum(weight * losses), of_vectors), of_hidden

    zero = (jnp.zeros((), hidden.dtype), jnp.zeros_like(vectors))
    (total, of_vectors), of_hidden = jax.lax.scan(some, zero, parts)
    return total, (of_hidden.reshape(-1, hidden.shape[1])[: len(hidden)], of_vectors)


def _backward(residuals: tuple[jax.Array, jax.Array], cotangent: jax.Array) -> tuple[jax.Array, jax.Array, None, None]:
    of_hidden, of_vectors = residuals
    return cotangent * of_hidden, cotangent * of_vectors, None, None


full_softmax.defvjp(_full_softmax, _backward)


def sampled_softmax(
    hidden: jax.Array, vectors: jax.Array, targets: jax.Array, weights: jax.Array, negatives: jax.Array
) -> jax.Array:
    """Cross-entropy over the target and `negatives` [S], uniform draws that all places share.

    A negative that is a place's target doesn't count for it. The S draws stand for all items: as they are drawn with
    equal probability, the correction by their expected number (Bengio & Senécal, 2008) is one constant for all of
    them, log(I / S).
    """
    of_target = jnp.sum(hidden * vectors[targets], axis=1)
    scores = hidden @ vectors[negatives].T + jnp.log(len(vectors) / len(negatives))  # [P, S]
    scores = jnp.where(negatives == targets[:, None], -jnp.inf, scores)
    normalizer = jnp.logaddexp(jax.nn.logsumexp(scores, axis=1), of_target)
    return jnp.sum(weights * (normalizer - of_target))


def binary_cross_entropy(
    hidden: jax.Array, vectors: jax.Array, targets: jax.Array, weights: jax.Array, negatives: jax.Array
) -> jax.Array:
    """Target against one negative a place, `negatives` [P] (Kang & McAuley 2018, equation 7)."""
    of_target = jnp.sum(hidden * vectors[targets], axis=1)
    of_negative = jnp.sum(hidden * vectors[negatives], axis=1)
    return jnp.sum(weights * (jax.nn.softplus(-of_target) + jax.nn.softplus(of_negative)))

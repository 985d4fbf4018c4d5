"""What every baseline that ranks gives, scores of all items, as ranked lists and as scores of candidates."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from recalign_jax.decoding.retrieve import padded, power_of_two
from seqio_tasks.examples import Query, Ranked, Recommend, ScoreCandidates, Scored

# Scores all items for queries: float32 [B, I], the higher the better.
Scores = Callable[[Sequence[Query]], ArrayLike]

# So that the scores of a batch take at most 64 MiB, however many items there are.
SCORES_AT_ONCE = 2**24
MAX_BATCH = 1024


def recommender(scores: Scores, num_items: int, top_k: int = 10) -> Recommend:
    """The `top_k` items with the highest scores, of equal ones the item with the smaller number (a random order)."""
    size = batch_size(num_items)

    def recommend(queries: Sequence[Query], excluded: Sequence[np.ndarray]) -> Ranked:
        for chosen, batch in batches(queries, size):
            without = [excluded[number] for number in chosen]
            rows = padded(without, size, power_of_two(max(map(len, without))), fill=-1)
            items, best = _best(jnp.asarray(scores(batch)), rows, min(top_k, num_items))
            missing = ((0, 0), (0, max(top_k - num_items, 0)))
            items = np.pad(np.asarray(items), missing, constant_values=-1)[: len(chosen)]
            yield chosen, items, np.pad(np.asarray(best), missing, constant_values=-np.inf)[: len(chosen)]

    return recommend


def scorer(scores: Scores, num_items: int) -> ScoreCandidates:
    """The scores of the candidates."""
    size = batch_size(num_items)

    def score(queries: Sequence[Query], candidates: np.ndarray) -> Scored:
        for chosen, batch in batches(queries, size):
            of_all = np.asarray(scores(batch))[: len(chosen)]
            found = np.take_along_axis(of_all, np.maximum(candidates[chosen], 0), axis=1)
            yield chosen, np.where(candidates[chosen] >= 0, found, -np.inf).astype(np.float32)

    return score


def batch_size(num_items: int) -> int:
    """How many queries are scored at a time."""
    return int(np.clip(SCORES_AT_ONCE // num_items, 1, MAX_BATCH))


def batches(queries: Sequence[Query], size: int) -> Iterator[tuple[np.ndarray, Sequence[Query]]]:
    """Parts of queries as (their numbers [b], `size` queries): the last query stands again where a batch isn't full.

    Histories of about one length stand together, so that arrays of them hold little padding.
    """
    order = np.argsort([len(query.history) for query in queries], kind="stable")
    for start in range(0, len(queries), size):
        chosen = order[start : start + size]
        batch = [queries[number] for number in chosen]
        yield chosen, batch + [batch[-1]] * (size - len(batch))


def newest(queries: Sequence[Query], length: int) -> np.ndarray:
    """The newest items of the histories, at most `length`, oldest first, -1 behind them: int32 [B, l]."""
    width = min(length, power_of_two(max(len(query.history) for query in queries)))  # few widths: few programs
    return padded([query.history[-length:] for query in queries], len(queries), width, fill=-1)


@partial(jax.jit, static_argnames="k")
def _best(scores: jax.Array, excluded: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """Items and scores [B, k] of the best that aren't excluded ([B, X], padded with -1); -1 where nothing is left."""
    rows = jnp.arange(len(scores))[:, None]
    beyond = scores.shape[1]  # out of bounds: dropped
    left = scores.at[rows, jnp.where(excluded < 0, beyond, excluded)].set(-jnp.inf, mode="drop")
    best, items = jax.lax.top_k(left, k)
    return jnp.where(best > -jnp.inf, items, -1).astype(jnp.int32), best

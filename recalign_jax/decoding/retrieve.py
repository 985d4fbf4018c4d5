"""From prompts to ranked items: length buckets, padding, and one compiled program a bucket."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from recalign_jax import partitioning
from recalign_jax.decoding import forced
from recalign_jax.decoding.beam_search import beam_search
from recalign_jax.decoding.finished import BeamResult
from recalign_jax.decoding.scoring import Decoder
from recalign_jax.decoding.trie import Trie
from recalign_jax.errors import RunError

# Prompts are padded to one of these lengths (then to multiples of the last), so that few programs are compiled.
BUCKETS = (32, 64, 128, 192, 256, 384, 512)

Generate = Callable[[Any, jax.Array, jax.Array, jax.Array | None, Trie], BeamResult]


def make_generate(
    graphdef: nnx.GraphDef,
    num_beams: int,
    top_k: int,
    length_penalty: float = 0.0,
    scores: str = "vocabulary",
    mesh: Mesh | AbstractMesh | None = None,
) -> Generate:
    """Returns the jitted `(params, tokens [B, L], excluded [B, X], allowed [B, A] or None, trie) -> BeamResult`.

    The arguments are those of `beam_search`, and the mesh over whose devices rows are split. The encoder's output and
    the cross-attention's keys and values exist once a user, whatever the number of beams.
    """

    def generate(
        params: Any, tokens: jax.Array, excluded: jax.Array, allowed: jax.Array | None, trie: Trie
    ) -> BeamResult:
        model = nnx.merge(graphdef, params)
        # The search makes room for the other beams itself.
        max_steps = trie.max_depth + forced.run_length(trie) - 1
        cross, cache = model.init_cache(model.encode(tokens), tokens > 0, num_beams=1, max_steps=max_steps)
        table = model.output_embeddings()
        decoder = Decoder(
            step=lambda last, position, cache: model.decode_step(last, position, cross, cache),
            logits=model.logits,
            token_logits=lambda hidden, tokens: model.token_logits(hidden, tokens, table),
        )
        return beam_search(
            decoder,
            cache,
            trie,
            num_beams=num_beams,
            top_k=top_k,
            excluded_items=excluded,
            allowed_items=allowed,
            length_penalty=length_penalty,
            scores=scores,
        )

    return jax.jit(generate if mesh is None else partitioning.on_mesh(generate, mesh))


def retrieve(
    generate: Generate,
    params: Any,
    trie: Trie,
    prompts: Sequence[np.ndarray],
    excluded: Sequence[np.ndarray],
    batch_size: int,
    sharding: NamedSharding,
    allowed: Sequence[np.ndarray] | None = None,
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Ranks items for every prompt, shortest prompts first.

    Args:
      generate: from `make_generate`.
      params: of the model.
      trie: the catalogue.
      prompts: token ids with end of sequence, [n] of [l].
      excluded: item indices that must not be returned, [n] of [x].
      batch_size: prompts a call; the last batch is filled up with empty prompts, whose results are dropped.
      sharding: of the batch axis.
      allowed: the only item indices that may be returned, [n] of [a]; None for all.

    Yields:
      (which prompts [b], items int32 [b, top_k], scores float32 [b, top_k]); see BeamResult.

    Raises:
      RunError: the model gave a prompt NaN; in all processes alike.
    """
    # Replicated once: each call would copy it to all devices but its own.
    trie = jax.device_put(trie, NamedSharding(sharding.mesh, PartitionSpec()))
    order = np.argsort([len(prompt) for prompt in prompts], kind="stable")
    width = _bucket(max((len(items) for items in excluded), default=0))
    allowed_width = _bucket(max((len(items) for items in allowed or []), default=0))
    running: tuple[np.ndarray, BeamResult] | None = None
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        tokens = padded([prompts[i] for i in chosen], batch_size, _bucket(len(prompts[chosen[-1]])), fill=0)
        without = padded([excluded[i] for i in chosen], batch_size, width, fill=-1)
        only = None if allowed is None else padded([allowed[i] for i in chosen], batch_size, allowed_width, fill=-1)
        tokens, without, only = jax.tree.map(functools.partial(_placed, sharding), (tokens, without, only))
        result = generate(params, tokens, without, only, trie)
        if running is not None:
            yield _fetched(*running)
        running = chosen, result  # the device is at work on it while the caller has the one before
    if running is not None:
        yield _fetched(*running)


def _placed(sharding: NamedSharding, rows: np.ndarray) -> jax.Array:
    """Of several processes all have all rows; `jax.device_put` would have them compared, and wait for the search."""
    return jax.make_array_from_callback(rows.shape, sharding, rows.__getitem__)


def _fetched(chosen: np.ndarray, result: BeamResult) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of several processes each computes some users and learns of the others'."""
    ranked, scores = multihost_utils.process_allgather(result, tiled=True)
    ranked, scores = ranked[: len(chosen)], scores[: len(chosen)]
    if count := int(np.isnan(scores).any(axis=1).sum()):
        raise RunError(
            f"The model gave {count} of {len(chosen)} prompts scores that are no numbers (NaN): it diverged in "
            "training. Give an earlier checkpoint, as CHECKPOINT_PATH=MODEL_DIR/best or MODEL_DIR/checkpoints/STEP."
        )
    return chosen, ranked, scores


def _bucket(length: int) -> int:
    for bucket in BUCKETS:
        if length <= bucket:
            return bucket
    return -(-length // BUCKETS[-1]) * BUCKETS[-1]


def padded(rows: Sequence[np.ndarray], count: int, width: int, fill: int) -> np.ndarray:
    """The rows [n] of [l], filled up to int32 [count, width]."""
    out = np.full((count, width), fill, np.int32)
    for number, row in enumerate(rows):
        out[number, : len(row)] = row
    return out


def power_of_two(least: int) -> int:
    """The smallest power of two that is at least that, and 1."""
    return 1 << max(least - 1, 0).bit_length()

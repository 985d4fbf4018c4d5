"""The trained language model as a recommender: queries in, ranked items out.

Evaluation and inference are handed what this makes; they don't know what is behind it.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import gin
import jax
import numpy as np
from flax import nnx

from recalign_jax.decoding.retrieve import make_generate, retrieve
from recalign_jax.decoding.trie import build_trie
from seqio_tasks import samples
from seqio_tasks.examples import Query, Ranked, Recommend
from seqio_tasks.specs import TaskSpec


@gin.configurable
@dataclasses.dataclass(frozen=True)
class DecodingOptions:
    """How items are decoded.

    Attributes:
      num_beams: K; wider finds better items and takes longer.
      top_k: items returned.
      batch_size: users at a time, over all devices.
      length_penalty: see `beam_search`.
      max_input_tokens: longest prompt; whole oldest items are dropped to fit.
    """

    num_beams: int = 20
    top_k: int = 10
    batch_size: int = 64
    length_penalty: float = 0.0
    max_input_tokens: int = 512


def make_recommender(
    spec: TaskSpec, graphdef: nnx.GraphDef, options: DecodingOptions, sharding: jax.sharding.Sharding
) -> Callable[[Any], Recommend]:
    """Returns parameters -> recommender, for a task's corpus, item format and vocabulary; compiles on first use."""
    catalog = spec.catalog
    trie = build_trie(catalog.tokens, catalog.lengths, spec.corpus.training_popularity, spec.num_tokens)
    generate = make_generate(graphdef, options.num_beams, options.top_k, options.length_penalty)

    def with_params(params: Any) -> Recommend:
        def recommend(queries: Sequence[Query], excluded: Sequence[np.ndarray]) -> Ranked:
            prompts = [samples.write_history(spec, query, options.max_input_tokens) for query in queries]
            return retrieve(generate, params, trie, prompts, excluded, options.batch_size, sharding)

        return recommend

    return with_params

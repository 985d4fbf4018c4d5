"""SASRec: self-attention over the history, one score an item (Kang & McAuley 2018, arXiv:1808.09781)."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import gin
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from recalign_jax.baselines import losses, sequences
from recalign_jax.baselines.fit import FitOptions, Problem, Run, fit, ranking_validation
from recalign_jax.baselines.scores import Scores, newest
from recalign_jax.corpus.corpus import Corpus
from recalign_jax.errors import InputError, check_choice, check_least
from seqio_tasks import examples

# Standard deviation of the first vectors of items and places.
INITIAL = 0.02

LOSSES = ("full_softmax", "sampled_softmax", "bce")


@gin.configurable
@dataclasses.dataclass(frozen=True)
class SasrecOptions(FitOptions):
    """Of model and training.

    Attributes:
      width: D, of all vectors.
      layers: blocks of attention and MLP.
      heads: of attention; divides `width`.
      dropout: of embeddings, attention weights and what blocks add.
      length: the longest history; of longer ones, the newest items count. Also of the packed rows.
      rows: packed rows of a batch.
      loss: one of LOSSES.
      negatives: of `sampled_softmax`, a batch.
    """

    learning_rate: float = 0.004
    epochs: int = 60
    eval_period: int = 2
    patience: int = 3
    averaging: float = 2.5
    width: int = 64
    layers: int = 2
    heads: int = 2
    dropout: float = 0.4
    length: int = 50
    rows: int = 20
    loss: str = "full_softmax"
    negatives: int = 2048

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("SasrecOptions.loss", self.loss, LOSSES)
        check_least(self, 1, "width", "layers", "heads", "length", "rows", "negatives")
        if not 0 <= self.dropout < 1:
            raise InputError(f"SasrecOptions.dropout is {self.dropout}: give a share from 0 to below 1.")
        if self.width % self.heads:
            raise InputError(f"SasrecOptions.width {self.width} is no multiple of {self.heads} heads.")


class Block(nnx.Module):
    """Attention and MLP, each on normalised input and added to it."""

    def __init__(self, options: SasrecOptions, rngs: nnx.Rngs):
        width = options.width
        self.attention_norm = nnx.LayerNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            options.heads, width, dropout_rate=options.dropout, decode=False, keep_rngs=False, rngs=rngs
        )
        self.mlp_norm = nnx.LayerNorm(width, rngs=rngs)
        self.inner = nnx.Linear(width, width, rngs=rngs)
        self.outer = nnx.Linear(width, width, rngs=rngs)
        self.dropout = nnx.Dropout(options.dropout)

    def __call__(self, x: jax.Array, mask: jax.Array, rngs: nnx.Rngs | None) -> jax.Array:
        """[B, L, D] to [B, L, D]; `mask` [B, 1, L, L]; without `rngs` there is no dropout."""
        deterministic = rngs is None
        attended = self.attention(self.attention_norm(x), mask=mask, deterministic=deterministic, rngs=rngs)
        x = x + self.dropout(attended, deterministic=deterministic, rngs=rngs)
        y = self.outer(self.dropout(jax.nn.gelu(self.inner(self.mlp_norm(x))), deterministic=deterministic, rngs=rngs))
        return x + self.dropout(y, deterministic=deterministic, rngs=rngs)


class Sasrec(nnx.Module):
    """The encoder; the items' vectors serve input and output."""

    def __init__(self, num_items: int, options: SasrecOptions, rngs: nnx.Rngs):
        init = nnx.initializers.normal(INITIAL)
        self.items = nnx.Embed(num_items, options.width, embedding_init=init, rngs=rngs)
        self.places = nnx.Embed(options.length, options.width, embedding_init=init, rngs=rngs)
        self.blocks = nnx.List([Block(options, rngs) for _ in range(options.layers)])
        self.norm = nnx.LayerNorm(options.width, rngs=rngs)
        self.dropout = nnx.Dropout(options.dropout)

    def __call__(self, items: jax.Array, segments: jax.Array, rngs: nnx.Rngs | None = None) -> jax.Array:
        """What comes after each place: [B, L, D].

        Args:
          items: int32 [B, L], -1 where there is nothing.
          segments: int32 [B, L], which of several histories in a row an item is of; each in consecutive places.
          rngs: with `dropout`; None for none.
        """
        length = items.shape[1]
        same = segments[:, :, None] == segments[:, None, :]  # [B, L, L]
        mask = same & jnp.tril(jnp.ones((length, length), bool))
        # Counted from the end, as the paper's padding to the left does: the newest item of a history that is longer
        # than those in training stands in a place that was trained.
        place = self.places.num_embeddings - jnp.sum(mask, axis=1)
        x = jnp.where((items >= 0)[..., None], self.items(jnp.maximum(items, 0)), 0) + self.places(place)
        x = self.dropout(x, deterministic=rngs is None, rngs=rngs)
        for block in self.blocks:
            x = block(x, mask[:, None], rngs)
        return self.norm(x)


def make(corpus: Corpus, options: SasrecOptions, run: Run) -> Scores:
    """Trains it, on every pair of an item and the next one in the training parts.

    Raises InputError when there is none; and as `fit`.
    """
    if not len(examples.window_users(corpus)):
        raise InputError(f"Corpus {corpus.name} has no user with two items to train on: no item has a next one.")
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: Sasrec(corpus.num_items, options, nnx.Rngs(0))))

    def loss(params: Any, batch: Any, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        dropout, drawn = jax.random.split(key)
        model = nnx.merge(graphdef, params)
        hidden = model(batch["items"], batch["segments"], nnx.Rngs(dropout=dropout)).reshape(-1, options.width)
        real = batch["targets"].ravel() >= 0
        targets, weights = jnp.maximum(batch["targets"].ravel(), 0), real.astype(jnp.float32)
        vectors = model.items.embedding[...]
        if options.loss == "full_softmax":
            total = losses.full_softmax(hidden, vectors, targets, weights)
        elif options.loss == "sampled_softmax":
            negatives = jax.random.randint(drawn, (options.negatives,), 0, corpus.num_items)
            total = losses.sampled_softmax(hidden, vectors, targets, weights, negatives)
        else:
            negatives = jax.random.randint(drawn, batch["items"].shape, 0, corpus.num_items)
            weights = weights * ~met(negatives, batch).ravel()
            total = losses.binary_cross_entropy(hidden, vectors, targets, weights, negatives.ravel())
        return total, jnp.sum(weights)

    def batches(epoch: int) -> Iterator[dict[str, np.ndarray]]:
        random = np.random.default_rng([run.seed, epoch])
        return sequences.batches(corpus, options.length, options.rows, random)

    @jax.jit
    def all_scores(params: Any, items: jax.Array) -> jax.Array:
        model = nnx.merge(graphdef, params)
        hidden = model(items, (items >= 0).astype(jnp.int32))
        last = jnp.maximum(jnp.sum(items >= 0, axis=1) - 1, 0)
        final = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]  # [B, D]
        return model.items.attend(final)

    def of_params(params: Any) -> Scores:
        return lambda queries: all_scores(params, newest(queries, options.length))

    problem = Problem(
        init=lambda key: nnx.split(Sasrec(corpus.num_items, options, nnx.Rngs(key)), nnx.Param, ...)[1],
        loss=loss,
        batches=batches,
        validate=ranking_validation(corpus, of_params),
        metric="validation_ndcg@10",
    )
    return of_params(fit(problem, options, run))


def met(negatives: jax.Array, batch: Any) -> jax.Array:
    """Which negatives [B, L] stand in the piece of a sequence that their place is of: bool [B, L]."""
    same = batch["segments"][:, :, None] == batch["segments"][:, None, :]  # [B, L, L]
    found = [negatives[:, :, None] == batch[name][:, None, :] for name in ("items", "targets")]
    return jnp.any(same & (found[0] | found[1]), axis=2)

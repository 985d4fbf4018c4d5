"""The T5.1.1 encoder-decoder, whole: `T5`, and the functions that split it once into a graph and parameters.

    graphdef, params = create(config, jax.random.key(0))
    logits = nnx.merge(graphdef, params)(encoder_tokens, decoder_input_tokens)    # pure: fine under jit and grad

`params` is a plain nested dict of float32 arrays. Its names are T5X's, except that the layers of a stack are one:
`encoder/layers_3/mlp/wo/kernel` [F, D] is `encoder/layers/mlp/wo/kernel` [layers, F, D] at index 3.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from recalign_jax.model.attention import causal_mask, segment_mask
from recalign_jax.model.blocks import DecoderLayer, EncoderLayer
from recalign_jax.model.config import T5Config
from recalign_jax.model.layers import Dense, Embedding, LayerNorm, dropout, dropout_noise, scan_layers, stack_layers
from recalign_jax.model.relative_position import RelativePositionBias
from recalign_jax.partitioning import constrain

MASKED_LOGIT = -1e9
_FEW_TOKENS = 100  # gathering the embeddings of more for every position takes longer than the whole product (CPU)
Params = dict[str, Any]


class Encoder(nnx.Module):
    """A stack of encoder layers."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        self.config = config
        self.relpos_bias = _bias(config, bidirectional=True, rngs=rngs)
        self.layers = stack_layers(lambda rngs: EncoderLayer(config, rngs=rngs), config.num_encoder_layers, rngs)
        self.encoder_norm = LayerNorm(config.emb_dim, config.layer_norm_epsilon)

    def __call__(self, x: jax.Array, mask: jax.Array, dropout_key: jax.Array | None) -> jax.Array:
        """Embedded tokens [B, L, D], mask [B, 1, L, L] -> [B, L, D]."""
        config = self.config
        bias = self.relpos_bias(x.shape[1])
        keys, noise = _dropout_of_stack(dropout_key, config, x.shape[0], config.num_encoder_layers)

        def body(layer: EncoderLayer, x: jax.Array, key: jax.Array | None) -> tuple[jax.Array, None]:
            return constrain(layer(x, mask, bias, key), "batch", None, None), None

        x, _ = scan_layers(self.layers, body, dropout(x, noise[0]), keys, config.remat)
        return dropout(self.encoder_norm(x), noise[1])


class Decoder(nnx.Module):
    """A stack of decoder layers."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        self.config = config
        self.relpos_bias = _bias(config, bidirectional=False, rngs=rngs)
        self.layers = stack_layers(lambda rngs: DecoderLayer(config, rngs=rngs), config.num_decoder_layers, rngs)
        self.decoder_norm = LayerNorm(config.emb_dim, config.layer_norm_epsilon)
        if not config.logits_via_embedding:
            self.logits_dense = Dense(config.emb_dim, config.vocab_size, rngs=rngs)

    def __call__(
        self, x: jax.Array, encoded: jax.Array, mask: jax.Array, cross_mask: jax.Array, dropout_key: jax.Array | None
    ) -> jax.Array:
        """Embedded tokens [B, T, D], encoded [B, L, D], masks [B, 1, T, T] and [B, 1, T, L] -> [B, T, D]."""
        config = self.config
        bias = self.relpos_bias(x.shape[1])
        keys, noise = _dropout_of_stack(dropout_key, config, x.shape[0], config.num_decoder_layers)

        def body(layer: DecoderLayer, x: jax.Array, key: jax.Array | None) -> tuple[jax.Array, None]:
            return constrain(layer(x, encoded, mask, bias, cross_mask, key), "batch", None, None), None

        x, _ = scan_layers(self.layers, body, dropout(x, noise[0]), keys, config.remat)
        return dropout(self.decoder_norm(x), noise[1])


class T5(nnx.Module):
    """Encoder, decoder and logits. `dropout_key=None` means no dropout, everywhere.

    Packed rows: segment ids count the samples of a row from 1, 0 is padding; tokens attend only within their
    segment, which must be contiguous. Without segment ids a row is one sample (segment 1). Positions are
    not needed: see RelativePositionBias.
    """

    def __init__(self, config: T5Config, rngs: nnx.Rngs):
        self.config = config
        self.token_embedder = Embedding(config.vocab_size, config.emb_dim, rngs=rngs)
        self.encoder = Encoder(config, rngs=rngs)
        self.decoder = Decoder(config, rngs=rngs)

    def __call__(
        self,
        encoder_tokens: jax.Array,
        decoder_input_tokens: jax.Array,
        encoder_segment_ids: jax.Array | None = None,
        decoder_segment_ids: jax.Array | None = None,
        dropout_key: jax.Array | None = None,
    ) -> jax.Array:
        """encoder_tokens [B, L], decoder_input_tokens [B, T], segment ids likewise -> logits [B, T, V] float32."""
        hidden = self.hidden(
            encoder_tokens, decoder_input_tokens, encoder_segment_ids, decoder_segment_ids, dropout_key
        )
        return self.logits(hidden)

    def hidden(
        self,
        encoder_tokens: jax.Array,
        decoder_input_tokens: jax.Array,
        encoder_segment_ids: jax.Array | None = None,
        decoder_segment_ids: jax.Array | None = None,
        dropout_key: jax.Array | None = None,
    ) -> jax.Array:
        """As the call, but what `logits` takes: [B, T, D] in the activation dtype."""
        keys = (None, None) if dropout_key is None else jax.random.split(dropout_key)
        encoded = self.encode(encoder_tokens, encoder_segment_ids, keys[0])
        return self.decode(
            encoded, encoder_tokens, decoder_input_tokens, encoder_segment_ids, decoder_segment_ids, keys[1]
        )

    def encode(
        self, tokens: jax.Array, segment_ids: jax.Array | None = None, dropout_key: jax.Array | None = None
    ) -> jax.Array:
        """tokens [B, L] (0 = padding), segment_ids [B, L] -> [B, L, D] in the activation dtype."""
        segments = _encoder_segments(tokens, segment_ids)
        x = constrain(self.token_embedder(tokens, self.config.dtype), "batch", None, None)
        return self.encoder(x, segment_mask(segments, segments), dropout_key)

    def decode(
        self,
        encoded: jax.Array,
        encoder_tokens: jax.Array,
        decoder_input_tokens: jax.Array,
        encoder_segment_ids: jax.Array | None = None,
        decoder_segment_ids: jax.Array | None = None,
        dropout_key: jax.Array | None = None,
    ) -> jax.Array:
        """The decoder's hidden states under teacher forcing, ready for `logits`.

        Args:
          encoded: [B, L, D] from `encode`.
          encoder_tokens: [B, L], for the mask alone.
          decoder_input_tokens: [B, T], targets shifted right: each sample begins with 0, which is no padding here.
          encoder_segment_ids: [B, L].
          decoder_segment_ids: [B, T]. Without them padding at a row's end is not masked, which no earlier
            position notices.
          dropout_key: see the class.

        Returns:
          [B, T, D] in the activation dtype.
        """
        length = decoder_input_tokens.shape[1]
        encoder_segments = _encoder_segments(encoder_tokens, encoder_segment_ids)
        if decoder_segment_ids is None:
            decoder_segment_ids = jnp.ones_like(decoder_input_tokens)
        x = constrain(self.token_embedder(decoder_input_tokens, self.config.dtype), "batch", None, None)
        mask = segment_mask(decoder_segment_ids, decoder_segment_ids) & causal_mask(length)
        return self.decoder(x, encoded, mask, segment_mask(decoder_segment_ids, encoder_segments), dropout_key)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[..., D] -> [..., V] float32; rows at and above `config.num_tokens` are -1e9."""
        return logits(self.config, hidden, self.output_embeddings())

    def output_embeddings(self) -> jax.Array:
        """The rows that `logits` multiplies with, [V, D] float32."""
        if self.config.logits_via_embedding:
            return self.token_embedder.embedding[...]
        return self.decoder.logits_dense.kernel[...].T

    def token_logits(self, hidden: jax.Array, tokens: jax.Array, embeddings: jax.Array) -> jax.Array:
        """`logits` at some tokens alone.

        Args:
          hidden: [..., D].
          tokens: int32 [..., W], below `config.num_tokens`.
          embeddings: from `output_embeddings`, made once where this is called often.

        Returns:
          float32 [..., W].
        """
        if tokens.shape[-1] > _FEW_TOKENS:
            return jnp.take_along_axis(self.logits(hidden), tokens, axis=-1)
        return jnp.einsum("...D,...WD->...W", _scaled(self.config, hidden), jnp.take(embeddings, tokens, axis=0))

    def init_cache(
        self, encoded: jax.Array, encoder_mask: jax.Array, num_beams: int, max_steps: int
    ) -> tuple[Params, Params]:
        """What `decode_step` needs, made once a batch of users.

        Args:
          encoded: [B, L, D] from `encode`.
          encoder_mask: bool [B, L], False for padding.
          num_beams: K.
          max_steps: T, the number of positions that will be decoded at most.

        Returns:
          (cross, cache). cross: the encoder's `key` [layers, B, N, H, L] and `value` [layers, B, N, L, H] (laid out
          for the products that use them) and `mask` [B, L]; it exists once a user, not once a beam, and never
          changes. cache: a dict whose leaves are [layers, B, K, N, T, H]; beams are reordered, added or dropped
          along axis 2.
        """
        config = self.config

        def body(layer: DecoderLayer, carry: None, _: None) -> tuple[None, Params]:
            key, value = layer.encoder_decoder_attention.keys_and_values(encoded)  # [B, L, N, H]
            return carry, {"key": key.transpose(0, 2, 3, 1), "value": value.transpose(0, 2, 1, 3)}

        _, cross = scan_layers(self.decoder.layers, body, None, None)
        shape = (config.num_decoder_layers, encoded.shape[0], num_beams, config.num_heads, max_steps, config.head_dim)
        cache = {"key": jnp.zeros(shape, config.dtype), "value": jnp.zeros(shape, config.dtype)}
        return {**cross, "mask": encoder_mask}, cache

    def decode_step(
        self, tokens: jax.Array, position: jax.Array | int, cross: Params, cache: Params
    ) -> tuple[jax.Array, Params]:
        """One step of incremental decoding: S tokens of every beam, for the logits of those that follow each.

        Equals `decode(...)` at these positions if those before were done in order, no dropout.

        Args:
          tokens: int32 [B, K, S], at position 0 the begin token 0.
          position: int32 scalar, of the first token, the same for all beams; position + S <= T. (Not checked: it is
            traced.)
          cross, cache: from `init_cache`, cache as returned by the step before.

        Returns:
          ([B, K, S, D], ready for `logits` or `token_logits`; cache).
        """
        position = jnp.asarray(position, jnp.int32)
        here = position + jnp.arange(tokens.shape[2])
        bias = self.decoder.relpos_bias.at(jnp.arange(cache["key"].shape[4]) - here[:, None])  # [N, S, T]
        cross_mask = cross["mask"][:, None, None, :]  # [B, 1, 1, L]

        def body(layer: DecoderLayer, carry: Any, inputs: Any) -> tuple[Any, None]:
            (x, cache), (number, cross_of_layer) = carry, inputs
            return layer.step(x, cache, number, position, bias, cross_of_layer, cross_mask), None

        inputs = (jnp.arange(self.config.num_decoder_layers), {name: cross[name] for name in ("key", "value")})
        carry = (self.token_embedder(tokens.reshape(len(tokens), -1), self.config.dtype), cache)
        (x, cache), _ = scan_layers(self.decoder.layers, body, carry, inputs)
        return self.decoder.decoder_norm(x).reshape(*tokens.shape, -1), cache


def logits(config: T5Config, hidden: jax.Array, embeddings: jax.Array) -> jax.Array:
    """`T5.logits` as a function of all that it depends on; embeddings [V, D] are `T5.output_embeddings`."""
    # One matrix product, as in Dense.
    flat = _scaled(config, hidden).reshape(-1, config.emb_dim)
    found = jnp.dot(flat, embeddings.T).reshape(*hidden.shape[:-1], -1)
    if config.num_tokens is None:
        return found
    return jnp.where(jnp.arange(found.shape[-1]) < config.num_tokens, found, MASKED_LOGIT)


def graph(config: T5Config) -> nnx.GraphDef:
    """The static half of a model, for `nnx.merge(graphdef, params)`. Allocates nothing."""
    return nnx.split(nnx.eval_shape(lambda: T5(config, nnx.Rngs(0))))[0]


def init_params(config: T5Config, key: jax.Array) -> Params:
    """Random parameters, initialized as T5X does it. Pure: put it under jit with out_shardings for a large model."""
    return nnx.to_pure_dict(nnx.state(T5(config, nnx.Rngs(params=key)), nnx.Param))


def abstract_params(config: T5Config) -> Params:
    """The parameters' shapes and dtypes (`jax.ShapeDtypeStruct`). Allocates nothing."""
    return jax.eval_shape(lambda: init_params(config, jax.random.key(0)))


def create(config: T5Config, key: jax.Array) -> tuple[nnx.GraphDef, Params]:
    """Returns (graphdef, params) of a new model."""
    return graph(config), init_params(config, key)


def _scaled(config: T5Config, hidden: jax.Array) -> jax.Array:
    hidden = hidden.astype(jnp.float32)
    return hidden / config.emb_dim**0.5 if config.scale_decoder_outputs else hidden


def _bias(config: T5Config, bidirectional: bool, rngs: nnx.Rngs) -> RelativePositionBias:
    return RelativePositionBias(
        config.num_heads,
        config.relative_attention_num_buckets,
        config.relative_attention_max_distance,
        bidirectional,
        rngs=rngs,
    )


def _encoder_segments(tokens: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
    """[B, L] int32: the segment of each token, 0 for padding."""
    return jnp.where(tokens > 0, 1 if segment_ids is None else segment_ids, 0)


def _dropout_of_stack(
    key: jax.Array | None, config: T5Config, batch: int, layers: int
) -> tuple[jax.Array | None, list[jax.Array | None]]:
    """(keys of the layers [layers], noise for a stack's input and output, each [B, 1, D])."""
    keys = None if key is None else jax.random.split(key, layers + 1)
    noise = dropout_noise(None if keys is None else keys[-1], config.dropout_rate, batch, [(1, config.emb_dim)] * 2)
    return None if keys is None else keys[:-1], noise

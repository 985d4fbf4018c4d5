"""One encoder layer and one decoder layer. Each sublayer is x + dropout(f(layer_norm(x)))."""

import jax
import jax.numpy as jnp
from flax import nnx

from recalign_jax.model.attention import Attention, softmax
from recalign_jax.model.config import T5Config
from recalign_jax.model.layers import LayerNorm, Mlp, dropout, dropout_noise


class EncoderLayer(nnx.Module):
    """Self-attention and MLP."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        self.config = config
        self.pre_attention_layer_norm = LayerNorm(config.emb_dim, config.layer_norm_epsilon)
        self.attention = Attention(config, rngs=rngs)
        self.pre_mlp_layer_norm = LayerNorm(config.emb_dim, config.layer_norm_epsilon)
        self.mlp = Mlp(config.emb_dim, config.mlp_dim, config.mlp_activations, rngs=rngs)

    def __call__(self, x: jax.Array, mask: jax.Array, bias: jax.Array, dropout_key: jax.Array | None) -> jax.Array:
        """x [B, L, D], mask [B, 1, L, L], bias [N, L, L] -> [B, L, D]."""
        config, batch, width = self.config, x.shape[0], (1, x.shape[2])
        shapes = [(config.num_heads, 1, x.shape[1]), width, (1, config.mlp_dim), width]
        noise = dropout_noise(dropout_key, config.dropout_rate, batch, shapes)
        y = self.pre_attention_layer_norm(x)
        x = x + dropout(self.attention(y, y, mask, bias, noise[0]), noise[1])
        y = self.pre_mlp_layer_norm(x)
        return x + dropout(self.mlp(y, noise[2]), noise[3])


class DecoderLayer(nnx.Module):
    """Self-attention, attention to the encoder, and MLP."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        self.config = config
        self.pre_self_attention_layer_norm = LayerNorm(config.emb_dim, config.layer_norm_epsilon)
        self.self_attention = Attention(config, rngs=rngs)
        self.pre_cross_attention_layer_norm = LayerNorm(config.emb_dim, config.layer_norm_epsilon)
        self.encoder_decoder_attention = Attention(config, rngs=rngs)
        self.pre_mlp_layer_norm = LayerNorm(config.emb_dim, config.layer_norm_epsilon)
        self.mlp = Mlp(config.emb_dim, config.mlp_dim, config.mlp_activations, rngs=rngs)

    def __call__(
        self,
        x: jax.Array,
        encoded: jax.Array,
        mask: jax.Array,
        bias: jax.Array,
        cross_mask: jax.Array,
        dropout_key: jax.Array | None,
    ) -> jax.Array:
        """One layer under teacher forcing.

        Args:
          x: [B, T, D].
          encoded: [B, L, D].
          mask: bool [B, 1, T, T].
          bias: [N, T, T].
          cross_mask: bool [B, 1, T, L].
          dropout_key: None for no dropout.

        Returns:
          [B, T, D].
        """
        config, batch, width = self.config, x.shape[0], (1, x.shape[2])
        own, cross = (config.num_heads, 1, x.shape[1]), (config.num_heads, 1, encoded.shape[1])
        shapes = [own, width, cross, width, (1, config.mlp_dim), width]
        noise = dropout_noise(dropout_key, config.dropout_rate, batch, shapes)
        y = self.pre_self_attention_layer_norm(x)
        x = x + dropout(self.self_attention(y, y, mask, bias, noise[0]), noise[1])
        y = self.pre_cross_attention_layer_norm(x)
        x = x + dropout(self.encoder_decoder_attention(y, encoded, cross_mask, None, noise[2]), noise[3])
        y = self.pre_mlp_layer_norm(x)
        return x + dropout(self.mlp(y, noise[4]), noise[5])

    def step(
        self,
        x: jax.Array,
        cache: dict[str, jax.Array],
        layer: jax.Array,
        position: jax.Array,
        bias: jax.Array,
        cross: dict[str, jax.Array],
        cross_mask: jax.Array,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """One decoding step of every beam, S tokens long, no dropout.

        Args:
          x: [B, K * S, D], the tokens of a user's beams take the place of positions.
          cache: `key` and `value` of all layers, [layers, B, K, N, T, H]; this layer's are written from `position` on.
          layer: int32 scalar, this layer's index in the cache.
          position: int32 scalar, of the first token.
          bias: [N, S, T].
          cross: `key` [B, N, H, L] and `value` [B, N, L, H] of the encoder, shared by the beams.
          cross_mask: bool [B, 1, 1, L].

        Returns:
          ([B, K * S, D], cache).
        """
        batch, beams, steps = *cache["key"].shape[1:3], bias.shape[1]

        def by_beam(heads: jax.Array) -> jax.Array:
            """[B, K * S, N, H] -> [B, K, N, S, H]."""
            return heads.reshape(batch, beams, steps, *heads.shape[2:]).swapaxes(2, 3)

        y = self.pre_self_attention_layer_norm(x)
        keys, values = self.self_attention.keys_and_values(y)
        # Written into the carried cache of all layers: XLA does that in place, where a cache a layer would be copied.
        start = (layer, 0, 0, 0, position, 0)
        cache = {
            "key": jax.lax.dynamic_update_slice(cache["key"], by_beam(keys)[None], start),
            "value": jax.lax.dynamic_update_slice(cache["value"], by_beam(values)[None], start),
        }
        cached_keys = jax.lax.dynamic_index_in_dim(cache["key"], layer, keepdims=False)  # [B, K, N, T, H]
        cached_values = jax.lax.dynamic_index_in_dim(cache["value"], layer, keepdims=False)
        queries = by_beam(self.self_attention.queries(y))
        logits = jnp.einsum("BKNSH,BKNTH->BKNST", queries, cached_keys, preferred_element_type=jnp.float32)
        mask = jnp.arange(bias.shape[2]) <= position + jnp.arange(steps)[:, None]  # [S, T]
        weights = softmax(logits, mask, bias).astype(x.dtype)
        attended = jnp.einsum("BKNST,BKNTH->BKSNH", weights, cached_values)
        x = x + self.self_attention.output(attended.reshape(batch, beams * steps, *attended.shape[3:]))

        attention = self.encoder_decoder_attention
        queries = attention.queries(self.pre_cross_attention_layer_norm(x))  # [B, K * S, N, H]
        logits = jnp.einsum("BKNH,BNHL->BNKL", queries, cross["key"], preferred_element_type=jnp.float32)
        weights = softmax(logits, cross_mask, None).astype(x.dtype)
        x = x + attention.output(jnp.einsum("BNKL,BNLH->BKNH", weights, cross["value"]))
        return x + self.mlp(self.pre_mlp_layer_norm(x), None), cache

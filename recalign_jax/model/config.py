"""The numbers that make a T5.1.1 model, set by `gin_configs/models/*.gin`."""

import dataclasses

import gin
import jax
import jax.numpy as jnp

from recalign_jax.errors import InputError, check_choice, check_kinds, check_least, check_number

ACTIVATIONS = ("gelu", "relu", "silu", "linear")
ACTIVATION_DTYPES = ("auto", "float32", "bfloat16")
REMAT_POLICIES = ("none", "minimal", "full")


@gin.configurable
@dataclasses.dataclass(frozen=True, kw_only=True)
class T5Config:
    """Sizes and numerics of a model. Names are T5X's (`t5x/examples/t5/network.py`) where it has one.

    The trainer replaces `vocab_size` and `num_tokens` by those of its vocabulary (`dataclasses.replace`).
    Raises InputError for a name that is not among the known ones, a value of another kind, and sizes that can't be.
    """

    emb_dim: int  # D
    num_heads: int  # N
    head_dim: int  # H
    num_encoder_layers: int
    num_decoder_layers: int
    mlp_dim: int  # F
    vocab_size: int = 32128  # V, rows of the embedding: T5's, 32,100 tokens padded to a multiple of 128
    num_tokens: int | None = None  # rows that stand for a token; logits of the rows above are masked. None: all
    mlp_activations: tuple[str, ...] = ("gelu", "linear")  # one input kernel each, multiplied; gelu is the tanh form
    dropout_rate: float = 0.1
    activation_dtype: str = "auto"  # auto: bfloat16 on TPU and GPU, float32 on CPU
    logits_via_embedding: bool = False  # the transposed embedding takes the place of a kernel of its own
    scale_decoder_outputs: bool = False  # by 1/sqrt(D) before the logits, as T5 1.0 does with logits_via_embedding
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    remat: str = "none"  # what the backward pass computes again: attention's logits, all of attention's products, all

    def __post_init__(self) -> None:
        check_kinds(self)
        check_choice("T5Config.activation_dtype", self.activation_dtype, ACTIVATION_DTYPES)
        check_choice("T5Config.remat", self.remat, REMAT_POLICIES)
        for activation in self.mlp_activations:
            check_choice("T5Config.mlp_activations", activation, ACTIVATIONS)
        if not self.mlp_activations:
            raise InputError("T5Config.mlp_activations is empty: give one of each input kernel, as ('gelu', 'linear').")
        check_least(self, 1, "emb_dim", "num_heads", "head_dim", "num_encoder_layers", "num_decoder_layers", "mlp_dim")
        check_least(self, 4, "relative_attention_num_buckets")  # two for either direction
        check_least(self, self.relative_attention_num_buckets // 2 + 1, "relative_attention_max_distance")
        check_number("T5Config.layer_norm_epsilon", self.layer_norm_epsilon)
        if not 0 <= self.dropout_rate < 1:
            raise InputError(f"T5Config.dropout_rate is {self.dropout_rate}: must be at least 0 and below 1.")
        if self.num_tokens is not None and not 0 < self.num_tokens <= self.vocab_size:
            raise InputError(f"T5Config.num_tokens is {self.num_tokens}: must be in 1..vocab_size ({self.vocab_size})")

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype that activations are computed in on the default backend."""
        if self.activation_dtype == "auto":
            return jnp.dtype("float32" if jax.default_backend() == "cpu" else "bfloat16")
        return jnp.dtype(self.activation_dtype)

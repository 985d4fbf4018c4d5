"""The sizes of a T5.1.1, read off the shapes of its parameters: for checkpoints that don't say them."""

from collections.abc import Mapping

from recalign_jax.errors import InputError
from recalign_jax.model.config import T5Config

_LOGITS = "decoder/logits_dense/kernel"


def infer(shapes: Mapping[str, tuple[int, ...]], where: str) -> T5Config:
    """Returns the configuration of a model.

    What no shape tells is T5.1.1's own: tanh-approximated GELU, norm epsilon 1e-6, positions up to 128; a model without
    a kernel for its logits scales the decoder's output, as in T5X.

    Args:
      shapes: of our parameters (stacked), by path.
      where: for messages.

    Raises:
      InputError: naming the parameter that a T5.1.1 would have.
    """

    def shape(path: str) -> tuple[int, ...]:
        if path not in shapes:
            raise InputError(f"{where}: no parameter {path!r}: not a T5.1.1 (T5 v1.1, FLAN-T5).")
        return shapes[path]

    vocab_size, emb_dim = shape("token_embedder/embedding")
    num_heads, num_buckets = shape("encoder/relpos_bias/rel_embedding")
    num_encoder_layers, _, joined_heads = shape("encoder/layers/attention/query/kernel")
    shape("encoder/layers/mlp/wi_1/kernel")  # T5 1.0 has one input kernel, wi
    return T5Config(
        emb_dim=emb_dim,
        num_heads=num_heads,
        head_dim=joined_heads // num_heads,
        num_encoder_layers=num_encoder_layers,
        num_decoder_layers=shape("decoder/layers/mlp/wo/kernel")[0],
        mlp_dim=shape("encoder/layers/mlp/wi_0/kernel")[2],
        vocab_size=vocab_size,
        logits_via_embedding=_LOGITS not in shapes,
        scale_decoder_outputs=_LOGITS not in shapes,
        relative_attention_num_buckets=num_buckets,
    )

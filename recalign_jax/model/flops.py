"""Floating-point operations of a model, from its sizes alone."""

from recalign_jax.model.config import T5Config


def forward_flops(config: T5Config, batch_size: int, input_length: int, target_length: int) -> float:
    """FLOPs of the matrix products of one forward pass; a multiplication and an addition are two.

    Counted: all projections, attention's two products (over whole rows, as they are computed, also where rows are
    packed or causal), MLPs and logits. Not counted: what grows with the size of activations alone (norms, softmax,
    dropout) and the lookup of embeddings.
    """
    length, targets = input_length, target_length
    joined = config.num_heads * config.head_dim
    projection = 2 * config.emb_dim * joined  # of one token
    mlp = 2 * (len(config.mlp_activations) + 1) * config.emb_dim * config.mlp_dim

    def attention(queries: int, keys: int) -> float:
        return (2 * queries + 2 * keys) * projection + 2 * 2 * queries * keys * joined

    encoder = attention(length, length) + length * mlp
    decoder = attention(targets, targets) + attention(targets, length) + targets * mlp
    logits = targets * 2 * config.emb_dim * config.vocab_size
    return batch_size * (config.num_encoder_layers * encoder + config.num_decoder_layers * decoder + logits)


def train_step_flops(config: T5Config, batch_size: int, input_length: int, target_length: int) -> float:
    """FLOPs of one training step of all parameters, over all devices: three times the forward pass.

    The backward pass has two products for each of the forward pass. What `remat` computes again is not counted (model
    FLOPs, as in model FLOPs utilization), and the optimizer isn't.

    Args:
      config: of the model.
      batch_size: rows of a step.
      input_length: L.
      target_length: T.
    """
    return 3 * forward_flops(config, batch_size, input_length, target_length)

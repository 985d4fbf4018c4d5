"""Floating-point operations of a model, from its sizes alone."""

from collections.abc import Collection

from recalign_jax.model.config import T5Config

# Products of two activations: their backward pass has one product for each of the two.
_ATTENTION = "attention"


def products(config: T5Config, input_length: int, target_length: int) -> dict[str, float]:
    """FLOPs of the matrix products of one row's forward pass, by kernel; a multiplication and an addition are two.

    Counted: all projections, MLPs and the logits by the names of their kernels (`logits_dense` also where the embedding
    stands for it), and `attention` (two products, over whole rows, as they are computed, also where rows are packed or
    causal). Not counted: what grows with the size of
    activations alone (norms, softmax, dropout) and the lookup of embeddings.
    """
    layers, more = config.num_encoder_layers, config.num_decoder_layers
    length, targets = input_length, target_length
    projection = 2 * config.emb_dim * config.num_heads * config.head_dim  # of one token
    mlp = 2 * config.emb_dim * config.mlp_dim
    queries = layers * length + 2 * more * targets  # itself, and across
    keys = layers * length + more * (targets + length)
    pairs = layers * length**2 + more * (targets**2 + targets * length)
    tokens = layers * length + more * targets
    found = {name: float(queries * projection) for name in ("query", "out")}
    found |= {name: float(keys * projection) for name in ("key", "value")}
    found |= {f"wi_{n}": float(tokens * mlp) for n in range(len(config.mlp_activations))}
    found["wo"] = float(tokens * mlp)
    found[_ATTENTION] = float(2 * 2 * pairs * config.num_heads * config.head_dim)
    found["logits_dense"] = float(targets * 2 * config.emb_dim * config.vocab_size)
    return found


def train_step_flops(
    config: T5Config, batch_size: int, input_length: int, target_length: int, trained: Collection[str] | None = None
) -> float:
    """FLOPs of one training step, over all devices: of all parameters three times the forward pass.

    The backward pass has two products for each of the forward pass. For a kernel that isn't trained the one of its
    gradient falls away, and where embeddings aren't either, no gradient goes into the first layers' queries, keys and
    values. What `remat` computes again is not counted (model FLOPs, as in model FLOPs utilization), nor
    are adapters' own small products and the optimizer.

    Args:
      config: of the model.
      batch_size: rows of a step.
      input_length: L.
      target_length: T.
      trained: the kernels with adapters, as `LoraOptions.trained`; None trains everything.
    """
    by_kernel = products(config, input_length, target_length)
    if trained is None:
        return 3 * batch_size * sum(by_kernel.values())
    of_row = sum((3 if name in (*trained, _ATTENTION) else 2) * value for name, value in by_kernel.items())
    into_first = 3 * (input_length + target_length) * 2 * config.emb_dim * config.num_heads * config.head_dim
    return batch_size * (of_row - into_first)

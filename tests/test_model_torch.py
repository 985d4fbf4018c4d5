"""Our T5 against transformers' on the same random weights: logits, and the gradient of every parameter."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from recalign_jax.checkpoint import huggingface, stacking
from recalign_jax.model import t5
from recalign_jax.model.config import T5Config

torch = pytest.importorskip("torch", reason="torch is the reference here")
transformers = pytest.importorskip("transformers")

TOLERANCE = 1e-4
FAST_COMPILATION = {"xla_backend_optimization_level": 0}
# Heads that don't add up to the width, unequal depths, and more positions than the last bucket's distance (128).
CONFIG = T5Config(
    vocab_size=96, emb_dim=32, num_heads=3, head_dim=8, num_encoder_layers=2, num_decoder_layers=3, mlp_dim=48
)
LENGTHS = ((150, 20), (150, 9), (77, 20), (3, 1))  # real tokens of encoder and decoder, a row


def torch_model(tied: bool, scaled: bool, seed: int = 0):
    config = transformers.T5Config(
        vocab_size=CONFIG.vocab_size,
        d_model=CONFIG.emb_dim,
        num_heads=CONFIG.num_heads,
        d_kv=CONFIG.head_dim,
        num_layers=CONFIG.num_encoder_layers,
        num_decoder_layers=CONFIG.num_decoder_layers,
        d_ff=CONFIG.mlp_dim,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        dropout_rate=0.0,
    )
    config.scale_decoder_outputs = scaled
    model = transformers.T5ForConditionalGeneration(config)
    if not tied:
        model.lm_head.weight = torch.nn.Parameter(torch.empty(CONFIG.vocab_size, CONFIG.emb_dim))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.copy_(1 + 0.3 * noise)  # norms
            else:
                embeds = "shared" in name or "relative" in name
                parameter.copy_(noise if embeds else noise / parameter.shape[1] ** 0.5)
    return model


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    length, steps = (max(sizes) for sizes in zip(*LENGTHS, strict=True))
    encoder, decoder = (rng.integers(2, CONFIG.vocab_size, (len(LENGTHS), size)) for size in (length, steps))
    for row, (real, real_steps) in enumerate(LENGTHS):
        encoder[row, real:], decoder[row, real_steps:] = 0, 0
    decoder_inputs = np.pad(decoder, ((0, 0), (1, 0)))[:, :-1]
    return encoder, decoder_inputs, decoder


def torch_logits(model, batch):
    encoder, decoder_inputs, targets = (torch.from_numpy(array) for array in batch)
    return model(
        input_ids=encoder,
        attention_mask=(encoder > 0).long(),
        decoder_input_ids=decoder_inputs,
        decoder_attention_mask=(targets > 0).long(),
    ).logits


def our_params(model, config):
    arrays = {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}
    if config.logits_via_embedding:
        del arrays["lm_head.weight"]
    return huggingface.load_params(arrays, config, "torch")


# transformers 5 has all three: T5 1.1 as published, T5 1.1 made from scratch (tied, not scaled), and T5 1.0.
@pytest.mark.parametrize(("tied", "scaled"), [(False, False), (True, False), (True, True)])
def test_logits_equal_torch(batch, tied, scaled):
    config = dataclasses.replace(CONFIG, logits_via_embedding=tied, scale_decoder_outputs=scaled)
    model = torch_model(tied, scaled)
    with torch.no_grad():
        expected = torch_logits(model, batch).numpy()
    graphdef = t5.graph(config)
    forward = jax.jit(lambda params: nnx.merge(graphdef, params)(*batch[:2]), compiler_options=FAST_COMPILATION)
    logits = forward(our_params(model, config))
    assert logits.dtype == jnp.float32
    real = batch[2] > 0
    assert np.abs(expected[real]).max() > 1  # the tolerance is an absolute one
    np.testing.assert_allclose(logits[real], expected[real], rtol=0, atol=TOLERANCE)


def test_gradients_of_every_parameter_equal_torch(batch):
    model = torch_model(tied=False, scaled=False)
    real = torch.from_numpy(batch[2] > 0)
    targets = torch.from_numpy(batch[2])
    torch.nn.functional.cross_entropy(torch_logits(model, batch)[real], targets[real]).backward()
    gradients = {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}
    expected = stacking.flatten(huggingface.load_params(gradients, CONFIG, "gradients"))

    graphdef, params = t5.graph(CONFIG), our_params(model, CONFIG)

    def loss(params):
        log_probabilities = jax.nn.log_softmax(nnx.merge(graphdef, params)(*batch[:2]))
        chosen = jnp.take_along_axis(log_probabilities, batch[2][..., None], axis=-1)[..., 0]
        return -jnp.sum(chosen * (batch[2] > 0)) / jnp.sum(batch[2] > 0)

    for path, gradient in stacking.flatten(jax.jit(jax.grad(loss), compiler_options=FAST_COMPILATION)(params)).items():
        assert np.abs(expected[path]).max() > 0, path
        np.testing.assert_allclose(gradient, expected[path], rtol=0, atol=TOLERANCE, err_msg=path)

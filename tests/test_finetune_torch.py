"""Training against the references: T5X's loss, torch's gradients of it, and twenty steps of fine-tuning next to torch.

`benchmarks/finetune_torch.py` fine-tunes all of FLAN-T5-small; here the model is narrower.
"""

import jax
import numpy as np
import pytest

from recalign_jax.checkpoint import huggingface, stacking, t5x
from recalign_jax.model import t5
from recalign_jax.training.step import StepOptions, loss_sums
from tests.checkpoint_folders import T5X_TINY
from tests.shared_data import shared
from tests.test_model_torch import CONFIG, batch, our_params, torch, torch_logits, torch_model  # noqa: F401 (fixture)

pytestmark = pytest.mark.usefixtures("fast_compilation")
TOLERANCE = 1e-4
FAST_COMPILATION = {"xla_backend_optimization_level": 0}


def rows(encoder, decoder_inputs, targets):
    """A batch of one sample a row, every target token of weight one."""
    real = (targets > 0).astype(np.int32)
    return {
        "encoder_input_tokens": encoder,
        "decoder_input_tokens": decoder_inputs,
        "decoder_target_tokens": targets,
        "encoder_segment_ids": (encoder > 0).astype(np.int32),
        "decoder_segment_ids": real,
        "decoder_loss_weights": real.astype(np.float32),
        "decoder_task_ids": np.zeros_like(real),
    }


def loss(config, z_loss):
    """Parameters, batch -> (mean loss, sums), as the train step has it."""

    def of(params, one):
        total, sums = loss_sums(t5.graph(config), params, one, StepOptions(z_loss), 1, None)
        return total / sums["weight"], sums

    return of


@pytest.mark.parametrize("kind", ["legacy", "orbax"])
def test_loss_and_z_loss_are_t5xs(kind):
    folder = shared("fixtures/t5x_tiny")
    golden = np.load(folder / f"{kind}_golden.npz")
    params = t5x.load_params(t5x.read_arrays(folder / f"{kind}_checkpoint_6"), T5X_TINY, kind)
    names = ("encoder_input_tokens", "decoder_input_tokens", "decoder_target_tokens")
    of_params = jax.jit(loss(T5X_TINY, 1e-4), compiler_options=FAST_COMPILATION)
    mean, sums = of_params(params, rows(*(golden[name] for name in names)))
    assert float(sums["weight"]) == golden["weight_sum"]
    assert float(sums["z_loss"]) == pytest.approx(float(golden["z_loss_sum"]), rel=1e-5)
    # T5X counts the z-loss in its loss.
    assert float(sums["loss"] + sums["z_loss"]) == pytest.approx(float(golden["loss_sum"]), rel=1e-6)
    assert float(mean) == pytest.approx(float(golden["loss_sum"] / golden["weight_sum"]), rel=1e-6)


def test_gradients_with_z_loss_equal_torch(batch):  # noqa: F811
    model = torch_model(tied=False, scaled=False)
    real, targets = torch.from_numpy(batch[2] > 0), torch.from_numpy(batch[2])
    logits = torch_logits(model, batch)[real]
    z_loss = 0.05  # five hundred times the usual, so that it shows
    expected_loss = (
        torch.nn.functional.cross_entropy(logits, targets[real]) + z_loss * (logits.logsumexp(-1) ** 2).mean()
    )
    expected_loss.backward()
    gradients = {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}
    expected = stacking.flatten(huggingface.load_params(gradients, CONFIG, "gradients"))

    with_gradient = jax.jit(jax.value_and_grad(loss(CONFIG, z_loss), has_aux=True), compiler_options=FAST_COMPILATION)
    (found_loss, sums), found = with_gradient(our_params(model, CONFIG), rows(*batch))
    assert float(sums["z_loss"] / sums["weight"]) > 0.1
    assert float(found_loss) == pytest.approx(expected_loss.item(), abs=TOLERANCE)
    for path, gradient in stacking.flatten(found).items():
        assert np.abs(expected[path]).max() > 0, path
        np.testing.assert_allclose(gradient, expected[path], rtol=0, atol=TOLERANCE, err_msg=path)


def test_twenty_steps(tmp_path):
    from benchmarks.finetune_torch import compare

    config = shared("data/flan_t5_configs/small.json")
    found = compare(
        *(config, tmp_path, 20), d_model=64, d_kv=16, d_ff=128, num_layers=2, num_decoder_layers=3, vocab_size=256
    )
    assert found["largest_difference"] < 1e-3, found
    assert len(found["ours"]) == len(found["torch"]) == 20
    assert found["ours"][-1] < 0.8 * found["ours"][0]

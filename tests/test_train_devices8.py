"""The train loop over eight devices: every mesh gives the loss curve of one device."""

import json

import jax
import numpy as np
import pytest

from recalign_jax import partitioning
from recalign_jax.model.config import T5Config
from recalign_jax.training.input_pipeline import InputOptions
from recalign_jax.training.memory import Job
from recalign_jax.training.optimizer import make_optimizer
from recalign_jax.training.preemption import Preemption
from recalign_jax.training.step import StepOptions
from recalign_jax.training.train import TrainOptions, train
from seqio_tasks import specs
from seqio_tasks.components import CorpusTask

pytestmark = [pytest.mark.devices8, pytest.mark.usefixtures("fast_compilation")]

STEPS = 4


def losses(model_dir, mesh, corpus, words) -> list[float]:
    components = [
        (CorpusTask(specs.make_spec(corpus, family, "token", words, specs.TaskOptions())), rate)
        for family, rate in (("retrieval", 0.8), ("mim", 0.2))
    ]
    config = T5Config(
        emb_dim=32, num_heads=4, head_dim=8, num_encoder_layers=2, num_decoder_layers=2, mlp_dim=64,
        vocab_size=512, num_tokens=components[0][0].num_tokens, dropout_rate=0.0, activation_dtype="float32",
    )  # fmt: skip
    options = TrainOptions(model_dir=str(model_dir), train_steps=STEPS, log_period=1, checkpoint_period=STEPS)
    lengths = {"inputs": 64, "targets": 16}
    rows = InputOptions(task_feature_lengths=lengths, batch_size=16, window=64, data_shards=2)
    job = Job(config, make_optimizer("adafactor", 1e-2), mesh, StepOptions(), rows)
    train(options, job, components, [], {}, Preemption())
    return [json.loads(line)["loss"] for line in (model_dir / "metrics.jsonl").read_text().splitlines()]


def test_every_mesh_gives_the_same_loss_curve(tmp_path, shop_corpus, shop_words):
    one = partitioning.make_mesh({}, jax.devices()[:1])
    expected = losses(tmp_path / "one", one, shop_corpus, shop_words)
    assert len(expected) == STEPS
    assert expected[-1] < expected[0]
    for shape in ({"data": 8}, {"fsdp": 8}, {"data": 2, "model": 4}):
        name = "_".join(f"{axis}{size}" for axis, size in shape.items())
        found = losses(tmp_path / name, partitioning.make_mesh(shape), shop_corpus, shop_words)
        np.testing.assert_allclose(found, expected, rtol=1e-5, err_msg=name)

"""The benchmark against torch: both sides train on the same samples, and it runs through."""

import numpy as np
import pytest

from recalign_jax.model.config import T5Config
from recalign_jax.training import input_pipeline, packing
from recalign_jax.training.input_pipeline import InputOptions
from seqio_tasks.writing import Limits, Sample

torch = pytest.importorskip("torch")
from benchmarks import train_throughput  # noqa: E402

pytestmark = pytest.mark.usefixtures("fast_compilation")
CONFIG = T5Config(
    emb_dim=16, num_heads=2, head_dim=8, num_encoder_layers=1, num_decoder_layers=1, mlp_dim=32, vocab_size=128
)
OPTIONS = InputOptions({"inputs": 32, "targets": 16}, batch_size=2, window=32, data_shards=1)
LIMITS = Limits(32, 16)


class Task:
    """Samples of random tokens."""

    name, num_tokens = "random", 100

    def num_examples(self, split):
        return 64

    def shortest_row(self):
        return {"inputs": 1, "targets": 1}

    def render(self, split, index, epoch, seed, limits):
        random = np.random.default_rng(index)
        sizes = (random.integers(1, limits.inputs), random.integers(1, limits.targets))
        return Sample(*(random.integers(1, 100, size).astype(np.int32) for size in sizes))


@pytest.fixture(autouse=True)
def one_thread():
    """Threads of torch that wait for each other take minutes where the cores are busy with other tests."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def stream():
    return input_pipeline.make_stream([(Task(), 1.0)], "train", 0, OPTIONS)


def as_set(samples):
    return {(tuple(map(int, inputs)), tuple(map(int, targets))) for inputs, targets in samples}


def test_unpacking_gives_the_samples_that_were_packed():
    samples = [Task().render("train", index, 0, 0, LIMITS) for index in range(20)]
    rows = packing.pack([s.inputs for s in samples], [s.targets for s in samples], np.zeros(20, int), 32, 16, "samples")
    unpacked = list(train_throughput.unpack(rows))
    assert len(unpacked) == 20
    assert as_set(unpacked) == as_set((s.inputs, s.targets) for s in samples)


def test_batches_of_torch_hold_every_sample_once():
    samples = [(s.inputs, s.targets) for s in (Task().render("train", i, 0, 0, LIMITS) for i in range(20))]
    for batches in (train_throughput.by_length(samples, 6, 2, 3), train_throughput.shuffled(samples, 6)):
        assert len(batches) == 6
        assert sum(map(len, batches)) == 20
        assert as_set(sample for batch in batches for sample in batch) == as_set(samples)
    inputs, targets = samples[0]
    padded = train_throughput.collate(samples[:2])
    assert padded["input_ids"].shape[1] == max(len(samples[0][0]), len(samples[1][0]))
    np.testing.assert_array_equal(padded["input_ids"][0][: len(inputs)], inputs)
    np.testing.assert_array_equal(padded["attention_mask"].sum(1), [len(s[0]) for s in samples[:2]])
    assert (padded["labels"][0] == train_throughput.IGNORED).sum() == padded["labels"].shape[1] - len(targets)


@pytest.mark.parametrize("optimizer", ["adafactor", "adamw"])
def test_both_sides_count_the_same_tokens(optimizer, monkeypatch):
    counted = []

    def counting(make):
        def trainer(*args):
            train, tokens = make(*args), []
            counted.append(tokens)

            def one_round(turn):
                result = train(turn)
                tokens.append(result[0])
                return result

            return one_round

        return trainer

    for name in ("our_trainer", "torch_trainer"):
        monkeypatch.setattr(train_throughput, name, counting(getattr(train_throughput, name)))
    result = train_throughput.compare(stream(), CONFIG, optimizer, steps=2, rounds=1, pool=4)
    assert len(counted) == 3
    assert len({sum(tokens) for tokens in counted}) == 1
    model = train_throughput.torch_model(CONFIG)
    assert result["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert result["ratio"] > 0
    assert 0.5 < result["packing_efficiency"] <= 1

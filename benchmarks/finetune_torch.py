"""Fine-tuning next to torch: the same FLAN-T5, batches and AdamW, and the loss of every step.

    python benchmarks/finetune_torch.py --config ../shared/data/flan_t5_configs/small.json

transformers makes a model with random weights and writes it to a folder. We load that as INITIAL_CHECKPOINT, and both
train on random tokens, a sample a row, without dropout. Prints one JSON line: `largest_difference` of the losses, the
losses of `ours` and `torch`, `parameters`, and `ours_seconds` and `torch_seconds` of the steps after the first. Aim: a
difference below 0.001 at every one of 20 steps. Needs torch.
"""

import argparse
import dataclasses
import json
import pathlib
import sys
import tempfile
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from benchmarks.train_throughput import untied
from recalign_jax import partitioning
from recalign_jax.checkpoint import huggingface
from recalign_jax.checkpoint.initial import load_initial
from recalign_jax.model import t5
from recalign_jax.training import packing
from recalign_jax.training.optimizer import make_optimizer
from recalign_jax.training.step import StepOptions, TrainState, make_train_step

LEARNING_RATE, WEIGHT_DECAY, Z_LOSS = 1e-3, 0.01, 1e-4
ROWS, LENGTH, TARGET_LENGTH = 8, 24, 12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, type=pathlib.Path, help="config.json of a FLAN-T5")
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(compare(args.config, pathlib.Path(folder), args.steps)))


def compare(config: pathlib.Path, folder: pathlib.Path, steps: int, **changes: int) -> dict[str, Any]:
    """Trains both and returns what is printed; `changes` of the config make a smaller model."""
    model = write_model(config, folder, changes)
    batches = make_batches(steps, model.config.vocab_size)
    ours, our_seconds = train_ours(folder, batches)
    theirs, their_seconds = train_torch(model, batches)
    return {
        "largest_difference": max(abs(a - b) for a, b in zip(ours, theirs, strict=True)),
        "ours": ours,
        "torch": theirs,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "ours_seconds": our_seconds,
        "torch_seconds": their_seconds,
    }


def write_model(
    config: pathlib.Path, folder: pathlib.Path, changes: dict[str, int]
) -> transformers.T5ForConditionalGeneration:
    """A model with transformers' random initialization, also written to the folder."""
    torch.manual_seed(0)
    values = json.loads(config.read_text(encoding="utf-8")) | changes | {"dropout_rate": 0.0}
    model = untied(transformers.T5ForConditionalGeneration(transformers.T5Config.from_dict(values)))
    model.save_pretrained(folder)
    return model


def make_batches(steps: int, vocabulary: int) -> list[tuple[list[np.ndarray], list[np.ndarray]]]:
    """(inputs, targets) a step, one sample a row, of different lengths."""
    random = np.random.default_rng(0)

    def samples(longest: int, tokens: int) -> list[np.ndarray]:
        return [random.integers(3, tokens, size).astype(np.int32) for size in random.integers(1, longest + 1, ROWS)]

    # Targets are of a few tokens, so that there is something to learn.
    return [(samples(LENGTH, vocabulary), samples(TARGET_LENGTH, 40)) for _ in range(steps)]


def train_ours(folder: pathlib.Path, batches: list[tuple[list[np.ndarray], list[np.ndarray]]]):
    """Losses (z-loss not included) and seconds, from the folder by our train step."""
    config = dataclasses.replace(huggingface.read_config(folder), dropout_rate=0.0, activation_dtype="float32")
    mesh = partitioning.make_mesh({}, jax.devices()[:1])
    params = load_initial(str(folder), config, 0, partitioning.with_shardings(t5.abstract_params(config), mesh))
    optimizer = make_optimizer("adamw", LEARNING_RATE, WEIGHT_DECAY)
    step = jax.jit(make_train_step(t5.graph(config), optimizer, StepOptions(Z_LOSS), 1, 0), donate_argnums=0)
    state = TrainState(jnp.int32(0), params, optimizer.init(params))
    losses, started = [], 0.0
    for number, (inputs, targets) in enumerate(batches):
        # Each sample is packed by itself: a row a sample.
        rows = [
            packing.pack([tokens], [target], np.zeros(1, int), LENGTH, TARGET_LENGTH, "samples")
            for tokens, target in zip(inputs, targets, strict=True)
        ]
        batch = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
        state, sums = step(state, batch)
        losses.append(float(sums["loss"] / sums["weight"]))
        if number == 0:
            started = time.monotonic()
    return losses, time.monotonic() - started


def train_torch(model, batches: list[tuple[list[np.ndarray], list[np.ndarray]]]):
    """Losses (z-loss not included) and seconds, by a plain loop in torch."""
    names = decayed_names(model)
    groups = [
        {"params": [p for name, p in model.named_parameters() if (name in names) == decays], "weight_decay": decay}
        for decays, decay in ((True, WEIGHT_DECAY), (False, 0.0))
    ]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.999), eps=1e-8)
    model.train()
    losses, started = [], 0.0
    for number, (inputs, targets) in enumerate(batches):
        tokens, wanted = padded(inputs), padded(targets)
        real = wanted > 0
        decoder_inputs = torch.nn.functional.pad(wanted, (1, 0))[:, :-1]
        logits = model(
            input_ids=tokens, attention_mask=(tokens > 0).long(), decoder_input_ids=decoder_inputs,
            decoder_attention_mask=real.long(),
        ).logits  # fmt: skip
        log_z = torch.logsumexp(logits, dim=-1)
        entropy = log_z - logits.gather(-1, wanted[..., None])[..., 0]
        weights = real / real.sum(dim=1, keepdim=True) / len(inputs)  # every sample counts once
        loss = (weights * entropy).sum()
        (loss + (weights * Z_LOSS * log_z**2).sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if number == 0:
            started = time.monotonic()
    return losses, time.monotonic() - started


def decayed_names(model) -> set[str]:
    """The parameters that our weight decay takes: all but norms, embeddings and position biases."""
    return {name for name, p in model.named_parameters() if p.ndim == 2 and "shared" not in name and "bias" not in name}


def padded(rows: list[np.ndarray]) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence([torch.from_numpy(row).long() for row in rows], batch_first=True)


if __name__ == "__main__":
    main()

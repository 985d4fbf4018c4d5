"""Training next to torch: useful (non-padding) tokens a second, encoder's and decoder's, of the same model and samples.

    python benchmarks/train_throughput.py --corpus amazon_beauty --vocabulary spiece.model

We train as `recalign train` does: packed rows from the input pipeline, the real train step. torch trains transformers'
T5 on the same samples, as many a step, by a plain loop, twice: in batches of samples of similar length (`grouped`), and
in batches as the samples come (`dynamic`). Both pad to the longest of a batch. All three take turns in one process,
after steps that are not counted (compilation, first allocations), and in which freed memory stays, as in `recalign
train`: torch gains from that as well. float32, dropout as the model file says.

Prints one JSON line: `ratio` (ours over grouped) and `ratio_dynamic` (ours over dynamic), both the median over rounds,
tokens a second of the three (medians as well), and how full rows and batches are. All samples are rendered before the
rounds. Aim: a ratio of at least 1. The corpus must be prepared. Needs torch.
"""

import argparse
import itertools
import json
import math
import pathlib
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
import torch
import transformers

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from benchmarks import our_training
from benchmarks.our_training import LEARNING_RATE, Trainer, our_trainer, packed_batches
from recalign_jax.model import t5
from recalign_jax.model.config import T5Config
from recalign_jax.training.input_pipeline import Stream

TORCH_OPTIMIZERS = {"adafactor": torch.optim.Adafactor, "adamw": torch.optim.AdamW}

IGNORED = -100  # the label of padding, for transformers
PADDED = (("encoder", "input_ids"), ("decoder", "labels"))

Sample = tuple[np.ndarray, np.ndarray]  # input and target tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    our_training.add_arguments(parser)
    parser.add_argument("--optimizer", default="adafactor", choices=TORCH_OPTIMIZERS)
    parser.add_argument("--steps", type=int, default=3, help="of a round")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    name, stream, config = our_training.set_up(args)
    result = compare(stream, config, args.optimizer, args.steps, args.rounds)
    print(json.dumps({"model": pathlib.Path(args.model).stem, "mixture": name} | result))


def compare(
    stream: Stream, config: T5Config, optimizer: str, steps: int, rounds: int, pool: int = 50
) -> dict[str, Any]:
    """Trains all three in turns and returns what is printed; a round before the others isn't counted.

    torch's batches are made of the samples of `pool` steps (transformers' default for grouping by length), or of all
    if there are more. In a shorter run it trains on some of them, evenly spaced from short to long.
    """
    number = steps * (rounds + 1)
    rows = [batch for batch, _ in itertools.islice(packed_batches(stream), max(number, pool))]
    samples = [sample for batch in rows for sample in unpack(batch)]
    orders = {
        "grouped": by_length(samples, len(rows), steps, rounds + 1),
        "dynamic": shuffled(samples, len(rows))[:number],
    }
    batches = {name: [collate(batch) for batch in order] for name, order in orders.items()}
    state, step = our_training.state_and_step(config, optimizer, len(stream.tasks))
    trainers = {"ours": our_trainer(state, step, our_training.on_device(stream), steps)}
    trainers |= {name: torch_trainer(config, optimizer, padded, steps) for name, padded in batches.items()}
    rates: dict[str, list[float]] = {name: [] for name in trainers}
    for turn in range(rounds + 1):
        for name, train in trainers.items():
            tokens, taken = train(turn)
            if turn:
                rates[name].append(tokens / taken)

    def ratio(peer: str) -> float:
        return round(statistics.median(a / b for a, b in zip(rates["ours"], rates[peer], strict=True)), 3)

    return {
        "ratio": ratio("grouped"),
        "ratio_dynamic": ratio("dynamic"),
        **{f"{name}_tokens_per_second": round(statistics.median(values)) for name, values in rates.items()},
        "packing_efficiency": fill(rows, "encoder_segment_ids"),
        "decoder_efficiency": fill(rows, "decoder_segment_ids"),
        **{f"{name}_{side}_efficiency": fill(padded, key) for name, padded in batches.items() for side, key in PADDED},
        "optimizer": optimizer,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(t5.abstract_params(config))),
        "lengths": stream.options.task_feature_lengths,
        "batch_size": stream.options.batch_size,
        "samples_per_step": round(len(samples) / len(rows), 1),
        "steps": steps * rounds,
        "threads": torch.get_num_threads(),
    }


def unpack(batch: dict[str, np.ndarray]) -> Iterator[Sample]:
    """The samples of packed rows."""
    names = ("encoder_input_tokens", "encoder_segment_ids", "decoder_target_tokens", "decoder_segment_ids")
    for inputs, input_segments, targets, target_segments in zip(*(batch[name] for name in names), strict=True):
        for segment in range(1, input_segments.max() + 1):
            yield inputs[input_segments == segment], targets[target_segments == segment]


def by_length(samples: Sequence[Sample], batches: int, steps: int, rounds: int) -> list[list[Sample]]:
    """Batches of inputs of similar length, for every round evenly spaced among all `batches`, short to long."""
    ordered = cut(sorted(samples, key=lambda sample: len(sample[0])), batches)
    chosen = ((np.arange(steps * rounds) + 0.5) * batches / (steps * rounds)).astype(int)
    return [ordered[i] for turn in range(rounds) for i in chosen[turn::rounds]]


def shuffled(samples: Sequence[Sample], number: int) -> list[list[Sample]]:
    """Batches in a random order."""
    return cut([samples[i] for i in np.random.default_rng(0).permutation(len(samples))], number)


def cut(samples: Sequence[Sample], number: int) -> list[list[Sample]]:
    return [[samples[i] for i in part] for part in np.array_split(np.arange(len(samples)), number)]


def collate(batch: Sequence[Sample]) -> dict[str, torch.Tensor]:
    """Padded to the longest of the batch: what transformers' model takes."""

    def pad(side: int, value: int) -> torch.Tensor:
        rows = [torch.from_numpy(sample[side]).long() for sample in batch]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)

    inputs = pad(0, 0)
    return {"input_ids": inputs, "attention_mask": (inputs > 0).long(), "labels": pad(1, IGNORED)}


def torch_trainer(
    config: T5Config, optimizer_name: str, batches: Sequence[dict[str, torch.Tensor]], steps: int
) -> Trainer:
    """A plain loop in torch; round r trains on its own `steps` of the batches."""
    model = torch_model(config)
    optimizer = TORCH_OPTIMIZERS[optimizer_name](model.parameters(), lr=LEARNING_RATE)

    def train(turn: int) -> tuple[int, float]:
        chosen = batches[turn * steps : (turn + 1) * steps]
        started = time.perf_counter()
        for batch in chosen:
            model(**batch, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        seconds = time.perf_counter() - started
        return sum(int(batch[key].ge(1).sum()) for batch in chosen for _, key in PADDED), seconds

    return train


def torch_model(config: T5Config) -> transformers.T5ForConditionalGeneration:
    """transformers' T5 of the same sizes, in training mode; SystemExit for a model whose logits share the embedding."""
    if config.logits_via_embedding:
        raise SystemExit("The side in torch has a kernel of its own for the logits: take a model that has one, too.")
    model = transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=config.vocab_size,
            d_model=config.emb_dim,
            d_kv=config.head_dim,
            d_ff=config.mlp_dim,
            num_layers=config.num_encoder_layers,
            num_decoder_layers=config.num_decoder_layers,
            num_heads=config.num_heads,
            dropout_rate=config.dropout_rate,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
            decoder_start_token_id=0,
        )
    )
    return untied(model).train()


def untied(model: transformers.T5ForConditionalGeneration) -> transformers.T5ForConditionalGeneration:
    """The model with a kernel of its own for the logits: transformers 5 ties what it makes, whatever the config."""
    if model.lm_head.weight is model.shared.weight:
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.shared.weight) / model.config.d_model**0.5)
        model.config.tie_word_embeddings = False
    return model


def fill(batches: Sequence[dict[str, Any]], name: str) -> float:
    """The share of slots that hold a token."""
    return round(sum(int((b[name] > 0).sum()) for b in batches) / sum(math.prod(b[name].shape) for b in batches), 3)


if __name__ == "__main__":
    main()

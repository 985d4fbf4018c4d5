"""Our side of train_t5x.py, which runs it."""

import argparse
import dataclasses
import itertools
import json
import math
import pathlib
import sys
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import our_training, turns
from benchmarks.our_training import Batch
from recalign_jax import partitioning
from recalign_jax.corpus.corpus import data_dir_or_default
from recalign_jax.training import input_pipeline


def main() -> None:
    args = argparse.Namespace(**json.loads(sys.argv[1]))
    name, stream, config = our_training.set_up(args)
    rows = [batch for batch, _ in itertools.islice(our_training.packed_batches(stream), args.steps)]
    theirs = [t5x_features(batch) for batch in rows]
    np.savez(f"{args.folder}/rows.npz", **{key: np.stack([batch[key] for batch in theirs]) for key in theirs[0]})

    sharding = partitioning.batch_sharding(our_training.one_device())
    same_rows = itertools.cycle([(input_pipeline.put(batch, sharding), None) for batch in rows])
    state, step = our_training.state_and_step(config, "adafactor", len(stream.tasks))
    started = time.perf_counter()
    compiled = step.lower(state, next(same_rows)[0], None).compile()
    compile_seconds = time.perf_counter() - started
    copy = jax.tree.map(jnp.copy, state)
    train = our_training.our_trainer(state, compiled, our_training.on_device(stream), args.steps)
    train_same = our_training.our_trainer(copy, compiled, same_rows, args.steps)
    # As many shards as `recalign train` has.
    input_stream = dataclasses.replace(stream, options=dataclasses.replace(stream.options, data_shards=None))
    input_cycles = cycles(our_training.on_device(input_stream), input_stream.options.num_shards())

    ready = {
        "compile_seconds": round(compile_seconds, 2),
        "parameters": sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state.params)),
        "model": dataclasses.asdict(config),
        "mixture": name,
        "data_dir": str(pathlib.Path(data_dir_or_default(args.data_dir)).resolve()),
        "vocabulary": str(pathlib.Path(args.vocabulary).resolve()),
        "lengths": stream.options.task_feature_lengths,
        **{key: getattr(args, key) for key in ("corpus", "batch_size", "steps", "folder")},
    }
    answers = {
        "loop": lambda: dict(zip(("tokens", "seconds"), train(0), strict=True)),
        "step": lambda: {"steps": args.steps, "seconds": train_same(0)[1]},
        "input": lambda: turns.feed(next(input_cycles)),
    }
    turns.serve(ready, answers)


def t5x_features(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Packed rows as T5X has them: with positions, and every target token counted once."""
    segments = ("encoder_segment_ids", "decoder_segment_ids")
    names = ("encoder_input_tokens", "decoder_input_tokens", "decoder_target_tokens", *segments)
    return {
        **{name: batch[name] for name in names},
        **{name.replace("segment_ids", "positions"): positions(batch[name]) for name in segments},
        "decoder_loss_weights": (batch["decoder_segment_ids"] > 0).astype(np.int32),
    }


def positions(segments: np.ndarray) -> np.ndarray:
    """The place of every token in its segment, [B, L]; 0 in padding."""
    places = np.broadcast_to(np.arange(segments.shape[1]), segments.shape)
    begins = np.diff(segments, axis=1, prepend=-1) != 0
    return np.where(segments > 0, places - np.maximum.accumulate(np.where(begins, places, 0), axis=1), 0).astype(
        np.int32
    )


def cycles(batches: Iterator[tuple[Batch, np.ndarray]], windows: int) -> Iterator[Iterator[Batch]]:
    """Batches until so many windows are used up, then until as many more are: as much is rendered as is taken."""

    def cycle(until: int) -> Iterator[Batch]:
        for batch, positions in batches:
            yield batch
            if positions[0, 0] >= until:
                return

    return (cycle(number * windows) for number in itertools.count(1))


if __name__ == "__main__":
    main()

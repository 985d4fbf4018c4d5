"""How many samples a second the input pipeline feeds: rendered, fully shuffled, packed.

    python benchmarks/input_pipeline.py --corpus amazon_beauty --vocabulary spiece.model

Prints one JSON line: samples_per_second over windows that nobody saw before, and how full the rows are; and in
`packers` the same of packing alone, next to Grain's first-fit and SeqIO's packer, all on the same rendered samples of
two windows, in seconds of the processor. The corpus must be prepared (`recalign prepare`).
"""

import argparse
import json
import pathlib
import statistics
import sys
import time

import grain
import numpy as np
import seqio
import tensorflow as tf
from grain.experimental import FirstFitPackIterDataset

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from benchmarks import our_training
from recalign_jax.training import input_pipeline, packing
from recalign_jax.training.input_pipeline import Stream
from seqio_tasks.writing import Limits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    our_training.add_data_arguments(parser)
    parser.add_argument("--windows", type=int, default=8)
    args = parser.parse_args()
    name, stream = our_training.set_up_data(args)
    input_pipeline.pack_window(stream, 0)  # fills the caches: the catalogue's tokens, the words
    seconds, full = [], []
    for window in range(1, args.windows + 1):
        start = time.perf_counter()
        rows = input_pipeline.pack_window(stream, window)
        seconds.append(time.perf_counter() - start)
        full.append([(rows[f"{side}_segment_ids"] > 0).mean() for side in ("encoder", "decoder")])
    encoder, decoder = np.mean(full, axis=0)
    result = {
        "mixture": name,
        "samples_per_second": round(stream.options.window / statistics.median(seconds)),
        "processes": 1,
        "encoder_efficiency": round(float(encoder), 3),
        "decoder_efficiency": round(float(decoder), 3),
        "windows": args.windows,
        "packers": compare_packers(stream),
    }
    print(json.dumps(result))


def compare_packers(stream: Stream) -> dict[str, dict[str, float]]:
    """How full each packer's rows are, and samples a second."""
    options, lengths = stream.options, stream.options.task_feature_lengths
    limits = Limits(**lengths)
    windows = [
        [stream.tasks[task].render("train", index, epoch, 0, limits) for task, epoch, index in addresses]
        for addresses in (input_pipeline.addresses(stream, window) for window in (1, 2))
    ]
    examples = [{"inputs": s.inputs, "targets": s.targets} for samples in windows for s in samples]
    tokens = {side: sum(len(example[side]) for example in examples) for side in lengths}

    def ours() -> int:
        arrays = [
            packing.pack([s.inputs for s in samples], [s.targets for s in samples], np.zeros(len(samples), int),
                         lengths["inputs"], lengths["targets"], options.loss_normalization)
            for samples in windows
        ]  # fmt: skip
        return sum(len(rows["encoder_input_tokens"]) for rows in arrays)

    def grain_first_fit() -> int:
        dataset = grain.MapDataset.source(examples).to_iter_dataset(grain.ReadOptions(0, 0))
        return sum(1 for _ in FirstFitPackIterDataset(dataset, length_struct=lengths, num_packing_bins=64))

    def seqio_packer() -> int:
        signature = {side: tf.TensorSpec([None], tf.int32) for side in lengths}
        dataset = tf.data.Dataset.from_generator(lambda: iter(examples), output_signature=signature)
        return sum(1 for _ in seqio.utils.trim_and_pack_dataset(dataset, lengths))

    results = {}
    for pack in (ours, grain_first_fit, seqio_packer):
        start = time.process_time()
        rows = pack()
        results[pack.__name__] = {
            "encoder_efficiency": round(tokens["inputs"] / rows / lengths["inputs"], 3),
            "decoder_efficiency": round(tokens["targets"] / rows / lengths["targets"], 3),
            "samples_per_second": round(len(examples) / (time.process_time() - start)),
        }
    return results


if __name__ == "__main__":
    main()

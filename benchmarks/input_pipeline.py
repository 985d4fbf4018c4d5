"""How many samples a second the input pipeline feeds: rendered, fully shuffled, packed.

    python benchmarks/input_pipeline.py --corpus amazon_beauty --vocabulary spiece.model

Prints one JSON line: samples_per_second over windows that nobody saw before, and how full the rows are. The corpus
must be prepared (`recalign prepare`).
"""

import argparse
import json
import statistics
import time

import numpy as np

from recalign_jax.corpus.corpus import data_dir_or_default
from recalign_jax.training import input_pipeline
from recalign_jax.training.input_pipeline import InputOptions
from seqio_tasks import components, task_names
from seqio_tasks.tasks import register


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", required=True)
    parser.add_argument("--vocabulary", required=True)
    parser.add_argument("--mixture", default="retrieval_aligned")
    parser.add_argument("--data_dir")
    parser.add_argument("--inputs", type=int, default=512)
    parser.add_argument("--targets", type=int, default=128)
    parser.add_argument("--windows", type=int, default=8)
    args = parser.parse_args()
    name = task_names.split_name(f"{args.corpus}_{args.mixture}", args.data_dir)
    register(str(data_dir_or_default(args.data_dir) / args.corpus), args.vocabulary)
    options = InputOptions(task_feature_lengths={"inputs": args.inputs, "targets": args.targets})
    stream = input_pipeline.make_stream(components.components(str(name)), "train", 0, options)
    input_pipeline.pack_window(stream, 0)  # fills the caches: the catalogue's tokens, the words
    seconds, full = [], []
    for window in range(1, args.windows + 1):
        start = time.perf_counter()
        rows = input_pipeline.pack_window(stream, window)
        seconds.append(time.perf_counter() - start)
        full.append([(rows[f"{side}_segment_ids"] > 0).mean() for side in ("encoder", "decoder")])
    encoder, decoder = np.mean(full, axis=0)
    result = {
        "mixture": str(name),
        "samples_per_second": round(options.window / statistics.median(seconds)),
        "processes": 1,
        "encoder_efficiency": round(float(encoder), 3),
        "decoder_efficiency": round(float(decoder), 3),
        "windows": args.windows,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()

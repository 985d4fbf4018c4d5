"""How long, and in how much memory, `recalign convert` converts a checkpoint.

    python benchmarks/convert.py --size xl
    python benchmarks/convert.py --size small --folder /data/scratch

Writes a Hugging Face folder of random float32 weights of a T5 v1.1 size (XL: 11.4 GB), converts it to one of our own
checkpoints, converts that back, and compares the two folders' weights bit for bit. Each conversion is a process of its
own. The folder, temporary unless one is given, needs three times the checkpoint's size and is emptied again.

Prints one JSON line. For each direction: `seconds`, `peak_rss_gib` (the most resident memory the process had),
`over_baseline_gib` (that less what the same command takes for a checkpoint of next to nothing, which is the
framework's own), and `over_largest_gib` (that less the largest parameter, stacked over its layers as we keep it).
Aim: `over_largest_gib` at most 2 in both directions.
"""

import argparse
import json
import math
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
GIB = 2**30
# d_model, d_kv, d_ff, layers of each stack, heads: T5 v1.1's.
SIZES = {
    "nothing": (16, 4, 16, 1, 2),
    "small": (512, 64, 1024, 8, 6),
    "base": (768, 64, 2048, 12, 12),
    "large": (1024, 64, 2816, 24, 16),
    "xl": (2048, 64, 5120, 24, 32),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="xl", choices=[size for size in SIZES if size != "nothing"])
    parser.add_argument("--folder", type=pathlib.Path, help="where to write (default: the temporary folder)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        folder = pathlib.Path(temporary)
        baseline = round_trip(folder / "baseline", "nothing")
        result = round_trip(folder / "measured", args.size)
        largest = result.pop("largest_bytes") / GIB
        for direction in ("to_recalign", "to_huggingface"):
            over = result[direction]["peak_rss_gib"] - baseline[direction]["peak_rss_gib"]
            result[direction] |= {
                "over_baseline_gib": round(over, 3),
                "over_largest_gib": round(over - largest, 3),
            }
        print(json.dumps({"size": args.size, **result, "largest_gib": round(largest, 3)}))


def round_trip(folder: pathlib.Path, size: str) -> dict:
    """Writes, converts there and back, compares, and deletes."""
    from recalign_jax.checkpoint import huggingface, stacking
    from recalign_jax.checkpoint.arrays import whole
    from recalign_jax.model import t5

    config = config_of(size)
    parameters = [math.prod(leaf.shape) for leaf in stacking.flatten(t5.abstract_params(config)).values()]
    write_random(folder / "first", config)
    there = convert(folder / "first", folder / "own", "recalign")
    back = convert(folder / "own", folder / "second", "huggingface")
    first, second = (huggingface.read_arrays(folder / name) for name in ("first", "second"))
    if first.keys() != second.keys():
        raise SystemExit("The names of the weights differ after the round trip.")
    for name, array in first.items():
        if whole(array).tobytes() != whole(second[name]).tobytes():
            raise SystemExit(f"{name} differs after the round trip.")
    shutil.rmtree(folder)
    return {
        "bytes": 4 * sum(parameters),
        "largest_bytes": 4 * max(parameters),
        "to_recalign": there,
        "to_huggingface": back,
    }


def config_of(size: str):
    """The model of a size, with T5's 32,128 rows (but for the one that is next to nothing)."""
    from recalign_jax.model.config import T5Config

    emb_dim, head_dim, mlp_dim, layers, heads = SIZES[size]
    return T5Config(
        emb_dim=emb_dim,
        head_dim=head_dim,
        mlp_dim=mlp_dim,
        num_encoder_layers=layers,
        num_decoder_layers=layers,
        num_heads=heads,
        vocab_size=128 if size == "nothing" else 32128,
    )


def write_random(folder: pathlib.Path, config) -> None:
    """Writes a Hugging Face folder of random weights, in files of 5 GB."""
    from recalign_jax.checkpoint import export_huggingface, stacking
    from recalign_jax.checkpoint.arrays import LazyArray
    from recalign_jax.model import t5

    random = np.random.default_rng(0)

    def of_shape(shape: tuple[int, ...]) -> LazyArray:
        return LazyArray(shape, np.dtype(np.float32), lambda index: random.standard_normal(shape, np.float32))

    folder.mkdir(parents=True)
    params = {path: of_shape(tuple(leaf.shape)) for path, leaf in stacking.flatten(t5.abstract_params(config)).items()}
    export_huggingface.write_model(folder, params, config, np.float32, 5 * 10**9, lambda _: None)


def convert(source: pathlib.Path, output: pathlib.Path, to: str) -> dict[str, float]:
    """Runs the command in a process of its own."""
    command = [sys.executable, "-m", "recalign_jax.cli", "convert", "--input", str(source), "--output", str(output)]
    began = time.perf_counter()
    process = subprocess.Popen([*command, "--to", to], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed with exit status {os.waitstatus_to_exitcode(status)}.")
    return {"seconds": round(time.perf_counter() - began, 2), "peak_rss_gib": round(usage.ru_maxrss / 2**20, 3)}


if __name__ == "__main__":
    main()

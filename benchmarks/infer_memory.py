"""Memory of batch inference over many synthetic histories, with a tiny model: it must not grow with their number.

    python benchmarks/infer_memory.py [--users 1000000] [--items 1000]

Prints one JSON line: `users`, `seconds` and `users_per_second` of the command, `start_mib` (resident memory when a
tenth of the chunks was done), `end_mib` (when nine tenths were), `peak_mib`, and `ratio` = start_mib / end_mib (1 is
flat).
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[1]
CHUNK_ROWS = 4096
MIB = 2**20
# What is measured is the job, not the model.
SMALL = ("emb_dim=16", "num_heads=1", "head_dim=16", "mlp_dim=32", "num_encoder_layers=1", "num_decoder_layers=1")
MODEL = ["--gin_file", "gin_configs/models/t5_tiny.gin", *(f"--gin.T5Config.{size}" for size in SMALL)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=1_000_000)
    parser.add_argument("--items", type=int, default=1000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        prepare(folder, args.items)
        write_histories(folder / "histories.jsonl", args.users, args.items)
        result = infer(folder, args.users)
    print(json.dumps(result))


def recalign(folder: pathlib.Path, command: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "recalign_jax.cli", command, "--data_dir", str(folder), *arguments]


def prepare(folder: pathlib.Path, num_items: int) -> None:
    """A corpus of few users, a vocabulary, and a model of one step."""
    random = np.random.default_rng(0)
    (folder / "raw").mkdir()
    with (folder / "raw" / "interactions.tsv").open("w") as file:
        file.write("user_id\titem_id\ttimestamp\n")
        for user, items in enumerate(np.array_split(random.permutation(num_items), num_items // 10)):
            file.writelines(f"u{user}\ti{item}\t{place}\n" for place, item in enumerate(items))
    with (folder / "raw" / "items.tsv").open("w") as file:
        file.write("item_id\ttitle\n")
        file.writelines(f"i{item}\tthing number {item} of the shop\n" for item in range(num_items))
    words = f"--gin.VOCABULARY={folder / 'words.model'}"
    train = [*MODEL, "--gin_file", "gin_configs/runs/finetune.gin", words]
    train += ["--gin.MIXTURE_OR_TASK_NAME=shop_retrieval_token", f"--gin.MODEL_DIR={folder / 'model'}"]
    train += ["--gin.TRAIN_STEPS=1", "--gin.BATCH_SIZE=4", "--gin.TASK_FEATURE_LENGTHS={'inputs': 64, 'targets': 4}"]
    for command in (
        recalign(folder, "prepare", "--source", "tables", "--input", str(folder / "raw"), "--corpus", "shop"),
        recalign(folder, "vocab", "--corpus", "shop", "--size", "110", "--output", str(folder / "words.model")),
        recalign(folder, "train", *train, "--gin.InputOptions.window=64"),
    ):
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def write_histories(path: pathlib.Path, num_users: int, num_items: int) -> None:
    """One to nine items a user."""
    random = np.random.default_rng(1)
    with path.open("w") as file:
        for start in range(0, num_users, 10_000):
            count = min(10_000, num_users - start)
            lengths, items = random.integers(1, 10, count), random.integers(0, num_items, (count, 9))
            file.writelines(
                json.dumps({"user": f"user {start + n}", "items": [f"i{item}" for item in items[n, : lengths[n]]]})
                + "\n"
                for n in range(count)
            )


def infer(folder: pathlib.Path, num_users: int) -> dict[str, float]:
    """Runs the command and watches its memory."""
    arguments = [*MODEL, "--gin_file", "gin_configs/runs/infer.gin"]
    arguments += ["--gin.TASK_NAME=shop_retrieval_token", f"--gin.VOCABULARY={folder / 'words.model'}"]
    arguments += [f"--gin.CHECKPOINT_PATH={folder / 'model'}", f"--gin.OUTPUT_DIR={folder / 'out'}"]
    arguments += [f"--gin.INPUT={folder / 'histories.jsonl'}", f"--gin.CHUNK_ROWS={CHUNK_ROWS}"]
    arguments += ["--gin.NUM_BEAMS=10", "--gin.BATCH_SIZE=512", "--gin.HISTORY_LENGTH=9", "--json"]
    start = time.monotonic()
    process = subprocess.Popen(recalign(folder, "infer", *arguments), cwd=ROOT, stdout=subprocess.PIPE, text=True)
    num_chunks, seen = -(-num_users // CHUNK_ROWS), []
    while process.poll() is None:
        try:
            resident = int(pathlib.Path(f"/proc/{process.pid}/statm").read_text().split()[1]) * os.sysconf(
                "SC_PAGE_SIZE"
            )
        except (FileNotFoundError, IndexError):
            break
        seen.append((len(list((folder / "out" / "unfinished").glob("*.done"))) / num_chunks, resident / MIB))
        time.sleep(0.5)
    output, _ = process.communicate()
    if process.returncode:
        raise SystemExit(process.returncode)
    told = json.loads(output.splitlines()[-1])
    assert told["users"] == num_users
    near = {share: [size for done, size in seen if abs(done - share) <= 0.05] for share in (0.1, 0.9)}
    at_start, at_end = (statistics.median(near[share]) for share in (0.1, 0.9))
    return {
        "users": num_users,
        "seconds": round(time.monotonic() - start, 1),
        "users_per_second": round(num_users / told["seconds"], 1),
        "start_mib": round(at_start, 1),
        "end_mib": round(at_end, 1),
        "peak_mib": round(max(size for _, size in seen), 1),
        "ratio": round(at_start / at_end, 4),
    }


if __name__ == "__main__":
    main()

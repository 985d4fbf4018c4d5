"""How fast, and in how much memory, `recalign prepare` builds a corpus on one core.

    python benchmarks/prepare.py --interactions 10000000
    python benchmarks/prepare.py --input ../shared/data/amazon_beauty

The first writes a synthetic table of that many interactions (users and items of skewed popularity, one item in
ten untitled) to a temporary folder; the second takes a folder of tables as it is. Prints one JSON line: `seconds`
and `rows_per_second` of the whole command, from its start to a corpus on disk, and `peak_rss_gib`, the most
resident memory that its process had. Aims: 10,000,000 interactions within 2 GiB, Amazon Beauty within 20 seconds.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import numpy as np
import pyarrow
from pyarrow import csv

ROOT = pathlib.Path(__file__).resolve().parents[1]
ROWS_A_CHUNK = 500_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--interactions", type=int, metavar="N", help="number of synthetic interactions")
    what.add_argument("--input", type=pathlib.Path, metavar="DIR", help="folder of tables")
    parser.add_argument("--users", type=int, default=1_000_000, help="synthetic users (default 1,000,000)")
    parser.add_argument("--items", type=int, default=200_000, help="synthetic items (default 200,000)")
    parser.add_argument("--k_core", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.input or write_tables(pathlib.Path(temporary) / "raw", args.interactions, args.users, args.items)
        print(json.dumps(measure(folder, pathlib.Path(temporary) / "data", args.k_core)))


def write_tables(folder: pathlib.Path, interactions: int, users: int, items: int) -> pathlib.Path:
    """Writes interactions.tsv and items.jsonl; returns the folder."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    start, seconds = 1_400_000_000, 400_000_000
    columns = ("user_id", "item_id", "timestamp", "rating")
    options = csv.WriteOptions(delimiter="\t", quoting_style="none", quoting_header="none")
    schema = pyarrow.schema([(name, pyarrow.string() if name.endswith("_id") else pyarrow.int64()) for name in columns])
    with csv.CSVWriter(folder / "interactions.tsv", schema, write_options=options) as writer:
        for done in range(0, interactions, ROWS_A_CHUNK):
            n = min(ROWS_A_CHUNK, interactions - done)
            # Squares and cubes of uniform numbers: the first items and users are met far more often than the last.
            user = (users * rng.random(n) ** 2).astype(np.int64)
            item = (items * rng.random(n) ** 3).astype(np.int64)
            values = (
                np.char.add("A", np.char.zfill(user.astype(str), 13)),
                np.char.add("B", np.char.zfill(item.astype(str), 9)),
                start + rng.integers(0, seconds, n),
                rng.integers(1, 6, n),
            )
            writer.write(pyarrow.table(dict(zip(columns, values, strict=True)), schema))
    words = [f"word{number}" for number in range(5000)]
    with (folder / "items.jsonl").open("w", encoding="utf-8") as file:
        for item in range(items):
            row = {"item_id": f"B{item:09}", "categories": ["Things", words[item % 300]], "brand": words[item % 1000]}
            if item % 10:
                row["title"] = " ".join(words[i] for i in rng.integers(0, len(words), 8))
            file.write(json.dumps(row) + "\n")
    return folder


def measure(folder: pathlib.Path, data_dir: pathlib.Path, k_core: int) -> dict[str, float]:
    """Prepares the folder in a process of its own, which is kept on one core."""
    core = min(os.sched_getaffinity(0))
    command = [sys.executable, "-m", "recalign_jax.cli", "prepare", "--source", "tables", "--input", str(folder)]
    command += ["--corpus", "measured", "--data_dir", str(data_dir), "--k_core", str(k_core)]
    began = time.perf_counter()
    # Its children inherit the core.
    os.sched_setaffinity(0, {core})
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    if status:
        raise SystemExit(f"{' '.join(command)} failed with exit status {os.waitstatus_to_exitcode(status)}.")
    counts = json.loads((data_dir / "measured" / "corpus.json").read_text(encoding="utf-8"))["counts"]
    return {
        **{name: counts[name] for name in ("users", "items", "interactions", "interactions_read")},
        "seconds": round(seconds, 2),
        "rows_per_second": round(counts["interactions_read"] / seconds),
        "peak_rss_gib": round(usage.ru_maxrss / 2**20, 3),
    }


if __name__ == "__main__":
    main()

"""Kills a job of batch inference at seeded moments and runs it again, until it is done: its files must be those of a
job that nothing killed.

    python tests/kill_and_infer.py --times 20 [--processes 2]

Of two processes one is killed, in turn, and the other one must end. Prints one JSON line: `kills`, how many of them
`while_starting` (before one more chunk was there), `users`, each once, and `identical`: all files, byte for byte. Exit
status 1 when they are not.
"""

import argparse
import json
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import time
from typing import Any

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from recalign_jax import cli
from tests import kill_and_resume

CHUNK_ROWS, CHUNKS_A_KILL = 8, 6
SECONDS = 300


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        kill_and_resume.prepare(folder)
        assert cli.main(["train", *kill_and_resume.arguments(folder, "model", 2)]) == 0
        result = kill_and_infer(folder, args.times, args.seed, args.processes)
    print(json.dumps(result))
    return 0 if result["identical"] else 1


def kill_and_infer(folder: pathlib.Path, times: int, seed: int, processes: int = 1) -> dict[str, Any]:
    """Returns what is printed; `folder` holds a corpus, and a model in `model`."""
    random = np.random.default_rng(seed)
    # Twice what is needed: a process does some chunks more while it is being killed.
    rows = write_table(folder / "in.jsonl", 2 * (times + 1) * CHUNKS_A_KILL * CHUNK_ROWS, random)
    assert ended(start(folder, "calm", processes)) == [0] * processes
    counts = dict.fromkeys(("kills", "while_starting"), 0)
    while counts["kills"] < times:
        before = len(chunks(folder / "killed"))
        running = start(folder, "killed", processes)
        # Some are killed while they start, the others among their next chunks.
        starting = counts["kills"] % 4 == 3
        wanted = before + int(random.integers(1, CHUNKS_A_KILL))
        deadline = time.monotonic() + (random.uniform(0.5, 4) if starting else SECONDS)
        while running[0].poll() is None and len(chunks(folder / "killed")) < wanted and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(random.uniform(0, 0.03))
        running[counts["kills"] % processes].kill()
        statuses = ended(running)
        if 0 in statuses:
            break  # it was done before: the seed gives moments too late
        counts["kills"] += 1
        counts["while_starting"] += len(chunks(folder / "killed")) == before
    assert ended(start(folder, "killed", processes)) == [0] * processes
    found = [json.loads(line)["user"] for line in (folder / "killed" / "recommendations.jsonl").open(encoding="utf-8")]
    same = contents(folder / "killed") == contents(folder / "calm") and found == rows
    return {**counts, "users": len(found), "identical": same}


def write_table(path: pathlib.Path, count: int, random: np.random.Generator) -> list[str]:
    """Histories of strangers, a bad row among them; returns the users that are to be answered."""
    users = [f"stranger {n}" for n in range(count)]
    lines = [
        json.dumps({"user": user, "items": [f"thing{n}" for n in random.permutation(30)[: random.integers(0, 9)]]})
        for user in users
    ]
    lines[3] = "no row"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return users[:3] + users[4:]


def start(folder: pathlib.Path, name: str, processes: int) -> list[subprocess.Popen]:
    """Starts `recalign infer` into FOLDER/NAME."""
    arguments = [
        *("infer", "--data_dir", str(folder), "--gin_file", "gin_configs/models/t5_tiny.gin"),
        *("--gin_file", "gin_configs/runs/infer.gin", "--gin.TASK_NAME=shop_retrieval_token"),
        *(f"--gin.VOCABULARY={folder / 'words.model'}", f"--gin.CHECKPOINT_PATH={folder / 'model'}"),
        *(f"--gin.OUTPUT_DIR={folder / name}", f"--gin.INPUT={folder / 'in.jsonl'}", "--gin.BATCH_SIZE=8"),
        *(f"--gin.CHUNK_ROWS={CHUNK_ROWS}", "--gin.NUM_BEAMS=5", "--gin.TOP_K=5"),
    ]
    with socket.socket() as free:
        free.bind(("", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    running = []
    for number in range(processes):
        several = ["--coordinator_address", address, "--num_processes", str(processes), "--process_id", str(number)]
        command = [sys.executable, "-m", "recalign_jax.cli", *arguments, *(several if processes > 1 else [])]
        environment = kill_and_resume.environment(folder) | {"JAX_PLATFORMS": "cpu"}
        with (folder / f"{name}_{number}.log").open("a") as output:
            running.append(
                subprocess.Popen(command, stdout=output, stderr=output, cwd=kill_and_resume.ROOT, env=environment)
            )
    return running


def ended(running: list[subprocess.Popen]) -> list[int]:
    """The exit statuses of all, once they have ended."""
    return [process.wait(timeout=SECONDS) for process in running]


def chunks(output_dir: pathlib.Path) -> list[str]:
    """The chunks that are done."""
    folder = output_dir / "unfinished"
    return [name for name in os.listdir(folder) if name.endswith(".done")] if folder.is_dir() else []


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    """All files below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


if __name__ == "__main__":
    sys.exit(main())

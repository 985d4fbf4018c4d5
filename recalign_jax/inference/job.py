"""A job of batch inference: requests in chunks, each answered and put down, then all put together."""

import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from recalign_jax import terminal
from recalign_jax.inference import answers, chunks
from recalign_jax.inference.answers import Row
from recalign_jax.inference.requests import Requests
from recalign_jax.inference.rows import Request

# (requests, told how many more are answered) -> a row for each.
AnswerRequests = Callable[[Sequence[Request], Callable[[int], None]], list[Row]]


def run(
    output_dir: pathlib.Path,
    job: dict[str, Any],
    asked: Requests,
    answer: AnswerRequests,
    chunk_rows: int,
    shard: int = 0,
    num_shards: int = 1,
) -> dict[str, int] | None:
    """Does what is left of a job; several processes work on every chunk together, the first one writes.

    Args:
      output_dir: OUTPUT_DIR.
      job: all that its results depend on, as JSON; with `output_format`.
      asked: the requests.
      answer: answers them.
      chunk_rows: rows a chunk.
      shard: of `num_shards` calls that share OUTPUT_DIR, which one this is: chunk n is that of shard n % num_shards.
      num_shards: who finds all chunks done puts them together.

    Returns:
      The counts of the whole job: `users` answered, rows `rejected`, users `without_history`, `unknown_items`; None
      where chunks of other shards are still to be done.

    Raises:
      InputError: OUTPUT_DIR holds another job that is unfinished.
    """
    num_chunks = -(-asked.total // chunk_rows)
    mine = np.arange(num_chunks) % num_shards == shard
    left, counts = mine, None
    if jax.process_index() == 0:
        counts = chunks.finished(output_dir, job)
        if counts is None:
            chunks.start(output_dir, job)
            left = mine & ~np.isin(np.arange(num_chunks), list(chunks.done(output_dir, job, num_chunks)))
        else:
            left = np.zeros_like(mine)
    left = multihost_utils.broadcast_one_to_all(left)  # other processes may see the folder as it was a while ago
    if counts is not None:
        terminal.say(f"{output_dir} holds this very job, finished.")
        return counts
    sizes = np.minimum(chunk_rows, asked.total - np.arange(num_chunks) * chunk_rows)
    with terminal.progress("infer", int(sizes[mine].sum()), "users", done=int(sizes[mine & ~left].sum())) as advance:
        for part in asked.parts(chunk_rows, set(np.flatnonzero(left).tolist())):
            rows = answer(part.requests, advance)
            advance(len(part.rejected))
            if jax.process_index() == 0:
                chunks.write(output_dir, job, part.number, rows, part.rejected, _counts(rows, part.rejected))
    if jax.process_index() > 0:
        return None
    found = chunks.done(output_dir, job, num_chunks)
    if len(found) == num_chunks:
        return chunks.finish(output_dir, job, found)
    terminal.say(
        f"{num_chunks - len(found)} of {num_chunks} chunks are those of other shards, and not done yet. If no shard "
        "puts them together in the end, start any one of them again."
    )
    return None


def _counts(rows: Sequence[Row], rejected: Sequence[dict[str, Any]]) -> dict[str, int]:
    return {
        "users": len(rows),
        "rejected": len(rejected),
        "without_history": sum(row["method"] == answers.POPULARITY for row in rows),
        "unknown_items": sum(len(row["unknown_items"]) for row in rows),
    }

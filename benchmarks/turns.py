"""Programs that take turns: each waits to be asked, and is held still while it isn't its turn."""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[1]

Answer = dict[str, Any]
Ask = Callable[[str], Answer]


@contextlib.contextmanager
def side(command: Sequence[str]) -> Iterator[tuple[Answer, Ask]]:
    """Starts a program that calls `serve`, and ends it afterwards.

    Yields:
      (what it told when it was ready, question -> its answer).

    Raises:
      SystemExit: when the program ends by itself, with the end of what it wrote.
    """
    variables = {**os.environ, "PYTHONPATH": str(ROOT)}
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            cwd=ROOT,
            env=variables,
        ) as process,
    ):
        assert process.stdin
        assert process.stdout
        questions, answers = process.stdin, process.stdout

        def answer() -> Answer:
            for line in answers:
                if line.startswith("{"):  # libraries print, too
                    process.send_signal(signal.SIGSTOP)
                    return json.loads(line)
            errors.seek(0)
            sys.exit(f"{command} ended:\n{errors.read()[-4000:]}")

        def ask(question: str) -> Answer:
            process.send_signal(signal.SIGCONT)
            questions.write(question + "\n")
            questions.flush()
            return answer()

        try:
            yield answer(), ask
        finally:
            process.kill()


def serve(ready: Answer, answers: dict[str, Callable[[], Answer]]) -> None:
    """Tells that the program is ready, then answers questions until there are no more."""
    print(json.dumps(ready), flush=True)
    for line in sys.stdin:
        print(json.dumps(answers[line.strip()]()), flush=True)


def feed(batches: Iterable[dict[str, Any]]) -> Answer:
    """Takes all batches of an input pipeline; tells samples, seconds, and how full the encoder's slots were."""
    samples = tokens = slots = 0
    started = time.perf_counter()
    for batch in batches:
        segments = np.asarray(batch["encoder_segment_ids"])  # [B, L]
        samples += int(segments.max(axis=1).sum())
        tokens += int((segments > 0).sum())
        slots += segments.size
    return {"samples": samples, "seconds": time.perf_counter() - started, "encoder_efficiency": tokens / slots}

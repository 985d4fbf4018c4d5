"""What a person sees: progress with rate and ETA on standard error, results and tables on standard output.

Of several processes only process 0 speaks, but for warnings, which say whose they are."""

import contextlib
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

# Log files get a line at this interval instead of a bar that redraws itself.
PLAIN_INTERVAL_SECONDS = 10.0

_process: int | None = None  # None: there is only one


def set_process(number: int) -> None:
    """Says that this is one of several processes."""
    global _process
    _process = number


def process() -> int | None:
    """The number of this process among several, or None."""
    return _process


def prefix() -> str:
    """What stands before warnings and errors: `process 3: ` where there are several processes."""
    return "" if _process is None else f"process {_process}: "


def speaks() -> bool:
    """Whether this process prints what all of them have to say."""
    return not _process


class _RateColumn(ProgressColumn):
    def __init__(self, unit: str):
        super().__init__()
        self._unit = unit

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{_short(speed)} {self._unit}/s")


def _short(number: float) -> str:
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if number >= limit:
            return f"{number / (1e3 if suffix == 'k' else limit):.1f}{suffix}"
    return f"{number:.1f}" if number < 100 else f"{number:.0f}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}" if minutes >= 60 else f"{minutes}:{seconds:02d}"


Advance = Callable[..., None]


@contextlib.contextmanager
def progress(description: str, total: int | None, unit: str = "it", done: int = 0) -> Iterator[Advance]:
    """Shows progress with rate and time left; yields `advance(n=1, note=None)`. A note stays until the next one.

    On a terminal it is a bar; elsewhere one line every ten seconds and one at the end, so that log files
    stay readable. `done` is what was finished before (a resumed run); it does not count for the rate.
    """
    if not speaks():
        yield lambda n=1, note=None: None
    elif sys.stderr.isatty():
        with _bar(description, total, unit, done) as advance:
            yield advance
    else:
        with _lines(description, total, unit, done) as advance:
            yield advance


@contextlib.contextmanager
def _bar(description: str, total: int | None, unit: str, done: int) -> Iterator[Advance]:
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        _RateColumn(unit),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    with Progress(*columns, console=Console(stderr=True)) as bars:
        task = bars.add_task(description, total=total, completed=done, note="")

        def advance(n: int = 1, note: str | None = None) -> None:
            if note is None:
                bars.update(task, advance=n)
            else:
                bars.update(task, advance=n, note=note)

        yield advance


@contextlib.contextmanager
def _lines(description: str, total: int | None, unit: str, done: int) -> Iterator[Advance]:
    start = last = time.monotonic()
    count, last_note = done, ""

    def line(now: float) -> str:
        rate = (count - done) / max(now - start, 1e-9)
        parts = [f"{description}: {count}" + (f"/{total} ({100 * count / max(total, 1):.0f} %)" if total else "")]
        parts.append(f"{_short(rate)} {unit}/s")
        if total and rate > 0 and count < total:
            parts.append(f"ETA {_clock((total - count) / rate)}")
        return ", ".join([*parts, last_note] if last_note else parts)

    def advance(n: int = 1, note: str | None = None) -> None:
        nonlocal count, last, last_note
        count += n
        last_note = last_note if note is None else note
        now = time.monotonic()
        if now - last >= PLAIN_INTERVAL_SECONDS:
            last = now
            print(line(now), file=sys.stderr, flush=True)

    yield advance
    now = time.monotonic()
    print(f"{line(now)}, took {_clock(now - start)}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Hides what native code writes to standard error inside the block; Python's exceptions pass.

    TensorFlow tells of processor features and absent GPUs before its log level is in force.
    """
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def say(message: str) -> None:
    """Prints a line for the person (standard output; nothing in it is interpreted)."""
    if speaks():
        _print(Console(), message)


def next_step(*command: str) -> None:
    """Says what to type next."""
    say(f"Next: {shlex.join(command)}")


def warn(message: str) -> None:
    """Prints a warning to standard error."""
    _print(Console(stderr=True), f"warning: {prefix()}{message}")


def _print(console: Console, message: str) -> None:
    console.print(message, markup=False, emoji=False, highlight=False, soft_wrap=True)


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a table: the first column to the left, the others (numbers) to the right."""
    if not speaks():
        return
    drawn = Table(title=Text(title), title_justify="left")
    for number, name in enumerate(header):
        drawn.add_column(Text(name), justify="left" if number == 0 else "right")
    for row in rows:
        drawn.add_row(*(Text(cell) for cell in row))
    # A pipe has no width: nothing is cut there.
    Console(width=None if sys.stdout.isatty() else 200).print(drawn)

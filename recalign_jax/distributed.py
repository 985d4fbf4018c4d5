"""Several processes as one run, by JAX's distributed runtime: how they start, agree on what is there, and end together.

`start` before the first use of a device, `end` as the last thing. Several processes are asked for by flags: either
`--coordinator_address --num_processes --process_id`, with a roll call first, or `--distributed` where JAX knows the
cluster (Cloud TPU, GKE, SLURM, Open MPI).
"""

import argparse
import contextlib
import json
import os
import pathlib
import secrets
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from recalign_jax import roll_call, terminal
from recalign_jax.errors import InputError, RecalignError, RunError

# A machine that vanishes without closing its connections is missed after this time.
HEARTBEAT_TIMEOUT_SECONDS = 60
# How far apart processes may reach the end of a run: at the end of an inference the first one puts all files together,
# while the others wait. One that is gone is missed earlier.
SHUTDOWN_TIMEOUT_SECONDS = 24 * 3600
# How long a file that another machine wrote may take to be seen.
SEEN_SECONDS = 60.0
# Within this time the failure of another process is known here, if an error is only its echo.
ECHO_SECONDS = 2.0

_FLAGS = ("coordinator_address", "num_processes", "process_id")
_lines: dict[int, roll_call.Line] = {}  # to other processes
_ending = threading.Lock()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags for several processes."""
    group = parser.add_argument_group("several processes")
    group.add_argument("--coordinator_address", metavar="HOST:PORT", help="of process 0; a port that is free there")
    group.add_argument("--num_processes", type=int, metavar="N", help="how many processes there are")
    group.add_argument("--process_id", type=int, metavar="I", help="the number of this one, from 0")
    group.add_argument("--distributed", action="store_true", help="JAX finds the others: Cloud TPU, GKE, SLURM, MPI")
    group.add_argument(
        "--start_timeout", type=float, default=300.0, metavar="SECONDS", help="how long to wait for all (default: 300)"
    )


def start(args: argparse.Namespace, saves_on_sigterm: bool = False) -> None:
    """Joins this process with the others; does nothing when the flags don't ask for several.

    Args:
      args: the flags.
      saves_on_sigterm: whether the command asks JAX's preemption service for SIGTERM, which otherwise ends it.

    Raises:
      InputError: for flags that contradict one another or the other processes'.
      RunError: when not all processes start within `--start_timeout`.
    """
    given = [f"--{name}" for name in _FLAGS if getattr(args, name) is not None]
    if not given and not args.distributed:
        return
    if given and args.distributed:
        raise InputError(f"--distributed finds what {given[0]} says: give one or the other.")
    if given and len(given) < len(_FLAGS):
        raise InputError(f"{' and '.join(given)} need{'s' * (len(given) == 1)} the others of "
                         f"{', '.join(f'--{name}' for name in _FLAGS)}.")  # fmt: skip
    import jax

    jax.config.update("jax_enable_preemption_service", saves_on_sigterm)
    limits = {
        "initialization_timeout": max(1, round(args.start_timeout)),
        "heartbeat_timeout_seconds": HEARTBEAT_TIMEOUT_SECONDS,
        "shutdown_timeout_seconds": SHUTDOWN_TIMEOUT_SECONDS,
    }
    if args.distributed:
        try:
            jax.distributed.initialize(**limits)
        except ValueError as error:
            raise InputError(
                f"--distributed: JAX finds no cluster here ({error}). Say who is there with --coordinator_address, "
                "--num_processes and --process_id."
            ) from None
        terminal.set_process(jax.process_index())
        return
    terminal.set_process(args.process_id)
    _lines.update(roll_call.gather(args.coordinator_address, args.process_id, args.num_processes, args.start_timeout))
    roll_call.watch(_lines, _ended_by_another)
    jax.distributed.initialize(args.coordinator_address, args.num_processes, args.process_id, **limits)


def from_first(read: Callable[[], Any]) -> Any:
    """What process 0 reads, in all processes, which all call this: others may see a folder as it was a while ago.

    Args:
      read: returns JSON; may raise RecalignError.

    Raises:
      RecalignError: in all processes, when `read` raises it in the first one.
    """
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    if jax.process_count() == 1:
        return read()
    told: dict[str, Any] = {}
    if jax.process_index() == 0:
        try:
            told = {"value": read()}
        except RecalignError as error:
            told = {"status": error.exit_status, "message": error.message}
    content = json.dumps(told).encode()
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(content))))
    content = multihost_utils.broadcast_one_to_all(np.frombuffer(content[:size].ljust(size), np.uint8)).tobytes()
    told = json.loads(content)
    if "status" in told:
        raise (InputError if told["status"] == InputError.exit_status else RunError)(told["message"])
    return told["value"]


def await_seen(is_seen: Callable[[], bool]) -> bool:
    """Whether this process sees what another one saw or wrote; where there are several, waits SEEN_SECONDS for it."""
    deadline = time.monotonic() + SEEN_SECONDS * _several()
    while True:
        with contextlib.suppress(OSError):
            if is_seen():
                return True
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.1)


def check_shared(name: str, folder: pathlib.Path) -> None:
    """Raises InputError in all processes when one doesn't see what the first one writes to a folder; all call it."""
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    if jax.process_count() == 1:
        return

    mark = folder / ".seen_by_all"

    def write() -> str:
        written = secrets.token_hex(8)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            mark.write_text(written)
        except OSError as error:
            raise InputError(f"{name} {folder} can't be written to: {error.strerror}.") from None
        return written

    written = from_first(write)
    seen = await_seen(lambda: mark.read_text() == written)
    blind = np.flatnonzero(~multihost_utils.process_allgather(np.asarray(seen)))
    if jax.process_index() == 0:
        mark.unlink(missing_ok=True)
    if len(blind):
        raise InputError(
            f"{name} {folder}: process {blind[0]} doesn't see what process 0 wrote there. All processes need the same "
            "folder (NFS, Lustre, ...)."
        )


def end(status: int, message: str = "", together: bool = False) -> int:
    """Leaves the other processes; the last thing a process does.

    Args:
      status: the exit status.
      message: of the failure, for the other processes.
      together: whether all processes come here, as after a run that went well or was stopped in all of them. A
        process that fails alone ends the others, and doesn't return when there are any.

    Returns:
      The status.
    """
    if not _several():
        return status
    import jax

    if together:
        jax.distributed.shutdown()
        for line in _lines.values():
            line.send("done")
        return status
    _leave(status, f"process {terminal.process()}: {message}")
    return status


def await_others_failure() -> None:
    """Gives a failure of another process the time to end this one, so that its error isn't told as ours."""
    if _several():
        time.sleep(ECHO_SECONDS)


def _several() -> bool:
    """Whether this process has joined others."""
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized()


def _ended_by_another(status: int, message: str) -> None:
    if _ending.locked():
        return
    print(f"recalign: {terminal.prefix()}stopped with the others: {message}", file=sys.stderr)
    _leave(status, message)


def _leave(status: int, message: str) -> None:
    """Ends the process at once: JAX's way out would wait for processes that don't come."""
    if not _ending.acquire(blocking=False):
        time.sleep(2 * roll_call.FAREWELL_SECONDS)  # another thread is ending the process
    roll_call.farewell(_lines, status, message)
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)

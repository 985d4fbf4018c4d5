"""The roll call of several processes: all are there, or all of them know who is not.

Before JAX's own service takes HOST:PORT, process 0 listens there in plain TCP. Every other process says its number,
and when all are there process 0 answers `go`. The connections stay: over them a process that fails ends the others at
once and with its message, where JAX's heartbeats take a minute and end in a stack trace.

What is said is lines of text: `recalign NUMBER OF`, `go`, `failed STATUS MESSAGE`, `done`.
"""

import contextlib
import os
import re
import selectors
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping

from recalign_jax import terminal
from recalign_jax.errors import InputError, RecalignError, RunError

LONGEST_LINE = 2000  # bytes; who says more without an end of line is a stranger
PATIENCE_SECONDS = 10.0  # after which a process that waits says what for
FAREWELL_SECONDS = 5.0  # how long process 0 stays for the others to end by its message

_HELLO = re.compile(r"recalign (\d{1,9}) (\d{1,9})")
_FAILED = re.compile(r"failed (\d{1,3}) (.*)")


class Line:
    """One connection, read line by line; reading never waits."""

    def __init__(self, connection: socket.socket, address: str):
        connection.setblocking(False)
        # Firewalls forget connections on which nothing is said for some minutes.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if hasattr(socket, "TCP_KEEPIDLE"):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60)
        self.address, self.is_open = address, True
        self._connection, self._buffer = connection, b""

    def fileno(self) -> int:
        return self._connection.fileno()

    def send(self, text: str) -> None:
        """Sends one line. That a connection is broken is found out by reading."""
        with contextlib.suppress(OSError):
            self._connection.sendall(" ".join(text.split()).encode()[: LONGEST_LINE - 1] + b"\n")

    def read(self) -> list[str]:
        """The whole lines that have come; afterwards `is_open` is false when no more can."""
        try:
            received = self._connection.recv(LONGEST_LINE)
        except BlockingIOError:
            return []
        except OSError:
            received = b""
        *lines, self._buffer = (self._buffer + received).split(b"\n")
        self.is_open = bool(received) and len(self._buffer) < LONGEST_LINE
        return [line.decode(errors="replace") for line in lines]

    def close(self) -> None:
        self.is_open = False
        self._connection.close()


def gather(address: str, number: int, of: int, timeout: float) -> dict[int, Line]:
    """Waits until all processes are there; every one of them calls this.

    Args:
      address: HOST:PORT of process 0; the port is free again afterwards.
      number: of this process, below `of`.
      of: how many processes there are.
      timeout: seconds.

    Returns:
      Lines to other processes by their numbers: in process 0 to all, in the others to process 0.

    Raises:
      RunError: when some are missing after `timeout`: in every process that is there, and says which; when the host of
        process 0 has no address by then, as a pod that hasn't come.
      InputError: for a bad address or number, a port in use, and in every process for a number given twice or
        processes that were told different counts.
    """
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise InputError(f"--coordinator_address {address!r} must be HOST:PORT, as in node0:12345.")
    if not 0 <= number < of:
        raise InputError(f"--process_id {number} must be one of 0 to {of - 1} (--num_processes {of}).")
    _await_address(host, timeout)
    if number == 0:
        return _listen(host, int(port), of, timeout)
    return {0: _call(host, int(port), number, of, timeout)}


def _await_address(host: str, timeout: float) -> None:
    """Waits until a host name has an address: names of pods come into being after the pods."""
    for _ in _until(timeout, lambda: terminal.warn(f"the host {host!r} has no address yet")):
        with contextlib.suppress(OSError, UnicodeError):
            socket.getaddrinfo(host, None)
            return
    raise RunError(
        f"The host {host!r} of --coordinator_address has no address (tried for {timeout:g} s). Is the name right, and "
        "is that machine there?"
    )


def _until(timeout: float, complain: Callable[[], None]) -> Iterator[float]:
    """Yields the seconds that are left, a few times a second; once PATIENCE_SECONDS are over, calls `complain`."""
    start, complained = time.monotonic(), False
    while (passed := time.monotonic() - start) < timeout:
        if passed > PATIENCE_SECONDS and not complained:
            complained = True
            complain()
        yield timeout - passed
        time.sleep(0.1)


def _listen(host: str, port: int, of: int, timeout: float) -> dict[int, Line]:
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        server = socket.create_server(("", port), family=family, backlog=of + 16, dualstack_ipv6=both)
    except OSError as error:
        raise InputError(
            f"Port {port} can't be listened on: {os.strerror(error.errno or 0)}. Another run, or another process 0, "
            "may use it; --coordinator_address may name another port."
        ) from None
    server.setblocking(False)
    lines: list[Line] = []
    present: dict[int, Line] = {}

    def absent() -> str:
        numbers = [str(number) for number in range(1, of) if number not in present]
        return f"{'process' if len(numbers) == 1 else 'processes'} {', '.join(numbers)} of {of}"

    with server:
        for _ in _until(timeout, lambda: terminal.say(f"Waiting for {absent()}.")):
            with contextlib.suppress(OSError):  # until nobody else waits
                while True:
                    connection, (peer, *_rest) = server.accept()
                    lines.append(Line(connection, peer.removeprefix("::ffff:")))
            try:
                for line in lines:
                    _hear(line, present, of)
            except InputError as error:
                raise _told(lines, error) from None
            lines = [line for line in lines if line.is_open]
            present = {number: line for number, line in present.items() if line.is_open}  # who left may come again
            if len(present) == of - 1:
                for line in present.values():
                    line.send("go")
                return present
    raise _told(lines, RunError(
        f"{absent().capitalize()} did not start within {timeout:g} s, or can't reach process 0 at {host}:{port}: "
        "see their logs. --start_timeout sets how long to wait."
    ))  # fmt: skip


def _hear(line: Line, present: dict[int, Line], of: int) -> None:
    """Enters a process that says its number into `present`; closes the line to a stranger."""
    for text in line.read():
        hello = _HELLO.fullmatch(text)
        number, its_of = map(int, hello.groups()) if hello else (0, of)
        if its_of != of:
            raise InputError(
                f"Process {number} at {line.address} was started with --num_processes {its_of}, process 0 with {of}."
            )
        if not 0 < number < of:
            line.close()
            return
        other = present.get(number, line)
        if other is not line and other.is_open:
            raise InputError(
                f"Two processes were started with --process_id {number}, at {other.address} and {line.address}: "
                "every one needs a number of its own."
            )
        present[number] = line
    if not line.is_open:
        line.close()


def _told(lines: list[Line], error: RecalignError) -> RecalignError:
    """The error, after the others were told of it."""
    for line in lines:
        line.send(f"failed {error.exit_status} {error.message}")
        line.close()
    return error


def _call(host: str, port: int, number: int, of: int, timeout: float) -> Line:
    reason = ""
    for left in _until(timeout, lambda: terminal.warn(f"process 0 at {host}:{port} does not answer yet")):
        try:
            line = Line(socket.create_connection((host, port), timeout=min(left, PATIENCE_SECONDS)), host)
        except OSError as error:
            reason = error.strerror or str(error)
            continue
        line.send(f"recalign {number} {of}")
        # Process 0 decides who is missing, by its own clock.
        for text in _heard(line, timeout + FAREWELL_SECONDS):
            if text == "go":
                return line
            if failed := _FAILED.fullmatch(text):
                raise (InputError if int(failed[1]) == InputError.exit_status else RunError)(failed[2])
        line.close()
        reason = "it is there, but gives no start signal"
    raise RunError(
        f"Process 0 of {of} could not be reached at {host}:{port} within {timeout:g} s: {reason}. "
        f"See the log of process 0, and whether a firewall lets port {port} pass."
    )


def _heard(line: Line, timeout: float) -> Iterator[str]:
    """Yields what is said on a line until it ends, or the time is over."""
    deadline = time.monotonic() + timeout
    with selectors.DefaultSelector() as selector:
        selector.register(line, selectors.EVENT_READ)
        while line.is_open and (left := deadline - time.monotonic()) > 0:
            if selector.select(left):
                yield from line.read()


def watch(lines: Mapping[int, Line], end: Callable[[int, str], None]) -> None:
    """Starts a thread that calls `end(status, message)` when a process fails, or is gone without a word."""

    def wait() -> None:
        finished = set()
        with selectors.DefaultSelector() as selector:
            for number, line in lines.items():
                selector.register(line, selectors.EVENT_READ, number)
            while selector.get_map():
                for key, _ in selector.select():
                    number, line = key.data, lines[key.data]
                    for text in line.read():
                        if text == "done":
                            finished.add(number)
                        elif failed := _FAILED.fullmatch(text):
                            return end(int(failed[1]), failed[2])
                    if not line.is_open:
                        selector.unregister(line)
                        if number not in finished:
                            return end(RunError.exit_status, f"process {number} is gone; its own log may say why.")

    threading.Thread(target=wait, daemon=True, name="watch processes").start()


def farewell(lines: Mapping[int, Line], status: int, message: str) -> None:
    """Tells the others that this process failed; process 0 waits a little for them to end first."""
    for line in lines.values():
        line.send(f"failed {status} {message}")
    if 0 in lines:
        return
    deadline = time.monotonic() + FAREWELL_SECONDS
    while time.monotonic() < deadline and any(line.is_open for line in lines.values()):
        for line in lines.values():
            line.read()
        time.sleep(0.02)

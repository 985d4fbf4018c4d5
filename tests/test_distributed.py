"""Several processes: the roll call with every way in which it can fail, and that they end together."""

import concurrent.futures
import contextlib
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from recalign_jax import distributed, roll_call, terminal
from recalign_jax.checkpoint import locations, training
from recalign_jax.errors import InputError, RecalignError, RunError

ROOT = pathlib.Path(__file__).resolve().parents[1]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def port():
    return free_port()


# The roll call by itself: it is sockets only, so threads can stand for processes.


def gather(port: int, *processes: tuple[int, int], timeout: float = 10.0) -> list[dict | RecalignError]:
    """Calls the roll of (number, of); returns what every process gets, lines or the error."""

    def one(process):
        try:
            return roll_call.gather(f"127.0.0.1:{port}", *process, timeout)
        except RecalignError as error:
            return error

    with concurrent.futures.ThreadPoolExecutor(len(processes)) as pool:
        return list(pool.map(one, processes))


def test_all_are_there_and_the_port_is_free_again(port):
    zero, one, two = gather(port, (0, 3), (1, 3), (2, 3))
    assert set(zero) == {1, 2}
    assert set(one) == set(two) == {0}
    socket.create_server(("127.0.0.1", port)).close()  # while the lines are open: JAX's service comes here
    two[0].send("from\n two")
    assert list(roll_call._heard(zero[2], 0.5)) == ["from two"]
    assert zero[1].read() == []


def test_a_process_alone(port):
    assert gather(port, (0, 1)) == [{}]


def test_those_missing_are_named_everywhere_in_time(port):
    start = time.monotonic()
    errors = gather(port, (0, 5), (2, 5), (4, 5), timeout=1.5)
    assert time.monotonic() - start < 5
    assert {type(error) for error in errors} == {RunError}
    assert all(str(error).startswith("Processes 1, 3 of 5 did not start within 1.5 s") for error in errors)


def test_one_missing(port):
    [error] = gather(port, (0, 2), timeout=0.3)
    assert str(error).startswith("Process 1 of 2 did not start within 0.3 s")


def test_no_process_0(port):
    [error] = gather(port, (1, 2), timeout=0.5)
    assert isinstance(error, RunError)
    assert f"could not be reached at 127.0.0.1:{port} within 0.5 s: Connection refused" in str(error)


@pytest.mark.parametrize(
    ("processes", "text"),
    [
        (((0, 3), (1, 3), (1, 3)), "Two processes were started with --process_id 1"),
        (((0, 3), (1, 4)), "was started with --num_processes 4, process 0 with 3"),
    ],
)
def test_processes_that_contradict_one_another_all_hear_of_it(port, processes, text):
    errors = gather(port, *processes)
    assert {type(error) for error in errors} == {InputError}
    assert all(text in str(error) for error in errors)


@pytest.mark.parametrize(
    ("address", "number", "text"),
    [
        ("somewhere", 0, "must be HOST:PORT"),
        ("host:port", 0, "must be HOST:PORT"),
        ("host:70000", 1, "must be HOST:PORT"),
        ("127.0.0.1:1234", 2, "--process_id 2 must be one of 0 to 1"),
        ("127.0.0.1:1234", -1, "--process_id -1 must be one of 0 to 1"),
    ],
)
def test_bad_flags(address, number, text):
    with pytest.raises(InputError, match=text):
        roll_call.gather(address, number, 2, 0.3)


@pytest.mark.parametrize("number", [0, 1])
def test_a_host_without_an_address_may_come_later(number):
    with pytest.raises(RunError, match=r"'no\.such\.host\.invalid' of --coordinator_address has no address"):
        roll_call.gather("no.such.host.invalid:1234", number, 2, 0.3)


def test_a_port_in_use():
    with socket.create_server(("", 0)) as taken, pytest.raises(InputError, match="Address already in use"):
        roll_call.gather(f"127.0.0.1:{taken.getsockname()[1]}", 0, 2, 1.0)


def test_strangers_do_no_harm(port):
    """Rubbish of all kinds, a flood without an end of line, silence, and a process that went away and came again."""
    hellos = [f"recalign {said}\n".encode() for said in ("1", "-1 3", "0 3", "3 3", "99999999999 3")]
    rubbish = [b"GET / HTTP/1.1\r\n\r\n", bytes(range(256)), b"x" * 100_000, b"", b"\xff\xfe\n", b"go\n", b"done\n"]
    rubbish += [b"failed 0 x\n", *hellos]
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        zero = pool.submit(roll_call.gather, f"127.0.0.1:{port}", 0, 3, 20.0)
        silent = []
        for data in (*rubbish, b"recalign 1 3\n"):
            while True:
                try:
                    stranger = socket.create_connection(("127.0.0.1", port), 5)
                    break
                except ConnectionRefusedError:
                    time.sleep(0.02)
            with contextlib.suppress(OSError):  # the flood is cut off
                stranger.sendall(data)
            if data:
                stranger.close()
            else:
                silent.append(stranger)
        time.sleep(0.3)
        assert not zero.done()
        assert [set(lines) for lines in gather(port, (1, 3), (2, 3))] == [{0}, {0}]
        assert set(zero.result()) == {1, 2}
        for stranger in silent:
            stranger.close()


# What a process that has joined hears of the others.


@pytest.fixture
def pair():
    with socket.create_server(("127.0.0.1", 0)) as server:
        ours = socket.create_connection(server.getsockname())
        theirs, _ = server.accept()
    return roll_call.Line(ours, "here"), roll_call.Line(theirs, "there")


@pytest.mark.parametrize(
    ("said", "heard"),
    [
        (["failed 2 process 1: no\n such file"], [(2, "process 1: no such file")]),
        ([], [(1, "process 3 is gone; its own log may say why.")]),
        (["done"], []),
        (["nonsense", "done"], []),
    ],
)
def test_watching(pair, said, heard):
    ours, theirs = pair
    calls = []
    before = set(threading.enumerate())
    roll_call.watch({3: ours}, lambda status, message: calls.append((status, message)))
    for text in said:
        theirs.send(text)
    theirs.close()
    for thread in set(threading.enumerate()) - before:
        thread.join(timeout=60)
    assert calls == heard


# The flags, and what is printed.


def flags(*arguments: str):
    import argparse

    parser = argparse.ArgumentParser()
    distributed.add_arguments(parser)
    return parser.parse_args(arguments)


def test_without_flags_nothing_happens():
    distributed.start(flags())
    assert terminal.process() is None
    assert distributed.end(2, "wrong") == 2
    assert distributed.end(0, together=True) == 0


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--num_processes", "2"], "--num_processes needs the others of --coordinator_address"),
        (["--num_processes", "2", "--process_id", "0"], "--num_processes and --process_id need the others of"),
        (["--distributed", "--process_id", "0"], "--distributed finds what --process_id says"),
    ],
)
def test_flags_that_contradict_one_another(arguments, text):
    with pytest.raises(InputError, match=text):
        distributed.start(flags(*arguments))


def test_only_process_0_speaks(capsys, monkeypatch):
    for number in (None, 0, 1):
        monkeypatch.setattr(terminal, "_process", number)
        terminal.say(f"said {number}")
        terminal.table("t", ["a"], [[f"table {number}"]])
        terminal.warn(f"warned {number}")
        with terminal.progress(f"progress {number}", 2) as advance:
            advance(1, note="x")
            advance()
    output = capsys.readouterr()
    for text in ("said", "table"):
        assert [f"{text} {number}" in output.out for number in (None, 0, 1)] == [True, True, False]
    assert [f"progress {number}" in output.err for number in (None, 0, 1)] == [True, True, False]
    assert "warning: warned None" in output.err
    for speak in (terminal.say, terminal.warn):
        speak("[bold]A title[/] :star:")
    assert [text.count("[bold]A title[/] :star:") for text in capsys.readouterr()] == [0, 1]
    assert "warning: process 0: warned 0" in output.err
    assert "warning: process 1: warned 1" in output.err


# Real processes, joined by JAX.


def run(tmp_path: pathlib.Path, mode: str, who: int, *numbers: int, of: int = 3, timeout: int = 60) -> list[tuple]:
    """Starts processes that join, meet in one collective, and do what `mode` says; returns (status, out, err) each."""
    port = free_port()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "MODEL_DIR": str(tmp_path / "run")}
    environment.pop("XLA_FLAGS", None)
    program = [sys.executable, str(ROOT / "tests" / "joining_program.py"), mode, str(who)]
    flags = ["--coordinator_address", f"127.0.0.1:{port}", "--num_processes", str(of), "--start_timeout", str(timeout)]
    started = [
        subprocess.Popen(
            [*program, *flags, "--process_id", str(number)],
            env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for number in numbers or range(of)
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=90) for process in started]
    finally:
        for process in started:
            process.kill()
    return [(process.returncode, *output) for process, output in zip(started, outputs, strict=True)]


def test_processes_join_and_end_in_any_order(tmp_path):
    """Process 1 comes to the end two seconds after the others."""
    ended = run(tmp_path, "late", 1)
    assert [status for status, _, _ in ended] == [0, 0, 0]
    assert [out.count('{"processes": 3, "total": 6}') for _, out, _ in ended] == [1, 0, 0]
    assert [out.count("said by one") for _, out, _ in ended] == [1, 0, 0]
    assert all("Check failure" not in err for _, _, err in ended)


def test_a_checkpoint_that_is_damaged_to_one_is_damaged_to_all(tmp_path):
    """Rather than that they wait for one another at different checkpoints."""
    array = np.arange(4, dtype=np.float32)
    with training.open_checkpoints(str(tmp_path / "run")) as checkpoints:
        for step in (1, 2, 3):
            training.save(checkpoints, step, {"a": array}, (array,), {"identity": {}, "positions": []})
    ended = run(tmp_path, "damaged", 1, of=2)
    assert [status for status, _, _ in ended] == [0, 0], ended
    assert '{"step": 1}' in ended[0][1]
    told = [" ".join(err.split()) for _, _, err in ended]
    assert "checkpoints/3 is damaged, says one." in told[1]
    assert "checkpoints/3 is damaged: to process 1, which says what is wrong" in told[0]
    assert "checkpoints/2 is damaged: params can't be read (OSError: a stale file handle)" in told[0]
    assert locations.steps(str(tmp_path / "run")) == [1]
    assert {path.name for path in (tmp_path / "run" / "damaged_checkpoints").iterdir()} == {"2", "3"}


@pytest.mark.parametrize(("mode", "restored", "moved"), [("lagging", 3, set()), ("altered", 2, {"3"})])
def test_all_go_on_from_one_checkpoint(tmp_path, mode, restored, moved):
    """Also where one process doesn't see the newest one yet, or reads other bits than were saved."""
    array = np.arange(4, dtype=np.float32)
    with training.open_checkpoints(str(tmp_path / "run")) as checkpoints:
        for step in (1, 2, 3):
            training.save(checkpoints, step, {"a": array + step}, (array,), {"identity": {}, "positions": []})
    ended = run(tmp_path, mode, 1, of=2)
    assert [status for status, _, _ in ended] == [0, 0], ended
    assert f'{{"step": {restored}}}' in ended[0][1]
    assert [f"process {number} is at step {restored}" in err for number, (_, _, err) in enumerate(ended)] == [
        True,
        True,
    ]
    assert {path.name for path in (tmp_path / "run").glob("damaged_checkpoints/*")} == moved


def test_a_process_that_does_not_start_is_named(tmp_path):
    ended = run(tmp_path, "late", 1, 0, 2, of=4, timeout=12)
    assert [status for status, _, _ in ended] == [1, 1]
    assert all("Processes 1, 3 of 4 did not start within 12 s" in err for _, _, err in ended)
    assert all("Check failure" not in err for _, _, err in ended)


@pytest.mark.parametrize(
    ("mode", "who", "statuses", "text"),
    [
        ("input_error", 1, [2, 2, 2], "process 1: no such thing"),
        ("run_error", 0, [1, 1, 1], "process 0: it broke"),
        ("bug", 2, [1, 1, 1], "ZeroDivisionError"),
        ("kill", 1, [1, -signal.SIGKILL, 1], "process 1 is gone"),
        ("preempted", 0, [75, 75, 75], "saved"),
        ("apart", 1, [2, 2, 2], "process 1 doesn't see what process 0 wrote there"),
    ],
)
def test_one_that_fails_ends_all(tmp_path, mode, who, statuses, text):
    start = time.monotonic()
    ended = run(tmp_path, mode, who)
    assert time.monotonic() - start < distributed.HEARTBEAT_TIMEOUT_SECONDS / 2
    assert [status for status, _, _ in ended] == statuses
    for status, _, err in ended:
        assert status == -signal.SIGKILL or text in err
        assert "Check failure" not in err

"""What the C library and the system are told of a process."""

import fnmatch
import os
import pathlib
import platform
import subprocess
import sys
import time

import pytest

from recalign_jax import host

# Asks for memory twenty times in a thread, and prints how many pages the system had to make the last ten times.
PROGRAM = """
import resource, sys, threading
import numpy as np
from recalign_jax import host

if sys.argv[1] == "keep":
    host.keep_freed_memory()

def ask():
    for turn in range(20):
        if turn == 10:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        np.empty(int(sys.argv[2]))[:] = turn
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

thread = threading.Thread(target=ask)
thread.start()
thread.join()
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told to keep what is freed")
@pytest.mark.parametrize("size", [2**22, 2**23])  # 32 MiB a thread's own heap could hold, 64 MiB it could not
def test_freed_memory_is_kept(size):
    pages = {}
    for what in ("keep", "give back"):
        command = [sys.executable, "-c", PROGRAM, what, str(size)]
        ended = subprocess.run(command, capture_output=True, text=True, check=True)
        pages[what] = int(ended.stdout)
    assert pages["keep"] < 100
    assert pages["give back"] > 10 * 8 * size / 2**21  # were they of 2 MiB


@pytest.mark.parametrize(
    ("platforms", "files", "expected"),
    [
        ("cpu", ["/dev/nvidia0"], True),
        ("cuda,cpu", [], False),
        ("", [], True),
        ("", ["/dev/accel0"], False),
        ("", ["/dev/nvidia0", "/dev/nvidiactl"], False),
        ("", ["/dev/nvidiactl"], True),
    ],
)
def test_what_jax_will_compute_on(platforms, files, expected, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    monkeypatch.setattr(host.glob, "glob", lambda pattern: fnmatch.filter(files, pattern))
    assert host.computes_on_cpu() is expected


# A process with a child that would live for a minute; it prints the child's number once the child is ready.
PARENT = """
import subprocess, sys, time
child = "from recalign_jax import host; import time; host.die_with_parent(); print('ready', flush=True); time.sleep(60)"
process = subprocess.Popen([sys.executable, "-c", child], stdout=subprocess.PIPE)
process.stdout.readline()
print(process.pid, flush=True)
time.sleep(60)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux kills a child with its parent")
def test_a_child_dies_with_a_parent_that_is_killed():
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE) as parent:
        child = int(parent.stdout.readline())
        os.kill(child, 0)  # is there
        parent.kill()
    status, until = pathlib.Path(f"/proc/{child}/status"), time.monotonic() + 10

    def lives() -> bool:
        try:
            return "(zombie)" not in status.read_text()
        except OSError:  # it is gone
            return False

    while lives() and time.monotonic() < until:
        time.sleep(0.05)
    assert not lives()

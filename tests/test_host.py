"""What the C library and the system are told of a process."""

import os
import pathlib
import platform
import subprocess
import sys
import time

import pytest

# Asks for 64 MB twenty times, and prints how many pages the system had to make the last ten times.
PROGRAM = """
import resource, sys
import numpy as np
from recalign_jax import host

if sys.argv[1] == "keep":
    host.keep_freed_memory()
for turn in range(20):
    if turn == 10:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.empty(2**23)[:] = turn
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told to keep what is freed")
def test_freed_memory_is_kept():
    pages = {}
    for what in ("keep", "give back"):
        ended = subprocess.run([sys.executable, "-c", PROGRAM, what], capture_output=True, text=True, check=True)
        pages[what] = int(ended.stdout)
    assert pages["keep"] < 100
    assert pages["give back"] > 10 * 2**26 / 2**21  # were they of 2 MB


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
    while status.exists() and "(zombie)" not in status.read_text() and time.monotonic() < until:
        time.sleep(0.05)
    assert not status.exists() or "(zombie)" in status.read_text()

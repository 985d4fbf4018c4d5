"""Memory that a program frees and asks for again."""

import platform
import subprocess
import sys

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

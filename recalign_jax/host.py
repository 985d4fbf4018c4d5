"""This process and its machine: what there is, and what the C library and libtpu are told of it."""

import ctypes
import glob
import os
import signal


def tell_libtpu_of_no_tpu() -> None:
    """Keeps libtpu, the compiler of `recalign plan`, from looking for a TPU and complaining that there is none.

    It then asks no metadata server, and shares the library with other processes.
    """
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")


# Names of glibc's mallopt (malloc.h), and the largest number that it takes.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8
_MOST = 2**31 - 1


def keep_freed_memory() -> None:
    """Makes the C library keep what is freed for whoever asks next, in place of giving it back to the system.

    For programs on a CPU that do the same again and again, as train steps do: XLA asks for a step's temporaries anew
    every time, and pages that come from the system are zeroed first. Memory stays at its highest. To be called before
    there are threads: the heaps that they would get of their own are given back whenever they are empty, so all share
    one. Only glibc does as it is told; elsewhere nothing changes.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, 1)
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, _MOST)


_PR_SET_PDEATHSIG = 1  # prctl(2)


def die_with_parent() -> None:
    """Has the system kill this process when its parent ends in whatever way (Linux; elsewhere nothing changes)."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def has_tpu() -> bool:
    """Whether the operating system has a device file of a TPU."""
    return bool(glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*"))


def computes_on_cpu() -> bool:
    """Whether JAX will compute on the CPU, told without starting it: it was said so, or there is nothing else."""
    if platforms := os.environ.get("JAX_PLATFORMS"):
        return platforms == "cpu"
    return not (has_tpu() or glob.glob("/dev/nvidia[0-9]*") or glob.glob("/dev/kfd"))  # kfd: of AMD's GPUs

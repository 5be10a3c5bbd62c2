"""Memory of this process: its peak, and what it keeps of what was freed."""

import ctypes
import os
import resource
import sys
from collections.abc import Mapping

TRIM_THRESHOLD, MMAP_MAX, ARENA_MAX = -1, -4, -8  # parameters of glibc's mallopt (malloc.h)
HUGE_PAGES = 14  # MADV_HUGEPAGE (mman.h)
KEPT_SHARE = 0.5  # of the machine's memory: so many addresses are marked for huge pages


def peak_memory() -> int:
    """Returns the peak resident memory of this process so far, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def keep_freed(environ: Mapping[str, str]) -> bool:
    """Has glibc keep what is freed, in huge pages; for a process whose device is the CPU.

    XLA allocates the arrays of a step anew at each step. By default they go back to the kernel when they are freed, and
    come from it as new pages of 4 KiB, each filled with zeros: of some steps a third of the time (docs/performance.md).
    Here one arena serves all threads, nothing is mapped on its own or trimmed, and the heap is in huge pages where the
    kernel lets a program ask for them. The peak is the same; less is given back after it.

    Call it before other threads start, since a thread keeps the arena that it began with.

    Args:
      environ: the environment variables. Where these set an allocator or its parameters, nothing is changed.

    Returns:
      Whether it was done: False with another libc (macOS, musl).
    """
    libc = ctypes.CDLL(None)
    given = {"LD_PRELOAD", "GLIBC_TUNABLES"} & environ.keys() or any(name.startswith("MALLOC_") for name in environ)
    if given or not hasattr(libc, "gnu_get_libc_version"):
        return False
    for parameter, value in ((ARENA_MAX, 1), (MMAP_MAX, 0), (TRIM_THRESHOLD, -1)):  # -1: never
        libc.mallopt(parameter, value)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes, libc.madvise.argtypes = [ctypes.c_void_p], [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    page, size = os.sysconf("SC_PAGE_SIZE"), int(os.sysconf("SC_PHYS_PAGES") * KEPT_SHARE) * os.sysconf("SC_PAGE_SIZE")
    if (start := libc.malloc(size)) is not None:  # addresses alone: no page is touched, and the heap keeps them
        libc.madvise(-(-start // page) * page, size - page, HUGE_PAGES)
        libc.free(start)
    return True

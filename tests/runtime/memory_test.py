"""What is freed stays in the process where the CPU is the device."""

import ctypes
import subprocess
import sys

import pytest

from mae_jax.runtime.memory import keep_freed

# A thread allocates, fills and frees 64 MiB ten times, as the thread pool of XLA does; prints the pages that were new.
PROGRAM = """
import ctypes, resource, threading
from mae_jax.runtime.memory import keep_freed
print(keep_freed({environ}))
libc = ctypes.CDLL(None)
libc.malloc.restype = libc.memset.restype = ctypes.c_void_p
libc.malloc.argtypes, libc.free.argtypes = [ctypes.c_size_t], [ctypes.c_void_p]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]

def work():
    for _ in range(10):
        block = libc.malloc(1 << 26)
        libc.memset(block, 1, 1 << 26)
        libc.free(block)

before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
thread = threading.Thread(target=work)
thread.start()
thread.join()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
ONCE = (1 << 26) // 4096  # pages of 64 MiB
glibc = pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="another libc")


def run(environ):
    done = subprocess.run([sys.executable, "-c", PROGRAM.format(environ=environ)], capture_output=True, text=True,
                          check=True)
    kept, pages = done.stdout.split()
    return kept == "True", int(pages)


@glibc
def test_a_thread_takes_new_pages_once():
    kept, pages = run({})
    assert kept
    assert pages < 1.5 * ONCE


@glibc
@pytest.mark.parametrize("name", ["MALLOC_ARENA_MAX", "GLIBC_TUNABLES", "LD_PRELOAD"])
def test_an_allocator_that_the_user_chose_stays(name):
    assert keep_freed({name: "1"}) is False


@glibc
def test_without_it_new_pages_are_taken_each_time():
    kept, pages = run({"MALLOC_PERTURB_": "0"})
    assert not kept
    assert pages > 5 * ONCE

"""Memory that is freed stays with a process that trains on a CPU."""

import ctypes
import subprocess
import sys

import pytest

CODE = """
import ctypes, sys
from vistok.training.memory import keep_freed_memory

class Account(ctypes.Structure):
    _fields_ = [("heap", ctypes.c_size_t), ("others", ctypes.c_size_t * 9)]

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
libc.mallinfo2.restype = Account

assert sys.argv[1] == "default" or keep_freed_memory()
before = libc.mallinfo2().heap
for _ in range(2):
    pieces = [libc.malloc(16 << 20) for _ in range(32)]
    for piece in reversed(pieces):
        libc.free(piece)
print(libc.mallinfo2().heap - before)  # taken from the kernel and not given back, mappings apart
"""


@pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="reads glibc's account of its memory"
)
def test_the_next_step_takes_what_the_last_one_freed():
    """The account is the C library's own: not every kernel counts page faults."""

    def more(which):
        command = [sys.executable, "-c", CODE, which]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    assert more("keep") >= 500 << 20 > 2 * more("default")

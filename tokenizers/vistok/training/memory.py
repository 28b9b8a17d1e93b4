"""Memory that training on a CPU keeps between its steps."""

from __future__ import annotations

import ctypes
import platform

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # malloc.h

_LARGEST_KEPT = 32 << 20  # bytes; glibc takes no larger value


def keep_freed_memory() -> bool:
    """Let the C library keep what a step frees, for the next step to take.

    Each step takes and frees the same gradients and activations. By default glibc gives them back
    to the kernel, which hands them out again page by page, filled with zeros. The process then
    holds the peak of its memory, pieces above 32 MiB apart. Only glibc has this setting.

    Returns:
        Whether it took effect.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_MMAP_THRESHOLD, _LARGEST_KEPT) and mallopt(_TRIM_THRESHOLD, 2**31 - 1))

"""Keeps the C library from giving large tensors back to the system after every use.

By default glibc maps each large block anew and unmaps it when freed, so a training step on CPU spends a third of its
time on page faults. Keeping freed memory in the heap changes no number, only speed, and costs some resident memory.
"""

from __future__ import annotations

import ctypes
import os

__all__ = ["keep_freed_memory"]

# From glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST = 1 << 30


def keep_freed_memory() -> None:
    """Set the thresholds for this process, and ask torch for huge pages. Elsewhere than on glibc this does nothing.

    Call before torch allocates its first tensor: torch reads its environment variable once.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:
        return
    libc.mallopt(M_MMAP_THRESHOLD, LARGEST)
    libc.mallopt(M_TRIM_THRESHOLD, 2 * LARGEST - 1)

"""How freed memory is kept for the next tensor, on the CPU and on a GPU. It changes no number.

By default glibc maps each large block anew and unmaps it when freed, so a training step on CPU spends a third of its
time on page faults. Keeping freed memory in the heap costs some resident memory. On a GPU, torch's allocator keeps
blocks of the sizes that were asked for, and passes of ever other lengths leave holes between them: segments that can
grow leave fewer.
"""

from __future__ import annotations

import ctypes
import os

from accord.errors import ConfigError

__all__ = ["CHOICE", "allocator_note", "keep_freed_memory"]

CHOICE = "ACCORD_ALLOCATOR"
# What torch reads, by its present name and the one before.
GPU_SETTINGS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")

# From glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST = 1 << 30

_kept = False


def keep_freed_memory() -> None:
    """Set the thresholds for this process, and ask torch for huge pages, unless ACCORD_ALLOCATOR is `system`. Elsewhere
    than on glibc only the GPU's part is done. Settings of torch's own that are there already stay.

    Call before torch allocates its first tensor: torch reads its environment variables once.
    Raises: ConfigError for another value of ACCORD_ALLOCATOR.
    """
    global _kept
    choice = os.environ.get(CHOICE, "keep")
    if choice not in ("keep", "system"):
        raise ConfigError(f"{CHOICE} is {choice!r}; expected `keep` (freed memory, for speed) or `system`")
    if choice == "system":
        return
    _kept = True
    if not any(name in os.environ for name in GPU_SETTINGS):
        os.environ[GPU_SETTINGS[1]] = "expandable_segments:True"
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:
        return
    libc.mallopt(M_MMAP_THRESHOLD, LARGEST)
    libc.mallopt(M_TRIM_THRESHOLD, 2 * LARGEST - 1)


def allocator_note() -> str:
    """What is done about freed memory, in a few words."""
    return f"freed memory kept ({CHOICE}=system gives it back)" if _kept else "freed memory given back"

"""How this process asks the system for memory."""

import ctypes
import os


# Of glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST_KEPT = (2**30, 2**25)  # bytes; older versions take no more than the latter


def keep_freed_memory() -> bool:
    """
    Have memory that tensors on the CPU leave kept for the next ones, as PyTorch does on a GPU; returns whether it was done.

    glibc hands it back after every training step, and the system zeroes each page again before the next: a third of the
    time of a step on a virtual machine, and most of its spread. Other C libraries are left as they are.
    """
    if os.name != "posix" or not hasattr(ctypes.CDLL(None), "mallopt"):
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return any(mallopt(M_MMAP_THRESHOLD, size) for size in LARGEST_KEPT) and bool(mallopt(M_TRIM_THRESHOLD, -1))

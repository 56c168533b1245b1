"""How this process asks the system for memory, and how much it has."""

import ctypes
import gc
import os
from collections.abc import Callable
from pathlib import Path


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


def peak_of_process() -> int:
    """The most memory that this process had at once, in bytes."""
    status = read_status()
    if status:  # of Linux, where the other figure counts what the process was started from, too
        return status["VmHWM"]
    import resource  # of Unix alone

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in bytes on macOS


def measure_growth(work: Callable[[], object]) -> int | None:
    """By how many bytes the memory of this process grows at most while it works; on Linux alone, else none."""
    if not read_status():
        return None
    gc.collect()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)  # what was freed before would be used again unseen
    before = read_status()["VmRSS"]
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    work()
    return read_status()["VmHWM"] - before


def read_status() -> dict[str, int]:
    """Sizes in bytes by their names in proc(5); nothing on other systems than Linux."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    return {
        name: int(size.removesuffix("kB")) * 1024
        for name, size in (line.split(":", 1) for line in lines)
        if size.endswith("kB")
    }

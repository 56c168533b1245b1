"""Memory of this process: how glibc allocates it, and how much there is."""

import ctypes
import gc
import os
from collections.abc import Callable
from pathlib import Path


# From glibc's malloc.h
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
CONTAINER = Path("/sys/fs/cgroup")  # the container's own control group; a host's root has no limit
RECLAIMABLE = ("inactive_file", "active_file", "slab_reclaimable")  # of memory.stat; MemAvailable counts them, too
LARGEST_KEPT = (2**30, 2**25)  # bytes; older versions of glibc accept only the second


def keep_freed_memory() -> bool:
    """
    Keep freed memory in the process for the next tensors, as PyTorch does on a GPU. Returns whether that is possible.

    By default glibc returns it to the system after every training step, and the system zeroes every page again. On a
    virtual machine that takes a third of a step, and causes most of the spread of its time. Other C libraries stay as
    they are.
    """
    if os.name != "posix" or not hasattr(ctypes.CDLL(None), "mallopt"):
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return any(mallopt(M_MMAP_THRESHOLD, size) for size in LARGEST_KEPT) and bool(mallopt(M_TRIM_THRESHOLD, -1))


def peak_of_process() -> int:
    """Peak memory of this process, in bytes."""
    status = read_status()
    if status:  # Linux, where ru_maxrss also counts the process that started this one
        return status["VmHWM"]
    import resource  # only on Unix

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in bytes on macOS


def forget_peak() -> None:
    """Let `peak_of_process` count from now on. Only Linux can."""
    if read_status():
        Path("/proc/self/clear_refs").write_text("5")


def available_memory() -> int | None:
    """Memory that this process has and can get without swapping, in bytes. `None` except on Linux."""
    free = free_memory()
    return None if free is None else free + read_status()["VmRSS"]


def free_memory() -> int | None:
    """Memory that this process can get without swapping, in bytes. `None` except on Linux."""
    machine = Path("/proc/meminfo")
    if not read_status() or not machine.is_file():
        return None
    available = next(line for line in machine.read_text().splitlines() if line.startswith("MemAvailable:"))
    free, of_container = int(available.split()[1]) * 1024, free_in_container(CONTAINER)
    return free if of_container is None else min(free, of_container)


def free_in_container(group: Path) -> int | None:
    """
    Memory that a control group leaves, with what the kernel can reclaim, in bytes; `None` without a limit or a group.

    Args:
        group: folder of a control group, version 2.
    """
    try:
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        # The kernel frees cached files and directory entries when memory runs short.
        return max(0, limit - used + sum(int(statistics[name]) for name in RECLAIMABLE))
    except (OSError, ValueError, KeyError):  # a limit of `max` is no number
        return None


def measure_growth(work: Callable[[], object]) -> int | None:
    """Peak growth of this process's memory during `work()`, in bytes. `None` except on Linux."""
    if not read_status():
        return None
    gc.collect()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)  # otherwise freed memory is used again and does not count
    before = read_status()["VmRSS"]
    forget_peak()
    work()
    return read_status()["VmHWM"] - before


def read_status() -> dict[str, int]:
    """Sizes in bytes of /proc/self/status, by name (see proc(5)). Empty except on Linux."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    return {
        name: int(size.removesuffix("kB")) * 1024
        for name, size in (line.split(":", 1) for line in lines)
        if size.endswith("kB")
    }

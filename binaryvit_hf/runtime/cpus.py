"""How many CPUs this process may use, and how its threads wait for each other."""

import contextlib
import math
import os
from collections.abc import MutableMapping
from pathlib import Path


CGROUPS = Path("/sys/fs/cgroup")
OF_PROCESS = Path("/proc/self/cgroup")
SPINS = "20000"  # of a waiting thread before it sleeps, about 1 ms
WAIT_VARIABLES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
SMALL_NETWORK = 5 * 10**7  # multiplications of one image; below, two threads are no faster than one


def available_cpus() -> int:
    """
    The CPUs of this process: those of its affinity, or fewer if a container has a limit, such as `docker run --cpus 2`.
    """
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limit = container_cpus(OF_PROCESS, CGROUPS)
    return cpus if limit >= cpus else max(1, math.ceil(limit))


def largest_team(multiplications: int) -> int:
    """
    The most threads that should compute one image of a network at once.

    They wait for each other. That is slow with more threads than CPUs, in a small network also where other processes use
    the CPUs.
    """
    return 1 if multiplications < SMALL_NETWORK else available_cpus()


def limit_spinning(variables: MutableMapping[str, str] = os.environ) -> None:
    """
    Let threads of PyTorch sleep when they have waited for 1 ms, unless a variable of the user says otherwise.

    Call it before PyTorch is imported: its OpenMP (libgomp) reads the variable then, and spins 15 times as long by default.
    A spinning thread takes the CPU from the one that it waits for, if another process uses the other CPUs. Child processes
    inherit the variable. Workers of a data loader need that: they import PyTorch first.
    """
    # Training steps of configs/fashion-mnist/binaryvit, two threads on two CPUs, in turns. Default, 20000 spins, OMP_WAIT_POLICY=PASSIVE:
    # 259, 254 and 380 ms on a quiet machine; about 8.2, 1.3 and 0.9 s on a loaded one.
    if not any(name in variables for name in WAIT_VARIABLES):
        variables["GOMP_SPINCOUNT"] = SPINS


def container_cpus(of_process: Path, cgroups: Path) -> float:
    """
    The least limit of the control groups of a process and of their parents, in CPUs; infinity without a limit.

    Args:
        of_process: file with the process's groups, `/proc/self/cgroup`.
        cgroups: where control groups are mounted.
    """
    try:
        lines = of_process.read_text().splitlines()
    except OSError:  # not Linux
        return math.inf
    limits = [math.inf]
    for line in lines:  # `number:controllers:path`; version 2 has no controllers
        _, controllers, path = line.split(":", 2)
        if not controllers:
            root, read = cgroups, read_version_2
        elif "cpu" in controllers.split(","):
            root, read = cgroups / "cpu", read_version_1
        else:
            continue
        # In a container the path may be the host's, and the container's own group is mounted at the root.
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(root):
                # A root group has no such file.
                with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
                    limits.append(read(folder))
    return min(limits)


def read_version_2(group: Path) -> float:
    quota, period = (group / "cpu.max").read_text().split()
    return share(quota, period)


def read_version_1(group: Path) -> float:
    return share((group / "cpu.cfs_quota_us").read_text(), (group / "cpu.cfs_period_us").read_text())


def share(quota: str, period: str) -> float:
    """The quota of a group in CPUs. A group without one has `max` in version 2 and -1 in version 1."""
    return math.inf if quota == "max" or float(quota) < 0 else float(quota) / float(period)

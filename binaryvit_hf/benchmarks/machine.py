"""The machine that times belong to."""

import platform
from pathlib import Path

from binaryvit_runtime import engine


def describe_machine() -> dict[str, str | None]:
    """`cpu`: its name, as far as the system tells it. `kernels`: those that the engine uses on it, `None` without an engine."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text(encoding="utf-8").splitlines() if information.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    cpu = names[0] if names else platform.processor() or platform.machine()
    return {"cpu": cpu, "kernels": next(iter(engine.kernels_here()), None)}

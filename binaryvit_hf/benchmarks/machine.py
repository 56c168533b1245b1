"""The machine that times belong to."""

import contextlib
import platform
from pathlib import Path

from binaryvit_runtime.errors import UnsupportedModelError
from binaryvit_runtime.packed_model import choose_kernels


def describe_machine() -> dict[str, str | None]:
    """`cpu`: its name, as far as the system tells it. `kernels`: see `choose_kernels`, `None` where the engine is not used."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text(encoding="utf-8").splitlines() if information.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    cpu, kernels = names[0] if names else platform.processor() or platform.machine(), None
    with contextlib.suppress(UnsupportedModelError):
        kernels = choose_kernels()
    return {"cpu": cpu, "kernels": kernels}

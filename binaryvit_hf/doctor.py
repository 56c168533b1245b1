"""The report of `binaryvit doctor`: installed versions, the CPU, and the kernels that run packed models on it."""

import importlib.metadata
import platform

import torch

from binaryvit_runtime.errors import UserError, counted

from . import __version__, engine
from .network.engine_binaryvit import TORCH, wanted_kernels


LIBRARIES = ("torch", "transformers", "safetensors", "huggingface_hub", "accelerate", "datasets", "timm")


def check_engine_variable() -> None:
    """
    Raises:
        UserError: BINARYVIT_ENGINE names kernels that this machine does not have.
    """
    try:
        wanted_kernels()
    except ValueError as error:
        raise UserError(str(error)) from error


def describe_machine() -> str:
    """The report, a line for each fact."""
    rows = {
        "binaryvit_hf": __version__,
        "Python": platform.python_version(),
        **{name: version(name) for name in LIBRARIES},
        "CPU": f"{platform.machine()}, {counted(torch.get_num_threads(), 'thread')}",
        "CPU features": ", ".join(engine.cpu_features()) or "unknown without the engine",
        "GPU": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "kernels built": ", ".join(engine.kernels_built()) or f"none: {engine.problem()}",
        "kernels this CPU runs": ", ".join(engine.kernels_here()) or "none",
        "packed models run on": describe_engine_choice(),
        "on threads of": "PyTorch's OpenMP runtime" if engine.openmp_of_torch() else "their own",
    }
    width = max(map(len, rows))
    return "\n".join(f"{name:{width}}  {value}" for name, value in rows.items())


def version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def describe_engine_choice() -> str:
    wanted, here = wanted_kernels(), engine.kernels_here()
    if wanted:
        return f"{wanted} (BINARYVIT_ENGINE says so)"
    return here[0] if here else f"{TORCH}, slower than the engine"

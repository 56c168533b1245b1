"""`binaryvit doctor`: describes this machine, for bug reports."""

import argparse
import importlib
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

from binaryvit_runtime.errors import UnsupportedModelError, counted
from binaryvit_runtime.resources import installation, package_version

from .common import has_pytorch, import_problem


NEEDS_PYTORCH = False
EXAMPLE = "binaryvit doctor"
LIBRARIES = ("torch", "transformers", "numpy", "pillow", "safetensors")
OPTIONAL_LIBRARIES = ("huggingface_hub", "accelerate", "datasets", "timm")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`doctor` takes no arguments."""


def run(options: argparse.Namespace) -> None:
    """
    Describe this machine for a bug report: versions of the libraries, the CPU, and the kernels that run packed models.
    """
    from binaryvit_runtime import engine

    problem = import_problem() if has_pytorch() else "it is not installed"
    usable = problem is None
    of_pytorch = describe_pytorch(usable)
    rows = {
        "binaryvit_hf": package_version(),
        **describe_commit(),
        "Python": platform.python_version(),
        **{name: version(name) for name in LIBRARIES + OPTIONAL_LIBRARIES},
        "CPU": f"{platform.machine()}, {of_pytorch['threads']}",
        "CPU features": ", ".join(engine.cpu_features()) or "unknown without the engine",
        "GPU": of_pytorch["GPU"],
        "kernels built": ", ".join(engine.kernels_built()) or f"none: {engine.problem()}",
        "kernels this CPU runs": ", ".join(engine.kernels_here()) or "none",
        "packed models run on": describe_engine_choice(usable),
        "on threads of": of_pytorch["threads of"],
        "training on the CPU runs on": describe_training(usable),
    }
    if has_pytorch() and not usable:
        rows["PyTorch"] = f"cannot be used: {problem}"
    if not usable:
        rows["commands"] = f"{', '.join(commands_without_pytorch())}; the others need PyTorch: {installation()}"
    width = max(map(len, rows))
    print("\n".join(f"{name:{width}}  {value}" for name, value in rows.items()))


def commands_without_pytorch() -> list[str]:
    """The commands that work without PyTorch, with the argument that they need for it."""
    from . import COMMANDS

    modules = {name: importlib.import_module(f".{name}", __package__) for name in COMMANDS}
    return [
        getattr(module, "WITHOUT_PYTORCH", name)
        for name, module in modules.items()
        if not getattr(module, "NEEDS_PYTORCH", True)
    ]


def describe_commit() -> dict[str, str]:
    """The commit of a clone, because all of them have one version; nothing without git, or for an installed package."""
    folder = Path(__file__).resolve().parents[2]
    if not (folder / ".git").exists():
        return {}
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return {}
    return {"commit": done.stdout.strip()}


def version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def describe_pytorch(usable: bool) -> dict[str, str]:
    """
    What PyTorch says about this machine: number of threads, GPU, whose threads the engine uses.

    Args:
        usable: whether PyTorch and transformers can be imported, also in the next functions.
    """
    if not usable:
        from binaryvit_runtime.cpus import available_cpus

        return {
            "threads": counted(available_cpus(), "thread"),
            "GPU": "unknown without PyTorch",
            "threads of": "their own",
        }
    import torch

    from binaryvit_hf.engine import openmp_of_torch

    return {
        "threads": counted(torch.get_num_threads(), "thread"),
        "GPU": describe_gpu(),
        "threads of": "PyTorch's OpenMP runtime" if openmp_of_torch() else "their own",
    }


def describe_gpu() -> str:
    """The name of an NVIDIA or AMD GPU, what PyTorch calls another accelerator, such as mps, or none."""
    import torch

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return "none"
    return torch.cuda.get_device_name() if accelerator.type == "cuda" else accelerator.type


def describe_training(usable: bool) -> str:
    """What computes training in float32 on the CPU."""
    if not usable:
        return "nothing: it needs PyTorch"
    from binaryvit_hf import row_kernels
    from binaryvit_hf.network.functional_binaryvit import row_kernels_obstacle

    obstacle = row_kernels_obstacle()
    return f"torch ({obstacle})" if obstacle else f"row kernels, {row_kernels.instruction_sets()[0]}"


def describe_engine_choice(usable: bool) -> str:
    """
    Raises:
        UserError: BINARYVIT_ENGINE names kernels that this machine does not have.
    """
    from binaryvit_runtime.packed_model import ENGINE_VARIABLE, TORCH, choose_kernels

    try:
        chosen = choose_kernels()
    except UnsupportedModelError as error:
        if not usable:
            return f"nothing: {error}"
        chosen = TORCH
    if os.environ.get(ENGINE_VARIABLE):
        return f"{chosen} ({ENGINE_VARIABLE} says so)"
    return f"{TORCH}, slower than the engine" if chosen == TORCH else chosen

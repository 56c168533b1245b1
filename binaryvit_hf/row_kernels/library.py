"""Python binding of the row kernels (rows.inc), by ctypes."""

import ctypes
import functools
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import SimpleNamespace

import torch

from binaryvit_runtime.engine import fingerprint

from ..engine import openmp_of_torch


EXTENSION_NAME = "rows"  # as in setup.py; a plain C library, which Python cannot import
SHARED_SOURCES = (Path(fingerprint.__file__).with_name("team.cpp"),)  # with the engine, as in setup.py

Pointer, Int, Int64, Float = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float


class NormActivation(ctypes.Structure):
    """The struct of row_kernels.h."""

    _fields_ = [
        *((name, Pointer) for name in ["mean", "variance", "weight", "bias", "shift_in", "slope", "shift_out"]),
        ("eps", Float),
    ]


class NormActivationGradients(ctypes.Structure):
    """The struct of row_kernels.h."""

    _fields_ = [(name, Pointer) for name in ["weight", "bias", "shift_in", "slope", "shift_out"]]


class RunningStatistics(ctypes.Structure):
    """The struct of row_kernels.h."""

    _fields_ = [("mean", Pointer), ("variance", Pointer), ("momentum", Float)]


Norm, Gradients, Running = map(ctypes.POINTER, (NormActivation, NormActivationGradients, RunningStatistics))

# Types of the arguments, by kernel of rows.inc.
KERNELS = {
    "sign_bytes": [Pointer, Pointer, Int64, Int64, Pointer, Int],
    "split_weight": [Pointer, Int64, Int64, Pointer, Pointer, Int],
    "scale_counts": [Pointer, Pointer, Int64, Int64, Int],
    "sign_gradient": [Pointer, Pointer, Pointer, Int64, Int64, Pointer, Pointer, Int, Pointer, Int],
    "moments": [Pointer, Int64, Int64, Running, Pointer, Pointer, Int],
    "norm_activation": [Pointer, Pointer, Int64, Norm, Int64, Int64, Pointer, Int],
    "norm_activation_gradient": [
        *(Pointer, Pointer, Int64, Norm, Int64, Pointer, Int64, Int64, Pointer, Pointer, Gradients, Int)
    ],
    "activate_packed": [Pointer, Int, Pointer, Pointer, Norm, Int64, Int64, Pointer, Int],
    "activate_packed_gradient": [
        *(Pointer, Int, Pointer, Pointer, Norm, Pointer, Int64, Int64, Pointer, Pointer, Int),
    ],
    "pack_counts": [Pointer, Int, Int64, Int64, Int64, Pointer, Int, Pointer, Int],
    "count_moments": [Pointer, Pointer, Int64, Int64, Running, Pointer, Pointer],
    "activate_counts": [
        *(Pointer, Int, Pointer, Pointer, Norm, Pointer, Int64, Int64, Int64, Pointer, Pointer, Int),
    ],
    "activate_counts_gradient": [
        *(Pointer, Int, Pointer, Pointer, Norm, Pointer, Pointer, Int64, Int64, Int64),
        *(Pointer, Pointer, Pointer, Pointer, Int),
    ],
    "norm_coefficients": [Pointer, Norm, Pointer, Int64, Int64, Gradients, Pointer, Pointer],
    "binarize_weight": [Pointer, Int64, Int64, Int, Pointer, Int],
    "binarize_weight_gradient": [Pointer, Pointer, Int64, Int64, Int, Pointer, Int],
    "layer_scale_gradient": [Pointer, Pointer, Pointer, Int64, Int64, Pointer, Pointer, Pointer, Int],
    "scale_rows": [Pointer, Pointer, Pointer, Int64, Int64, Pointer, Int],
    "batch_norm_gradient": [
        *(Pointer, Pointer, Pointer, Pointer, Float, Int64, Pointer, Int64, Int64, Pointer, Pointer, Pointer, Int)
    ],
    "add_pools": [*4 * [Pointer], Pointer, Int, *4 * [Int64], Pointer, Int],
    "add_pools_gradient": [*3 * [Pointer], Pointer, Int, *4 * [Int64], Pointer, Pointer, Int],
    "sign_heads": [Pointer, Pointer, *4 * [Int64], Pointer, Int],
    "sign_heads_gradient": [Pointer, Pointer, Pointer, *4 * [Int64], Pointer, Pointer, Int],
    "attend": [Pointer, Float, Pointer, Int64, Int64, Pointer, Int],
    "attend_gradient": [Pointer, Float, Pointer, Int64, Int64, Pointer, Pointer, Pointer, Int],
    "count_gradient": [Pointer, Int, Pointer, Pointer, Int64, Int64, Pointer, Int],
}


def check_memory(failed: int, function, arguments) -> None:
    if failed:
        raise MemoryError("Training ran out of memory; use a smaller batch.")


@functools.cache
def load_library() -> ctypes.CDLL | str:
    """The compiled library, or the reason why it cannot be used."""
    files = [Path(__file__).with_name(EXTENSION_NAME + suffix) for suffix in EXTENSION_SUFFIXES]
    built = [file for file in files if file.is_file()]
    if not built:
        return "they were not built when the package was installed, which needs a C++ compiler (GCC or Clang)"
    try:
        library = ctypes.CDLL(str(built[0]))
    except OSError as error:
        return f"{built[0].name} cannot be loaded: {error}"
    if other := fingerprint.describe_other_sources(library, built[0].parent, SHARED_SOURCES):
        return f"they were {other}"
    library.instruction_sets.restype = ctypes.c_char_p
    runtime = openmp_of_torch()
    if runtime is not None:
        library.share_threads(runtime.GOMP_parallel, runtime.omp_get_num_threads, runtime.omp_get_thread_num)
    return library


def problem() -> str | None:
    """The reason why the kernels cannot be used, or `None`."""
    library = load_library()
    return library if isinstance(library, str) else None


def instruction_sets() -> list[str]:
    """The instruction sets of this CPU that kernels are compiled for, best first."""
    library = load_library()
    return [] if isinstance(library, str) else library.instruction_sets().decode().split()


@functools.cache
def load_kernels(instruction_set: str | None = None) -> SimpleNamespace:
    """
    The functions of rows.inc by name, for an instruction set, by default the best one of this CPU.

    They raise `MemoryError` if memory runs out. The library must be there.
    """
    library, kernels = load_library(), SimpleNamespace()
    for name, arguments in KERNELS.items():
        function = getattr(library, f"{name}_{instruction_set or instruction_sets()[0]}")
        function.restype, function.argtypes, function.errcheck = Int, arguments, check_memory
        setattr(kernels, name, function)
    return kernels


def norm_activation(eps: float, *parameters: torch.Tensor) -> NormActivation:
    """Args: mean, variance, weight, bias, shift_in, slope, shift_out, `(channels,)` each; kept alive by the caller."""
    return NormActivation(*map(torch.Tensor.data_ptr, parameters), eps)

"""The engine for PyTorch: takes and returns tensors, and computes on PyTorch's threads."""

import contextlib
import ctypes
import functools
import os
from pathlib import Path

import torch

from binaryvit_runtime import engine
from binaryvit_runtime.architecture import count_multiplications
from binaryvit_runtime.cpus import largest_team
from binaryvit_runtime.engine import cpu_features, kernels_built, kernels_here, library, problem


__all__ = ["Engine", "cpu_features", "kernels_built", "kernels_here", "openmp_of_torch", "problem"]


class Engine(engine.Engine):
    """
    Computes a packed backbone on one kind of kernels, from PyTorch tensors on the CPU.

    Args:
        config, tensors, kernels: see `binaryvit_runtime.engine.Engine`.

    Raises:
        ValueError: a tensor is missing, or its size does not fit the config.
    """

    float32 = torch.float32
    address = staticmethod(torch.Tensor.data_ptr)

    def __init__(self, config, tensors, kernels: str):
        super().__init__(config, tensors, kernels)
        self.limit_team(largest_team(count_multiplications(config)))

    def threads_for(self, images: torch.Tensor) -> int:
        """For code that came with a checkpoint: some versions of it ask, which now leave this to `limit_team`."""
        return torch.get_num_threads()

    @staticmethod
    def contiguous(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().contiguous()

    @staticmethod
    def empty(shape: tuple[int, ...]) -> torch.Tensor:
        # Users may set another default dtype or device.
        return torch.empty(shape, dtype=torch.float32, device="cpu")


@functools.cache
def openmp_of_torch() -> ctypes.CDLL | None:
    """The OpenMP runtime on whose threads PyTorch computes, or `None`."""
    folder = Path(torch.__file__).parent
    for file in [*folder.glob("lib/lib*omp*"), *folder.parent.glob("torch.libs/lib*omp*"), "libgomp.so.1"]:
        with contextlib.suppress(OSError, AttributeError):  # not loaded in this process; no RTLD_NOLOAD on Windows
            runtime = ctypes.CDLL(str(file), mode=os.RTLD_NOLOAD)
            if hasattr(runtime, "GOMP_parallel"):
                return runtime
    return None


def share_threads_of_torch() -> None:
    """Let the engine compute on PyTorch's threads if they are OpenMP's, otherwise on its own."""
    loaded, runtime = library.load_library(), openmp_of_torch()
    if not isinstance(loaded, str) and runtime is not None:
        loaded.binaryvit_share_threads(runtime.GOMP_parallel, runtime.omp_get_num_threads, runtime.omp_get_thread_num)


share_threads_of_torch()

"""The compiled engine: 1-bit inference on CPUs, in C++ with a C interface, and its binding."""

from .library import Engine, cpu_features, kernels_built, kernels_here, openmp_of_torch, problem


__all__ = ["Engine", "cpu_features", "kernels_built", "kernels_here", "openmp_of_torch", "problem"]

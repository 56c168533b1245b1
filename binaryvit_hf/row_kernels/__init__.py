"""
Row kernels: compiled training steps of a 1-bit network on the CPU, in C++, and their autograd functions.

- `functions.py` holds the autograd functions. Each has the name and the arguments of one in
  `network/functional_binaryvit.py`, which chooses between the two.
- `library.py` loads the compiled library and calls it with PyTorch tensors, on PyTorch's threads.
- `rows.inc` holds the kernels, and `rows_*.cpp` compile it for one instruction set each. `row_kernels.h` and
  `interface.cpp` divide rows among threads, with the team of the inference engine (`runtime/engine/team.cpp`).

Matrix products stay with PyTorch.
"""

from .functions import TWINS, BinaryProjection
from .library import instruction_sets, problem


__all__ = ["TWINS", "BinaryProjection", "instruction_sets", "problem"]

"""
The engine: 1-bit inference on CPUs, in C++ behind a C interface, and its Python binding.

Input: the sizes in a model's config, the tensors of its packed backbone by name, and normalised images (float32, on
the CPU). Output: hidden states, pooled output and logits. The engine must not know torch, transformers, or
any other folder of this package. `library.py` uses numpy, and the C++ only the standard library.
`binaryvit_hf/engine.py` is the engine for PyTorch's tensors and threads.

From top to bottom:

- `library.py` loads the compiled library and calls it: `Engine`, `kernels_here`.
- `fingerprint.py` tells whether that library was built from the sources beside it.
- `engine.h` is the C interface; `interface.cpp` implements it and divides images among threads.
- `fold.cpp` folds a checkpoint's tensors into the constants and bits of `model.h`, which draws all data layouts.
- `forward.inc` computes one step. It includes a file for each kind of layer, `embeddings.inc`, `attention.inc`,
  `pooling.inc` and `mlp.inc`, and the products that they share, `tiles.inc`.
- `kernels_avx512.cpp`, `kernels_avx2.cpp`, `kernels_neon.cpp`, `kernels_wasm.cpp` and `kernels_scalar.cpp` each compile
  all `.inc` files for one kind of CPU into a table of functions (`kernels.h`). `runs_here` tells whether this CPU has
  the instructions.
- `preprocess.cpp` computes the network's input from a picture, and `preprocessing.py` calls it: `Preprocessor`.
- `workspace.h` is the memory of a forward, `team.h` its threads.
- `binaryvit.wasm` is all of it as WebAssembly, for browsers: one thread, no imports. `wasm.cpp` replaces the threads.
  `.ci/build_wasm.py` in the repository builds it after each change of the C++.

A new kind of CPU is one new file, with the members that `CpuInterface` in `forward.inc` lists, and one line each in
`kernels.h` and `built_kernels`.

`tests/engine` compares every step with PyTorch, and runs the C++ without Python under sanitisers and on emulated CPUs.
"""

from .library import Engine, cpu_features, kernels_built, kernels_here, problem


__all__ = ["Engine", "cpu_features", "kernels_built", "kernels_here", "problem"]

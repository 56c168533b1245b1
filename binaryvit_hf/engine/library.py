"""Binding of the engine's C interface (engine.h)."""

import contextlib
import ctypes
import functools
import math
import os
from collections.abc import Mapping
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import cast

import torch


NAME = "kernels"  # of the extension module in setup.py; it is loaded as a plain library, Python's part of it does not exist
ERROR_BYTES = 500
SHORT_OF_MEMORY = "The engine got too little memory for its tokens."

Int32s = ctypes.POINTER(ctypes.c_int32)


class Config(ctypes.Structure):
    """`binaryvit_config`."""

    _fields_ = [
        ("image_height", ctypes.c_int32),
        ("image_width", ctypes.c_int32),
        ("patch_height", ctypes.c_int32),
        ("patch_width", ctypes.c_int32),
        ("num_channels", ctypes.c_int32),
        ("num_stages", ctypes.c_int32),
        ("hidden_sizes", Int32s),
        ("depths", Int32s),
        ("num_attention_heads", Int32s),
        ("intermediate_sizes", Int32s),
        ("sequence_reduction_ratios", Int32s),
        ("num_avg_pool_kernels", ctypes.c_int32),
        ("avg_pool_kernel_sizes", Int32s),
        ("use_class_token", ctypes.c_int32),
        ("use_stem_norm", ctypes.c_int32),
        ("use_layer_scale", ctypes.c_int32),
        ("binarize_patch_embeddings", ctypes.c_int32),
        ("batch_norm_eps", ctypes.c_float),
    ]


class NamedTensor(ctypes.Structure):
    """`binaryvit_tensor`."""

    _fields_ = [("name", ctypes.c_char_p), ("data", ctypes.c_void_p), ("bytes", ctypes.c_int64)]


@functools.cache
def load_library() -> ctypes.CDLL | str:
    """The compiled library, or why there is none."""
    files = [Path(__file__).with_name(NAME + suffix) for suffix in EXTENSION_SUFFIXES]
    built = [file for file in files if file.is_file()]
    if not built:
        return "it was not built when the package was installed, which takes a C++ compiler (GCC or Clang)"
    try:
        library = ctypes.CDLL(str(built[0]))
    except OSError as error:
        return f"{built[0].name} cannot be loaded: {error}"
    library.binaryvit_kernels.restype = ctypes.c_char_p
    library.binaryvit_built_kernels.restype = ctypes.c_char_p
    library.binaryvit_cpu_features.restype = ctypes.c_char_p
    library.binaryvit_create.restype = ctypes.c_void_p
    library.binaryvit_create.argtypes = [
        ctypes.c_char_p,
        ctypes.POINTER(Config),
        ctypes.POINTER(NamedTensor),
        ctypes.c_int32,
        ctypes.c_char_p,
        ctypes.c_int32,
    ]
    library.binaryvit_free.restype = None
    library.binaryvit_free.argtypes = [ctypes.c_void_p]
    pointer = ctypes.c_void_p
    library.binaryvit_forward.argtypes = [pointer, pointer, ctypes.c_int64, ctypes.c_int32, pointer, pointer, pointer]
    library.binaryvit_classify.argtypes = [
        pointer,
        pointer,
        ctypes.c_int64,
        ctypes.c_int32,
        pointer,
        pointer,
        ctypes.c_int32,
        pointer,
    ]
    library.binaryvit_run_step.argtypes = [pointer, ctypes.c_int32, pointer, ctypes.c_int64, ctypes.c_int32, pointer]
    library.binaryvit_count.argtypes = [
        ctypes.c_char_p,
        pointer,
        ctypes.c_int32,
        pointer,
        ctypes.c_int32,
        ctypes.c_int32,
        pointer,
    ]
    runtime = openmp_of_torch()
    if runtime:
        library.binaryvit_share_threads(runtime.GOMP_parallel, runtime.omp_get_num_threads, runtime.omp_get_thread_num)
    return library


def openmp_of_torch() -> ctypes.CDLL | None:
    """The OpenMP runtime on whose threads PyTorch computes, if there is one: its own, or the system's."""
    folder = Path(torch.__file__).parent
    for file in [*folder.glob("lib/lib*omp*"), *folder.parent.glob("torch.libs/lib*omp*"), "libgomp.so.1"]:
        with contextlib.suppress(OSError, AttributeError):  # it is not loaded; Windows cannot ask
            runtime = ctypes.CDLL(str(file), mode=os.RTLD_NOLOAD)
            if hasattr(runtime, "GOMP_parallel"):
                return runtime
    return None


def problem() -> str | None:
    """Why there is no engine; none where there is one."""
    library = load_library()
    return library if isinstance(library, str) else None


def names(function: str) -> list[str]:
    library = load_library()
    return [] if isinstance(library, str) else getattr(library, function)().decode().split()


def kernels_here() -> list[str]:
    """The kernels that are built and that this CPU runs, best first."""
    return names("binaryvit_kernels")


def kernels_built() -> list[str]:
    """The kernels that are built, best first."""
    return names("binaryvit_built_kernels")


def cpu_features() -> list[str]:
    """What of that which kernels need this CPU has."""
    return names("binaryvit_cpu_features")


def int32s(numbers) -> ctypes.Array:
    return (ctypes.c_int32 * max(len(numbers), 1))(*numbers)


class Engine:
    """
    A packed backbone, folded.

    Args:
        config: of the model; 1-bit weights and inputs.
        tensors: the backbone's by their names in it, float32 and packed bits, on the CPU; copied.
        kernels: one of `kernels_here()`.

    Raises:
        ValueError: a tensor is missing or has another size than the config says.
    """

    def __init__(self, config, tensors: Mapping[str, torch.Tensor], kernels: str):
        self.library = cast(ctypes.CDLL, load_library())
        self.image_shape = (config.num_channels, *pair(config.image_size))
        # ctypes keeps what a structure points to alive.
        described = Config(
            *pair(config.image_size),
            *pair(config.patch_size),
            config.num_channels,
            len(config.hidden_sizes),
            int32s(config.hidden_sizes),
            int32s(config.depths),
            int32s(config.num_attention_heads),
            int32s(config.intermediate_sizes),
            int32s(config.sequence_reduction_ratios),
            len(config.avg_pool_kernel_sizes),
            int32s(config.avg_pool_kernel_sizes),
            config.use_class_token,
            config.use_stem_norm,
            config.use_layer_scale,
            config.binarize_patch_embeddings,
            config.batch_norm_eps,
        )
        tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        listed = (NamedTensor * len(tensors))(
            *(NamedTensor(name.encode(), tensor.data_ptr(), tensor.nbytes) for name, tensor in tensors.items())
        )
        error = ctypes.create_string_buffer(ERROR_BYTES)
        self.model = self.library.binaryvit_create(
            kernels.encode(), ctypes.byref(described), listed, len(listed), error, ERROR_BYTES
        )
        if not self.model:
            raise ValueError(f"The engine cannot take this model: {error.value.decode()}.")
        tokens = [math.prod(grid_size) + config.use_class_token for grid_size in config.grid_sizes]
        stages = list(zip(tokens, config.hidden_sizes))
        self.last_shape = stages[-1]
        # What enters each layer, and what leaves the last.
        self.hidden_shapes = [shape for shape, depth in zip(stages, config.depths) for _ in range(depth)] + stages[-1:]

    def __del__(self):
        if getattr(self, "model", None):
            self.library.binaryvit_free(self.model)

    def forward(
        self, images: torch.Tensor, threads: int, output_hidden_states: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
        """
        Args:
            images: `(batch, num_channels, height, width)`, normalised, float32, on the CPU.
            threads: how many to use, this one among them.
            output_hidden_states: whether to return the input of every layer and the output of the last.

        Returns:
            Tokens after the last normalisation `(batch, tokens, channels)`, their pooling `(batch, channels)`, and the hidden
            states, `(batch, tokens, channels)` of their stages, if asked for.

        Raises:
            ValueError: images of another shape or dtype.
            MemoryError: too little memory.
        """
        images = self.check(images)
        batch = images.shape[0]
        last, pooled = torch.empty(batch, *self.last_shape), torch.empty(batch, self.last_shape[1])
        hidden = [torch.empty(batch, *shape) for shape in self.hidden_shapes] if output_hidden_states else []
        pointers = (ctypes.c_void_p * len(hidden))(*(tensor.data_ptr() for tensor in hidden)) if hidden else None
        # ctypes lets go of the interpreter's lock meanwhile.
        failed = self.library.binaryvit_forward(
            self.model, images.data_ptr(), batch, threads, last.data_ptr(), pooled.data_ptr(), pointers
        )
        if failed:
            raise MemoryError(SHORT_OF_MEMORY)
        return last, pooled, hidden

    def check(self, images: torch.Tensor) -> torch.Tensor:
        if images.shape[1:] != self.image_shape:
            raise ValueError(
                f"The model takes images of (channels, height, width) {self.image_shape}, not {tuple(images.shape[1:])}."
            )
        if images.dtype != torch.float32:
            raise ValueError(f"The engine takes float32 images, not {images.dtype}.")
        return images.contiguous()

    def classify(
        self, images: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, threads: int
    ) -> torch.Tensor:
        """
        A forward and a linear layer after the pooling.

        Args:
            images, threads: as of `forward`.
            weight, bias: `(num_labels, channels)`, `(num_labels,)`; float32, on the CPU and contiguous.

        Returns:
            `(batch, num_labels)`.

        Raises:
            ValueError, MemoryError: as `forward`.
        """
        # Whatever Python does here meets cold caches: a forward fills them with other things.
        images = self.check(images)
        batch, num_labels = images.shape[0], weight.shape[0]
        logits = torch.empty(batch, num_labels)
        failed = self.library.binaryvit_classify(
            self.model,
            images.data_ptr(),
            batch,
            threads,
            weight.data_ptr(),
            None if bias is None else bias.data_ptr(),
            num_labels,
            logits.data_ptr(),
        )
        if failed:
            raise MemoryError(SHORT_OF_MEMORY)
        return logits

    def run_step(
        self, step: int, inputs: torch.Tensor, output_shape: tuple[int, int], threads: int = 1
    ) -> torch.Tensor:
        """
        One step of the network alone: 0 is the stem, then come patch embeddings and layers as they act, at last the
        normalisation. For tests.

        Args:
            inputs: images for the stem, else tokens `(batch, tokens, channels)`.
            output_shape: `(tokens, channels)` of what it gives.
        """
        inputs = inputs.detach().contiguous()
        outputs = torch.empty(len(inputs), *output_shape)
        failed = self.library.binaryvit_run_step(
            self.model, step, inputs.data_ptr(), len(inputs), threads, outputs.data_ptr()
        )
        if failed:
            raise MemoryError(SHORT_OF_MEMORY)
        return outputs


def count_differing_bits(kernels: str, bits: torch.Tensor, matrix: torch.Tensor, inputs: int) -> torch.Tensor:
    """
    In how many of `inputs` bits each row of `bits` differs from each row of `matrix`. For tests.

    Args:
        bits, matrix: `uint8 (rows, ceil(inputs / 8))`, as `pack_levels` packs 1 bit.

    Returns:
        `int32 (rows of bits, rows of matrix)`.
    """
    counts = torch.empty(len(bits), len(matrix), dtype=torch.int32)
    failed = cast(ctypes.CDLL, load_library()).binaryvit_count(
        kernels.encode(), bits.data_ptr(), len(bits), matrix.data_ptr(), len(matrix), inputs, counts.data_ptr()
    )
    if failed:
        raise ValueError(f"There are no kernels {kernels!r} for this CPU.")
    return counts


def pair(size) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)

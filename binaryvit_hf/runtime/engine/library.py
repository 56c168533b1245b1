"""Python binding of the engine's C interface, engine.h, by ctypes."""

import ctypes
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any, cast

import numpy as np

from .fingerprint import describe_other_sources


EXTENSION_NAME = "kernels"  # as in setup.py; a plain C library, which Python cannot import
ERROR_BYTES = 500

Pointer, Text, Int32, Int64 = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int32, ctypes.c_int64
Int32Array = ctypes.POINTER(Int32)


def fields(kind: type, names: str) -> list[tuple[str, type]]:
    """Fields of one type, as a line of engine.h declares them."""
    return [(name, kind) for name in names.split()]


class Config(ctypes.Structure):
    """The struct `binaryvit_config` of engine.h."""

    _fields_ = [
        *fields(Int32, "image_height image_width patch_height patch_width num_channels num_stages"),
        *fields(Int32Array, "hidden_sizes depths num_attention_heads intermediate_sizes sequence_reduction_ratios"),
        ("num_avg_pool_kernels", Int32),
        ("avg_pool_kernel_sizes", Int32Array),
        *fields(Int32, "use_class_token use_stem_norm use_layer_scale binarize_patch_embeddings"),
        ("batch_norm_eps", ctypes.c_float),
    ]


class NamedTensor(ctypes.Structure):
    """The struct `binaryvit_tensor` of engine.h."""

    _fields_ = [("name", Text), ("data", Pointer), ("bytes", Int64)]


class AttentionSize(ctypes.Structure):
    """The struct `binaryvit_attention_size` of engine.h."""

    _fields_ = fields(Int32, "heads queries keys query_height query_width key_height key_width")


# Type of the result and types of the arguments, by function of engine.h.
FUNCTIONS = {
    "binaryvit_kernels": (Text, []),
    "binaryvit_built_kernels": (Text, []),
    "binaryvit_cpu_features": (Text, []),
    "binaryvit_create": (Pointer, [Text, ctypes.POINTER(Config), ctypes.POINTER(NamedTensor), Int32, Text, Int32]),
    "binaryvit_limit_team": (None, [Pointer, Int32]),
    "binaryvit_free": (None, [Pointer]),
    "binaryvit_forward": (Int32, [Pointer, Pointer, Int64, Int32, Pointer, Pointer, Pointer]),
    "binaryvit_feature_maps": (Int32, [Pointer, Pointer, Int64, Int32, Pointer]),
    "binaryvit_classify": (Int32, [Pointer, Pointer, Int64, Int32, Pointer, Pointer, Int32, Pointer]),
    "binaryvit_find_attention_size": (Int32, [Pointer, Int32, ctypes.POINTER(AttentionSize)]),
    "binaryvit_attention": (Int32, [Pointer, Pointer, Int32, Pointer]),
    "binaryvit_run_step": (Int32, [Pointer, Int32, Pointer, Int64, Int32, Pointer]),
    "binaryvit_count": (Int32, [Text, Pointer, Int32, Pointer, Int32, Int32, Pointer]),
}


@functools.cache
def load_library() -> ctypes.CDLL | str:
    """The compiled library, or the reason why it cannot be used."""
    files = [Path(__file__).with_name(EXTENSION_NAME + suffix) for suffix in EXTENSION_SUFFIXES]
    built = [file for file in files if file.is_file()]
    if not built:
        return "it was not built when the package was installed, which needs a C++ compiler (GCC or Clang)"
    try:
        library = ctypes.CDLL(str(built[0]))
    except OSError as error:
        return f"{built[0].name} cannot be loaded: {error}"
    if other := describe_other_sources(library, built[0].parent):
        return f"it was {other}"
    for name, (result, arguments) in FUNCTIONS.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def problem() -> str | None:
    """The reason why the engine cannot be used, or `None`."""
    library = load_library()
    return library if isinstance(library, str) else None


def listed_names(function: str) -> list[str]:
    """The names that a function of the library lists; none without the library."""
    library = load_library()
    return [] if isinstance(library, str) else getattr(library, function)().decode().split()


def kernels_here() -> list[str]:
    """The built kernels that this CPU runs, best first."""
    return listed_names("binaryvit_kernels")


def kernels_built() -> list[str]:
    """All built kernels, best first."""
    return listed_names("binaryvit_built_kernels")


def cpu_features() -> list[str]:
    """The instruction sets of this CPU that kernels use."""
    return listed_names("binaryvit_cpu_features")


def int32_array(numbers) -> ctypes.Array:
    return (Int32 * len(numbers))(*numbers)


class Engine:
    """
    Computes a packed backbone on one kind of kernels. Tensors are numpy arrays here; a subclass may have others.

    Args:
        config: the fields of a `BinaryViTConfig` with 1-bit weights and inputs, and its `grid_sizes`.
        tensors: the backbone's tensors by name: float32, and uint8 for packed weights; copied. The final
            normalisation ("norm.…") may be left out; then nothing is normalised at the end.
        kernels: one of `kernels_here()`.

    Raises:
        ValueError: a tensor is missing, or its size does not fit the config.
    """

    float32: Any = np.dtype(np.float32)

    @staticmethod
    def address(tensor) -> int:
        """Where the first element of a contiguous tensor is in memory."""
        return tensor.ctypes.data

    @staticmethod
    def contiguous(tensor):
        return np.ascontiguousarray(tensor)

    @staticmethod
    def empty(shape: tuple[int, ...]):
        """A new float32 tensor with arbitrary values."""
        return np.empty(shape, np.float32)

    def __init__(self, config, tensors: Mapping[str, Any], kernels: str):
        self.library = cast(ctypes.CDLL, load_library())
        self.image_shape = (config.num_channels, *pair(config.image_size))
        c_config = Config(
            *pair(config.image_size),
            *pair(config.patch_size),
            config.num_channels,
            len(config.hidden_sizes),
            int32_array(config.hidden_sizes),
            int32_array(config.depths),
            int32_array(config.num_attention_heads),
            int32_array(config.intermediate_sizes),
            int32_array(config.sequence_reduction_ratios),
            len(config.avg_pool_kernel_sizes),
            int32_array(config.avg_pool_kernel_sizes),
            config.use_class_token,
            config.use_stem_norm,
            config.use_layer_scale,
            config.binarize_patch_embeddings,
            config.batch_norm_eps,
        )
        tensors = {name: self.contiguous(tensor) for name, tensor in tensors.items()}
        c_tensors = (NamedTensor * len(tensors))(
            *(NamedTensor(name.encode(), self.address(tensor), tensor.nbytes) for name, tensor in tensors.items())
        )
        error = ctypes.create_string_buffer(ERROR_BYTES)
        self.model = self.library.binaryvit_create(
            kernels.encode(), ctypes.byref(c_config), c_tensors, len(c_tensors), error, ERROR_BYTES
        )
        if not self.model:
            raise ValueError(f"The engine cannot run this model: {error.value.decode()}.")
        tokens = [math.prod(grid_size) + config.use_class_token for grid_size in config.grid_sizes]
        stages = list(zip(tokens, config.hidden_sizes))
        self.last_shape = stages[-1]
        # The input of each layer, and the output of the last one.
        self.hidden_shapes = [shape for shape, depth in zip(stages, config.depths) for _ in range(depth)] + stages[-1:]
        self.map_shapes = stages[:1] + stages  # the stem's output, and that of each stage

    def __del__(self):
        if getattr(self, "model", None):
            self.library.binaryvit_free(self.model)

    def limit_team(self, largest: int) -> None:
        """Limit how many threads compute one image at once. Call it before the engine computes."""
        self.library.binaryvit_limit_team(self.model, largest)

    def forward(self, images, threads: int, output_hidden_states: bool = False) -> tuple[Any, Any, list]:
        """
        Computes the backbone.

        Args:
            images: `(batch, num_channels, height, width)`, normalised, float32.
            threads: number of threads to use, including the calling one.
            output_hidden_states: whether to return the input of every layer and the output of the last one.

        Returns:
            The last hidden state `(batch, tokens, channels)`, normalised; the pooled output `(batch, channels)`; the
            list of hidden states, each `(batch, tokens, channels)` of its stage, empty unless asked for.

        Raises:
            ValueError: the images have another shape or dtype than the model takes.
            MemoryError: memory runs out.
        """
        images = self.check_images(images)
        batch = images.shape[0]
        last, pooled = self.empty((batch, *self.last_shape)), self.empty((batch, self.last_shape[1]))
        hidden = [self.empty((batch, *shape)) for shape in self.hidden_shapes] if output_hidden_states else []
        pointers = (ctypes.c_void_p * len(hidden))(*(self.address(tensor) for tensor in hidden)) if hidden else None
        outputs = self.address(last), self.address(pooled), pointers
        self.call(self.library.binaryvit_forward, self.address(images), batch, threads, *outputs)
        return last, pooled, hidden

    def feature_maps(self, images, threads: int, wanted: Sequence[bool]) -> list:
        """
        Computes the feature maps of a backbone, up to the last one that is wanted.

        Args:
            images, threads: see `forward`.
            wanted: whether to return the map: of the stem, and of each stage.

        Returns:
            The output of the stem and of the last layer of each stage, `(batch, tokens, channels)`. Maps that are not
            wanted are None.

        Raises:
            ValueError: the images have another shape or dtype than the model takes.
            MemoryError: memory runs out.
        """
        images = self.check_images(images)
        batch = images.shape[0]
        maps = [self.empty((batch, *shape)) if want else None for shape, want in zip(self.map_shapes, wanted)]
        pointers = (ctypes.c_void_p * len(maps))(
            *(None if tokens is None else self.address(tokens) for tokens in maps)
        )
        self.call(self.library.binaryvit_feature_maps, self.address(images), batch, threads, pointers)
        return maps

    def attention_size(self, layer: int) -> AttentionSize:
        """
        The size of the attention of a layer, whose index counts through all stages.

        Raises:
            IndexError: there is no such layer.
        """
        size = AttentionSize()
        if self.library.binaryvit_find_attention_size(self.model, layer, ctypes.byref(size)):
            raise IndexError(f"The model has no layer {layer}; its first layer is 0.")
        return size

    def attention(self, image, layer: int):
        """
        Computes the attention probabilities of a layer, as the network uses them: 0 or the layer's clip.

        Tokens are a grid, row by row, after the class token if there is one.

        Args:
            image: `(1, num_channels, height, width)`, normalised, float32.
            layer: index of the layer, counted through all stages.

        Returns:
            `(1, heads, queries, keys)`; `attention_size` has the grids of queries and keys.

        Raises:
            IndexError: there is no such layer.
            ValueError: the image has another shape or dtype than the model takes, or is not one image.
            MemoryError: memory runs out.
        """
        image, size = self.check_images(image), self.attention_size(layer)
        if len(image) != 1:
            raise ValueError(f"The engine computes the attention of one image, not of {len(image)}.")
        probabilities = self.empty((1, size.heads, size.queries, size.keys))
        self.call(self.library.binaryvit_attention, self.address(image), layer, self.address(probabilities))
        return probabilities

    def call(self, function: Callable, *arguments) -> None:
        """Call a function of the library, without Python's global lock. Raises `MemoryError` if it fails."""
        if function(self.model, *arguments):
            raise MemoryError("The engine ran out of memory; use a smaller batch or smaller images.")

    def check_images(self, images):
        """The images, contiguous; raises `ValueError` for another shape or dtype."""
        if images.shape[1:] != self.image_shape or images.dtype != self.float32:
            shape = tuple(images.shape[1:])
            raise ValueError(f"The engine takes float32 images {self.image_shape}, not {images.dtype} {shape}.")
        return self.contiguous(images)

    def classify(self, images, weight, bias=None, *, threads: int):
        """
        Computes the backbone and a linear classifier of its pooled output.

        Args:
            images: `(batch, num_channels, height, width)`, normalised, float32.
            weight, bias: `(num_labels, channels)`, `(num_labels,)`; float32, contiguous.
            threads: number of threads to use, including the calling one.

        Returns:
            The logits `(batch, num_labels)`.

        Raises:
            ValueError: the images have another shape or dtype than the model takes.
            MemoryError: memory runs out.
        """
        # The previous forward evicted these objects from the cache, so every Python operation here is slow.
        images = self.check_images(images)
        batch, num_labels = images.shape[0], weight.shape[0]
        logits = self.empty((batch, num_labels))
        self.call(
            self.library.binaryvit_classify,
            self.address(images),
            batch,
            threads,
            self.address(weight),
            None if bias is None else self.address(bias),
            num_labels,
            self.address(logits),
        )
        return logits

    def run_step(self, step: int, inputs, output_shape: tuple[int, int], threads: int = 1):
        """
        Computes a single step of the network, for tests.

        Args:
            step: 0 is the stem; then come, stage by stage, patch embeddings and layers; last the final normalisation.
            inputs: images for the stem, else tokens `(batch, tokens, channels)`.
            output_shape: `(tokens, channels)` of the step's output.

        Returns:
            The step's output `(batch, tokens, channels)`.
        """
        inputs = self.contiguous(inputs)
        outputs = self.empty((len(inputs), *output_shape))
        self.call(
            self.library.binaryvit_run_step, step, self.address(inputs), len(inputs), threads, self.address(outputs)
        )
        return outputs


def count_differing_bits(kernels: str, bits: np.ndarray, matrix: np.ndarray, inputs: int) -> np.ndarray:
    """
    Counts the bits in which each row of `bits` differs from each row of `matrix`, for tests.

    Args:
        bits, matrix: uint8 `(rows, ceil(inputs / 8))`, as `pack_levels` packs 1-bit levels.
        inputs: number of bits in a row.

    Returns:
        int32 `(rows of bits, rows of matrix)`.
    """
    counts = np.empty((len(bits), len(matrix)), np.int32)
    failed = cast(ctypes.CDLL, load_library()).binaryvit_count(
        kernels.encode(), bits.ctypes.data, len(bits), matrix.ctypes.data, len(matrix), inputs, counts.ctypes.data
    )
    if failed:
        raise ValueError(f"There are no kernels {kernels!r} for this CPU.")
    return counts


def pair(size) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)

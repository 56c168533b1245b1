"""The engine's WebAssembly module in wasmtime, through the C interface of `engine.h`."""

import ctypes
import functools
import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import wasmtime


KERNELS = b"wasm\0"
ERROR_BYTES = 500


@functools.cache
def compile_module(file: Path) -> tuple[wasmtime.Engine, wasmtime.Module]:
    compiler = wasmtime.Engine()
    return compiler, wasmtime.Module.from_file(compiler, str(file))


class WasmEngine:
    """One instance of the module, without imports. Arrays are copied to its memory and back; addresses are 32 bits."""

    def __init__(self, module: Path):
        compiler, compiled = compile_module(module)
        self.store = wasmtime.Store(compiler)
        instance = wasmtime.Instance(self.store, compiled, [])
        self.exports = instance.exports(self.store)
        self.memory = self.exports["memory"]
        self.call("_initialize")

    def call(self, function: str, *arguments):
        return self.exports[function](self.store, *arguments)

    def pages(self) -> int:
        return self.memory.size(self.store)

    def allocate(self, size: int) -> int:
        address = self.call("malloc", size)
        assert address % 8 == 0 and (address or not size), "memory ran out"
        return address

    def put(self, content: bytes) -> int:
        address = self.allocate(len(content) + 1)
        self.memory.write(self.store, content, address)
        return address

    def put_array(self, array, dtype=None) -> int:
        return self.put(np.ascontiguousarray(array, dtype).tobytes())

    def read(self, address: int, shape: tuple[int, ...], dtype=np.float32) -> np.ndarray:
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        return np.frombuffer(bytes(self.memory.read(self.store, address, address + size)), dtype).reshape(shape)

    def read_text(self, address: int) -> str:
        return bytes(self.memory.read(self.store, address, address + ERROR_BYTES)).split(b"\0")[0].decode()

    def free(self, *addresses: int) -> None:
        for address in addresses:
            self.call("free", address)

    def compute(self, function: str, *arguments, shape: tuple[int, ...], dtype=np.float32) -> np.ndarray:
        """Call a function whose last argument is its output. Arrays and bytes among the arguments are freed."""
        given = [self.put_array(each) if isinstance(each, np.ndarray) else each for each in arguments]
        given = [self.put(each) if isinstance(each, bytes) else each for each in given]
        output = self.allocate(int(np.prod(shape)) * np.dtype(dtype).itemsize)
        assert self.call(function, *given, output) == 0
        result = self.read(output, shape, dtype)
        self.free(output, *(new for new, old in zip(given, arguments) if isinstance(old, (np.ndarray, bytes))))
        return result

    def create(self, config, tensors: Mapping[str, np.ndarray]) -> int:
        """`binaryvit_create`; raises `ValueError` with its message."""
        lists = [
            self.put_array(numbers, np.int32)
            for numbers in (
                config.hidden_sizes,
                config.depths,
                config.num_attention_heads,
                config.intermediate_sizes,
                config.sequence_reduction_ratios,
                config.avg_pool_kernel_sizes,
            )
        ]
        sizes = [*pair(config.image_size), *pair(config.patch_size), config.num_channels, len(config.hidden_sizes)]
        flags = [
            config.use_class_token,
            config.use_stem_norm,
            config.use_layer_scale,
            config.binarize_patch_embeddings,
        ]
        kernels_count = len(config.avg_pool_kernel_sizes)
        c_config = self.put(
            struct.pack("<6i5IiI4if", *sizes, *lists[:5], kernels_count, lists[5], *flags, config.batch_norm_eps)
        )
        pairs = [(self.put(name.encode() + b"\0"), self.put_array(array)) for name, array in tensors.items()]
        entries = b"".join(
            struct.pack("<IIq", name, data, array.nbytes) for (name, data), array in zip(pairs, tensors.values())
        )
        c_tensors, error, kernels = self.put(entries), self.allocate(ERROR_BYTES), self.put(KERNELS)
        model = self.call("binaryvit_create", kernels, c_config, c_tensors, len(pairs), error, ERROR_BYTES)
        message = "" if model else self.read_text(error)
        self.free(*lists, c_config, *(address for both in pairs for address in both), c_tensors, error, kernels)
        if not model:
            raise ValueError(message)
        return model

    def pixel_values(self, processor: ctypes.Structure, picture: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """`binaryvit_pixel_values`; the struct of the processor has no pointers, so it is the same in 32 bits."""
        height, width, channels = picture.shape
        pixels = self.put_array(picture)
        c_picture = struct.pack("<I4xq3i4x", pixels, width * channels, height, width, channels)
        values = self.compute("binaryvit_pixel_values", bytes(processor), c_picture, shape=(3, *size))
        self.free(pixels)
        return values


def pair(size) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)

"""
Reads a packed checkpoint (safetensors) into numpy arrays, with all checks that the model classes make.

`binaryvit_hf/network/quantization_binaryvit.py` describes the files.
"""

import json
import math
import re
import zlib
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, fields
from itertools import accumulate
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from .architecture import Architecture
from .errors import LoadingError, UnsupportedModelError


WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
FORMATS = ("1", "2")
# Modules whose tensors a file stores together, and the names of the two tensors that hold them.
MODULES = re.compile(r"(embeddings|norm|stages\.\d+\.(?:patch_embeddings|layers\.\d+))\.")
FLOATS, BYTES = "floats", "bytes"
PREFIX = "binaryvit."  # of the backbone's tensors in a classifier
TORCH_NAMES = {"float32": "torch.float32", "float16": "torch.float16", "uint8": "torch.uint8", "int64": "torch.int64"}


@dataclass
class Checkpoint:
    """
    Content of the files of one checkpoint.

    Args:
        stored: tensors as in the files.
        origin: file name of each tensor.
        config: the config fields that decide the outputs.
        shapes: of the weights before packing, by the name of the packed weight; None in format 2.
        checksums: of the tensors in the order of their names, eight digits each.
    """

    stored: dict[str, np.ndarray]
    origin: dict[str, str]
    config: dict
    shapes: dict[str, list[int]] | None
    checksums: str


def load_tensors(files: list[Path], architecture: Architecture, labels: int) -> dict[str, np.ndarray]:
    """
    The tensors of a packed classifier by name: uint8 bits, and floats as float32.

    Raises:
        LoadingError: a file is damaged, or tensors and config were not saved together, or do not fit each other. The
            message names the tensor or field, and the file.
        UnsupportedModelError: a tensor has a dtype that numpy does not have.
    """
    checkpoint = read_checkpoint(files)
    check_config(checkpoint, architecture)
    tensors = split_tensors(checkpoint, architecture)
    check_tensors(tensors, checkpoint, architecture, labels)
    check_checksums(checkpoint)
    floats = {
        name: tensor.astype(np.float32, copy=False) if tensor.dtype.kind == "f" else tensor
        for name, tensor in tensors.items()
    }
    check_finite(floats)
    return floats


def checkpoint_files(folder: Path) -> list[Path]:
    """
    The weight files of a folder.

    Raises:
        FileNotFoundError: a file is missing.
        LoadingError: the index of a checkpoint in several files is damaged.
    """
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / WEIGHTS_INDEX).is_file():
        raise FileNotFoundError(f"there is no {WEIGHTS}.")
    names = names_in_index((folder / WEIGHTS_INDEX).read_bytes())
    missing = next((name for name in names if not (folder / name).is_file()), None)
    if missing is not None:
        raise FileNotFoundError(f"the file {missing!r} is missing, which {WEIGHTS_INDEX} names.")
    return [folder / name for name in names]


def names_in_index(content: bytes) -> list[str]:
    """
    Raises:
        LoadingError: it is no index of weight files.
    """
    try:
        names = sorted(set(json.loads(content)["weight_map"].values()))
        if not names or any(Path(name).name != name for name in names):
            raise ValueError("it names no files of its folder")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise LoadingError(f"{WEIGHTS_INDEX} is damaged ({error}): download it again.") from error
    return names


def read_checkpoint(files: Iterable[Path]) -> Checkpoint:
    stored: dict[str, np.ndarray] = {}
    origin: dict[str, str] = {}
    for file in files:
        try:
            with safe_open(file, framework="numpy") as content:
                metadata = content.metadata() or {}
                dtypes = {name: content.get_slice(name).get_dtype() for name in content.keys()}  # noqa: SIM118
                check_dtypes(dtypes)
                found = {name: content.get_tensor(name) for name in dtypes}
        except SafetensorError as error:
            raise LoadingError(describe_damage(file, error)) from error
        stored |= found
        origin |= dict.fromkeys(found, file.name)
        if metadata.get("binaryvit_format") not in FORMATS:
            raise LoadingError(
                f"{file.name!r} has the packed format {metadata.get('binaryvit_format')!r}, not {FORMATS[-1]!r}: "
                "download it again, or update binaryvit_hf."
            )
    try:
        has_shapes = metadata["binaryvit_format"] == "1"
        config = json.loads(metadata["binaryvit_config"])
        shapes = json.loads(metadata["binaryvit_shapes"]) if has_shapes else {}
        if not isinstance(config, dict) or not isinstance(shapes, dict):
            raise ValueError("binaryvit_config and binaryvit_shapes must be objects")
        checksums = metadata["binaryvit_crc32"]
    except (KeyError, ValueError, RecursionError) as error:
        raise LoadingError(f"The metadata of {file.name!r} is damaged ({error}): download it again.") from error
    return Checkpoint(stored, origin, config, shapes if has_shapes else None, checksums)


def split_tensors(checkpoint: Checkpoint, architecture: Architecture) -> dict[str, np.ndarray]:
    """
    The tensors of a checkpoint by the names that they have in a model. They are views.

    Raises:
        LoadingError: a tensor does not hold what the config makes.
    """
    if checkpoint.shapes is not None:  # format 1
        return checkpoint.stored
    tensors = dict(checkpoint.stored)
    for whole, parts in modules_of_file(architecture).items():
        if whole not in checkpoint.stored:
            continue
        joined, subject = tensors.pop(whole), f"Tensor {whole!r} of {checkpoint.origin[whole]!r}"
        parts = {name: shape for name, shape in parts.items() if name not in checkpoint.stored}
        sizes = [math.prod(shape) for shape in parts.values()]
        kind = "float32" if whole.endswith(FLOATS) else "uint8"
        if kind == "uint8":
            sizes = [size * np.dtype(dtype_of(name)).itemsize for size, name in zip(sizes, parts)]
        if joined.shape != (sum(sizes),):
            raise LoadingError(f"{subject} has the shape {joined.shape}, but the config makes it {(sum(sizes),)}.")
        check_dtype(subject, joined, kind)
        for (name, shape), end, size in zip(parts.items(), accumulate(sizes), sizes):
            piece = joined[end - size : end]
            tensors[name] = (piece if kind == "float32" else piece.view(dtype_of(name))).reshape(shape)
    return tensors


def check_dtypes(dtypes: dict[str, str]) -> None:
    """
    Raises:
        UnsupportedModelError: a tensor has another dtype than packed checkpoints have.
    """
    for name, dtype in dtypes.items():
        if dtype not in ("F32", "F16", "U8", "I64"):
            raise UnsupportedModelError(f"its tensor {name!r} has the dtype {dtype}")


def describe_damage(file: Path, error: SafetensorError) -> str:
    """A sentence about a file that safetensors refuses. Names the first tensor that is cut off, if the header can be read."""
    content = file.read_bytes()
    if content.startswith(b"version https://git-lfs"):
        return f"{file.name!r} is a pointer of Git LFS, not the file: run `git lfs pull` in its folder."
    start = 8 + int.from_bytes(content[:8], "little")
    try:
        header = json.loads(content[8:start])
        ends = {name: start + entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"}
        _, first_cut = min((end, name) for name, end in ends.items() if end > len(content))
        damage = f"is cut off before the end of tensor {first_cut!r}"
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        damage = "is damaged"
    return f"{file.name!r} {damage} ({error}): download it again."


def check_config(checkpoint: Checkpoint, architecture: Architecture) -> None:
    for field in fields(Architecture):
        value, stored = getattr(architecture, field.name), checkpoint.config.get(field.name)
        value = list(value) if isinstance(value, tuple) else value
        if value != stored:
            raise LoadingError(
                f"The config has {field.name}={value}, but the packed weights were saved with {field.name}={stored}: load "
                "the config.json that was saved with them."
            )


def modules_of_file(architecture: Architecture) -> dict[str, dict[str, tuple[int, ...]]]:
    """Names and shapes of the backbone's tensors, in order, by the name of the tensor of a file that holds them."""
    found: dict[str, dict[str, tuple[int, ...]]] = defaultdict(dict)
    for name, shape in sorted(architecture.tensors().items()):
        module = MODULES.match(name)
        if module:
            whole = FLOATS if dtype_of(name) == "float32" else BYTES
            found[f"{PREFIX}{module[1]}.{whole}"][PREFIX + name] = shape
    return found


def dtype_of(name: str) -> str:
    """The dtype that a tensor has in a float32 model."""
    return {"packed_weight": "uint8", "num_batches_tracked": "int64"}.get(name.rpartition(".")[2], "float32")


def check_dtype(subject: str, tensor: np.ndarray, dtype: str) -> None:
    if tensor.dtype.name != dtype and not (dtype == "float32" and tensor.dtype.kind == "f"):
        raise LoadingError(f"{subject} has the dtype {tensor.dtype}, but must be {dtype}.")


def check_tensors(
    tensors: dict[str, np.ndarray], checkpoint: Checkpoint, architecture: Architecture, labels: int
) -> None:
    expected: dict[str, tuple[int, ...]] = {PREFIX + name: shape for name, shape in architecture.tensors().items()}
    expected |= {"classifier.weight": (labels, architecture.hidden_sizes[-1]), "classifier.bias": (labels,)}
    if not any(name.startswith("classifier.") for name in tensors):
        raise LoadingError(
            "The packed checkpoint was saved without a classifier, so it gives no labels: train one in PyTorch "
            "(from_pretrained with num_labels and ignore_mismatched_sizes)."
        )
    for name, shape in expected.items():
        if name not in tensors:
            raise LoadingError(f"The packed checkpoint lacks the tensor {name!r}: download it again.")
        if name not in checkpoint.origin:  # `split_tensors` made its shape and dtype
            continue
        tensor, subject = tensors[name], f"Tensor {name!r} of {checkpoint.origin[name]!r}"
        if tensor.shape != shape:
            raise LoadingError(f"{subject} has the shape {tensor.shape}, but the config makes it {shape}.")
        check_dtype(subject, tensor, dtype_of(name))
    shapes = packed_shapes(architecture) if checkpoint.shapes is None else checkpoint.shapes
    for name, before in packed_shapes(architecture).items():
        if shapes.get(name) != before:
            raise LoadingError(
                f"Tensor {name!r} of {checkpoint.origin[name]!r} was packed from the shape {shapes.get(name)}, but the "
                f"config makes it {before}."
            )
    unexpected = min(tensors.keys() - expected.keys(), default=None)
    if unexpected is not None:
        raise LoadingError(f"the network of the config has no tensor {unexpected!r}.")


def packed_shapes(architecture: Architecture) -> dict[str, list[int]]:
    """Shapes of the weights before packing, by the name of the packed weight."""
    shapes = {}
    tensors = architecture.tensors()
    for name, shape in tensors.items():
        if name.endswith(".packed_weight"):
            inputs = tensors[name.removesuffix("packed_weight") + "shift"][0]
            is_patch = ".patch_embeddings." in name
            shapes[PREFIX + name] = [shape[0], inputs, 2, 2] if is_patch else [shape[0], inputs]
    return shapes


def check_checksums(checkpoint: Checkpoint) -> None:
    for index, name in enumerate(sorted(checkpoint.stored)):
        if checksum(checkpoint.stored[name]) != checkpoint.checksums[8 * index : 8 * index + 8]:
            raise LoadingError(
                f"Tensor {name!r} of {checkpoint.origin[name]!r} was changed after saving (its checksum differs): "
                "download it again."
            )


def checksum(tensor: np.ndarray) -> str:
    """CRC-32 of dtype, shape and content, as eight hexadecimal digits."""
    head = f"{TORCH_NAMES[tensor.dtype.name]}{tensor.shape}".encode()
    return f"{zlib.crc32(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8), zlib.crc32(head)):08x}"


def check_finite(tensors: dict[str, np.ndarray]) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype.kind == "f" and not np.isfinite(tensor).all():
            raise LoadingError(
                f"tensor {name!r} has values that are not finite: it is damaged, or its training diverged."
            )

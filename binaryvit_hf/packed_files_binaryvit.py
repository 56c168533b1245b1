"""
Packed checkpoint files: what stands in them beside the tensors, and how nothing wrong is ever loaded from them.

Their safetensors metadata holds the format's version, the fields of the config that decide what the network computes,
the shapes of the packed weights before packing, and a CRC-32 of every tensor. So what was damaged, exchanged or edited
since it was saved has a name.
"""

import json
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from .packing_binaryvit import PackedLinear


FORMAT = "1"
# What a user may change without changing a single output: names of labels and whatever acts in training alone.
CONFIG_FIELDS = (
    "image_size",
    "patch_size",
    "num_channels",
    "hidden_sizes",
    "depths",
    "num_attention_heads",
    "intermediate_sizes",
    "sequence_reduction_ratios",
    "use_class_token",
    "use_stem_norm",
    "use_layer_scale",
    "avg_pool_kernel_sizes",
    "binarize_patch_embeddings",
    "weight_bits",
    "input_bits",
    "quantization_clip_value",
    "batch_norm_eps",
)
HALF_MAX, HALF_SMALLEST_NORMAL = 65504.0, 2.0**-14


def packed_state_dict(model: torch.nn.Module, half: bool) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """
    Tensors and metadata of a packed checkpoint.

    Args:
        model: a packed model, wholly in memory.
        half: store floats in half precision where its range allows (`fits_half`).

    Raises:
        ValueError: weights are offloaded.
    """
    tensors = model.state_dict()
    offloaded = [name for name, tensor in tensors.items() if tensor.is_meta]
    if offloaded:
        raise ValueError(
            f"Tensor {offloaded[0]!r} is offloaded: load the model without a device_map to save it packed."
        )
    if half:
        tensors = {
            name: tensor.half() if tensor.dtype == torch.float32 and fits_half(name, tensor) else tensor
            for name, tensor in tensors.items()
        }
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, PackedLinear)}
    metadata = {
        "binaryvit_format": FORMAT,
        "binaryvit_config": json.dumps(config_fields(model.config)),
        "binaryvit_shapes": json.dumps(
            {f"{name}.packed_weight": layer.weight_shape for name, layer in layers.items()}
        ),
        "binaryvit_crc32": "".join(checksum(tensors[name]) for name in sorted(tensors)),
    }
    return tensors, metadata


def fits_half(name: str, tensor: torch.Tensor) -> bool:
    """
    Whether half precision keeps its eleven bits of a float tensor: nothing above 65504, and not all, or for variances, by
    which is divided, not any, below 2**-14.
    """
    magnitude = tensor.abs()
    smallest = magnitude.min() if name.endswith("running_var") else magnitude.max()
    return bool(magnitude.max() <= HALF_MAX) and bool((smallest >= HALF_SMALLEST_NORMAL) | (magnitude.max() == 0))


def config_fields(config) -> dict:
    """The fields that decide what the network computes, as JSON would give them back."""
    return json.loads(json.dumps({name: getattr(config, name) for name in CONFIG_FIELDS}))


def checksum(tensor: torch.Tensor) -> str:
    """CRC-32 of dtype, shape and content, as eight hexadecimal digits."""
    head = f"{tensor.dtype}{tuple(tensor.shape)}".encode()
    content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return f"{zlib.crc32(content, zlib.crc32(head)):08x}"


@dataclass
class PackedCheckpoint:
    """Content of the files of one checkpoint; `origin` is the name of the file that a tensor lies in."""

    tensors: dict[str, torch.Tensor]
    origin: dict[str, str]
    config: dict
    shapes: dict[str, list[int]]
    checksums: str


def check_packed_files(files: Iterable[str], model: torch.nn.Module) -> None:
    """
    Args:
        files: the safetensors files of one checkpoint.
        model: the packed model that is to be filled from them, still empty (on the meta device).

    Raises:
        ValueError: a file is damaged, or tensors or config are not those that were saved together, or not those of the
            model; the message names the tensor or the field and the file.
    """
    checkpoint = read_checkpoint([Path(file) for file in files])
    check_config(checkpoint, model.config)
    check_tensors(checkpoint, model)
    check_checksums(checkpoint)


def read_checkpoint(files: list[Path]) -> PackedCheckpoint:
    tensors, origin, metadata = {}, {}, {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as stored:
                found = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118, it is no dict
                metadata = stored.metadata() or {}
        except SafetensorError as error:
            raise ValueError(f"{describe_damage(file)} ({error}): download it again.") from error
        tensors |= found
        origin |= dict.fromkeys(found, file.name)
        if metadata.get("binaryvit_format") != FORMAT:
            raise ValueError(
                f"{file.name!r} is no packed checkpoint of format {FORMAT} (its metadata says "
                f"{metadata.get('binaryvit_format')!r}): it is damaged, or a newer binaryvit_hf wrote it."
            )
    try:
        config, shapes = json.loads(metadata["binaryvit_config"]), json.loads(metadata["binaryvit_shapes"])
        if not isinstance(config, dict) or not isinstance(shapes, dict):
            raise ValueError("binaryvit_config and binaryvit_shapes are objects")
        return PackedCheckpoint(tensors, origin, config, shapes, metadata["binaryvit_crc32"])
    except (KeyError, ValueError, RecursionError) as error:
        raise ValueError(f"The metadata of {files[-1].name!r} is damaged ({error}): download it again.") from error


def describe_damage(file: Path) -> str:
    """What is cut off or broken in a file that safetensors refuses, by tensor where its header can be read."""
    content = file.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    try:
        header = json.loads(content[8:start])
        ends = {name: start + entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"}
        _, first_cut = min((end, name) for name, end in ends.items() if end > len(content))
    except (ValueError, TypeError, KeyError, IndexError):
        return f"{file.name!r} is damaged"
    return f"{file.name!r} is cut off before the end of tensor {first_cut!r}"


def check_config(checkpoint: PackedCheckpoint, config) -> None:
    for name, value in config_fields(config).items():
        if checkpoint.config.get(name) != value:
            raise ValueError(
                f"The config says {name}={value}, but the packed weights were saved with "
                f"{name}={checkpoint.config.get(name)}: they do not belong together."
            )


def check_tensors(checkpoint: PackedCheckpoint, model: torch.nn.Module) -> None:
    for name, expected in model.state_dict().items():
        stored = stored_name(name, checkpoint.tensors, model)
        if stored is None:
            raise ValueError(f"The packed checkpoint lacks the tensor {name!r}, so nothing is loaded.")
        tensor, file = checkpoint.tensors[stored], checkpoint.origin[stored]
        if tensor.shape != expected.shape:
            raise ValueError(
                f"Tensor {stored!r} of {file!r} has the shape {tuple(tensor.shape)}, the model of this config has "
                f"{tuple(expected.shape)}."
            )
        same_kind = tensor.is_floating_point() and expected.is_floating_point()
        if not same_kind and tensor.dtype != expected.dtype:
            raise ValueError(
                f"Tensor {stored!r} of {file!r} has the dtype {tensor.dtype}, it must be {expected.dtype}."
            )
    for name, layer in model.named_modules():
        if isinstance(layer, PackedLinear):
            stored = stored_name(f"{name}.packed_weight", checkpoint.tensors, model)
            packed_from = checkpoint.shapes.get(stored)
            if packed_from != list(layer.weight_shape):
                raise ValueError(
                    f"Tensor {stored!r} of {checkpoint.origin[stored]!r} was packed from the shape {packed_from}, the "
                    f"model of this config has {list(layer.weight_shape)}."
                )


def check_checksums(checkpoint: PackedCheckpoint) -> None:
    for index, name in enumerate(sorted(checkpoint.tensors)):
        if checksum(checkpoint.tensors[name]) != checkpoint.checksums[8 * index : 8 * index + 8]:
            raise ValueError(
                f"Tensor {name!r} of {checkpoint.origin[name]!r} is not what was saved (its checksum differs): download "
                "it again."
            )


def stored_name(name: str, stored: dict, model: torch.nn.Module) -> str | None:
    """The name that a model's tensor has in a checkpoint, which may be of the classifier or of its backbone alone."""
    prefix = model.base_model_prefix + "."
    return next((known for known in (name, prefix + name, name.removeprefix(prefix)) if known in stored), None)

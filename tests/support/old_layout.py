"""Writes packed checkpoints of format 1, as version 0.1.0 does: an entry for every tensor of the model."""

import json
import zlib
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForImageClassification


def by_name(model, half: bool = False) -> dict[str, torch.Tensor]:
    """The tensors of a packed model as format 1 stores them."""
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return {name: tensor.half() if half and tensor.is_floating_point() else tensor for name, tensor in tensors.items()}


def write_old_layout(folder: Path, half: bool = False) -> Path:
    """
    Write the weights of a packed classifier again, in format 1. Returns the folder.

    Args:
        half: store all floats in half precision.
    """
    model = AutoModelForImageClassification.from_pretrained(folder)
    tensors = by_name(model, half)
    layers = dict(model.named_modules())
    with safe_open(folder / "model.safetensors", framework="pt") as stored:
        config = stored.metadata()["binaryvit_config"]
    shapes = {
        name: list(layers[name.removesuffix(".packed_weight")].weight_shape)
        for name in tensors
        if name.endswith(".packed_weight")
    }
    metadata = {
        "format": "pt",
        "binaryvit_format": "1",
        "binaryvit_config": config,
        "binaryvit_shapes": json.dumps(shapes),
        "binaryvit_crc32": "".join(checksum(tensors[name]) for name in sorted(tensors)),
    }
    save_file(tensors, folder / "model.safetensors", metadata)
    return folder


def checksum(tensor: torch.Tensor) -> str:
    content = f"{tensor.dtype}{tuple(tensor.shape)}".encode() + tensor.numpy().tobytes()
    return f"{zlib.crc32(content):08x}"

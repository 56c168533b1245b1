"""Operations and bytes of each part of a network, and the size of its files."""

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from ..network.quantization_binaryvit import in_half
from ..ops import count_layers
from .parts import part_of, parts_in_order, quantizable_layers, weight_shape


WEIGHT_FILES = ("model*.safetensors", "pytorch_model*.bin")  # a checkpoint has more tensors, which are no weights


@dataclass(frozen=True)
class PartCost:
    """
    Cost of one part of a network.

    Args:
        part: its name (`parts.part_of`).
        bops: bit operations for one image (`ops.count_operations`).
        flops: multiply-accumulates for one image with a full-precision operand.
        quantized_weights: number of weights of 1 to 8 bits.
        parameters: number of parameters, of any width.
        bit_bytes: stored bytes of packed weights.
        float_bytes: stored bytes of all other tensors.
    """

    part: str
    bops: int
    flops: int
    quantized_weights: int
    parameters: int
    bit_bytes: int
    float_bytes: int

    @property
    def ops(self) -> float:
        return self.flops + self.bops / 64

    @property
    def stored_bytes(self) -> int:
        return self.bit_bytes + self.float_bytes


def measure_parts(model: PreTrainedModel) -> list[PartCost]:
    """
    The cost of every part of a BinaryViT, from input to output.

    Bytes are those of the tensors as the checkpoint stores them. They belong to the model in memory, so the layout of the
    file does not matter.
    """
    bops, flops, parameters, weights, bits, floats = (Counter() for _ in range(6))
    for name, cost in count_layers(model.config).items():
        bops[part_of(name)] += cost.bops
        flops[part_of(name)] += cost.flops
        parameters[part_of(name)] += cost.parameters
    for name, layer in quantizable_layers(model).items():
        weights[part_of(name)] += math.prod(weight_shape(layer)) if layer.weight_bits < 32 else 0
    for name, tensor in model.state_dict().items():
        (bits if name.endswith(".packed_weight") else floats)[part_of(name)] += stored_bytes(model, name, tensor)
    return [
        PartCost(part, bops[part], flops[part], weights[part], parameters[part], bits[part], floats[part])
        for part in parts_in_order(model.config.depths)
    ]


def stored_bytes(model: PreTrainedModel, name: str, tensor: torch.Tensor) -> int:
    """Bytes of a tensor in the checkpoint. With `half`, it stores the floats that fit in half precision."""
    half = getattr(getattr(model.config, "quantization_config", None), "half", False)
    return 2 * tensor.numel() if half and in_half(name, tensor) else tensor.nbytes


def file_bytes(folder: Path) -> int:
    """Bytes of the weight files in a folder."""
    files = next((found for kind in WEIGHT_FILES if (found := list(folder.glob(kind)))), [])
    return sum(file.stat().st_size for file in files)

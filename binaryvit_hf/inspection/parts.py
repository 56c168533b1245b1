"""The parts of a network, as its reports name them: stem, layers, patch embeddings between stages, head."""

import re
from collections.abc import Iterable
from typing import NamedTuple, TypeAlias

from torch import nn

from ..network.layers_binaryvit import BinaryLayer
from ..network.modeling_binaryvit import BinaryViTAttention
from ..network.packing_binaryvit import PackedLinear


STEM, HEAD = "stem", "head"
# Columns of the tables of layers, by the end of the module's name.
ROLES = {
    r"patch_embeddings\.projection$": "patches",
    r"attention\.reduction\.linear$": "reduction",
    r"attention\.query\.linear$": "query",
    r"attention\.key\.linear$": "key",
    r"attention\.value\.linear$": "value",
    r"attention\.output\.linear$": "output",
    r"mlp\.fc1\.linear$": "fc1",
    r"mlp\.fc2\.linear$": "fc2",
}


class Place(NamedTuple):
    """Where a layer is: its part of the network, and its role in the part."""

    part: str
    role: str


def part_of(module_name: str) -> str:
    """
    The part that a module belongs to: "stem", "1.2" (the second layer of the first stage), "to 2" (the patch embeddings
    before the second stage), or "head" (last normalisation and classifier).
    """
    if layer := re.match(r"(?:binaryvit\.)?stages\.(\d+)\.layers\.(\d+)(\.|$)", module_name):
        return f"{int(layer[1]) + 1}.{int(layer[2]) + 1}"
    if between := re.match(r"(?:binaryvit\.)?stages\.(\d+)\.patch_embeddings(\.|$)", module_name):
        return f"to {int(between[1]) + 1}"
    return STEM if re.match(r"(?:binaryvit\.)?embeddings(\.|$)", module_name) else HEAD


def parts_in_order(depths: Iterable[int]) -> list[str]:
    """The names of all parts of a network, from its input to its output."""
    parts = [STEM]
    for stage, depth in enumerate(depths, 1):
        parts += [f"to {stage}"] if stage > 1 else []
        parts += [f"{stage}.{layer}" for layer in range(1, depth + 1)]
    return [*parts, HEAD]


Layer: TypeAlias = BinaryLayer | PackedLinear


def quantizable_layers(model: nn.Module) -> dict[str, Layer]:
    """The layers whose weights and inputs the config may quantise, packed or latent, by name."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, Layer)}


def weight_shape(layer: Layer) -> tuple[int, ...]:
    return layer.weight_shape if isinstance(layer, PackedLinear) else tuple(layer.weight.shape)


def attentions(model: nn.Module) -> dict[str, BinaryViTAttention]:
    """The attention modules by name, from input to output."""
    return {name: module for name, module in model.named_modules() if isinstance(module, BinaryViTAttention)}


def place_of(layer_name: str) -> Place:
    role = next(role for pattern, role in ROLES.items() if re.search(pattern, layer_name))
    return Place(part_of(layer_name), role)

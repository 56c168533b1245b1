"""The latent weights of a network in training: the floats whose signs are its bits."""

import torch
from torch import nn

from ..network.layers_binaryvit import BinaryLinear, BinaryPatchConv
from ..network.quantization_binaryvit import binary_layers


def one_bit_layers(model: nn.Module) -> dict[str, BinaryLinear | BinaryPatchConv]:
    """The layers of 1-bit weights, by name."""
    return {name: layer for name, layer in binary_layers(model).items() if layer.weight_bits == 1}


def distance_from_one(weights: list[torch.Tensor]) -> torch.Tensor:
    """
    Mean of `|1 - |w||` over all elements of all weights. Its gradient is `-sign(w)` inside of (-1, 1), `sign(w)` outside
    of [-1, 1], else 0, over their number (BNN+, Darabi et al., 2018, R1 with both scales 1).
    """
    return sum((1 - weight.abs()).abs().sum() for weight in weights) / sum(weight.numel() for weight in weights)

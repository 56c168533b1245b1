"""The latent weights of a network in training: the floats whose signs are its bits."""

from collections.abc import Iterable

import torch
from torch import nn

from .errors import UserError
from .layers_binaryvit import BinaryLinear, BinaryPatchConv
from .packing_binaryvit import binary_layers


def one_bit_layers(model: nn.Module, flag: str) -> dict[str, BinaryLinear | BinaryPatchConv]:
    """
    The layers of 1-bit weights, by name.

    Raises:
        UserError: there are none, for which `flag` is of no use.
    """
    layers = {name: layer for name, layer in binary_layers(model).items() if layer.weight_bits == 1}
    if not layers:
        raise UserError(f"--{flag} is for networks of 1-bit weights, which this is not.")
    return layers


def distance_from_one(weights: Iterable[torch.Tensor]) -> torch.Tensor:
    """
    Mean of `|1 - |w||` over all elements of all weights. Its gradient is `-sign(w)` inside of (-1, 1), `sign(w)` outside
    of [-1, 1], else 0, over their number (BNN+, Darabi et al., 2018, R1 with both scales 1).
    """
    weights = list(weights)
    return sum((1 - weight.abs()).abs().sum() for weight in weights) / sum(weight.numel() for weight in weights)

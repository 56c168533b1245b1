"""Stochastic depth for the full-precision teacher: transformers' ViT has none of its own."""

from torch import nn
from transformers import ViTModel

from ..network.layers_binaryvit import DropPath, drop_path_rates


def add_drop_path(model: ViTModel, drop_path_rate: float) -> None:
    """
    Drop the attention and MLP branches of whole images in training, as DeiT does (Touvron et al., ICML 2021).

    Args:
        model: changed in place; what it saves and loads stays the same, for dropping has no weights.
        drop_path_rate: probability of the last layer's branches; it grows linearly from 0 with depth.
    """
    for layer, rate in zip(model.layers, drop_path_rates(drop_path_rate, len(model.layers))):
        # The layer's dropout stands at the end of both branches, just before they are added.
        layer.dropout = nn.Sequential(layer.dropout, DropPath(rate))

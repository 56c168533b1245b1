"""Stochastic depth for the full-precision teacher: transformers' ViT has none."""

from torch import nn
from transformers import ViTModel

from ..network.layers_binaryvit import DropPath, drop_path_rates


def add_drop_path(model: ViTModel, drop_path_rate: float) -> None:
    """
    During training, drop the attention and MLP branches of whole images, as DeiT does (Touvron et al., ICML 2021).

    Args:
        model: changed in place. Its weights and their names stay the same.
        drop_path_rate: probability of the last layer's branches; it grows linearly from 0 with depth.
    """
    for layer, rate in zip(model.layers, drop_path_rates(drop_path_rate, len(model.layers))):
        # The layer's dropout is the last module of both branches, before the addition.
        layer.dropout = nn.Sequential(layer.dropout, DropPath(rate))

"""
The 1-bit network as it is commonly simulated: composed of PyTorch's own operations, each with its own gradient.

Outputs and gradients equal the network's, but without the savings of time and memory of `functional_binaryvit`.
Benchmarks use it as a peer, tests as a second implementation.
"""

import functools
from collections.abc import Callable

import torch
from torch import nn

from ..network import modeling_binaryvit
from ..network.layers_binaryvit import AvgPoolBranches, BinaryLinear, BinaryPatchConv, NormActivation
from ..network.modeling_binaryvit import BinaryViTAttention, BinaryViTMLP, BinaryViTPreTrainedModel


def simulate(model: BinaryViTPreTrainedModel) -> BinaryViTPreTrainedModel:
    """
    Replace the forwards of a model's layers in place. Parameters and outputs stay the same.

    Raises:
        ValueError: weights or inputs have more than one bit.
    """
    if (model.config.weight_bits, model.config.input_bits) != (1, 1):
        raise ValueError("Only networks of 1-bit weights and inputs can be simulated.")
    forwards: dict[type, Callable] = {
        BinaryLinear: linear_forward,
        BinaryPatchConv: patch_conv_forward,
        NormActivation: norm_activation_forward,
        AvgPoolBranches: avg_pools_forward,
        BinaryViTMLP: mlp_forward,
        BinaryViTAttention: attention_forward,
    }
    for module in model.modules():
        if type(module) in forwards:
            module.forward = functools.partial(forwards[type(module)], module)
    return model


def sign(x: torch.Tensor) -> torch.Tensor:
    """Sign with the gradient of a piecewise polynomial (Bi-Real Net, Liu et al., ECCV 2018)."""
    inside = torch.where(x < 0, 2 * x + x * x, 2 * x - x * x)
    soft = torch.where(x.abs() < 1, inside, x.detach().sign())
    return soft + (torch.where(x >= 0, 1.0, -1.0).to(x.dtype) - soft).detach()


def binarize_weight(weight: torch.Tensor, center: bool) -> torch.Tensor:
    dims = tuple(range(1, weight.dim()))
    scale = weight.abs().mean(dims, keepdim=True).detach()
    latent = weight - weight.mean(dims, keepdim=True) if center else weight
    soft = latent.clamp(-1, 1)
    return soft + (scale * torch.where(latent >= 0, 1.0, -1.0).to(weight.dtype) - soft).detach()


def binarize_probability(probabilities: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    clipped = (probabilities / step).clamp(0, 1)
    return (clipped + (clipped.round() - clipped).detach()) * step


def linear_forward(self: BinaryLinear, hidden_states: torch.Tensor) -> torch.Tensor:
    return nn.functional.linear(sign(hidden_states + self.shift), binarize_weight(self.weight, center=True))


def patch_conv_forward(self: BinaryPatchConv, patches: torch.Tensor) -> torch.Tensor:
    weight = binarize_weight(self.weight, center=False).flatten(1)
    return nn.functional.linear(sign(patches + self.shift.repeat_interleave(4)), weight)


def norm_activation_forward(self: NormActivation, hidden_states: torch.Tensor, shortcut: torch.Tensor) -> torch.Tensor:
    channels, activation = hidden_states.shape[-1], self.activation
    if channels < shortcut.shape[-1]:
        shortcut = shortcut.unflatten(-1, (channels, -1)).mean(-1)
    elif channels > shortcut.shape[-1]:
        shortcut = shortcut.repeat(1, 1, channels // shortcut.shape[-1])
    shifted = self.norm(hidden_states) + shortcut - activation.shift_in
    return torch.prelu(shifted.flatten(0, -2), activation.slope).view(shifted.shape) + activation.shift_out


def avg_pools_forward(
    self: AvgPoolBranches, hidden_states: torch.Tensor, pooled: torch.Tensor, grid_size: tuple[int, int]
) -> torch.Tensor:
    for branch in self:  # none, if a class token makes the tokens more than a map
        token_map = pooled.unflatten(1, grid_size).permute(0, 3, 1, 2)
        padding = tuple(size // 2 for size in branch.kernel_size)
        mean = nn.functional.avg_pool2d(token_map, branch.kernel_size, stride=1, padding=padding)
        hidden_states = hidden_states + branch.layer_scale(mean.permute(0, 2, 3, 1).flatten(1, 2))
    return hidden_states


def mlp_forward(self: BinaryViTMLP, hidden_states: torch.Tensor) -> torch.Tensor:
    return self.fc2(self.fc1(hidden_states))


def attention_forward(
    self: BinaryViTAttention, hidden_states: torch.Tensor, grid_size: tuple[int, int], output_attentions: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    query = self.query(hidden_states)
    if self.reduction is not None:
        pooled = modeling_binaryvit.pool_tokens(hidden_states, grid_size, self.reduction_ratio)
        hidden_states = self.reduction(pooled)
    key, value = self.key(hidden_states), self.value(hidden_states)

    def heads(x, shift):
        return sign(x + shift).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    scores = heads(query, self.query_shift) @ heads(key, self.key_shift).transpose(-1, -2)
    probabilities = torch.softmax(scores * self.head_dim**-0.5, -1)
    probabilities = self.dropout(binarize_probability(probabilities, self.probability_clip))
    context = (probabilities @ heads(value, self.value_shift)).transpose(1, 2).flatten(2)
    shortcut = key + value
    if self.reduction is not None:
        shortcut = modeling_binaryvit.upsample_tokens(shortcut, grid_size, self.reduction_ratio)
    return self.output(self.norm_activation(context, query + shortcut)), probabilities

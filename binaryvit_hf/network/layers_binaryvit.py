# SPDX-License-Identifier: Apache-2.0
"""
Layers of a binary network: binary linear layers, batch normalisation of tokens, RPReLU, LayerScale, pooling.

Activations are tokens `(batch, height * width, channels)`. "ReActNet" is Liu et al., ECCV 2020.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module

from .functional_binaryvit import (
    AddAvgPools,
    BinaryMLPProducts,
    NormShortcutRPReLU,
    SignLinear,
    SyncedBatchNorm,
    approx_sign_slope,
    batch_statistics,
    fastest,
    is_distributed,
    on_row_kernels,
    quantize_input,
    quantize_weight,
    row_kernels,
    scale_and_shift,
)


class BinaryLayer(nn.Module):
    """
    Quantised weight, and shift of the input, of `BinaryLinear` and `BinaryPatchConv`.

    Not a `nn.Linear` or `nn.Conv2d`: tools that adapt, quantise or replace these (PEFT, torchao, mixed precision in 8
    bits) compute with float weights, which here are only the latent form of signs.

    Args:
        weight_shape: `(out, in)`, or `(out, in, height, width)`.
    """

    sign_slope = staticmethod(approx_sign_slope)  # gradient of the input's sign; training may set another
    centers_weight: bool  # whether signs are those of each row minus its mean

    def __init__(self, config, *weight_shape: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(weight_shape))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))  # as nn.Linear and nn.Conv2d do
        self.shift = nn.Parameter(torch.zeros(weight_shape[1]))
        self.weight_bits, self.input_bits = config.weight_bits, config.input_bits
        self.clip_value = config.quantization_clip_value

    def quantized_weight(self) -> torch.Tensor:
        return quantize_weight(self.weight, self.weight_bits, self.clip_value, self.centers_weight, self.training)

    def options(self) -> tuple:
        """Arguments that `quantized_linear` takes after the weight."""
        return self.weight_bits, self.input_bits, self.clip_value, self.sign_slope, self.training

    def extra_repr(self) -> str:
        out_features, in_features, *_ = self.weight.shape
        bits = f"weight_bits={self.weight_bits}, input_bits={self.input_bits}"
        return f"in_features={in_features}, out_features={out_features}, {bits}"


class BinaryLinear(BinaryLayer):
    """
    Linear layer of quantised weight and input, without bias: `(..., in_features) -> (..., out_features)`.

    A shift per channel is added to the input before its sign is taken (ReActNet, eq. 1).
    """

    centers_weight = True

    def __init__(self, config, in_features: int, out_features: int):
        super().__init__(config, out_features, in_features)
        self.in_features, self.out_features = in_features, out_features

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return quantized_linear(hidden_states, self.shift, self.quantized_weight(), *self.options())


class BinaryPatchConv(BinaryLayer):
    """
    2 x 2 convolution of stride 2 with quantised weight and input.

    It is a linear layer over the four neighbours that `gather_patches` puts side by side:
    `(batch, tokens, in_channels * 4) -> (batch, tokens, out_channels)`.
    """

    centers_weight = False

    def __init__(self, config, in_channels: int, out_channels: int):
        super().__init__(config, out_channels, in_channels, 2, 2)
        self.in_channels, self.out_channels = in_channels, out_channels

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        weight = self.quantized_weight().flatten(1)
        return quantized_linear(patches, self.shift.repeat_interleave(4), weight, *self.options())


def quantized_linear(
    x: torch.Tensor,
    shift: torch.Tensor,
    weight: torch.Tensor,
    weight_bits: int,
    input_bits: int,
    clip_value: float,
    sign_slope: Callable = approx_sign_slope,
    training: bool = False,
) -> torch.Tensor:
    """`quantize(x + shift) @ weight.T`: `(..., in) -> (..., out)`. The weight `(out, in)` is quantised already."""
    if input_bits == 1:
        rows = x.flatten(0, -2)
        step = fastest(
            SignLinear, [rows, shift, weight], training and weight_bits == 1 and sign_slope is approx_sign_slope
        )
        return step.apply(rows, shift, weight, weight_bits, sign_slope).unflatten(0, x.shape[:-1])
    return nn.functional.linear(quantize_input(x, shift, input_bits, clip_value), weight)


def read_tensors(module: nn.Module, *names: str) -> list[torch.Tensor]:
    """
    Parameters and buffers of a child that its parent reads instead of calling it.

    If accelerate has offloaded the child, its hook loads them, as it does for a call.
    """
    hook = vars(module).get("_hf_hook")
    if hook is None:
        return [getattr(module, name) for name in names]
    hook.pre_forward(module)
    tensors = [getattr(module, name) for name in names]
    hook.post_forward(module, None)
    return tensors


class TokenBatchNorm(nn.Module):
    """Batch normalisation over all tokens of a batch, in training over those of all processes: `(..., channels)`."""

    def __init__(self, config, num_channels: int):
        super().__init__()
        self.batch_norm = nn.BatchNorm1d(num_channels, eps=config.batch_norm_eps, momentum=config.batch_norm_momentum)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        rows, norm = hidden_states.flatten(0, -2), self.batch_norm
        step = fastest(SyncedBatchNorm, [rows, *norm.parameters()], norm.training)
        if step is SyncedBatchNorm and not (norm.training and is_distributed()):
            normed = norm(rows)
        else:
            statistics = self.statistics(functools.partial(fastest(batch_statistics, [rows]), [rows]))
            normed = step.apply(rows, *statistics, norm.eps, norm.weight, norm.bias)
        return normed.view(hidden_states.shape)

    def statistics(self, measure: Callable[[nn.BatchNorm1d], tuple]) -> tuple[torch.Tensor, torch.Tensor, Any]:
        """
        Statistics to normalise with.

        Args:
            measure: computes those of the batch in training, and updates the running statistics
                (`batch_statistics`).

        Returns:
            Mean and variance `(channels,)`, and the number of rows they are over; 0 rows means running statistics.

        Raises:
            ValueError: in training, if there is one row.
        """
        norm = self.batch_norm
        if not norm.training:
            return *read_tensors(norm, "running_mean", "running_var"), 0
        norm.num_batches_tracked.add_(1)
        return measure(norm)


class RPReLU(nn.Module):
    """Parameters of `PReLU(x - shift_in) + shift_out` (ReActNet, eq. 2), which `NormActivation` computes."""

    def __init__(self, num_channels: int):
        super().__init__()
        self.shift_in = nn.Parameter(torch.zeros(num_channels))
        self.slope = nn.Parameter(torch.full((num_channels,), 0.25))
        self.shift_out = nn.Parameter(torch.zeros(num_channels))


class NormActivation(nn.Module):
    """`RPReLU(BN(x) + shortcut)`: `(..., channels)`. Channels of the shortcut are repeated or averaged to fit."""

    def __init__(self, config, num_channels: int):
        super().__init__()
        self.norm = TokenBatchNorm(config, num_channels)
        self.activation = RPReLU(num_channels)

    def forward(self, hidden_states: torch.Tensor, shortcut: torch.Tensor) -> torch.Tensor:
        rows, shortcut_rows = hidden_states.flatten(0, -2), shortcut.flatten(0, -2)
        eps, *parameters = self.arguments()
        measure = functools.partial(fastest(batch_statistics, [rows], self.training), [rows])
        step = fastest(NormShortcutRPReLU, [rows, shortcut_rows, *parameters], self.training)
        activated = step.apply(rows, shortcut_rows, *self.norm.statistics(measure), eps, *parameters)
        return activated.view(hidden_states.shape)

    def arguments(self) -> tuple:
        """Arguments that `NormRPReLU` takes after the statistics: eps, weight, bias, shift_in, slope, shift_out."""
        norm = self.norm.batch_norm
        activation = read_tensors(self.activation, "shift_in", "slope", "shift_out")
        return norm.eps, *read_tensors(norm, "weight", "bias"), *activation


class LayerScale(nn.Module):
    """`scale * x + shift` per channel: `(..., channels)`. BinaryViT adds the shift; CaiT's LayerScale has none."""

    def __init__(self, num_channels: int, init_value: float):
        super().__init__()
        self.init_value = init_value
        self.scale = nn.Parameter(torch.full((num_channels,), float(init_value)))
        self.shift = nn.Parameter(torch.zeros(num_channels))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        tensors = hidden_states, self.scale, self.shift
        return fastest(scale_and_shift, tensors, self.training)(*tensors)


class BinaryProjection(nn.Module):
    """
    `RPReLU(BN(BinaryLinear(x)) + x)`: query, key, value, reduction, output and both layers of the MLP.

    `(..., in_features) -> (..., out_features)`, one of the two a multiple of the other.
    """

    def __init__(self, config, in_features: int, out_features: int):
        super().__init__()
        self.linear = BinaryLinear(config, in_features, out_features)
        self.norm_activation = NormActivation(config, out_features)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.training and self.is_plain_square():
            linear, norm = self.linear, self.norm_activation.norm
            eps, *parameters = self.norm_activation.arguments()
            if on_row_kernels([hidden_states, linear.shift, linear.weight, *parameters]):
                rows, weight = hidden_states.flatten(0, -2), linear.quantized_weight()
                step = row_kernels.BinaryProjection.apply
                return step(rows, linear.shift, weight, norm.statistics, eps, *parameters).view(hidden_states.shape)
        return self.norm_activation(self.linear(hidden_states), hidden_states)

    def is_plain_square(self) -> bool:
        """Whether one step on row kernels may compute this layer: nobody has wrapped its parts or hooks into them."""
        linear = self.linear
        return (
            type(linear) is BinaryLinear  # not a wrapper, such as PEFT's, or a parametrisation
            and linear.in_features == linear.out_features
            and (linear.weight_bits, linear.input_bits) == (1, 1)
            and linear.sign_slope is approx_sign_slope
            and not any(has_hooks(module) for module in (linear, self.norm_activation))
        )


def has_hooks(module: nn.Module) -> bool:
    """Whether a call of the module also calls hooks of a user: its own, or those for all modules."""
    hooks = vars(module)
    return bool(torch_module._has_any_global_hook()) or any(
        hooks[f"_{kind}_hooks"] for kind in ("forward", "forward_pre", "backward", "backward_pre")
    )


def binary_mlp_products(
    fc1: BinaryProjection, linear2: BinaryLinear, hidden_states: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Both products of an MLP, fused, for 1-bit weights and inputs.

    Args:
        linear2: linear layer of the second projection.
        hidden_states: `(..., channels)`. Both results have this shape.

    Returns:
        `linear2(fc1(hidden_states))`, and its shortcut, `fc1(hidden_states)` averaged over runs of adjacent channels.
    """
    rows, slopes = hidden_states.flatten(0, -2), (fc1.linear.sign_slope, linear2.sign_slope)
    weights = fc1.linear.shift, fc1.linear.quantized_weight(), linear2.shift, linear2.quantized_weight()
    eps, *parameters = fc1.norm_activation.arguments()
    has_twin = fc1.training and slopes == (approx_sign_slope, approx_sign_slope)
    step = fastest(BinaryMLPProducts, [rows, *weights, *parameters], has_twin)
    products = step.apply(rows, *weights, slopes, fc1.norm_activation.norm.statistics, eps, *parameters)
    return tuple(product.view(hidden_states.shape) for product in products)


class AvgPoolBranch(nn.Module):
    """LayerScale of the mean over `kernel_size` `(height, width)` tokens, which `AvgPoolBranches` computes."""

    def __init__(self, num_channels: int, kernel_size: tuple[int, int]):
        super().__init__()
        self.kernel_size = kernel_size
        self.layer_scale = LayerScale(num_channels, init_value=0.0)


class AvgPoolBranches(nn.ModuleList):
    """`hidden_states` plus all branches of `pooled`. Both are `(batch, height * width, channels)`."""

    def forward(self, hidden_states: torch.Tensor, pooled: torch.Tensor, grid_size: tuple[int, int]) -> torch.Tensor:
        if not self:
            return hidden_states
        shifts, scales = zip(*(read_tensors(branch.layer_scale, "shift", "scale") for branch in self))
        kernel_sizes = [branch.kernel_size for branch in self]
        inputs = hidden_states, pooled, sum(shifts)
        step = fastest(AddAvgPools, [*inputs, *scales], self.training)
        return step.apply(*inputs, grid_size, kernel_sizes, *scales)


class DropPath(nn.Module):
    """Stochastic depth (Huang et al., ECCV 2016): training drops an image's branch with probability `drop_prob`."""

    def __init__(self, drop_prob: float):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.drop_prob == 0 or not self.training:
            return hidden_states
        keep_prob = 1 - self.drop_prob
        mask = hidden_states.new_empty(hidden_states.shape[0], 1, 1).bernoulli_(keep_prob)
        return hidden_states * mask / keep_prob


def drop_path_rates(drop_path_rate: float, layers: int) -> list[float]:
    """`drop_prob` of each layer's `DropPath`: it grows linearly from 0 to `drop_path_rate`."""
    return [drop_path_rate * layer / max(layers - 1, 1) for layer in range(layers)]


def pool_tokens(hidden_states: torch.Tensor, grid_size: tuple[int, int], ratio: int) -> torch.Tensor:
    """Mean over squares of `ratio` tokens: `(batch, height * width, C) -> (batch, height * width / ratio**2, C)`."""
    return split_squares(hidden_states, grid_size, ratio).mean((2, 4)).flatten(1, 2)


def upsample_tokens(hidden_states: torch.Tensor, grid_size: tuple[int, int], ratio: int) -> torch.Tensor:
    """Nearest upsampling to `grid_size`: `(batch, height * width / ratio**2, C) -> (batch, height * width, C)`."""
    height, width = grid_size
    squares = hidden_states.unflatten(1, (height // ratio, 1, width // ratio, 1))
    return squares.expand(-1, -1, ratio, -1, ratio, -1).flatten(1, 4)


def resize_positions(
    positions: torch.Tensor, grid_size: tuple[int, int], new_grid_size: tuple[int, int]
) -> torch.Tensor:
    """
    Bicubic interpolation of position embeddings, as in ViT and DINOv2, computed in float32 at least.

    Args:
        positions: `(1, height * width, channels)` for the map `grid_size`. A class token's embedding may be in front;
            it is kept.

    Returns:
        `(1, new height * new width, channels)`, and the class token's embedding in front.
    """
    if tuple(new_grid_size) == tuple(grid_size):
        return positions
    class_tokens = positions.shape[1] - math.prod(grid_size)
    class_position, token_positions = positions.tensor_split([class_tokens], dim=1)
    token_map = token_positions.unflatten(1, grid_size).permute(0, 3, 1, 2)
    token_map = token_map.to(torch.promote_types(positions.dtype, torch.float32))
    resized = nn.functional.interpolate(token_map, tuple(new_grid_size), mode="bicubic", align_corners=False)
    resized = resized.flatten(2).transpose(1, 2).to(positions.dtype)
    return torch.cat((class_position, resized), dim=1)


def gather_patches(hidden_states: torch.Tensor, grid_size: tuple[int, int]) -> torch.Tensor:
    """Four neighbours side by side, row-major: `(batch, height * width, C) -> (batch, height * width / 4, C, 4)`."""
    squares = split_squares(hidden_states, grid_size, 2)
    return squares.permute(0, 1, 3, 5, 2, 4).flatten(1, 2).flatten(-2)


def split_squares(hidden_states: torch.Tensor, grid_size: tuple[int, int], ratio: int) -> torch.Tensor:
    """View as squares: `(batch, height * width, C) -> (batch, height / ratio, ratio, width / ratio, ratio, C)`."""
    height, width = grid_size
    return hidden_states.unflatten(1, (height // ratio, ratio, width // ratio, ratio))

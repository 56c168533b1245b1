"""The parts of a binary block. Activations are tokens, `(batch, height * width, channels)`, unless said otherwise."""

import torch
from torch import nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from .quantizers_binaryvit import SignLinear, quantize_input, quantize_weight


class BinaryLinear(nn.Linear):
    """
    Linear layer of quantised weight and input, without bias: `(..., in_features) -> (..., out_features)`.

    Its input is shifted per channel before the sign is taken (ReActNet, eq. 1).
    """

    def __init__(self, config, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)
        self.shift = nn.Parameter(torch.zeros(in_features))
        self.weight_bits, self.input_bits = config.weight_bits, config.input_bits
        self.clip_value = config.quantization_clip_value

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        weight = quantize_weight(self.weight, self.weight_bits, self.clip_value, center=True)
        return quantized_linear(hidden_states, self.shift, weight, self.input_bits, self.clip_value)


class BinaryPatchConv(nn.Conv2d):
    """
    2 x 2 convolution of stride 2 with quantised weight and input, as the linear layer over four neighbours that it is.

    Takes the neighbours of `gather_patches`, `(batch, tokens, in_channels * 4)`, and gives
    `(batch, tokens, out_channels)`.
    """

    def __init__(self, config, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels, kernel_size=2, stride=2, bias=False)
        self.shift = nn.Parameter(torch.zeros(in_channels))
        self.weight_bits, self.input_bits = config.weight_bits, config.input_bits
        self.clip_value = config.quantization_clip_value

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        weight = quantize_weight(self.weight, self.weight_bits, self.clip_value, center=False).flatten(1)
        shift = self.shift.repeat_interleave(4)
        return quantized_linear(patches, shift, weight, self.input_bits, self.clip_value)


def quantized_linear(x, shift, weight, input_bits, clip_value):
    """Linear layer of a quantised weight; one bit takes the path that keeps no signs for the backward pass."""
    if input_bits == 1:
        return SignLinear.apply(x, shift, weight)
    return nn.functional.linear(quantize_input(x, shift, input_bits, clip_value), weight)


class TokenBatchNorm(nn.Module):
    """Batch normalisation of each channel over all tokens of the batch: `(..., channels)`."""

    def __init__(self, config, num_channels: int):
        super().__init__()
        # Held, not subclassed: `SyncBatchNorm.convert_sync_batchnorm` replaces it and would lose the flattening.
        self.batch_norm = nn.BatchNorm1d(num_channels, eps=config.batch_norm_eps, momentum=config.batch_norm_momentum)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.batch_norm(hidden_states.flatten(0, -2)).view(hidden_states.shape)


class RPReLU(nn.Module):
    """`PReLU(x - shift_in) + shift_out`, shifts and slope per channel (ReActNet, eq. 2)."""

    def __init__(self, num_channels: int):
        super().__init__()
        self.shift_in = nn.Parameter(torch.zeros(num_channels))
        self.slope = nn.Parameter(torch.full((num_channels,), 0.25))
        self.shift_out = nn.Parameter(torch.zeros(num_channels))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return ShiftedPReLU.apply(hidden_states, self.shift_in, self.slope, self.shift_out)


class ShiftedPReLU(Function):
    """RPReLU that keeps its input alone; the composed one keeps two more tensors of the same size."""

    @staticmethod
    def forward(ctx, x, shift_in, slope, shift_out):
        ctx.save_for_backward(x, shift_in, slope)
        shifted = x - shift_in
        return torch.addcmul(shifted, shifted.clamp(max=0), slope - 1).add_(shift_out)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        x, shift_in, slope = ctx.saved_tensors
        shifted = x - shift_in
        grad_x = torch.where(shifted > 0, grad_output, grad_output * slope)
        grad_slope = shifted.clamp_(max=0).mul_(grad_output).sum_to_size(slope.shape)
        return grad_x, -grad_x.sum_to_size(slope.shape), grad_slope, grad_output.sum_to_size(slope.shape)


class LayerScale(nn.Module):
    """`scale * x + shift` per channel. The shift is the paper's; CaiT's LayerScale has none."""

    def __init__(self, num_channels: int, init_value: float):
        super().__init__()
        self.init_value = init_value
        self.scale = nn.Parameter(torch.full((num_channels,), float(init_value)))
        self.shift = nn.Parameter(torch.zeros(num_channels))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return torch.addcmul(self.shift, hidden_states, self.scale)


class BinaryProjection(nn.Module):
    """
    Binary linear layer, normalisation, shortcut, activation: `RPReLU(BN(Lin_b(x + shift)) + shortcut(x))`.

    Query, key, value, reduction, output and both layers of the MLP are this. `(..., in) -> (..., out)`, one a multiple
    of the other; the shortcut repeats the channels or averages neighbouring ones to fit.
    """

    def __init__(self, config, in_features: int, out_features: int):
        super().__init__()
        self.linear = BinaryLinear(config, in_features, out_features)
        self.norm = TokenBatchNorm(config, out_features)
        self.activation = RPReLU(out_features)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.activation(add_shortcut(self.norm(self.linear(hidden_states)), hidden_states))


class AvgPoolBranch(nn.Module):
    """LayerScale of the mean over `kernel_size` (height, width) tokens around each; outside of the map is 0."""

    def __init__(self, num_channels: int, kernel_size: tuple[int, int]):
        super().__init__()
        self.kernel_size = kernel_size
        self.padding = (kernel_size[0] // 2, kernel_size[1] // 2)
        self.layer_scale = LayerScale(num_channels, init_value=0.0)

    def forward(self, hidden_states: torch.Tensor, grid_size: tuple[int, int]) -> torch.Tensor:
        # (batch, height * width, channels) -> (batch, channels, height, width), channels last in memory
        token_map = hidden_states.unflatten(1, grid_size).permute(0, 3, 1, 2)
        pooled = nn.functional.avg_pool2d(token_map, self.kernel_size, stride=1, padding=self.padding)
        return self.layer_scale(pooled.permute(0, 2, 3, 1).flatten(1, 2))


class DropPath(nn.Module):
    """Stochastic depth: in training drops the whole branch of an image with probability `drop_prob` (Huang et al., 2016)."""

    def __init__(self, drop_prob: float):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.drop_prob == 0 or not self.training:
            return hidden_states
        keep_prob = 1 - self.drop_prob
        mask = hidden_states.new_empty(hidden_states.shape[0], 1, 1).bernoulli_(keep_prob)
        return hidden_states * mask / keep_prob


def add_shortcut(hidden_states: torch.Tensor, shortcut: torch.Tensor) -> torch.Tensor:
    """
    `hidden_states (..., out)` plus `shortcut (..., in)`. More channels: channel j takes channel `j mod in`. Fewer: channel
    j takes the mean over its run of `in / out` neighbouring channels. As many: itself.
    """
    in_features, out_features = shortcut.shape[-1], hidden_states.shape[-1]
    if out_features < in_features:
        return hidden_states + shortcut.unflatten(-1, (out_features, -1)).mean(-1)
    repeated = hidden_states.unflatten(-1, (-1, in_features)) + shortcut.unsqueeze(-2)
    return repeated.flatten(-2)


def pool_tokens(hidden_states: torch.Tensor, grid_size: tuple[int, int], ratio: int) -> torch.Tensor:
    """Mean over squares of `ratio` tokens: `(batch, height * width, C) -> (batch, height * width / ratio**2, C)`."""
    return split_squares(hidden_states, grid_size, ratio).mean((2, 4)).flatten(1, 2)


def add_upsampled(hidden_states: torch.Tensor, pooled: torch.Tensor, grid_size: tuple[int, int], ratio: int):
    """`hidden_states` plus the nearest upsampling of `pooled`, the inverse shapes of `pool_tokens`."""
    height, width = grid_size
    squares = pooled.unflatten(1, (height // ratio, 1, width // ratio, 1))
    return (split_squares(hidden_states, grid_size, ratio) + squares).flatten(1, 4)


def gather_patches(hidden_states: torch.Tensor, grid_size: tuple[int, int]) -> torch.Tensor:
    """Four neighbours side by side: `(batch, height * width, C) -> (batch, height * width / 4, C, 4)`, row-major."""
    squares = split_squares(hidden_states, grid_size, 2)
    return squares.permute(0, 1, 3, 5, 2, 4).flatten(1, 2).flatten(-2)


def split_squares(hidden_states: torch.Tensor, grid_size: tuple[int, int], ratio: int) -> torch.Tensor:
    """`(batch, height * width, C) -> (batch, height / ratio, ratio, width / ratio, ratio, C)`, a view."""
    height, width = grid_size
    return hidden_states.unflatten(1, (height // ratio, ratio, width // ratio, ratio))

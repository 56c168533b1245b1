"""
The quantisers: value, gradient, paper. Each is a `torch.autograd.Function` that keeps for the backward pass only what lives
anyway, the input before quantisation and the parameters, and computes the rest again.

Values are exact: what is meant to be +1 or -1 is exactly that, so that packing can store it as a bit.
"""

from collections.abc import Callable

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable


def binary_sign(x: torch.Tensor) -> torch.Tensor:
    """`+1` where `x >= 0`, else `-1`, in the dtype of `x`. Zero of either sign is `+1`: a bit has no third state."""
    return binary_sign_(x.clone())


def binary_sign_(x: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """`binary_sign`, for which `x` is given up; in another dtype if one is given."""
    # A choice by mask (torch.where) is 20 times slower on a CPU.
    return x.ge_(0).to(dtype or x.dtype).mul_(2).sub_(1)


def approx_sign_slope(x: torch.Tensor) -> torch.Tensor:
    """`max(0, 2 - 2|x|)`: `2 + 2x` on [-1, 0], `2 - 2x` on (0, 1], else 0 (Bi-Real Net, Liu et al., ECCV 2018)."""
    return torch.rsub(x.abs(), 2, alpha=2).clamp_(min=0)


class ApproxSign(Function):
    """
    Sign of a shifted activation.

    Forward: `sign(x + shift)`, x `(..., channels)`, shift `(channels,)`.
    Gradient: to x, `slope(x + shift)`, a new tensor; to shift, its sum over all but the channels.
    ReActNet, Liu et al., ECCV 2020, eq. 1 (RSign).
    """

    @staticmethod
    def forward(ctx, x, shift, slope=approx_sign_slope):
        ctx.save_for_backward(x, shift)
        ctx.slope = slope
        return binary_sign_(x + shift)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        x, shift = ctx.saved_tensors
        grad_x = ctx.slope(x + shift).mul_(grad_output)
        return grad_x, grad_x.sum_to_size(shift.shape), None


class BinarizeWeight(Function):
    """
    Sign of a weight times one scale per output channel.

    Forward: `a * sign(w')`, with `w' = w - mean(w)` of each row if `center`, else `w' = w`; `a = mean(|w|)` of the row,
    uncentred. A row is all but the first dimension.
    Gradient: of `clamp(w', -1, 1)`, through the centring; `a` is taken as constant.
    BiBERT, Qin et al., ICLR 2022 (centring); XNOR-Net, Rastegari et al., ECCV 2016 (scale).
    """

    @staticmethod
    def forward(ctx, weight, center):
        ctx.save_for_backward(weight)
        ctx.center = center
        return row_scale(weight) * binary_sign(center_rows(weight) if center else weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        (weight,) = ctx.saved_tensors
        latent = center_rows(weight) if ctx.center else weight
        grad = grad_output * (latent.abs() <= 1)
        return center_rows(grad) if ctx.center else grad, None


class QuantizeProbability(Function):
    """
    Attention probabilities on a grid of learned step.

    Forward: `clamp(round(p / step), 0, levels) * step`, p non-negative, step a scalar; `levels = 2**bits - 1`.
    Gradient: to p, 1 where `0 <= p / step <= levels`, else 0; to step, `round(p / step) - p / step` there and `levels`
    above, summed.
    BiT, Liu et al., NeurIPS 2022 (elastic binarisation without offset).
    """

    @staticmethod
    def forward(ctx, probabilities, step, levels):
        ctx.save_for_backward(probabilities, step)
        ctx.levels = levels
        return probability_levels(probabilities, step, levels)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        return *probability_gradient(*ctx.saved_tensors, ctx.levels, grad_output), None


class QuantizeMultiBit(Function):
    """
    2 to 8 bits, zero included.

    Forward, x clipped to `[-clip_value, clip_value]` first: with 2 bits ternary, `a * sign(x)` where
    `|x| > 0.7 * mean(|x|)`, else 0, `a` the mean of |x| where it is not 0 (TWN, Li et al., 2016); else uniform,
    `round(x / s) * s` with `s = max(|x|) / (2**(bits - 1) - 1)`. Statistics are over the dimensions `dims`.
    Gradient: 1 where `|x| <= clip_value`, else 0; through no statistic.
    """

    @staticmethod
    def forward(ctx, x, bits, clip_value, dims):
        ctx.save_for_backward(x)
        ctx.clip_value = clip_value
        levels, scale = multi_bit_levels(x, bits, clip_value, dims)
        return scale * levels

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        (x,) = ctx.saved_tensors
        return grad_output * (x.abs() <= ctx.clip_value), None, None, None


def quantize_weight(weight: torch.Tensor, bits: int, clip_value: float, center: bool) -> torch.Tensor:
    """Weight `(out, ...)` on `bits` bits; 1 has a scale per row, 2 to 8 one for the tensor, 32 is untouched."""
    if bits == 32:
        return weight
    if bits == 1:
        return BinarizeWeight.apply(weight, center)
    return QuantizeMultiBit.apply(weight, bits, clip_value, tuple(range(weight.dim())))


def weight_levels(
    weight: torch.Tensor, bits: int, clip_value: float, center: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    What `quantize_weight` multiplies, for packing: whole numbers in the shape of the weight, -1 and 1 for 1 bit and
    `-(2**(bits - 1) - 1)` to `2**(bits - 1) - 1` for 2 to 8; and their scale, kept for broadcasting.
    """
    if bits == 1:
        return binary_sign(center_rows(weight) if center else weight), row_scale(weight)
    return multi_bit_levels(weight, bits, clip_value, tuple(range(weight.dim())))


def quantize_input(
    x: torch.Tensor, shift: torch.Tensor, bits: int, clip_value: float, slope: Callable = approx_sign_slope
) -> torch.Tensor:
    """
    `x + shift` on `bits` bits; 2 to 8 have a scale per token (last dimension), so that images stay independent. `slope` is
    the gradient of the sign, for 1.
    """
    if bits == 32:
        return x + shift
    if bits == 1:
        return ApproxSign.apply(x, shift, slope)
    return QuantizeMultiBit.apply(x + shift, bits, clip_value, (-1,))


def quantize_probability(probabilities: torch.Tensor, step: torch.Tensor, bits: int) -> torch.Tensor:
    """Attention probabilities on `2**bits` levels of distance `step`; 32 is untouched."""
    return probabilities if bits == 32 else QuantizeProbability.apply(probabilities, step, 2**bits - 1)


def probability_levels(probabilities: torch.Tensor, step: torch.Tensor, levels: int) -> torch.Tensor:
    """Forward of `QuantizeProbability`."""
    return (probabilities / step).round_().clamp_(0, levels).mul_(step)


def probability_gradient(
    probabilities: torch.Tensor, step: torch.Tensor, levels: int, grad_output: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of `QuantizeProbability` to the probabilities and to the step."""
    scaled = probabilities / step
    inside = scaled.clone().le_(levels)  # a probability is never negative; 1 or 0, for masks are slow on a CPU
    of_step = scaled.round().clamp_(max=levels).addcmul_(scaled, inside, value=-1)
    return inside.mul_(grad_output), of_step.mul_(grad_output).sum().to(step.dtype)


def row_scale(weight: torch.Tensor) -> torch.Tensor:
    """Mean of |weight| over all but the first dimension, kept for broadcasting."""
    return weight.abs().mean(dim=tuple(range(1, weight.dim())), keepdim=True)


def center_rows(weight: torch.Tensor) -> torch.Tensor:
    return weight - weight.mean(dim=tuple(range(1, weight.dim())), keepdim=True)


def multi_bit_levels(
    x: torch.Tensor, bits: int, clip_value: float, dims: tuple[int, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Whole numbers and their scale, of `QuantizeMultiBit`."""
    clipped = x.clamp(-clip_value, clip_value)
    return ternary_levels(clipped, dims) if bits == 2 else uniform_levels(clipped, bits, dims)


def ternary_levels(x: torch.Tensor, dims: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    magnitude = x.abs()
    mask = magnitude > 0.7 * magnitude.mean(dim=dims, keepdim=True)
    # All zeros have no mask and no scale: 0 / 1 instead of 0 / 0.
    scale = (magnitude * mask).sum(dim=dims, keepdim=True) / mask.sum(dim=dims, keepdim=True).clamp(min=1)
    return x.sign() * mask, scale


def uniform_levels(x: torch.Tensor, bits: int, dims: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    step = x.abs().amax(dim=dims, keepdim=True) / (2 ** (bits - 1) - 1)
    # An all-zero tensor has no step; any will do.
    step = step.masked_fill(step == 0, 1)
    return (x / step).round(), step

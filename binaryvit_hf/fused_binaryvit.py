"""
The two steps of every binary layer, each fused into one `torch.autograd.Function`: shift, sign and product; and
normalisation, shortcut and RPReLU. Composed of PyTorch's own operations they compute the same (the tests compare them),
but keep half a dozen copies of every activation for the backward pass and fetch each from memory as many times.

Both keep their inputs alone and compute the rest again. On the CPU they walk through the rows in blocks that fit the
cache; elsewhere, and while a compiler traces, there is one block.
"""

from collections.abc import Callable

import torch
from torch import nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from .batch_norm_binaryvit import batch_norm_backward, fold_norm
from .quantizers_binaryvit import approx_sign_slope, binary_sign


BLOCK_ELEMENTS = 2**18  # a megabyte in float32; 2**17 to 2**19 measured alike, 2**15 slower by half


class SignLinear(Function):
    """
    Product of a shifted, binarised activation with a weight that is quantised already.

    Forward: `sign(x + shift) @ weight.T`, x `(rows, in)`, shift `(in,)`, weight `(out, in)`, result `(rows, out)`.
    Gradient: of `ApproxSign`, whose `slope` it takes, and of the product.
    """

    @staticmethod
    def forward(ctx, x, shift, weight, slope=approx_sign_slope):
        ctx.save_for_backward(x, shift, weight)
        ctx.slope = slope
        return map_rows(lambda x: nn.functional.linear(binary_sign(x + shift), weight), x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        x, shift, weight = ctx.saved_tensors
        # Under autocast the product, and so its gradient, is in half precision, x and weight are not.
        product_dtype = grad_output.dtype
        weight_in_product = weight.to(product_dtype)
        grad_weight, grad_shift = torch.zeros_like(weight), torch.zeros_like(shift)

        def block_backward(x, grad_output):
            shifted = x + shift
            grad_weight.add_(grad_output.T @ binary_sign(shifted).to(product_dtype))
            grad_x = ctx.slope(shifted).mul_(grad_output @ weight_in_product)
            grad_shift.add_(grad_x.sum(0))
            return grad_x

        return map_rows(block_backward, x, grad_output), grad_shift, grad_weight, None


class NormShortcutRPReLU(Function):
    """
    `RPReLU(BN(x) + shortcut)`, with the shortcut's channels repeated or averaged to fit (`add_fitted_`).

    Forward: x `(rows, channels)`, shortcut `(rows, shortcut_channels)`, `mean` and `variance` of the normalisation and
    the parameters `(channels,)`; result `(rows, channels)`.
    Gradient: exact; through mean and variance too if they are of a batch (`batch_norm_backward` has `batch_rows`).
    """

    @staticmethod
    def forward(ctx, x, shortcut, mean, variance, batch_rows, eps, weight, bias, shift_in, slope, shift_out):
        ctx.save_for_backward(x, shortcut, mean, variance, weight, bias, shift_in, slope)
        ctx.batch_rows, ctx.eps = batch_rows, eps
        scale, offset = fold_norm(mean, variance, eps, weight, bias - shift_in)

        def block_forward(x, shortcut):
            shifted = add_fitted_(torch.addcmul(offset, x, scale), shortcut)
            return torch.prelu(shifted, slope).add_(shift_out)

        return map_rows(block_forward, x, shortcut)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        x, shortcut, mean, variance, weight, bias, shift_in, slope = ctx.saved_tensors
        scale, offset = fold_norm(mean, variance, ctx.eps, weight, bias - shift_in)
        grad_slope, grad_shift_out = torch.zeros_like(slope), torch.zeros_like(slope)
        grad_shortcut = torch.empty_like(shortcut)

        def block_backward(x, shortcut, grad_output, grad_shortcut):
            shifted = add_fitted_(torch.addcmul(offset, x, scale), shortcut)
            grad_shift_out.add_(grad_output.sum(0))
            grad_slope.add_(shifted.clamp(max=0).mul_(grad_output).sum(0))
            # 1 where positive, else the slope; arithmetic, for a choice by mask is 30 times slower on a CPU.
            grad = torch.addcmul(slope, shifted.gt_(0), 1 - slope).mul_(grad_output)
            grad_shortcut.copy_(fit_gradient(grad, shortcut.shape[-1]))
            return grad

        grad = map_rows(block_backward, x, shortcut, grad_output, grad_shortcut).to(x.dtype)
        grad_x, grad_weight, grad_bias = batch_norm_backward(grad, x, weight, mean, variance, ctx.batch_rows, ctx.eps)
        # shift_in enters where the bias does, with the other sign.
        return (
            grad_x,
            grad_shortcut,
            None,
            None,
            None,
            None,
            grad_weight,
            grad_bias,
            -grad_bias,
            grad_slope,
            grad_shift_out,
        )


def add_fitted_(x: torch.Tensor, shortcut: torch.Tensor) -> torch.Tensor:
    """
    Add `shortcut (rows, in)` to `x (rows, out)` in place. More channels: channel j takes channel `j mod in`. Fewer:
    channel j takes the mean over its run of `in / out` neighbours. As many: itself.
    """
    channels, shortcut_channels = x.shape[-1], shortcut.shape[-1]
    if channels < shortcut_channels:
        return x.add_(shortcut.unflatten(-1, (channels, -1)).mean(-1))
    x.unflatten(-1, (-1, shortcut_channels)).add_(shortcut.unsqueeze(-2))
    return x


def fit_gradient(grad: torch.Tensor, channels: int) -> torch.Tensor:
    """What `add_fitted_` hands back to its shortcut: `(rows, out) -> (rows, channels)`."""
    if channels > grad.shape[-1]:
        repeats = channels // grad.shape[-1]
        return (grad / repeats).repeat_interleave(repeats, -1)
    return grad if channels == grad.shape[-1] else grad.unflatten(-1, (-1, channels)).sum(-2)


def map_rows(function: Callable[..., torch.Tensor], *tensors: torch.Tensor) -> torch.Tensor:
    """`function(*tensors)`, for a function that treats rows alike; on the CPU in blocks of rows that fit the cache."""
    rows = tensors[0].shape[0]
    block = max(BLOCK_ELEMENTS // max(tensor.shape[1] for tensor in tensors), 1)
    if rows <= block or tensors[0].device.type != "cpu" or torch.compiler.is_compiling():
        return function(*tensors)
    result = None
    for start in range(0, rows, block):
        part = function(*(tensor[start : start + block] for tensor in tensors))
        if result is None:
            result = part.new_empty(rows, part.shape[1])
        result[start : start + block] = part
    return result

"""
Autograd functions on row kernels: twins of those in `network/functional_binaryvit.py`.

They take contiguous float32 tensors on the CPU, weights and inputs of 1 bit, and the default gradient of the sign.
"""

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from .library import (
    NormActivationGradients,
    RunningStatistics,
    load_kernels,
    norm_activation,
)


# As in functional_binaryvit.py. Older versions of PyTorch lack torch.cpu.get_capabilities.
CPU_FEATURES = getattr(torch.cpu, "get_capabilities", dict)()
HAS_BYTE_PRODUCTS = any(CPU_FEATURES.get(name) for name in ("avx512_vnni", "avx_vnni"))
BLOCK_ELEMENTS = 2**19  # of the inner channels of an MLP: they stay in the cache between product and kernels


class SignWeight:
    """
    The signs `(out, in)` of a binarised weight in bytes, and the scale `(out,)` of its rows.

    On a CPU without byte products signs are multiplied as floats.
    """

    def __init__(self, weight: torch.Tensor):
        self.signs, self.scale = weight.new_empty(weight.shape, dtype=torch.int8), weight.new_empty(len(weight))
        load_kernels().split_weight(
            weight.data_ptr(), *weight.shape, self.signs.data_ptr(), self.scale.data_ptr(), torch.get_num_threads()
        )

    def count(self, signs: torch.Tensor, counts: torch.Tensor) -> None:
        """Write the product with the signs alone: int8 `(rows, in)` -> int32 `(rows, out)`."""
        if HAS_BYTE_PRODUCTS and signs.shape[1] > 1:  # https://github.com/pytorch/pytorch/issues/195066
            torch._int_mm(signs, self.signs.T, out=counts)
        else:
            counts.copy_(signs.float() @ self.signs.float().T)

    def scale_(self, product: torch.Tensor) -> torch.Tensor:
        """Product with the weight, in place of the memory to which `count` wrote."""
        load_kernels().scale_counts(product.data_ptr(), self.scale.data_ptr(), *product.shape, torch.get_num_threads())
        return product


def sign_bytes(x: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """`sign(x + shift)` in bytes, x `(rows, channels)`, shift `(channels,)`."""
    signs = x.new_empty(x.shape, dtype=torch.int8)
    load_kernels().sign_bytes(x.data_ptr(), shift.data_ptr(), *x.shape, signs.data_ptr(), torch.get_num_threads())
    return signs


def sign_gradient(
    x: torch.Tensor,
    shift: torch.Tensor,
    grad_signs: torch.Tensor,
    grad_x: torch.Tensor,
    grad_shift: torch.Tensor,
    adds: bool,
) -> torch.Tensor:
    """Writes the gradient of `sign(x + shift)` to `grad_x`, or adds it; adds to `grad_shift`. Returns the signs."""
    signs = torch.empty_like(x)
    load_kernels().sign_gradient(
        *(x.data_ptr(), shift.data_ptr(), grad_signs.data_ptr(), *x.shape),
        *(signs.data_ptr(), grad_x.data_ptr(), adds, grad_shift.data_ptr(), torch.get_num_threads()),
    )
    return signs


class SignLinear(Function):
    """Twin of `functional_binaryvit.SignLinear`."""

    @staticmethod
    def forward(ctx, x, shift, weight, weight_bits, slope=None):
        ctx.save_for_backward(x, shift, weight)
        matrix = SignWeight(weight)
        product = x.new_empty(len(x), len(weight))
        matrix.count(sign_bytes(x, shift), product.view(torch.int32))
        return matrix.scale_(product)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        x, shift, weight = ctx.saved_tensors
        grad_output = grad_output.contiguous()
        grad_x, grad_shift = grad_output @ weight, torch.zeros_like(shift)
        signs = sign_gradient(x, shift, grad_x, grad_x, grad_shift, adds=False)
        return grad_x, grad_shift, grad_output.T @ signs, None, None


def batch_statistics(blocks: Sequence[torch.Tensor], norm: nn.BatchNorm1d) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Twin of `functional_binaryvit.batch_statistics`, for one block."""
    (x,) = blocks
    rows, channels = check_rows(x)
    mean, variance = x.new_empty(2, channels)
    load_kernels().moments(
        *(x.data_ptr(), rows, channels, running_statistics(norm)),
        *(mean.data_ptr(), variance.data_ptr(), torch.get_num_threads()),
    )
    return mean, variance, rows


def check_rows(x: torch.Tensor) -> torch.Size:
    if len(x) == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {x.shape}")
    return x.shape


def running_statistics(norm: nn.BatchNorm1d) -> RunningStatistics:
    """The running statistics of a norm, for a kernel that moves them."""
    for tensor in (norm.running_mean, norm.running_var):
        torch.autograd.graph.increment_version(tensor)
    return RunningStatistics(norm.running_mean.data_ptr(), norm.running_var.data_ptr(), norm.momentum)


def empty_gradients(parameters: list[torch.Tensor]) -> tuple[list[torch.Tensor], NormActivationGradients]:
    """Gradients of weight, bias, shift_in, slope and shift_out, and the struct for a kernel that writes them."""
    grads = list(map(torch.empty_like, parameters))
    return grads, NormActivationGradients(*map(torch.Tensor.data_ptr, grads))


class NormShortcutRPReLU(Function):
    """Twin of `functional_binaryvit.NormShortcutRPReLU`."""

    @staticmethod
    def forward(ctx, x, shortcut, mean, variance, batch_rows, eps, *parameters):
        ctx.save_for_backward(x, shortcut, mean, variance, *parameters)
        ctx.batch_rows, ctx.eps = batch_rows, eps
        output = torch.empty_like(x)
        load_kernels().norm_activation(
            *(x.data_ptr(), shortcut.data_ptr(), shortcut.shape[1]),
            *(norm_activation(eps, mean, variance, *parameters), *x.shape, output.data_ptr()),
            torch.get_num_threads(),
        )
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        x, shortcut, mean, variance, *parameters = ctx.saved_tensors
        grad_output = grad_output.contiguous()
        grad_x, grad_shortcut = torch.empty_like(x), torch.empty_like(shortcut)
        grads, addresses = empty_gradients(parameters)
        load_kernels().norm_activation_gradient(
            *(x.data_ptr(), shortcut.data_ptr(), shortcut.shape[1]),
            *(norm_activation(ctx.eps, mean, variance, *parameters), ctx.batch_rows, grad_output.data_ptr()),
            *(*x.shape, grad_x.data_ptr(), grad_shortcut.data_ptr(), addresses, torch.get_num_threads()),
        )
        return grad_x, grad_shortcut, None, None, None, None, *grads


class BatchNorm(Function):
    """Twin of `functional_binaryvit.SyncedBatchNorm`, in one process."""

    @staticmethod
    def forward(ctx, x, mean, variance, batch_rows, eps, weight, bias):
        ctx.save_for_backward(x, mean, variance, weight)
        ctx.batch_rows, ctx.eps = batch_rows, eps
        scale = weight * torch.rsqrt(variance + eps)
        offset, output = torch.addcmul(bias, mean, scale, value=-1), torch.empty_like(x)
        load_kernels().scale_rows(
            *(x.data_ptr(), scale.data_ptr(), offset.data_ptr(), *x.shape),
            *(output.data_ptr(), torch.get_num_threads()),
        )
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        x, mean, variance, weight = ctx.saved_tensors
        grad_output, grad_x = grad_output.contiguous(), torch.empty_like(x)
        grad_weight, grad_bias = torch.empty_like(weight), torch.empty_like(weight)
        load_kernels().batch_norm_gradient(
            *(x.data_ptr(), mean.data_ptr(), variance.data_ptr(), weight.data_ptr(), ctx.eps, ctx.batch_rows),
            *(grad_output.data_ptr(), *x.shape, grad_x.data_ptr()),
            *(grad_weight.data_ptr(), grad_bias.data_ptr(), torch.get_num_threads()),
        )
        return grad_x, None, None, None, None, grad_weight, grad_bias


class PackedCounts:
    """Whole numbers `(rows, channels)`, the first product of an MLP, in one byte each if they fit, else two."""

    def __init__(self, weight: torch.Tensor, scale: torch.Tensor, rows: int):
        inputs = weight.shape[1]
        self.step = 2 - inputs % 2  # an even number of inputs gives even numbers, which are stored halved
        largest = inputs // self.step
        self.is_wide = largest > torch.iinfo(torch.int8).max
        self.chunk = min(64, torch.iinfo(torch.int32).max // largest**2)
        self.packed = weight.new_empty(rows, len(weight), dtype=torch.int16 if self.is_wide else torch.int8)
        self.unit = scale * self.step
        self.sums = weight.new_zeros(2, len(weight), dtype=torch.float64)

    def store(self, counts: torch.Tensor, first: int) -> None:
        """Store a block whose first row is `first`."""
        packed = self.packed[first : first + len(counts)]
        load_kernels().pack_counts(
            *(counts.data_ptr(), self.step, self.chunk, *counts.shape, packed.data_ptr(), self.is_wide),
            *(self.sums.data_ptr(), torch.get_num_threads()),
        )

    def statistics(self, norm: nn.BatchNorm1d) -> tuple[torch.Tensor, torch.Tensor, int]:
        """`batch_statistics` of the product."""
        rows, channels = check_rows(self.packed)
        mean, variance = self.unit.new_empty(2, channels)
        load_kernels().count_moments(
            *(self.sums.data_ptr(), self.unit.data_ptr(), rows, channels),
            *(running_statistics(norm), mean.data_ptr(), variance.data_ptr()),
        )
        return mean, variance, rows


class BinaryMLPProducts(Function):
    """Twin of `functional_binaryvit.BinaryMLPProducts`."""

    @staticmethod
    def forward(ctx, x, shift1, weight1, shift2, weight2, slopes, statistics, eps, *parameters):
        kernels, threads = load_kernels(), torch.get_num_threads()
        rows, inner = len(x), len(weight1)
        first, second = SignWeight(weight1), SignWeight(weight2)
        signs, counts = sign_bytes(x, shift1), PackedCounts(weight1, first.scale, rows)
        block = block_rows(rows, inner)
        products = x.new_empty(block, inner, dtype=torch.int32)
        for start in range(0, rows, block):
            part = signs[start : start + block]
            first.count(part, products[: len(part)])
            counts.store(products[: len(part)], start)
        mean, variance, batch_rows = statistics(counts.statistics)
        packed, unit = counts.packed, counts.unit
        ctx.save_for_backward(x, shift1, weight1, shift2, weight2, mean, variance, *parameters, packed, unit)
        ctx.batch_rows, ctx.eps, ctx.is_wide = batch_rows, eps, counts.is_wide

        norm = norm_activation(eps, mean, variance, *parameters)
        product, pooled = torch.empty_like(x), torch.empty_like(x)
        inner_signs = x.new_empty(block, inner, dtype=torch.int8)
        for start in range(0, rows, block):
            part = slice(start, min(start + block, rows))
            signs = inner_signs[: part.stop - start]
            kernels.activate_counts(
                *(packed[part].data_ptr(), counts.is_wide, unit.data_ptr(), x[part].data_ptr(), norm),
                *(shift2.data_ptr(), len(signs), inner, x.shape[1], signs.data_ptr()),
                *(pooled[part].data_ptr(), threads),
            )
            second.count(signs, product[part].view(torch.int32))
        return second.scale_(product), pooled

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_product, grad_pooled):
        x, shift1, weight1, shift2, weight2, mean, variance, *parameters, packed, unit = ctx.saved_tensors
        kernels, threads = load_kernels(), torch.get_num_threads()
        grad_product, grad_pooled = grad_product.contiguous(), grad_pooled.contiguous()
        norm = norm_activation(ctx.eps, mean, variance, *parameters)
        rows, inner = packed.shape
        block = block_rows(rows, inner)
        grad, grad_x = x.new_empty(rows, inner), torch.empty_like(x)
        spare = x.new_empty(block, inner)
        sums = x.new_zeros(5, inner, dtype=torch.float64)
        grad_weight1, grad_weight2 = torch.zeros_like(weight1), torch.zeros_like(weight2)
        for start in range(0, rows, block):
            part = slice(start, min(start + block, rows))
            signs = spare[: part.stop - start]
            torch.mm(grad_product[part], weight2, out=grad[part])
            kernels.activate_counts_gradient(
                *(packed[part].data_ptr(), ctx.is_wide, unit.data_ptr(), x[part].data_ptr(), norm),
                *(shift2.data_ptr(), grad_pooled[part].data_ptr(), len(signs), inner, x.shape[1]),
                *(grad[part].data_ptr(), signs.data_ptr(), grad_x[part].data_ptr(), sums.data_ptr(), threads),
            )
            grad_weight2.addmm_(grad_product[part].T, signs)
        grads, addresses = empty_gradients(parameters)
        grad_shift1, grad_shift2 = torch.zeros_like(shift1), torch.empty_like(shift2)
        coefficients = x.new_empty(3, inner)
        kernels.norm_coefficients(
            *(sums.data_ptr(), norm, unit.data_ptr(), ctx.batch_rows, inner),
            *(addresses, grad_shift2.data_ptr(), coefficients.data_ptr()),
        )
        for start in range(0, rows, block):
            part = slice(start, min(start + block, rows))
            grad_counts = spare[: part.stop - start]
            kernels.count_gradient(
                *(packed[part].data_ptr(), ctx.is_wide, grad[part].data_ptr(), coefficients.data_ptr()),
                *(len(grad_counts), inner, grad_counts.data_ptr(), threads),
            )
            grad_signs = grad_counts @ weight1
            signs = sign_gradient(x[part], shift1, grad_signs, grad_x[part], grad_shift1, adds=True)
            grad_weight1.addmm_(grad_counts.T, signs)
        return grad_x, grad_shift1, grad_weight1, grad_shift2, grad_weight2, None, None, None, *grads


class BinaryProjection(Function):
    """
    `functional_binaryvit.SignLinear`, then `NormShortcutRPReLU` with the input as the shortcut, in one step.

    x `(rows, channels)`, weight `(channels, channels)`. Only x and the product, as whole numbers, are kept.
    """

    @staticmethod
    def forward(ctx, x, shift, weight, statistics, eps, *parameters):
        kernels, threads = load_kernels(), torch.get_num_threads()
        rows, channels = x.shape
        matrix = SignWeight(weight)
        counts, block = PackedCounts(weight, matrix.scale, rows), block_rows(rows, channels)
        products = x.new_empty(block, channels, dtype=torch.int32)
        for start in range(0, rows, block):
            part = x[start : start + block]
            matrix.count(sign_bytes(part, shift), products[: len(part)])
            counts.store(products[: len(part)], start)
        mean, variance, batch_rows = statistics(counts.statistics)
        packed, unit, output = counts.packed, counts.unit, torch.empty_like(x)
        kernels.activate_packed(
            *(packed.data_ptr(), counts.is_wide, unit.data_ptr(), x.data_ptr()),
            *(norm_activation(eps, mean, variance, *parameters), rows, channels, output.data_ptr(), threads),
        )
        ctx.save_for_backward(x, shift, weight, mean, variance, *parameters, packed, unit)
        ctx.batch_rows, ctx.eps, ctx.is_wide = batch_rows, eps, counts.is_wide
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        x, shift, weight, mean, variance, *parameters, packed, unit = ctx.saved_tensors
        kernels, threads = load_kernels(), torch.get_num_threads()
        grad_output, norm = grad_output.contiguous(), norm_activation(ctx.eps, mean, variance, *parameters)
        rows, channels = x.shape
        grad_x, sums = torch.empty_like(x), x.new_zeros(4, channels, dtype=torch.float64)
        kernels.activate_packed_gradient(
            *(packed.data_ptr(), ctx.is_wide, unit.data_ptr(), x.data_ptr(), norm, grad_output.data_ptr()),
            *(rows, channels, grad_x.data_ptr(), sums.data_ptr(), threads),
        )
        grads, addresses = empty_gradients(parameters)
        coefficients = x.new_empty(3, channels)
        kernels.norm_coefficients(
            *(sums.data_ptr(), norm, unit.data_ptr(), ctx.batch_rows, channels),
            *(addresses, None, coefficients.data_ptr()),
        )
        grad_shift, grad_weight = torch.zeros_like(shift), torch.zeros_like(weight)
        block = block_rows(rows, 2 * channels)
        grad_counts, grad_signs = x.new_empty(2, block, channels)
        for start in range(0, rows, block):
            part = slice(start, min(start + block, rows))
            of_counts, of_signs = grad_counts[: part.stop - start], grad_signs[: part.stop - start]
            # The gradient of the shortcut is in grad_x already.
            kernels.count_gradient(
                *(packed[part].data_ptr(), ctx.is_wide, grad_x[part].data_ptr(), coefficients.data_ptr()),
                *(len(of_counts), channels, of_counts.data_ptr(), threads),
            )
            torch.mm(of_counts, weight, out=of_signs)
            signs = sign_gradient(x[part], shift, of_signs, grad_x[part], grad_shift, adds=True)
            grad_weight.addmm_(of_counts.T, signs)
        return grad_x, grad_shift, grad_weight, None, None, *grads


def block_rows(rows: int, channels: int) -> int:
    return min(max(BLOCK_ELEMENTS // channels, 1), max(rows, 1))


class BinaryAttentionProducts(Function):
    """Twin of `functional_binaryvit.BinaryAttentionProducts`."""

    @staticmethod
    def forward(ctx, query, key, value, query_shift, key_shift, value_shift, step, num_heads, sign_slope):
        inputs, shifts = (query, key, value), (query_shift, key_shift, value_shift)
        query_sign, key_sign, value_sign = (sign_heads(x, shift, num_heads) for x, shift in zip(inputs, shifts))
        scores = query_sign @ key_sign.transpose(1, 2)
        queries, keys = scores.shape[1:]
        # Results are no views: those of a Function cannot be changed in place.
        probabilities, scale = scores.new_empty(len(query), num_heads, queries, keys), query_sign.shape[-1] ** -0.5
        load_kernels().attend(
            *(scores.data_ptr(), scale, step.data_ptr(), scores.numel() // keys, keys),
            *(probabilities.data_ptr(), torch.get_num_threads()),
        )
        ctx.save_for_backward(*inputs, *shifts, step, scores)  # now their softmax
        ctx.num_heads, ctx.scale = num_heads, scale
        ctx.set_materialize_grads(False)
        context = torch.empty_like(query)
        by_heads = context.unflatten(-1, (num_heads, -1)).transpose(1, 2)
        by_heads.copy_((probabilities.flatten(0, 1) @ value_sign).view(by_heads.shape))
        return context, probabilities

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_context, grad_probabilities):
        query, key, value, query_shift, key_shift, value_shift, step, softmax = ctx.saved_tensors
        inputs, shifts, heads = (query, key, value), (query_shift, key_shift, value_shift), ctx.num_heads
        query_sign, key_sign, value_sign = (sign_heads(x, shift, heads) for x, shift in zip(inputs, shifts))
        if grad_context is None:  # only the probabilities were used
            grad_heads = torch.zeros_like(query_sign)
        else:
            grad_heads = grad_context.unflatten(-1, (heads, -1)).transpose(1, 2).flatten(0, 1).contiguous()
        grad = grad_heads @ value_sign.transpose(1, 2)
        if grad_probabilities is not None:
            grad += grad_probabilities.flatten(0, 1)
        probabilities, grad_step, keys = torch.empty_like(softmax), torch.empty_like(step), softmax.shape[-1]
        load_kernels().attend_gradient(
            *(softmax.data_ptr(), ctx.scale, step.data_ptr(), softmax.numel() // keys, keys, grad.data_ptr()),
            *(probabilities.data_ptr(), grad_step.data_ptr(), torch.get_num_threads()),
        )
        grad_signs = grad @ key_sign, grad.transpose(1, 2) @ query_sign, probabilities.transpose(1, 2) @ grad_heads
        grads, grad_shifts = zip(*map(sign_heads_gradient, inputs, shifts, grad_signs))
        return *grads, *grad_shifts, grad_step, None, None


def sign_heads(x: torch.Tensor, shift: torch.Tensor, heads: int) -> torch.Tensor:
    """`sign(x + shift)` by heads: `(batch, tokens, channels) -> (batch * heads, tokens, head_dim)`."""
    batch, tokens, channels = x.shape
    signs = x.new_empty(batch * heads, tokens, channels // heads)
    load_kernels().sign_heads(
        *(x.data_ptr(), shift.data_ptr(), batch, tokens, heads, channels // heads),
        *(signs.data_ptr(), torch.get_num_threads()),
    )
    return signs


def sign_heads_gradient(
    x: torch.Tensor, shift: torch.Tensor, grad_signs: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of `sign_heads` to x and shift, from that of the signs."""
    (batch, tokens, channels), head_dim = x.shape, grad_signs.shape[-1]
    grad_x, grad_shift = torch.empty_like(x), torch.empty_like(shift)
    load_kernels().sign_heads_gradient(
        *(x.data_ptr(), shift.data_ptr(), grad_signs.data_ptr(), batch, tokens, channels // head_dim, head_dim),
        *(grad_x.data_ptr(), grad_shift.data_ptr(), torch.get_num_threads()),
    )
    return grad_x, grad_shift


class AddAvgPools(Function):
    """Twin of `functional_binaryvit.AddAvgPools`."""

    @staticmethod
    def forward(ctx, x, pooled, shift, grid_size, kernel_sizes, *scales):
        scales = torch.stack(scales)
        ctx.save_for_backward(pooled, scales)
        ctx.geometry = pool_geometry(pooled, grid_size, kernel_sizes)
        output = torch.empty_like(x)
        load_kernels().add_pools(
            *(x.data_ptr(), pooled.data_ptr(), shift.data_ptr(), scales.data_ptr(), *ctx.geometry),
            *(output.data_ptr(), torch.get_num_threads()),
        )
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        pooled, scales = ctx.saved_tensors
        grad_output, grad_pooled = grad_output.contiguous(), torch.empty_like(pooled)
        sums = pooled.new_zeros(len(scales) + 1, pooled.shape[-1], dtype=torch.float64)
        load_kernels().add_pools_gradient(
            *(pooled.data_ptr(), scales.data_ptr(), grad_output.data_ptr(), *ctx.geometry),
            *(grad_pooled.data_ptr(), sums.data_ptr(), torch.get_num_threads()),
        )
        *grad_scales, grad_shift = sums.float()
        return grad_output, grad_pooled, grad_shift, None, None, *grad_scales


def pool_geometry(pooled: torch.Tensor, grid_size: tuple[int, int], kernel_sizes: Sequence[tuple[int, int]]) -> tuple:
    """Arguments of kernels: sizes of the kernels and their number, then those of the map."""
    flat = [size for kernel_size in kernel_sizes for size in kernel_size]
    return (ctypes.c_int32 * len(flat))(*flat), len(kernel_sizes), len(pooled), *grid_size, pooled.shape[-1]


class BinarizeWeight(Function):
    """Twin of `functional_binaryvit.BinarizeWeight`."""

    @staticmethod
    def forward(ctx, weight, center):
        ctx.save_for_backward(weight)
        ctx.center = center
        binarized = torch.empty_like(weight)
        load_kernels().binarize_weight(
            *(weight.data_ptr(), len(weight), weight[0].numel(), center, binarized.data_ptr()),
            torch.get_num_threads(),
        )
        return binarized

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        (weight,) = ctx.saved_tensors
        grad_output, grad = grad_output.contiguous(), torch.empty_like(weight)
        load_kernels().binarize_weight_gradient(
            *(weight.data_ptr(), grad_output.data_ptr(), len(weight), weight[0].numel(), ctx.center),
            *(grad.data_ptr(), torch.get_num_threads()),
        )
        return grad, None


class ScaleAndShift(Function):
    """Twin of `functional_binaryvit.scale_and_shift`."""

    @staticmethod
    def forward(ctx, x, scale, shift):
        ctx.save_for_backward(x, scale)
        return torch.addcmul(shift, x, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        x, scale = ctx.saved_tensors
        grad_output = grad_output.contiguous()
        grad_x, grad_scale, grad_shift = torch.empty_like(x), torch.empty_like(scale), torch.empty_like(scale)
        load_kernels().layer_scale_gradient(
            *(x.data_ptr(), scale.data_ptr(), grad_output.data_ptr(), x.numel() // len(scale), len(scale)),
            *(grad_x.data_ptr(), grad_scale.data_ptr(), grad_shift.data_ptr(), torch.get_num_threads()),
        )
        return grad_x, grad_scale, grad_shift


# By name of the function in functional_binaryvit.py.
TWINS: dict[str, Any] = {
    "AddAvgPools": AddAvgPools,
    "BinarizeWeight": BinarizeWeight,
    "BinaryAttentionProducts": BinaryAttentionProducts,
    "BinaryMLPProducts": BinaryMLPProducts,
    "NormShortcutRPReLU": NormShortcutRPReLU,
    "SignLinear": SignLinear,
    "SyncedBatchNorm": BatchNorm,
    "batch_statistics": batch_statistics,
    "scale_and_shift": ScaleAndShift.apply,
}

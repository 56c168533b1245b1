# SPDX-License-Identifier: Apache-2.0
"""
Differentiable functions of a binary network: quantizers, batch normalisation over processes, and fused steps.

- A quantizer returns exact values: +1 and -1 are exactly that, so packing can store them as bits.
- A fused step computes several operations of a layer as one. PyTorch's own operations would keep half a dozen copies
  of every activation for the backward pass. Tests compare both.

Each function keeps only its inputs and parameters for the backward pass and computes the rest again. On the CPU the
fused steps work on blocks of rows that fit the cache. On other devices, and under a compiler, there is one block.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import is_in_torch_dispatch_mode
from torch.utils.flop_counter import flop_registry


try:  # code that came with a checkpoint uses the package if it is installed
    from binaryvit_hf import row_kernels
except ImportError:
    row_kernels = None  # type: ignore[assignment]


ENGINE_VARIABLE = "BINARYVIT_ENGINE"  # environment variable that forces kernels, or PyTorch
TORCH = "torch"
# Older versions of PyTorch lack torch.cpu.get_capabilities.
CPU_FEATURES = getattr(torch.cpu, "get_capabilities", dict)()
HAS_BYTE_PRODUCTS = any(CPU_FEATURES.get(name) for name in ("avx512_vnni", "avx_vnni"))
# Devices with kernels for the statistics of batch normalisation. PyTorch has none for Apple's GPUs.
STATISTICS_KERNELS = ("cpu", "cuda")
BLOCK_ELEMENTS = 2**19  # 2 MB in float32. 2**18 is 7 % slower, 2**20 1 %, 2**15 half as fast.
# PyTorch's FLOP counter has no formula for the product of bytes and would count nothing.
flop_registry.setdefault(torch.ops.aten._int_mm, flop_registry[torch.ops.aten.mm])


# ---- Row kernels ----


def fastest(function: Any, tensors: Sequence[torch.Tensor], has_twin: bool = True) -> Any:
    """
    The twin of a function on row kernels where they compute it, else the function itself.

    The kernels compute training on the CPU in float32. Evaluation, other devices and dtypes, autocast, several processes,
    torch.compile and torch.export get the function itself, and so do empty batches.

    Args:
        tensors: all that the function takes.
        has_twin: whether there are kernels for its other arguments: for training, weights of 1 bit, and the default
            gradient of signs.
    """
    # The package may be another version than code that came with a checkpoint.
    return row_kernels.TWINS.get(function.__name__, function) if has_twin and on_row_kernels(tensors) else function


def on_row_kernels(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether row kernels compute a function of these tensors."""
    for tensor in tensors:  # a small network spends several percent of a step here
        if type(tensor) not in (torch.Tensor, nn.Parameter) or tensor.dtype is not torch.float32:
            return False
        if not tensor.is_cpu or not tensor.is_contiguous() or not tensor.numel():
            return False
    return (
        torch.is_grad_enabled()
        and any(tensor.requires_grad for tensor in tensors)
        and not torch.compiler.is_compiling()
        and not is_in_torch_dispatch_mode()
        and not torch.is_autocast_enabled("cpu")
        and row_kernels_obstacle() is None
    )


def row_kernels_obstacle() -> str | None:
    """Why row kernels compute no training in this process, or None if they do, on the CPU in float32."""
    if row_kernels is None:
        return "binaryvit_hf is not installed"
    if os.environ.get(ENGINE_VARIABLE) == TORCH:
        return f"{ENGINE_VARIABLE} says so"
    if is_distributed():
        return "several processes train together"
    return row_kernels.problem()


# ---- Results ----


def not_written_in_place(result: torch.Tensor) -> torch.Tensor:
    """
    The result of a Function, whose last operation may be in place. Under a compiler a copy, which costs nothing there: PyTorch
    2.11 compiles a Function to one without gradients if an operation in place has written its result.
    """
    return result.clone() if torch.compiler.is_compiling() else result


# ---- Signs ----


def binary_sign(x: torch.Tensor) -> torch.Tensor:
    """`+1` where `x >= 0`, else `-1`, in the dtype of `x`. Both zeros give `+1`, because a bit has no third state."""
    return binary_sign_(x.clone())


def binary_sign_(x: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """`binary_sign` that overwrites `x`. The result has the dtype `dtype`, by default the dtype of `x`."""
    # torch.where is 20 times slower on a CPU.
    return x.ge_(0).to(dtype or x.dtype).mul_(2).sub_(1)


def approx_sign_slope(x: torch.Tensor) -> torch.Tensor:
    """Gradient of the sign in training: `max(0, 2 - 2|x|)` (Bi-Real Net, Liu et al., ECCV 2018)."""
    return torch.rsub(x.abs(), 2, alpha=2).clamp_(min=0)


class ApproxSign(Function):
    """
    Sign of a shifted activation.

    Forward: `sign(x + shift)`, x `(..., channels)`, shift `(channels,)`.
    Gradient: to x, `slope(x + shift)`; to shift, its sum over all dimensions but the last. `slope` returns a new
    tensor.
    ReActNet, Liu et al., ECCV 2020, eq. 1 (RSign).
    """

    @staticmethod
    def forward(ctx, x, shift, slope=approx_sign_slope):
        ctx.save_for_backward(x, shift)
        ctx.slope = slope
        return not_written_in_place(binary_sign_(x + shift))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        x, shift = ctx.saved_tensors
        grad_x = ctx.slope(x + shift).mul_(grad_output)
        return grad_x, grad_x.sum_to_size(shift.shape), None


# ---- Quantizers ----


def quantize_weight(
    weight: torch.Tensor, bits: int, clip_value: float, center: bool, training: bool = False
) -> torch.Tensor:
    """Weight `(out, ...)` on `bits` bits: 1 has a scale per row, 2 to 8 have one per tensor, 32 returns the weight."""
    if bits == 32:
        return weight
    if bits == 1:
        return fastest(BinarizeWeight, [weight], training).apply(weight, center)
    return QuantizeMultiBit.apply(weight, bits, clip_value, tuple(range(weight.dim())))


def weight_levels(
    weight: torch.Tensor, bits: int, clip_value: float, center: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The two factors of `quantize_weight`, for packing: whole numbers in the shape of the weight, and a scale.

    The numbers are -1 and 1 for 1 bit, `-(2**(bits - 1) - 1)` to `2**(bits - 1) - 1` for 2 to 8 bits.
    """
    if bits == 1:
        return binary_sign(center_rows(weight) if center else weight), row_scale(weight)
    return multi_bit_levels(weight, bits, clip_value, tuple(range(weight.dim())))


def quantize_input(
    x: torch.Tensor, shift: torch.Tensor, bits: int, clip_value: float, slope: Callable = approx_sign_slope
) -> torch.Tensor:
    """
    `x + shift` on `bits` bits, x `(..., channels)`; 2 to 8 have a scale per token, so that images stay independent.
    `slope` is the gradient of the sign for 1 bit.
    """
    if bits == 32:
        return x + shift
    if bits == 1:
        return ApproxSign.apply(x, shift, slope)
    return QuantizeMultiBit.apply(x + shift, bits, clip_value, (-1,))


def quantize_probability(probabilities: torch.Tensor, step: torch.Tensor, bits: int) -> torch.Tensor:
    """Attention probabilities on `2**bits` levels, `step` apart. 32 bits return the probabilities themselves."""
    return probabilities if bits == 32 else QuantizeProbability.apply(probabilities, step, 2**bits - 1)


class BinarizeWeight(Function):
    """
    Sign of a weight times one scale per output channel.

    Forward: `a * sign(w')`, with `w' = w - mean(w)` of each row if `center`, else `w' = w`. `a = mean(|w|)` of the row
    of w. A row is all but the first dimension.
    Gradient: the gradient of `clamp(w', -1, 1)`, through the centring; `a` counts as constant.
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


def row_scale(weight: torch.Tensor) -> torch.Tensor:
    """Mean of |weight| over all dimensions but the first: `(out, ...) -> (out, 1, ...)`."""
    return weight.abs().mean(dim=tuple(range(1, weight.dim())), keepdim=True)


def center_rows(weight: torch.Tensor) -> torch.Tensor:
    """Weight minus its mean over all dimensions but the first."""
    return weight - weight.mean(dim=tuple(range(1, weight.dim())), keepdim=True)


class QuantizeMultiBit(Function):
    """
    Weights or activations on 2 to 8 bits, zero included.

    Forward, x clipped to `[-clip_value, clip_value]` first: 2 bits are ternary, `a * sign(x)` where `|x| > 0.7 *
    mean(|x|)`, else 0, and `a` is the mean of |x| where the result is not 0 (TWN, Li et al., 2016). 3 to 8 bits are
    uniform, `round(x / s) * s` with `s = max(|x|) / (2**(bits - 1) - 1)`. Statistics are over the dimensions `dims`.
    Gradient: 1 where `|x| <= clip_value`, else 0. The statistics count as constants.
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


def multi_bit_levels(
    x: torch.Tensor, bits: int, clip_value: float, dims: tuple[int, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The whole numbers, in the shape of x, and the scale whose product `QuantizeMultiBit` returns."""
    clipped = x.clamp(-clip_value, clip_value)
    return ternary_levels(clipped, dims) if bits == 2 else uniform_levels(clipped, bits, dims)


def ternary_levels(x: torch.Tensor, dims: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    magnitude = x.abs()
    mask = magnitude > 0.7 * magnitude.mean(dim=dims, keepdim=True)
    # The mask of an all-zero tensor is empty: 0 / 1 instead of 0 / 0.
    scale = (magnitude * mask).sum(dim=dims, keepdim=True) / mask.sum(dim=dims, keepdim=True).clamp(min=1)
    return x.sign() * mask, scale


def uniform_levels(x: torch.Tensor, bits: int, dims: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    step = x.abs().amax(dim=dims, keepdim=True) / (2 ** (bits - 1) - 1)
    step = step.masked_fill(step == 0, 1)  # an all-zero tensor: 0 / 1 instead of 0 / 0
    return (x / step).round(), step


class QuantizeProbability(Function):
    """
    Attention probabilities on a grid of learned step.

    Forward: `clamp(round(p / step), 0, levels) * step`, p not negative, step a scalar, `levels = 2**bits - 1`.
    Gradient: to p, 1 where `p / step <= levels`, else 0; to step, the sum of `round(p / step) - p / step` where
    `p / step <= levels`, else `levels`.
    BiT, Liu et al., NeurIPS 2022 (elastic binarisation without offset).
    """

    @staticmethod
    def forward(ctx, probabilities, step, levels):
        ctx.save_for_backward(probabilities, step)
        ctx.levels = levels
        return not_written_in_place(probability_levels(probabilities, step, levels))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        return *probability_gradient(*ctx.saved_tensors, ctx.levels, grad_output), None


def probability_levels(probabilities: torch.Tensor, step: torch.Tensor, levels: int) -> torch.Tensor:
    """`clamp(round(p / step), 0, levels) * step` (`QuantizeProbability`)."""
    return (probabilities / step).round_().clamp_(0, levels).mul_(step)


def probability_gradient(
    probabilities: torch.Tensor, step: torch.Tensor, levels: int, grad_output: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of `QuantizeProbability` to the probabilities and to the step."""
    scaled = probabilities / step
    inside = scaled.clone().le_(levels)  # 1.0 or 0.0, because boolean masks are slow on a CPU
    slope_of_step = scaled.round().clamp_(max=levels).addcmul_(scaled, inside, value=-1)
    return inside.mul_(grad_output), slope_of_step.mul_(grad_output).sum().to(step.dtype)


# ---- Batch normalisation over all processes ----


class SyncedBatchNorm(Function):
    """
    Batch normalisation by the statistics of all processes.

    Forward: `BN(x)`, x `(rows, channels)`; `mean` and `variance` `(channels,)` are over the `batch_rows` rows of all
    processes (`batch_statistics`).
    Gradient: exact, for the sum of the losses of all processes.
    """

    @staticmethod
    def forward(ctx, x, mean, variance, batch_rows, eps, weight, bias):
        ctx.save_for_backward(x, mean, variance, weight)
        ctx.batch_rows, ctx.eps = batch_rows, eps
        scale, offset = fold_norm(mean, variance, eps, weight, bias)
        return torch.addcmul(offset, x, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        x, mean, variance, weight = ctx.saved_tensors
        sums = torch.stack((grad_output.sum(0), (grad_output * (x - mean)).sum(0)))
        coefficients, grad_weight, grad_bias = norm_gradient(sums, weight, mean, variance, ctx.batch_rows, ctx.eps)
        grad_x = apply_norm_gradient(grad_output, x, coefficients)
        return grad_x, None, None, None, None, grad_weight, grad_bias


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def batch_statistics(
    blocks: Sequence[torch.Tensor], norm: nn.BatchNorm1d, unpack: Callable = torch.Tensor.detach
) -> tuple[torch.Tensor, torch.Tensor, int | torch.Tensor]:
    """
    Statistics of a batch over the rows of all processes. Updates the running statistics of `norm`.

    Args:
        blocks: the rows of this process, in blocks.
        unpack: converts a block to floats `(rows, channels)`.

    Returns:
        Mean and biased variance `(channels,)`, and the number of rows. The number is a tensor if there are several
        processes.

    Raises:
        ValueError: there is one row, which has no unbiased variance.
    """
    count = sum(block.shape[0] for block in blocks)
    if count == 1 and not is_distributed():
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {blocks[0].shape}")
    running, dtype = (norm.running_mean, norm.running_var), norm.running_mean.dtype
    if len(blocks) == 1 and not is_distributed():
        rows = unpack(blocks[0])
        if rows.device.type in STATISTICS_KERNELS:
            return *torch.batch_norm_update_stats(rows, *running, norm.momentum), count
        variance, mean = torch.var_mean(rows.to(dtype), 0, correction=0)
    else:
        # The kernel updates no running statistics if it gets none.
        parts = [torch.batch_norm_update_stats(unpack(block), None, None, norm.momentum) for block in blocks]
        # float64, because the square of the mean is subtracted below.
        means, variances = (torch.stack(part).double() for part in zip(*parts))
        sizes = means.new_tensor([[block.shape[0]] for block in blocks])
        squares = variances + means.square()
        sums = torch.stack([(sizes * part).sum(0) for part in (torch.ones_like(means), means, squares)])
        if is_distributed():
            dist.all_reduce(sums)
            count = sums[0, 0]  # a tensor: reading the number would wait for the device
        mean, square = sums[1:] / count
        variance = square - mean.square()
    unbiased = variance * (count / (count - 1))
    for statistic, value in zip(running, (mean, unbiased)):
        statistic.lerp_(value.to(dtype), norm.momentum)
    return mean.to(dtype), variance.to(dtype), count


def norm_gradient(
    sums: torch.Tensor,
    weight: torch.Tensor,
    mean: torch.Tensor,
    variance: torch.Tensor,
    batch_rows: int | torch.Tensor,
    eps: float,
) -> tuple[tuple[torch.Tensor, ...], torch.Tensor, torch.Tensor]:
    """
    Gradient of batch normalisation.

    Args:
        sums: `(2, channels)`, sums over the rows of this process of the gradient and of its product with `x - mean`.
        batch_rows: number of rows that mean and variance are over (`batch_statistics`). 0 for running statistics,
            which pass no gradient.

    Returns:
        Coefficients for `apply_norm_gradient`, and the gradients to weight and bias.
    """
    spread = torch.rsqrt(variance + eps)
    grad_bias, grad_weight = sums[0], sums[1] * spread
    grad_factor = weight * spread
    if not isinstance(batch_rows, torch.Tensor) and batch_rows == 0:
        return (grad_factor, torch.zeros_like(grad_factor), torch.zeros_like(grad_factor)), grad_weight, grad_bias
    means = torch.stack((grad_bias, grad_weight))
    if isinstance(batch_rows, torch.Tensor):  # the statistics connect each row with the rows of all processes
        dist.all_reduce(means)
        batch_rows = batch_rows.to(means.dtype)
    mean_grad, mean_grad_normed = means / batch_rows
    x_factor = -grad_factor * spread * mean_grad_normed
    return (grad_factor, x_factor, -grad_factor * mean_grad - x_factor * mean), grad_weight, grad_bias


def apply_norm_gradient(grad: torch.Tensor, x: torch.Tensor, coefficients: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Gradient of batch normalisation to x `(rows, channels)`, in its dtype, from the gradient of the result."""
    grad_factor, x_factor, constant = coefficients
    return torch.addcmul(constant, x, x_factor).addcmul_(grad, grad_factor).to(x.dtype)


def fold_norm(
    mean: torch.Tensor, variance: torch.Tensor, eps: float, weight: torch.Tensor, bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and offset of batch normalisation as `x * scale + offset`: `(channels,)` in the dtype of the weight."""
    scale = weight * torch.rsqrt(variance + eps)
    return scale.to(weight.dtype), (bias - mean * scale).to(weight.dtype)


# ---- Fused steps ----


class SignLinear(Function):
    """
    Product of a shifted, binarised activation with a weight that is quantised already.

    Forward: `sign(x + shift) @ weight.T`, x `(rows, in)`, shift `(in,)`, weight `(out, in)`, result `(rows, out)`.
    Gradient: the gradients of `ApproxSign` with this `slope` and of the product.
    """

    @staticmethod
    def forward(ctx, x, shift, weight, weight_bits, slope=approx_sign_slope):
        ctx.save_for_backward(x, shift, weight)
        ctx.slope = slope
        if weight_bits == 1:
            return map_rows(BinarizedWeight(shift, weight).product, x)
        return map_rows(lambda rows: nn.functional.linear(binary_sign_(rows + shift), weight), x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        x, shift, weight = ctx.saved_tensors
        gradient = SignLinearGradient(shift, weight, ctx.slope)
        return map_rows(gradient.add_block, x, grad_output), gradient.grad_shift, gradient.grad_weight, None, None


class NormShortcutRPReLU(Function):
    """
    `RPReLU(BN(x) + shortcut)`. The channels of the shortcut are repeated or averaged to fit (`add_fitted_`).

    Forward: x `(rows, channels)`, shortcut `(rows, shortcut_channels)`, result `(rows, channels)`. `mean` and
    `variance` `(channels,)` are over `batch_rows` rows; `parameters` are those of `NormRPReLU`.
    Gradient: exact, through the statistics of a batch too.
    """

    @staticmethod
    def forward(ctx, x, shortcut, mean, variance, batch_rows, eps, *parameters):
        ctx.save_for_backward(x, shortcut, mean, variance, *parameters)
        ctx.batch_rows, ctx.eps = batch_rows, eps
        rows = map_rows(NormRPReLU(mean, variance, eps, *parameters).forward, x, shortcut)
        return not_written_in_place(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        x, shortcut, mean, variance, *parameters = ctx.saved_tensors
        norm = NormRPReLU(mean, variance, ctx.eps, *parameters)
        gradient = NormRPReLUGradient(norm, ctx.batch_rows)
        grad_shortcut = torch.empty_like(shortcut)

        def add_block(x, shortcut, grad_output, grad_shortcut):
            grad = gradient.add_block(x, norm.shifted(x, shortcut), grad_output)
            grad_shortcut.copy_(fit_gradient(grad, shortcut.shape[-1]))
            return grad

        grad = map_rows(add_block, x, shortcut, grad_output, grad_shortcut)
        grad_parameters = gradient.finish()
        grad_x = map_rows(gradient.input_gradient, x, grad)
        # None for mean, variance, batch_rows and eps
        return grad_x, grad_shortcut, None, None, None, None, *grad_parameters


class BinaryMLPProducts(Function):
    """
    Both products of a binary MLP and all steps between them. The inner channels never reach memory as floats.

    Forward: `g = RPReLU(BN(sign(x + shift1) @ weight1.T) + x)`, x repeated to fit. The results are
    `sign(g + shift2) @ weight2.T` and its shortcut, the mean of g over runs of adjacent channels.
    Gradient: the gradients of `SignLinear` and `NormShortcutRPReLU`. The first product is kept for the backward pass,
    as whole numbers (`PackedCounts`).

    Args:
        x: `(rows, channels)`. Both results have this shape.
        weight1, weight2: `(inner, channels)` and `(channels, inner)`, both binarised already.
        slopes: gradients of both signs.
        statistics: `TokenBatchNorm.statistics`, of the first product.
        parameters: weight, bias, shift_in, slope and shift_out of `NormRPReLU`.
    """

    @staticmethod
    def forward(ctx, x, shift1, weight1, shift2, weight2, slopes, statistics, eps, *parameters):
        counts, rows = PackedCounts(weight1), rows_per_block(x, weight1.shape[0])
        first, second = BinarizedWeight(shift1, weight1), BinarizedWeight(shift2, weight2)
        # A list: the allocator keeps small blocks, but returns one large tensor to the system after every use.
        inner = [counts.pack(first.count(part)) for part in split(rows, x)[0]]
        mean, variance, batch_rows = statistics(lambda norm: batch_statistics(inner, norm, counts.unpack))
        ctx.save_for_backward(x, shift1, weight1, shift2, weight2, mean, variance, *parameters, *inner)
        ctx.rows, ctx.batch_rows, ctx.eps, ctx.slopes = rows, batch_rows, eps, slopes
        norm = NormRPReLU(mean, variance, eps, *parameters)
        products, pooled = [], torch.empty_like(x)
        for inner_part, x_part, pooled_part in zip(inner, *split(rows, x, pooled)):
            activated = norm.forward(counts.unpack(inner_part), x_part)
            products.append(second.product(activated))
            pooled_part.copy_(activated.unflatten(-1, (x.shape[-1], -1)).mean(-1))
        return torch.cat(products), not_written_in_place(pooled)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_product, grad_pooled):
        x, shift1, weight1, shift2, weight2, mean, variance, *saved = ctx.saved_tensors
        norm, inner = NormRPReLU(mean, variance, ctx.eps, *saved[:5]), saved[5:]
        counts, gradient = PackedCounts(weight1), NormRPReLUGradient(norm, ctx.batch_rows)
        first = SignLinearGradient(shift1, weight1, ctx.slopes[0])
        second = SignLinearGradient(shift2, weight2, ctx.slopes[1])
        grad_x = torch.empty_like(x)
        grad_pooled = grad_pooled * (x.shape[-1] / weight1.shape[0])

        grads = []
        for inner_part, x_part, grad_product_part, grad_pooled_part, grad_x_part in zip(
            inner, *split(ctx.rows, x, grad_product, grad_pooled, grad_x)
        ):
            unpacked = counts.unpack(inner_part)
            shifted = norm.shifted(unpacked, x_part)
            grad = second.add_block(norm.rprelu(shifted), grad_product_part)
            grad.unflatten(-1, (x.shape[-1], -1)).add_(grad_pooled_part.unsqueeze(-1))
            grads.append(gradient.add_block(unpacked, shifted, grad))
            grad_x_part.copy_(fit_gradient(grads[-1], x.shape[-1]))
        grad_parameters = gradient.finish()

        grads.reverse()
        for inner_part, x_part, grad_x_part in zip(inner, *split(ctx.rows, x, grad_x)):
            # pop: each gradient is freed after its use
            grad_inner = gradient.input_gradient(counts.unpack(inner_part), grads.pop())
            grad_x_part.add_(first.add_block(x_part, grad_inner.to(grad_product.dtype)))

        grad_weights = first.grad_shift, first.grad_weight, second.grad_shift, second.grad_weight
        # None for slopes, statistics and eps
        return grad_x, *grad_weights, None, None, None, *grad_parameters


class BinaryAttentionProducts(Function):
    """
    Attention of signs: `probabilities = quantize(softmax(sign(query) @ sign(key).T * scale))` and their product with
    `sign(value)`. A shift is added before each sign.

    Forward: query `(batch, queries, channels)`, key and value `(batch, keys, channels)`, shifts `(channels,)`, `step`
    of the probabilities (`QuantizeProbability` with one level). Results: the product `(batch, queries, channels)` and
    the probabilities `(batch, heads, queries, keys)`.
    Gradient: the gradients of `ApproxSign` with this `sign_slope`, `QuantizeProbability` and the products. Only the
    inputs and the softmax are kept. Single operations would also keep the signs and the quantised probabilities.
    """

    @staticmethod
    def forward(ctx, query, key, value, query_shift, key_shift, value_shift, step, num_heads, sign_slope):
        inputs, shifts = (query, key, value), (query_shift, key_shift, value_shift)
        scale = (query.shape[-1] // num_heads) ** -0.5
        softmaxes, contexts, probabilities = [], [], []
        for parts in zip(*split(rows_per_block(query, num_heads * query.shape[1] * key.shape[1]), *inputs)):
            signs = [split_heads(binary_sign_(x + shift), num_heads) for x, shift in zip(parts, shifts)]
            scores = (signs[0] @ signs[1].transpose(-1, -2)).mul_(scale)
            softmaxes.append(nn.functional.softmax(scores, dim=-1))
            probabilities.append(probability_levels(softmaxes[-1], step, 1))
            contexts.append(merge_heads(probabilities[-1] @ signs[2]))
        ctx.save_for_backward(*inputs, *shifts, step, *softmaxes)
        ctx.num_heads, ctx.sign_slope, ctx.scale = num_heads, sign_slope, scale
        ctx.set_materialize_grads(False)
        return torch.cat(contexts), torch.cat(probabilities)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_context, grad_probabilities):
        query, key, value, query_shift, key_shift, value_shift, step, *softmaxes = ctx.saved_tensors
        inputs, shifts = (query, key, value), (query_shift, key_shift, value_shift)
        images = softmaxes[0].shape[0]
        if grad_context is None:  # only the probabilities were used
            grad_context = torch.zeros_like(query)
        if grad_probabilities is None:  # only the context was used
            grad_probability_parts = len(softmaxes) * [None]
        else:
            grad_probability_parts = grad_probabilities.split(images)
        grads, grad_shifts = [torch.empty_like(x) for x in inputs], [torch.zeros_like(shift) for shift in shifts]
        grad_step = torch.zeros_like(step)
        dtype = grad_context.dtype  # of all products: half precision under autocast
        for softmax, grad_probability, grad_context_part, *parts in zip(
            softmaxes, grad_probability_parts, *split(images, grad_context, *inputs, *grads)
        ):
            x_parts, grad_parts = parts[:3], parts[3:]
            shifted = [x + shift for x, shift in zip(x_parts, shifts)]
            slopes = [ctx.sign_slope(x) for x in shifted]
            query_sign, key_sign, value_sign = (split_heads(binary_sign_(x, dtype), ctx.num_heads) for x in shifted)
            grad_heads = split_heads(grad_context_part, ctx.num_heads)
            grad_value = probability_levels(softmax, step, 1).to(dtype).transpose(-1, -2) @ grad_heads
            grad = (grad_heads @ value_sign.transpose(-1, -2)).to(softmax.dtype)
            if grad_probability is not None:
                grad = grad + grad_probability
            grad, grad_step_part = probability_gradient(softmax, step, 1, grad)
            grad_step.add_(grad_step_part)
            grad_scores = torch.ops.aten._softmax_backward_data(grad, softmax, -1, softmax.dtype)
            grad_scores = grad_scores.mul_(ctx.scale).to(dtype)
            grad_signs = (grad_scores @ key_sign, grad_scores.transpose(-1, -2) @ query_sign, grad_value)
            for grad_part, grad_shift, slope, grad_sign in zip(grad_parts, grad_shifts, slopes, grad_signs):
                torch.mul(slope, merge_heads(grad_sign), out=grad_part)
                grad_shift.add_(grad_part.sum((0, 1)))
        return *grads, *grad_shifts, grad_step, None, None


class AddAvgPools(Function):
    """
    `x + shift + sum_i scale_i * mean_i(pooled)`. Each mean is over an odd kernel around every token, padded with
    zeros.

    Forward: x and pooled `(batch, height * width, channels)`, `grid_size` `(height, width)`, one of `kernel_sizes`
    `(height, width)` per scale, shift and scales `(channels,)`; the result has the shape of x.
    Gradient: exact. Only `pooled` and the scales are kept.
    """

    @staticmethod
    def forward(ctx, x, pooled, shift, grid_size, kernel_sizes, *scales):
        ctx.save_for_backward(pooled, *scales)
        ctx.grid_size, ctx.kernel_sizes = grid_size, kernel_sizes
        results = []
        for x_part, pooled_part in zip(*split(rows_per_block(x, x.shape[1] * x.shape[2]), x, pooled)):
            result = x_part + shift
            for kernel_size, scale in zip(kernel_sizes, scales):
                result.addcmul_(same_avg_pool(pooled_part, grid_size, kernel_size), scale)
            results.append(result)
        return torch.cat(results)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        pooled, *scales = ctx.saved_tensors
        grad_pooled, grad_scales = torch.zeros_like(pooled), [torch.zeros_like(scale) for scale in scales]
        grad_shift = torch.zeros_like(scales[0])
        images = rows_per_block(pooled, pooled.shape[1] * pooled.shape[2])
        for pooled_part, grad_part, grad_pooled_part in zip(*split(images, pooled, grad_output, grad_pooled)):
            grad_shift.add_(grad_part.sum((0, 1)))
            for kernel_size, scale, grad_scale in zip(ctx.kernel_sizes, scales, grad_scales):
                # The mean over a symmetric, zero-padded window is its own transpose.
                mean = same_avg_pool(grad_part, ctx.grid_size, kernel_size)
                grad_pooled_part.addcmul_(mean, scale)
                grad_scale.add_(mean.mul_(pooled_part).sum((0, 1)))
        return grad_output, grad_pooled, grad_shift, None, None, *grad_scales


def same_avg_pool(x: torch.Tensor, grid_size: tuple[int, int], kernel_size: tuple[int, int]) -> torch.Tensor:
    """Mean over zero-padded neighbourhoods of tokens. Input and result are `(batch, height * width, channels)`."""
    # (batch, height * width, channels) -> (batch, channels, height, width), channels last in memory
    token_map = x.unflatten(1, grid_size).permute(0, 3, 1, 2)
    padding = tuple(size // 2 for size in kernel_size)
    means = nn.functional.avg_pool2d(token_map, kernel_size, stride=1, padding=padding)
    return means.permute(0, 2, 3, 1).flatten(1, 2)


def split_heads(x: torch.Tensor, num_heads: int) -> torch.Tensor:
    """`(batch, tokens, channels) -> (batch, heads, tokens, head_dim)`."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def merge_heads(x: torch.Tensor) -> torch.Tensor:
    """`(batch, heads, tokens, head_dim) -> (batch, tokens, channels)`."""
    return x.transpose(1, 2).flatten(2)


def scale_and_shift(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """`scale * x + shift` per channel, x `(..., channels)`."""
    return torch.addcmul(shift, x, scale)


# ---- Products of signs ----


class BinarizedWeight:
    """
    Products of `sign(x + shift)` with a binarised weight. x `(rows, in)`, shift `(in,)`.

    The weight `(out, in)` is signs times a scale per row. On CPUs with byte products the signs are multiplied as
    bytes, which takes a quarter of the time.
    """

    def __init__(self, shift: torch.Tensor, weight: torch.Tensor):
        self.shift, self.weight = shift, weight
        self.signs = binary_sign_(weight.clone(), torch.int8) if multiplies_bytes(weight) else None

    def count(self, x: torch.Tensor) -> torch.Tensor:
        """Product with the signs, without their scale, `(rows, out)`: whole numbers from -in to in."""
        if self.signs is None:
            return nn.functional.linear(binary_sign_(x + self.shift), self.weight.sign())
        return torch._int_mm(binary_sign_(x + self.shift, torch.int8), self.signs.T)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """Product with the weight, `(rows, out)`."""
        if self.signs is None:
            return nn.functional.linear(binary_sign_(x + self.shift), self.weight)
        return self.count(x) * row_magnitude(self.weight)


def multiplies_bytes(weight: torch.Tensor) -> bool:
    """Whether byte products are available and faster than float products for this weight."""
    return (
        HAS_BYTE_PRODUCTS
        and weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and weight.shape[1] > 1  # one column gives garbage (https://github.com/pytorch/pytorch/issues/195066)
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


class PackedCounts:
    """
    Counts of `BinarizedWeight`, for a weight `(out, in)`, in one byte each if they fit, else two.

    A count is a whole number from -in to in. An even `in` gives even counts, which are stored halved.
    """

    def __init__(self, weight: torch.Tensor):
        self.step = 2 - weight.shape[1] % 2
        self.dtype = torch.int8 if weight.shape[1] // self.step <= torch.iinfo(torch.int8).max else torch.int16
        self.unit = row_magnitude(weight) * self.step

    def pack(self, counts: torch.Tensor) -> torch.Tensor:
        return (counts * (1 / self.step)).to(self.dtype)

    def unpack(self, packed: torch.Tensor) -> torch.Tensor:
        """Product with the weight itself, scale included, in the dtype of the weight."""
        return packed * self.unit


def row_magnitude(weight: torch.Tensor) -> torch.Tensor:
    """Scale of each row of a binarised weight: `(out, in) -> (out,)`."""
    return weight[:, 0].abs()


class SignLinearGradient:
    """Backward of `SignLinear`, block by block. `grad_shift` and `grad_weight` sum the gradients of all blocks."""

    def __init__(self, shift: torch.Tensor, weight: torch.Tensor, slope: Callable):
        self.shift, self.weight, self.slope = shift, weight, slope
        self.grad_shift, self.grad_weight = torch.zeros_like(shift), torch.zeros_like(weight)

    def add_block(self, x: torch.Tensor, grad_output: torch.Tensor) -> torch.Tensor:
        """Adds one block to the sums; returns its gradient to x."""
        # Under autocast the product and its gradient are in half precision, x and weight are not.
        product_dtype = grad_output.dtype
        shifted = x + self.shift
        grad_x = self.slope(shifted).mul_(grad_output @ self.weight.to(product_dtype))
        self.grad_shift.add_(grad_x.sum(0))
        self.grad_weight.add_(grad_output.T @ binary_sign_(shifted, product_dtype))
        return grad_x


# ---- Normalisation, shortcut and RPReLU ----


class NormRPReLU:
    """
    `RPReLU(BN(x) + shortcut)` of blocks of rows: x `(rows, channels)`, shortcut `(rows, shortcut_channels)`.

    Statistics and parameters are `(channels,)`. Normalisation and the shift before RPReLU are folded into one
    multiply-add.
    """

    def __init__(self, mean, variance, eps, weight, bias, shift_in, slope, shift_out):
        self.mean, self.variance, self.eps, self.weight = mean, variance, eps, weight
        self.slope, self.shift_out = slope, shift_out
        self.scale, self.offset = fold_norm(mean, variance, eps, weight, bias - shift_in)

    def forward(self, x: torch.Tensor, shortcut: torch.Tensor) -> torch.Tensor:
        return self.rprelu(self.shifted(x, shortcut))

    def shifted(self, x: torch.Tensor, shortcut: torch.Tensor) -> torch.Tensor:
        """`BN(x) + shortcut - shift_in`."""
        return add_fitted_(torch.addcmul(self.offset, x, self.scale), shortcut)

    def rprelu(self, shifted: torch.Tensor) -> torch.Tensor:
        """RPReLU of rows from which `shift_in` is subtracted already."""
        return torch.prelu(shifted, self.slope).add_(self.shift_out)


class NormRPReLUGradient:
    """
    Backward of `NormRPReLU`, block by block, in two passes.

    The gradient through the statistics needs sums over all rows. So call `add_block` for every block, then `finish`
    once, then `input_gradient` for every block.
    """

    def __init__(self, norm: NormRPReLU, batch_rows: int | torch.Tensor):
        self.norm, self.batch_rows = norm, batch_rows
        slope = norm.slope
        self.grad_slope, self.grad_shift_out = torch.zeros_like(slope), torch.zeros_like(slope)
        self.norm_sums = slope.new_zeros(2, *slope.shape)

    def add_block(self, x: torch.Tensor, shifted: torch.Tensor, grad_output: torch.Tensor) -> torch.Tensor:
        """
        Adds one block to the sums; returns the gradient to `BN(x)`, which is also the gradient to the fitted shortcut.
        Overwrites `shifted`, the result of `NormRPReLU.shifted`.
        """
        self.grad_shift_out.add_(grad_output.sum(0))
        self.grad_slope.add_(shifted.clamp(max=0).mul_(grad_output).sum(0))
        # 1 where positive, else the slope. Arithmetic, because torch.where is 30 times slower on a CPU.
        grad = torch.addcmul(self.norm.slope, shifted.gt_(0), 1 - self.norm.slope).mul_(grad_output)
        self.norm_sums[0].add_(grad.sum(0))
        self.norm_sums[1].add_(torch.mul(x - self.norm.mean, grad).sum(0))
        return grad

    def finish(self) -> tuple[torch.Tensor, ...]:
        """Gradients to weight, bias, shift_in, slope and shift_out."""
        norm = self.norm
        self.coefficients, grad_weight, grad_bias = norm_gradient(
            self.norm_sums, norm.weight, norm.mean, norm.variance, self.batch_rows, norm.eps
        )
        # shift_in is subtracted where the bias is added
        return grad_weight, grad_bias, -grad_bias, self.grad_slope, self.grad_shift_out

    def input_gradient(self, x: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
        """Gradient of a block to x; `grad` is the result of `add_block`."""
        return apply_norm_gradient(grad, x, self.coefficients)


def add_fitted_(x: torch.Tensor, shortcut: torch.Tensor) -> torch.Tensor:
    """
    Add `shortcut` `(rows, in)` to `x` `(rows, out)` in place.

    If out is larger, channel j takes channel `j mod in`. If out is smaller, channel j takes the mean over its run of
    `in / out` neighbours.
    """
    channels, shortcut_channels = x.shape[-1], shortcut.shape[-1]
    if channels < shortcut_channels:
        return x.add_(shortcut.unflatten(-1, (channels, -1)).mean(-1))
    x.unflatten(-1, (-1, shortcut_channels)).add_(shortcut.unsqueeze(-2))
    return x


def fit_gradient(grad: torch.Tensor, channels: int) -> torch.Tensor:
    """Gradient of `add_fitted_` to its shortcut: `(rows, out) -> (rows, channels)`."""
    if channels > grad.shape[-1]:
        repeats = channels // grad.shape[-1]
        return (grad / repeats).repeat_interleave(repeats, -1)
    return grad if channels == grad.shape[-1] else grad.unflatten(-1, (-1, channels)).sum(-2)


# ---- Blocks of rows ----


def map_rows(function: Callable[..., torch.Tensor], *tensors: torch.Tensor) -> torch.Tensor:
    """Compute `function(*tensors)` by blocks of rows. Its result for a row must depend on that row only."""
    rows = rows_per_block(tensors[0], max(tensor.shape[1] for tensor in tensors))
    if rows >= tensors[0].shape[0]:
        return function(*tensors)
    result = None
    for start, parts in zip(range(0, tensors[0].shape[0], rows), zip(*split(rows, *tensors))):
        part = function(*parts)
        if result is None:
            result = part.new_empty(tensors[0].shape[0], part.shape[1])
        result[start : start + rows] = part
    return result


def rows_per_block(x: torch.Tensor, width: int) -> int:
    """Number of rows (first dimension) of `x` in a block whose largest tensor has `width` elements a row."""
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return x.shape[0]
    return max(BLOCK_ELEMENTS // width, 1)


def split(rows: int, *tensors: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
    """Each tensor as views of `rows` rows. All tensors have the same number of rows."""
    if rows >= tensors[0].shape[0]:
        # torch.export would fix the number of images to count the blocks of Tensor.split.
        return [(tensor,) for tensor in tensors]
    return [tensor.split(rows) for tensor in tensors]

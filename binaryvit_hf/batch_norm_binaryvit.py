"""Batch normalisation of rows, by the statistics of all processes that train together."""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable


class SyncedBatchNorm(Function):
    """
    Batch normalisation by the statistics of all processes.

    Forward: `BN(x)`, x `(rows, channels)`, `mean` and `variance` of all `batch_rows` rows.
    Gradient: exact, of the sum of the losses of all processes.
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
        grad_x = apply_norm_gradient(grad_output, x, coefficients).to(x.dtype)
        return grad_x, None, None, None, None, grad_weight, grad_bias


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def batch_statistics(
    blocks: Sequence[torch.Tensor], norm: nn.BatchNorm1d, unpack: Callable = torch.Tensor.detach
) -> tuple[torch.Tensor, torch.Tensor, int | torch.Tensor]:
    """
    Mean and (biased) variance of each channel over the rows of all `blocks (rows, channels)` of all processes, and the
    number of these rows, a tensor where there are several processes; the running statistics of `norm` are updated.
    `unpack` makes rows of each block.

    Raises:
        ValueError: there is one row, which has no unbiased variance.
    """
    count = sum(block.shape[0] for block in blocks)
    if count == 1 and not is_distributed():
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {blocks[0].shape}")
    if len(blocks) == 1 and not is_distributed():
        running = norm.running_mean, norm.running_var
        return *torch.batch_norm_update_stats(unpack(blocks[0]), *running, norm.momentum), count
    # Of each block by the kernel that is made for it, which updates no running statistics where it is given none.
    parts = [torch.batch_norm_update_stats(unpack(block), None, None, norm.momentum) for block in blocks]
    # In float64, for squares of means are subtracted again.
    means, variances = (torch.stack(part).double() for part in zip(*parts))
    rows = means.new_tensor([[block.shape[0]] for block in blocks])
    sums = torch.stack([(rows * part).sum(0) for part in (torch.ones_like(means), means, variances + means.square())])
    if is_distributed():
        dist.all_reduce(sums)
        count = sums[0, 0]  # stays on the device, which need not be waited for
    mean, square = sums[1:] / count
    variance = square - mean.square()
    unbiased = variance * (count / (count - 1))
    dtype = norm.running_mean.dtype
    norm.running_mean.lerp_(mean.to(dtype), norm.momentum)
    norm.running_var.lerp_(unbiased.to(dtype), norm.momentum)
    return mean.to(dtype), variance.to(dtype), count


def norm_gradient(
    sums: torch.Tensor, weight: torch.Tensor, mean: torch.Tensor, variance: torch.Tensor, batch_rows, eps: float
) -> tuple[tuple[torch.Tensor, ...], torch.Tensor, torch.Tensor]:
    """
    Gradient of batch normalisation.

    Args:
        sums: of the gradient, and of its product with `x - mean`, over the rows of this process: `(2, channels)`.
        batch_rows: as `batch_statistics` counts the rows that mean and variance are of, which the gradient then goes
            through; 0 where they are running statistics.

    Returns:
        the coefficients that make the gradient to x (`apply_norm_gradient`), and the gradients to weight and bias.
    """
    spread = torch.rsqrt(variance + eps)
    grad_bias, grad_weight = sums[0], sums[1] * spread
    of_grad = weight * spread
    synced = isinstance(batch_rows, torch.Tensor)
    if not synced and batch_rows == 0:
        return (of_grad, torch.zeros_like(of_grad), torch.zeros_like(of_grad)), grad_weight, grad_bias
    means = torch.stack((grad_bias, grad_weight))
    if synced:  # through the statistics each row feels the rows of all processes
        dist.all_reduce(means)
        batch_rows = batch_rows.to(means.dtype)
    mean_grad, mean_grad_normed = means / batch_rows
    of_x = -of_grad * spread * mean_grad_normed
    return (of_grad, of_x, -of_grad * mean_grad - of_x * mean), grad_weight, grad_bias


def apply_norm_gradient(grad: torch.Tensor, x: torch.Tensor, coefficients: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Gradient of batch normalisation to some of its rows, from that of their results: both `(rows, channels)`."""
    of_grad, of_x, constant = coefficients
    return torch.addcmul(constant, x, of_x).addcmul_(grad, of_grad)


def fold_norm(mean, variance, eps, weight, bias) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalisation and affine as one: `x * scale + offset`, in the dtype of the weight."""
    scale = weight * torch.rsqrt(variance + eps)
    return scale.to(weight.dtype), (bias - mean * scale).to(weight.dtype)

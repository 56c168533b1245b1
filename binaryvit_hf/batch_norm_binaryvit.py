"""Batch normalisation of rows, by the statistics of all processes that train together."""

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
        grad_x, grad_weight, grad_bias = batch_norm_backward(
            grad_output.to(x.dtype), x, weight, mean, variance, ctx.batch_rows, ctx.eps
        )
        return grad_x, None, None, None, None, grad_weight, grad_bias


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def batch_statistics(
    rows: torch.Tensor, norm: nn.BatchNorm1d
) -> tuple[torch.Tensor, torch.Tensor, int | torch.Tensor]:
    """
    Mean and (biased) variance of each channel over `rows (rows, channels)` of all processes, and the number of these
    rows, a tensor where there are several processes; the running statistics of `norm` are updated.
    """
    if not is_distributed():
        mean, variance = torch.batch_norm_update_stats(rows, norm.running_mean, norm.running_var, norm.momentum)
        return mean, variance, rows.shape[0]
    variance, mean = torch.var_mean(rows.double(), dim=0, correction=0)
    # In float64, for the squares of the mean are subtracted again.
    sums = torch.stack((torch.ones_like(mean), mean, variance + mean.square())) * rows.shape[0]
    dist.all_reduce(sums)
    batch_rows = sums[0, 0]  # stays on the device, which need not be waited for
    mean, square = sums[1:] / batch_rows
    variance = square - mean.square()
    unbiased = variance * (batch_rows / (batch_rows - 1))
    dtype = norm.running_mean.dtype
    norm.running_mean.lerp_(mean.to(dtype), norm.momentum)
    norm.running_var.lerp_(unbiased.to(dtype), norm.momentum)
    return mean.to(dtype), variance.to(dtype), batch_rows


def batch_norm_backward(grad, x, weight, mean, variance, batch_rows, eps):
    """
    Gradients of batch normalisation, to x, weight and bias.

    Args:
        batch_rows: as `batch_statistics` counts the rows that mean and variance are of, which the gradient then goes
            through; 0 where they are running statistics.
    """
    spread = torch.rsqrt(variance + eps)
    synced = isinstance(batch_rows, torch.Tensor)
    from_own_rows = not synced and batch_rows > 0
    grad_x, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
        grad, x, weight, mean, variance, mean, spread, from_own_rows, eps, [True] * 3
    )
    if not synced:
        return grad_x, grad_weight, grad_bias
    # Through the statistics each row feels the rows of all processes.
    sums = torch.stack((grad_bias, grad_weight))
    dist.all_reduce(sums)
    mean_grad, mean_grad_normed = sums / batch_rows.to(sums.dtype)
    slope = weight * spread.square() * mean_grad_normed
    offset = weight * spread * mean_grad - mean * slope
    return torch.addcmul(grad_x - offset, x, slope, value=-1).to(x.dtype), grad_weight, grad_bias


def fold_norm(mean, variance, eps, weight, bias) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalisation and affine as one: `x * scale + offset`, in the dtype of the weight."""
    scale = weight * torch.rsqrt(variance + eps)
    return scale.to(weight.dtype), (bias - mean * scale).to(weight.dtype)

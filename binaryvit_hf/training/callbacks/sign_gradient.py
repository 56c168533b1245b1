"""
Gradients for the sign of an activation. They act during training only: neither the config nor the outputs of a network
depend on them.
"""

import torch
from torch import nn
from transformers import TrainerCallback

from ...network.functional_binaryvit import approx_sign_slope


SIGN_GRADIENTS = ("polynomial", "clip", "tanh")
FLATTEST, STEEPEST = 0.1, 10.0  # as in the paper


def clip_slope(x: torch.Tensor) -> torch.Tensor:
    """1 on [-1, 1], else 0 (Binarized Neural Networks, Hubara et al., NeurIPS 2016)."""
    return x.abs().le_(1)


class TanhSlope:
    """
    `k * t * (1 - tanh(t * x)**2)`, the slope of `k * tanh(t * x)`, with `t = 0.1 * 100**progress` and `k = max(1 / t, 1)`.
    It begins near 1 for every x and ends nearly as steep as a sign (IR-Net, Qin et al., CVPR 2020, error decay estimator).

    t and k * t are tensors: a compiler treats Python numbers as constants and would compile again at every step. A CUDA graph
    treats tensors of the CPU as constants too.
    """

    def __init__(self):
        self.steepness, self.height = torch.tensor(0.0, dtype=torch.float64), torch.tensor(0.0, dtype=torch.float64)
        self.set_progress(0.0)

    def to(self, device: torch.device) -> None:
        """Compute on a device."""
        if device.type != "cpu":
            # Not every device has float64.
            self.steepness, self.height = (value.to(device, torch.float32) for value in (self.steepness, self.height))

    def set_progress(self, progress: float) -> None:
        """Set the share of training that is over, from 0 to 1."""
        t = FLATTEST * (STEEPEST / FLATTEST) ** progress
        self.steepness.fill_(t)
        self.height.fill_(max(1 / t, 1.0) * t)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return torch.rsub((x * self.steepness).tanh_().square_(), 1).mul_(self.height)


class SignGradient(TrainerCallback):
    """Give every sign of an activation the gradient `name`, one of `SIGN_GRADIENTS`."""

    def __init__(self, name: str):
        self.slope = {"polynomial": approx_sign_slope, "clip": clip_slope, "tanh": TanhSlope()}[name]

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if isinstance(self.slope, TanhSlope):
            self.slope.to(args.device)
        for module in binary_activation_modules(model):
            module.sign_slope = self.slope

    def on_step_begin(self, args, state, control, **kwargs):
        if isinstance(self.slope, TanhSlope):
            # A function of the step only, so that a resumed run continues it.
            self.slope.set_progress(state.global_step / state.max_steps)


def binary_activation_modules(model: nn.Module) -> list[nn.Module]:
    """The modules that take signs of activations."""
    return [module for module in model.modules() if hasattr(module, "sign_slope") and module.input_bits == 1]

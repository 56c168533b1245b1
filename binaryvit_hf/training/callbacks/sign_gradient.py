"""
Gradients to give the sign of an activation in training. They are no part of a network: which of them it was trained with
changes neither its config nor what it computes.
"""

import torch
from torch import nn
from transformers import TrainerCallback

from ...network.functional_binaryvit import approx_sign_slope


SIGN_GRADIENTS = ("polynomial", "clip", "tanh")
FLATTEST, STEEPEST = 0.1, 10.0  # of the paper


def clip_slope(x: torch.Tensor) -> torch.Tensor:
    """1 on [-1, 1], else 0 (Binarized Neural Networks, Hubara et al., NeurIPS 2016)."""
    return x.abs().le_(1)


class TanhSlope:
    """
    `k * t * (1 - tanh(t * x)**2)`, the slope of `k * tanh(t * x)`, with `t = 0.1 * 100**progress` and `k = max(1 / t, 1)`:
    at first nearly 1 wherever x is, in the end as steep as a sign (IR-Net, Qin et al., CVPR 2020, error decay estimator).

    t and k * t are tensors, for a compiler takes numbers for constants and would compile every step anew.
    """

    def __init__(self):
        self.steepness, self.height = torch.tensor(0.0, dtype=torch.float64), torch.tensor(0.0, dtype=torch.float64)
        self.set_progress(0.0)

    def set_progress(self, progress: float) -> None:
        """The share of the training that is over, from 0 to 1."""
        t = FLATTEST * (STEEPEST / FLATTEST) ** progress
        self.steepness.fill_(t)
        self.height.fill_(max(1 / t, 1.0) * t)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return torch.rsub((x * self.steepness).tanh_().square_(), 1).mul_(self.height)


class SignGradient(TrainerCallback):
    """Give every sign of an activation the gradient of this name, one of `SIGN_GRADIENTS`."""

    def __init__(self, name: str):
        self.slope = {"polynomial": approx_sign_slope, "clip": clip_slope, "tanh": TanhSlope()}[name]

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        for module in sign_takers(model):
            module.sign_slope = self.slope

    def on_step_begin(self, args, state, control, **kwargs):
        if isinstance(self.slope, TanhSlope):
            # Of the step alone, so that a resumed run goes on where it was.
            self.slope.set_progress(state.global_step / state.max_steps)


def sign_takers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if hasattr(module, "sign_slope") and module.input_bits == 1]

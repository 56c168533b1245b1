"""The moving average of the weights of a training, which is what it evaluates and leaves behind."""

import torch
from timm.utils import ModelEmaV3

from ..checkpoints import CheckpointedCallback


class WeightAverage(CheckpointedCallback):
    """
    After every step `average = decay * average + (1 - decay) * weights`, beginning at the initial weights (Polyak & Juditsky,
    1992; timm's ModelEmaV3).

    Running statistics are averaged like weights, and batches are counted as the training counts them. These statistics are
    of the networks that trained, whose signs are not those of the average: to take the average's own, re-estimate them.
    """

    file = "average.safetensors"

    def __init__(self, decay: float):
        self.decay = decay

    def begin(self, model) -> None:
        self.average = ModelEmaV3(model, self.decay)

    def tensors(self) -> dict[str, torch.Tensor]:
        return self.average.module.state_dict()

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.average.update(model)

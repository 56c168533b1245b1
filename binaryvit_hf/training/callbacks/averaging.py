"""The moving average of the weights, which training evaluates and saves in their place."""

import torch
from timm.utils import ModelEmaV3

from .checkpointed import CheckpointedCallback


class WeightAverage(CheckpointedCallback):
    """
    After every step `average = decay * average + (1 - decay) * weights`; the first average is the initial weights (Polyak &
    Juditsky, 1992; timm's ModelEmaV3).

    Running statistics are averaged too. They belong to the trained networks, whose signs differ from the average's: combine
    this with `--batch_norm_reestimation_batches`, which computes the average's own statistics.
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

"""What an attention probability that is "on" stands for, kept positive in training."""

import torch
from transformers import TrainerCallback

from ...network.modeling_binaryvit import BinaryViTAttention


SMALLEST_CLIP = 1e-3


class PositiveClips(TrainerCallback):
    """
    Put every attention's learned clip that a step of the optimiser took below `SMALLEST_CLIP` back to it.

    At or below zero no probability is on, whatever its size, and none has a gradient: such an attention would give zeros
    for the rest of the training, and the normalisation after it would multiply all gradients by `batch_norm_eps**-0.5`.
    BiT, from which the clip is, keeps it positive, too (Liu et al., NeurIPS 2022).
    """

    def __init__(self, model: torch.nn.Module):
        attentions = [module for module in model.modules() if isinstance(module, BinaryViTAttention)]
        self.clips = [
            (attention.probability_clip, min(SMALLEST_CLIP, attention.probability_clip_init))
            for attention in attentions
            if attention.probability_clip is not None
        ]

    @torch.no_grad()
    def on_optimizer_step(self, args, state, control, **kwargs):
        for clip, smallest in self.clips:
            clip.clamp_(min=smallest)

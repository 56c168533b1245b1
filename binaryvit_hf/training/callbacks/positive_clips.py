"""A lower bound for the learned clips of attention probabilities."""

import torch
from transformers import TrainerCallback

from ...network.modeling_binaryvit import BinaryViTAttention


SMALLEST_CLIP = 1e-3


class PositiveClips(TrainerCallback):
    """
    After every step of the optimiser, raise each attention's learned clip to at least `SMALLEST_CLIP`.

    With a clip of zero or less every quantised probability is 0 and has no gradient. The attention would stay 0 for the rest
    of training, and the normalisation after it would multiply all gradients by `batch_norm_eps**-0.5`. BiT, which introduced
    the clip, also keeps it positive (Liu et al., NeurIPS 2022).
    """

    def on_train_begin(self, args, state, control, model=None, **kwargs):
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

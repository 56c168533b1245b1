"""
Freezing of weights whose sign oscillates ("Overcoming Oscillations in Quantization-Aware Training", Nagel et al., ICML
2022).
"""

import logging

import torch

from ...network.functional_binaryvit import binary_sign, center_rows, row_scale
from ...network.layers_binaryvit import BinaryLinear, BinaryPatchConv
from ...network.packing_binaryvit import binary_layers
from .checkpointed import CheckpointedCallback


MOMENTUM = 0.01  # as in the paper

logger = logging.getLogger(__name__)


class OscillationFreezing(CheckpointedCallback):
    """
    Freeze the sign of every 1-bit weight that oscillates more often than `threshold`, in flips per step, for the rest of
    training.
    """

    file = "oscillation.safetensors"

    def __init__(self, threshold: float):
        self.threshold = threshold

    def begin(self, model) -> None:
        layers = binary_layers(model).items()
        self.watched = {name: WatchedWeight(layer) for name, layer in layers if layer.weight_bits == 1}

    def tensors(self) -> dict[str, torch.Tensor]:
        return {
            f"{name}.{key}": tensor for name, watched in self.watched.items() for key, tensor in watched.state.items()
        }

    def on_optimizer_step(self, args, state, control, **kwargs):
        for watched in self.watched.values():
            watched.step(self.threshold)

    def on_train_end(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            logger.info("%.2f %% of the 1-bit weights oscillated and are frozen.", 100 * self.share_frozen())

    def share_frozen(self) -> float:
        frozen = [watched.state["frozen"] for watched in self.watched.values()]
        return sum(mask.sum().item() for mask in frozen) / sum(mask.numel() for mask in frozen)


class WatchedWeight:
    """
    The latent weight of one layer, `(out, in)`, with the flips of its signs and its frozen elements.

    A flip always reverses the previous one, so an element oscillates if it flips and has flipped before. The state has the
    weight's shape, except `magnitude`:
        positive: whether the sign is positive.
        flipped: whether the sign has ever flipped.
        frequency: frequency of oscillation, `f = 0.99 * f + 0.01 * [oscillates]`, float16.
        majority: moving average of the sign, with the same factors, float16.
        frozen: whether the frequency has passed the threshold; frequency, majority and flips then stay constant.
        magnitude: `(out, 1)`, distance of a row's frozen elements from zero: the row's scale when its first element froze.
    """

    def __init__(self, layer: BinaryLinear | BinaryPatchConv):
        self.layer = layer
        positive = self.signs() > 0
        self.state = {
            "positive": positive,
            "flipped": torch.zeros_like(positive),
            "frequency": torch.zeros_like(positive, dtype=torch.float16),
            "majority": self.signs().half(),
            "frozen": torch.zeros_like(positive),
            "magnitude": torch.zeros_like(row_scale(self.rows)),
        }

    @property
    def rows(self) -> torch.Tensor:
        return self.layer.weight.detach().flatten(1)

    @property
    def centered(self) -> bool:
        """Whether the layer subtracts the row's mean before it takes signs."""
        return isinstance(self.layer, BinaryLinear)

    def signs(self) -> torch.Tensor:
        return binary_sign(center_rows(self.rows) if self.centered else self.rows)

    def step(self, threshold: float) -> None:
        """Update the state and the frozen elements after a step of the optimiser."""
        self.restore_frozen()
        self.count_flips()
        self.freeze(threshold)
        self.restore_frozen()

    def count_flips(self) -> None:
        state, signs = self.state, self.signs()
        flips = ((signs > 0) != state["positive"]) & ~state["frozen"]
        oscillates = (flips & state["flipped"]).half()
        moving = MOMENTUM * (~state["frozen"]).half()
        state["frequency"] += moving * (oscillates - state["frequency"])
        state["majority"] += moving * (signs.half() - state["majority"])
        state["flipped"] |= flips
        state["positive"].copy_(signs > 0)

    def freeze(self, threshold: float) -> None:
        state = self.state
        frozen = state["frozen"] | (state["frequency"] > threshold)
        if self.centered:
            # Distances from a mean sum to zero, so at least one element must stay free.
            frozen = torch.where(frozen.all(1, keepdim=True), state["frozen"], frozen)
        first = frozen.any(1, keepdim=True) & ~state["frozen"].any(1, keepdim=True)
        state["magnitude"].copy_(torch.where(first, row_scale(self.rows), state["magnitude"]))
        state["frozen"].copy_(frozen)

    def restore_frozen(self) -> None:
        """
        Set frozen elements to `v`, their sign times the magnitude, or to `mean + v` if the layer is centered.

        The free elements `w` determine the row's mean: `mean = (sum(w) + sum(v)) / number of free elements`.
        """
        frozen, rows = self.state["frozen"], self.rows
        values = binary_sign(self.state["majority"]).to(rows.dtype) * self.state["magnitude"]
        if self.centered:
            total = torch.where(frozen, values, rows).sum(1, keepdim=True)
            values = values + total / (~frozen).sum(1, keepdim=True)
        rows.copy_(torch.where(frozen, values, rows))

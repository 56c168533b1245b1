"""
Weights that flip to and fro, frozen ("Overcoming Oscillations in Quantization-Aware Training", Nagel et al., ICML 2022).
"""

import logging

import torch

from ...network.functional_binaryvit import binary_sign, center_rows, row_scale
from ...network.layers_binaryvit import BinaryLinear, BinaryPatchConv
from ..checkpoints import CheckpointedCallback
from ..latent_weights import one_bit_layers


MOMENTUM = 0.01  # of the paper

logger = logging.getLogger(__name__)


class OscillationFreezing(CheckpointedCallback):
    """
    Freeze the sign of every weight that oscillates more often than `threshold`, in flips a step, for the rest of the
    training.
    """

    file = "oscillation.safetensors"

    def __init__(self, threshold: float):
        self.threshold = threshold

    def begin(self, model) -> None:
        self.watched = {name: WatchedWeight(layer) for name, layer in one_bit_layers(model).items()}

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
    The flips of one weight `(out, in)`, and the elements that are frozen for them.

    A sign's flip is always against its last, so a weight oscillates where it flips and has flipped before. The state, of
    the weight's shape but for the last:
        positive: the sign.
        flipped: whether it has ever flipped.
        frequency: of oscillation, `f = 0.99 * f + 0.01 * [oscillates]`, float16.
        majority: of the sign, averaged likewise, float16.
        frozen: whether the frequency has passed the threshold; the other state is then left as it is.
        magnitude: `(out, 1)`, how far frozen weights of a row are from zero: its scale when the first froze, so that they
            take the value that they stood for.
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
        """Whether the layer takes the sign of the distance from the row's mean."""
        return isinstance(self.layer, BinaryLinear)

    def signs(self) -> torch.Tensor:
        return binary_sign(center_rows(self.rows) if self.centered else self.rows)

    def step(self, threshold: float) -> None:
        """Follow a step of the optimiser."""
        self.hold()
        self.count_flips()
        self.freeze(threshold)
        self.hold()

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
            # The distances from a mean sum to zero, so one element at least must be free.
            frozen = torch.where(frozen.all(1, keepdim=True), state["frozen"], frozen)
        first = frozen.any(1, keepdim=True) & ~state["frozen"].any(1, keepdim=True)
        state["magnitude"].copy_(torch.where(first, row_scale(self.rows), state["magnitude"]))
        state["frozen"].copy_(frozen)

    def hold(self) -> None:
        """
        Put frozen elements back to their sign times the magnitude: from zero, or, where the sign is of the distance from
        the row's mean, from that mean, which the free elements move. With n elements, frozen ones at `mean + v` and free
        ones at `w`, `mean = (sum(w) + sum(v)) / (n - number of v)`.
        """
        frozen, rows = self.state["frozen"], self.rows
        held = binary_sign(self.state["majority"]).to(rows.dtype) * self.state["magnitude"]
        if self.centered:
            total = torch.where(frozen, held, rows).sum(1, keepdim=True)
            held = held + total / (~frozen).sum(1, keepdim=True)
        rows.copy_(torch.where(frozen, held, rows))

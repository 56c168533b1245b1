"""Signs of weights and activations, and how far latent weights are from a change of their sign."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from ..network.functional_binaryvit import center_rows, weight_levels
from ..network.layers_binaryvit import BinaryLayer
from ..network.packing_binaryvit import PackedLinear, unpack_levels
from .parts import Layer, attentions, quantizable_layers, weight_shape


NEAR = (0.01, 0.1)  # parts of a row's mean distance
BINS, MOST_DISTANCE = 60, 3.0  # of the histogram, in mean distances to each side: the two inner bins are 0.1 wide


# ---- Weights ----


@dataclass(frozen=True)
class WeightSigns:
    """How many quantised weights of a layer are positive, how many are zero (never with 1 bit), of how many."""

    positive: int
    zero: int
    total: int

    @property
    def share(self) -> float:
        """Share of positive weights; with 1 bit, the share of +1."""
        return self.positive / self.total


def count_weight_signs(layer: Layer) -> WeightSigns:
    if isinstance(layer, PackedLinear):
        levels = unpack_levels(layer.packed_weight, layer.width, layer.in_features)
    else:
        levels, _ = weight_levels(layer.weight.detach(), layer.weight_bits, layer.clip_value, layer.centers_weight)
    return WeightSigns(int((levels > 0).sum()), int((levels == 0).sum()), levels.numel())


@dataclass(frozen=True)
class LatentWeights:
    """
    Distances of the latent weights of a 1-bit layer from zero, where their sign changes.

    The distance of a weight of a linear layer is `|w - mean of its row|`, because the sign is taken of the centred weight.

    Args:
        total: number of weights.
        near: number of weights nearer to zero than 0.01 and 0.1 of the mean distance in their row (`NEAR`).
        within_step: number of weights nearer to zero than a step, for each of the learning rates given.
        without_gradient: number of weights whose distance is above 1. Their gradient is 0 (`BinarizeWeight`).
        histogram: numbers of signed distances in `BINS` equal bins from -3 to 3 mean distances; the outer ones also count
            what is further out.
    """

    total: int
    near: tuple[int, ...]
    within_step: tuple[int, ...]
    without_gradient: int
    histogram: tuple[int, ...]


@torch.no_grad()
def measure_latent_weights(layer: BinaryLayer, learning_rates: Sequence[float] = ()) -> LatentWeights:
    """A step of Adam moves a weight by about the learning rate."""
    rows = layer.weight.detach().float().flatten(1)
    signed = center_rows(rows) if layer.centers_weight else rows
    distances = signed.abs()
    relative = signed / distances.mean(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    inner = relative.clamp(-MOST_DISTANCE, MOST_DISTANCE).cpu()
    return LatentWeights(
        total=rows.numel(),
        near=tuple(int((relative.abs() < part).sum()) for part in NEAR),
        within_step=tuple(int((distances < rate).sum()) for rate in learning_rates),
        without_gradient=int((distances > 1).sum()),
        histogram=tuple(inner.histc(BINS, -MOST_DISTANCE, MOST_DISTANCE).int().tolist()),
    )


# ---- Activations ----


class SignCounter:
    """
    Counts the +1 of 1-bit activations.

    Attributes:
        positive: number of +1 of each channel.
        rows: number of tokens counted, of all images; four for each output token of patch embeddings.
    """

    def __init__(self, shift: torch.Tensor):
        self.positive = torch.zeros_like(shift, dtype=torch.int64)
        self.rows = 0

    def add(self, values: torch.Tensor) -> None:
        """Count the signs of shifted activations `(..., channels)`. Zero is positive, as in `binary_sign`."""
        signs = values.flatten(0, -2) >= 0
        self.positive += signs.sum(0)
        self.rows += signs.shape[0]

    @property
    def share(self) -> float:
        """Share of +1."""
        return self.positive.sum().item() / (self.rows * self.channels)

    @property
    def channels(self) -> int:
        return len(self.positive)

    @property
    def constant(self) -> int:
        """Number of channels with the same sign everywhere: they tell tokens and images not apart."""
        return int(((self.positive == 0) | (self.positive == self.rows)).sum())


@contextmanager
def counted_signs(model: nn.Module) -> Iterator[tuple[dict[str, SignCounter], dict[str, SignCounter]]]:
    """
    Count the signs of 1-bit activations in the forward passes inside of this context.

    Yields:
        Counters of the inputs of the layers, by the layer's name; and of the operands of the attention products, by the
        name of the projection (`….attention.query`, `….key`, `….value`).
    """
    inputs = {
        name: SignCounter(layer.shift) for name, layer in quantizable_layers(model).items() if layer.input_bits == 1
    }
    operands: dict[str, SignCounter] = {}
    with ExitStack() as stack:

        def watch(module: nn.Module, hook: Callable) -> None:
            stack.callback(module.register_forward_hook(hook).remove)

        for name, counter in inputs.items():
            watch(model.get_submodule(name), input_hook(counter))
        for name, attention in attentions(model).items():
            for role in ("query", "key", "value") if attention.input_bits == 1 else ():
                shift = getattr(attention, f"{role}_shift")
                counter = operands[f"{name}.{role}"] = SignCounter(shift)
                watch(getattr(attention, role), operand_hook(counter, shift))
        yield inputs, operands


def input_hook(counter: SignCounter) -> Callable:
    def count(layer, inputs, output):
        (hidden_states,) = inputs
        if is_patch_layer(layer):  # four neighbours side by side, channel by channel
            hidden_states = hidden_states.unflatten(-1, (-1, 4)).transpose(-1, -2)
        counter.add(hidden_states + layer.shift)

    return count


def is_patch_layer(layer: Layer) -> bool:
    return len(weight_shape(layer)) == 4


def operand_hook(counter: SignCounter, shift: torch.Tensor) -> Callable:
    return lambda module, inputs, output: counter.add(output + shift)

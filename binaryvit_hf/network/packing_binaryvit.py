# SPDX-License-Identifier: Apache-2.0
"""
Packed weights: their bits, the layer that computes with them, and latent weights made from them.

A packed weight is a `uint8` tensor `(out, bytes)` and a float scale. Each row holds whole numbers of 1, 2, 4 or 8 bits,
the first input channel in the lowest bits of the first byte. Zeros fill the last byte. 1 bit stands for -1 or +1 and has
one scale per row. Wider numbers are stored plus `2**(width - 1) - 1` and have one scale per tensor.
"""

import torch
from torch import nn

from .functional_binaryvit import weight_levels
from .layers_binaryvit import BinaryLayer, BinaryLinear, BinaryPatchConv, quantized_linear


PACKED_WIDTHS = {1: 1, 2: 2, 3: 4, 4: 4, 5: 8, 6: 8, 7: 8, 8: 8}  # bits of a stored number, by bits of the weight
SMALLEST_LATENT = 1e-30  # the sign of a zero cannot be chosen


# ---- Bits ----


def pack_levels(levels: torch.Tensor, width: int) -> torch.Tensor:
    """Store whole numbers `(out, in)` in `width` bits each: `uint8` `(out, ceil(in * width / 8))`."""
    codes = (levels > 0 if width == 1 else levels + level_offset(width)).to(torch.uint8)
    per_byte = 8 // width
    codes = nn.functional.pad(codes, (0, -codes.shape[1] % per_byte)).unflatten(1, (-1, per_byte))
    return (codes << bit_positions(width, codes.device)).sum(-1, dtype=torch.uint8)


def unpack_levels(packed: torch.Tensor, width: int, columns: int) -> torch.Tensor:
    """The whole numbers that `pack_levels` stored, `int16` `(out, columns)`."""
    codes = (packed.unsqueeze(-1) >> bit_positions(width, packed.device)) & (2**width - 1)
    codes = codes.flatten(1)[:, :columns].to(torch.int16)
    return 2 * codes - 1 if width == 1 else codes - level_offset(width)


def bit_positions(width: int, device: torch.device) -> torch.Tensor:
    return torch.arange(0, 8, width, dtype=torch.uint8, device=device)


def level_offset(width: int) -> int:
    return 2 ** (width - 1) - 1


# ---- Layers ----


class PackedLinear(nn.Module):
    """
    A `BinaryLinear` or `BinaryPatchConv` with packed weight: `(..., in) -> (..., out)`, bit-identical outputs.

    Args:
        layer: the layer to replace. Its shift is shared; `pack` stores its weight.
    """

    def __init__(self, layer: BinaryLayer):
        super().__init__()
        self.weight_bits, self.input_bits, self.clip_value = layer.weight_bits, layer.input_bits, layer.clip_value
        self.weight_shape = tuple(layer.weight.shape)
        self.width = PACKED_WIDTHS[layer.weight_bits]
        self.in_features, self.out_features = layer.weight[0].numel(), layer.weight.shape[0]
        row_bytes = -(-self.in_features * self.width // 8)
        num_scales = self.out_features if self.weight_bits == 1 else 1
        self.shift = layer.shift
        device, dtype = self.shift.device, self.shift.dtype
        packed_weight = torch.zeros(self.out_features, row_bytes, dtype=torch.uint8, device=device)
        self.register_buffer("packed_weight", packed_weight)
        self.register_buffer("weight_scale", torch.ones(num_scales, 1, dtype=dtype, device=device))

    @property
    def layer_class(self) -> type[BinaryLayer]:
        """Class of the layer that was packed."""
        return BinaryLinear if len(self.weight_shape) == 2 else BinaryPatchConv

    @torch.no_grad()
    def pack(self, layer: BinaryLayer, name: str) -> None:
        """
        Store the weight of `layer`, which is called `name`.

        Raises:
            ValueError: the weight is not finite.
        """
        # Packed on the CPU: another device sums in another order, which could change a sign.
        weight = layer.weight.cpu()
        if not weight.isfinite().all():
            raise ValueError(f"Tensor {name + '.weight'!r} is not finite, so it cannot be packed.")
        levels, scale = weight_levels(weight, self.weight_bits, self.clip_value, layer.centers_weight)
        self.packed_weight.copy_(pack_levels(levels.flatten(1), self.width))
        self.weight_scale.copy_(scale.reshape(-1, 1))

    def unpack(self) -> torch.Tensor:
        """The quantised weight, whole numbers times scale: `(out, in)`."""
        levels = unpack_levels(self.packed_weight, self.width, self.in_features)
        return self.weight_scale * levels.to(self.weight_scale.dtype)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        # A convolution has one shift for the four neighbours of a channel.
        shift = self.shift.repeat_interleave(self.in_features // self.shift.shape[0])
        bits = self.weight_bits, self.input_bits
        return quantized_linear(hidden_states, shift, self.unpack(), *bits, self.clip_value)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, weight_bits={self.weight_bits}"


def binary_layers(model: nn.Module) -> dict[str, BinaryLayer]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, BinaryLayer)}


def expect_packed_layers(model: nn.Module) -> None:
    """Replace every binary layer by a `PackedLinear` without weights, to be loaded."""
    for name, layer in binary_layers(model).items():
        model.set_submodule(name, PackedLinear(layer).train(layer.training))


def packed_layers(model: nn.Module) -> dict[str, PackedLinear]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, PackedLinear)}


def unpacked_layer(packed: PackedLinear, config, weight: torch.Tensor) -> BinaryLayer:
    """The layer that `packed` replaced, with another weight `(out, in)`."""
    out_features, in_features = packed.weight_shape[:2]
    with torch.device("meta"):
        layer = packed.layer_class(config, in_features, out_features)
    layer.weight = nn.Parameter(weight.view(packed.weight_shape))
    layer.shift = packed.shift
    return layer.train(packed.training)


# ---- Latent weights of packed layers ----


@torch.no_grad()
def latent_weight(packed: PackedLinear, dtype: torch.dtype, name: str) -> torch.Tensor:
    """
    A weight `(out, in)` that packs to the bits of `packed`, whose name is `name`: its levels times its scale.

    Every weight is where it has a gradient, so it can learn. Therefore 2 to 8 bits end at the clip value, and rows of
    1 bit with a large scale are not symmetric (`spread_rows`, `offset_rows`).

    Raises:
        ValueError: no weight packs to these bits.
    """
    levels = unpack_levels(packed.packed_weight.cpu(), packed.width, packed.in_features).float()
    scale = packed.weight_scale.cpu().float()
    center = packed.layer_class.centers_weight
    if packed.weight_bits > 1:
        candidates = [(scale * levels).clamp(-packed.clip_value, packed.clip_value)]
    else:
        scale = torch.where((scale >= 0) & (scale < SMALLEST_LATENT), SMALLEST_LATENT, scale)
        plain = scale * levels
        # Rounding spoils the offset of a huge scale; such rows stay symmetric.
        candidates = [offset_rows(levels, scale), plain] if center else [spread_rows(levels, scale)]
    candidates = [weight.to(dtype) for weight in candidates]

    def packs(weight: torch.Tensor) -> torch.Tensor:
        """Whether each row `(out, 1)` of a weight packs to the same levels."""
        found, _ = weight_levels(weight.view(packed.weight_shape), packed.weight_bits, packed.clip_value, center)
        return (found.flatten(1) == levels).all(1, keepdim=True)

    weight, *others = candidates
    for other in others:
        weight = torch.where(packs(weight), weight, other)
    if center and packed.weight_bits == 1:
        for row in (~packs(weight)).flatten().nonzero().flatten().tolist():
            weight[row] = constant_row(levels[row], scale[row].to(dtype))
    if not packs(weight).all():
        raise ValueError(
            f"No {str(dtype).removeprefix('torch.')} weight packs to the bits of {name + '.packed_weight'!r}, so the model "
            "cannot be trained further: the file was edited, or float32 is needed."
        )
    return weight.to(packed.packed_weight.device)


def offset_rows(levels: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """
    Rows of a `BinaryLinear`: levels times scale, or the same around the scale where these have no gradient.

    A centred weight learns if its magnitude is at most 1. A row around `scale` has the mean magnitude `scale`, however
    small its differences are, so they are scaled to 0.5.
    """
    centered = scale * (levels - levels.mean(1, keepdim=True))
    largest = centered.abs().amax(1, keepdim=True)
    return torch.where(largest > 1, scale + centered * (0.5 / largest), scale * levels)


def spread_rows(levels: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """
    Rows of a `BinaryPatchConv`: levels times scale, or 0.5 where these have no gradient.

    A weight learns if its magnitude is at most 1. A mean magnitude above 1 needs weights above 1, so the first weight
    of such a row takes all that the others lack.
    """
    magnitude = scale.clamp(max=1).expand_as(levels).clone()
    wide = scale.flatten() > 1
    magnitude[wide] = 0.5
    magnitude[wide, 0] = (levels.shape[1] * scale[wide] - 0.5 * (levels.shape[1] - 1)).flatten()
    return magnitude * levels


def constant_row(levels: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """
    A row of equal weights near plus or minus `scale`, whose rounded mean gives `levels` `(in,)` of one sign.

    A centred row has both signs, but for the rounding of its mean. So packing made these bits from a row of equal
    weights.
    """
    steps = 1 + torch.arange(64, dtype=torch.float64) * torch.finfo(scale.dtype).eps
    near = torch.stack((steps, -steps, 1 / steps, -1 / steps), 1).flatten()
    rows = (scale * near).to(scale.dtype).unsqueeze(1).repeat(1, len(levels))
    found, _ = weight_levels(rows, 1, 0.0, center=True)
    return rows[(found == levels).all(1).int().argmax()]

"""
Weights as real bits: the format, and the layer that computes with it.

A packed weight is a `uint8` tensor `(out, bytes)` and a float scale. Each row holds the whole numbers that `scale`
multiplies, 1, 2, 4 or 8 bits wide, the first input channel in the lowest bits of the first byte; the last byte is
filled up with zeros. 1 bit stands for -1 or +1 and has a scale per row. Wider ones store the number plus
`2**(width - 1) - 1` and have one scale for the tensor: 2 bits for ternary, 4 for 3 and 4, 8 for 5 to 8 bit weights.
"""

import torch
from torch import nn

from .layers_binaryvit import BinaryLinear, BinaryPatchConv, quantized_linear
from .quantizers_binaryvit import weight_levels


PACKED_WIDTHS = {1: 1, 2: 2, 3: 4, 4: 4, 5: 8, 6: 8, 7: 8, 8: 8}


def pack_levels(levels: torch.Tensor, width: int) -> torch.Tensor:
    """Whole numbers `(out, in)` to `uint8 (out, ceil(in * width / 8))`."""
    codes = (levels > 0 if width == 1 else levels + level_offset(width)).to(torch.uint8)
    per_byte = 8 // width
    codes = nn.functional.pad(codes, (0, -codes.shape[1] % per_byte)).unflatten(1, (-1, per_byte))
    return (codes << bit_positions(width, codes.device)).sum(-1, dtype=torch.uint8)


def unpack_levels(packed: torch.Tensor, width: int, columns: int) -> torch.Tensor:
    """What `pack_levels` packed, `(out, columns)`, as `int16`."""
    codes = (packed.unsqueeze(-1) >> bit_positions(width, packed.device)) & (2**width - 1)
    codes = codes.flatten(1)[:, :columns].to(torch.int16)
    return 2 * codes - 1 if width == 1 else codes - level_offset(width)


def bit_positions(width: int, device: torch.device) -> torch.Tensor:
    return torch.arange(0, 8, width, dtype=torch.uint8, device=device)


def level_offset(width: int) -> int:
    return 2 ** (width - 1) - 1


class PackedLinear(nn.Module):
    """
    A `BinaryLinear`, or a `BinaryPatchConv`, whose weight is packed: `(..., in) -> (..., out)`, equal to the last bit.

    Args:
        layer: the layer to stand for; its shift is taken over, its weight is not.
    """

    def __init__(self, layer: BinaryLinear | BinaryPatchConv):
        super().__init__()
        self.weight_bits, self.input_bits, self.clip_value = layer.weight_bits, layer.input_bits, layer.clip_value
        self.weight_shape = tuple(layer.weight.shape)
        self.width = PACKED_WIDTHS[layer.weight_bits]
        self.in_features, self.out_features = layer.weight[0].numel(), layer.weight.shape[0]
        row_bytes = -(-self.in_features * self.width // 8)
        num_scales = self.out_features if self.weight_bits == 1 else 1
        like = layer.shift
        self.shift = layer.shift
        self.register_buffer(
            "packed_weight", torch.zeros(self.out_features, row_bytes, dtype=torch.uint8, device=like.device)
        )
        self.register_buffer("weight_scale", torch.ones(num_scales, 1, dtype=like.dtype, device=like.device))

    @torch.no_grad()
    def pack(self, layer: BinaryLinear | BinaryPatchConv, name: str) -> None:
        """
        Raises:
            ValueError: the weight is not finite, which no bit can say; the message has its `name`.
        """
        # On the CPU, wherever the model is: the order of a device's sums must not decide a sign.
        weight = layer.weight.cpu()
        if not weight.isfinite().all():
            raise ValueError(f"Tensor {name + '.weight'!r} is not finite, so it cannot be packed.")
        center = isinstance(layer, BinaryLinear)
        levels, scale = weight_levels(weight, self.weight_bits, self.clip_value, center)
        self.packed_weight.copy_(pack_levels(levels.flatten(1), self.width))
        self.weight_scale.copy_(scale.reshape(-1, 1))

    def unpack(self) -> torch.Tensor:
        """Whole numbers times scale, `(out, in)`."""
        levels = unpack_levels(self.packed_weight, self.width, self.in_features)
        return self.weight_scale * levels.to(self.weight_scale.dtype)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        # A convolution has one shift for its four neighbours of a channel.
        shift = self.shift.repeat_interleave(self.in_features // self.shift.shape[0])
        bits = self.weight_bits, self.input_bits
        return quantized_linear(hidden_states, shift, self.unpack(), *bits, self.clip_value)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, weight_bits={self.weight_bits}"


def binary_layers(model: nn.Module) -> dict[str, BinaryLinear | BinaryPatchConv]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, (BinaryLinear, BinaryPatchConv))}


def expect_packed_layers(model: nn.Module) -> None:
    """Put a `PackedLinear`, still without weights, in the place of every binary layer."""
    for name, layer in binary_layers(model).items():
        model.set_submodule(name, PackedLinear(layer).train(layer.training))


def pack_layers(model: nn.Module) -> None:
    """
    Pack every binary layer of a model in place.

    Raises:
        ValueError: a weight is not finite; the model is as it was.
    """
    packed_layers = {name: PackedLinear(layer) for name, layer in binary_layers(model).items()}
    for name, packed in packed_layers.items():
        packed.pack(model.get_submodule(name), name)
    for name, packed in packed_layers.items():
        model.set_submodule(name, packed.train(model.training))


def unpack_layers(model: nn.Module) -> None:
    """Put layers of full-precision weights, `levels * scale`, in the place of packed ones, and say so in the config."""
    model.config.weight_bits = 32
    for name, packed in list(model.named_modules()):
        if isinstance(packed, PackedLinear):
            model.set_submodule(name, unpacked_layer(packed, model.config).train(packed.training))


def unpacked_layer(packed: PackedLinear, config) -> BinaryLinear | BinaryPatchConv:
    out_features, in_features = packed.weight_shape[:2]
    kind = BinaryLinear if len(packed.weight_shape) == 2 else BinaryPatchConv
    with torch.device("meta"):
        layer = kind(config, in_features, out_features)
    layer.weight = nn.Parameter(packed.unpack().view(packed.weight_shape))
    layer.shift = packed.shift
    return layer

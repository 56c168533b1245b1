"""
Count the operations and bytes of a network.

The network is built and run once on the meta device, where tensors have a shape but no memory.
"""

import functools
import re
from collections import Counter
from dataclasses import dataclass, fields

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, ViTConfig
from transformers.models.vit.modeling_vit import ViTAttention

from binaryvit_runtime.errors import LoadingError, UserError, first_sentence

from .loading import build_classifier
from .network.configuration_binaryvit import BinaryViTConfig, as_pair
from .network.layers_binaryvit import BinaryLayer
from .network.modeling_binaryvit import BinaryViTAttention
from .network.packing_binaryvit import expect_packed_layers


CONFIG_CLASSES = {"binaryvit": BinaryViTConfig, "vit": ViTConfig}
ATTENTION_CLASSES = (BinaryViTAttention, ViTAttention)
PRODUCT_CLASSES = (nn.Linear, nn.Conv2d, BinaryLayer, *ATTENTION_CLASSES)
# Kinds of layer and patterns of module names, in our network and in transformers' ViT. The first match counts.
LAYER_KINDS = {
    "patch embedding (stem)": r"\.embeddings\.(patch_embeddings\.)?projection$",
    "patch embeddings between stages": r"\.patch_embeddings\.projection$",
    "sequence reduction": r"\.reduction\.linear$",
    "query, key, value": r"\.(query|key|value)\.linear$|\.[qkv]_proj$",
    "attention products": r"\.attention$",
    "attention output": r"\.output\.linear$|\.o_proj$",
    "MLP": r"\.fc[12](\.linear)?$",
    "classifier": r"^classifier$",
    "norms, activations, scales, positions": "",
}
TABLE_HEAD = ("kind of layer", "layers", "BOPs", "FLOPs", "OPs", "parameters", "bytes packed", "bytes float32")


@dataclass(frozen=True)
class LayerCost:
    """
    Cost of all layers of one kind, for one image.

    Args:
        kind: name of the kind of layer, a key of `LAYER_KINDS`.
        layers: number of modules that compute a product or hold tensors of their own.
        bops: bit operations, which are multiply-accumulates times the bits of both operands.
        flops: multiply-accumulates with a full-precision operand.
        parameters: number of parameters, of any width.
        packed_bytes: bytes in a packed checkpoint whose floats are float32 (format: `quantization_binaryvit`).
        float_bytes: bytes in a latent checkpoint in float32.
    """

    kind: str
    layers: int
    bops: int
    flops: int
    parameters: int
    packed_bytes: int
    float_bytes: int

    @property
    def ops(self) -> float:
        """`FLOPs + BOPs / 64`: one instruction computes 64 bit operations (ReActNet, Liu et al., ECCV 2020)."""
        return self.flops + self.bops / 64


def count_operations(config: PreTrainedConfig) -> list[LayerCost]:
    """
    Count operations and storage of an image classifier, by kind of layer.

    Operations are multiply-accumulates of one image of the config's size:

    - `OPs = FLOPs + BOPs / 64` (ReActNet, Liu et al., ECCV 2020).
    - A product of M-bit by N-bit operands is M * N bit operations (DoReFa-Net, Zhou et al., 2016).
    - A product with a 32-bit operand is a FLOP, even if the other operand is a 1-bit weight.
    - Both operands of the attention products have `input_bits`.
    - Normalisation, activations, softmax, pooling, scales and additions are not counted.

    Every tensor of the checkpoint belongs to one kind: weights, biases, scales of packed weights and shifts of inputs
    to the kind of their layer; the others, such as statistics of batch normalisation, to the last kind.

    Args:
        config: of BinaryViT or of transformers' ViT. A config of packed weights counts like its latent network.

    Returns:
        The kinds of layer that the network has, in the order of `LAYER_KINDS`.

    Raises:
        UserError: the config has another model type, or its network does not take an image.
    """
    costs = {kind: [] for kind in LAYER_KINDS}
    for cost in count_layers(config).values():
        costs[cost.kind].append(cost)
    return [total(layers, kind) for kind, layers in costs.items() if layers]


def count_layers(config: PreTrainedConfig) -> dict[str, LayerCost]:
    """
    As `count_operations`, for each module that computes a product or holds tensors of its own, by its name in the latent
    network.
    """
    model = build_on_meta(config)
    products = count_products(model)
    parameters = sum_by_module({name: parameter.numel() for name, parameter in model.named_parameters()})
    float_bytes = sum_by_module({name: tensor.nbytes for name, tensor in model.state_dict().items()})
    if getattr(model.config, "weight_bits", 32) < 32:
        expect_packed_layers(model)
    packed_bytes = sum_by_module({name: tensor.nbytes for name, tensor in model.state_dict().items()})

    costs = {}
    for name in dict.fromkeys((*float_bytes, *products)):
        kind = next(kind for kind, pattern in LAYER_KINDS.items() if re.search(pattern, name))
        bops, flops = products.get(name, (0, 0))
        costs[name] = LayerCost(kind, 1, bops, flops, parameters[name], packed_bytes[name], float_bytes[name])
    return costs


def total(costs: list[LayerCost], kind: str = "in all") -> LayerCost:
    """The sum of costs, under one name."""
    numbers = [field.name for field in fields(LayerCost) if field.name != "kind"]
    return LayerCost(kind, *(sum(getattr(cost, name) for cost in costs) for name in numbers))


def format_table(costs: list[LayerCost]) -> str:
    """A table for the terminal with a line for each kind of layer, then the total. At most 110 characters wide."""
    rows: list[tuple[str, ...]] = [TABLE_HEAD]
    for cost in (*costs, total(costs)):
        counts = (readable(number) for number in (cost.bops, cost.flops, cost.ops, cost.parameters))
        sizes = (readable(size, "B") for size in (cost.packed_bytes, cost.float_bytes))
        rows.append((cost.kind, str(cost.layers), *counts, *sizes))
    return align_columns(rows)


def align_columns(rows: list[tuple[str, ...]]) -> str:
    """Rows of a table as text: the first column is aligned left, the others right."""
    first, *others = (max(len(cell) for cell in column) for column in zip(*rows))
    return "\n".join(
        "  ".join([name.ljust(first), *(cell.rjust(width) for cell, width in zip(cells, others))])
        for name, *cells in rows
    )


def build_on_meta(config: PreTrainedConfig) -> PreTrainedModel:
    """The latent image classifier of a config on the meta device, in float32."""
    if config.model_type not in CONFIG_CLASSES:
        raise UserError(
            f"Operations are counted for the model types {' and '.join(CONFIG_CLASSES)}, "
            f"not for {config.model_type!r}."
        )
    latent = config.to_dict()
    latent.pop("quantization_config", None)
    config = CONFIG_CLASSES[config.model_type].from_dict(latent)
    with torch.device("meta"):
        # Eager attention returns its probabilities, whose shape counts.
        return build_classifier(config, dtype=torch.float32, attn_implementation="eager")


@torch.no_grad()
def count_products(model: PreTrainedModel) -> dict[str, tuple[int, int]]:
    """BOPs and FLOPs of one image, by the name of the module that computes the product."""
    products = {}

    def record(name, module, inputs, output):
        input_bits = getattr(module, "input_bits", 32)
        if isinstance(module, ATTENTION_CLASSES):
            probabilities = output[1]  # (1, heads, queries, keys)
            other_bits, multiplications = input_bits, 2 * probabilities.numel() * module.head_dim  # q k^T and p v
        else:
            other_bits = getattr(module, "weight_bits", 32)
            multiplications = output.numel() * module.weight[0].numel()
        quantised = 32 not in (input_bits, other_bits)
        products[name] = (multiplications * input_bits * other_bits, 0) if quantised else (0, multiplications)

    for name, module in model.named_modules():
        if isinstance(module, PRODUCT_CLASSES):
            module.register_forward_hook(functools.partial(record, name))
    config = model.config
    try:
        model.eval()(torch.empty(1, config.num_channels, *as_pair(config.image_size), device="meta"))
    except Exception as error:  # layers may raise anything
        raise LoadingError(f"the network of the config cannot process an image: {first_sentence(error)}") from error
    return products


def sum_by_module(numbers: dict[str, int]) -> Counter:
    """Add up numbers of tensors (by tensor name) for each module (by module name)."""
    sums = Counter()
    for name, number in numbers.items():
        sums[name.rpartition(".")[0]] += number
    return sums


def readable(number: float, unit: str = "") -> str:
    """Format a number with three digits and a decimal prefix: `4.54 G`, `58.2 M`, `8.63 MB`."""
    prefix = ""
    for larger in "kMGT":
        if number < 999.5:
            break
        number, prefix = number / 1000, larger
    digits = f"{number:#.3g}".rstrip(".") if prefix else f"{number:.0f}"
    return f"{digits} {prefix}{unit}".rstrip()

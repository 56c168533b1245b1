"""
Write an image classifier as ONNX, with its preprocessing in the metadata.

The file computes what the model computes in evaluation, with ordinary operations on floats, so any runtime takes it.
Products of signs are exact in floats. Only roundings between them differ from PyTorch.
"""

import copy
import json
import logging
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import onnxscript  # noqa: F401, torch.onnx would report its absence only after the network is traced
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx_ir.passes.common import ClearMetadataAndDocStringPass
from PIL import Image
from torch import nn
from transformers import BaseImageProcessor, PreTrainedModel

from binaryvit_runtime.errors import UserError
from binaryvit_runtime.pixels import read_background, to_rgb
from binaryvit_runtime.writing import write_file

from .network.configuration_binaryvit import as_pair
from .network.engine_binaryvit import ModelState
from .network.functional_binaryvit import fold_norm, quantize_input, weight_levels
from .network.layers_binaryvit import AvgPoolBranches, BinaryLinear, NormActivation, TokenBatchNorm
from .network.packing_binaryvit import PackedLinear, binary_layers, unpack_levels


OPSET = 18
INPUT, OUTPUT = "pixel_values", "logits"
MOST_BYTES = 2**31 - 1  # of a file of Protocol Buffers


class ExportedFile(NamedTuple):
    """Bytes of an exported file, and of the same file with all weights in float32."""

    bytes: int
    float_bytes: int


def export_onnx(model: PreTrainedModel, processor: BaseImageProcessor | None, file: Path) -> ExportedFile:
    """
    Write a BinaryViT, latent or packed, as ONNX. The file is written whole or not at all.

    - Input `pixel_values` `(batch, channels, height, width)`, normalised; output `logits` `(batch, labels)`, both
      float32. The batch has any size.
    - Weights of 1 to 8 bits are whole numbers in int8, which a node `Cast` turns into floats. Their scales are floats
      that multiply the product.
    - The metadata holds the preprocessing and the names of the labels (`describe_preprocessing`). The description
      (`doc_string`) says in a sentence what the network is and how to prepare its input.

    Args:
        model: in float32, on the CPU, without hooks.
        processor: `None` leaves the preprocessing out.

    Raises:
        UserError: the model is not as above, the network is larger than a file of ONNX may be, the metadata cannot
            describe the image processor, or the file cannot be written.
    """
    check_exportable(model)
    preprocessing = describe_preprocessing(processor) if processor else {}
    network = EvaluationNetwork(model)
    if sum(tensor.nbytes for tensor in network.state_dict().values()) > MOST_BYTES:
        raise UserError(f"The network is too large for ONNX, whose files have at most {MOST_BYTES / 1e9:.1f} GB.")
    proto = trace(network, image_shape(model))
    saved = store_whole_numbers(proto)
    helper.set_model_props(proto, describe_labels(model) | preprocessing)
    proto.doc_string = describe_network(model, list(preprocessing))
    onnx.checker.check_model(proto, full_check=True)
    content = proto.SerializeToString()
    write_file(file, content)
    return ExportedFile(len(content), len(content) + saved)


def check_exportable(model: PreTrainedModel) -> None:
    """
    Raises:
        UserError: a tensor is offloaded, on another device or not in float32, or a module has a hook.
    """
    for name, tensor in model.state_dict().items():
        if tensor.device.type != "cpu" or (tensor.is_floating_point() and tensor.dtype != torch.float32):
            kind = f"{str(tensor.dtype).removeprefix('torch.')} on the device {tensor.device.type!r}"
            raise UserError(f"Tensor {name!r} is {kind}: load the model with dtype=torch.float32 and no device_map.")
    if ModelState(model).has_hooks():
        raise UserError("The model has hooks, which a file of ONNX cannot hold: remove them.")


def image_shape(model: PreTrainedModel) -> tuple[int, int, int]:
    height, width = as_pair(model.config.image_size)
    return model.config.num_channels, height, width


# ---- The network ----


class EvaluationNetwork(nn.Module):
    """
    The logits of a model in evaluation, with few operations to trace: `pixel_values -> logits`.

    Args:
        model: is not changed.
    """

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        packed = {name: layer for name, layer in self.model.named_modules() if isinstance(layer, PackedLinear)}
        for name, layer in (packed | binary_layers(self.model)).items():
            if layer.weight_bits < 32:
                self.model.set_submodule(name, LinearOfLevels(layer))
        for name, module in list(self.model.named_modules()):
            if isinstance(module, NormActivation):
                self.model.set_submodule(name, FoldedNormActivation(module))
            if isinstance(module, AvgPoolBranches) and len(module) > 0:
                self.model.set_submodule(name, FoldedAvgPools(module))
        for name, module in list(self.model.named_modules()):
            if isinstance(module, TokenBatchNorm):
                self.model.set_submodule(name, FoldedNorm(module))

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.model(pixel_values, return_dict=True).logits


class LinearOfLevels(nn.Module):
    """A binary layer as a product with whole numbers, then with their scale: `(..., in) -> (..., out)`."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.input_bits, self.clip_value = layer.input_bits, layer.clip_value
        if isinstance(layer, PackedLinear):
            levels, scale = unpack_levels(layer.packed_weight, layer.width, layer.in_features), layer.weight_scale
        else:
            center = isinstance(layer, BinaryLinear)
            levels, scale = weight_levels(layer.weight, layer.weight_bits, layer.clip_value, center)
        self.register_buffer("levels", levels.flatten(1).float())
        self.register_buffer("scale", scale.flatten())
        # A convolution has one shift for the four neighbours of a channel.
        self.register_buffer("shift", layer.shift.repeat_interleave(self.levels.shape[1] // layer.shift.shape[0]))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.input_bits == 1:  # two operations, not the five of `quantize_input`
            quantized = torch.where(hidden_states + self.shift >= 0, 1.0, -1.0)
        else:
            quantized = quantize_input(hidden_states, self.shift, self.input_bits, self.clip_value)
        return nn.functional.linear(quantized, self.levels) * self.scale


class FoldedNorm(nn.Module):
    """`TokenBatchNorm` by running statistics: `scale * x + offset`. `shift` `(channels,)` is added to the result."""

    def __init__(self, layer: TokenBatchNorm, shift: torch.Tensor | float = 0.0):
        super().__init__()
        norm = layer.batch_norm
        scale, offset = fold_norm(norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias + shift)
        self.register_buffer("scale", scale)
        self.register_buffer("offset", offset)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states * self.scale + self.offset


class FoldedNormActivation(nn.Module):
    """`NormActivation` by running statistics."""

    def __init__(self, layer: NormActivation):
        super().__init__()
        self.norm = FoldedNorm(layer.norm, -layer.activation.shift_in)
        self.register_buffer("slope", layer.activation.slope.data)
        self.register_buffer("shift_out", layer.activation.shift_out.data)

    def forward(self, hidden_states: torch.Tensor, shortcut: torch.Tensor) -> torch.Tensor:
        shifted = self.norm(hidden_states) + fit_shortcut(shortcut, hidden_states.shape[-1])
        # torch.prelu has its slopes along the second dimension, which is the tokens here.
        return torch.where(shifted > 0, shifted, self.slope * shifted) + self.shift_out


class FoldedAvgPools(nn.Module):
    """`AvgPoolBranches` as one depthwise convolution, whose kernels hold `scale / (height * width)` of every branch."""

    def __init__(self, branches: AvgPoolBranches):
        super().__init__()
        self.padding = max(size // 2 for branch in branches for size in branch.kernel_size)
        scales = [branch.layer_scale.scale.data for branch in branches]
        kernels = torch.zeros(len(scales[0]), 1, 2 * self.padding + 1, 2 * self.padding + 1)
        for scale, (height, width) in zip(scales, (branch.kernel_size for branch in branches)):
            top, left = self.padding - height // 2, self.padding - width // 2
            kernels[:, 0, top : top + height, left : left + width] += scale.view(-1, 1, 1) / (height * width)
        self.register_buffer("kernels", kernels)
        self.register_buffer("shift", sum(branch.layer_scale.shift.data for branch in branches))

    def forward(self, hidden_states: torch.Tensor, pooled: torch.Tensor, grid_size: tuple[int, int]) -> torch.Tensor:
        # (batch, height * width, channels) -> (batch, channels, height, width)
        token_map = pooled.unflatten(1, grid_size).permute(0, 3, 1, 2)
        means = nn.functional.conv2d(token_map, self.kernels, self.shift, padding=self.padding, groups=len(self.shift))
        return hidden_states + means.flatten(2).transpose(1, 2)


def fit_shortcut(shortcut: torch.Tensor, channels: int) -> torch.Tensor:
    """The channels of a shortcut repeated or averaged, as `add_fitted_` adds them: `(..., in) -> (..., channels)`."""
    if channels < shortcut.shape[-1]:
        return shortcut.unflatten(-1, (channels, -1)).mean(-1)
    repeats = channels // shortcut.shape[-1]
    return shortcut if repeats == 1 else torch.cat((shortcut,) * repeats, dim=-1)


@torch.no_grad()
def trace(network: nn.Module, shape: tuple[int, int, int]) -> onnx.ModelProto:
    """The graph of a network for any number of images of this shape."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)  # the exporter warns of what this network does not use
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                network,
                (torch.zeros(2, *shape),),  # a batch of 1 would be traced as always 1
                input_names=[INPUT],
                output_names=[OUTPUT],
                opset_version=OPSET,
                dynamo=True,
                dynamic_shapes={INPUT: {0: torch.export.Dim("batch")}},
                verbose=False,
            )
    finally:
        logging.disable(disabled)
    # Stack traces with paths of this machine, several times the size of the weights.
    ClearMetadataAndDocStringPass()(program.model)
    return program.model_proto


def store_whole_numbers(proto: onnx.ModelProto) -> int:
    """Store float matrices of whole numbers in int8, which a `Cast` reads. Returns the number of bytes saved."""
    casts, saved = [], 0
    for tensor in proto.graph.initializer:
        values = numpy_helper.to_array(tensor)
        if tensor.data_type != TensorProto.FLOAT or values.ndim != 2:
            continue
        levels = values.clip(-127, 127).astype(np.int8)
        if (levels == values).all():
            name, stored = tensor.name, f"{tensor.name}_int8"
            tensor.CopyFrom(numpy_helper.from_array(levels, stored))
            casts.append(helper.make_node("Cast", [stored], [name], name=f"{name}_cast", to=TensorProto.FLOAT))
            saved += values.nbytes - levels.nbytes
    nodes = [*casts, *proto.graph.node]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    return saved


# ---- Metadata ----


def describe_network(model: PreTrainedModel, steps: list[str]) -> str:
    """
    What the network is and how to prepare its input, in one sentence.

    Args:
        steps: names of the steps of preprocessing in the metadata.
    """
    config, (_, height, width) = model.config, image_shape(model)
    by = f"by the metadata {', '.join(steps)}, in this order" if steps else "in a way that the metadata does not say"
    return (
        f"BinaryViT, an image classifier of {config.num_labels} classes with {config.weight_bits}-bit weights and "
        f"{config.input_bits}-bit inputs of its layers: it takes images of {height} x {width} pixels, prepared {by}."
    )


def describe_labels(model: PreTrainedModel) -> dict[str, str]:
    """The metadata `labels`: a JSON list of the names of the logits."""
    config = model.config
    return {"labels": json.dumps([config.id2label[index] for index in range(config.num_labels)])}


def describe_preprocessing(processor: BaseImageProcessor) -> dict[str, str]:
    """
    The steps from a picture to `pixel_values`, each as JSON, in the order of their use. `null` leaves a step out.

    - `background`: the colour to put behind transparent pixels, such as "#ffffff". `null` drops transparency.
    - `channel_order`: "RGB" or "BGR".
    - `resize`: `{"height": …, "width": …}`, or `{"shortest_edge": …}`, which keeps the aspect ratio (the other edge is
      rounded down). `resample` is the interpolation in Pillow's words, such as "bicubic".
    - `crop`: `{"height": …, "width": …}` from the centre, on black where the picture is smaller.
    - `rescale_factor`: multiplies the numbers from 0 to 255.
    - `mean`, `std`: of each channel; `(x - mean) / std`.

    `preprocess` follows them.

    Raises:
        UserError: these steps do not give the numbers of the processor.
    """
    fields = processor.to_dict()

    def step(switch: str, name: str):
        return fields.get(name) if fields.get(switch) else None

    size, crop = (
        {edge: length for edge, length in (value or {}).items() if length is not None} or None
        for value in (step("do_resize", "size"), step("do_center_crop", "crop_size"))
    )
    resample = step("do_resize", "resample")
    described = {
        "background": read_background(processor),
        "channel_order": "BGR" if fields.get("do_flip_channel_order") else "RGB",
        "resize": size,
        "resample": None if resample is None else Image.Resampling(resample).name.lower(),
        "crop": crop,
        "rescale_factor": step("do_rescale", "rescale_factor"),
        "mean": step("do_normalize", "image_mean"),
        "std": step("do_normalize", "image_std"),
    }
    check_description(described, processor)
    return {name: json.dumps(value) for name, value in described.items()}


def check_description(steps: dict, processor: BaseImageProcessor) -> None:
    """
    Follow the steps with pictures of random colours, and compare with the processor.

    Raises:
        UserError: the numbers are not the same.
    """
    edges = [*(steps["resize"] or {}).values(), *(steps["crop"] or {}).values()]
    length = max(edges, default=32)
    # Larger than the result, smaller, and so oblong that a limit of the longest edge shows.
    sizes = [
        (length * 5 // 4, length * 3 // 2),
        (length // 2 + 1, length * 2 // 3 + 1),
        (length * 2 // 3 + 1, length * 3),
    ]
    sizes += [(width, height) for height, width in sizes]
    has_known_edges = steps["resize"] is None or set(steps["resize"]) in ({"height", "width"}, {"shortest_edge"})
    if not (has_known_edges and all(describes(steps, processor, *size) for size in sizes)):
        raise UserError(
            f"The {type(processor).__name__} (preprocessor_config.json) does more than the metadata of ONNX can "
            "describe, which is to resize, crop, rescale and normalise: give the model a ViTImageProcessor."
        )


def describes(steps: dict, processor: BaseImageProcessor, height: int, width: int) -> bool:
    """Whether the steps give the numbers of the processor for a picture of this size."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))
    expected = processor(picture, return_tensors="np")["pixel_values"][0]
    # Pillow and torchvision round a pixel differently, by two of 255 levels if they enlarge, before it is normalised.
    rounding = 4 * (steps["rescale_factor"] or 1) / np.min(steps["std"] or 1)
    try:
        described = preprocess(picture, steps)
        return described.shape == expected.shape and bool(np.abs(described - expected).max() < rounding)
    except (KeyError, ValueError):  # an edge of another name, or pictures without a common shape
        return False


def preprocess(picture: Image.Image, steps: dict) -> np.ndarray:
    """`pixel_values` `(channels, height, width)` of a picture, by the steps of `describe_preprocessing`."""
    picture = to_rgb(picture, steps["background"])
    if resize := steps["resize"]:
        if "shortest_edge" in resize:
            shortest = min(picture.size)
            width, height = (int(resize["shortest_edge"] * edge / shortest) for edge in picture.size)
        else:
            width, height = resize["width"], resize["height"]
        picture = picture.resize((width, height), Image.Resampling[steps["resample"].upper()])
    pixels = np.asarray(picture, np.float32)
    if crop := steps["crop"]:
        missing = [max(crop[edge] - length, 0) for edge, length in zip(("height", "width"), pixels.shape)]
        pixels = np.pad(pixels, [*((length // 2, length - length // 2) for length in missing), (0, 0)])
        top, left = (pixels.shape[0] - crop["height"]) // 2, (pixels.shape[1] - crop["width"]) // 2
        pixels = pixels[top : top + crop["height"], left : left + crop["width"]]
    if steps["channel_order"] == "BGR":
        pixels = pixels[..., ::-1]
    pixels = pixels * np.float32(steps["rescale_factor"] or 1)
    if steps["mean"]:
        pixels = (pixels - np.float32(steps["mean"])) / np.float32(steps["std"])
    return pixels.transpose(2, 0, 1)

"""The network of a config.json: its sizes, the names and shapes of its tensors, its labels. Checks what BinaryViTConfig checks."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

from .errors import LoadingError, UnsupportedModelError


QUANT_METHOD = "binaryvit"
PER_STAGE = ("depths", "num_attention_heads", "intermediate_sizes", "sequence_reduction_ratios")
# Least and most of each field, as in BinaryViTConfig: far above useful networks.
RANGES = {
    "image_size": (1, 2**14),
    "patch_size": (1, 2**14),
    "num_channels": (1, 2**10),
    "hidden_sizes": (1, 2**16),
    "depths": (1, 200),
    "num_attention_heads": (1, 2**10),
    "intermediate_sizes": (1, 2**18),
    "sequence_reduction_ratios": (1, 2**14),
    "avg_pool_kernel_sizes": (1, 2**10),
    "quantization_clip_value": (1e-6, 1e6),
    "batch_norm_eps": (1e-30, 1e4),
}
MAX_LIST_LENGTH, MAX_LAYERS, MAX_LABELS, MAX_PARAMETERS, MAX_ACTIVATIONS = 16, 200, 100_000, 10**10, 2**32
FLAGS = ("use_class_token", "use_stem_norm", "use_layer_scale", "binarize_patch_embeddings")
SIZES = ("image_size", "patch_size")


@dataclass(frozen=True)
class Architecture:
    """
    The config fields that decide the outputs. The defaults are BinaryViTConfig's.

    Raises:
        LoadingError: the fields do not describe a network.
    """

    image_size: Any = 224
    patch_size: Any = 4
    num_channels: int = 3
    hidden_sizes: Any = (64, 128, 256, 512)
    depths: Any = (3, 4, 8, 4)
    num_attention_heads: Any = (1, 2, 4, 8)
    intermediate_sizes: Any = (512, 1024, 1024, 2048)
    sequence_reduction_ratios: Any = (8, 4, 1, 1)
    use_class_token: bool = False
    use_stem_norm: bool = True
    use_layer_scale: bool = True
    avg_pool_kernel_sizes: Any = (3, 5)
    binarize_patch_embeddings: bool = True
    weight_bits: int = 1
    input_bits: int = 1
    quantization_clip_value: float = 2.5
    batch_norm_eps: float = 1e-5

    def __post_init__(self):
        self.check_fields()
        self.check_stages()
        self.check_map()

    def check_fields(self) -> None:
        for field, (least, most) in RANGES.items():
            value = getattr(self, field)
            is_list = isinstance(value, (list, tuple))
            kind = (int, float) if isinstance(least, float) else int
            if is_list != (isinstance(getattr(type(self), field), tuple) or (field in SIZES and is_list)):
                raise LoadingError(f"{field} must {'not be' if is_list else 'be'} a list, not {value!r}.")
            numbers = value if is_list else [value]
            if len(numbers) > MAX_LIST_LENGTH:
                raise LoadingError(f"{field} has {len(numbers)} values; the maximum is {MAX_LIST_LENGTH}.")
            # The comparisons also refuse NaN.
            if not all(isinstance(n, kind) and not isinstance(n, bool) and least <= n <= most for n in numbers):
                raise LoadingError(f"{field} must be from {least:g} to {most:g}, not {value!r}.")
        for field in FLAGS:
            if not isinstance(getattr(self, field), bool):
                raise LoadingError(f"{field} must be true or false, not {getattr(self, field)!r}.")
        if any(kernel % 2 == 0 for kernel in self.avg_pool_kernel_sizes):
            raise LoadingError(f"avg_pool_kernel_sizes={list(self.avg_pool_kernel_sizes)} must be odd.")

    def check_stages(self) -> None:
        if not self.hidden_sizes:
            raise LoadingError("hidden_sizes is empty, but a network has at least one stage.")
        for field in PER_STAGE:
            if len(getattr(self, field)) != len(self.hidden_sizes):
                raise LoadingError(f"{field}={list(getattr(self, field))} must have one value per stage.")
        if sum(self.depths) > MAX_LAYERS:
            raise LoadingError(f"depths={list(self.depths)} are more than {MAX_LAYERS} layers.")
        before = 1
        for channels, heads, inner in zip(self.hidden_sizes, self.num_attention_heads, self.intermediate_sizes):
            if channels % heads or inner % channels or channels % before:
                raise LoadingError(
                    f"hidden_sizes={list(self.hidden_sizes)} must be multiples of num_attention_heads and of the stage "
                    "before, and divide intermediate_sizes."
                )
            before = channels
        if self.use_class_token and (
            len(self.hidden_sizes) > 1 or self.avg_pool_kernel_sizes or max(self.sequence_reduction_ratios) > 1
        ):
            raise LoadingError("use_class_token needs one stage, no reduction and no pooling branches.")

    def check_map(self) -> None:
        if any(len(as_pair(getattr(self, field))) != 2 for field in SIZES):
            raise LoadingError("image_size and patch_size must be one number or (height, width).")
        for size, patch in zip(as_pair(self.image_size), as_pair(self.patch_size)):
            for stage, ratio in enumerate(self.sequence_reduction_ratios):
                if size % (patch * 2**stage * ratio):
                    raise LoadingError(
                        f"image_size={self.image_size} cannot be divided by patch_size={self.patch_size}, stages and "
                        "sequence_reduction_ratios."
                    )
        inputs, parameters = self.num_channels * math.prod(as_pair(self.patch_size)), 0
        for stage, (height, width) in enumerate(self.grid_sizes):
            channels, inner, tokens = self.hidden_sizes[stage], self.intermediate_sizes[stage], height * width
            ratio = self.sequence_reduction_ratios[stage]
            parameters += channels * (inputs + tokens)
            parameters += self.depths[stage] * channels * ((4 if ratio == 1 else 5) * channels + 2 * inner)
            inputs = 4 * channels
            probabilities = self.num_attention_heads[stage] * tokens * (tokens // ratio**2)
            if max(probabilities, tokens * inner) > MAX_ACTIVATIONS:
                raise LoadingError(f"stage {stage} has {tokens} tokens an image, too many for its attention or MLP.")
        if parameters > MAX_PARAMETERS:
            raise LoadingError(f"the network has {parameters:.1e} weights; the maximum is {MAX_PARAMETERS:.0e}.")

    @property
    def grid_sizes(self) -> list[tuple[int, int]]:
        """Height and width in tokens of each stage's map."""
        height, width = (size // patch for size, patch in zip(as_pair(self.image_size), as_pair(self.patch_size)))
        return [(height // 2**stage, width // 2**stage) for stage in range(len(self.hidden_sizes))]

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """
        Names and shapes of the tensors of a packed backbone, in any order.

        Names that end in `packed_weight` hold bits (uint8), in `num_batches_tracked` a count (int64). All others are
        floats.
        """
        return dict(self.list_tensors())

    def list_tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        first, patches = self.hidden_sizes[0], as_pair(self.patch_size)
        map_tokens = [height * width for height, width in self.grid_sizes]
        yield "embeddings.position_embeddings", (1, map_tokens[0] + self.use_class_token, first)
        yield "embeddings.projection.weight", (first, self.num_channels, *patches)
        yield "embeddings.projection.bias", (first,)
        if self.use_stem_norm:
            yield from norm("embeddings.norm", first)
        if self.use_class_token:
            yield "embeddings.class_token", (1, 1, first)
        for stage, channels in enumerate(self.hidden_sizes):
            if stage > 0:
                name = f"stages.{stage}.patch_embeddings"
                yield f"{name}.position_embeddings", (1, map_tokens[stage], channels)
                yield from self.patch_embeddings(name, self.hidden_sizes[stage - 1], channels)
            for layer in range(self.depths[stage]):
                yield from self.layer(f"stages.{stage}.layers.{layer}", stage)
        yield from norm("norm", self.hidden_sizes[-1])

    def patch_embeddings(self, name: str, inputs: int, outputs: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield from norm(f"{name}.norm1", inputs)
        if self.binarize_patch_embeddings:
            yield from packed_weight(f"{name}.projection", inputs, outputs, squares=4)
            yield from norm_activation(f"{name}.norm_activation", outputs)
        else:
            yield f"{name}.projection.weight", (outputs, inputs, 2, 2)
            yield from norm(f"{name}.norm2", outputs)

    def layer(self, name: str, stage: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        channels, inner = self.hidden_sizes[stage], self.intermediate_sizes[stage]
        yield from norm(f"{name}.norm1", channels)
        for kind in ("query", "key", "value"):
            yield f"{name}.attention.{kind}_shift", (channels,)
        yield f"{name}.attention.probability_clip", ()
        reduction = ["reduction"] if self.sequence_reduction_ratios[stage] > 1 else []
        for kind in (*reduction, "query", "key", "value", "output"):
            yield from projection(f"{name}.attention.{kind}", channels, channels)
        yield from norm_activation(f"{name}.attention.norm_activation", channels)
        yield from norm(f"{name}.norm2", channels)
        yield from projection(f"{name}.mlp.fc1", channels, inner)
        yield from projection(f"{name}.mlp.fc2", inner, channels)
        scales = ["layer_scale1", "layer_scale2"] if self.use_layer_scale else []
        scales += [f"avg_pool_branches.{branch}.layer_scale" for branch in range(2 * len(self.avg_pool_kernel_sizes))]
        for scale in scales:
            yield f"{name}.{scale}.scale", (channels,)
            yield f"{name}.{scale}.shift", (channels,)


def norm(name: str, channels: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    for field in ("weight", "bias", "running_mean", "running_var"):
        yield f"{name}.batch_norm.{field}", (channels,)
    yield f"{name}.batch_norm.num_batches_tracked", ()


def norm_activation(name: str, channels: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield from norm(f"{name}.norm", channels)
    for field in ("shift_in", "slope", "shift_out"):
        yield f"{name}.activation.{field}", (channels,)


def packed_weight(name: str, inputs: int, outputs: int, squares: int = 1) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.shift", (inputs,)
    yield f"{name}.packed_weight", (outputs, -(-inputs * squares // 8))
    yield f"{name}.weight_scale", (outputs, 1)


def projection(name: str, inputs: int, outputs: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield from packed_weight(f"{name}.linear", inputs, outputs)
    yield from norm_activation(f"{name}.norm_activation", outputs)


def read_architecture(config: dict) -> Architecture:
    """
    The network of a config.json.

    Raises:
        UnsupportedModelError: it is a model that only PyTorch computes.
        LoadingError: the fields do not describe a network.
    """
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise LoadingError("config.json is not a JSON object with the name of a model type ('model_type').")
    if config["model_type"] != "binaryvit":
        raise UnsupportedModelError(f"its model_type is {config['model_type']!r}, not 'binaryvit'")
    packing = config.get("quantization_config")
    if packing is None:
        raise UnsupportedModelError("its weights are not packed (`binaryvit pack` packs them)")
    if not isinstance(packing, dict) or packing.get("quant_method") != QUANT_METHOD:
        raise LoadingError(f"quant_method of the quantization_config must be {QUANT_METHOD!r}.")
    for field in ("weight_bits", "input_bits"):
        if config.get(field, 1) != 1:
            raise UnsupportedModelError(f"its {field} is {config[field]!r}, and the engine multiplies single bits")
    dtype = config.get("dtype", config.get("torch_dtype"))
    if dtype not in (None, "float32"):
        raise UnsupportedModelError(f"its dtype is {dtype!r}, not 'float32'")
    known = [field.name for field in fields(Architecture)]
    return Architecture(**{name: config[name] for name in known if name in config})


def read_labels(config: dict) -> list[str]:
    """
    The label of each logit. As in transformers, a config without labels has two.

    Raises:
        LoadingError: they are not labels.
    """
    id2label, number = config.get("id2label"), config.get("num_labels")
    if number is not None and not (isinstance(number, int) and 1 <= number <= MAX_LABELS):
        raise LoadingError(f"num_labels must be a whole number from 1 to {MAX_LABELS}, not {number!r}.")
    if id2label is None:
        return [f"LABEL_{index}" for index in range(number or 2)]
    if not isinstance(id2label, dict) or not 1 <= len(id2label) <= MAX_LABELS:
        raise LoadingError(f"id2label must map numbers to labels, from 1 to {MAX_LABELS} of them.")
    if set(id2label) != {str(index) for index in range(len(id2label))}:
        raise LoadingError(f"The keys of id2label must be 0 to {len(id2label) - 1}, one of each.")
    labels = [id2label[str(index)] for index in range(len(id2label))]
    if not all(isinstance(label, (str, int)) for label in labels):
        raise LoadingError("The labels of id2label must be text.")
    return labels


def as_pair(size) -> tuple[int, ...]:
    """`(height, width)` of a size that is one number or a pair."""
    return (size, size) if isinstance(size, int) else tuple(size)

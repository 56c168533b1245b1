"""The network of a config.json: its sizes, the names and shapes of its tensors, its labels. Checks what BinaryViTConfig checks."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from typing import Any

from .engine.library import pair
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
    "layer_scale_init_value": (-1e4, 1e4),
    "quantization_clip_value": (1e-6, 1e6),
    "attention_clip_init_value": (1e-6, 1e6),
    "batch_norm_eps": (1e-30, 1e4),
    "batch_norm_momentum": (0, 1),
    "initializer_range": (0, 1e4),
}
PROBABILITIES = ("hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate")
# Types of single numbers that are not whole, as in BinaryViTConfig.
TYPES: dict[str, tuple[type, ...]] = {
    "layer_scale_init_value": (float, int),
    "quantization_clip_value": (float, int),
    "attention_clip_init_value": (float, int),
    "batch_norm_eps": (float,),
    "batch_norm_momentum": (float, int),
    "initializer_range": (float,),
}
# Values of transformers' settings with which the runtime gives the same answers as transformers.
SETTINGS: dict[str, tuple] = {
    "problem_type": (None, "regression", "single_label_classification", "multi_label_classification"),
    "return_dict": (True,),
    "output_hidden_states": (False, None),
    "output_attentions": (False, None),
    "is_encoder_decoder": (False,),
    "chunk_size_feed_forward": (0,),
    "attn_implementation": (None,),
    "per_layer_config": (None,),
    "transformers_weights": (None,),
    "out_features": (None,),
    "out_indices": (None,),
    "configuration_files": (),
    "pretrained_cfg": (),
}
MAX_LIST_LENGTH, MAX_LAYERS, MAX_LABELS = 16, 200, 100_000
MAX_PARAMETERS, MAX_ACTIVATIONS, MAX_TOKENS = 10**10, 2**32, 2**22
TRAINING_FIELDS = ("layer_scale_init_value", "attention_clip_init_value", "batch_norm_momentum", "initializer_range")
OUTPUT_RANGES = [field for field in RANGES if field not in TRAINING_FIELDS]
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
        for field in OUTPUT_RANGES:
            value = getattr(self, field)
            is_list = isinstance(value, (list, tuple))
            if is_list != (isinstance(getattr(type(self), field), tuple) or (field in SIZES and is_list)):
                raise LoadingError(f"{field} must {'not be' if is_list else 'be'} a list, not {value!r}.")
            check_range(field, list(value) if is_list else [value])
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
        if any(len(pair(getattr(self, field))) != 2 for field in SIZES):
            raise LoadingError("image_size and patch_size must be one number or (height, width).")
        for size, patch in zip(pair(self.image_size), pair(self.patch_size)):
            for stage, ratio in enumerate(self.sequence_reduction_ratios):
                if size % (patch * 2**stage * ratio):
                    raise LoadingError(
                        f"image_size={self.image_size} cannot be divided by patch_size={self.patch_size}, stages and "
                        "sequence_reduction_ratios."
                    )
        for stage, (height, width) in enumerate(self.grid_sizes):
            inner, tokens = self.intermediate_sizes[stage], height * width
            ratio = self.sequence_reduction_ratios[stage]
            probabilities = self.num_attention_heads[stage] * tokens * (tokens // ratio**2)
            if tokens > MAX_TOKENS or max(probabilities, tokens * inner) > MAX_ACTIVATIONS:
                raise LoadingError(f"stage {stage} has {tokens} tokens an image, too many for its attention or MLP.")

    def check_size(self, labels: int) -> None:
        """
        Raises:
            LoadingError: the network and a classifier of this number of labels have more than `MAX_PARAMETERS` weights.
        """
        inputs = self.num_channels * math.prod(pair(self.patch_size))
        parameters = self.hidden_sizes[-1] * labels
        for stage, (height, width) in enumerate(self.grid_sizes):
            channels, inner = self.hidden_sizes[stage], self.intermediate_sizes[stage]
            projections = 4 if self.sequence_reduction_ratios[stage] == 1 else 5
            parameters += channels * (inputs + height * width)
            parameters += self.depths[stage] * channels * (projections * channels + 2 * inner)
            inputs = 4 * channels
        if parameters > MAX_PARAMETERS:
            raise LoadingError(f"the network has {parameters:.1e} weights; the maximum is {MAX_PARAMETERS:.0e}.")

    @property
    def grid_sizes(self) -> list[tuple[int, int]]:
        """Height and width in tokens of each stage's map."""
        height, width = (size // patch for size, patch in zip(pair(self.image_size), pair(self.patch_size)))
        return [(height // 2**stage, width // 2**stage) for stage in range(len(self.hidden_sizes))]

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """
        Names and shapes of the tensors of a packed backbone, in any order.

        Names that end in `packed_weight` hold bits (uint8), in `num_batches_tracked` a count (int64). All others are
        floats.
        """
        return dict(self.list_tensors())

    def list_tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        first, patches = self.hidden_sizes[0], pair(self.patch_size)
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


def count_multiplications(network: Any) -> int:
    """
    Multiplications of the linear layers for one image, roughly the cost of a forward.

    Args:
        network: an Architecture or a BinaryViTConfig.
    """
    per_token = (
        depth * (4 * hidden**2 + 2 * hidden * inner)
        for depth, hidden, inner in zip(network.depths, network.hidden_sizes, network.intermediate_sizes)
    )
    return sum(height * width * each for (height, width), each in zip(network.grid_sizes, per_token))


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


def check_range(field: str, numbers: list) -> None:
    """
    Raises:
        LoadingError: a number of a field has another type than in BinaryViTConfig, or is not in its range.
    """
    least, most = RANGES[field]
    if len(numbers) > MAX_LIST_LENGTH:
        raise LoadingError(f"{field} has {len(numbers)} values; the maximum is {MAX_LIST_LENGTH}.")
    # The comparisons also refuse NaN. The type of true is bool.
    if not all(type(number) in TYPES.get(field, (int,)) and least <= number <= most for number in numbers):
        raise LoadingError(
            f"{field} must be from {least:g} to {most:g}, not {numbers if numbers[1:] else numbers[0]!r}."
        )


def check_training_fields(config: dict) -> None:
    """
    Check fields that do not decide the outputs, because BinaryViTConfig refuses a damaged one.

    Raises:
        LoadingError: a number is not in its range.
    """
    for field in TRAINING_FIELDS:
        if field in config:
            check_range(field, [config[field]])
    for field in PROBABILITIES:
        value = config.get(field, 0)
        if type(value) not in (float, int) or not 0 <= value < 1:
            raise LoadingError(f"{field} must be a probability below 1, not {value!r}.")


def check_settings(config: dict) -> None:
    """
    Raises:
        UnsupportedModelError: a setting of transformers has a value that the runtime does not know.
    """
    wrong = [
        field
        for field, known in SETTINGS.items()
        # Python takes 0 for false.
        if field in config and not any(type(config[field]) is type(k) and config[field] == k for k in known)
    ]
    version, architectures, label2id = (config.get(n) for n in ("transformers_version", "architectures", "label2id"))
    if not (version is None or isinstance(version, str)):
        wrong.append("transformers_version")
    if not (architectures is None or (isinstance(architectures, list) and has_type(architectures, str))):
        wrong.append("architectures")
    if not (
        label2id is None or (isinstance(label2id, dict) and any(has_type(label2id.values(), t) for t in (int, str)))
    ):
        wrong.append("label2id")
    if wrong:
        raise UnsupportedModelError(f"its config has {wrong[0]}={config[wrong[0]]!r}")


def has_type(values: Iterable, kind: type) -> bool:
    return all(type(value) is kind for value in values)


def check_packing(packing) -> None:
    """
    Check the quantization_config of a packed model.

    Raises:
        LoadingError: a field is wrong.
    """
    if not isinstance(packing, dict) or packing.get("quant_method") != QUANT_METHOD:
        raise LoadingError(f"quant_method of the quantization_config must be {QUANT_METHOD!r}.")
    if not isinstance(packing.get("half", False), bool):
        raise LoadingError(f"half of the quantization_config must be true or false, not {packing['half']!r}.")
    unknown = min(packing.keys() - {"quant_method", "half"}, default=None)
    if unknown is not None:
        raise LoadingError(f"A quantization_config of {QUANT_METHOD!r} has no {unknown!r}; it has 'half'.")


def read_architecture(config: Any) -> Architecture:
    """
    The network of a config.json.

    Args:
        config: the content of the file.

    Raises:
        UnsupportedModelError: it is a model that only PyTorch computes, or a setting is not supported. The message names
            the field.
        LoadingError: the fields do not describe a network. The message names the field.
    """
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise LoadingError("config.json is not a JSON object with the name of a model type ('model_type').")
    if config["model_type"] != "binaryvit":
        raise UnsupportedModelError(f"its model_type is {config['model_type']!r}, not 'binaryvit'")
    packing = config.get("quantization_config")
    if packing is None:
        raise UnsupportedModelError("its weights are not packed (`binaryvit pack` packs them)")
    check_packing(packing)
    for field in ("weight_bits", "input_bits"):
        if type(config.get(field, 1)) is not int or config.get(field, 1) != 1:
            raise UnsupportedModelError(f"its {field} is {config[field]!r}, and the engine multiplies single bits")
    # Without a dtype, transformers computes in the dtype of the file, which may be float16.
    dtype = config.get("torch_dtype") if config.get("dtype") is None else config["dtype"]
    if dtype != "float32":
        raise UnsupportedModelError(f"its dtype is {dtype!r}, not 'float32'")
    check_settings(config)
    check_training_fields(config)
    known = [field.name for field in fields(Architecture)]
    architecture = Architecture(**{name: config[name] for name in known if name in config})
    for field, value in (
        ("num_hidden_layers", sum(architecture.depths)),
        ("hidden_size", architecture.hidden_sizes[-1]),
    ):
        if config.get(field, value) != value:
            raise LoadingError(f"{field} must be {value}, not {config[field]!r}.")
    architecture.check_size(len(read_labels(config)))
    return architecture


def read_labels(config: dict) -> list[str]:
    """
    The label of each logit. As in transformers, a config without labels has two.

    Raises:
        LoadingError: they are not labels.
        UnsupportedModelError: num_labels is not the number of labels in id2label.
    """
    id2label, number = config.get("id2label"), config.get("num_labels", 2)
    if not isinstance(number, int) or not 1 <= number <= MAX_LABELS:
        raise LoadingError(f"num_labels must be a whole number from 1 to {MAX_LABELS}, not {number!r}.")
    if id2label is None:
        id2label = {str(index): f"LABEL_{index}" for index in range(number)}
    if not isinstance(id2label, dict) or not 1 <= len(id2label) <= MAX_LABELS:
        raise LoadingError(f"id2label must map numbers to labels, from 1 to {MAX_LABELS} of them.")
    if set(id2label) != {str(index) for index in range(len(id2label))}:
        raise LoadingError(f"The keys of id2label must be 0 to {len(id2label) - 1}, one of each.")
    labels = [id2label[str(index)] for index in range(len(id2label))]
    if not all(isinstance(label, (str, int)) for label in labels):
        raise LoadingError("The labels of id2label must be text.")
    if config.get("num_labels", len(labels)) != len(labels):
        raise UnsupportedModelError(f"its config has num_labels={number} and {len(labels)} labels in id2label")
    if len(labels) == 1 and config.get("problem_type") == "single_label_classification":
        raise LoadingError("problem_type is 'single_label_classification', but there is a single label.")
    return labels

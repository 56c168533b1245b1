# SPDX-License-Identifier: Apache-2.0
"""
Configuration of BinaryViT: one class for every binary row of the paper's ablation.

References:
    Le & Li, CVPRW 2023, Table 3, https://arxiv.org/abs/2306.16678
"""

import math

import torch
from huggingface_hub.dataclasses import strict
from transformers.backbone_utils import BackboneConfigMixin
from transformers.configuration_utils import PreTrainedConfig


PER_STAGE_FIELDS = ("depths", "num_attention_heads", "intermediate_sizes", "sequence_reduction_ratios")
BIT_WIDTHS = (1, 2, 3, 4, 5, 6, 7, 8, 32)
# All bounds are far above useful networks. They stop a damaged config before it takes all time or memory.
MAX_LIST_LENGTH = 16  # stages or kernels
MAX_LAYERS = 200
MAX_LABELS = 100_000
MAX_PARAMETERS = 10**10
MAX_ACTIVATIONS = 2**32  # of one layer, for one image
MAX_TOKENS = 2**22  # of one image: the engine counts the numbers of 16 channels in 32 bits
RANGES = {
    "image_size": (1, 2**14),
    "patch_size": (1, 2**14),
    "num_channels": (1, 2**10),
    "hidden_sizes": (1, 2**16),
    "depths": (1, MAX_LAYERS),
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
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@strict
class BinaryViTConfig(BackboneConfigMixin, PreTrainedConfig):
    r"""
    Configuration of a vision transformer with binary weights and activations: a pyramid of one or more stages.

    The defaults are BinaryViT-small at 224 x 224 pixels. DeiT is a pyramid of one stage. `RANGES` bounds the fields.

    Args:
        image_size: height and width of the input in pixels, or one number for both.
        patch_size: height and width of a patch of the stem in pixels, or one number for both.
        num_channels: channels of the input image.
        hidden_sizes: channels of each stage; each is a multiple of the one before.
        depths: layers of each stage.
        num_attention_heads: heads of each stage; they divide its hidden size.
        intermediate_sizes: inner channels of each stage's MLP; multiples of its hidden size.
        sequence_reduction_ratios: keys and values of each stage see the token map averaged over squares of this side.
        use_class_token: classify from a class token instead of the mean over tokens. It has no place on the map and
            cannot be pooled, so it needs one stage, no reduction and no pooling branches.
        use_stem_norm: batch normalisation after the stem's convolution.
        use_layer_scale: LayerScale at the end of the attention and the MLP branch.
        layer_scale_init_value: initial scale of these two LayerScales. The pooling branches begin at 0.
        avg_pool_kernel_sizes: odd kernel sizes of the average-pooling branches beside the MLP. Each has a vertical and
            a horizontal branch. Empty for no branches.
        binarize_patch_embeddings: binary instead of full-precision patch embeddings between the stages.
        weight_bits: bits of the layers' weights: 1 (binary), 2 (ternary), 3 to 8 (uniform) or 32 (not quantised).
        input_bits: bits of all inputs of products: inputs of linear layers, query, key, value and attention
            probabilities. Same values as `weight_bits`.
        quantization_clip_value: range of 2 to 8 bit quantisers; weights and inputs beyond it are clipped.
        attention_clip_init_value: initial step of the quantised attention probabilities (the paper's c).
        hidden_dropout_prob: dropout after the stem and at the end of the attention and the MLP branch.
        attention_probs_dropout_prob: dropout of the quantised attention probabilities.
        drop_path_rate: stochastic depth of the last layer; it grows linearly from 0 at the first.
        batch_norm_eps: added to the variance in every batch normalisation.
        batch_norm_momentum: weight of the new batch in the running statistics.
        initializer_range: standard deviation of the truncated normal that fills position embeddings and class token.
        out_features: names of the feature maps that `BinaryViTBackbone` returns, from `stage_names`. Default: the last.
        out_indices: the same choice as indices in `stage_names`.

    Raises:
        ValueError: the fields do not describe a network; the message says which and why.
    """

    model_type = "binaryvit"

    image_size: int | list[int] | tuple[int, int] = 224
    patch_size: int | list[int] | tuple[int, int] = 4
    num_channels: int = 3
    hidden_sizes: list[int] | tuple[int, ...] = (64, 128, 256, 512)
    depths: list[int] | tuple[int, ...] = (3, 4, 8, 4)
    num_attention_heads: list[int] | tuple[int, ...] = (1, 2, 4, 8)
    intermediate_sizes: list[int] | tuple[int, ...] = (512, 1024, 1024, 2048)
    sequence_reduction_ratios: list[int] | tuple[int, ...] = (8, 4, 1, 1)
    use_class_token: bool = False
    use_stem_norm: bool = True
    use_layer_scale: bool = True
    layer_scale_init_value: float | int = 0.1
    avg_pool_kernel_sizes: list[int] | tuple[int, ...] = (3, 5)
    binarize_patch_embeddings: bool = True
    weight_bits: int = 1
    input_bits: int = 1
    quantization_clip_value: float | int = 2.5
    attention_clip_init_value: float | int = 0.005
    hidden_dropout_prob: float | int = 0.0
    attention_probs_dropout_prob: float | int = 0.0
    drop_path_rate: float | int = 0.0
    batch_norm_eps: float = 1e-5
    batch_norm_momentum: float | int = 0.1
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        # Checked first, because transformers makes a label for each of `num_labels`.
        check_labels(self.id2label, kwargs.get("num_labels"))
        check_dtype(self.dtype if self.dtype is not None else kwargs.get("torch_dtype"))
        packing = kwargs.get("quantization_config")
        if not (packing is None or isinstance(packing, dict) or hasattr(packing, "quant_method")):
            raise ValueError(f"quantization_config must be an object with a quant_method, not {packing!r}.")
        kwargs.pop("stage_names", None)  # derived here; the configs of other backbones store it
        out_features, out_indices = kwargs.pop("out_features", None), kwargs.pop("out_indices", None)
        super().__post_init__(**kwargs)
        if out_features is not None or out_indices is not None:
            self.set_output_features_output_indices(out_features, out_indices)

    @property
    def num_hidden_layers(self) -> int:
        return sum(self.depths)

    @num_hidden_layers.setter
    def num_hidden_layers(self, value: int) -> None:
        if value != self.num_hidden_layers:
            raise ValueError(f"num_hidden_layers={value} is not the sum of depths={list(self.depths)}: change depths.")

    @property
    def hidden_size(self) -> int:
        """Channels of the last stage, as heads and decoders of transformers read them."""
        return self.hidden_sizes[-1]

    @hidden_size.setter
    def hidden_size(self, value: int) -> None:
        if value != self.hidden_size:
            raise ValueError(
                f"hidden_size={value} is not the last of hidden_sizes={list(self.hidden_sizes)}: change hidden_sizes."
            )

    @property
    def stage_names(self) -> list[str]:
        """Names of a backbone's feature maps: the output of the stem, and of the last layer of each stage."""
        return ["stem", *(f"stage{stage}" for stage in range(1, len(self.hidden_sizes) + 1))]

    # BackboneConfigMixin keeps its choice in these two. Unset, they follow `hidden_sizes` and are not saved.

    @property
    def _out_features(self) -> list[str] | None:
        return vars(self).get("_out_features", self.stage_names[-1:])

    @_out_features.setter
    def _out_features(self, names: list[str] | None) -> None:
        self.__dict__["_out_features"] = names

    @property
    def _out_indices(self) -> list[int] | None:
        return vars(self).get("_out_indices", [len(self.stage_names) - 1])

    @_out_indices.setter
    def _out_indices(self, indices: list[int] | None) -> None:
        self.__dict__["_out_indices"] = indices

    def to_dict(self) -> dict:
        fields = super().to_dict()
        return {
            name: value
            for name, value in fields.items()
            if name not in ("out_features", "out_indices") or value is not None
        }

    @property
    def grid_sizes(self) -> list[tuple[int, int]]:
        """Height and width in tokens of each stage's map; every stage halves the one before."""
        return self._divide(self.image_size)

    def grid_sizes_of(self, image_size: int | list[int] | tuple[int, int]) -> list[tuple[int, int]]:
        """
        `grid_sizes` for images of another size.

        Raises:
            ValueError: the network cannot take images of this size.
        """
        sides = image_size if isinstance(image_size, (list, tuple)) else [image_size]
        if not all(isinstance(side, int) and not isinstance(side, bool) for side in sides):
            raise ValueError(f"image_size must be a whole number of pixels or (height, width), not {image_size!r}.")
        check_range("image_size", image_size)
        self._check_map(image_size)
        self._check_size(image_size)
        return self._divide(image_size)

    def _divide(self, image_size) -> list[tuple[int, int]]:
        height, width = (size // patch for size, patch in zip(as_pair(image_size), as_pair(self.patch_size)))
        return [(height // 2**stage, width // 2**stage) for stage in range(len(self.hidden_sizes))]

    def validate_backbone(self):
        self.verify_out_features_out_indices()

    def validate_architecture(self):
        self._check_ranges()
        self._check_stages()
        self._check_map(self.image_size)
        self._check_size(self.image_size)
        for field in ("weight_bits", "input_bits"):
            if getattr(self, field) not in BIT_WIDTHS:
                raise ValueError(f"{field} must be from 1 to 8, or 32 (not quantised), not {getattr(self, field)}.")
        if any(kernel % 2 == 0 for kernel in self.avg_pool_kernel_sizes):
            raise ValueError(
                f"avg_pool_kernel_sizes={list(self.avg_pool_kernel_sizes)} must be odd, to keep the size of the map."
            )
        if self.use_class_token and (
            len(self.hidden_sizes) > 1 or self.avg_pool_kernel_sizes or max(self.sequence_reduction_ratios) > 1
        ):
            raise ValueError(
                "use_class_token needs one stage, sequence_reduction_ratios of 1 and avg_pool_kernel_sizes of []: "
                "a class token has no place on the map and cannot be pooled."
            )

    def _check_ranges(self):
        for field in RANGES:
            check_range(field, getattr(self, field))
        for field in PROBABILITIES:
            if not 0 <= getattr(self, field) < 1:
                raise ValueError(f"{field} must be a probability below 1, not {getattr(self, field)}.")

    def _check_stages(self):
        for field in PER_STAGE_FIELDS:
            if len(getattr(self, field)) != len(self.hidden_sizes):
                raise ValueError(
                    f"{field}={list(getattr(self, field))} must have one value per stage, as "
                    f"hidden_sizes={list(self.hidden_sizes)}."
                )
        if not self.hidden_sizes:
            raise ValueError("hidden_sizes is empty, but a network has at least one stage.")
        if sum(self.depths) > MAX_LAYERS:
            raise ValueError(f"depths={list(self.depths)} are {sum(self.depths)} layers; the maximum is {MAX_LAYERS}.")
        for stage, channels in enumerate(self.hidden_sizes):
            heads, inner = self.num_attention_heads[stage], self.intermediate_sizes[stage]
            if channels % heads:
                raise ValueError(
                    f"num_attention_heads={heads} does not divide hidden_sizes={channels} of stage {stage}."
                )
            if inner % channels:
                raise ValueError(
                    f"intermediate_sizes={inner} is not a multiple of hidden_sizes={channels} of stage {stage}, "
                    "which the MLP's shortcut repeats."
                )
            if stage and channels % self.hidden_sizes[stage - 1]:
                raise ValueError(
                    f"hidden_sizes={channels} of stage {stage} is not a multiple of {self.hidden_sizes[stage - 1]} of "
                    "the stage before, which the shortcut repeats."
                )

    def _check_map(self, image_size):
        for field, value in (("image_size", image_size), ("patch_size", self.patch_size)):
            if len(as_pair(value)) != 2:
                raise ValueError(f"{field} must be one number or (height, width), not {value}.")
        for size, patch in zip(as_pair(image_size), as_pair(self.patch_size)):
            if size % patch:
                raise ValueError(
                    f"image_size={image_size} is not a multiple of patch_size={self.patch_size}"
                    f"{self._suggestion(image_size)}"
                )
            for stage, ratio in enumerate(self.sequence_reduction_ratios):
                tokens = size // patch // 2**stage
                if size // patch % 2**stage:
                    raise ValueError(
                        f"image_size={image_size} with patch_size={self.patch_size} gives {size // patch} tokens a side, "
                        f"which cannot be halved {stage} times{self._suggestion(image_size)}"
                    )
                if tokens % ratio:
                    raise ValueError(
                        f"sequence_reduction_ratios={ratio} does not divide the {tokens} tokens a side of stage {stage} "
                        f"(image_size={image_size}, patch_size={self.patch_size}){self._suggestion(image_size)}"
                    )

    def _suggestion(self, image_size) -> str:
        """End of a sentence: the nearest image size that patches, stages and reductions divide."""
        squares = math.lcm(*(2**stage * ratio for stage, ratio in enumerate(self.sequence_reduction_ratios)))
        sides = [squares * patch for patch in as_pair(self.patch_size)]  # in pixels; these and their multiples fit
        height, width = (max(1, round(size / side)) * side for size, side in zip(as_pair(image_size), sides))
        return f": the nearest size that fits is {height if isinstance(image_size, int) else (height, width)}."

    def _check_size(self, image_size):
        """Bounds weights and activations by arithmetic, before any module exists."""
        inputs = self.num_channels * math.prod(as_pair(self.patch_size))
        parameters = self.hidden_sizes[-1] * self.num_labels
        for stage, (height, width) in enumerate(self._divide(image_size)):
            channels, inner = self.hidden_sizes[stage], self.intermediate_sizes[stage]
            tokens, ratio = height * width, self.sequence_reduction_ratios[stage]
            projections = 4 if ratio == 1 else 5
            parameters += channels * (inputs + tokens)
            parameters += self.depths[stage] * channels * (projections * channels + 2 * inner)
            inputs = 4 * channels
            probabilities = self.num_attention_heads[stage] * tokens * (tokens // ratio**2)
            if tokens > MAX_TOKENS or max(probabilities, tokens * inner) > MAX_ACTIVATIONS:
                raise ValueError(
                    f"Stage {stage} has {tokens} tokens an image, too many for its attention or MLP: choose a smaller "
                    "image_size or a larger patch_size."
                )
        if parameters > MAX_PARAMETERS:
            raise ValueError(f"The network has {parameters:.1e} weights; the maximum is {MAX_PARAMETERS:.0e}.")


def check_range(field: str, value) -> None:
    """
    Raises:
        ValueError: the number, or one of the numbers, of a field is not in its range of `RANGES`.
    """
    least, most = RANGES[field]
    values = value if isinstance(value, (list, tuple)) else [value]
    if len(values) > MAX_LIST_LENGTH:
        raise ValueError(f"{field} has {len(values)} values; the maximum is {MAX_LIST_LENGTH}.")
    # The comparisons also refuse NaN.
    if not all(isinstance(number, (int, float)) and least <= number <= most for number in values):
        raise ValueError(f"{field} must be from {least:g} to {most:g}, not {value!r}.")


def check_labels(id2label, num_labels) -> None:
    """
    Check labels before transformers uses them.

    Args:
        id2label: a dictionary of labels, or None. Its keys are 0, 1, 2, …, or strings of these numbers, as in JSON.
        num_labels: number of labels, or None. transformers makes new labels if it differs from the length of
            `id2label`.

    Raises:
        ValueError: they are not labels, or more than `MAX_LABELS`.
    """
    if num_labels is not None and not (isinstance(num_labels, int) and 1 <= num_labels <= MAX_LABELS):
        raise ValueError(f"num_labels must be a whole number from 1 to {MAX_LABELS}, not {num_labels!r}.")
    if id2label is None:
        return
    if not isinstance(id2label, dict):
        raise ValueError(f"id2label must map numbers to labels; it is a {type(id2label).__name__}.")
    if not 1 <= len(id2label) <= MAX_LABELS:
        raise ValueError(f"id2label has {len(id2label)} labels; it must have from 1 to {MAX_LABELS}.")
    if {str(key) for key in id2label} != {str(index) for index in range(len(id2label))}:
        raise ValueError(f"The keys of id2label must be 0 to {len(id2label) - 1}, one of each.")
    wrong = next((index for index, label in id2label.items() if not isinstance(label, (str, int))), None)
    if wrong is not None:
        raise ValueError(f"Label {wrong} of id2label must be text.")


def check_dtype(dtype) -> None:
    """
    Raises:
        ValueError: `dtype` is not one of `DTYPES`, nor the name of one, nor None.
    """
    if dtype is not None and dtype not in (*DTYPES, *(str(known).removeprefix("torch.") for known in DTYPES)):
        raise ValueError(f"dtype must be float32, bfloat16, float16 or float64, not {dtype!r}.")


def as_pair(size) -> tuple[int, int]:
    """`(height, width)` of a size that is one number or a pair."""
    return (size, size) if isinstance(size, int) else tuple(size)


BinaryViTConfig.register_for_auto_class()

__all__ = ["BinaryViTConfig"]

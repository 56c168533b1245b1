# SPDX-License-Identifier: Apache-2.0
"""
BinaryViT: a pyramid vision transformer of 1-bit weights and activations.

Tokens are `(batch, height * width, channels)`. Each stage but the first halves height and width.

References:
    Le & Li, "BinaryViT: Pushing Binary Vision Transformers Towards Convolutional Models", CVPRW 2023,
    https://arxiv.org/abs/2306.16678; the authors' code: https://github.com/Phuoc-Hoan-Le/BinaryViT
"""

import contextlib
import functools
import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import initialization as init
from transformers.backbone_utils import BackboneMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BackboneOutput, BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_binaryvit import BinaryViTConfig, as_pair
from .engine_binaryvit import (
    EngineChoice,
    EngineSlot,
    choose_engine,
    logits_by_engine,
    maps_by_engine,
    outputs_by_engine,
    wants_gradients,
)
from .functional_binaryvit import (
    BinaryAttentionProducts,
    approx_sign_slope,
    fastest,
    merge_heads,
    quantize_input,
    quantize_probability,
)
from .layers_binaryvit import (
    AvgPoolBranch,
    AvgPoolBranches,
    BinaryLinear,
    BinaryPatchConv,
    BinaryProjection,
    DropPath,
    LayerScale,
    NormActivation,
    RPReLU,
    TokenBatchNorm,
    binary_mlp_products,
    drop_path_rates,
    gather_patches,
    has_hooks,
    pool_tokens,
    resize_positions,
    upsample_tokens,
)
from .quantization_binaryvit import PackableModel, config_fields


@dataclass
class BinaryViTModelOutput(BaseModelOutputWithPooling):
    """
    Outputs of `BinaryViTModel`.

    `reshaped_hidden_states` are the hidden states as maps `(batch, channels, height, width)`, without a class token.
    """

    reshaped_hidden_states: tuple[torch.Tensor, ...] | None = None


@dataclass
class BinaryViTImageClassifierOutput(ImageClassifierOutput):
    """
    Outputs of `BinaryViTForImageClassification`.

    `reshaped_hidden_states` are the hidden states as maps `(batch, channels, height, width)`, without a class token.
    """

    reshaped_hidden_states: tuple[torch.Tensor, ...] | None = None


class PositionedEmbeddings(nn.Module):
    """
    Base of modules that add an embedding of its position to every token of a stage's map.

    Subclasses create `position_embeddings` `(1, tokens, channels)`: those of the map, row by row, after the class
    token's.
    """

    position_embeddings: nn.Parameter

    def __init__(self, config, stage: int):
        super().__init__()
        self.grid_size = config.grid_sizes[stage]

    def positions(self, grid_size: tuple[int, int]) -> torch.Tensor:
        """Position embeddings of a map `(height, width)`. Those of another size than the model's are interpolated."""
        return resize_positions(self.position_embeddings, self.grid_size, grid_size)


class BinaryViTEmbeddings(PositionedEmbeddings):
    """The stem, in full precision: `(batch, num_channels, height, width) -> (batch, tokens, hidden_sizes[0])`."""

    def __init__(self, config):
        super().__init__(config, stage=0)
        self.image_shape = (config.num_channels, *as_pair(config.image_size))
        patch_size, hidden_size = as_pair(config.patch_size), config.hidden_sizes[0]
        num_positions = math.prod(config.grid_sizes[0]) + config.use_class_token

        self.projection = nn.Conv2d(config.num_channels, hidden_size, kernel_size=patch_size, stride=patch_size)
        self.norm = TokenBatchNorm(config, hidden_size) if config.use_stem_norm else nn.Identity()
        self.class_token = nn.Parameter(torch.zeros(1, 1, hidden_size)) if config.use_class_token else None
        self.position_embeddings = nn.Parameter(torch.zeros(1, num_positions, hidden_size))
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, pixel_values: torch.Tensor, grid_size: tuple[int, int]) -> torch.Tensor:
        hidden_states = self.projection(pixel_values.to(self.projection.weight.dtype)).flatten(2).transpose(1, 2)
        hidden_states = self.norm(hidden_states)
        if self.class_token is not None:
            class_token = self.class_token.expand(hidden_states.shape[0], -1, -1)
            hidden_states = torch.cat((class_token, hidden_states), dim=1)
        return self.dropout(hidden_states + self.positions(grid_size))


class BinaryPatchEmbeddings(PositionedEmbeddings):
    """Binary embeddings between stages: `(batch, height * width, in) -> (batch, height / 2 * width / 2, out)`."""

    def __init__(self, config, stage: int):
        super().__init__(config, stage)
        in_channels, out_channels = config.hidden_sizes[stage - 1], config.hidden_sizes[stage]
        self.norm1 = TokenBatchNorm(config, in_channels)
        self.projection = BinaryPatchConv(config, in_channels, out_channels)
        self.norm_activation = NormActivation(config, out_channels)
        self.position_embeddings = nn.Parameter(torch.zeros(1, math.prod(config.grid_sizes[stage]), out_channels))

    def forward(self, hidden_states: torch.Tensor, grid_size: tuple[int, int]) -> torch.Tensor:
        patches = gather_patches(self.norm1(hidden_states), grid_size)
        hidden_states = self.norm_activation(self.projection(patches.flatten(2)), patches.mean(-1))
        return hidden_states + self.positions(halve(grid_size))


class FullPrecisionPatchEmbeddings(PositionedEmbeddings):
    """Full-precision patch embeddings: convolution between two normalisations; no shortcut, no activation."""

    def __init__(self, config, stage: int):
        super().__init__(config, stage)
        in_channels, out_channels = config.hidden_sizes[stage - 1], config.hidden_sizes[stage]
        self.norm1 = TokenBatchNorm(config, in_channels)
        self.projection = nn.Conv2d(in_channels, out_channels, kernel_size=2, stride=2, bias=False)
        self.norm2 = TokenBatchNorm(config, out_channels)
        self.position_embeddings = nn.Parameter(torch.zeros(1, math.prod(config.grid_sizes[stage]), out_channels))

    def forward(self, hidden_states: torch.Tensor, grid_size: tuple[int, int]) -> torch.Tensor:
        token_map = self.norm1(hidden_states).unflatten(1, grid_size).permute(0, 3, 1, 2)
        hidden_states = self.projection(token_map).flatten(2).transpose(1, 2)
        return self.norm2(hidden_states) + self.positions(halve(grid_size))


def halve(grid_size: tuple[int, int]) -> tuple[int, int]:
    height, width = grid_size
    return height // 2, width // 2


class BinaryViTAttention(nn.Module):
    """
    `output(RPReLU(BN(attention) + query + key + value))` of binary query, key, value and probabilities.

    Input and result are `(batch, tokens, channels)`. The map of keys and values may be averaged over squares.
    """

    sign_slope = staticmethod(approx_sign_slope)  # gradient of the signs of query, key and value

    def __init__(self, config, stage: int):
        super().__init__()
        hidden_size = config.hidden_sizes[stage]
        self.num_heads = config.num_attention_heads[stage]
        self.head_dim = hidden_size // self.num_heads
        self.reduction_ratio = config.sequence_reduction_ratios[stage]
        self.input_bits, self.clip_value = config.input_bits, config.quantization_clip_value

        self.reduction = BinaryProjection(config, hidden_size, hidden_size) if self.reduction_ratio > 1 else None
        self.query = BinaryProjection(config, hidden_size, hidden_size)
        self.key = BinaryProjection(config, hidden_size, hidden_size)
        self.value = BinaryProjection(config, hidden_size, hidden_size)
        self.query_shift = nn.Parameter(torch.zeros(hidden_size))
        self.key_shift = nn.Parameter(torch.zeros(hidden_size))
        self.value_shift = nn.Parameter(torch.zeros(hidden_size))
        self.probability_clip_init = float(config.attention_clip_init_value)
        clip = nn.Parameter(torch.tensor(self.probability_clip_init)) if self.input_bits < 32 else None
        self.register_parameter("probability_clip", clip)  # None at 32 bits: DDP fails on unused parameters
        self.dropout = nn.Dropout(config.attention_probs_dropout_prob)
        self.norm_activation = NormActivation(config, hidden_size)
        self.output = BinaryProjection(config, hidden_size, hidden_size)

    def forward(
        self, hidden_states: torch.Tensor, grid_size: tuple[int, int], output_attentions: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        query = self.query(hidden_states)
        if self.reduction is not None:
            hidden_states = self.reduction(pool_tokens(hidden_states, grid_size, self.reduction_ratio))
        key, value = self.key(hidden_states), self.value(hidden_states)

        # Fused products give the result from the inputs, not from the probabilities: those would get no gradient of it.
        fused = self.training and self.input_bits == 1 and self.dropout.p == 0 and not output_attentions
        context, probabilities = (self.attend_fused if fused else self.attend)(query, key, value)
        shortcut = key + value
        if self.reduction is not None:
            shortcut = upsample_tokens(shortcut, grid_size, self.reduction_ratio)
        return self.output(self.norm_activation(context, query + shortcut)), probabilities

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns attended values `(batch, queries, channels)` and probabilities `(batch, heads, queries, keys)`."""
        # (batch, heads, queries, head_dim) x (batch, heads, head_dim, keys)
        scores = self.to_heads(query, self.query_shift) @ self.to_heads(key, self.key_shift).transpose(-1, -2)
        probabilities = nn.functional.softmax(scores * self.head_dim**-0.5, dim=-1)
        probabilities = self.dropout(quantize_probability(probabilities, self.probability_clip, self.input_bits))
        return merge_heads(probabilities @ self.to_heads(value, self.value_shift)), probabilities

    def attend_fused(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`attend` for 1-bit inputs without dropout, in training: it keeps less for the backward pass."""
        tensors = query, key, value, self.query_shift, self.key_shift, self.value_shift, self.probability_clip
        step = fastest(BinaryAttentionProducts, tensors, self.training and self.sign_slope is approx_sign_slope)
        return step.apply(*tensors, self.num_heads, self.sign_slope)

    def to_heads(self, hidden_states: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        """Shift, quantise and split into heads; 2 to 8 bits have a scale per head and token."""
        heads = hidden_states.unflatten(-1, (self.num_heads, self.head_dim))
        shift = shift.view(self.num_heads, self.head_dim)
        heads = quantize_input(heads, shift, self.input_bits, self.clip_value, self.sign_slope)
        return heads.transpose(1, 2)


class BinaryViTMLP(nn.Module):
    """`fc2(fc1(x))`, two binary projections. Input and result are `(batch, tokens, channels)`."""

    def __init__(self, config, stage: int):
        super().__init__()
        hidden_size, intermediate_size = config.hidden_sizes[stage], config.intermediate_sizes[stage]
        self.bits = (config.weight_bits, config.input_bits)
        self.fc1 = BinaryProjection(config, hidden_size, intermediate_size)
        self.fc2 = BinaryProjection(config, intermediate_size, hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.training and self.is_plain():
            product, pooled = binary_mlp_products(self.fc1, self.fc2.linear, hidden_states)
            return self.fc2.norm_activation(product, pooled)
        return self.fc2(self.fc1(hidden_states))

    def is_plain(self) -> bool:
        """Whether fused products may compute this MLP: nobody has wrapped its parts or hooks into them."""
        linears = self.fc1.linear, self.fc2.linear
        return (
            self.bits == (1, 1)
            and all(isinstance(linear, BinaryLinear) for linear in linears)  # no wrapper, such as PEFT's
            and not any(map(has_hooks, (self.fc1, self.fc1.norm_activation, self.fc2, *linears)))
        )


class BinaryViTLayer(GradientCheckpointingLayer):
    """
    Three branches, of tokens `(batch, height * width, channels)`: `x = x + LayerScale(attention(norm1(x)))`, then
    `x + LayerScale(mlp(norm2(x))) + sum_i LayerScale_i(average_pool_i(norm2(x)))`.
    """

    def __init__(self, config, stage: int, drop_path_rate: float):
        super().__init__()
        hidden_size = config.hidden_sizes[stage]
        self.norm1 = TokenBatchNorm(config, hidden_size)
        self.attention = BinaryViTAttention(config, stage)
        self.norm2 = TokenBatchNorm(config, hidden_size)
        self.mlp = BinaryViTMLP(config, stage)
        self.layer_scale1 = make_layer_scale(config, hidden_size)
        self.layer_scale2 = make_layer_scale(config, hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.drop_path = DropPath(drop_path_rate)
        kernels = [shape for size in config.avg_pool_kernel_sizes for shape in ((size, 1), (1, size))]
        self.avg_pool_branches = AvgPoolBranches(AvgPoolBranch(hidden_size, kernel) for kernel in kernels)

    def forward(
        self, hidden_states: torch.Tensor, grid_size: tuple[int, int], output_attentions: bool = False
    ) -> torch.Tensor:
        attended, _ = self.attention(self.norm1(hidden_states), grid_size, output_attentions)
        hidden_states = hidden_states + self.drop_path(self.layer_scale1(self.dropout(attended)))
        normed = self.norm2(hidden_states)
        hidden_states = hidden_states + self.drop_path(self.layer_scale2(self.dropout(self.mlp(normed))))
        # The branches keep full-precision detail that the 1-bit MLP discards.
        return self.avg_pool_branches(hidden_states, normed, grid_size)


def make_layer_scale(config, num_channels: int) -> nn.Module:
    return LayerScale(num_channels, config.layer_scale_init_value) if config.use_layer_scale else nn.Identity()


class BinaryViTStage(nn.Module):
    """Patch embeddings (not in the first stage), then layers of one width on one map."""

    def __init__(self, config, stage: int, rates: list[float]):
        super().__init__()
        embeddings = BinaryPatchEmbeddings if config.binarize_patch_embeddings else FullPrecisionPatchEmbeddings
        self.patch_embeddings = embeddings(config, stage) if stage > 0 else None
        self.layers = nn.ModuleList([BinaryViTLayer(config, stage, rate) for rate in rates])

    def forward(
        self, hidden_states: torch.Tensor, grid_size: tuple[int, int], output_attentions: bool = False
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """
        Args:
            hidden_states: output of the stage before, or of the stem.
            grid_size: height and width in tokens of this stage's map.

        Returns:
            The output of the last layer, and the input of every layer: `(batch, tokens, channels)` each.
        """
        if self.patch_embeddings is not None:
            height, width = grid_size
            hidden_states = self.patch_embeddings(hidden_states, (2 * height, 2 * width))
        layer_inputs = []
        for layer in self.layers:
            layer_inputs.append(hidden_states)
            hidden_states = layer(hidden_states, grid_size, output_attentions)
        return hidden_states, layer_inputs


def build_stages(config) -> nn.ModuleList:
    rates = iter(drop_path_rates(config.drop_path_rate, config.num_hidden_layers))
    return nn.ModuleList(
        [
            BinaryViTStage(config, stage, [next(rates) for _ in range(depth)])
            for stage, depth in enumerate(config.depths)
        ]
    )


def as_map(hidden_states: torch.Tensor, grid_size: tuple[int, int]) -> torch.Tensor:
    """Tokens as a map, without a class token: `(batch, tokens, channels) -> (batch, channels, height, width)`."""
    return hidden_states[:, -math.prod(grid_size) :].unflatten(1, grid_size).permute(0, 3, 1, 2)


class BinaryViTPreTrainedModel(PackableModel):
    """Base of all models: initialisation, engine and packing."""

    config: BinaryViTConfig
    config_class = BinaryViTConfig
    base_model_prefix = "binaryvit"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = [
        "BinaryViTEmbeddings",
        "BinaryPatchEmbeddings",
        "FullPrecisionPatchEmbeddings",
        "BinaryViTLayer",
    ]
    _can_compile_fullgraph = True
    _can_record_outputs = {"attentions": BinaryViTAttention}

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        self.engine_slot = EngineSlot()

    def train(self, mode: bool = True):
        super().train(mode)
        if mode and self.is_packed and wants_gradients(self.parameters()):
            self.engine_slot.compare_values()
        return self

    def named_modules(self, *args, **kwargs):
        # PEFT merges an adapter through .data, which PyTorch does not count. Before, it lists the modules with the adapter.
        self.engine_slot.forget_changed_model()
        return super().named_modules(*args, **kwargs)

    def refresh_engine(self) -> None:
        """
        Make the engine read the model again at the next call.

        Call it after changes that PyTorch does not count:
        - in place through `.data` or `.numpy()`, such as `weight.data.add_(1)`;
        - to plain attributes of modules, such as `norm.eps = 1e-3`.
        """
        self.base_model.engine_slot.folded = None

    @property
    def engine(self) -> EngineChoice:
        """
        The kernels that compute this model in evaluation, `torch` for PyTorch, and the reason.

        Raises:
            ValueError: the environment variable BINARYVIT_ENGINE names kernels that this machine does not have.
        """
        return choose_engine(self.base_model)

    @property
    def backbone_class(self) -> type:
        """The class that the engine computes. Its subclasses run in PyTorch."""
        return BinaryViTModel

    def wanted_outputs(self, output_hidden_states: bool | None, options: dict) -> tuple[bool, bool]:
        """Whether to return hidden states and attentions: as the call says, else as the config does."""
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        return output_hidden_states, bool(options.get("output_attentions", self.config.output_attentions))

    def get_input_embeddings(self) -> nn.Module:
        """The stem's convolution, which turns patches into tokens."""
        return self.base_model.embeddings.projection

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.base_model.embeddings.projection = value

    def grid_sizes_of(
        self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool | None
    ) -> list[tuple[int, int]]:
        """
        Height and width in tokens of each stage's map of these images.

        Raises:
            ValueError: the model does not take images of this shape, or they are no tensor.
        """
        if not isinstance(pixel_values, torch.Tensor):
            raise ValueError(
                f"pixel_values must be a tensor (batch, channels, height, width), not {type(pixel_values).__name__}: an "
                'image processor makes one with return_tensors="pt".'
            )
        shape, own_shape = tuple(pixel_values.shape[1:]), self.base_model.embeddings.image_shape
        if shape == own_shape:
            return [module.grid_size for module in self.positioned_embeddings().values()]
        if len(shape) != 3:
            raise ValueError(
                f"pixel_values must be a tensor (batch, channels, height, width), not {tuple(pixel_values.shape)}."
            )
        if shape[0] != own_shape[0]:
            remedy = "; an image processor gives them these channels" if own_shape[0] == 3 else ""
            raise ValueError(f"The model takes images of (channels, height, width) {own_shape}, not {shape}{remedy}.")
        if not interpolate_pos_encoding:
            raise ValueError(
                f"The model takes images of (channels, height, width) {own_shape}, not {shape}; for another height and "
                "width, call it with interpolate_pos_encoding=True."
            )
        return self.config.grid_sizes_of(shape[1:])

    def positioned_embeddings(self) -> dict[str, PositionedEmbeddings]:
        """The modules with position embeddings, one of each stage, by name."""
        modules = {"embeddings": self.base_model.embeddings}
        for stage, module in enumerate(self.base_model.stages):
            if module.patch_embeddings is not None:
                modules[f"stages.{stage}.patch_embeddings"] = module.patch_embeddings
        return modules

    @torch.no_grad()
    def resized_position_embeddings(self, image_size) -> dict[str, torch.Tensor]:
        """The position embeddings of every stage for images of another size, by the names of the parameters."""
        modules, grid_sizes = self.positioned_embeddings(), self.config.grid_sizes_of(image_size)
        return {
            f"{name}.position_embeddings": module.positions(grid_size).contiguous()
            for (name, module), grid_size in zip(modules.items(), grid_sizes)
        }

    @torch.inference_mode(False)  # PyTorch does not count changes of tensors made in inference mode
    def resize_position_embeddings(self, image_size: int | list[int] | tuple[int, int]) -> None:
        """
        Make the model one for images of another size, in place: bicubic interpolation of all position embeddings.

        It changes `config.image_size` too. `from_pretrained(..., image_size=320)` loads a model and calls it. An
        optimiser that was created before holds the old parameters.

        Args:
            image_size: height and width in pixels, or one number for both.

        Raises:
            ValueError: the network cannot take images of this size, or its weights are offloaded.
        """
        backbone = self.base_model
        grid_sizes = self.config.grid_sizes_of(image_size)
        positioned = self.positioned_embeddings()
        if any(module.position_embeddings.is_meta and hasattr(module, "_hf_hook") for module in positioned.values()):
            raise ValueError(
                "The position embeddings are offloaded: load the model without a device_map to resize it."
            )
        resized = self.resized_position_embeddings(image_size)
        for (name, module), grid_size in zip(positioned.items(), grid_sizes):
            requires_grad = module.position_embeddings.requires_grad
            module.position_embeddings = nn.Parameter(resized[f"{name}.position_embeddings"], requires_grad)
            module.grid_size = grid_size
        backbone.embeddings.image_shape = (self.config.num_channels, *as_pair(image_size))
        self.config.image_size = backbone.config.image_size = image_size
        backbone.built_from["image_size"] = config_fields(self.config)["image_size"]

    @torch.no_grad()
    def _init_weights(self, module):
        """Initialise layers as PyTorch does, embeddings by a truncated normal, all other parameters by constants."""
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            if module.bias is not None:
                bound = module.weight[0].numel() ** -0.5
                init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, RPReLU):
            init.constant_(module.slope, 0.25)
            init.zeros_(module.shift_in)
            init.zeros_(module.shift_out)
        elif isinstance(module, LayerScale):
            init.constant_(module.scale, module.init_value)
            init.zeros_(module.shift)
        elif isinstance(module, BinaryViTAttention):
            if module.probability_clip is not None:
                init.constant_(module.probability_clip, module.probability_clip_init)
            for shift in (module.query_shift, module.key_shift, module.value_shift):
                init.zeros_(shift)
        elif isinstance(module, (BinaryViTEmbeddings, BinaryPatchEmbeddings, FullPrecisionPatchEmbeddings)):
            init.trunc_normal_(module.position_embeddings, std=self.config.initializer_range)
            if getattr(module, "class_token", None) is not None:
                init.trunc_normal_(module.class_token, std=self.config.initializer_range)
        else:
            super()._init_weights(module)

    def _set_gradient_checkpointing(self, enable=True, gradient_checkpointing_func=checkpoint, **kwargs):
        """Checkpointing runs a forward pass twice. Only the first updates the statistics of batch normalisation."""
        arguments = getattr(gradient_checkpointing_func, "keywords", {})
        if arguments.get("use_reentrant"):
            raise ValueError(
                "Use gradient checkpointing with use_reentrant=False: the reentrant kind counts every batch twice in "
                "batch normalisation's statistics."
            )
        if "context_fn" in arguments or arguments.get("debug"):
            raise ValueError(
                "Use gradient checkpointing without context_fn and debug: the model's own context_fn keeps batch "
                "normalisation's statistics, and PyTorch's debug takes none."
            )
        checkpoint_once = functools.partial(
            gradient_checkpointing_func,
            use_reentrant=False,  # PyTorch wants it said, and a caller's other arguments replace transformers' default
            context_fn=lambda: (contextlib.nullcontext(), frozen_statistics(self)),
        )
        super()._set_gradient_checkpointing(enable, checkpoint_once, **kwargs)


class BinaryViTModel(BinaryViTPreTrainedModel):
    """
    BinaryViT backbone without classifier (Le & Li, CVPRW 2023, arXiv 2306.16678).

    A config with a quantization_config builds packed layers, which compute NaN until their weights are loaded.
    """

    _keys_to_ignore_on_load_unexpected = [r"^classifier\."]

    def __init__(self, config: BinaryViTConfig, add_pooling_layer: bool = True):
        super().__init__(config)
        self.add_pooling_layer = add_pooling_layer
        self.embeddings = BinaryViTEmbeddings(config)
        self.stages = build_stages(config)
        self.norm = TokenBatchNorm(config, config.hidden_sizes[-1])
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        pixel_values: torch.Tensor,
        output_hidden_states: bool | None = None,
        interpolate_pos_encoding: bool | None = None,
        **kwargs,
    ) -> BinaryViTModelOutput:
        """
        Args:
            pixel_values: `(batch, num_channels, height, width)`, normalised.
            output_hidden_states: also return `hidden_states`. Default: the config's.
            interpolate_pos_encoding: take images of another size than the config's, with bicubic interpolation of
                the position embeddings of all stages.

        Returns:
            `last_hidden_state` `(batch, tokens, channels)` after the last normalisation; `pooler_output`
            `(batch, channels)`, its class token or mean over tokens, None without `add_pooling_layer`;
            `hidden_states`, the input `(batch, tokens, channels)` of every layer and the output of the last, and
            `reshaped_hidden_states`, the same as maps `(batch, channels, height, width)`; `attentions`, quantised
            probabilities `(batch, heads, queries, keys)` of every layer, if `output_attentions`.

        Raises:
            ValueError: the images have another number of channels than the config, or another size without
                `interpolate_pos_encoding`, or a size that patches, stages and reductions do not divide.
        """
        output_hidden_states, output_attentions = self.wanted_outputs(output_hidden_states, kwargs)
        outputs = None
        if not output_attentions:
            outputs = outputs_by_engine(self, pixel_values, output_hidden_states, interpolate_pos_encoding)
        if outputs is None or output_hidden_states:
            grid_sizes = self.grid_sizes_of(pixel_values, interpolate_pos_encoding)
        if outputs is None:
            outputs = self.compute(pixel_values, grid_sizes, output_hidden_states, output_attentions)
        last_hidden_state, pooled, hidden_states = outputs
        return BinaryViTModelOutput(
            last_hidden_state=last_hidden_state,
            pooler_output=pooled if self.add_pooling_layer else None,
            hidden_states=hidden_states,
            attentions=() if output_attentions else None,  # capture_outputs fills it, in this place of the tuple
            reshaped_hidden_states=None if hidden_states is None else self.reshape(hidden_states, grid_sizes),
        )

    def compute(
        self,
        pixel_values: torch.Tensor,
        grid_sizes: list[tuple[int, int]],
        output_hidden_states: bool,
        output_attentions: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...] | None]:
        """Last hidden state, pooled output and hidden states, in PyTorch."""
        hidden_states, layer_inputs = self.embeddings(pixel_values, grid_sizes[0]), []
        for stage, grid_size in zip(self.stages, grid_sizes):
            hidden_states, inputs_of_stage = stage(hidden_states, grid_size, output_attentions)
            layer_inputs += inputs_of_stage if output_hidden_states else []
        last_hidden_state = self.norm(hidden_states)
        pooled = last_hidden_state[:, 0] if self.config.use_class_token else last_hidden_state.mean(1)
        return last_hidden_state, pooled, (*layer_inputs, hidden_states) if output_hidden_states else None

    def reshape(
        self, hidden_states: tuple[torch.Tensor, ...], grid_sizes: list[tuple[int, int]]
    ) -> tuple[torch.Tensor, ...]:
        """The hidden states as maps."""
        grids = [grid for grid, depth in zip(grid_sizes, self.config.depths) for _ in range(depth)]
        return tuple(map(as_map, hidden_states, [*grids, grids[-1]]))


class BinaryViTBackbone(BackboneMixin, BinaryViTPreTrainedModel):
    """
    BinaryViT for detection and segmentation: the feature maps of its stages (Le & Li, CVPRW 2023, arXiv 2306.16678).

    A feature map is the residual stream after the stage's last layer, without a class token. "stem" is the output of
    the embeddings. `out_features` and `out_indices` of the config choose the maps. Stages after the last of them are
    not computed, so DistributedDataParallel needs `find_unused_parameters=True` if there are any.

    Packed weights stay frozen: training a head on them leaves this module in evaluation mode, on the engine. A head
    saves and loads a packed backbone if its `backbone_config` is the config of the backbone, which has a
    quantization_config. Such a config builds packed layers that compute NaN until their weights are loaded.
    """

    _keys_to_ignore_on_load_unexpected = [r"^(binaryvit\.)?norm\.", r"^classifier\."]

    def __init__(self, config: BinaryViTConfig):
        super().__init__(config)
        self.num_features = [config.hidden_sizes[0], *config.hidden_sizes]
        self.embeddings = BinaryViTEmbeddings(config)
        self.stages = build_stages(config)
        self.post_init()

    def post_init(self):
        # Without BackboneMixin's, which puts a hook on every attention: that model could not be pickled.
        super(BackboneMixin, self).post_init()

    @property
    def backbone_class(self) -> type:
        return BinaryViTBackbone

    def train(self, mode: bool = True):
        """As `PackableModel.train`. Packed weights are frozen in evaluation mode too, where the engine computes them."""
        self.freeze_bits()
        return super().train(mode)

    def pack_weights(self) -> None:
        super().pack_weights()
        self.match_quantizer()  # a head saves this config in its own, and builds its backbone from it

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        pixel_values: torch.Tensor,
        output_hidden_states: bool | None = None,
        interpolate_pos_encoding: bool = True,
        **kwargs,
    ) -> BackboneOutput:
        """
        Args:
            pixel_values: `(batch, num_channels, height, width)`, normalised.
            output_hidden_states: also return `hidden_states`. Default: the config's.
            interpolate_pos_encoding: take images of another size than the config's, with bicubic interpolation of
                the position embeddings of all stages. On by default, because heads for detection cannot ask for it.

        Returns:
            `feature_maps` `(batch, channels, height, width)` of `out_features`; `hidden_states`, the maps of all
            `stage_names`; `attentions`, quantised probabilities `(batch, heads, queries, keys)` of every layer, if
            `output_attentions`.

        Raises:
            ValueError: the images have another number of channels than the config, or another size without
                `interpolate_pos_encoding`, or a size that patches, stages and reductions do not divide.
        """
        output_hidden_states, output_attentions = self.wanted_outputs(output_hidden_states, kwargs)
        wanted = [output_hidden_states or name in self.out_features for name in self.stage_names]
        maps = None if output_attentions else maps_by_engine(self, pixel_values, wanted, interpolate_pos_encoding)
        grid_sizes = self.grid_sizes_of(pixel_values, interpolate_pos_encoding)
        if maps is None:
            last = max([stage for stage, want in enumerate(wanted) if want], default=0)
            num_stages = len(self.stages) if output_attentions else last
            maps = self.compute(pixel_values, grid_sizes, num_stages, output_attentions)
        grids = [grid_sizes[0], *grid_sizes]
        maps = [None if tokens is None else as_map(tokens, grid) for tokens, grid in zip(maps, grids)]
        return BackboneOutput(
            feature_maps=tuple(maps[self.stage_names.index(name)] for name in self.out_features),
            hidden_states=tuple(maps) if output_hidden_states else None,
            attentions=() if output_attentions else None,  # filled by capture_outputs
        )

    def compute(
        self, pixel_values: torch.Tensor, grid_sizes: list[tuple[int, int]], num_stages: int, output_attentions: bool
    ) -> list[torch.Tensor]:
        """Tokens of the stem's map and of those of the first `num_stages` stages, in PyTorch."""
        maps = [self.embeddings(pixel_values, grid_sizes[0])]
        for stage, grid_size in zip(self.stages, grid_sizes[:num_stages]):
            maps.append(stage(maps[-1], grid_size, output_attentions)[0])
        return maps


class BinaryViTForImageClassification(BinaryViTPreTrainedModel):
    """
    BinaryViT with a full-precision linear classifier (Le & Li, CVPRW 2023, arXiv 2306.16678).

    Raises:
        ValueError: the config has a quantization_config, whose packed weights only `from_pretrained` loads.
    """

    # The loss is the mean over a batch. Because of **kwargs the Trainer would take it for one over all accumulated batches.
    accepts_loss_kwargs = False

    def __init__(self, config: BinaryViTConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.binaryvit = BinaryViTModel(config)
        self.classifier = nn.Linear(config.hidden_sizes[-1], config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        **kwargs,
    ) -> BinaryViTImageClassifierOutput:
        """
        Args:
            pixel_values: `(batch, num_channels, height, width)`, normalised.
            labels: `(batch,)` class indices. For `problem_type="regression"`, numbers in the shape of the logits, or
                `(batch,)` if there is one logit. For `"multi_label_classification"`, floats from 0 to 1 in the shape of
                the logits.
            interpolate_pos_encoding: take images of another size than the config's, with bicubic interpolation of
                the position embeddings of all stages.

        Returns:
            `logits` `(batch, num_labels)`; `loss` if there are labels; `hidden_states`, `reshaped_hidden_states` and
            `attentions` of the backbone, if `output_hidden_states` and `output_attentions` ask for them. The loss is the
            cross-entropy, the mean squared error of a regression, or the binary cross-entropy of several labels. Without a
            `problem_type`, the first labels set it in the config: one logit is a regression, float labels are several.

        Raises:
            ValueError: the images have another number of channels than the config, or another size without
                `interpolate_pos_encoding`, or a size that patches, stages and reductions do not divide.
        """
        outputs = logits = None
        only_logits = not (kwargs or self.config.output_hidden_states or self.config.output_attentions)
        if only_logits and type(self.binaryvit) is BinaryViTModel:
            logits = logits_by_engine(self.binaryvit, self.classifier, pixel_values, interpolate_pos_encoding)
        if logits is None:
            kwargs |= {"interpolate_pos_encoding": interpolate_pos_encoding, "return_dict": True}
            outputs = self.binaryvit(pixel_values, **kwargs)
            logits = self.classifier(outputs.pooler_output)
        loss = None
        if labels is not None:
            loss = self.loss_function(labels, logits, self.config)
            self.warn_of_frozen_model(loss)
        if outputs is None:
            return BinaryViTImageClassifierOutput(loss=loss, logits=logits)
        return BinaryViTImageClassifierOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            reshaped_hidden_states=outputs.reshaped_hidden_states,
        )


@contextlib.contextmanager
def frozen_statistics(model: nn.Module):
    """Keep the running statistics as they were before this context. In training mode, layers normalise by the batch."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    buffers = [buffer for norm in norms for buffer in norm.buffers()]
    before = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        # Not a momentum of 0 instead: compiled layers would be compiled again for it. `.data`, because the backward pass of
        # batch normalisation keeps its running statistics, which it does not read, and refuses them once they change.
        for buffer, value in zip(buffers, before):
            buffer.data.copy_(value)


# Saved models carry their code, for machines without this package (trust_remote_code=True).
BinaryViTModel.register_for_auto_class("AutoModel")
BinaryViTBackbone.register_for_auto_class("AutoBackbone")
BinaryViTForImageClassification.register_for_auto_class("AutoModelForImageClassification")

__all__ = [
    "BinaryViTBackbone",
    "BinaryViTForImageClassification",
    "BinaryViTModel",
    "BinaryViTPreTrainedModel",
]

"""
Packed weights: their format, the layer that computes with them, their files, and how transformers loads and saves them.

Format. A packed weight is a `uint8` tensor `(out, bytes)` and a float scale. Each row holds whole numbers of 1, 2, 4 or 8
bits, the first input channel in the lowest bits of the first byte. Zeros fill the last byte. 1 bit stands for -1 or +1 and
has one scale per row. Wider numbers are stored plus `2**(width - 1) - 1` and have one scale per tensor. Ternary weights take
2 bits, 3 and 4 bit weights 4, and 5 to 8 bit weights 8.

Files. The safetensors metadata holds the version of the format, the config fields that decide what the network computes, the
shapes of the weights before packing, and a CRC-32 of every tensor. So the loader can name a tensor that was damaged,
exchanged or edited.

transformers. `quant_method: "binaryvit"` selects `BinaryViTQuantizer`. The package and a copy of this file that came with a
checkpoint may meet in one process, and the quantizer of one may get a model of the other. So the quantizer calls methods of
the model and checks no classes.
"""

import json
import zlib
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.modeling_utils import PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.hub import PushToHubMixin
from transformers.utils.quantization_config import QuantizationConfigMixin

from .functional_binaryvit import weight_levels
from .layers_binaryvit import BinaryLinear, BinaryPatchConv, quantized_linear


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


FORMAT = "1"
# What a user may change without changing a single output: names of labels and whatever acts in training alone.
CONFIG_FIELDS = (
    "image_size",
    "patch_size",
    "num_channels",
    "hidden_sizes",
    "depths",
    "num_attention_heads",
    "intermediate_sizes",
    "sequence_reduction_ratios",
    "use_class_token",
    "use_stem_norm",
    "use_layer_scale",
    "avg_pool_kernel_sizes",
    "binarize_patch_embeddings",
    "weight_bits",
    "input_bits",
    "quantization_clip_value",
    "batch_norm_eps",
)
HALF_MAX, HALF_SMALLEST_NORMAL = 65504.0, 2.0**-14


def packed_state_dict(model: torch.nn.Module, half: bool) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """
    Tensors and metadata of a packed checkpoint.

    Args:
        model: a packed model, wholly in memory.
        half: store floats in half precision where its range allows (`fits_half`).

    Raises:
        ValueError: weights are offloaded.
    """
    tensors = model.state_dict()
    offloaded = [name for name, tensor in tensors.items() if tensor.is_meta]
    if offloaded:
        raise ValueError(
            f"Tensor {offloaded[0]!r} is offloaded: load the model without a device_map to save it packed."
        )
    if half:
        tensors = {
            name: tensor.half() if tensor.dtype == torch.float32 and fits_half(name, tensor) else tensor
            for name, tensor in tensors.items()
        }
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, PackedLinear)}
    metadata = {
        "binaryvit_format": FORMAT,
        "binaryvit_config": json.dumps(config_fields(model.config)),
        "binaryvit_shapes": json.dumps(
            {f"{name}.packed_weight": layer.weight_shape for name, layer in layers.items()}
        ),
        "binaryvit_crc32": "".join(checksum(tensors[name]) for name in sorted(tensors)),
    }
    return tensors, metadata


def fits_half(name: str, tensor: torch.Tensor) -> bool:
    """
    Whether half precision keeps its eleven bits of a float tensor: nothing above 65504, and not all, or for variances, by
    which is divided, not any, below 2**-14.
    """
    magnitude = tensor.abs()
    smallest = magnitude.min() if name.endswith("running_var") else magnitude.max()
    return bool(magnitude.max() <= HALF_MAX) and bool((smallest >= HALF_SMALLEST_NORMAL) | (magnitude.max() == 0))


def config_fields(config) -> dict:
    """The fields that decide what the network computes, as JSON would give them back."""
    return json.loads(json.dumps({name: getattr(config, name) for name in CONFIG_FIELDS}))


def checksum(tensor: torch.Tensor) -> str:
    """CRC-32 of dtype, shape and content, as eight hexadecimal digits."""
    head = f"{tensor.dtype}{tuple(tensor.shape)}".encode()
    content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return f"{zlib.crc32(content, zlib.crc32(head)):08x}"


@dataclass
class PackedCheckpoint:
    """Content of the files of one checkpoint; `origin` is the name of the file that a tensor lies in."""

    tensors: dict[str, torch.Tensor]
    origin: dict[str, str]
    config: dict
    shapes: dict[str, list[int]]
    checksums: str


def check_packed_files(files: Iterable[str], model: torch.nn.Module) -> None:
    """
    Args:
        files: the safetensors files of one checkpoint.
        model: the packed model that is to be filled from them, still empty (on the meta device).

    Raises:
        ValueError: a file is damaged, or tensors or config are not those that were saved together, or not those of the
            model; the message names the tensor or the field and the file.
    """
    checkpoint = read_checkpoint([Path(file) for file in files])
    check_config(checkpoint, model.config)
    check_tensors(checkpoint, model)
    check_checksums(checkpoint)


def read_checkpoint(files: list[Path]) -> PackedCheckpoint:
    tensors, origin, metadata = {}, {}, {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as stored:
                found = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118, it is no dict
                metadata = stored.metadata() or {}
        except SafetensorError as error:
            raise ValueError(f"{describe_damage(file)} ({error}): download it again.") from error
        tensors |= found
        origin |= dict.fromkeys(found, file.name)
        if metadata.get("binaryvit_format") != FORMAT:
            raise ValueError(
                f"{file.name!r} is no packed checkpoint of format {FORMAT} (its metadata says "
                f"{metadata.get('binaryvit_format')!r}): it is damaged, or a newer binaryvit_hf wrote it."
            )
    try:
        config, shapes = json.loads(metadata["binaryvit_config"]), json.loads(metadata["binaryvit_shapes"])
        if not isinstance(config, dict) or not isinstance(shapes, dict):
            raise ValueError("binaryvit_config and binaryvit_shapes are objects")
        return PackedCheckpoint(tensors, origin, config, shapes, metadata["binaryvit_crc32"])
    except (KeyError, ValueError, RecursionError) as error:
        raise ValueError(f"The metadata of {files[-1].name!r} is damaged ({error}): download it again.") from error


def describe_damage(file: Path) -> str:
    """What is cut off or broken in a file that safetensors refuses, by tensor where its header can be read."""
    content = file.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    try:
        header = json.loads(content[8:start])
        ends = {name: start + entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"}
        _, first_cut = min((end, name) for name, end in ends.items() if end > len(content))
    except (ValueError, TypeError, KeyError, IndexError):
        return f"{file.name!r} is damaged"
    return f"{file.name!r} is cut off before the end of tensor {first_cut!r}"


def check_config(checkpoint: PackedCheckpoint, config) -> None:
    for name, value in config_fields(config).items():
        if checkpoint.config.get(name) != value:
            raise ValueError(
                f"The config says {name}={value}, but the packed weights were saved with "
                f"{name}={checkpoint.config.get(name)}: they do not belong together."
            )


def check_tensors(checkpoint: PackedCheckpoint, model: torch.nn.Module) -> None:
    for name, expected in model.state_dict().items():
        stored = stored_name(name, checkpoint.tensors, model)
        if stored is None:
            raise ValueError(f"The packed checkpoint lacks the tensor {name!r}, so nothing is loaded.")
        tensor, file = checkpoint.tensors[stored], checkpoint.origin[stored]
        if tensor.shape != expected.shape:
            raise ValueError(
                f"Tensor {stored!r} of {file!r} has the shape {tuple(tensor.shape)}, the model of this config has "
                f"{tuple(expected.shape)}."
            )
        same_kind = tensor.is_floating_point() and expected.is_floating_point()
        if not same_kind and tensor.dtype != expected.dtype:
            raise ValueError(
                f"Tensor {stored!r} of {file!r} has the dtype {tensor.dtype}, it must be {expected.dtype}."
            )
    for name, layer in model.named_modules():
        if isinstance(layer, PackedLinear):
            stored = stored_name(f"{name}.packed_weight", checkpoint.tensors, model)
            assert stored is not None  # a missing tensor has raised above
            packed_from = checkpoint.shapes.get(stored)
            if packed_from != list(layer.weight_shape):
                raise ValueError(
                    f"Tensor {stored!r} of {checkpoint.origin[stored]!r} was packed from the shape {packed_from}, the "
                    f"model of this config has {list(layer.weight_shape)}."
                )


def check_checksums(checkpoint: PackedCheckpoint) -> None:
    for index, name in enumerate(sorted(checkpoint.tensors)):
        if checksum(checkpoint.tensors[name]) != checkpoint.checksums[8 * index : 8 * index + 8]:
            raise ValueError(
                f"Tensor {name!r} of {checkpoint.origin[name]!r} is not what was saved (its checksum differs): download "
                "it again."
            )


def stored_name(name: str, stored: dict, model: torch.nn.Module) -> str | None:
    """The name that a model's tensor has in a checkpoint, which may be of the classifier or of its backbone alone."""
    prefix = model.base_model_prefix + "."
    return next((known for known in (name, prefix + name, name.removeprefix(prefix)) if known in stored), None)


QUANT_METHOD = "binaryvit"


class BinaryViTQuantizationConfig(QuantizationConfigMixin):
    """
    Packed weights: `weight_bits` of the model's config a weight.

    Args:
        half: files hold the other floats in half precision where its range allows; they compute in float32 once loaded.

    Raises:
        ValueError: an argument that does not exist, or of the wrong type.
    """

    def __init__(self, half: bool = False, quant_method: str = QUANT_METHOD, **unknown):
        if unknown:
            raise ValueError(
                f"A quantization_config of {QUANT_METHOD!r} has no {next(iter(unknown))!r}; it has 'half'."
            )
        if quant_method != QUANT_METHOD:
            raise ValueError(f"quant_method is {QUANT_METHOD!r}, not {quant_method!r}.")
        if not isinstance(half, bool):
            raise ValueError(f"half of the quantization_config is true or false, not {half!r}.")
        self.quant_method = QUANT_METHOD
        self.half = half


class BinaryViTQuantizer(HfQuantizer):
    """Packs a latent model once it is loaded, or prepares an empty one to be filled with packed weights."""

    requires_calibration = False

    def _process_model_before_weight_loading(self, model, checkpoint_files=None, **kwargs):
        if self.pre_quantized:
            model.expect_packed_weights(checkpoint_files)
        else:
            model.expect_latent_weights()

    def _process_model_after_weight_loading(self, model, **kwargs):
        if not self.pre_quantized:
            model.pack_weights()

    def get_state_dict_and_metadata(self, model):
        return model.packed_state_dict(self.quantization_config.half)

    def _dequantize(self, model, dtype=None):
        model.unpack_weights()
        # A saved model's config holds the name of its dtype.
        return model.to(getattr(torch, dtype) if isinstance(dtype, str) else dtype)

    def is_serializable(self):
        return True

    @property
    def is_trainable(self):
        return False


AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(QUANT_METHOD, BinaryViTQuantizationConfig)
AUTO_QUANTIZER_MAPPING.setdefault(QUANT_METHOD, BinaryViTQuantizer)


# A folder of the same revision, not a branch: one commit holds both, so they cannot drift apart, and one download brings
# the weights that training goes on from, `from_pretrained(…, subfolder="latent")`.
LATENT = "latent"


class ShippedModel(PushToHubMixin):
    """
    Args:
        model: a latent model of binary weights.
    """

    def __init__(self, model):
        self.model = model

    def save_pretrained(self, folder: str | Path, **kwargs) -> None:
        """Write the packed model to `folder` and the latent one to `folder/latent`; `kwargs` as of a model."""
        self.model.save_pretrained(Path(folder) / LATENT, **kwargs)
        pack_folder(type(self.model), Path(folder) / LATENT, folder, **kwargs)


def pack_folder(model_class: type[PreTrainedModel], latent: str | Path, folder: str | Path, **kwargs) -> None:
    """Load a latent model of `model_class` from the folder `latent` and save it packed to `folder`."""
    packed = model_class.from_pretrained(latent, quantization_config=BinaryViTQuantizationConfig())
    packed.save_pretrained(folder, **kwargs)


# What AutoConfig and AutoModel… of a machine without this package load from a saved folder. The config alone would get the
# saved class's entry only.
AUTO_MAP = {
    "AutoConfig": "configuration_binaryvit.BinaryViTConfig",
    "AutoModel": "modeling_binaryvit.BinaryViTModel",
    "AutoModelForImageClassification": "modeling_binaryvit.BinaryViTForImageClassification",
}
ALIGNMENT = 64  # bytes, of PyTorch's own allocator on the CPU


class PackableModel(PreTrainedModel):
    """Base of the models. `BinaryViTQuantizer` calls the last five methods."""

    def __init__(self, config, *args, **kwargs):
        check_quantization_config(getattr(config, "quantization_config", None))
        super().__init__(config, *args, **kwargs)

    @classmethod
    @torch.inference_mode(False)  # or PyTorch would not count the changes of what is loaded
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, output_loading_info=False, **kwargs):
        """
        As in transformers, but never random weights in the place of packed ones.

        Raises:
            ValueError: packed weights that are damaged, incomplete or of another config; the message names the tensor.
        """
        try:
            model, loading_info = super().from_pretrained(
                pretrained_model_name_or_path, *model_args, output_loading_info=True, **kwargs
            )
        except SafetensorError as error:
            raise ValueError(f"The weights of {str(pretrained_model_name_or_path)!r} are damaged: {error}") from error
        check_loading(model, loading_info)
        if model.is_packed:
            # A gradient is nothing to expect of bits; what asks for one has PyTorch compute it.
            model.base_model.requires_grad_(False)
            lay_in_one_buffer(model.base_model)
        align_weights(model)
        return (model, loading_info) if output_loading_info else model

    def save_pretrained(self, *args, **kwargs):
        self.config.auto_map = dict(AUTO_MAP)
        super().save_pretrained(*args, **kwargs)

    def push_to_hub(self, repo_id: str, **kwargs):
        """
        As in transformers, but binary weights are uploaded as bits: the packed model is the repository's, and the latent
        weights lie in its folder `latent`. What is packed already is uploaded as it is.
        """
        if self.is_packed or self.config.weight_bits == 32:
            return super().push_to_hub(repo_id, **kwargs)
        return ShippedModel(self).push_to_hub(repo_id, **kwargs)

    def train(self, mode: bool = True):
        """
        Raises:
            ValueError: training mode for packed weights.
        """
        if mode and self.is_packed:
            raise ValueError(
                "Packed weights cannot be trained: a bit has no gradient, and the float weights whose signs they are were "
                "not kept. Train the latent checkpoint that they were packed from, or a copy with .dequantize()."
            )
        return super().train(mode)

    @property
    def is_packed(self) -> bool:
        return any(isinstance(module, PackedLinear) for module in self.modules())

    def expect_latent_weights(self) -> None:
        """
        Raises:
            ValueError: there is nothing to pack.
        """
        if self.config.weight_bits == 32:
            raise ValueError("There is nothing to pack: weight_bits of the config is 32.")
        # A sign is decided in float32, whatever dtype the rest is loaded in.
        self._keep_in_fp32_modules_strict = {f"{name}.weight" for name in binary_layers(self)}

    def expect_packed_weights(self, checkpoint_files: list[str] | None) -> None:
        """
        Raises:
            ValueError: the files are damaged or do not fit the config.
        """
        expect_packed_layers(self)
        if checkpoint_files is not None:
            check_packed_files(checkpoint_files, self)

    def pack_weights(self) -> None:
        pack_layers(self)

    def packed_state_dict(self, half: bool) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        return packed_state_dict(self, half)

    def unpack_weights(self) -> None:
        unpack_layers(self)
        self.requires_grad_(True)


def check_quantization_config(quantization_config) -> None:
    """
    Raises:
        ValueError: for a network of new weights, or for a method that would leave packed weights aside.
    """
    if quantization_config is None:
        return
    if isinstance(quantization_config, dict):  # from_pretrained makes an object of what it knows
        method = quantization_config.get("quant_method")
    else:
        method = quantization_config.quant_method
    if method != QUANT_METHOD:
        raise ValueError(
            f"BinaryViT's weights are packed by quant_method {QUANT_METHOD!r}; {method!r} is none of its own."
        )
    if isinstance(quantization_config, dict):
        raise ValueError(
            "This config is of packed weights, which a new network does not have: load them with from_pretrained, or "
            "remove quantization_config from the config."
        )


def check_loading(model: PackableModel, loading_info: dict) -> None:
    """
    Raises:
        ValueError: packed weights were asked for or found, and were not loaded.
    """
    random = {*loading_info["missing_keys"], *(key for key, *_ in loading_info["mismatched_keys"])}
    if model.is_packed and random:
        raise ValueError(f"The checkpoint lacks the tensor {min(random)!r}, so it makes no packed model.")
    packed = [key for key in loading_info["unexpected_keys"] if key.endswith(".packed_weight")]
    if packed:
        raise ValueError(
            f"Tensor {min(packed)!r} is packed, but config.json has no quantization_config that says so: they do not "
            "belong together."
        )


def lay_in_one_buffer(model: nn.Module) -> None:
    """
    Make all tensors of a dtype views of one buffer. PyTorch counts the changes of a buffer and of its views together, so the
    engine looks at one counter a dtype; thousands of them, all over the memory, would take a tenth of a forward.
    """
    by_dtype = defaultdict(list)
    for module in model.modules():
        for members in (module._parameters, module._buffers):
            for name, tensor in members.items():
                if tensor is not None and tensor.device.type == "cpu":
                    by_dtype[tensor.dtype].append((members, name, tensor))
    for dtype, places in by_dtype.items():
        step = ALIGNMENT // dtype.itemsize
        sizes = [-(-tensor.numel() // step) * step for *_, tensor in places]
        buffer = torch.empty(sum(sizes), dtype=dtype, device="cpu")
        for (members, name, tensor), part in zip(places, buffer.split(sizes)):
            view = part[: tensor.numel()].view(tensor.shape).copy_(tensor.detach())
            is_parameter = isinstance(tensor, nn.Parameter)
            members[name] = nn.Parameter(view, tensor.requires_grad) if is_parameter else view


def align_weights(model: nn.Module) -> None:
    """
    Copy to aligned memory what still lies in the file, where its address depends on the file's header: a matrix product
    may round differently by the alignment of its operands, and packed and latent models would differ in the last bit.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu" and tensor.data_ptr() % ALIGNMENT:
            tensor.data = tensor.data.clone()

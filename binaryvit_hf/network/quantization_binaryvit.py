# SPDX-License-Identifier: Apache-2.0
"""
Packed checkpoints: their files and checks, and how transformers loads, saves and uploads them.

Files. A model in memory has hundreds of small tensors, whose names and shapes would take a fifth of a small file. So a
safetensors file of format 2 stores the tensors of a module together. The modules are the stem (`embeddings`), the
patch embeddings of a stage (`stages.1.patch_embeddings`), each layer (`stages.1.layers.0`) and the last norm (`norm`).
Their names start with `binaryvit.` in a classifier. Each module has two tensors of one dimension in the file:

- `<module>.floats`: the values of all its float tensors, as float32, float16, bfloat16 or float64;
- `<module>.bytes`, uint8: the bytes of its packed weights and of its int64 counters, least significant byte first.

In both, the tensors follow one another in the order of their names (ASCII), each by rows, without gaps. The config
decides names and shapes. A tensor of another dtype than the `floats` of its module has an entry of its own name, and
`floats` leaves it out. All tensors outside of these modules have entries too, such as the classifier's. In format 1
every tensor has one.

The metadata holds the version of the format (`binaryvit_format`), the config fields that decide the outputs
(`binaryvit_config`, JSON), and checksums (`binaryvit_crc32`), so the loader can name a tensor that was damaged,
exchanged or edited. There are eight hexadecimal digits for each tensor of all files, in the order of their names: the
CRC-32 of its dtype and shape as Python writes them, such as `torch.uint8(2056,)`, and of its content. Format 1 also has
the shapes of the weights before packing (`binaryvit_shapes`, JSON).

transformers. `quant_method: "binaryvit"` selects `BinaryViTQuantizer`. The package and a copy of this file that came
with a checkpoint may meet in one process, and the quantizer of one may get a model of the other. So the quantizer
calls methods of the model and checks no classes.
"""

import contextlib
import contextvars
import copy
import json
import math
import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import initialization as init
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils import logging
from transformers.utils.hub import PushToHubMixin
from transformers.utils.quantization_config import QuantizationConfigMixin

from .configuration_binaryvit import as_pair, check_dtype
from .layers_binaryvit import BinaryLayer
from .packing_binaryvit import (
    PackedLinear,
    binary_layers,
    expect_packed_layers,
    latent_weight,
    packed_layers,
    unpacked_layer,
)


QUANT_METHOD = "binaryvit"
FORMAT = "2"  # of written files
FORMATS: tuple[str | None, ...] = ("1", "2")  # of files that can be read
# Modules whose tensors a file stores together, and the names of the two tensors that hold them.
MODULES = re.compile(r"(embeddings|norm|stages\.\d+\.(?:patch_embeddings|layers\.\d+))\.")
FLOATS, BYTES = "floats", "bytes"
# Folder of the latent weights in a repository. A branch would let packed and latent weights drift apart.
LATENT = "latent"
HALF_MAX, HALF_SMALLEST_NORMAL = 65504.0, 2.0**-14
NOTHING_TO_PACK = (
    "There is nothing to pack: weight_bits of the config is 32. If this was a packed model, turn it into a trainable 1-bit "
    "network with .dequantize(latent=True) instead of .dequantize()."
)
ALIGNMENT = 64  # bytes; PyTorch's own allocator aligns so on the CPU
# The config fields that decide the outputs. A user may change the others: label names, and settings of training.
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
SIZE_FIELDS = ("image_size", "patch_size")
# Attributes of modules that evaluation does not read.
TRAINING_ATTRIBUTES = {
    "training",
    "momentum",
    "p",
    "drop_prob",
    "init_value",
    "probability_clip_init",
    "gradient_checkpointing",
}
# Arguments of `from_pretrained` that say where a repository's files are.
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
# Arguments of the `from_pretrained` that runs, which modules and quantizer are not told; None outside of it.
LOADING: contextvars.ContextVar[dict | None] = contextvars.ContextVar("LOADING", default=None)
# The `state_dict` of the `save_pretrained` that runs, which the quantizer is not told.
SAVING: contextvars.ContextVar[dict | None] = contextvars.ContextVar("SAVING", default=None)
# auto_map of saved configs, for machines without this package. transformers would write only the saved class.
AUTO_MAP = {
    "AutoConfig": "configuration_binaryvit.BinaryViTConfig",
    "AutoModel": "modeling_binaryvit.BinaryViTModel",
    "AutoBackbone": "modeling_binaryvit.BinaryViTBackbone",
    "AutoModelForImageClassification": "modeling_binaryvit.BinaryViTForImageClassification",
}

logger = logging.get_logger(__name__)


# ---- Files ----


def packed_shapes(model: nn.Module) -> dict[str, list[int]]:
    """Shapes of the weights before packing, by the name of the packed weight."""
    return {f"{name}.packed_weight": list(layer.weight_shape) for name, layer in packed_layers(model).items()}


def fits_half(name: str, tensor: torch.Tensor) -> bool:
    """
    Whether half precision keeps the precision of a float tensor.

    The largest magnitude is 0, or from 2**-14 to 65504. Variances are divisors, so their smallest must be at least
    2**-14 too.
    """
    magnitude = tensor.abs()
    largest = magnitude.max()
    smallest = magnitude.min() if name.endswith("running_var") else largest
    return bool((largest <= HALF_MAX) & ((smallest >= HALF_SMALLEST_NORMAL) | (largest == 0)))


def in_half(name: str, tensor: torch.Tensor) -> bool:
    """Whether `half` of the quantization_config stores a tensor in half precision. bfloat16 would not become smaller."""
    return tensor.dtype in (torch.float32, torch.float64) and fits_half(name, tensor)


def config_fields(config) -> dict:
    """The config fields that decide the outputs, as they come back from JSON."""
    return json.loads(json.dumps({name: getattr(config, name) for name in CONFIG_FIELDS}))


def checksum(tensor: torch.Tensor) -> str:
    """CRC-32 of dtype, shape and content, as eight hexadecimal digits."""
    head = f"{tensor.dtype}{tuple(tensor.shape)}".encode()
    content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return f"{zlib.crc32(content, zlib.crc32(head)):08x}"


def holds_module(name: str) -> bool:
    """Whether a tensor of a file holds those of a module."""
    return name.endswith((f".{FLOATS}", f".{BYTES}")) and MODULES.search(name) is not None


def modules_of_file(backbone: nn.Module) -> dict[str, dict[str, torch.Tensor]]:
    """The tensors of a packed backbone by name, in order, by the name of the tensor of a file that holds them."""
    found: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    for name, tensor in sorted(backbone.state_dict().items(), key=lambda entry: entry[0]):
        module = MODULES.match(name)
        if module:
            found[f"{module[1]}.{FLOATS if tensor.is_floating_point() else BYTES}"][name] = tensor
    return found


def join_tensors(tensors: dict[str, torch.Tensor], backbone: nn.Module, prefix: str) -> dict[str, torch.Tensor]:
    """
    Store the tensors of each module of a backbone together.

    Args:
        tensors: of a model, by name.
        backbone: the packed network of the config. A module whose tensors differ from its in name or shape keeps them
            apart.
        prefix: of the backbone's names in `tensors`.
    """
    joined = dict(tensors)
    for whole, expected in modules_of_file(backbone).items():
        parts = {prefix + name: tensors[prefix + name] for name in expected if prefix + name in tensors}
        if [described(part) for part in parts.values()] != [described(part) for part in expected.values()]:
            continue
        if whole.endswith(FLOATS):
            sizes: Counter[torch.dtype] = Counter()
            for part in parts.values():
                sizes[part.dtype] += part.numel()
            dtype = sizes.most_common(1)[0][0]
            parts = {name: part for name, part in parts.items() if part.dtype == dtype}
        flat = [part.detach().cpu().reshape(-1) for part in parts.values()]
        joined[prefix + whole] = torch.cat(
            flat if whole.endswith(FLOATS) else [part.view(torch.uint8) for part in flat]
        )
        for name in parts:
            del joined[name]
    return joined


def described(tensor: torch.Tensor) -> tuple[torch.Size, bool]:
    return tensor.shape, tensor.is_floating_point()


def split_tensors(
    stored: dict[str, torch.Tensor], backbone: nn.Module, prefixes: Iterable[str], origin: Mapping[str, str] = {}
) -> dict[str, torch.Tensor]:
    """
    Give the tensors of a file the names that they have in a model: the reverse of `join_tensors`. They are views.

    Args:
        stored: tensors by the names that they have in files. Those of format 1 stay as they are.
        backbone: a packed backbone, also without weights.
        prefixes: what the backbone's names may start with in `stored`.
        origin: file name of each tensor, for messages.

    Raises:
        ValueError: a tensor does not hold what the config makes.
    """
    tensors = dict(stored)
    for whole, expected in modules_of_file(backbone).items():
        for prefix in prefixes:
            if prefix + whole not in stored:
                continue
            joined = tensors.pop(prefix + whole)
            parts = {prefix + name: part for name, part in expected.items() if prefix + name not in stored}
            has_floats = whole.endswith(FLOATS)
            sizes = [part.numel() if has_floats else part.nbytes for part in parts.values()]
            subject = f"Tensor {prefix + whole!r}" + (f" of {origin[prefix + whole]!r}" if origin else "")
            if joined.shape != (sum(sizes),):
                raise ValueError(
                    f"{subject} has the shape {tuple(joined.shape)}, but the config makes it {(sum(sizes),)}."
                )
            dtype = torch.float32 if has_floats else torch.uint8
            if joined.dtype != dtype and not (has_floats and joined.is_floating_point()):
                raise ValueError(f"{subject} has the dtype {joined.dtype}, but must be {dtype}.")
            for (name, part), piece in zip(parts.items(), joined.split(sizes)):
                # A copy is aligned, as an int64 must be.
                piece = piece if has_floats or part.dtype == dtype else piece.clone().view(part.dtype)
                tensors[name] = piece.view(part.shape)
    return tensors


@dataclass
class PackedCheckpoint:
    """
    Content of the files of one checkpoint.

    Args:
        stored: tensors as in the files.
        origin: file name of each tensor.
        config: the config fields that decide the outputs.
        shapes: of the weights before packing, by the name of the packed weight; None in format 2.
        checksums: of the tensors in the order of their names, eight digits each.
    """

    stored: dict[str, torch.Tensor]
    origin: dict[str, str]
    config: dict
    shapes: dict[str, list[int]] | None
    checksums: str


def read_packed_files(files: Iterable[str], model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """
    Read and check a packed checkpoint.

    Args:
        files: all safetensors files of the checkpoint.
        model: the packed model to load into, without weights (on the meta device).

    Returns:
        The tensors by the names of a classifier or of a backbone, as they were saved.

    Raises:
        ValueError: a file is damaged, or tensors and config were not saved together, or do not fit the model. The
            message names the tensor or field, and the file.
    """
    checkpoint = read_checkpoint([Path(file) for file in files])
    check_config(checkpoint, model.config)
    backbone = model.base_model
    if type(backbone) is not backbone.backbone_class:
        backbone = plain_backbone(model)
    tensors = checkpoint.stored
    if checkpoint.shapes is None:  # format 2
        prefixes = ("", model.base_model_prefix + ".")
        tensors = split_tensors(tensors, backbone, prefixes, checkpoint.origin)
    check_tensors(tensors, checkpoint, model)
    check_checksums(checkpoint)
    return tensors


def plain_backbone(model: PreTrainedModel) -> PreTrainedModel:
    """The packed backbone that the config of `model` makes, without weights, adapters or additions."""
    with torch.device("meta"):
        backbone = model.base_model.backbone_class(copy.deepcopy(model.config))
    expect_packed_layers(backbone)
    return backbone


def describe_other_modules(model: nn.Module, expected: nn.Module) -> str | None:
    """How the modules of a backbone differ from those of the `expected` network of its config, or None."""
    modules, expected_modules = dict(model.named_modules()), dict(expected.named_modules())
    for name in modules | expected_modules:
        module, expected_module = modules.get(name), expected_modules.get(name)
        if module is model:
            continue  # a user's subclass; and its plain attributes, such as the folder it was loaded from
        if kind_of_module(module) is not kind_of_module(expected_module):
            return f"its module {name!r} is not the one of its config"
        for attribute, value in plain_attributes(expected_module).items():
            if getattr(module, attribute, None) != value:
                return f"{attribute} of its module {name!r} is {getattr(module, attribute, None)}, not {value}"
    return None


def describe_other_head(model: PreTrainedModel) -> str | None:
    """How the head of a model, if it has one, differs from a linear classifier, or None. Its number of labels may be another."""
    names = {name for name in model.state_dict() if is_of_head(name, model)}
    is_linear = model.base_model is model or names == {"classifier.weight", "classifier.bias"}
    return None if is_linear else "its classifier is not the one of its config"


def kind_of_module(module: nn.Module | None) -> type:
    """Its class. All batch norms are one kind: training on several GPUs puts `nn.SyncBatchNorm` for others."""
    return nn.modules.batchnorm._BatchNorm if isinstance(module, nn.modules.batchnorm._BatchNorm) else type(module)


def plain_attributes(module: nn.Module) -> dict:
    """Settings that decide what a module computes in evaluation, such as `eps` and `num_heads`."""
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_") and name not in TRAINING_ATTRIBUTES and isinstance(value, (int, float, str, tuple))
    }


def read_checkpoint(files: list[Path]) -> PackedCheckpoint:
    stored, origin, metadata = {}, {}, {}
    for file in files:
        if file.suffix != ".safetensors":
            raise ValueError(
                f"{file.name!r} is no file of safetensors, as packed weights have: save the model with save_pretrained."
            )
        try:
            with safe_open(file, framework="pt") as content:
                found = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118, not a dictionary
                metadata = content.metadata() or {}
        except SafetensorError as error:
            raise ValueError(describe_damage(file, error)) from error
        stored |= found
        origin |= dict.fromkeys(found, file.name)
        if metadata.get("binaryvit_format") not in FORMATS:
            raise ValueError(
                f"{file.name!r} has the packed format {metadata.get('binaryvit_format')!r}, not {FORMAT!r}: "
                "download it again, or update binaryvit_hf."
            )
    try:
        has_shapes = metadata.get("binaryvit_format") == "1"
        config = json.loads(metadata["binaryvit_config"])
        shapes = json.loads(metadata["binaryvit_shapes"]) if has_shapes else {}
        if not isinstance(config, dict) or not isinstance(shapes, dict):
            raise ValueError("binaryvit_config and binaryvit_shapes must be objects")
        checksums = metadata["binaryvit_crc32"]
    except (KeyError, ValueError, RecursionError) as error:
        raise ValueError(f"The metadata of {files[-1].name!r} is damaged ({error}): download it again.") from error
    return PackedCheckpoint(stored, origin, config, shapes if has_shapes else None, checksums)


def describe_damage(file: Path, error: SafetensorError) -> str:
    """A sentence about a file that safetensors refuses. Names the first tensor that is cut off, if the header can be read."""
    content = file.read_bytes()
    if content.startswith(b"version https://git-lfs"):
        return f"{file.name!r} is a pointer of Git LFS, not the file: run `git lfs pull` in its folder."
    start = 8 + int.from_bytes(content[:8], "little")
    try:
        header = json.loads(content[8:start])
        ends = {name: start + entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"}
        _, first_cut = min((end, name) for name, end in ends.items() if end > len(content))
        damage = f"is cut off before the end of tensor {first_cut!r}"
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        damage = "is damaged"
    return f"{file.name!r} {damage} ({error}): download it again."


def check_config(checkpoint: PackedCheckpoint, config) -> None:
    for name, value in config_fields(config).items():
        stored = checkpoint.config.get(name)
        is_same = both_sides(stored) == both_sides(value) if name in SIZE_FIELDS else stored == value
        if not is_same:
            raise ValueError(
                f"The config has {name}={value}, but the packed weights were saved with "
                f"{name}={stored}: load the config.json that was saved with them."
            )


def both_sides(size):
    """A size of JSON as a list. Unlike `as_pair` it takes whatever a damaged file may hold."""
    return [size, size] if isinstance(size, int) else size


def check_tensors(tensors: dict[str, torch.Tensor], checkpoint: PackedCheckpoint, model: PreTrainedModel) -> None:
    shapes = packed_shapes(model)
    for name, expected in model.state_dict().items():
        stored = stored_name(name, tensors, model)
        if stored is None:
            is_of_other = is_of_other_class(tensors, model)
            if is_of_other and is_new_head(name, model):
                continue
            remedy = describe_other_class(name, model) if is_of_other else "download it again"
            raise ValueError(f"The packed checkpoint lacks the tensor {name!r}: {remedy}.")
        file = checkpoint.origin.get(stored)
        if file is None:  # `split_tensors` made its shape and dtype
            continue
        tensor = tensors[stored]
        if tensor.shape != expected.shape and not is_new_head(name, model):
            remedy = ""
            if is_of_head(name, model) and tensor.dim() and tensor.shape[1:] == expected.shape[1:]:
                remedy = (
                    f": num_labels={len(tensor)} keeps the classifier, ignore_mismatched_sizes=True makes a new one"
                )
            raise ValueError(
                f"Tensor {stored!r} of {file!r} has the shape {tuple(tensor.shape)}, but the config makes it "
                f"{tuple(expected.shape)}{remedy}."
            )
        same_kind = tensor.is_floating_point() and expected.is_floating_point()
        if not same_kind and tensor.dtype != expected.dtype:
            raise ValueError(
                f"Tensor {stored!r} of {file!r} has the dtype {tensor.dtype}, but must be {expected.dtype}."
            )
        if name in shapes and checkpoint.shapes is not None and checkpoint.shapes.get(stored) != shapes[name]:
            raise ValueError(
                f"Tensor {stored!r} of {file!r} was packed from the shape {checkpoint.shapes.get(stored)}, but the "
                f"config makes it {shapes[name]}."
            )


def check_checksums(checkpoint: PackedCheckpoint) -> None:
    for index, name in enumerate(sorted(checkpoint.stored)):
        if checksum(checkpoint.stored[name]) != checkpoint.checksums[8 * index : 8 * index + 8]:
            raise ValueError(
                f"Tensor {name!r} of {checkpoint.origin[name]!r} was changed after saving (its checksum differs): "
                "download it again."
            )


def stored_name(name: str, stored: dict, model: nn.Module) -> str | None:
    """Name of a model's tensor in the checkpoint of a classifier or of a backbone, or None."""
    prefix = model.base_model_prefix + "."
    return next((known for known in (name, prefix + name, name.removeprefix(prefix)) if known in stored), None)


def is_of_other_class(tensors: dict, model: PreTrainedModel) -> bool:
    """Whether a checkpoint lacks the whole norm, classifier or both, as that of a backbone or of a model without a head."""

    def part(name: str) -> str:
        return name.removeprefix(model.base_model_prefix + ".").split(".")[0]

    names = list(model.state_dict())
    missing = [name for name in names if stored_name(name, tensors, model) is None]
    parts = {part(name) for name in missing}
    return parts <= {"norm", "classifier"} and missing == [name for name in names if part(name) in parts]


def is_new_head(name: str, model: PreTrainedModel) -> bool:
    """Whether a tensor belongs to the head and may be missing in the checkpoint, or have another shape there."""
    return may_mismatch() and is_of_head(name, model)


def is_of_head(name: str, model: PreTrainedModel) -> bool:
    return model.base_model is not model and not name.startswith(model.base_model_prefix + ".")


def describe_other_class(name: str, model: PreTrainedModel) -> str:
    """What to do with the checkpoint of another class, which lacks the tensor `name`."""
    new_head = ", or give it a new classifier with ignore_mismatched_sizes=True" if is_of_head(name, model) else ""
    return f"load it with the class that saved it{new_head}"


def may_mismatch() -> bool:
    """Whether the running `from_pretrained` may make tensors of another shape anew."""
    return bool((LOADING.get() or {}).get("ignore_mismatched_sizes"))


# ---- Quantizer of transformers ----


class BinaryViTQuantizationConfig(QuantizationConfigMixin):
    """
    Pass it to `from_pretrained` to pack a latent checkpoint: `weight_bits` of the model's config per weight.

    Args:
        half: save all other floats that fit in half precision (`in_half`). The loaded model computes in the config's dtype.

    Raises:
        ValueError: an argument does not exist or has the wrong type.
    """

    def __init__(self, half: bool = False, quant_method: str = QUANT_METHOD, **unknown):
        if quant_method != QUANT_METHOD:
            raise ValueError(f"quant_method must be {QUANT_METHOD!r} for BinaryViT, not {quant_method!r}.")
        if unknown:
            raise ValueError(
                f"A quantization_config of {QUANT_METHOD!r} has no {next(iter(unknown))!r}; it has 'half'."
            )
        if not isinstance(half, bool):
            raise ValueError(f"half of the quantization_config must be true or false, not {half!r}.")
        self.quant_method = QUANT_METHOD
        self.half = half


class BinaryViTQuantizer(HfQuantizer):
    """Packs a latent model after loading, or prepares an empty model for packed weights."""

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
        # The config of a saved model holds the name of the dtype.
        return model.to(getattr(torch, dtype) if isinstance(dtype, str) else dtype)

    def is_serializable(self):
        return True

    @property
    def is_trainable(self):
        return True

    @property
    def is_qat_trainable(self):
        return True  # without it, a Trainer takes only models of PEFT; the model refuses to train its bits (`train`)


AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(QUANT_METHOD, BinaryViTQuantizationConfig)
AUTO_QUANTIZER_MAPPING.setdefault(QUANT_METHOD, BinaryViTQuantizer)


# ---- Base class of the models ----


class PackableModel(PreTrainedModel):
    """
    Loads, saves, packs and uploads. `BinaryViTQuantizer` calls the methods from `expect_latent_weights` to
    `unpack_weights`.
    """

    def __init__(self, config, *args, **kwargs):
        check_quantization_config(getattr(config, "quantization_config", None))
        super().__init__(config, *args, **kwargs)
        self.built_from = config_fields(config)  # the config may be edited later

    def half(self):
        return self.to(torch.float16)  # transformers refuses `half` and `float` for all quantised models

    def float(self):
        return self.to(torch.float32)

    def post_init(self):
        """
        Transformers calls it when all modules exist.

        A model of another kind builds its backbone from the config and then loads tensors by name. So the backbone of
        a packed config has packed layers at once. They compute NaN until they are loaded.

        Raises:
            ValueError: the config is of packed weights, and the network is a new classifier.
        """
        if LOADING.get() is None and getattr(self.config, "quantization_config", None) is not None:
            if self.base_model is not self:
                raise ValueError(
                    "The quantization_config is of packed weights, which a new network does not have: load them with "
                    "from_pretrained, or remove quantization_config."
                )
            expect_packed_layers(self)
        super().post_init()

    def _init_weights(self, module):
        if isinstance(module, PackedLinear):
            init.constant_(module.weight_scale, math.nan)
        elif isinstance(module, BinaryLayer):
            if is_loaded(module.shift) and not is_loaded(module.weight) and not may_mismatch():
                name = next(name for name, layer in binary_layers(self).items() if layer is module)
                raise ValueError(not_expected(name + ".packed_weight"))
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            init.zeros_(module.shift)
        else:
            super()._init_weights(module)

    @classmethod
    @torch.inference_mode(False)  # PyTorch does not count changes of tensors made in inference mode
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, output_loading_info=False, **kwargs):
        """
        Load a model as `PreTrainedModel.from_pretrained` does, but never with random weights in place of packed ones.

        `image_size`, or a `config` with another `image_size` than the checkpoint's, resizes the position embeddings
        (`resize_position_embeddings`).

        With `ignore_mismatched_sizes`, only the classifier of a packed model may be missing or have another shape: it is
        made anew.

        Raises:
            ValueError: packed weights are damaged, incomplete or of another config; the message names the tensor.
        """
        kwargs, image_size = at_stored_image_size(cls.config_class, pretrained_model_name_or_path, kwargs)
        if isinstance(kwargs.get("quantization_config"), dict):
            kwargs["quantization_config"] = BinaryViTQuantizationConfig(**kwargs["quantization_config"])
        config = kwargs.get("config")
        if isinstance(getattr(config, "quantization_config", None), QuantizationConfigMixin):
            # The config of a loaded model has an object, but transformers reads a dictionary.
            kwargs["config"] = config = copy.deepcopy(config)
            config.quantization_config = config.quantization_config.to_dict()
        token = LOADING.set(kwargs)
        try:
            model, loading_info = super().from_pretrained(
                pretrained_model_name_or_path, *model_args, output_loading_info=True, **kwargs
            )
            check_loading(model, loading_info)
        except SafetensorError as error:
            raise ValueError(f"The weights of {str(pretrained_model_name_or_path)!r} are damaged: {error}") from error
        finally:
            LOADING.reset(token)
        if image_size is not None:
            model.resize_position_embeddings(image_size)
        if model.is_packed:
            # Parameters with gradients would make PyTorch compute the model outside of no_grad.
            model.base_model.requires_grad_(False)
            count_changes_together(model.base_model)
        align_weights(model)
        return (model, loading_info) if output_loading_info else model

    def save_pretrained(self, save_directory, is_main_process=True, state_dict=None, *args, **kwargs):
        self.config.auto_map = dict(AUTO_MAP)
        self.match_quantizer()
        token = SAVING.set(state_dict)
        try:
            super().save_pretrained(save_directory, is_main_process, state_dict, *args, **kwargs)
        finally:
            SAVING.reset(token)

    def match_quantizer(self) -> None:
        """
        Give a packed model a quantizer, from which transformers gets the content of its files, and take it from others.

        `from_pretrained` does so too. But layers may be packed and unpacked later, also through a part of this model,
        which shares its config.
        """
        quantizer = getattr(self, "hf_quantizer", None)
        packing = getattr(self.config, "quantization_config", None)
        if self.is_packed and quantizer is None:
            if packing is None or isinstance(packing, dict):
                packing = BinaryViTQuantizationConfig(**(packing or {}))
            self.hf_quantizer = BinaryViTQuantizer(packing)
            self.config.quantization_config = packing
        elif not self.is_packed and (quantizer or packing):
            BinaryViTQuantizer(packing).remove_quantization_config(self)

    def push_to_hub(self, repo_id: str, **kwargs):
        """
        Upload a model (`PreTrainedModel.push_to_hub`). A latent model is packed first.

        The repository then holds the packed model, and the latent one in its folder `latent`. After the upload of a
        packed model, latent weights that were there before are still there: a warning says so. A pull request
        (`create_pr=True`) changes nothing there, so it gets no warning.
        """
        if self.config.weight_bits == 32:
            logger.warning(NOTHING_TO_PACK)
        if is_latent(self):
            return ShippedModel(self).push_to_hub(repo_id, **kwargs)
        commit = super().push_to_hub(repo_id, **kwargs)
        if self.is_packed and not kwargs.get("create_pr"):
            warn_of_latent_weights(commit.repo_url.repo_id, kwargs.get("token"), kwargs.get("revision"))
        return commit

    def train(self, mode: bool = True):
        """
        Switch to training mode, or to evaluation mode.

        A bit has no gradient. So a packed backbone stays in evaluation mode and keeps its running statistics. Heads on it
        go to training mode, and so do adapters in it. A packed classifier without a parameter to train, such as the
        teacher in a larger module, stays in evaluation mode.

        Raises:
            ValueError: the layers of bits of a packed classifier are not frozen.
        """
        if not mode or not self.is_packed:
            return super().train(mode)
        if not any(parameter.requires_grad for parameter in self.parameters()):
            return super().train(False)
        if self.base_model is not self:
            self.check_trains_without_bits()
            return super().train()
        self.freeze_bits()
        super().train(False)
        train_parts_without_bits(self)
        return self

    def freeze_bits(self) -> None:
        """Freeze a packed backbone. The loader of a head on it, in transformers, makes every float tensor trainable."""
        if self.is_packed and bits_want_gradients(self):
            self.requires_grad_(False)

    def check_trains_without_bits(self) -> None:
        """
        Raises:
            ValueError: a parameter in a layer of bits of this packed model requires a gradient.
        """
        if bits_want_gradients(self):
            raise ValueError(
                "Packed weights cannot be trained, because a bit has no gradient. Train the latent checkpoint that they "
                "were packed from, or this model after .dequantize(latent=True); to train only its classifier, freeze its "
                "base_model."
            )
        logger.warning_once(
            "This model is packed, so its bits do not train: only the parameters that require a gradient do, such as "
            "the classifier's. To train all of it, call .dequantize(latent=True) first."
        )

    def warn_of_frozen_model(self, loss: torch.Tensor) -> None:
        """
        Warn if the loss of a packed model cannot train it. PyTorch's error of `loss.backward()` names no reason.

        `train` cannot say it: the frozen teacher in a larger module is asked for training mode, too.
        """
        if loss.requires_grad or not torch.is_grad_enabled() or torch.compiler.is_compiling() or not self.is_packed:
            return
        logger.warning_once(
            "The loss of this packed model has no gradient, because all its parameters are frozen. To train its classifier, "
            "call .classifier.requires_grad_(True); to train all of it, .dequantize(latent=True). To compute the loss "
            "alone, use torch.no_grad()."
        )

    @property
    def is_packed(self) -> bool:
        return any(isinstance(module, PackedLinear) for module in self.modules())

    def expect_latent_weights(self) -> None:
        """
        Raises:
            ValueError: the weights are not quantised.
        """
        check_packable(self.config)
        # Signs are computed in float32, also if other tensors are loaded in another dtype.
        self._keep_in_fp32_modules_strict = {f"{name}.weight" for name in binary_layers(self)}

    def expect_packed_weights(self, checkpoint_files: list[str] | None) -> None:
        """
        Raises:
            ValueError: the files are damaged or do not fit the config.
        """
        expect_packed_layers(self)
        if checkpoint_files is not None:
            self.read_tensors = read_packed_files(checkpoint_files, self)

    @staticmethod
    def _load_pretrained_model(model, state_dict, checkpoint_files, *args, **kwargs):
        """Transformers calls it to load the tensors of the files: here, those that `expect_packed_weights` has read."""
        read_tensors = model.__dict__.pop("read_tensors", None)
        if state_dict is None:
            state_dict = read_tensors
        elif model.is_packed and any(map(holds_module, state_dict)):
            prefixes = ("", model.base_model_prefix + ".")
            state_dict = split_tensors(state_dict, plain_backbone(model), prefixes)
        return PreTrainedModel._load_pretrained_model(model, state_dict, checkpoint_files, *args, **kwargs)

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        """PyTorch's `load_state_dict` calls it, also with the tensors of a packed file, as the Trainer does to resume."""
        if self.base_model is self and self.is_packed and any(map(holds_module, state_dict)):
            try:
                tensors = split_tensors(state_dict, plain_backbone(self), [prefix])
            except ValueError as error:
                error_msgs.append(str(error))
            else:
                for name in state_dict.keys() - tensors.keys():
                    del state_dict[name]
                state_dict.update(tensors)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    @torch.inference_mode(False)  # tensors made in inference mode can be neither trained nor watched by the engine
    def pack_weights(self) -> None:
        """
        Pack every binary layer in place.

        Raises:
            ValueError: the weights are not quantised, or one is offloaded or not finite; the model stays as it was.
        """
        check_packable(self.config)
        check_not_offloaded(self, "pack it")
        if any(layer.weight.dtype.itemsize < 4 for layer in binary_layers(self).values()):
            logger.warning_once(
                "Rounding of the latent weights may change signs: keep them in float32 until they are packed."
            )
        layers = {name: PackedLinear(layer) for name, layer in binary_layers(self).items()}
        for name, packed in layers.items():
            packed.pack(self.get_submodule(name), name)
        for name, packed in layers.items():
            self.set_submodule(name, packed)
        self.eval()

    def packed_state_dict(self, half: bool) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """
        Tensors and metadata of a packed checkpoint: of the `state_dict` that `save_pretrained` got, else of this model.

        Args:
            half: store the floats that fit in half precision (`in_half`).

        Raises:
            ValueError: weights are offloaded, the config was edited and describes another network, or nobody could load
                the file: the `state_dict` lacks tensors of this model, or the model was edited and lacks them itself.
        """
        check_not_offloaded(self, "save it packed")
        backbone, lost_edit = expected_backbone(self)
        own, given = self.state_dict(), SAVING.get()
        if given:  # ranks that write no file give an empty one
            check_complete(given, own)
        tensors = own if given is None else given
        prefix = "" if self.base_model is self else self.base_model_prefix + "."
        check_loadable(tensors, backbone, prefix)
        if lost_edit:
            logger.warning(
                "The config does not describe this network (%s): the saved model will not have this edit.", lost_edit
            )
        if half:
            tensors = {name: tensor.half() if in_half(name, tensor) else tensor for name, tensor in tensors.items()}
        tensors = join_tensors(tensors, backbone, prefix)
        metadata = {
            "binaryvit_format": FORMAT,
            "binaryvit_config": json.dumps(config_fields(self.config)),
            "binaryvit_crc32": "".join(checksum(tensors[name]) for name in sorted(tensors)),
        }
        return tensors, metadata

    @torch.inference_mode(False)  # tensors made in inference mode cannot be trained
    def unpack_weights(self) -> None:
        """Replace packed layers by full-precision weights `levels * scale`, and set `weight_bits` to 32."""
        self.config.weight_bits = 32
        for name, packed in packed_layers(self).items():
            self.set_submodule(name, unpacked_layer(packed, self.config, packed.unpack()))
        give_own_counters(self)
        self.requires_grad_(True)

    @torch.inference_mode(False)  # tensors made in inference mode cannot be trained
    def dequantize(self, dtype: torch.dtype | str | None = None, latent: bool = False):
        """
        Turn a packed model into one of float weights that can be trained, in place. The outputs stay the same, except
        for rounding.

        Args:
            dtype: dtype of the result. Default: the dtype of the packed model; float32 if `latent`.
            latent: return a 1-bit network (`weight_bits` as before) whose latent weights are levels times scale.
                Training continues from it, and packing it gives the same bits. Without `latent`, the result is a
                network of 32-bit weights, which cannot be packed.

        Raises:
            ValueError: the model is not packed, or is offloaded, or `dtype` is not one of floats.
        """
        check_dtype(dtype)
        if not latent:
            self.match_quantizer()
            return super().dequantize() if dtype is None else super().dequantize(dtype)
        if not self.is_packed:
            raise ValueError("The model is not packed, so it has no bits to make latent weights from.")
        check_not_offloaded(self, "make its latent weights")
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype or torch.float32
        # All weights before any layer is replaced: after an error the model stays as it was.
        weights = {name: latent_weight(packed, dtype, name) for name, packed in packed_layers(self).items()}
        for name, weight in weights.items():
            self.set_submodule(name, unpacked_layer(self.get_submodule(name), self.config, weight))
        self.match_quantizer()
        give_own_counters(self)
        return self.requires_grad_(True).to(dtype)

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Number of parameters (`PreTrainedModel.num_parameters`). A packed weight counts as many as before packing."""
        total = super().num_parameters(only_trainable, exclude_embeddings)
        if only_trainable:
            return total
        return total + sum(math.prod(packed.weight_shape) for packed in packed_layers(self).values())


def bits_want_gradients(model: nn.Module) -> bool:
    """Whether a parameter of a layer of bits requires a gradient."""
    layers = (layer for layer in model.modules() if isinstance(layer, (BinaryLayer, PackedLinear)))
    return any(parameter.requires_grad for layer in layers for parameter in layer.parameters())


def train_parts_without_bits(module: nn.Module) -> None:
    """
    Training mode for the parts of a packed backbone that train and have neither bits nor running statistics.

    Such a part is an adapter with its dropout.
    """
    if not any(parameter.requires_grad for parameter in module.parameters()):
        return
    stays = (BinaryLayer, PackedLinear, nn.modules.batchnorm._BatchNorm)
    if not any(isinstance(part, stays) for part in module.modules()):
        module.train()
        return
    for child in module.children():
        train_parts_without_bits(child)


def check_packable(config) -> None:
    """
    Raises:
        ValueError: the weights are not quantised.
    """
    if config.weight_bits == 32:
        raise ValueError(NOTHING_TO_PACK)


def check_not_offloaded(model: nn.Module, action: str) -> None:
    """
    Raises:
        ValueError: weights are offloaded.
    """
    offloaded = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    if offloaded:
        raise ValueError(f"Tensor {offloaded[0]!r} is offloaded: load the model without a device_map to {action}.")


def check_complete(given: dict[str, torch.Tensor], own: dict[str, torch.Tensor]) -> None:
    """
    Raises:
        ValueError: a `state_dict` lacks tensors of the packed model, so nobody could load the file.
    """
    missing = next((name for name in own if name not in given), None)
    if missing is not None:
        raise ValueError(
            f"The state_dict lacks the tensor {missing!r} of this packed model: give all tensors by the names in "
            "model.state_dict(), or no state_dict."
        )


def check_loadable(tensors: dict[str, torch.Tensor], backbone: PreTrainedModel, prefix: str) -> None:
    """
    Raises:
        ValueError: tensors to save lack one of the `backbone` of the config, or it has another shape.
    """
    for name, expected in backbone.state_dict().items() if tensors else ():
        tensor = tensors.get(prefix + name)
        if tensor is None or tensor.shape != expected.shape:
            shape = "is missing" if tensor is None else f"has the shape {tuple(tensor.shape)}"
            raise ValueError(
                f"The model was edited, and nobody could load what it saves: its tensor {prefix + name!r} {shape}, and the "
                f"config makes it {tuple(expected.shape)}. Undo the edit, or keep model.state_dict() with torch.save."
            )


def expected_backbone(model: PackableModel) -> tuple[PreTrainedModel, str | None]:
    """
    `plain_backbone` of a model to save, and how the model's modules were edited without its config, if they were.

    Raises:
        ValueError: the config was edited after the packed model was made, and describes another network.
    """
    is_edited = config_fields(model.config) != model.base_model.built_from
    try:
        backbone = plain_backbone(model)
        difference = describe_other_modules(model.base_model, backbone) or describe_other_head(model)
    except Exception as error:  # the checks of a config raise errors of several kinds
        if not is_edited:
            raise
        difference = f"it describes no packed network: {type(error).__name__}"
    if difference and is_edited:
        raise ValueError(f"The config was edited and does not describe this network ({difference}): undo the edit.")
    return backbone, difference


def at_stored_image_size(config_class: type[PreTrainedConfig], source, options: dict) -> tuple[dict, Any]:
    """
    Arguments of `from_pretrained` that load a checkpoint at the image size that it was saved with.

    Args:
        source: folder or Hub repository of the checkpoint.
        options: keyword arguments of `from_pretrained`.

    Returns:
        The keyword arguments to use instead, and the image size that `options` ask for; None if it is the same.

    Raises:
        ValueError: the network cannot take images of that size.
    """
    config = options.get("config")
    if source is None or (config is None and "image_size" not in options):
        return options, None
    where = {name: options[name] for name in HUB_ARGUMENTS if name in options}
    try:
        stored = stored_sizes(config_class, source, where)
        if isinstance(config, PreTrainedConfig):
            asked = {name: getattr(config, name) for name in SIZE_FIELDS}
        else:
            asked = stored if config is None else stored_sizes(config_class, config, where)
            asked = asked | {name: options[name] for name in SIZE_FIELDS if name in options}
        image_size = asked["image_size"]
        differs = {name: as_pair(asked[name]) != as_pair(stored[name]) for name in SIZE_FIELDS}
    except (OSError, TypeError):  # no config.json, or a size that is no number: transformers says so
        return options, None
    if not differs["image_size"] or differs["patch_size"]:  # weights of other patches are no matter of size
        return options, None
    if isinstance(config, PreTrainedConfig):
        config = copy.deepcopy(config)
        config.image_size = stored["image_size"]
        options = options | {"config": config}
    else:
        config = config_class.from_pretrained(config or source, **where)
        options = options | {"image_size": stored["image_size"]}
    config.grid_sizes_of(image_size)  # its checks raise before the weights are read
    return options, image_size


def stored_sizes(config_class: type[PreTrainedConfig], source, where: dict) -> dict:
    """
    The sizes of image and patch in a config.json, or without them their defaults.

    Raises:
        OSError: there is no config.json.
    """
    stored = PreTrainedConfig.get_config_dict(source, **where)[0]
    return {name: stored.get(name, getattr(config_class, name)) for name in SIZE_FIELDS}


def check_quantization_config(quantization_config) -> None:
    """
    Raises:
        ValueError: the quant_method is another one.
    """
    if quantization_config is None:
        return
    is_dict = isinstance(quantization_config, dict)
    method = quantization_config.get("quant_method") if is_dict else quantization_config.quant_method
    if method != QUANT_METHOD:
        raise ValueError(f"quant_method must be {QUANT_METHOD!r} for BinaryViT, not {method!r}.")


def not_expected(name: str) -> str:
    """Message for a packed tensor of a file whose config has no quantization_config."""
    return (
        f"Tensor {name!r} is packed, but config.json has no quantization_config: load the config.json that was saved with "
        "it. A head on a packed backbone needs the backbone's own config as its backbone_config."
    )


def is_loaded(tensor: torch.Tensor) -> bool:
    """Whether transformers has loaded a tensor from a checkpoint, and so does not initialise it."""
    return getattr(tensor, "_is_hf_initialized", False)


def check_loading(model: PackableModel, loading_info: dict) -> None:
    """
    Raises:
        ValueError: tensors of a packed model are missing, or packed tensors are not loaded.
    """
    packed = [key for key in loading_info["unexpected_keys"] if holds_module(key) and key.endswith(BYTES)]
    if packed and not model.is_packed:
        raise ValueError(not_expected(max(packed)))  # the last, a stage's: it has packed weights
    mismatched = {key for key, *_ in loading_info["mismatched_keys"]}
    missing = {key for key in mismatched.union(loading_info["missing_keys"]) if not is_new_head(key, model)}
    if model.is_packed and missing:
        name = min(missing)  # one of the backbone, if any: its names come first
        raise ValueError(f"The checkpoint lacks the tensor {name!r}: {describe_other_class(name, model)}.")


# ---- Upload of a packed model with its latent weights ----


def is_latent(model: nn.Module) -> bool:
    """Whether a model is a BinaryViT with float weights that are to be quantised, so that it can be packed."""
    return model.config.model_type == QUANT_METHOD and model.config.weight_bits < 32 and not model.is_packed


class ShippedModel(PushToHubMixin):
    """
    Saves or uploads a latent model together with its packed one.

    Args:
        model: a latent model of binary weights.
    """

    def __init__(self, model):
        self.model = model

    def save_pretrained(self, folder: str | Path, **kwargs) -> None:
        """Write the packed model to `folder` and the latent one to `folder/latent`. `kwargs` go to both models."""
        self.model.save_pretrained(Path(folder) / LATENT, **kwargs)
        pack_folder(type(self.model), Path(folder) / LATENT, folder, **kwargs)


def pack_folder(model_class: type[PreTrainedModel], latent: str | Path, folder: str | Path, **kwargs) -> None:
    """Load a latent model of `model_class` from the folder `latent` and save it packed to `folder`."""
    packed = model_class.from_pretrained(latent, quantization_config=BinaryViTQuantizationConfig())
    packed.save_pretrained(folder, **kwargs)


def warn_of_latent_weights(repo_id: str, token: str | bool | None, revision: str | None) -> None:
    """Warn if a repository, to which packed weights were uploaded, has latent ones: they may be of an earlier model."""
    files = []
    with contextlib.suppress(Exception):  # the upload is complete, also if the connection is lost now
        files = HfApi(token=token).list_repo_files(repo_id, revision=revision)
    if any(name.startswith(f"{LATENT}/") for name in files):
        arguments = ", ".join([repr(LATENT), repr(repo_id), *([f"revision={revision!r}"] if revision else [])])
        logger.warning(
            f"{repo_id!r} still has latent weights of an earlier upload in its folder {LATENT!r}. If they are not of the "
            f"model that was uploaded now, delete them: huggingface_hub.delete_folder({arguments})"
        )


# ---- Memory of loaded models ----


def stored_tensors(model: nn.Module) -> list[tuple[dict, str, torch.Tensor]]:
    """Every parameter and buffer: the dictionary of its module that holds it, its name there, and the tensor."""
    return [
        (members, name, tensor)
        for module in model.modules()
        for members in (module._parameters, module._buffers)
        for name, tensor in members.items()
        if tensor is not None
    ]


def count_changes_together(model: nn.Module) -> None:
    """
    Let PyTorch count the changes of all tensors on the CPU together, and tell the engine slot of `model`.

    So the engine reads one counter. A counter for each tensor would take a tenth of a forward. Views of a tensor share its
    counter, and keep it when `data` gives each one memory of its own.
    """
    counter, together = torch.empty(0, device="cpu"), []
    for members, name, tensor in stored_tensors(model):
        if tensor.device.type == "cpu":
            is_parameter = isinstance(tensor, nn.Parameter)
            counted = nn.Parameter(counter, tensor.requires_grad) if is_parameter else counter.detach()
            counted.data = tensor.detach().clone()
            members[name] = counted
            together.append(counted)
    model.engine_slot.set_counted_together(together)


def give_own_counters(model: nn.Module) -> None:
    """
    Give every tensor a counter of changes of its own: the reverse of `count_changes_together`, for training.

    Batch normalisation changes its running statistics in place. A counter that they share with parameters would make
    PyTorch take these for changed, too, and refuse the backward pass.
    """
    for members, name, tensor in stored_tensors(model):
        copied = tensor.detach().clone()
        is_parameter = isinstance(tensor, nn.Parameter)
        members[name] = nn.Parameter(copied, tensor.requires_grad) if is_parameter else copied


def align_weights(model: nn.Module) -> None:
    """
    Copy tensors on the CPU that are not aligned, for example tensors that are mapped from a file.

    The rounding of a matrix product may depend on the alignment of its operands, so packed and latent models would
    differ.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu" and tensor.data_ptr() % ALIGNMENT:
            tensor.data = tensor.data.clone()

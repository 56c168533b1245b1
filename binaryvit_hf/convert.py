"""Convert checkpoints of the paper's public code: read them without running code in them, and rename their tensors."""

import argparse
import mmap
import pickle
import re
import zipfile
from pathlib import Path, PosixPath, PurePosixPath, PureWindowsPath, WindowsPath

import torch
from transformers import PreTrainedConfig

from binaryvit_runtime.errors import UserError, counted, first_sentence

from .loading import build_classifier
from .network.configuration_binaryvit import MAX_LABELS


# Patterns of names in the public code, after "vit.encoder.layer.N.", and our names. The first match counts.
LAYER_NAMES = [
    (r"layernorm_before\.", "norm1.batch_norm."),
    (r"layernorm_after\.", "norm2.batch_norm."),
    (r"attention\.attention\.att_prob_clip$", "attention.probability_clip"),
    (r"attention\.attention\.moveq2$", "attention.query_shift"),
    (r"attention\.attention\.movek2$", "attention.key_shift"),
    (r"attention\.attention\.movev2$", "attention.value_shift"),
    (r"attention\.attention\.norm_context\.", "attention.norm_activation.norm.batch_norm."),
    (r"attention\.attention\.rprelu_context\.", "attention.norm_activation.activation."),
    *[
        (rf"attention\.attention\.{pattern}", f"attention.{name}.{ours}")
        for letter, name in {"q": "query", "k": "key", "v": "value", "r": "reduction"}.items()
        for pattern, ours in [
            (rf"move{letter}$", "linear.shift"),
            (rf"{name}\.weight$", "linear.weight"),
            (rf"norm_?{letter}\.", "norm_activation.norm.batch_norm."),
            (rf"rprelu{letter}\.", "norm_activation.activation."),
        ]
    ],
    (r"attention\.output\.layerscale\.", "layer_scale1."),
    (r"output\.layerscale\.", "layer_scale2."),
    *[
        (rf"{theirs}\.{pattern}", f"{name}.{ours}")
        for theirs, name in {
            r"attention\.output": "attention.output",
            "intermediate": "mlp.fc1",
            "output": "mlp.fc2",
        }.items()
        for pattern, ours in [
            (r"move$", "linear.shift"),
            (r"dense\.", "linear."),
            (r"norm\.", "norm_activation.norm.batch_norm."),
            (r"rprelu\.", "norm_activation.activation."),
        ]
    ],
]

PATCH_EMBEDDING_NAMES = [
    (r"move$", "projection.shift"),
    (r"proj\.", "projection."),
    (r"norm0\.", "norm1.batch_norm."),
    (r"norm\.", "norm_activation.norm.batch_norm."),
    (r"rprelu\.", "norm_activation.activation."),
]

OTHER_NAMES = [
    (r"vit\.embeddings\.cls_token$", "binaryvit.embeddings.class_token"),
    (r"vit\.embeddings\.patch_embeddings\.projection\.", "binaryvit.embeddings.projection."),
    (r"vit\.embeddings\.norm\.", "binaryvit.embeddings.norm.batch_norm."),
    (r"vit\.embeddings\.", "binaryvit.embeddings."),
    (r"vit\.layernorm\.", "binaryvit.norm.batch_norm."),
]

PARAMETER_NAMES = [
    (r"prelu\.weight$", "slope"),
    (r"activation\.move1$", "activation.shift_in"),
    (r"activation\.move2$", "activation.shift_out"),
    (r"(layer_scale\d?)\.alpha$", r"\1.scale"),
    (r"(layer_scale\d?)\.move$", r"\1.shift"),
]

VIT_NAMES = [
    (r"encoder\.layer\.", "layers."),
    (r"attention\.attention\.query\.", "attention.q_proj."),
    (r"attention\.attention\.key\.", "attention.k_proj."),
    (r"attention\.attention\.value\.", "attention.v_proj."),
    (r"attention\.output\.dense\.", "attention.o_proj."),
    (r"intermediate\.dense\.", "mlp.fc1."),
    (r"(layers\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
]


def load_original_checkpoint(path: Path) -> dict[str, torch.Tensor]:
    """
    Read a network from a file of the public code, `{"model": …, "optimizer": …, "args": …}`, or from a state dict.

    Raises:
        UserError: there is no such file, it is damaged, it holds no network, it would run code, or it would take more
            memory than its size.
    """
    if not path.is_file():
        raise UserError(f"There is no file {str(path)!r}.")
    try:
        check_memory(path)
        # The arguments of a run are a Namespace with paths. Other classes could run code and stay forbidden.
        arguments = [argparse.Namespace, PosixPath, WindowsPath, PurePosixPath, PureWindowsPath]
        with torch.serialization.safe_globals(arguments):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"{refused[1]!r}, which could run code" if refused else "objects that are not tensors"
        raise UserError(f"{str(path)!r} holds {what}: it is not opened.") from error
    except Exception as error:  # the zip reader and the unpickler may raise anything
        raise UserError(f"{str(path)!r} is not a checkpoint, or is damaged: {first_sentence(error)}") from error
    state_dict = checkpoint.get("model", checkpoint) if isinstance(checkpoint, dict) else None
    if not isinstance(state_dict, dict) or not state_dict or not all(map(is_named_tensor, state_dict.items())):
        raise UserError(f"{str(path)!r} holds no network: it has no 'model' of named, dense tensors of numbers.")
    # DistributedDataParallel adds the prefix "module.".
    return {name.removeprefix("module."): tensor for name, tensor in state_dict.items()}


def check_memory(path: Path) -> None:
    """
    Raises:
        UserError: the file would take far more memory than its size.
    """
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        # PyTorch allows this type, and allocates any length that the file gives.
        if content.find(b"bytearray") >= 0:
            raise UserError(f"{str(path)!r} holds a 'bytearray', which is not a tensor: it is not opened.")
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
        # PyTorch does not compress: a file that unpacks to more than its size is an attack.
        if unpacked > path.stat().st_size:
            raise UserError(
                f"{str(path)!r} of {path.stat().st_size} bytes would unpack to {unpacked} bytes, so PyTorch did not "
                "write it: it is not opened."
            )


def is_named_tensor(item: tuple) -> bool:
    name, tensor = item
    return (
        isinstance(name, str)
        and isinstance(tensor, torch.Tensor)
        and tensor.layout == torch.strided
        and tensor.device.type == "cpu"
        and not (tensor.is_quantized or tensor.is_nested or tensor.is_complex())
    )


def count_labels(state_dict: dict[str, torch.Tensor], otherwise: int) -> int:
    """Number of labels in a state dict of the public code, or `otherwise` if it has no valid classifier."""
    bias = state_dict.get("classifier.bias")
    return len(bias) if bias is not None and bias.ndim == 1 and 1 <= len(bias) <= MAX_LABELS else otherwise


def convert_original_state_dict(
    state_dict: dict[str, torch.Tensor], config: PreTrainedConfig
) -> dict[str, torch.Tensor]:
    """
    Rename the tensors of the paper's public code.

    Args:
        state_dict: `model.state_dict()` of the public code.
        config: the row that it was trained as, of BinaryViT or, for the full-precision row, of transformers' ViT.

    Returns:
        A state dict for `BinaryViTForImageClassification` or `ViTForImageClassification`. Tensors are the same, except
        that dimensions of size 1 are added or removed.

    Raises:
        ValueError: a tensor is unknown or missing, or has another shape or kind of number. The message names it.
    """
    with torch.device("meta"):
        expected = build_classifier(config).state_dict()
    converted = {}
    for original, tensor in state_dict.items():
        name = convert_name(original, config)
        if name not in expected:
            raise ValueError(f"Unknown tensor {original!r}: a {config.model_type} of this config has no {name!r}.")
        if squeezed_shape(tensor) != squeezed_shape(expected[name]):
            raise ValueError(
                f"Tensor {original!r} has shape {tuple(tensor.shape)}, but {name!r} of this config has "
                f"{tuple(expected[name].shape)}."
            )
        if expected[name].is_floating_point() and not tensor.is_floating_point():
            raise ValueError(f"Tensor {original!r} is of {tensor.dtype}, but {name!r} is of {expected[name].dtype}.")
        converted[name] = tensor.reshape(expected[name].shape)
    missing = [name for name in expected if name not in converted]
    if missing:
        raise ValueError(
            f"The checkpoint lacks {counted(len(missing), 'tensor')} of this config, first {missing[0]!r}."
        )
    return converted


def convert_name(original: str, config: PreTrainedConfig) -> str:
    """Our name of a tensor of the public code. Only names of the public code give names of ours."""
    if config.model_type == "vit":
        for pattern, ours in VIT_NAMES:
            original = re.sub(pattern, ours, original)
        return original
    if match := re.match(r"vit\.encoder\.layer\.(\d+)\.(.*)", original):
        name = layer_prefix(int(match[1]), config.depths) + convert_branch_name(match[2], config)
    elif match := re.match(r"vit\.encoder\.patch_embed(\d+)\.(.*)", original):
        name = f"binaryvit.stages.{match[1]}.patch_embeddings." + replace_first(PATCH_EMBEDDING_NAMES, match[2])
        if not config.binarize_patch_embeddings:
            name = name.replace("norm_activation.norm.", "norm2.")
    else:
        name = replace_first(OTHER_NAMES, original)
    return replace_first(PARAMETER_NAMES, name)


def convert_branch_name(name: str, config: PreTrainedConfig) -> str:
    """Our name inside a layer. Pooling branches are numbered by kernel, vertical ("h") before horizontal ("w")."""
    match = re.match(r"layerscale_([hw])(\d+)\.(.*)", name)
    if match is None or int(match[2]) not in config.avg_pool_kernel_sizes:
        return replace_first(LAYER_NAMES, name)
    branch = 2 * list(config.avg_pool_kernel_sizes).index(int(match[2])) + "hw".index(match[1])
    return f"avg_pool_branches.{branch}.layer_scale.{match[3]}"


def layer_prefix(index: int, depths) -> str:
    """Our name of a layer. The public code numbers the layers of all stages, we number them within a stage."""
    for stage, depth in enumerate(depths):
        if index < depth:
            return f"binaryvit.stages.{stage}.layers.{index}."
        index -= depth
    return f"binaryvit.stages.{len(depths)}.layers.{index}."


def replace_first(table: list[tuple[str, str]], name: str) -> str:
    for pattern, ours in table:
        if re.search(pattern, name):
            return re.sub(pattern, ours, name, count=1)
    return name


def squeezed_shape(tensor: torch.Tensor) -> list[int]:
    return [size for size in tensor.shape if size > 1]

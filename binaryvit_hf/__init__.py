"""
1-bit vision transformers in the Hugging Face ecosystem.

Importing this package registers the model with transformers' `Auto` classes. Its folders, from the lowest floor up:

- `engine`: 1-bit inference on CPUs, in C++.
- `network`: the model and its checkpoints. These files travel to the Hub.
- `data`: images and labels for training and evaluation.
- `training`: a training run, from its arguments to a packed model.
- `benchmarks`: times of forwards, files to labels, training steps and image loading.
- `cli`: the command `binaryvit`.

The modules beside the folders are shared by the upper ones:

- `loading`, `hub`, `writing`: load checkpoints, upload them, and write files whole or not at all.
- `pixels`: pictures as the same pixels everywhere.
- `argument_checks`: types and ranges of command-line arguments.
- `small_networks`: networks of timm for small images, to compare with.
- `card_text`: the parts of a model card.
- `ops`, `convert`, `comparison`: commands.
- `errors`, `resources`, `host_memory`: exceptions, shipped files, and memory of the process.
"""

try:
    from binaryvit_runtime.cpus import limit_spinning
    from binaryvit_runtime.resources import check_torchvision, package_version
except ModuleNotFoundError as error:
    raise ImportError("binaryvit_hf is not installed, or has new parts since then: run `pip install -e .`.") from error
else:
    limit_spinning()  # before PyTorch is imported
    check_torchvision()  # before transformers imports it

from typing import TYPE_CHECKING

from transformers import AutoBackbone, AutoConfig, AutoModel, AutoModelForImageClassification

from .network.configuration_binaryvit import BinaryViTConfig
from .network.modeling_binaryvit import (
    BinaryViTBackbone,
    BinaryViTForImageClassification,
    BinaryViTModel,
    BinaryViTPreTrainedModel,
)
from .network.quantization_binaryvit import BinaryViTQuantizationConfig


if TYPE_CHECKING:
    from .network.image_processing_binaryvit import BinaryViTImageProcessor

__version__ = package_version()

AutoConfig.register("binaryvit", BinaryViTConfig)
AutoModel.register(BinaryViTConfig, BinaryViTModel)
AutoBackbone.register(BinaryViTConfig, BinaryViTBackbone)
AutoModelForImageClassification.register(BinaryViTConfig, BinaryViTForImageClassification)


def __getattr__(name: str):
    if name == "BinaryViTImageProcessor":  # its import takes half a second
        from .network.image_processing_binaryvit import BinaryViTImageProcessor

        return BinaryViTImageProcessor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


__all__ = [
    "BinaryViTBackbone",
    "BinaryViTConfig",
    "BinaryViTForImageClassification",
    "BinaryViTImageProcessor",
    "BinaryViTModel",
    "BinaryViTPreTrainedModel",
    "BinaryViTQuantizationConfig",
]

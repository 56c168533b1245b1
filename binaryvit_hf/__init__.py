"""1-bit vision transformers in the Hugging Face ecosystem."""

from importlib.metadata import PackageNotFoundError, version

from transformers import AutoConfig, AutoModel, AutoModelForImageClassification

from .network.configuration_binaryvit import BinaryViTConfig
from .network.modeling_binaryvit import BinaryViTForImageClassification, BinaryViTModel, BinaryViTPreTrainedModel
from .network.quantization_binaryvit import BinaryViTQuantizationConfig


try:
    __version__ = version("binaryvit_hf")
except PackageNotFoundError:  # a clone that is on the path but not installed
    __version__ = "not installed"

AutoConfig.register("binaryvit", BinaryViTConfig)
AutoModel.register(BinaryViTConfig, BinaryViTModel)
AutoModelForImageClassification.register(BinaryViTConfig, BinaryViTForImageClassification)

__all__ = [
    "BinaryViTConfig",
    "BinaryViTForImageClassification",
    "BinaryViTModel",
    "BinaryViTPreTrainedModel",
    "BinaryViTQuantizationConfig",
]

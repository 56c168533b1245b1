"""1-bit vision transformers in the Hugging Face ecosystem."""

from transformers import AutoConfig, AutoModel, AutoModelForImageClassification

from .configuration_binaryvit import BinaryViTConfig
from .modeling_binaryvit import BinaryViTForImageClassification, BinaryViTModel, BinaryViTPreTrainedModel
from .quantization_binaryvit import BinaryViTQuantizationConfig


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

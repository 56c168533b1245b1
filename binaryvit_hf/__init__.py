"""1-bit vision transformers in the Hugging Face ecosystem."""

from transformers import AutoConfig, AutoModel, AutoModelForImageClassification

from .network.configuration_binaryvit import BinaryViTConfig
from .network.modeling_binaryvit import BinaryViTForImageClassification, BinaryViTModel, BinaryViTPreTrainedModel
from .network.quantization_binaryvit import BinaryViTQuantizationConfig


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

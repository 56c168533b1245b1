"""1-bit vision transformers in the Hugging Face ecosystem."""

from transformers import AutoConfig, AutoModel, AutoModelForImageClassification

from .configuration_binaryvit import BinaryViTConfig
from .modeling_binaryvit import BinaryViTForImageClassification, BinaryViTModel, BinaryViTPreTrainedModel


AutoConfig.register("binaryvit", BinaryViTConfig)
AutoModel.register(BinaryViTConfig, BinaryViTModel)
AutoModelForImageClassification.register(BinaryViTConfig, BinaryViTForImageClassification)

# Saved models carry their code, for machines without this package (trust_remote_code=True).
BinaryViTConfig.register_for_auto_class()
BinaryViTModel.register_for_auto_class("AutoModel")
BinaryViTForImageClassification.register_for_auto_class("AutoModelForImageClassification")

__all__ = ["BinaryViTConfig", "BinaryViTForImageClassification", "BinaryViTModel", "BinaryViTPreTrainedModel"]

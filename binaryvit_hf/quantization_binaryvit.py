"""
`quant_method: "binaryvit"`: how transformers is told of packed weights.

Package and travelling copies of this file may meet in one process, and the quantizer of one may be given the model of
another; so it knows no class of theirs and calls methods of the model alone (`packable_binaryvit.PackableModel`).
"""

import torch
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin


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

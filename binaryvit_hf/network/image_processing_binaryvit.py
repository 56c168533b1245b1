# SPDX-License-Identifier: Apache-2.0
"""An image processor with the outputs of ViTImageProcessor, faster on CPUs that have the engine."""

import functools
import json

import numpy as np
import torch
from PIL import Image
from transformers.feature_extraction_utils import BatchFeature
from transformers.models.vit.image_processing_vit import ViTImageProcessor

from binaryvit_runtime.engine.preprocessing import OWN_CODE, Preprocessor


# The arguments of `_preprocess` that the engine's preprocessing reads.
FIELDS = (
    *("do_resize", "size", "resample", "do_center_crop", "crop_size", "do_rescale", "rescale_factor"),
    *("do_normalize", "image_mean", "image_std", "do_pad"),
)


class BinaryViTImageProcessor(ViTImageProcessor):
    """
    `ViTImageProcessor` whose pictures are resized, cropped and normalised in the engine's C++, with bit-identical outputs.

    transformers' own code runs where the engine was not built, on other devices, and for settings that the engine does not
    have. Arguments, files and outputs are those of `ViTImageProcessor`. A saved file names `ViTImageProcessor`, which
    `AutoImageProcessor` then loads; this class loads the file by its own `from_pretrained`.
    """

    def to_dict(self) -> dict:
        values = super().to_dict() | {"image_processor_type": "ViTImageProcessor"}
        if values.get("auto_map") == {"AutoImageProcessor": OWN_CODE}:
            del values["auto_map"]  # earlier versions copied this file, which the folder would lack
        return values

    def process_image(self, image, *args, **kwargs) -> torch.Tensor:
        """`(3, height, width)`, uint8."""
        is_rgb_picture = isinstance(image, Image.Image) and image.mode == "RGB" and "transparency" not in image.info
        if is_rgb_picture:
            # A view: the colours of a pixel stay side by side in memory, as the engine reads them.
            pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
            device = kwargs.get("device")
            return pixels if device is None else pixels.to(device)
        return super().process_image(image, *args, **kwargs)

    def _preprocess(self, images: list[torch.Tensor], **kwargs) -> BatchFeature:
        preprocessor = create_preprocessor(kwargs)
        if preprocessor is None or not all(is_rgb(image) for image in images):
            return super()._preprocess(images, **kwargs)
        pixel_values = [torch.from_numpy(preprocessor(image.permute(1, 2, 0).numpy())) for image in images]
        return BatchFeature(data={"pixel_values": pixel_values}, tensor_type=kwargs.get("return_tensors"))


def create_preprocessor(arguments: dict):
    """The engine's preprocessing for the arguments of `_preprocess`. `None` if there is no engine, or it does not support them."""
    fields = {name: arguments.get(name) for name in FIELDS}
    for name in ("size", "crop_size"):
        if sides := arguments.get(name):
            fields[name] = {side: length for side, length in dict(sides).items() if length is not None}
    try:
        return cached_preprocessor(json.dumps(fields))
    except (TypeError, ValueError, RuntimeError):  # such as a resample that is no number
        return None


@functools.lru_cache(maxsize=16)
def cached_preprocessor(fields: str):
    """
    Raises:
        ValueError: the engine does not support a field.
        RuntimeError: the engine was not built.
    """
    return Preprocessor({"image_processor_type": "ViTImageProcessor", **json.loads(fields)})


def is_rgb(image: torch.Tensor) -> bool:
    return image.is_cpu and image.dtype == torch.uint8 and image.dim() == 3 and image.shape[0] == 3


__all__ = ["BinaryViTImageProcessor"]

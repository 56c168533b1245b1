"""Tiny packed models on the disk, with their image processors."""

import json
from pathlib import Path

from tiny import tiny_model
from transformers import AutoModelForImageClassification

from binaryvit_hf.data.model_inputs import create_image_processor
from binaryvit_hf.network.quantization_binaryvit import BinaryViTQuantizationConfig


def save_packed(folder: Path, config=None, half: bool = False, **options) -> Path:
    """Save a tiny packed model and its image processor, with `options` of `save_pretrained`. Returns the folder."""
    model = tiny_model(config)
    model.save_pretrained(folder / "latent")
    packing = BinaryViTQuantizationConfig(half=half)
    packed = AutoModelForImageClassification.from_pretrained(folder / "latent", quantization_config=packing)
    packed.save_pretrained(folder / "packed", **options)
    create_image_processor(model.config, crop_pct=1.0).save_pretrained(folder / "packed")
    return folder / "packed"


def edit_json(file: Path, **changes) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

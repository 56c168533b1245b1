"""BinaryViTImageProcessor has the outputs and files of ViTImageProcessor, with the engine and without it."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, ViTImageProcessor

from binaryvit_hf import BinaryViTImageProcessor
from binaryvit_hf.network import image_processing_binaryvit
from binaryvit_runtime import engine
from binaryvit_runtime.engine.preprocessing import Preprocessor


SETTINGS = [
    {},
    {"size": {"shortest_edge": 40}, "do_center_crop": True, "crop_size": 32, "resample": 3, "do_convert_rgb": True},
    {"size": {"height": 20, "width": 50}, "do_normalize": False},
    {"do_resize": False},
    {"resample": 0, "size": 16},  # the engine has no nearest neighbour
    {"do_pad": True, "pad_size": {"height": 300, "width": 300}},
]
noise = np.random.default_rng(0).integers(0, 256, (45, 61, 3), np.uint8)
IMAGES = [
    Image.fromarray(noise),
    [Image.fromarray(noise), Image.fromarray(noise[:, ::-1].copy())],
    noise,
    torch.from_numpy(noise).permute(2, 0, 1),
    [noise.transpose(2, 0, 1)],
]


@pytest.mark.parametrize("has_engine", [True, False])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_outputs_are_those_of_vit(settings, has_engine, monkeypatch):
    if not has_engine:
        monkeypatch.setattr(image_processing_binaryvit, "create_preprocessor", lambda arguments: None)
    ours, theirs = BinaryViTImageProcessor(**settings), ViTImageProcessor(**settings)
    for images in IMAGES:
        ours_values, theirs_values = (
            processor(images, return_tensors="pt")["pixel_values"] for processor in (ours, theirs)
        )
        assert torch.equal(ours_values, theirs_values)
    transparent = Image.fromarray(noise)
    transparent.paste((9, 8, 7), (20, 10, 40, 30))
    transparent.info["transparency"] = (9, 8, 7)  # transformers puts this colour on white
    values = [processor(transparent, return_tensors="pt")["pixel_values"] for processor in (ours, theirs)]
    assert torch.equal(*values)
    grey = Image.fromarray(noise[..., 0])
    if settings.get("do_convert_rgb"):
        assert torch.equal(
            ours(grey, return_tensors="pt")["pixel_values"], theirs(grey, return_tensors="pt")["pixel_values"]
        )


@pytest.mark.skipif(not engine.kernels_here(), reason="there is no engine")
def test_the_engine_computes_what_it_supports(monkeypatch):
    calls = []
    monkeypatch.setattr(ViTImageProcessor, "_preprocess", lambda *args, **kwargs: calls.append(args))
    processor = BinaryViTImageProcessor(**SETTINGS[1])
    processor(Image.fromarray(noise))
    processor(noise)
    assert not calls
    BinaryViTImageProcessor(**SETTINGS[4])(noise)
    assert len(calls) == 1


def test_a_saved_processor_loads_as_vits_without_code_and_as_ours_by_its_class(tmp_path):
    BinaryViTImageProcessor(**SETTINGS[1]).save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["preprocessor_config.json"]
    assert "auto_map" not in fields  # transformers would ask whether to run its code
    plain, ours = AutoImageProcessor.from_pretrained(tmp_path), BinaryViTImageProcessor.from_pretrained(tmp_path)
    assert type(plain) is ViTImageProcessor
    assert type(ours) is BinaryViTImageProcessor
    values = [processor(noise, return_tensors="pt")["pixel_values"] for processor in (plain, ours)]
    assert torch.equal(*values)
    if engine.kernels_here():
        assert np.array_equal(Preprocessor(fields)(noise), values[0][0].numpy())


def test_a_processor_of_an_earlier_version_is_saved_without_its_code(tmp_path):
    BinaryViTImageProcessor(**SETTINGS[1]).save_pretrained(tmp_path / "old")
    file = tmp_path / "old" / "preprocessor_config.json"
    code = {"AutoImageProcessor": "image_processing_binaryvit.BinaryViTImageProcessor"}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"auto_map": code}))
    BinaryViTImageProcessor.from_pretrained(tmp_path / "old").save_pretrained(tmp_path / "new")
    assert "auto_map" not in json.loads((tmp_path / "new" / "preprocessor_config.json").read_text())
    AutoImageProcessor.from_pretrained(tmp_path / "new", trust_remote_code=True)

"""Saved models carry their code. It works without the package, and beside it in one process."""

import pytest
import torch
from tiny import tiny_images, tiny_model
from transformers import AutoModelForImageClassification
from warm_python import WITHOUT_PACKAGE

from binaryvit_hf import BinaryViTQuantizationConfig
from binaryvit_hf.data.model_inputs import create_image_processor


LOAD_EVERYTHING = """
import torch
from huggingface_hub import HfApi
from PIL import Image
from transformers import AutoBackbone, AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification
from transformers import pipeline
from transformers.utils import logging

logging.disable_progress_bar()
HfApi.repo_exists = lambda *_: True  # AutoBackbone asks the Hub for the repository, even if it is a folder
root, trust = sys.argv[1], {"trust_remote_code": True}
images, expected = torch.load(f"{root}/expected.pt")


def check(source):
    assert AutoConfig.from_pretrained(source, **trust).model_type == "binaryvit"
    model = AutoModelForImageClassification.from_pretrained(source, **trust)
    assert type(model).__module__.startswith("transformers_modules.")
    backbone = AutoModel.from_pretrained(source, **trust)
    with torch.no_grad():
        assert torch.equal(model(images).logits, expected)
        assert torch.equal(model.classifier(backbone(images).pooler_output), expected)
        maps = AutoBackbone.from_pretrained(source, out_features=["stem", "stage2"], **trust)(images).feature_maps
        states = backbone(images, output_hidden_states=True).reshaped_hidden_states
        assert torch.equal(maps[0], states[0]) and torch.equal(maps[1], states[-1])
    processor = AutoImageProcessor.from_pretrained(source)
    assert processor(Image.new("L", (50, 40)), return_tensors="pt")["pixel_values"].shape == (1, 3, 16, 32)
    answers = pipeline("image-classification", model=source, **trust)(Image.new("RGBA", (50, 40)))
    assert abs(sum(answer["score"] for answer in answers) - 1) < 1e-5
    return model, backbone, processor


for name in ("latent", "packed"):
    model, backbone, processor = check(f"{root}/{name}")
    model.save_pretrained(f"again-{name}")
    processor.save_pretrained(f"again-{name}")
    backbone.save_pretrained(f"backbone-{name}")
    check(f"again-{name}")
    again = AutoModel.from_pretrained(f"backbone-{name}", **trust)
    with torch.no_grad():
        assert torch.equal(model.classifier(again(images).pooler_output), expected)
print("all equal")
"""

SIDE_BY_SIDE = """
import os
import sys
import torch
from transformers import AutoModelForImageClassification
from transformers.dynamic_module_utils import get_class_from_dynamic_module

root, first = sys.argv[1:]
images, expected = torch.load(f"{root}/expected.pt")


def travelling():
    return get_class_from_dynamic_module("modeling_binaryvit.BinaryViTForImageClassification", f"{root}/packed")


if first == "package":
    import binaryvit_hf
    copy = travelling()
else:
    copy = travelling()
    AutoModelForImageClassification.from_pretrained(f"{root}/packed", trust_remote_code=True)
    import binaryvit_hf
assert copy is not binaryvit_hf.BinaryViTForImageClassification
packing = binaryvit_hf.BinaryViTQuantizationConfig()
for kind in (copy, binaryvit_hf.BinaryViTForImageClassification, AutoModelForImageClassification):
    for source, arguments in (("latent", {}), ("packed", {}), ("latent", {"quantization_config": packing})):
        model = kind.from_pretrained(f"{root}/{source}", **arguments)
        assert model.is_packed == (source == "packed" or "quantization_config" in arguments)
        with torch.no_grad():
            assert torch.equal(model(images).logits, expected)
assert type(model) is binaryvit_hf.BinaryViTForImageClassification
del os.environ["BINARYVIT_ENGINE"]
model = copy.from_pretrained(f"{root}/packed")
assert model.engine.name == (binaryvit_hf.engine.kernels_here() or ["torch"])[0]
with torch.no_grad():
    torch.testing.assert_close(model(images).logits, expected)
print("all equal")
"""


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    """Folders `latent` and `packed` of one model, and `expected.pt` with images and logits."""
    root = tmp_path_factory.mktemp("shelf")
    model = tiny_model().eval()
    for folder in ("latent", "packed"):
        create_image_processor(model.config, crop_pct=1.0).save_pretrained(root / folder)
    model.save_pretrained(root / "latent")
    packed = AutoModelForImageClassification.from_pretrained(
        root / "latent", quantization_config=BinaryViTQuantizationConfig()
    )
    packed.save_pretrained(root / "packed")
    with torch.no_grad():
        torch.save((tiny_images(), model(tiny_images()).logits), root / "expected.pt")
    return root


def test_a_model_loads_saves_and_loads_again_without_the_package_and_without_a_warning(shelf, tmp_path, warm_python):
    result = warm_python.run_bare(WITHOUT_PACKAGE + LOAD_EVERYTHING, tmp_path / "home", shelf)
    assert result.stdout == "all equal\n", result.stderr
    assert result.stderr == ""


@pytest.mark.parametrize("first", ["package", "copy"])
def test_package_and_travelling_copy_work_in_one_process_and_both_use_the_engine(shelf, tmp_path, first, warm_python):
    # The script begins with PyTorch, whose outputs are bit-identical.
    result = warm_python.run_bare(SIDE_BY_SIDE, tmp_path / "home", shelf, first, BINARYVIT_ENGINE="torch")
    assert result.stdout == "all equal\n", result.stderr


def test_every_imported_file_travels_and_none_needs_the_package(shelf):
    files = {path.name for path in (shelf / "packed").glob("*.py")}
    assert "modeling_binaryvit.py" in files
    for path in (shelf / "packed").glob("*.py"):
        uses = [line for line in path.read_text().splitlines() if "binaryvit_hf import" in line]
        compiled = {"engine_binaryvit.py": "engine", "functional_binaryvit.py": "row_kernels"}.get(path.name)
        assert uses == ([f"    from binaryvit_hf import {compiled}"] if compiled else [])
    assert files == {path.name for path in (shelf / "latent").glob("*.py")}

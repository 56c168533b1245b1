"""A Hub repository from version 0.1.0 still loads, with its own code and with this package."""

import tarfile
from pathlib import Path

import pytest


LOAD = """
import json
import sys
import torch
from transformers import AutoModelForImageClassification, pipeline

folder, trust = sys.argv[1], sys.argv[2] == "its own code"
images = torch.randn(2, 3, 16, 32, generator=torch.Generator().manual_seed(1))
expected = torch.tensor(json.load(open(folder + "/expected.json")))
if not trust:
    import binaryvit_hf
for subfolder in ("", "latent"):
    model = AutoModelForImageClassification.from_pretrained(folder, subfolder=subfolder, trust_remote_code=trust)
    if not subfolder:  # its engine file imports the package, whose classes then load the latent model
        assert type(model).__module__.startswith("transformers_modules." if trust else "binaryvit_hf.")
    with torch.no_grad():
        torch.testing.assert_close(model(images).logits, expected)
    if not trust:
        larger = AutoModelForImageClassification.from_pretrained(folder, subfolder=subfolder, image_size=32)
        squares = torch.cat((images, images), dim=2)
        with torch.no_grad():
            assert torch.equal(larger(squares).logits, model(squares, interpolate_pos_encoding=True).logits)
    model.save_pretrained("again")
    again = AutoModelForImageClassification.from_pretrained("again", trust_remote_code=trust)
    assert again.is_packed == model.is_packed
    print(model.engine.name)
"""


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("repository")
    with tarfile.open(Path(__file__).with_name("repository_0.1.0.tar.xz")) as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.mark.parametrize("code", ["its own code", "this package's"])
def test_a_repository_of_version_0_1_0_loads_computes_and_saves(repository, tmp_path, code, warm_python):
    result = warm_python.run_bare(LOAD, tmp_path / "home", repository, code)
    assert result.returncode == 0, result.stderr
    packed, latent = result.stdout.split()
    assert packed in ("avx512", "avx2", "neon", "scalar", "torch")
    assert latent == "torch"

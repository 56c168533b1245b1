"""Training continues from packed models: their latent weights, or those made from their bits."""

import json
import logging
import shutil

import pytest
import torch
from PIL import Image
from tiny import tiny_config, tiny_model
from transformers import AutoImageProcessor, AutoModelForImageClassification

from binaryvit_cli import main
from binaryvit_hf.data.arguments import DataArguments
from binaryvit_hf.network.packing_binaryvit import packed_layers
from binaryvit_hf.network.quantization_binaryvit import ShippedModel
from binaryvit_hf.training import run as script
from binaryvit_hf.training.arguments import ModelArguments
from binaryvit_hf.training.latent_weights import load_trainable
from binaryvit_hf.training.models import load_processor
from binaryvit_runtime.errors import LoadingError
from binaryvit_runtime.resources import shipped_models


FLAGS = [
    *["--do_train", "--do_eval", "--per_device_train_batch_size=4", "--use_cpu", "--report_to=none"],
    *["--save_strategy=no", "--disable_tqdm=True"],
]


@pytest.fixture
def pictures(tmp_path):
    for name, color in {"ant": "red", "bee": "blue"}.items():
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for index in range(4):
            picture = Image.new("RGB", (64, 32), color)
            picture.paste("green", (10 * index, 0, 64, 16))
            picture.save(tmp_path / "pictures" / name / f"{index}.png")
    return tmp_path / "pictures"


@pytest.fixture
def packed(tmp_path):
    """A packed model of the labels ant and bee, with its latent weights in the folder `latent`."""
    config = tiny_config(num_labels=2, id2label={0: "ant", 1: "bee"}, label2id={"ant": 0, "bee": 1})
    ShippedModel(tiny_model(config)).save_pretrained(tmp_path / "packed")
    processor = AutoImageProcessor.from_pretrained(shipped_models()["binaryvit-digits"])
    processor.size = processor.crop_size = {"height": 16, "width": 32}
    processor.save_pretrained(tmp_path / "packed")
    return tmp_path / "packed"


def train(source, pictures, folder, *flags) -> int:
    data = ["--train_dir", str(pictures), "--validation_dir", str(pictures), "--output_dir", str(folder)]
    return script.main(["--model_name_or_path", str(source), *data, *FLAGS, *flags])


def bits_of(folder) -> dict[str, torch.Tensor]:
    model = AutoModelForImageClassification.from_pretrained(folder)
    return {name: layer.packed_weight for name, layer in packed_layers(model).items()}


def test_a_packed_model_is_fine_tuned_and_packed_again(packed, pictures, tmp_path, caplog):
    shutil.rmtree(packed / "latent")
    before = bits_of(packed)
    with caplog.at_level(logging.INFO):
        assert train(packed, pictures, tmp_path / "tuned", "--max_steps=2", "--learning_rate=0.1") == 0
    assert f"{packed} is packed and has no folder 'latent'. Training starts from latent weights made" in caplog.text
    after = bits_of(tmp_path / "tuned")
    assert after.keys() == before.keys()
    assert not all(torch.equal(after[name], bits) for name, bits in before.items())


def test_the_latent_weights_of_a_packed_model_are_taken_if_it_has_them(packed, caplog):
    expected = AutoModelForImageClassification.from_pretrained(packed / "latent").state_dict()
    with caplog.at_level(logging.INFO):
        model = load_trainable(packed)
    assert "Training starts from its latent weights in the folder 'latent'" in caplog.text
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    shutil.rmtree(packed / "latent")
    made = load_trainable(packed)
    model.pack_weights()
    made.pack_weights()
    assert all(
        torch.equal(made.get_submodule(n).packed_weight, p.packed_weight) for n, p in packed_layers(model).items()
    )


def test_a_shipped_model_learns_the_classes_of_own_pictures(pictures, tmp_path, caplog, capsys):
    """Nothing is downloaded: the name is the shipped model's, which has latent weights for other labels."""
    flags = ["--max_steps=2", "--ignore_mismatched_sizes"]
    with caplog.at_level(logging.INFO):
        assert train("binaryvit-digits", pictures, tmp_path / "own", *flags) == 0
    assert "Training starts from its latent weights in the folder 'latent'" in caplog.text
    assert "gets a new head for the 2 classes" in caplog.text
    assert "LOAD REPORT" not in capsys.readouterr().err
    config = json.loads((tmp_path / "own" / "config.json").read_text())
    assert config["id2label"] == {"0": "ant", "1": "bee"}
    assert config["quantization_config"]["quant_method"] == "binaryvit"
    assert main(["classify", str(tmp_path / "own"), str(pictures / "ant" / "0.png")]) == 0


def test_the_image_processor_of_a_subfolder_comes_before_that_of_its_repository(packed, tmp_path):
    processor = AutoImageProcessor.from_pretrained(packed)
    processor.image_mean = [0.1, 0.2, 0.3]
    inner = packed / "inner"
    inner.mkdir()
    arguments = ModelArguments(model_name_or_path=str(packed), subfolder="inner")
    found = load_processor(arguments, DataArguments(), tiny_config(), None)
    assert list(found.image_mean) != processor.image_mean
    processor.save_pretrained(inner)
    found = load_processor(arguments, DataArguments(), tiny_config(), None)
    assert list(found.image_mean) == processor.image_mean


def test_a_damaged_packed_model_is_not_trained(packed):
    shutil.rmtree(packed / "latent")
    file = packed / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(LoadingError, match="cut off"):
        load_trainable(packed)

"""ResNet and MobileNetV2 for small images, built by timm from configs of transformers."""

import json
import sys
from pathlib import Path

import pytest
import timm
import torch
from command_line import refusal
from timm.models import _registry

import binaryvit_hf
import binaryvit_hf.small_networks  # registers them
from binaryvit_hf.loading import build_classifier, load_classifier, load_config
from binaryvit_hf.training.model_card import write_model_card
from binaryvit_hf.training.run import main
from binaryvit_runtime.resources import shipped_configs


PEERS = ("resnet-same-latency", "resnet-same-size", "mobilenetv2-same-latency", "mobilenetv2-same-size")
ARCHITECTURES = ("resnet_for_small_images", "mobilenetv2_for_small_images")
CONFIG = {
    "model_type": "timm_wrapper",
    "architecture": "resnet_for_small_images",
    "model_args": {"hidden_sizes": [8, 16], "depths": [1, 1], "stem_stride": 2},
    "image_size": 8,
    "num_channels": 3,
    "num_classes": 10,
}


@pytest.mark.parametrize("peer", PEERS)
def test_a_shipped_peer_takes_the_images_of_fashion_mnist(peer):
    config = load_config(shipped_configs()[f"fashion-mnist/{peer}"])
    model = build_classifier(config).eval()
    assert model(torch.randn(2, 3, config.image_size, config.image_size)).logits.shape == (2, 10)


@pytest.mark.parametrize("stride, side", [(1, 24), (2, 12)])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_only_the_stem_and_the_later_stages_reduce_the_image(architecture, stride, side):
    network = timm.create_model(architecture, stem_stride=stride).eval()
    sizes = []
    stages = network.stages if architecture.startswith("resnet") else network.blocks
    for stage in stages:
        stage.register_forward_hook(lambda _, inputs, output: sizes.append(output.shape[-1]))
    network(torch.randn(1, 3, 24, 24))
    assert sizes == [side, side // 2, side // 4]


def test_a_resnet_has_one_depth_for_each_stage():
    with pytest.raises(ValueError, match="zip"):
        timm.create_model("resnet_for_small_images", hidden_sizes=[8, 16], depths=[1])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_misspelt_argument_is_refused(architecture):
    with pytest.raises(TypeError, match="no argument 'stem_strides'"):
        timm.create_model(architecture, stem_strides=2)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The output directory of a run on the digits."""
    folder = tmp_path_factory.mktemp("peer")
    (folder / "config").mkdir()
    (folder / "config" / "config.json").write_text(json.dumps(CONFIG))
    assert main(arguments(folder)) == 0
    return folder / "run"


def arguments(folder: Path, *more: str) -> list[str]:
    names = ["--config_name", str(folder / "config"), "--output_dir", str(folder / "run"), *more]
    names += ["--dataset_name=sklearn-digits", "--do_train", "--do_eval", "--max_steps=2", "--use_cpu"]
    return [*names, "--report_to=none", "--disable_tqdm=true", "--max_train_samples=64", "--max_eval_samples=32"]


def test_a_trained_network_loads_where_timm_does_not_know_it_yet(trained, monkeypatch):
    monkeypatch.delitem(sys.modules, "binaryvit_hf.small_networks")
    monkeypatch.delattr(binaryvit_hf, "small_networks")
    for architecture in ARCHITECTURES:
        monkeypatch.delitem(_registry._model_entrypoints, architecture)
    assert load_classifier(trained).config.id2label[9] == "9"


def test_a_run_of_other_classes_is_refused(trained, capsys):
    config = trained / "config.json"
    before = config.read_text()
    config.write_text(before.replace('"9"', '"nine"'))
    assert "holds a run with 10 classes, and there are 10 ('9' is new)" in refusal(capsys, *arguments(trained.parent))
    config.write_text(before)


def test_the_closing_command_registers_the_network(trained, capsys):
    assert main(arguments(trained.parent)) == 0
    assert "import binaryvit_hf.small_networks; from transformers" in capsys.readouterr().out


def test_a_benchmark_loads_the_network_in_a_process_of_its_own(trained, tmp_path, warm_python):
    program = """
import sys
from pathlib import Path
from binaryvit_hf.benchmarks.inference import load_in_pytorch
print(*load_in_pytorch(Path(sys.argv[1]), 1)(2).shape)
"""
    result = warm_python.run("-c", program, trained / "model.safetensors", folder=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["2", "10"]


def test_the_card_names_the_architecture(trained, tmp_path):
    write_model_card(trained, "me/peer", tmp_path / "card.md")
    text = " ".join((tmp_path / "card.md").read_text().split())
    assert (
        "A full-precision network, `resnet_for_small_images` of timm. It takes images of 8 pixels. Trained on" in text
    )

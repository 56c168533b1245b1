"""The Python and the commands for own images in README.md run as they are."""

import re
import runpy
import shlex
from pathlib import Path

import pytest
from pictures import write_pictures
from PIL import Image
from readme import OF_ONNX, OF_THE_HUB, README, SNIPPETS, snippet_with
from tiny import tiny_config, tiny_model
from transformers import AutoConfig

from binaryvit_cli import main as binaryvit
from binaryvit_hf.data.model_inputs import create_image_processor
from binaryvit_hf.network.quantization_binaryvit import ShippedModel
from binaryvit_hf.training import run as script
from binaryvit_hf.training.command_line import parse_runs
from binaryvit_hf.training.unused_arguments import find_unused
from binaryvit_runtime.engine import kernels_here


SCRIPT = README.parent / ".ci" / "update_readme.py"


@pytest.fixture(scope="module")
def outputs(tmp_path_factory) -> Path:
    """`outputs/photos` of a tiny network, as a run writes it, and the `photos`."""
    root = tmp_path_factory.mktemp("readme")
    for picture in ("photos/ant/1.jpg", "photos/bee/2.jpg"):
        (root / picture).parent.mkdir(parents=True)
        Image.new("RGB", (80, 70), "green").save(root / picture)
    config = tiny_config(image_size=64, sequence_reduction_ratios=[8, 4])
    ShippedModel(tiny_model(config)).save_pretrained(root / "outputs" / "photos")
    create_image_processor(config, crop_pct=0.875).save_pretrained(root / "outputs" / "photos")
    return root


def run(snippet: str) -> dict:
    names: dict = {}
    exec(snippet, names)
    return names


@pytest.mark.parametrize("snippet", [text for text in SNIPPETS if not (OF_THE_HUB in text or OF_ONNX in text)])
def test_a_snippet_runs(snippet, outputs, monkeypatch):
    if "binaryvit_runtime" in snippet and not kernels_here():
        pytest.skip("the engine was not built")
    monkeypatch.chdir(outputs)
    run(snippet)


def test_model_and_image_processor_are_loaded_at_the_same_size(outputs, monkeypatch):
    monkeypatch.chdir(outputs)
    names = run(snippet_with("AutoImageProcessor"))
    assert names["pixel_values"].shape == (1, 3, 128, 128)
    size, of_training = (
        names["processor"].size["shortest_edge"],
        create_image_processor(tiny_config(image_size=128), 0.875),
    )
    assert size == of_training.size["shortest_edge"]


def test_the_detector_keeps_the_packed_backbone(outputs, monkeypatch, tmp_path):
    monkeypatch.chdir(outputs)
    names = run(snippet_with("backbone_config"))
    names["detector"].save_pretrained(tmp_path)
    loaded = type(names["detector"]).from_pretrained(tmp_path).model.backbone.model
    assert loaded.is_packed
    assert loaded.engine == names["backbone"].engine


def commands_for_own_images() -> list[list[str]]:
    """The words of each command of the section that runs a program of this repository."""
    section = README.read_text(encoding="utf-8").partition("## Your own images")[2].partition("\n## ")[0]
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", section, re.DOTALL)).replace("\\\n", " ")
    return [shlex.split(line) for line in blocks.splitlines() if line.startswith(("python run_", "binaryvit "))]


def test_every_argument_of_the_commands_for_own_images_has_an_effect(monkeypatch):
    monkeypatch.chdir(README.parent)
    commands = [words[2:] for words in commands_for_own_images() if words[0] == "python"]
    assert len(commands) == 4
    for arguments in commands:
        assert not any(map(find_unused, parse_runs([*arguments, "--use_cpu"])))


@pytest.mark.slow
def test_the_commands_for_own_images_run_one_after_the_other(tmp_path, monkeypatch):
    """One step each, on two classes of four small pictures. The teacher of the Hub is not available here."""
    write_pictures(tmp_path / "photos", ("ant", "bee"), 4)
    monkeypatch.chdir(tmp_path)
    short = ["--max_steps=1", "--per_device_train_batch_size=2", "--use_cpu", "--disable_tqdm=True"]
    for program, *arguments in commands_for_own_images():
        if program == "binaryvit":
            assert binaryvit(arguments) == 0
        elif "google/vit-base-patch16-224" not in arguments:
            assert script.main([str(README.parent / arguments[1]), *arguments[2:], *short]) == 0
    sizes = [AutoConfig.from_pretrained(Path("outputs") / name).image_size for name in ("photos", "tuned", "larger")]
    assert sizes == [64, 24, 128]


def test_the_results_and_the_picture_are_those_of_the_measurements():
    assert not runpy.run_path(str(SCRIPT))["find_stale"](), f"run `python {SCRIPT.relative_to(README.parent)}`"

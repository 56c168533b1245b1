"""Models whose weights accelerate keeps on the disk or on another device until a module is called."""

import accelerate
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from tiny import class_token_config, tiny_config, tiny_images, tiny_model
from transformers import AutoModel, AutoModelForImageClassification

from binaryvit_hf import BinaryViTQuantizationConfig


CONFIGS = {
    "pyramid": tiny_config(),
    "some full precision": tiny_config(binarize_patch_embeddings=False),
    "class token": class_token_config(),
    "4 bits": tiny_config(weight_bits=4),
}


@pytest.fixture(autouse=True)
def computed_by_pytorch(monkeypatch):
    """The engine, which computes models that are not offloaded, rounds differently."""
    monkeypatch.setenv("BINARYVIT_ENGINE", "torch")


@pytest.fixture(scope="module", params=[(name, kind) for name in CONFIGS for kind in ("latent", "packed")], ids=str)
def folder(request, tmp_path_factory):
    name, kind = request.param
    folder = tmp_path_factory.mktemp("model")
    tiny_model(CONFIGS[name]).save_pretrained(folder / "latent")
    packing = BinaryViTQuantizationConfig()
    load(folder / "latent", quantization_config=packing).save_pretrained(folder / "packed")
    return folder / kind


def outputs(model) -> torch.Tensor:
    with torch.no_grad():
        return model(tiny_images())[0]


def load(folder, kind=AutoModelForImageClassification, **arguments):
    return kind.from_pretrained(folder, **arguments)


@pytest.mark.parametrize("kind", [AutoModel, AutoModelForImageClassification])
def test_a_device_map_with_stages_on_the_disk_gives_the_same_outputs(folder, kind, tmp_path):
    expected = load(folder, kind)
    prefix = "binaryvit." if kind is AutoModelForImageClassification else ""
    names = [name for name, _ in expected.base_model.named_children() if name != "stages"]
    names += [f"stages.{index}" for index in range(len(expected.base_model.stages))]
    devices = {prefix + name: "disk" if name.startswith("stages") else "cpu" for name in names}
    devices |= {"classifier": "cpu"} if prefix else {}
    model = load(folder, kind, device_map=devices, offload_folder=tmp_path)
    assert any(parameter.is_meta for parameter in model.parameters())
    assert torch.equal(outputs(model), outputs(expected))
    assert torch.equal(outputs(model), outputs(expected))  # the weights were offloaded again


def test_a_device_map_for_little_memory_gives_the_same_outputs(folder, tmp_path):
    expected = load(folder)
    memory = {"cpu": expected.get_memory_footprint() // 2}
    model = load(folder, device_map="auto", max_memory=memory, offload_folder=tmp_path)
    assert any(parameter.is_meta for parameter in model.parameters())
    assert torch.equal(outputs(model), outputs(expected))


OFFLOADS = {
    "cpu": lambda model, folder: accelerate.cpu_offload(model, "cpu"),
    "cpu with buffers": lambda model, folder: accelerate.cpu_offload(model, "cpu", offload_buffers=True),
    "disk": lambda model, folder: accelerate.disk_offload(model, folder, "cpu", offload_buffers=True),
    "dispatch": lambda model, folder: accelerate.dispatch_model(
        model, {"binaryvit": "disk", "classifier": "cpu"}, main_device="cpu", offload_dir=folder, force_hooks=True
    ),
}


@pytest.mark.parametrize("offload", OFFLOADS.values(), ids=OFFLOADS)
def test_an_offloaded_model_gives_the_same_outputs(folder, offload, tmp_path):
    model = load(folder)
    expected = outputs(model)
    offload(model, tmp_path)
    assert any(parameter.is_meta for parameter in model.parameters())
    assert torch.equal(outputs(model), expected)


class Recorder(ModelHook):
    """Notes the modules that are called, or whose tensors are read in place of a call."""

    def __init__(self):
        self.modules = []

    def pre_forward(self, module, *args, **kwargs):
        self.modules.append(module)
        return args, kwargs


def test_the_hooks_of_every_module_with_tensors_run_in_a_forward(folder):
    model, recorder = load(folder), Recorder()
    modules = {
        name: module
        for name, module in model.named_modules()
        if [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    }
    for module in modules.values():
        add_hook_to_module(module, recorder)
    outputs(model)
    assert [name for name, module in modules.items() if module not in recorder.modules] == []


def test_latent_weights_that_are_offloaded_are_not_packed(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    arguments = {"device_map": {"": "disk"}, "offload_folder": tmp_path / "offload"}
    with pytest.raises(ValueError, match="is offloaded: load the model without a device_map to pack it"):
        load(tmp_path, quantization_config=BinaryViTQuantizationConfig(), **arguments)
    model = load(tmp_path, quantization_config=BinaryViTQuantizationConfig())
    accelerate.cpu_offload(model, "cpu")
    with pytest.raises(ValueError, match="is offloaded"):
        model.dequantize(latent=True)

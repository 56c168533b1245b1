"""Training and evaluation use operations that PyTorch has for Apple's GPUs (MPS), by PyTorch's own table of kernels."""

from pathlib import Path

import pytest
import torch
import torchgen
import yaml
from packed_model import save_packed
from tiny import tiny_config, tiny_images, tiny_model
from tiny_training import tiny_teacher, tiny_trainer
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForImageClassification

from binaryvit_hf.network import functional_binaryvit
from binaryvit_hf.network.functional_binaryvit import batch_statistics


KERNELS = Path(torchgen.__file__).parent / "packaged" / "ATen" / "native" / "native_functions.yaml"
# Kernels for every device, or made of other operations.
FOR_ALL = {"CompositeImplicitAutograd", "CompositeExplicitAutograd", "CompositeExplicitAutogradNonFunctional"}


class Operations(TorchDispatchMode):
    """Collects the operations of PyTorch that run, and those with tensors of float64, which Apple's GPUs lack."""

    def __init__(self):
        super().__init__()
        self.names, self.in_float64 = set(), set()

    def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):
        result = operation(*arguments, **(keywords or {}))
        name, overload = operation._schema.name.removeprefix("aten::"), operation._schema.overload_name
        self.names.add(f"{name}.{overload}" if overload else name)
        tensors = [leaf for leaf in tree_leaves((arguments, keywords, result)) if isinstance(leaf, torch.Tensor)]
        if any(tensor.dtype == torch.float64 for tensor in tensors):
            self.in_float64.add(name)
        return result


@pytest.fixture(scope="module")
def with_kernel() -> set[str]:
    """The operations that have a kernel for Apple's GPUs."""
    functions = yaml.load(KERNELS.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    entries = {entry["func"].split("(")[0]: entry for entry in functions}
    names = set()
    for name, entry in entries.items():
        dispatch = entries[entry.get("structured_delegate", name)].get("dispatch", {"CompositeImplicitAutograd": None})
        devices = {device.strip() for names_of_devices in dispatch for device in names_of_devices.split(",")}
        if devices & {"MPS", *FOR_ALL}:
            names.add(name)
    return names


def test_the_table_tells_which_kernels_are_missing(with_kernel):
    assert {"mm", "add.Tensor", "var_mean.correction", "_fused_adamw_"} <= with_kernel
    assert "batch_norm_update_stats" not in with_kernel  # if it is now, STATISTICS_KERNELS may name Apple's GPUs


@pytest.mark.parametrize("bits", [1, 4, 32])
def test_training_and_evaluation_run_on_apple_gpus(bits, with_kernel, tmp_path):
    config = tiny_config(drop_path_rate=0.5, weight_bits=bits, input_bits=bits)
    numbers = {"weight_regularization": 0.1 * (bits == 1), "label_smoothing_factor": 0.1, "label_loss_weight": 0.5}
    trainer = tiny_trainer(tmp_path, tiny_model(config), teacher=tiny_teacher(), **numbers)
    model, images = trainer.model.to("meta").train(), tiny_images().to("meta")
    trainer.teacher.to("meta")
    with Operations() as operations:
        trainer.batch_loss(model, images, torch.zeros(len(images), dtype=torch.long, device="meta"))[0].backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        with torch.no_grad():
            model.eval()(images, output_attentions=True)
    assert {"mm", "var_mean.correction"} <= operations.names
    assert operations.names <= with_kernel
    assert operations.in_float64 == set()


def test_a_packed_network_runs_on_apple_gpus(with_kernel, tmp_path):
    model = AutoModelForImageClassification.from_pretrained(save_packed(tmp_path)).to("meta")
    with Operations() as operations, torch.no_grad():
        model(tiny_images().to("meta"))
    assert "mm" in operations.names
    assert operations.names <= with_kernel
    assert operations.in_float64 == set()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_statistics_without_a_kernel_equal_those_of_the_kernel(dtype, monkeypatch):
    rows = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)).mul(3).add(1).to(dtype)
    norms = nn.BatchNorm1d(6), nn.BatchNorm1d(6)
    expected = batch_statistics([rows], norms[0])
    monkeypatch.setattr(functional_binaryvit, "STATISTICS_KERNELS", ())
    torch.testing.assert_close(batch_statistics([rows], norms[1]), expected)
    torch.testing.assert_close(dict(norms[1].named_buffers()), dict(norms[0].named_buffers()), check_dtype=False)

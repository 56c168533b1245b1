"""What is particular to this network: initialisation, rows of the paper, export, fused attention, bit widths."""

import pytest
import torch
import torch.nn.utils.prune as prune
from golden_data import CONFIGS, ROWS, TINY
from tiny import class_token_config, one_layer_config, tiny_config, tiny_images, tiny_model
from torch import nn
from torch.utils.checkpoint import noop_context_fn
from transformers import AutoConfig, AutoModelForImageClassification

from binaryvit_hf import BinaryViTBackbone, BinaryViTConfig, BinaryViTForImageClassification
from binaryvit_hf.network.layers_binaryvit import BinaryLinear, BinaryProjection, NormActivation


CONFIG_KINDS = {
    "pyramid": tiny_config,
    "some full precision": lambda: tiny_config(binarize_patch_embeddings=False),
    "class token": class_token_config,
}


@pytest.fixture(params=CONFIG_KINDS)
def model(request):
    return tiny_model(CONFIG_KINDS[request.param]()).eval()


def test_layers_begin_with_pytorchs_values_and_other_parameters_with_the_papers():
    model = BinaryViTForImageClassification(BinaryViTConfig(num_labels=10))
    layer = model.binaryvit.stages[2].layers[0]
    bound = 256**-0.5  # kaiming uniform with a = sqrt(5)
    weight = layer.mlp.fc1.linear.weight
    assert weight.abs().max() <= bound
    assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
    assert model.binaryvit.embeddings.position_embeddings.std().item() == pytest.approx(0.02, rel=0.1)
    assert layer.attention.probability_clip.item() == pytest.approx(0.005)
    assert layer.mlp.fc1.norm_activation.activation.slope.eq(0.25).all()
    assert layer.layer_scale1.scale.eq(0.1).all()
    assert layer.avg_pool_branches[0].layer_scale.scale.eq(0).all()


@pytest.mark.parametrize("row", [*(row for row in ROWS if row.startswith(("react", "binary"))), TINY])
def test_rows_are_built_on_the_meta_device(row):
    with torch.device("meta"):
        model = AutoModelForImageClassification.from_config(AutoConfig.from_pretrained(CONFIGS / row))
    assert all(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])


def test_a_model_exports_for_any_number_of_images(model):
    assert_exports(model, strict=False)


def test_a_backbone_exports_for_any_number_of_images():
    config = tiny_config(out_features=["stem", "stage1", "stage2"])
    assert_exports(BinaryViTBackbone(config).eval(), strict=False)


def test_a_model_exports_in_strict_mode_for_any_number_of_images():
    assert_exports(tiny_model(one_layer_config()).eval(), strict=True)


def assert_exports(model, strict: bool) -> None:
    shapes = {"pixel_values": {0: torch.export.Dim("batch")}}
    program = torch.export.export(model, (tiny_images(),), dynamic_shapes=shapes, strict=strict)
    for batch in (1, 2, 5):
        torch.testing.assert_close(dict(program.module()(tiny_images(batch))), dict(model(tiny_images(batch))))


@pytest.mark.parametrize("stage", [0, 1])  # with keys and values that are averaged, and without
def test_fused_attention_has_the_gradients_of_single_operations_for_losses_on_both_results(stage):
    model = tiny_model().double().train()
    attention, (height, width) = model.binaryvit.stages[stage].layers[0].attention, model.config.grid_sizes[stage]
    torch.manual_seed(0)
    inputs = torch.randn(2, height * width, model.config.hidden_sizes[stage], dtype=torch.double, requires_grad=True)
    results = []
    for plain in (False, True):
        outputs = attention(inputs, (height, width), plain)
        loss = sum((x * torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view(x.shape)).sum() for x in outputs)
        results.append([*outputs, *torch.autograd.grad(loss, [inputs, *attention.parameters()])])
    for fused, single in zip(*results, strict=True):
        torch.testing.assert_close(fused, single)


def test_reentrant_checkpointing_is_refused():
    with pytest.raises(ValueError, match="use_reentrant=False"):
        tiny_model().gradient_checkpointing_enable({"use_reentrant": True})


@pytest.mark.parametrize("arguments", [{"context_fn": noop_context_fn}, {"debug": True}], ids=["context_fn", "debug"])
def test_arguments_of_checkpointing_that_its_context_excludes_are_refused(arguments):
    with pytest.raises(ValueError, match="without context_fn and debug"):
        tiny_model().gradient_checkpointing_enable(arguments)


def test_checkpointing_takes_other_arguments_of_pytorch():
    model = tiny_model().train()
    model.gradient_checkpointing_enable({"preserve_rng_state": False})
    model(tiny_images()).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("name", ["", ".linear", ".norm_activation"])
@pytest.mark.parametrize("layer", ["fc1", "fc2"])
def test_hooks_in_the_mlp_are_called_in_training(layer, name):
    model, called = tiny_model().train(), []
    module = model.binaryvit.stages[0].layers[0].mlp.get_submodule(layer + name)
    module.register_forward_pre_hook(lambda *_: called.append("before"))
    module.register_forward_hook(lambda *_: called.append("after"))
    module.register_full_backward_hook(lambda *_: called.append("backward"))
    model(tiny_images()).logits.sum().backward()
    assert called == ["before", "after", "backward"]


def test_hooks_for_all_modules_are_called_in_training():
    """Such as those of PyTorch's FlopCounterMode."""
    model, called = tiny_model().train(), set()
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: called.add(module))
    try:
        model(tiny_images())
    finally:
        handle.remove()
    parts = (BinaryLinear, BinaryProjection, NormActivation)
    assert [name for name, part in model.named_modules() if isinstance(part, parts) and part not in called] == []


def test_a_pruned_mlp_trains():
    """PyTorch multiplies the mask and the weight in a hook before every call of the layer."""
    model = tiny_model().train()
    linear = model.binaryvit.stages[0].layers[0].mlp.fc1.linear
    prune.l1_unstructured(linear, "weight", 0.5)
    for _ in range(2):
        model(tiny_images()).logits.sum().backward()
    assert torch.equal(linear.weight, linear.weight_orig * linear.weight_mask)
    assert linear.weight_orig.grad.any()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("images", [None, [tiny_images()], tiny_images().numpy()], ids=["None", "list", "ndarray"])
def test_images_that_are_no_tensor_are_refused(images, packed):
    model = tiny_model().eval()
    if packed:
        model.pack_weights()
    for call in (model, model.binaryvit, BinaryViTBackbone(tiny_config())):
        with pytest.raises(ValueError, match=rf"must be a tensor .*, not {type(images).__name__}: an image processor"):
            call(images)


@pytest.mark.parametrize("shape", [(2, 3, 32, 16), (2, 1, 16, 32)], ids=str)
def test_images_of_another_shape_are_refused(model, shape):
    with pytest.raises(ValueError, match=r"takes images of \(channels, height, width\) \(3, 16, 32\)"):
        model(torch.zeros(shape))


@pytest.mark.parametrize("weight_bits", [1, 2, 4, 8, 32])
@pytest.mark.parametrize("input_bits", [1, 2, 4, 8, 32])
def test_every_bit_width_trains(weight_bits, input_bits):
    model = tiny_model(tiny_config(weight_bits=weight_bits, input_bits=input_bits)).train()
    model(tiny_images(), labels=torch.tensor([0, 1])).loss.backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())

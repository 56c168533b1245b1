"""Behaviour that transformers expects of a model: saving, outputs, precision, compilation, checkpointing."""

import copy

import pytest
import torch
from golden_data import CONFIGS, ROWS
from safetensors.torch import load_file, save_file
from tiny import class_token_config, tiny_config, tiny_images, tiny_model
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification

from binaryvit_hf import BinaryViTConfig, BinaryViTForImageClassification, BinaryViTModel


CONFIG_KINDS = {
    "pyramid": tiny_config,
    "some full precision": lambda: tiny_config(binarize_patch_embeddings=False),
    "class token": class_token_config,
}


@pytest.fixture(params=CONFIG_KINDS)
def model(request):
    return tiny_model(CONFIG_KINDS[request.param]()).eval()


def test_a_saved_model_loads_bit_identical(model, tmp_path):
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    loaded, info = AutoModelForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    state, loaded_state = model.state_dict(), loaded.state_dict()
    assert state.keys() == loaded_state.keys()
    assert all(torch.equal(state[name], loaded_state[name]) for name in state)
    assert torch.equal(model(tiny_images()).logits, loaded(tiny_images()).logits)


def test_a_backbone_loads_from_a_classifier_checkpoint(model, tmp_path):
    model.save_pretrained(tmp_path)
    backbone = AutoModel.from_pretrained(tmp_path)
    assert isinstance(backbone, BinaryViTModel)
    expected = model.binaryvit(tiny_images()).last_hidden_state
    assert torch.equal(backbone(tiny_images()).last_hidden_state, expected)


def test_missing_weights_are_initialised_as_in_a_seeded_new_model(model, tmp_path):
    # Built without random numbers, as from_pretrained builds, so that both draw the same ones after the seed.
    with torch.device("meta"):
        fresh = BinaryViTForImageClassification(copy.deepcopy(model.config))
    fresh.to_empty(device="cpu")
    torch.manual_seed(3)
    fresh.init_weights()
    model.config.save_pretrained(tmp_path)
    save_file({}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    torch.manual_seed(3)
    loaded = BinaryViTForImageClassification.from_pretrained(tmp_path)
    for name, tensor in fresh.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_a_missing_weight_does_not_change_the_others(model, tmp_path):
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["classifier.weight"]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded, info = BinaryViTForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == {"classifier.weight"}
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in state.items())


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


def test_every_tensor_is_a_parameter_or_a_buffer(model):
    registered = {id(tensor) for tensor in [*model.parameters(), *model.buffers()]}
    for name, module in model.named_modules():
        loose = [key for key, value in vars(module).items() if torch.is_tensor(value) and id(value) not in registered]
        assert not loose, (name, loose)
    assert set(model.state_dict()) == {name for name, _ in [*model.named_parameters(), *model.named_buffers()]}


@pytest.mark.parametrize("row", [row for row in ROWS if row.startswith(("react", "binary"))])
def test_rows_are_built_on_the_meta_device(row):
    with torch.device("meta"):
        model = AutoModelForImageClassification.from_config(AutoConfig.from_pretrained(CONFIGS / row))
    assert all(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])


def test_hidden_states_are_the_input_of_every_layer_and_the_last_output():
    model = tiny_model().eval()
    states = model(tiny_images(), output_hidden_states=True).hidden_states
    assert [tuple(state.shape) for state in states] == [(2, 32, 8), (2, 32, 8), (2, 8, 16), (2, 8, 16)]
    outputs = model.binaryvit(tiny_images())
    assert torch.equal(model.binaryvit.norm(states[-1]), outputs.last_hidden_state)
    assert outputs.hidden_states is None


def test_attentions_are_the_binary_probabilities_of_every_layer():
    model = tiny_model().eval()
    attentions = model(tiny_images(), output_attentions=True).attentions
    assert [tuple(attention.shape) for attention in attentions] == [(2, 2, 32, 8), (2, 2, 32, 8), (2, 4, 8, 8)]
    layers = [layer for stage in model.binaryvit.stages for layer in stage.layers]
    for attention, layer in zip(attentions, layers):
        clip = layer.attention.probability_clip.item()
        assert set(attention.unique().tolist()) <= {0.0, clip}


def test_tuples_are_returned_on_request(model):
    logits, hidden_states, _ = model(tiny_images(), output_hidden_states=True, return_dict=False)
    assert torch.equal(logits, model(tiny_images()).logits)
    assert isinstance(hidden_states, tuple)


def test_labels_give_the_cross_entropy(model):
    labels = torch.tensor([0, 2])
    outputs = model(tiny_images(), labels=labels)
    torch.testing.assert_close(outputs.loss, torch.nn.functional.cross_entropy(outputs.logits, labels))


def test_images_of_a_batch_are_independent(model):
    model.double()  # in float32, sums depend on the batch size in the last bit, which can flip a sign
    images = tiny_images(5).double()
    alone = torch.cat([model(image[None]).logits for image in images])
    torch.testing.assert_close(model(images).logits, alone, rtol=1e-10, atol=1e-10)


def test_two_forward_passes_are_bit_identical(model):
    assert torch.equal(model(tiny_images()).logits, model(tiny_images()).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_runs_in_half_precision(model, dtype, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path, dtype=dtype)
    logits = loaded(tiny_images().to(dtype)).logits
    assert logits.dtype == dtype
    assert logits.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_trains_under_autocast(dtype):
    model = tiny_model().train()
    with torch.autocast("cpu", dtype):
        loss = model(tiny_images(), labels=torch.tensor([0, 1])).loss
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_a_model_compiles_as_one_graph(model):
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(tiny_images()).logits, model(tiny_images()).logits)


def test_a_model_exports_for_any_number_of_images(model):
    assert_exports(model, strict=False)


def test_a_backbone_exports_for_any_number_of_images():
    assert_exports(tiny_model().eval().binaryvit, strict=False)


def test_a_model_exports_in_strict_mode_for_any_number_of_images():
    config = tiny_config(
        hidden_sizes=[8],
        depths=[1],
        num_attention_heads=[2],
        intermediate_sizes=[16],
        sequence_reduction_ratios=[1],
        avg_pool_kernel_sizes=[3],
    )
    assert_exports(tiny_model(config).eval(), strict=True)


def assert_exports(model, strict: bool) -> None:
    shapes = {"pixel_values": {0: torch.export.Dim("batch")}}
    program = torch.export.export(model, (tiny_images(),), dynamic_shapes=shapes, strict=strict)
    for batch in (1, 2, 5):
        torch.testing.assert_close(dict(program.module()(tiny_images(batch))), dict(model(tiny_images(batch))))


def test_gradient_checkpointing_changes_neither_gradients_nor_statistics():
    plain, checkpointed = tiny_model().double().train(), tiny_model().double().train()
    checkpointed.gradient_checkpointing_enable()
    for model in (plain, checkpointed):
        model(tiny_images().double(), labels=torch.tensor([0, 1])).loss.backward()
    for (name, ours), theirs in zip(checkpointed.named_parameters(), plain.parameters()):
        torch.testing.assert_close(ours.grad, theirs.grad, msg=name)
    for (name, ours), theirs in zip(checkpointed.named_buffers(), plain.buffers()):
        assert torch.equal(ours, theirs), name
    assert checkpointed.binaryvit.norm.batch_norm.num_batches_tracked.item() == 1


def test_reentrant_checkpointing_is_refused():
    with pytest.raises(ValueError, match="use_reentrant=False"):
        tiny_model().gradient_checkpointing_enable({"use_reentrant": True})


def test_a_classifier_of_another_size_begins_with_random_weights(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path, num_labels=7, ignore_mismatched_sizes=True)
    assert loaded(tiny_images()).logits.shape == (2, 7)
    assert loaded.classifier.weight.abs().sum() > 0
    for name, tensor in model.binaryvit.state_dict().items():
        assert torch.equal(loaded.binaryvit.state_dict()[name], tensor), name


def test_auto_classes_know_the_model():
    config = AutoConfig.for_model("binaryvit", num_labels=3)
    assert isinstance(config, BinaryViTConfig)
    with torch.device("meta"):
        assert isinstance(AutoModel.from_config(config), BinaryViTModel)
        assert isinstance(AutoModelForImageClassification.from_config(config), BinaryViTForImageClassification)


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

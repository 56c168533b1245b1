"""PEFT's adapters: refused on layers of bits, whose latent weights are no weights of a float layer; right on float layers."""

import peft
import pytest
import torch
from tiny import tiny_config, tiny_images, tiny_model
from torch import nn
from transformers import AutoModelForImageClassification

from binaryvit_hf import BinaryViTQuantizationConfig
from binaryvit_hf.network.layers_binaryvit import BinaryLinear, BinaryPatchConv


KINDS = {
    "LoRA": lambda targets: peft.LoraConfig(target_modules=targets, lora_alpha=16),
    "IA3": lambda targets: peft.IA3Config(target_modules=targets, feedforward_modules=[]),
    "LoHa": lambda targets: peft.LoHaConfig(target_modules=targets),
    "OFT": lambda targets: peft.OFTConfig(target_modules=targets),
}
TARGETS = {"query.linear": "Linear", "mlp.fc1.linear": "Linear", "patch_embeddings.projection": "PatchConv"}
FLOAT_LAYERS = ["classifier", "embeddings.projection"]


@pytest.fixture(autouse=True)
def computed_by_pytorch(monkeypatch):
    monkeypatch.setenv("BINARYVIT_ENGINE", "torch")


@pytest.fixture(params=["latent", "packed"])
def model(request):
    model = tiny_model().eval()
    if request.param == "packed":
        model.pack_weights()
    return model


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(tiny_images()).logits


def train(model, steps: int = 5) -> list[float]:
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(steps):
        loss = model(tiny_images(), labels=torch.tensor([0, 2])).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("target, layer", TARGETS.items(), ids=TARGETS)
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_an_adapter_of_a_layer_of_bits_is_refused_and_its_class_and_bits_are_named(model, kind, target, layer):
    expected = logits(model)
    name = "PackedLinear" if model.is_packed else f"Binary{layer}"
    with pytest.raises((ValueError, TypeError), match=f"{name}.* (is not|not) supported"):
        peft.get_peft_model(model, kind([target]))
    assert torch.equal(logits(model), expected)


def test_layers_of_bits_are_no_float_layers_and_show_their_bits():
    for layer in (BinaryLinear(tiny_config(), 8, 16), BinaryPatchConv(tiny_config(), 8, 16)):
        assert not isinstance(layer, (nn.Linear, nn.Conv2d))
        assert "in_features=8, out_features=16, weight_bits=1, input_bits=1" in repr(layer)


def test_all_linear_layers_are_those_of_floats(model):
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear"))
    assert {name.split(".lora_")[0] for name, p in adapted.named_parameters() if p.requires_grad} == {
        "base_model.model.classifier"
    }
    with pytest.raises(ValueError, match="target_modules"):
        peft.get_peft_model(tiny_model().binaryvit, peft.LoraConfig(target_modules="all-linear"))


def test_lora_on_float_layers_trains_saves_loads_and_merges(model, tmp_path):
    is_packed, expected = model.is_packed, logits(model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=FLOAT_LAYERS, lora_alpha=16))
    assert torch.equal(logits(adapted), expected)
    losses = train(adapted.train())
    assert min(losses[1:]) < losses[0]
    trained = logits(adapted.eval())
    assert not torch.equal(trained, expected)
    adapted.save_pretrained(tmp_path)
    base = tiny_model().eval()
    if is_packed:
        base.pack_weights()
    else:
        base.load_state_dict(
            {
                name.replace(".base_layer", ""): tensor
                for name, tensor in model.state_dict().items()
                if "lora" not in name
            }
        )
    loaded = peft.PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(logits(loaded.eval()), trained)
    torch.testing.assert_close(logits(loaded.merge_and_unload()), trained)


def test_a_head_is_trained_and_saved_beside_an_adapter(tmp_path):
    config = peft.LoraConfig(target_modules=["embeddings.projection"], modules_to_save=["classifier"])
    adapted = peft.get_peft_model(tiny_model(), config)
    train(adapted.train())
    trained = logits(adapted.eval())
    adapted.merge_and_unload().save_pretrained(tmp_path)
    merged = AutoModelForImageClassification.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(merged), trained)
    packed = AutoModelForImageClassification.from_pretrained(
        tmp_path, quantization_config=BinaryViTQuantizationConfig()
    )
    assert torch.equal(logits(packed), logits(merged))


def test_lora_on_latent_weights_themselves_is_the_same_in_training_evaluation_and_merged():
    """`target_parameters` adds to a latent weight before its sign is taken, also in the fused MLP."""
    names = ["query.linear.weight", "fc1.linear.weight", "fc2.linear.weight"]
    adapted = peft.get_peft_model(tiny_model(), peft.LoraConfig(target_parameters=names, init_lora_weights=False))
    losses = train(adapted.train(), 2)
    assert losses[0] != losses[1]
    trained = logits(adapted.eval())
    assert torch.equal(logits(adapted.merge_and_unload()), trained)


def test_add_adapter_of_transformers_refuses_layers_of_bits_and_takes_float_layers(model, monkeypatch):
    # This version of transformers wants a PEFT that may not be installed; what is used of it is older.
    monkeypatch.setattr("transformers.integrations.peft.MIN_PEFT_VERSION", "0.18.0")
    with pytest.raises(ValueError, match=r"(PackedLinear|BinaryLinear)\(.*weight_bits=1.* is not supported"):
        model.add_adapter(peft.LoraConfig(target_modules=["query.linear"]))
    model = tiny_model().eval()
    expected = logits(model)
    model.add_adapter(peft.LoraConfig(target_modules=FLOAT_LAYERS))
    assert torch.equal(logits(model), expected)
    train(model)
    assert not torch.equal(logits(model), expected)

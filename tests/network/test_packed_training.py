"""Training what is no bit of a packed model: its head, an adapter or a head of another kind. The backbone stays as it is."""

import copy

import peft
import pytest
import torch
from tiny import tiny_config, tiny_images, tiny_model
from tiny_training import tiny_teacher, tiny_trainer
from torch import nn
from transformers import AutoModel, AutoModelForImageClassification, Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging as transformers_logging

from binaryvit_hf import BinaryViTQuantizationConfig, engine


ADAPTERS = {
    "head": lambda model: model,
    "LoRA on the head": lambda model: peft.get_peft_model(model, peft.LoraConfig(target_modules=["classifier"])),
    "LoRA on the stem, and the head": lambda model: peft.get_peft_model(
        model,
        peft.LoraConfig(target_modules=["embeddings.projection"], lora_dropout=0.1, modules_to_save=["classifier"]),
    ),
}
needs_engine = pytest.mark.skipif(not engine.kernels_here(), reason=f"there is no engine: {engine.problem()}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A packed classifier."""
    root = tmp_path_factory.mktemp("classifier")
    tiny_model().save_pretrained(root / "latent")
    packing = BinaryViTQuantizationConfig()
    packed = AutoModelForImageClassification.from_pretrained(root / "latent", quantization_config=packing)
    packed.save_pretrained(root / "packed")
    return root / "packed"


@pytest.fixture
def packed(folder):
    return AutoModelForImageClassification.from_pretrained(folder)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(tiny_images()).logits


def train(model, output_dir, **arguments) -> list[float]:
    """Train with transformers' own Trainer. Returns the loss of every step."""
    return [step["loss"] for step in train_steps(model, output_dir, **arguments)]


def train_steps(model, output_dir, resume_from_checkpoint=None, **arguments) -> list[dict]:
    """Train with transformers' own Trainer. Returns its records of every step."""
    examples = [{"pixel_values": image, "labels": index % 3} for index, image in enumerate(tiny_images(6))]
    options = {"per_device_train_batch_size": 6, "learning_rate": 0.05, "max_steps": 8, "logging_steps": 1}
    options |= {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True}
    trainer = Trainer(model, TrainingArguments(str(output_dir), **(options | arguments)), train_dataset=examples)
    trainer.add_callback(StatesOfTraining())
    trainer.train(resume_from_checkpoint=resume_from_checkpoint)
    return [entry for entry in trainer.state.log_history if "loss" in entry]


class StatesOfTraining(TrainerCallback):
    """Checks at every step that a packed backbone is in evaluation mode."""

    def on_step_end(self, args, state, control, model, **kwargs):
        assert model.training
        norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm1d)]
        assert norms and not any(norm.training for norm in norms)


def backbone_tensors(model) -> dict[str, torch.Tensor]:
    """Copies of all tensors of the backbone, by the names that they have without adapters."""
    return {
        name.replace(".base_layer", "").rpartition("binaryvit.")[2]: tensor.clone()
        for name, tensor in model.state_dict().items()
        if "binaryvit." in name and ".lora_" not in name
    }


@pytest.mark.parametrize("adapt", ADAPTERS.values(), ids=ADAPTERS)
def test_transformers_trainer_trains_head_and_adapters_and_keeps_bits_and_statistics(packed, folder, adapt, tmp_path):
    before = backbone_tensors(packed)
    model = adapt(packed)
    losses = train(model, tmp_path / "run")
    assert losses[-1] < losses[0] - 0.1
    after = backbone_tensors(model)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    trained = logits(model.eval())
    if isinstance(model, peft.PeftModel):
        model.save_pretrained(tmp_path / "adapter")
        base = AutoModelForImageClassification.from_pretrained(folder)
        assert torch.equal(logits(peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()), trained)
        model = model.merge_and_unload()
        torch.testing.assert_close(logits(model), trained)
        trained = logits(model)
    assert model.is_packed
    model.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(AutoModelForImageClassification.from_pretrained(tmp_path / "merged")), trained)


def test_a_checkpoint_of_such_a_run_is_packed_and_continues_to_the_same_head(packed, folder, tmp_path):
    saving = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    train(packed, tmp_path, **saving)
    checkpoint = tmp_path / "checkpoint-2"
    assert AutoModelForImageClassification.from_pretrained(checkpoint).is_packed
    other = AutoModelForImageClassification.from_pretrained(folder)
    train(other, tmp_path, resume_from_checkpoint=str(checkpoint), **saving)
    assert torch.equal(logits(other.eval()), logits(packed.eval()))


@needs_engine
def test_the_engine_computes_the_backbone_while_the_head_trains(packed):
    packed.train()
    assert packed.training and packed.classifier.training
    assert packed.engine.name == engine.kernels_here()[0]
    packed(tiny_images(), labels=torch.tensor([0, 2])).loss.backward()
    assert packed.classifier.weight.grad is not None
    assert packed.binaryvit.engine_slot.folded is not None


def test_an_adapter_in_the_backbone_has_its_dropout_in_training_mode_only(packed):
    model = ADAPTERS["LoRA on the stem, and the head"](packed)
    projection = model.base_model.model.binaryvit.embeddings.projection
    for mode in (True, False, True):
        assert model.train(mode).training == mode
        assert all(module.training == mode for module in projection.modules())
        backbone = {*packed.binaryvit.modules()} - {*projection.modules()}
        assert not any(module.training for module in backbone)


def test_float_parameters_of_the_backbone_train_one_by_one_and_statistics_stay(packed):
    norm = packed.binaryvit.norm.batch_norm
    norm.weight.requires_grad_(True)
    before, weight = backbone_tensors(packed), norm.weight.detach().clone()
    optimizer = torch.optim.SGD([norm.weight], lr=0.1)
    for _ in range(2):
        packed.train()(tiny_images(), labels=torch.tensor([0, 2])).loss.backward()
        optimizer.step()
    assert not torch.equal(norm.weight, weight)
    after = backbone_tensors(packed)
    assert [name for name, tensor in before.items() if not torch.equal(after[name], tensor)] == [
        "norm.batch_norm.weight"
    ]


OPTIMIZERS = {
    "fused": lambda parameters: torch.optim.AdamW(
        parameters, lr=0.05, fused=True
    ),  # the default of transformers' Trainer
    "counted": lambda parameters: torch.optim.SGD(parameters, lr=0.5),
}


@needs_engine
@pytest.mark.parametrize("create", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("order", ["train mode", "evaluation mode", "evaluation before each step", "with a hook"])
def test_the_engine_computes_parameters_of_the_backbone_after_each_step(packed, create, order):
    """PyTorch does not count the changes by fused optimisers."""
    logits(packed)
    norm = packed.binaryvit.norm.batch_norm
    norm.requires_grad_(True)
    optimizer = create(norm.parameters())
    hook = norm.register_forward_hook(lambda *_: None) if order == "with a hook" else None
    for _ in range(2):
        loss = packed.train(order == "train mode")(tiny_images(), labels=torch.tensor([0, 2])).loss
        if order == "evaluation before each step":
            logits(packed)
        loss.backward()
        optimizer.step()
        if hook:
            hook.remove()
        computed = logits(packed.eval())
        assert packed.binaryvit.engine_slot.folded is not None
        packed.refresh_engine()
        assert torch.equal(computed, logits(packed))


@needs_engine
def test_transformers_trainer_evaluates_the_parameters_of_the_backbone_that_it_trained(packed, tmp_path):
    before = logits(packed)
    packed.binaryvit.norm.batch_norm.bias.requires_grad_(True)
    packed.classifier.requires_grad_(False)
    train(packed, tmp_path)
    computed = logits(packed.eval())
    packed.refresh_engine()
    assert torch.equal(computed, logits(packed))
    assert not torch.equal(computed, before)


@needs_engine
def test_values_are_compared_only_where_parameters_of_the_backbone_train(packed):
    packed.train()(tiny_images(), labels=torch.tensor([0, 2])).loss.backward()
    assert packed.binaryvit.engine_slot.folded.state.values == []


def test_a_head_of_another_kind_trains_on_a_packed_backbone(folder):
    backbone = AutoModel.from_pretrained(folder)
    backbone.requires_grad_(True)  # as transformers' loader of a model with a head does
    model = nn.ModuleDict({"backbone": backbone, "head": nn.Linear(16, 2)}).train()
    assert model["head"].training
    assert not any(module.training for module in backbone.modules())
    before = backbone_tensors(nn.ModuleDict({"binaryvit": backbone}))
    nn.functional.cross_entropy(model["head"](backbone(tiny_images()).pooler_output), torch.tensor([0, 1])).backward()
    assert model["head"].weight.grad is not None
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    after = backbone_tensors(nn.ModuleDict({"binaryvit": backbone}))
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_whoever_trains_a_packed_classifier_is_told_once_that_its_bits_stay(packed, caplog):
    transformers_logging.warning_once.cache_clear()
    for _ in range(3):
        packed.eval().train()
    assert caplog.text.count("its bits do not train") == 1


def test_accumulated_batches_have_the_loss_and_the_gradient_of_one_batch(packed, tmp_path):
    options = {"max_steps": 1, "learning_rate": 0.0, "max_grad_norm": 1e9}
    whole, parts = (
        train_steps(
            packed, tmp_path, per_device_train_batch_size=6 // steps, gradient_accumulation_steps=steps, **options
        )
        for steps in (1, 3)
    )
    assert parts[0]["loss"] == pytest.approx(whole[0]["loss"], rel=1e-3)
    assert parts[0]["grad_norm"] == pytest.approx(whole[0]["grad_norm"], rel=1e-3)


def test_a_frozen_packed_classifier_in_a_larger_module_stays_in_evaluation_mode(packed):
    packed.requires_grad_(False)
    model = nn.ModuleDict({"student": tiny_model(), "teacher": packed}).train()
    assert model["student"].training
    assert not any(module.training for module in packed.modules())


def test_training_a_frozen_packed_classifier_says_that_nothing_trains(packed, tmp_path, caplog):
    transformers_logging.warning_once.cache_clear()
    packed.requires_grad_(False)
    with torch.no_grad():
        packed(tiny_images(), labels=torch.tensor([0, 2]))
    assert "all its parameters are frozen" not in caplog.text
    with pytest.raises(RuntimeError, match="does not require grad"):
        train(packed, tmp_path)
    assert caplog.text.count("all its parameters are frozen") == 1
    packed.classifier.requires_grad_(True)  # as the warning says
    train(packed, tmp_path, max_steps=1)


def test_a_packed_classifier_whose_layers_of_bits_are_not_frozen_refuses_training(packed, tmp_path):
    packed.requires_grad_(True)
    with pytest.raises(ValueError, match=r"a bit has no gradient.*dequantize\(latent=True\)"):
        packed.train()
    assert not any(module.training for module in packed.modules())
    with pytest.raises(ValueError, match="a bit has no gradient"):
        train(packed, tmp_path)


def test_a_model_packed_in_training_mode_keeps_its_statistics():
    model = tiny_model().train()
    model.pack_weights()
    before = backbone_tensors(model)
    expected = logits(model)
    assert all(torch.equal(backbone_tensors(model)[name], tensor) for name, tensor in before.items())
    with pytest.raises(ValueError, match="a bit has no gradient"):
        model.train()
    model.base_model.requires_grad_(False)
    model.train()
    assert torch.equal(logits(model), expected)


def test_a_dequantized_model_trains_as_a_whole_after_its_head(packed):
    packed.train()
    model = copy.deepcopy(packed).dequantize(latent=True).train()
    assert all(module.training for module in model.modules())
    model(tiny_images(), labels=torch.tensor([0, 2])).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_packed_layers_on_the_meta_device_give_gradients_to_an_adapter():
    model = tiny_model(tiny_config()).eval()
    model.pack_weights()
    model = ADAPTERS["LoRA on the stem, and the head"](model).to("meta").train()
    model(
        torch.empty(2, 3, 16, 32, device="meta"), labels=torch.empty(2, dtype=torch.long, device="meta")
    ).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


def merge_loaded(base, adapter):
    return peft.PeftModel.from_pretrained(base, adapter).merge_and_unload()


def merge_new(base, adapter):
    """In contrast to a loaded adapter, PEFT does not call eval()."""
    config = peft.LoraConfig.from_pretrained(adapter)
    config.init_lora_weights = False
    return peft.get_peft_model(base, config).merge_and_unload()


def merge_and_take_out(base, adapter):
    adapted = peft.get_peft_model(base, peft.LoraConfig.from_pretrained(adapter))
    peft.set_peft_model_state_dict(adapted, peft.load_peft_weights(adapter))
    adapted.merge_adapter()
    return adapted.unload()


@needs_engine
@pytest.mark.parametrize("merge", [merge_loaded, merge_new, merge_and_take_out])
def test_an_adapter_that_is_merged_between_two_calls_is_computed(packed, folder, merge, tmp_path):
    """PEFT merges through .data, whose changes PyTorch does not count, and puts the old module back."""
    config = peft.LoraConfig(target_modules=["classifier", "embeddings.projection"], init_lora_weights=False)
    peft.get_peft_model(packed, config).save_pretrained(tmp_path)
    base = AutoModelForImageClassification.from_pretrained(folder)
    weight = base.binaryvit.embeddings.projection.weight.clone()
    logits(base)
    merged = merge(base, tmp_path)
    assert merged.engine.name == engine.kernels_here()[0]
    assert not torch.equal(merged.binaryvit.embeddings.projection.weight, weight)
    computed = logits(merged)
    merged.refresh_engine()
    assert torch.equal(computed, logits(merged))


def test_the_trainer_of_this_package_distils_the_head(packed, tmp_path):
    before, weight = backbone_tensors(packed), packed.classifier.weight.detach().clone()
    trainer = tiny_trainer(tmp_path, packed, teacher=tiny_teacher(), max_steps=2)
    trainer.train()
    assert not torch.equal(packed.classifier.weight, weight)
    after = backbone_tensors(packed)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert trainer.evaluate()["eval_loss"] > 0

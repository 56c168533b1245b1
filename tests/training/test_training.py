"""The distillation loss, and the training, evaluation and checkpoints of the trainer."""

import multiprocessing
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from tiny import tiny_config, tiny_images, tiny_model
from tiny_training import EVERY_STEP, tiny_teacher, tiny_trainer
from transformers import ResNetConfig, ResNetForImageClassification, TrainerCallback, TrainingArguments

from binaryvit_hf.network.layers_binaryvit import BinaryLayer
from binaryvit_hf.network.modeling_binaryvit import BinaryViTAttention
from binaryvit_hf.training.arguments import DistillationTrainingArguments
from binaryvit_hf.training.callbacks.positive_clips import SMALLEST_CLIP
from binaryvit_hf.training.losses import distillation_loss
from binaryvit_hf.training.metrics import TopKAccuracy
from binaryvit_hf.training.steps import log_batch
from binaryvit_hf.training.trainer import DistillationTrainer
from binaryvit_runtime.errors import NonFiniteLossError, UserError


STUDENT = torch.tensor([[1.0, 2.0, 0.5], [0.0, -1.0, 3.0]])
TEACHER = torch.tensor([[0.0, 3.0, 0.0], [1.0, 1.0, 2.0]])
LABELS = torch.tensor([1, 2])


def test_default_loss_is_the_papers_and_ignores_the_labels():
    expected = -(TEACHER.softmax(-1) * STUDENT.log_softmax(-1)).sum(-1).mean()
    for labels in (LABELS, LABELS - 1):
        torch.testing.assert_close(distillation_loss(STUDENT, TEACHER, labels), expected)


def test_soft_labels_take_a_tenth_of_the_loss():
    soft = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.2, 0.8]])
    log_probabilities = STUDENT.log_softmax(-1)
    expected = -(0.9 * TEACHER.softmax(-1) + 0.1 * soft).mul(log_probabilities).sum(-1).mean()
    torch.testing.assert_close(distillation_loss(STUDENT, TEACHER, soft), expected)


def test_label_weight_and_temperature_enter_as_documented():
    distilled = -((TEACHER / 2).softmax(-1) * (STUDENT / 2).log_softmax(-1)).sum(-1).mean() * 4
    expected = 0.7 * distilled + 0.3 * torch.nn.functional.cross_entropy(STUDENT, LABELS)
    torch.testing.assert_close(distillation_loss(STUDENT, TEACHER, LABELS, 0.3, 2.0), expected)


@pytest.mark.parametrize("arguments", [{"label_loss_weight": 1.5}, {"distillation_temperature": 0.0}])
def test_loss_arguments_out_of_range_are_refused(arguments, tmp_path):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        DistillationTrainingArguments(str(tmp_path), **arguments)


def test_teacher_is_neither_trained_nor_saved_nor_optimised(tmp_path):
    teacher = tiny_teacher().train()
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    trainer = tiny_trainer(tmp_path, teacher=teacher)
    student_before = trainer.model.classifier.weight.clone()
    trainer.train()
    trainer.save_model()
    assert not teacher.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    optimised = {id(parameter) for group in trainer.optimizer.param_groups for parameter in group["params"]}
    assert not optimised & {id(parameter) for parameter in teacher.parameters()}
    assert not torch.equal(trainer.model.classifier.weight, student_before)
    saved = type(trainer.model).from_pretrained(tmp_path / "latent")
    assert saved.state_dict().keys() == trainer.model.state_dict().keys()


@pytest.mark.parametrize("taught", [True, False])
def test_gradient_accumulation_is_the_mean_over_its_steps(tmp_path, taught):
    """With frozen statistics, four accumulated images have the gradient of one batch of four."""
    grads = []
    for batch, steps in ((4, 1), (1, 4)):
        teacher = tiny_teacher() if taught else None
        trainer = tiny_trainer(
            tmp_path,
            model=tiny_model(tiny_config(batch_norm_momentum=0.0)),
            teacher=teacher,
            max_steps=1,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=steps,
            learning_rate=0.0,
            max_grad_norm=0.0,
            seed=0,
        )
        recorded = []
        trainer.model.classifier.bias.register_hook(recorded.append)
        for module in trainer.model.modules():
            if isinstance(module, torch.nn.BatchNorm1d):
                module.train = lambda mode=True, module=module: module  # stays in eval mode
                module.training = False
        trainer.train()
        grads.append(torch.stack(recorded).sum(0))
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-3, atol=1e-5)


def test_a_loss_that_is_not_finite_stops_at_its_step(tmp_path):
    trainer = tiny_trainer(tmp_path, save_strategy="steps", save_steps=1, max_steps=3)
    step = trainer.training_step
    broken = []

    def poison_the_second(*args, **kwargs):
        if trainer.state.global_step == 1 and not broken:
            broken.append(trainer.model.classifier.bias.data.fill_(float("nan")))
        return step(*args, **kwargs)

    trainer.training_step = poison_the_second
    with pytest.raises(NonFiniteLossError, match=r"became nan at step 2.*last good checkpoint is .*checkpoint-1"):
        trainer.train()
    saved = type(trainer.model).from_pretrained(tmp_path / "checkpoint-1")
    assert all(tensor.isfinite().all() for tensor in saved.state_dict().values())


def test_a_gradient_that_is_not_finite_reaches_no_checkpoint(tmp_path):
    trainer = tiny_trainer(tmp_path, save_strategy="steps", save_steps=1, max_steps=3)
    bias = trainer.model.classifier.bias
    bias.register_hook(lambda grad: grad * (float("nan") if trainer.state.global_step == 1 else 1.0))
    with pytest.raises(NonFiniteLossError, match=r"Weights became NaN .* step 2.*last good checkpoint is .*-1\."):
        trainer.train()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, "DistillationTrainingArguments.* there are none"),
        ({"args": TrainingArguments("out", use_cpu=True)}, "DistillationTrainingArguments.* there are TrainingArg"),
        (
            {"args": DistillationTrainingArguments("out", use_cpu=True), "compute_loss_func": lambda *batch: 0},
            "leave out compute_loss_func",
        ),
    ],
)
def test_arguments_that_the_trainer_does_not_take_are_refused(options, message):
    with pytest.raises(TypeError, match=message):
        DistillationTrainer(tiny_model(), **options)


def test_a_teacher_needs_no_labels_and_every_other_loss_does(tmp_path):
    images = [{"pixel_values": image} for image in tiny_images(8)]
    for teacher, arguments in ((tiny_teacher(), {}), (None, {}), (tiny_teacher(), {"label_loss_weight": 0.5})):
        trainer = tiny_trainer(tmp_path, teacher=teacher, **arguments)
        trainer.train_dataset = images
        with nullcontext() if teacher and not arguments else pytest.raises(UserError, match="have no 'labels'"):
            trainer.train()
            assert trainer.state.global_step == 2
    balanced = tiny_trainer(tmp_path, balance_classes=True)
    with pytest.raises(UserError, match="an attribute `labels`"):
        balanced.train()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_evaluation_loss_that_is_not_finite_stops_before_it_is_the_best(tmp_path, value):
    trainer = tiny_trainer(tmp_path, load_best_model_at_end=True, metric_for_best_model="loss", **EVERY_STEP)
    whole = trainer.prediction_step

    def broken(*args, **kwargs):
        loss, *rest = whole(*args, **kwargs)
        return (loss * value if trainer.state.global_step == 2 else loss, *rest)

    trainer.prediction_step = broken
    with pytest.raises(
        NonFiniteLossError, match=r"evaluation loss became \w+ at step 2.*last good checkpoint is .*-1\."
    ):
        trainer.train()
    assert trainer.state.best_global_step == 1
    assert not (tmp_path / "checkpoint-2").exists()


def test_an_evaluation_loss_of_a_trained_model_that_is_not_finite_is_refused(tmp_path):
    trainer = tiny_trainer(tmp_path)
    trainer.model.classifier.bias.data.fill_(float("nan"))
    with pytest.raises(NonFiniteLossError, match="The evaluation loss is nan"):
        trainer.evaluate()


@pytest.mark.parametrize("drop_last, steps", [(False, 3), (True, 2)])
def test_only_training_drops_incomplete_batches(tmp_path, drop_last, steps):
    sizes = {"per_device_train_batch_size": 3, "per_device_eval_batch_size": 3, "dataloader_drop_last": drop_last}
    trainer = tiny_trainer(tmp_path, **sizes)
    evaluated = [trainer.get_eval_dataloader(), trainer.get_test_dataloader(trainer.eval_dataset)]
    assert [sum(len(batch["labels"]) for batch in loader) for loader in evaluated] == [8, 8]
    assert len(trainer.get_train_dataloader()) == steps
    assert trainer.args.dataloader_drop_last == drop_last


@pytest.mark.parametrize("persistent", [False, True])
def test_each_dataset_is_evaluated_on_its_own_images(persistent, tmp_path):
    trainer = tiny_trainer(tmp_path, dataloader_num_workers=1, dataloader_persistent_workers=persistent)
    others = trainer.eval_dataset[:3]
    for _ in range(2):
        assert trainer.get_eval_dataloader(others).dataset is others
        assert trainer.get_eval_dataloader().dataset is trainer.eval_dataset
    assert (trainer.get_eval_dataloader() is trainer.get_eval_dataloader()) == persistent
    trainer.eval_dataset = others
    assert trainer.get_eval_dataloader().dataset is others
    for named in ({"a": others, "b": others[:2]}, {"a": others[:2], "b": others}):
        trainer.eval_dataset = named
        for name, images in named.items():
            assert trainer.get_eval_dataloader(name).dataset is images
            assert (trainer.get_eval_dataloader(name) is trainer.get_eval_dataloader(name)) == persistent


def test_workers_end_after_the_evaluation_of_images_that_are_not_the_trainers(tmp_path):
    trainer = tiny_trainer(tmp_path, dataloader_num_workers=1, dataloader_persistent_workers=True)
    before = len(multiprocessing.active_children())
    others = trainer.eval_dataset[:3]
    list(trainer.get_eval_dataloader(others)), list(trainer.get_test_dataloader(others))
    assert len(multiprocessing.active_children()) == before
    for images in (trainer.eval_dataset, others):  # the second replaces the first
        trainer.eval_dataset = images
        list(trainer.get_eval_dataloader())
        assert len(multiprocessing.active_children()) == before + 1


def test_metric_counts_first_and_first_five():
    logits = torch.tensor([[6.0, 5, 4, 3, 2, 1, 0]] * 4).numpy()
    results = TopKAccuracy().compute(predictions=logits, references=[0, 1, 4, 5])
    assert results == {"accuracy": 0.25, "top5_accuracy": 0.75}


@pytest.mark.parametrize(
    "num_labels, names", [(2, {"accuracy"}), (5, {"accuracy"}), (6, {"accuracy", "top5_accuracy"})]
)
def test_metric_of_few_labels_has_no_top_five(num_labels, names):
    logits = [[1.0, *[0.0] * (num_labels - 1)]]
    assert TopKAccuracy().compute(predictions=logits, references=[0]) == dict.fromkeys(names, 1.0)


@pytest.mark.parametrize("broken", [slice(0, 1), slice(6, 7), slice(0, 7)], ids=["the label's", "another's", "all"])
def test_metric_counts_an_image_with_a_logit_that_is_nan_as_wrong(broken):
    logits = torch.tensor([[6.0, 5, 4, 3, 2, 1, 0]] * 2)
    logits[1, broken] = float("nan")
    assert TopKAccuracy().compute(predictions=logits.numpy(), references=[0, 0]) == {
        "accuracy": 0.5,
        "top5_accuracy": 0.5,
    }


def test_metric_is_zero_for_equal_logits():
    assert TopKAccuracy().compute(predictions=[[1.0, 1.0]], references=[0]) == {"accuracy": 0.0}


def test_soft_labels_without_a_teacher_are_learned_by_their_cross_entropy(tmp_path):
    soft = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.2, 0.8]])
    trainer = tiny_trainer(tmp_path, label_smoothing_factor=0.1)
    trainer.mix = lambda images, labels: (2 * images, soft)
    inputs = {"pixel_values": tiny_images(), "labels": torch.tensor([0, 2])}
    loss, outputs = trainer.compute_loss(trainer.model.train(), inputs, return_outputs=True)
    log_probabilities = outputs.logits.log_softmax(-1)
    expected = -((0.9 * soft + 0.1 / 3) * log_probabilities).sum(-1).mean()
    torch.testing.assert_close(loss, expected)
    assert trainer.model.config.problem_type is None


def test_evaluation_neither_mixes_nor_smooths(tmp_path):
    trainer = tiny_trainer(tmp_path, label_smoothing_factor=0.1)
    trainer.mix = lambda images, labels: pytest.fail("mixed")
    inputs = {"pixel_values": tiny_images(), "labels": torch.tensor([0, 2])}
    model = trainer.model.eval()
    with torch.no_grad():
        loss = trainer.compute_loss(model, dict(inputs))
        torch.testing.assert_close(
            loss, torch.nn.functional.cross_entropy(model(tiny_images()).logits, inputs["labels"])
        )


@pytest.mark.parametrize("model", [tiny_model(), tiny_teacher()], ids=["student", "teacher"])
def test_only_weights_of_linear_layers_and_convolutions_decay(model, tmp_path):
    decayed = set(tiny_trainer(tmp_path, model=model).get_decay_parameter_names(model))
    products = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d, BinaryLayer))
    }
    assert decayed == products


@pytest.mark.parametrize("meant_for, rate", [(None, 0.4), (4, 0.8), (512, 0.4 * 8 / 512)])
def test_learning_rate_is_scaled_to_the_batch(meant_for, rate, tmp_path):
    arguments = {"learning_rate": 0.4, "gradient_accumulation_steps": 4, "learning_rate_batch_size": meant_for}
    trainer = tiny_trainer(tmp_path, **arguments)
    assert trainer.args.effective_batch_size == 8
    assert trainer.create_optimizer().defaults["lr"] == pytest.approx(rate)


def test_one_process_trains_on_one_gpu_and_says_how_to_use_all(tmp_path, monkeypatch, caplog):
    """The Trainer would take as many times the batch of the recipe, and nn.DataParallel."""
    trainer = tiny_trainer(tmp_path, per_device_train_batch_size=4)
    monkeypatch.setattr(trainer.args, "_n_gpu", 4)
    assert trainer.args.train_batch_size == trainer.args.effective_batch_size == 4
    assert trainer._wrap_model(trainer.model) is trainer.model

    gpu = SimpleNamespace(type="cuda")
    monkeypatch.setattr(DistillationTrainingArguments, "device", gpu)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 4)
    with caplog.at_level("INFO"):
        log_batch(trainer.args)
    assert "GPUs: 1 of 4. To train on all, start the command with `torchrun --nproc_per_node 4`" in caplog.text


def test_repeated_augmentation_orders_the_training_images(tmp_path):
    trainer = tiny_trainer(tmp_path, repeated_augmentations=2, seed=3)
    labels = torch.cat([batch["labels"] for batch in trainer.get_train_dataloader()])
    images = torch.cat([batch["pixel_values"] for batch in trainer.get_train_dataloader()])
    assert len(labels) == 8
    assert len({image.sum().item() for image in images}) == 4


@pytest.mark.parametrize("create", [tiny_teacher, tiny_model], ids=["vit", "binaryvit"])
def test_a_resumed_run_begins_with_every_weight_of_its_checkpoint(create, tmp_path):
    tiny_trainer(tmp_path, create(), max_steps=2, save_strategy="steps", save_steps=2).train()
    seen = {}

    class LookAtWeights(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            seen.update({name: tensor.clone() for name, tensor in model.state_dict().items()})
            control.should_training_stop = True

    fresh = create()
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.fill_(9)
    trainer = tiny_trainer(tmp_path, fresh, max_steps=3)
    trainer.add_callback(LookAtWeights())
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    torch.testing.assert_close(
        seen, dict(type(fresh).from_pretrained(tmp_path / "checkpoint-2").state_dict()), rtol=0, atol=0
    )


def test_the_best_model_is_loaded_with_every_weight(tmp_path):
    best_by_loss = {"load_best_model_at_end": True, "metric_for_best_model": "loss"}
    trainer = tiny_trainer(tmp_path, tiny_teacher(), **EVERY_STEP, **best_by_loss)
    trainer.train()
    best = type(trainer.model).from_pretrained(trainer.state.best_model_checkpoint)
    torch.testing.assert_close(dict(trainer.model.state_dict()), dict(best.state_dict()), rtol=0, atol=0)


def test_a_clip_below_zero_is_raised_after_the_step(tmp_path):
    trainer = tiny_trainer(tmp_path, learning_rate=0.05, max_steps=3)
    attention = next(module for module in trainer.model.modules() if isinstance(module, BinaryViTAttention))

    def kill(module, args):
        module.probability_clip.data.fill_(-1.0)

    attention.register_forward_pre_hook(kill)
    trainer.train()
    assert attention.probability_clip.item() == pytest.approx(SMALLEST_CLIP)


@pytest.mark.parametrize("network, searches", [("binaryvit", False), ("vit", False), ("resnet", True)])
def test_several_processes_look_for_unused_parameters_in_networks_of_others(network, searches, tmp_path):
    model = {"binaryvit": tiny_model, "vit": tiny_teacher, "resnet": tiny_resnet}[network]()
    trainer = tiny_trainer(tmp_path, model)
    assert trainer.accelerator.ddp_handler.find_unused_parameters == searches
    assert trainer.args.ddp_find_unused_parameters is None
    given = tiny_trainer(tmp_path, model, ddp_find_unused_parameters=not searches)
    assert given.accelerator.ddp_handler.find_unused_parameters != searches


def tiny_resnet() -> ResNetForImageClassification:
    return ResNetForImageClassification(ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], num_labels=3))


@pytest.mark.parametrize("network", [tiny_model, tiny_teacher])
def test_evaluation_in_half_precision_leaves_the_weights(network, tmp_path):
    trainer = tiny_trainer(tmp_path, network(), use_cpu=True, bf16_full_eval=True)
    trainer.train()
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    metrics = trainer.evaluate()
    assert trainer.predict(trainer.eval_dataset).metrics["test_loss"] == metrics["eval_loss"]
    after = trainer.model.state_dict()
    assert all(
        torch.equal(after[name], tensor) and after[name].dtype == tensor.dtype for name, tensor in before.items()
    )
    whole = tiny_trainer(tmp_path, trainer.model, use_cpu=True).evaluate()
    assert metrics["eval_loss"] != whole["eval_loss"]  # it was in half precision
    assert metrics["eval_loss"] == pytest.approx(whole["eval_loss"], rel=0.1)

"""The optional methods: their formulas, and bit-identical weights after an interruption."""

import json
import logging
import shutil
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from processes import train
from safetensors.torch import load_file
from tiny import tiny_config, tiny_images, tiny_model
from tiny_training import EVERY_STEP, tiny_teacher, tiny_trainer
from transformers import TrainerCallback
from transformers.trainer_utils import HubStrategy

from binaryvit_hf import BinaryViTForImageClassification
from binaryvit_hf.data.sampling import seeded_rng
from binaryvit_hf.network.packing_binaryvit import binary_layers
from binaryvit_hf.training.arguments import DistillationTrainingArguments
from binaryvit_hf.training.checkpoints import describe_damage, last_whole_checkpoint
from binaryvit_hf.training.command_line import parse_runs
from binaryvit_hf.training.losses import distance_from_one
from binaryvit_hf.training.run_folder import UNFINISHED_RUN_ARGUMENTS
from binaryvit_runtime.errors import UserError


EVERYTHING = {
    "ema_decay": 0.5,
    "weight_regularization": 1.0,
    "sign_gradient": "tanh",
    "batch_norm_reestimation_batches": 2,
    "oscillation_freezing_threshold": 0.015,
}


def equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def state_of(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def noisy_trainer(folder: Path, **arguments):
    """A trainer with dropout, so that random numbers matter, and steps large enough to flip signs."""
    model = tiny_model(tiny_config(hidden_dropout_prob=0.3))
    return tiny_trainer(folder, model=model, **{"learning_rate": 0.05, "seed": 3} | arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        {"ema_decay": 1.0},
        {"ema_decay": 0},
        {"weight_regularization": -1.0},
        {"sign_gradient": "step"},
        {"batch_norm_reestimation_batches": -1},
        {"oscillation_freezing_threshold": 1.0},
    ],
)
def test_values_out_of_range_are_refused(arguments, tmp_path):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        DistillationTrainingArguments(str(tmp_path), **arguments)


def test_the_average_over_every_step_is_evaluated_and_saved(tmp_path):
    trainer = tiny_trainer(
        tmp_path, ema_decay=0.75, max_steps=3, learning_rate=0.05, eval_strategy="steps", eval_steps=1
    )
    expected, evaluated, steps = state_of(trainer.model), [], []
    for callback in trainer.checkpointed:
        update = callback.on_step_end

        def note(args, state, control, model=None, update=update, **kwargs):
            update(args, state, control, model=model, **kwargs)
            steps.append(state_of(model))

        callback.on_step_end = note
    loop = trainer.evaluation_loop
    trainer.evaluation_loop = lambda *a, **k: evaluated.append(state_of(trainer.model)) or loop(*a, **k)
    trainer.train()
    for step, seen in zip(steps, evaluated, strict=True):
        for name, tensor in step.items():
            if tensor.is_floating_point():
                expected[name] = 0.75 * expected[name] + 0.25 * tensor
            else:
                expected[name] = tensor
        torch.testing.assert_close(seen, expected)
    assert equal(evaluated[-1], state_of(trainer.model))
    assert not equal(steps[-1], evaluated[-1])
    trainer.save_model()
    latent, packed = (BinaryViTForImageClassification.from_pretrained(tmp_path / name) for name in ("latent", ""))
    assert equal(state_of(latent), evaluated[-1])
    with torch.no_grad():
        torch.testing.assert_close(packed(tiny_images()).logits, latent(tiny_images()).logits)


@pytest.mark.parametrize(
    "option", [*({name: EVERYTHING[name]} for name in ("ema_decay", "oscillation_freezing_threshold")), EVERYTHING]
)
def test_a_resumed_run_ends_with_bit_identical_weights(option, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 1, "max_steps": 8, "eval_strategy": "steps", "eval_steps": 3}
    whole = noisy_trainer(tmp_path / "run", **saving, **option)
    whole.train()
    for step in range(5, 9):
        shutil.move(tmp_path / "run" / f"checkpoint-{step}", tmp_path / f"whole-{step}")
    again = noisy_trainer(tmp_path / "run", **saving, **option)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    assert equal(state_of(again.model), state_of(whole.model))
    for step in range(5, 9):
        files = sorted((tmp_path / f"whole-{step}").glob("*.safetensors"))
        assert len(files) == 1 + len(whole.checkpointed)
        for file in files:
            assert equal(load_file(file), load_file(tmp_path / "run" / f"checkpoint-{step}" / file.name))
    if option == EVERYTHING:
        assert load_file(tmp_path / "whole-8" / "oscillation.safetensors")  # the method has acted:
        assert whole.checkpointed[0].share_frozen() > 0


@pytest.mark.parametrize("option", [{}, EVERYTHING])
def test_the_number_of_evaluations_changes_no_bit_of_the_weights(option, tmp_path):
    ends = []
    for every in (1, 4):
        trainer = noisy_trainer(tmp_path / str(every), max_steps=4, eval_strategy="steps", eval_steps=every, **option)
        trainer.train()
        ends.append(state_of(trainer.model))
    assert equal(*ends)


def test_a_checkpoint_without_an_average_is_not_resumed_from_with_one(tmp_path, caplog):
    saving = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    trainer = tiny_trainer(tmp_path, ema_decay=0.5, **saving)
    trainer.train()
    files = trainer.args.checkpoint_files
    assert files == {"average.safetensors": "ema_decay"}
    assert DistillationTrainingArguments(str(tmp_path)).checkpoint_files == {}
    last = tmp_path / "checkpoint-2"
    assert describe_damage(last, files) is None
    (last / "model.safetensors").rename(tmp_path / "aside")  # the average does not replace the weights
    assert describe_damage(last, files) == "model.safetensors is missing"
    (tmp_path / "aside").rename(last / "model.safetensors")
    average = (last / "average.safetensors").read_bytes()
    (last / "average.safetensors").write_bytes(average[:-8])
    assert describe_damage(last, files).startswith("average.safetensors: ")
    (last / "average.safetensors").unlink()
    assert describe_damage(last, files) == "was saved without --ema_decay"
    with caplog.at_level(logging.WARNING):
        assert last_whole_checkpoint(tmp_path, files) == tmp_path / "checkpoint-1"
    assert "checkpoint-2 was saved without --ema_decay: training cannot resume from it." in caplog.text
    assert "damaged" not in caplog.text
    assert last_whole_checkpoint(tmp_path) == last
    with pytest.raises(UserError, match=r"average.safetensors' is missing or of another run"):
        tiny_trainer(tmp_path, ema_decay=0.5, **saving).train(resume_from_checkpoint=str(last))


def test_the_best_model_is_the_average_of_the_best_checkpoint(tmp_path):
    trainer = tiny_trainer(
        tmp_path,
        ema_decay=0.5,
        learning_rate=1.0,
        warmup_steps=1,  # the first step then moves statistics only, and is the best
        **EVERY_STEP,
        max_steps=3,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
    )
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name == "checkpoint-1"
    assert not equal(load_file(best / "model.safetensors"), load_file(best / "average.safetensors"))
    assert equal(state_of(trainer.model), load_file(best / "average.safetensors"))
    assert trainer.evaluate()["eval_loss"] == trainer.state.best_metric


def test_uploads_during_training_hold_the_average(tmp_path, monkeypatch):
    trainer = tiny_trainer(tmp_path, ema_decay=0.5, learning_rate=0.05, save_strategy="steps", save_steps=1)
    uploads, done = [], Future()
    done.set_result(None)

    class Hub:
        def upload_folder(self, folder_path, **kwargs):
            uploads.append(load_file(Path(folder_path) / "latent" / "model.safetensors"))
            return done

    class Upload(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            trainer._push_from_checkpoint(str(tmp_path / f"checkpoint-{state.global_step}"))

    monkeypatch.setattr("binaryvit_hf.training.trainer.HfApi", Hub)
    trainer.args.hub_strategy, trainer.hub_model_id, trainer.push_in_progress = HubStrategy.EVERY_SAVE, "me/it", None
    trainer.add_callback(Upload())
    trainer.train()
    for step, uploaded in enumerate(uploads, start=1):
        assert equal(uploaded, load_file(tmp_path / f"checkpoint-{step}" / "average.safetensors"))
    assert len(uploads) == 2


def test_a_finished_run_that_continues_uploads_its_weights_at_the_end(tmp_path, monkeypatch):
    trainer, uploads = tiny_trainer(tmp_path, push_to_hub=False), []
    trainer.args.hub_strategy, trainer.hub_model_id, trainer.push_in_progress = HubStrategy.CHECKPOINT, "me/it", None
    monkeypatch.setattr("binaryvit_hf.training.trainer.HfApi", lambda: SimpleNamespace(upload_folder=keep(uploads)))
    (tmp_path / UNFINISHED_RUN_ARGUMENTS).touch()
    trainer._push_from_checkpoint("checkpoint-1")
    assert uploads == ["checkpoint-1"]
    assert not (tmp_path / "model.safetensors").exists()
    (tmp_path / UNFINISHED_RUN_ARGUMENTS).unlink()
    trainer.push_in_progress = None
    trainer._push_from_checkpoint("checkpoint-1")
    assert uploads[1:] == [str(tmp_path), "checkpoint-1"]


def keep(uploads: list[str]):
    """`upload_folder`, which keeps the folders."""

    def upload_folder(folder_path, **kwargs):
        uploads.append(folder_path)
        return Future()

    return upload_folder


def test_averaging_in_half_precision_trains(tmp_path):
    trainer = tiny_trainer(tmp_path, ema_decay=0.5, bf16=True, use_cpu=True, eval_strategy="steps", eval_steps=1)
    trainer.train()
    assert all(tensor.isfinite().all() for tensor in trainer.model.state_dict().values())


@pytest.mark.parametrize(
    "weight, slope", [(-2.0, -1.0), (-1.0, 0.0), (-0.25, 1.0), (0.25, -1.0), (1.0, 0.0), (2.0, 1.0)]
)
def test_regulariser_pulls_towards_one_from_either_side(weight, slope):
    weights = [torch.tensor([weight], requires_grad=True), torch.zeros(3)]
    distance = distance_from_one(weights)
    distance.backward()
    assert distance.item() == (abs(1 - abs(weight)) + 3) / 4
    assert weights[0].grad.item() == slope / 4


def test_regulariser_is_added_to_the_training_loss_alone(tmp_path):
    model, inputs = tiny_model(), {"pixel_values": tiny_images(), "labels": torch.tensor([0, 2])}
    losses = [
        tiny_trainer(tmp_path, model=model.train(), weight_regularization=factor).compute_loss(model, dict(inputs))
        for factor in (0.0, 3.0)
    ]
    weights = [layer.weight for layer in binary_layers(model).values() if layer.weight_bits == 1]
    assert len(weights) == 3 * 6 + 2 + 1
    torch.testing.assert_close(losses[1] - losses[0], 3 * distance_from_one(weights))
    evaluated = [
        tiny_trainer(tmp_path, model=model.eval(), weight_regularization=factor).compute_loss(model, dict(inputs))
        for factor in (0.0, 3.0)
    ]
    assert evaluated[0] == evaluated[1]


@pytest.mark.parametrize("option", ["weight_regularization", "oscillation_freezing_threshold"])
@pytest.mark.parametrize("model", [tiny_model(tiny_config(weight_bits=2)), tiny_teacher()], ids=["ternary", "vit"])
def test_a_network_without_1_bit_weights_is_refused(option, model, tmp_path):
    with pytest.raises(UserError, match=f"--{option} is for networks of 1-bit weights"):
        tiny_trainer(tmp_path, model=model, **{option: 0.5}).train()


@pytest.mark.parametrize(
    "option", ["weight_regularization", "oscillation_freezing_threshold", "batch_norm_reestimation_batches"]
)
def test_a_packed_network_refuses_methods_that_change_what_it_keeps(option, tmp_path):
    model = tiny_model()
    model.pack_weights()
    model.base_model.requires_grad_(False)
    value = 1 if option.endswith("batches") else 0.5
    with pytest.raises(UserError, match=rf"--{option} is for latent weights, .*dequantize\(latent=True\)"):
        tiny_trainer(tmp_path, model=model, **{option: value}).train()


def test_reestimated_statistics_are_the_mean_over_the_first_batches_and_nothing_else_changes(tmp_path):
    """Hooks compute the expected batch statistics from the inputs of the first normalisation."""
    trainer = tiny_trainer(
        tmp_path, model=tiny_model(tiny_config(hidden_dropout_prob=0.5)), batch_norm_reestimation_batches=3
    )
    model = trainer.model
    norm, seen = model.binaryvit.embeddings.norm, []
    norm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].flatten(0, 1)))
    dropped = []
    model.binaryvit.embeddings.dropout.register_forward_hook(
        lambda module, inputs, output: dropped.append(not torch.equal(output, inputs[0]))
    )
    before, random = state_of(model), torch.get_rng_state()
    trainer.apply_final_step()
    assert torch.equal(torch.get_rng_state(), random)
    assert len(seen) == 3
    assert not any(dropped)
    after = state_of(model)
    torch.testing.assert_close(norm.batch_norm.running_mean, torch.stack([rows.mean(0) for rows in seen]).mean(0))
    torch.testing.assert_close(norm.batch_norm.running_var, torch.stack([rows.var(0) for rows in seen]).mean(0))
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed == {name for name in after if name.endswith(("running_mean", "running_var"))}
    assert {module.momentum for module in model.modules() if isinstance(module, torch.nn.BatchNorm1d)} == {0.1}
    assert not any(module.training for module in model.modules())
    trainer.apply_final_step()
    assert equal(state_of(model), after)


def test_reestimation_uses_the_first_training_batches(tmp_path):
    trainer = tiny_trainer(tmp_path, batch_norm_reestimation_batches=100, seed=5)
    with seeded_rng(0):
        begun = [batch["pixel_values"] for batch in trainer.get_train_dataloader()]
    seen = []
    trainer.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["pixel_values"]), with_kwargs=True
    )
    trainer.apply_final_step()
    assert len(seen) == 4  # the dataset has four batches
    assert torch.equal(torch.cat(seen), torch.cat(begun))


def test_reestimation_without_batches_or_batch_norm_is_refused(tmp_path):
    with pytest.raises(UserError, match="no whole batch of 16 in 8 images"):
        tiny_trainer(tmp_path, batch_norm_reestimation_batches=1, per_device_train_batch_size=16).apply_final_step()
    with pytest.raises(UserError, match="for networks with batch normalisation"):
        tiny_trainer(tmp_path, model=tiny_teacher(), batch_norm_reestimation_batches=1).apply_final_step()


def test_two_processes_train_as_one_with_every_method(tmp_path, warm_python):
    options = {"ema_decay": 0.5, "weight_regularization": 1.0, "batch_norm_reestimation_batches": 2}
    options |= {"eval_strategy": "epoch", "oscillation_freezing_threshold": 0.015}
    losses, _, weights = train(warm_python, 1, tmp_path / "one", 8, **options)
    shared_losses, _, shared_weights = train(warm_python, 2, tmp_path / "two", 4, **options)
    assert shared_losses == pytest.approx(losses, rel=1e-3)
    for name, tensor in weights.items():
        torch.testing.assert_close(shared_weights[name].double(), tensor.double(), rtol=1e-6, atol=1e-8, msg=name)


def test_the_methods_are_not_passed_on_to_the_teacher(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"ema_decay": 0.5, "teacher": {"config_name": "vit-digits"}}))
    flags = ["--batch_norm_reestimation_batches=3", "--teacher.ema_decay=0.25", "--sign_gradient=clip"]
    teacher, student = (phase[2] for phase in parse_runs([str(tmp_path / "run.json"), *flags]))
    assert (student.ema_decay, student.batch_norm_reestimation_batches, student.sign_gradient) == (0.5, 3, "clip")
    assert (teacher.ema_decay, teacher.batch_norm_reestimation_batches, teacher.sign_gradient) == (
        0.25,
        0,
        "polynomial",
    )

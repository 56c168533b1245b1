"""Every argument of a wrong type or out of its range is refused in one sentence that names it."""

import json
import math
from dataclasses import fields
from pathlib import Path
from typing import get_args, get_origin, get_type_hints

import pytest
from tiny import tiny_model

from binaryvit_hf.training.arguments import DistillationTrainingArguments
from binaryvit_hf.training.command_line import ARGUMENT_CLASSES, parse_runs
from binaryvit_hf.training.unused_arguments import find_unused
from binaryvit_runtime.errors import UserError
from binaryvit_runtime.resources import shipped_configs


ARGUMENTS = [
    (name, hint)
    for part in ARGUMENT_CLASSES
    for name, hint in get_type_hints(part).items()
    if name in {field.name for field in fields(part)}
]
WRONG = [None, True, 1, 1.5, math.nan, math.inf, -1e9, "x", ["x"], {"a": 1}]
CHECKED_BY_TRANSFORMERS = {"accelerator_config", "deepspeed", "fsdp"}  # its messages name no flag


def parse_file(folder: Path, values: dict, *flags: str):
    (folder / "run.json").write_text(json.dumps({"output_dir": str(folder / "out"), "use_cpu": True} | values))
    return parse_runs([str(folder / "run.json"), *flags])[0]


def has_type(value, hint) -> bool:
    kinds = get_args(hint) if get_args(hint) and get_origin(hint) not in (list, dict) else (hint,)
    kinds = tuple(get_origin(kind) or kind for kind in kinds)
    return any(type(value) is kind or (isinstance(kind, type) and isinstance(value, kind)) for kind in kinds)


@pytest.mark.parametrize("wrong", WRONG, ids=repr)
def test_every_argument_has_its_type_or_is_refused_in_one_sentence(wrong, tmp_path):
    for name, hint in ARGUMENTS:
        try:
            run = parse_file(tmp_path, {name: wrong})
        except UserError as error:
            assert "\n" not in str(error)
            assert name in str(error) or name in CHECKED_BY_TRANSFORMERS, str(error)
            continue
        (part,) = (part for part, kind in zip(run, ARGUMENT_CLASSES) if name in get_type_hints(kind))
        value = getattr(part, name)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            assert math.isfinite(value) and value > -1e8, name
            assert float not in (hint, *get_args(hint)) or isinstance(value, float) or name.endswith("_steps"), name
        # These may be true in a file, too.
        if value == wrong and type(value) is type(wrong) and name not in ("fsdp", "torch_compile", "cuda_graphs"):
            assert has_type(wrong, hint), name


@pytest.mark.parametrize(
    "values, message",
    [
        ({"label_smoothing_factor": 3}, "--label_smoothing_factor must be 0 or more and at most 1, not 3.0"),
        ({"seed": -1}, "--seed must be 0 or more and at most 4294967295, not -1"),
        ({"seed": None}, "--seed must be a whole number, not None"),
        ({"max_steps": 1.5}, "--max_steps must be a whole number, not 1.5"),
        ({"per_device_train_batch_size": 0}, "--per_device_train_batch_size must be 1 or more"),
        ({"dataloader_num_workers": -1}, "--dataloader_num_workers must be 0 or more"),
        ({"train_dir": ["photos"]}, "--train_dir must be text, not ['photos']"),
        ({"do_train": "maybe"}, "Truthy value expected"),
        ({"learning_rate": math.nan}, "--learning_rate must be a finite number, not nan"),
        ({"lr_scheduler_type": "up"}, "--lr_scheduler_type must be one of linear, cosine"),
        ({"lr_scheduler_kwargs": '{"min_lr": '}, "is not JSON"),
        ({"output_dir": ""}, "--output_dir is empty"),
        ({"log_level": "loud"}, "--log_level must be one of"),
        ({"report_to": "tensorboard"}, "--report_to tensorboard: its package is not installed"),
        ({"report_to": "paper"}, "--report_to must be none, all or some of"),
        ({"auto_find_batch_size": True, "learning_rate_batch_size": 8}, "leave one of them out"),
    ],
)
def test_the_message_for_a_wrong_value_names_its_flag(values, message, tmp_path, monkeypatch):
    monkeypatch.setattr("binaryvit_hf.training.arguments.get_available_reporting_integrations", list)
    with pytest.raises(UserError) as error:
        parse_file(tmp_path, values)
    assert message in str(error.value)


def test_a_whole_number_and_a_number_as_text_are_numbers(tmp_path):
    _, data, training = parse_file(tmp_path, {"mixup_alpha": 1, "learning_rate": "1e-3", "max_steps": 2.0})
    assert (data.mixup_alpha, training.learning_rate, training.max_steps) == (1.0, 1e-3, 2)
    assert isinstance(data.mixup_alpha, float) and isinstance(training.max_steps, int)


@pytest.mark.parametrize("flag", ["--no_save_packed", "--no-save-packed", "--save_packed=False"])
def test_flags_can_be_negated(flag, tmp_path):
    assert parse_file(tmp_path, {}, flag)[2].save_packed is False
    with pytest.raises(UserError, match="Unknown argument 'no_save_packed'"):
        parse_file(tmp_path, {"no_save_packed": True})


@pytest.mark.parametrize("values, flags", [({}, ["--resume_from_checkpoint"]), ({"resume_from_checkpoint": True}, [])])
def test_resume_from_checkpoint_without_a_value_is_true(values, flags, tmp_path):
    assert parse_file(tmp_path, values, *flags, "--do_train")[2].resume_from_checkpoint == "true"


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.json", b'{"seed": ' + b"[" * 100_000, "nested too deeply"),
        ("a.yaml", b"seed: " + b"[" * 2_000, "a.yaml' cannot be read"),
        ("a.json", b'{"seed": "\xff"}', "a.json' cannot be read"),
        ("a.json", b'{"seed": 1, "seed": 2}', "'seed' is given twice"),
        ("a.yaml", b"seed: 1\nseed: 2\n", "'seed' is given twice"),
        ("a.json", b"[1]", "must hold an object"),
        ("a.json", b'{"seed": ' + b"9" * 5000 + b"}", "a.json' cannot be read"),
    ],
)
def test_a_damaged_file_of_arguments_is_one_sentence(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        parse_runs([str(tmp_path / name)])
    assert message in str(error.value)
    (tmp_path / "b.json").mkdir()
    with pytest.raises(UserError, match="no file of arguments"):
        parse_runs([str(tmp_path / "b.json")])


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"use_liger_kernel": True}, "--use_liger_kernel True is not supported"),
        ({"eval_do_concat_batches": False}, "--eval_do_concat_batches False is not supported"),
        ({"batch_eval_metrics": True}, "--batch_eval_metrics True is not supported"),
        ({"neftune_noise_alpha": 5.0}, "--neftune_noise_alpha 5.0 is not supported"),
        ({"dataloader_persistent_workers": True}, "needs workers"),
        ({"metric_for_best_model": "f1"}, "--metric_for_best_model must be one of loss"),
        ({"prediction_loss_only": True}, "--prediction_loss_only True is not supported"),
        ({"label_names": ["x"]}, "--label_names .* is not supported"),
        ({"train_sampling_strategy": "sequential"}, "--train_sampling_strategy sequential is not supported"),
        ({"max_steps": 0}, "--max_steps 0 trains nothing"),
    ],
)
def test_unsupported_arguments_are_refused(arguments, message, tmp_path):
    with pytest.raises(UserError, match=message):
        DistillationTrainingArguments(str(tmp_path), use_cpu=True, **arguments).check_supported()


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # names before 5.24
@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            {"use_reentrant": True},
            "--gradient_checkpointing is refused: Use gradient checkpointing with use_reentrant=F",
        ),
        (
            {"debug": True},
            "--gradient_checkpointing is refused: Use gradient checkpointing without context_fn and debug",
        ),
        ({"use_reentrent": False}, "has no 'use_reentrent'; .* did you mean 'use_reentrant'?"),
        ("x", "--gradient_checkpointing_kwargs must be an object, not 'x'"),
    ],
)
def test_arguments_of_checkpointing_are_refused_before_training(arguments, message, tmp_path):
    checkpointing = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": arguments}
    with pytest.raises(UserError, match=message):
        DistillationTrainingArguments(str(tmp_path), use_cpu=True, **checkpointing).check_checkpointing(tiny_model())


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_the_check_of_checkpointing_leaves_the_network_as_it_was(tmp_path):
    model, checkpointing = tiny_model(), {"gradient_checkpointing_kwargs": {"preserve_rng_state": False}}
    for given in ({}, {"gradient_checkpointing": True}, {"gradient_checkpointing": True, **checkpointing}):
        DistillationTrainingArguments(str(tmp_path), use_cpu=True, **given).check_checkpointing(model)
        assert not model.is_gradient_checkpointing


@pytest.mark.parametrize(
    "arguments",
    [
        {"optim": "adamw_bnb_8bit"},
        {"optim_args": "x"},
        {"lr_scheduler_type": "cosine_with_min_lr"},
        {"lr_scheduler_kwargs": {"slope": 1}},
    ],
)
def test_optimiser_and_schedule_are_tried_before_training(arguments, tmp_path):
    with pytest.raises(UserError, match="--optim "):
        DistillationTrainingArguments(str(tmp_path), use_cpu=True, **arguments).check_optimization()
    DistillationTrainingArguments(str(tmp_path), use_cpu=True).check_optimization()


@pytest.mark.parametrize(
    "flags, unused",
    [
        (["--teacher_model_name_or_path=t", "--label_smoothing_factor=0.1"], "label_smoothing_factor"),
        (["--label_loss_weight=0.5"], "label_loss_weight"),
        (["--distillation_temperature=2"], "distillation_temperature"),
        (["--class_names=names.txt", "--train_dir=photos"], "class_names"),
        (["--mixup_prob=0.5"], "mixup_prob"),
        (["--color_jitter=0.4", "--rand_augment=rand-m9-mstd0.5-inc1"], "color_jitter"),
        (["--shuffle_buffer_size=5"], "shuffle_buffer_size"),
        (["--subfolder=latent"], "subfolder"),
        (["--hub_model_id=me/it"], "hub_model_id"),
    ],
)
def test_an_argument_without_effect_is_found(flags, unused, tmp_path):
    run = parse_file(tmp_path, {"do_train": True, "config_name": "x"}, *flags)
    assert [name for name, _ in find_unused(run)] == [unused]
    with_model = parse_file(tmp_path, {"do_eval": True, "model_name_or_path": "x"}, "--crop_pct=1.0")
    assert [name for name, _ in find_unused(with_model)] == ["crop_pct"]


@pytest.mark.parametrize("flags", [["--label_loss_weight=0.5"], ["--mixup_alpha=0.8"]])
def test_label_smoothing_has_an_effect_if_labels_have_a_share_in_the_loss(flags, tmp_path):
    taught = ["--teacher_model_name_or_path=t", "--label_smoothing_factor=0.1"]
    assert find_unused(parse_file(tmp_path, {"do_train": True, "config_name": "x"}, *taught, *flags)) == []


def test_arguments_of_an_upload_have_an_effect_if_the_student_is_uploaded(tmp_path):
    flags = ["--hub_private_repo", "--hub_model_id=me/it"]
    teacher = parse_file(tmp_path, {"do_train": True, "config_name": "x"}, *flags)
    assert [name for name, _ in find_unused(teacher)] == ["hub_model_id", "hub_private_repo"]
    assert find_unused(teacher, uploads=True) == []


def test_the_recipes_have_no_arguments_without_effect():
    for folder in shipped_configs().values():
        if (folder / "train.json").is_file():
            for run in parse_runs([str(folder / "train.json"), "--use_cpu", "--bf16=False"]):
                assert {name for name, _ in find_unused(run)} <= {"color_jitter"}  # DeiT's recipe has it

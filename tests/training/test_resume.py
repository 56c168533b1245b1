"""Runs that resume after the last step, with more steps, from unusable checkpoints, or with other spellings of paths."""

import contextlib
import json
import logging
import math
from pathlib import Path

import pytest
import torch
from accelerate.utils.memory import should_reduce_batch_size
from pictures import write_pictures
from safetensors.torch import load_file
from tiny import tiny_config, tiny_model
from tiny_training import EVERY_STEP, tiny_trainer
from transformers import ResNetConfig, Trainer, TrainerCallback, ViTConfig

from binaryvit_hf.network.functional_binaryvit import batch_statistics
from binaryvit_hf.training import run as script
from binaryvit_hf.training import steps as run_steps
from binaryvit_hf.training.command_line import parse_runs
from binaryvit_hf.training.memory_errors import FullMemoryError, is_full_memory, training_memory_error
from binaryvit_hf.training.model_card import write_model_card
from binaryvit_hf.training.run_folder import (
    RUN_ARGUMENTS,
    TRAINING_IMAGES,
    UNFINISHED_RUN_ARGUMENTS,
    arguments_to_json,
    compare_with_recorded,
    is_finished,
    write_results,
)
from binaryvit_hf.training.trainer import DistillationTrainer
from binaryvit_runtime.errors import UserError
from binaryvit_runtime.writing import lock


@pytest.fixture
def photos(tmp_path):
    """Fourteen images of two classes."""
    return write_pictures(tmp_path / "photos", ("ant", "bee"), 7)


@pytest.fixture
def command(tmp_path, photos):
    tiny_config().save_pretrained(tmp_path / "tiny")
    places = {"config_name": tmp_path / "tiny", "train_dir": photos, "validation_dir": photos}
    return [
        *(f"--{name}={place}" for name, place in (places | {"output_dir": tmp_path / "out"}).items()),
        *("--do_train", "--use_cpu", "--per_device_train_batch_size=4", "--disable_tqdm=true", "--learning_rate=0.01"),
    ]


# A schedule that follows the evaluations.
BY_METRICS = ["--lr_scheduler_type=reduce_lr_on_plateau", "--eval_strategy=steps", "--eval_steps=1"]


def interrupt(*arguments):
    raise KeyboardInterrupt


def recorded_steps(out) -> int:
    return json.loads((out / RUN_ARGUMENTS).read_text())["max_steps"]


def test_a_run_ends_at_its_last_step_and_a_continued_run_keeps_the_old_results_until_it_ends(
    command, tmp_path, monkeypatch
):
    out, finish = tmp_path / "out", run_steps.record_end
    steps = [*command, "--max_steps=10", "--save_steps=10"]  # an epoch has 4
    monkeypatch.setattr(run_steps, "record_end", interrupt)
    assert script.main(steps) == 130
    monkeypatch.setattr(run_steps, "record_end", finish)
    assert not is_finished(out)
    assert script.main(steps) == 0
    assert is_finished(out)
    assert json.loads((out / "trainer_state.json").read_text())["global_step"] == 10
    last, final = load_file(out / "checkpoint-10" / "model.safetensors"), load_file(out / "latent/model.safetensors")
    assert all(torch.equal(final[name], tensor) for name, tensor in last.items())
    results = json.loads((out / "train_results.json").read_text())
    assert "train_loss" not in results  # nothing was trained, and a loss of 0 would mislead
    assert results["train_samples"] == 14

    more = [*command, "--max_steps=12", "--save_steps=10", "--resume_from_checkpoint"]
    monkeypatch.setattr(run_steps, "record_end", interrupt)
    assert script.main(more) == 130
    monkeypatch.setattr(run_steps, "record_end", finish)
    assert not is_finished(out)
    assert recorded_steps(out) == 10
    write_model_card(out, "x", tmp_path / "card.md")
    assert "| max_steps | 10 |" in (tmp_path / "card.md").read_text()
    with pytest.raises(UserError, match="max_steps was 12, not 10"):
        compare_with_recorded(out, *parse_runs(steps))
    assert script.main(more[:-1]) == 0
    assert is_finished(out)
    assert recorded_steps(out) == 12
    assert not (out / UNFINISHED_RUN_ARGUMENTS).exists()
    assert json.loads((out / "trainer_state.json").read_text())["global_step"] == 12


def test_a_checkpoint_of_weights_only_is_not_resumed_from_and_not_called_damaged(
    command, tmp_path, monkeypatch, caplog, capsys
):
    monkeypatch.setattr(run_steps, "record_end", interrupt)
    steps = [*command, "--max_steps=2", "--save_steps=1", "--save_only_model"]
    assert script.main(steps) == 130
    checkpoint = tmp_path / "out" / "checkpoint-2"
    assert script.main([*steps, f"--resume_from_checkpoint={checkpoint}"]) == 2
    assert "holds weights only (--save_only_model)" in capsys.readouterr().err
    with caplog.at_level(logging.WARNING):
        assert script.main([*steps, "--resume_from_checkpoint"]) == 2
    assert "holds no checkpoint to resume from" in capsys.readouterr().err
    assert "checkpoint-2 holds weights only (--save_only_model): training cannot resume" in caplog.text
    assert "damaged" not in caplog.text
    smaller = [*steps, "--per_device_train_batch_size=2"]
    assert script.main(smaller) == 2
    assert "choose another --output_dir, or remove this one." in capsys.readouterr().err
    with monkeypatch.context() as full:
        full.setattr(DistillationTrainer, "batch_loss", fill_memory(MemoryError()))
        assert script.main(steps) == 1
    assert "for as many images per step, and another --output_dir." in capsys.readouterr().err
    (checkpoint / "trainer_state.json").unlink()
    assert script.main([*steps, f"--resume_from_checkpoint={checkpoint}"]) == 2
    assert "trainer_state.json is missing" in capsys.readouterr().err


@pytest.mark.parametrize(
    "before, now",
    [
        (["--output_dir=out/", "--train_dir=photos/"], ["--output_dir=out", "--train_dir=./photos"]),
        (["--per_device_eval_batch_size=8"], ["--per_device_eval_batch_size=64"]),
        (["--dataloader_num_workers=0"], ["--dataloader_num_workers=2", "--logging_steps=3", "--disable_tqdm=true"]),
        ([], ["--do_eval", "--save_total_limit=2", "--hub_model_id=me/it"]),
    ],
)
def test_arguments_that_cannot_change_a_weight_may_differ(before, now, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    common = ["--do_train", "--config_name=x", "--output_dir=out", "--use_cpu"]
    (run,), (again,) = (parse_runs([*common, *flags]) for flags in (before, now))
    (tmp_path / RUN_ARGUMENTS).write_text(
        json.dumps(arguments_to_json(run) | dict(flag[2:].split("=") for flag in before if "dir" in flag))
    )
    compare_with_recorded(tmp_path, again)
    with pytest.raises(UserError, match="per_device_train_batch_size was 8, not 4"):
        compare_with_recorded(tmp_path, *parse_runs([*common, *now, "--per_device_train_batch_size=4"]))
    (tmp_path / RUN_ARGUMENTS).write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        compare_with_recorded(tmp_path, again)


def test_a_run_of_other_processes_is_refused_until_it_is_finished(command, tmp_path, monkeypatch, capsys):
    steps = [*command, "--max_steps=4", "--save_steps=2"]
    monkeypatch.setattr(run_steps, "record_end", interrupt)
    assert script.main(steps) == 130
    recorded = tmp_path / "out" / RUN_ARGUMENTS
    written = json.loads(recorded.read_text())
    assert written["processes"] == 1
    recorded.write_text(json.dumps(written | {"processes": 8}))
    assert script.main(steps) == 2
    assert "holds a run of 8 processes (start 8 to resume it, not 1)" in capsys.readouterr().err
    del written["processes"]  # of an older version
    recorded.write_text(json.dumps(written))
    monkeypatch.undo()
    assert script.main(steps) == 0
    recorded.write_text(json.dumps(written | {"processes": 8}))
    assert script.main([*steps, "--do_eval"]) == 0


def test_a_checkpoint_of_other_batches_tells_where_training_goes_on_or_that_nothing_is_left(
    command, tmp_path, monkeypatch, capsys, caplog
):
    monkeypatch.setattr(run_steps, "record_end", interrupt)
    images = ["--num_train_epochs=3", "--save_steps=1"]  # an epoch has 14 steps of one image
    monkeypatch.setattr(Trainer, "_finalize_training", interrupt)
    assert script.main([*command, *images, "--per_device_train_batch_size=2"]) == 130
    resumed = [*command, *images, "--per_device_train_batch_size=7"]
    checkpoint = f"--resume_from_checkpoint={tmp_path / 'out' / 'checkpoint-7'}"
    assert script.main([*resumed, checkpoint]) == 2
    expected = "Nothing is left to train, as step 7 of the checkpoint was in epoch 1.0, and is in epoch 3.5 of 3 now"
    assert expected in capsys.readouterr().err
    with caplog.at_level(logging.WARNING):
        assert script.main([*resumed, checkpoint.replace("-7", "-4")]) == 130
    assert "Training goes on at another place: step 4 of the checkpoint was in epoch 0.6" in caplog.text


def test_the_best_model_cannot_be_chosen_by_a_metric_that_few_classes_do_not_have(command, capsys):
    best = ["--load_best_model_at_end", "--eval_strategy=epoch", "--save_strategy=epoch"]
    assert script.main([*command, *best, "--metric_for_best_model=top5_accuracy"]) == 2
    assert "top5_accuracy needs more than five classes; there are 2. Give accuracy." in capsys.readouterr().err


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_resuming_with_other_rates_trains_with_them(tmp_path, schedule):
    arguments = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": schedule}
    tiny_trainer(tmp_path, **arguments, learning_rate=0.1, weight_decay=0.5).train()
    other = tiny_trainer(tmp_path, **arguments, learning_rate=0.01, weight_decay=0.0, adam_beta1=0.5)
    rates = []

    class Rates(TrainerCallback):
        def on_step_begin(self, args, state, control, optimizer, **kwargs):
            rates.extend((state.global_step, group["lr"]) for group in optimizer.param_groups[:1])

    other.add_callback(Rates())
    other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    expected = {"constant": [0.01, 0.01], "cosine": [0.005, 0.01 * (1 + math.cos(0.75 * math.pi)) / 2]}[schedule]
    assert rates == [(2, pytest.approx(expected[0])), (3, pytest.approx(expected[1]))]
    for group in other.optimizer.param_groups:
        assert (group["weight_decay"], group["betas"][0]) == (0.0, 0.5)


def test_a_checkpoint_of_another_optimiser_is_not_resumed_from(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 1}
    tiny_trainer(tmp_path, **saving).train()
    for optim in ("sgd", "adagrad", "rmsprop", "adafactor"):
        other = tiny_trainer(tmp_path, **saving, optim=optim, max_steps=4)
        with pytest.raises(UserError, match=f"state of another optimiser than --optim {optim}"):
            other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    tiny_trainer(tmp_path, **saving, optim="adamw_torch", max_steps=3).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("schedule", ["linear", "greedy"])
def test_a_schedule_of_another_kind_is_not_resumed_from(tmp_path, schedule):
    saving = {**EVERY_STEP, "learning_rate": 0.1}
    tiny_trainer(tmp_path, **saving, lr_scheduler_type="reduce_lr_on_plateau").train()
    other = tiny_trainer(tmp_path, **saving, max_steps=4, lr_scheduler_type=schedule)
    with pytest.raises(UserError, match=f"learning rate schedule of another kind than --lr_scheduler_type {schedule}"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


@pytest.mark.parametrize("flags", [["--optim=sgd"], BY_METRICS], ids=["optimiser", "schedule"])
def test_a_finished_run_stays_finished_when_another_one_is_refused(flags, command, tmp_path, capsys):
    steps = [*command, "--max_steps=1", "--save_steps=1"]
    assert script.main(steps) == 0
    assert script.main([*steps, *flags, "--max_steps=2", "--resume_from_checkpoint"]) == 2
    assert "so training cannot resume from it" in capsys.readouterr().err
    assert is_finished(tmp_path / "out")
    assert not list((tmp_path / "out").glob("_unfinished*"))


def test_a_full_memory_of_an_evaluation_reduces_the_batch_of_a_client_but_not_of_training(tmp_path, monkeypatch):
    full = torch.OutOfMemoryError("CUDA out of memory.")
    trainer = tiny_trainer(tmp_path, **EVERY_STEP)
    monkeypatch.setattr(trainer, "evaluation_loop", fill_memory(full))
    with pytest.raises(torch.OutOfMemoryError):
        trainer.evaluate()
    with pytest.raises(FullMemoryError) as error:  # --auto_find_batch_size would begin again without an end
        trainer.train()
    assert not should_reduce_batch_size(error.value)


def test_new_arguments_whose_state_a_checkpoint_lacks_need_a_new_run(command, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run_steps, "record_end", interrupt)
    steps = [*command, "--max_steps=2", "--save_steps=1"]
    assert script.main(steps) == 130
    assert script.main([*steps, "--learning_rate=0.5"]) == 2
    assert "remove this one, or continue it with --resume_from_checkpoint." in capsys.readouterr().err
    assert script.main([*steps, "--lr_scheduler_type=cosine"]) == 2
    assert "or continue it with --resume_from_checkpoint." in capsys.readouterr().err
    for flags in (["--optim=sgd"], BY_METRICS, ["--ema_decay=0.5"]):
        assert script.main([*steps, *flags]) == 2
        message = capsys.readouterr().err
        assert "choose another --output_dir, or remove this one." in message
    assert script.main([*steps, *flags, "--resume_from_checkpoint"]) == 2
    message = "checkpoint-2' was saved without --ema_decay, so training cannot resume from it with that argument"
    assert message in capsys.readouterr().err


def fill_memory(error: BaseException):
    def fail(*args, **kwargs):
        raise error

    return fail


def test_a_batch_that_the_memory_does_not_hold_is_one_sentence(command, tmp_path, monkeypatch, capsys):
    steps = [*command, "--max_steps=3", "--save_steps=1"]
    error = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate")
    holds = "error: The machine's memory does not hold"
    with monkeypatch.context() as full:
        full.setattr(DistillationTrainer, "batch_loss", fill_memory(error))
        assert script.main(steps) == 1
        message = capsys.readouterr().err
        assert (
            f"{holds} a training batch of 4 images: run the same command with a smaller --per_device_train" in message
        )
        assert message.endswith("for as many images per step.\n")
    # Nothing was saved, so the same folder takes another batch.
    smaller = [*steps, "--per_device_train_batch_size=2", "--do_eval", "--eval_strategy=steps", "--eval_steps=2"]
    with monkeypatch.context() as full:
        full.setattr(DistillationTrainer, "evaluation_loop", fill_memory(error))
        assert script.main(smaller) == 1
        assert f"{holds} an evaluation batch of 8 images: run the same command again with a" in capsys.readouterr().err
    smaller.append("--per_device_eval_batch_size=2")
    with monkeypatch.context() as full:
        full.setattr(DistillationTrainer, "make_missed_evaluation", fill_memory(error))
        assert script.main(smaller) == 1
    checkpoint = tmp_path / "out" / "checkpoint-1"
    assert f"and --resume_from_checkpoint, to go on from {checkpoint}." in capsys.readouterr().err
    assert script.main([*smaller, "--per_device_train_batch_size=1", "--resume_from_checkpoint"]) == 0


def test_a_teachers_evaluation_that_the_memory_does_not_hold_is_one_sentence(command, tmp_path, monkeypatch, capsys):
    steps = [*command, "--max_steps=1", "--do_eval"]
    assert script.main(steps) == 0
    evaluate = DistillationTrainer.evaluation_loop

    def fill_memory_with_the_teacher(self, *args, metric_key_prefix="eval", **kwargs):
        if metric_key_prefix == "teacher":
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return evaluate(self, *args, metric_key_prefix=metric_key_prefix, **kwargs)

    monkeypatch.setattr(DistillationTrainer, "evaluation_loop", fill_memory_with_the_teacher)
    taught = [f"--teacher_model_name_or_path={tmp_path / 'out'}", f"--output_dir={tmp_path / 'student'}"]
    assert script.main([*steps, *taught]) == 1
    assert "does not hold an evaluation batch of 8 images" in capsys.readouterr().err


def test_a_full_memory_is_told_from_a_batch_that_can_become_smaller():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    full = torch.OutOfMemoryError("CUDA out of memory.")
    assert should_reduce_batch_size(full)
    assert not should_reduce_batch_size(training_memory_error(full, gpu, 8, ""))
    assert str(training_memory_error(full, gpu, 8, "")).startswith("The GPU's memory does not hold")
    assert str(training_memory_error(MemoryError(), gpu, 8, "")).startswith("The machine's memory does not hold")
    last = RuntimeError("No executable batch size found, reached zero.")  # of --auto_find_batch_size
    assert is_full_memory(last)
    assert str(training_memory_error(last, cpu, 1, "")).endswith("choose a smaller network, or smaller images.")
    assert not is_full_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_the_finished_teacher_of_a_student_that_continues_is_taken_as_it_is(photos, tmp_path, caplog, capsys):
    tiny_config().save_pretrained(tmp_path / "tiny")
    values = {
        "config_name": str(tmp_path / "tiny"),
        "train_dir": str(photos),
        "validation_dir": str(photos),
        "output_dir": str(tmp_path / "out"),
        "do_train": True,
        "use_cpu": True,
        "max_steps": 2,
        "save_steps": 1,
        "per_device_train_batch_size": 4,
        "teacher": {"config_name": str(tmp_path / "tiny"), "max_steps": 1},
    }
    (tmp_path / "run.json").write_text(json.dumps(values))
    other = [str(tmp_path / "run.json"), "--learning_rate=0.01"]
    assert script.main(other[:1]) == 0
    assert script.main(other) == 2
    assert "--resume_from_checkpoint continues the student, with the teacher as it is." in capsys.readouterr().err
    before = (tmp_path / "out-teacher" / RUN_ARGUMENTS).read_bytes()
    with caplog.at_level(logging.INFO):
        assert script.main([*other, "--resume_from_checkpoint", "--max_steps=3"]) == 0
    assert f"{tmp_path / 'out-teacher'} is trained already and taken as it is" in caplog.text
    assert (tmp_path / "out-teacher" / RUN_ARGUMENTS).read_bytes() == before
    assert recorded_steps(tmp_path / "out") == 3


@pytest.mark.parametrize("content", ["", '{"train_loss": '])
def test_files_that_a_killed_run_wrote_in_part_are_no_finished_run(content, command, tmp_path):
    steps = [*command, "--max_steps=2", "--save_steps=1"]
    assert script.main(steps) == 0
    for name in ("train_results.json", "all_results.json", "config.json", "preprocessor_config.json"):
        (tmp_path / "out" / name).write_text(content)
    assert not is_finished(tmp_path / "out")
    assert script.main(steps) == 0
    assert is_finished(tmp_path / "out")


def test_results_are_written_whole_and_added_to_all(tmp_path, monkeypatch):
    write_results(tmp_path, "eval", {"eval_loss": 2.0})
    write_results(tmp_path, "eval", {"eval_accuracy": 0.5})
    assert json.loads((tmp_path / "eval_results.json").read_text()) == {"eval_accuracy": 0.5}
    assert json.loads((tmp_path / "all_results.json").read_text()) == {"eval_accuracy": 0.5, "eval_loss": 2.0}
    (tmp_path / "all_results.json").write_text("{")
    write_results(tmp_path, "eval", {"eval_loss": 1.0})
    assert json.loads((tmp_path / "all_results.json").read_text()) == {"eval_loss": 1.0}


def test_a_trailing_slash_of_the_output_directory_is_not_in_the_teachers_name(tmp_path):
    (tmp_path / "run.json").write_text('{"config_name": "student", "teacher": {"config_name": "teacher"}}')
    teacher, student = parse_runs([str(tmp_path / "run.json"), f"--output_dir={tmp_path / 'out'}/"])
    assert student[0].teacher_model_name_or_path == teacher[2].output_dir == str(tmp_path / "out-teacher")


def test_photos_that_are_added_to_a_divided_folder_need_a_new_run(command, tmp_path, monkeypatch, capsys, caplog):
    command = [*command, "--max_steps=2", "--save_steps=1", "--report_to=none"]
    command = [flag for flag in command if not flag.startswith("--validation_dir")]
    out, photos = tmp_path / "out", tmp_path / "photos"
    assert script.main(command) == 0
    before = (out / TRAINING_IMAGES).read_bytes()
    (photos / "ant" / "0.png").rename(photos / "ant" / "new.png")
    assert script.main(command) == 2
    message = capsys.readouterr().err
    assert (
        "holds a run on other training images (11 before, 11 now): choose another --output_dir, or remove" in message
    )
    assert "--resume_from_checkpoint" not in message

    more, finish = [*command, "--max_steps=3", "--resume_from_checkpoint"], run_steps.record_end
    monkeypatch.setattr(run_steps, "record_end", interrupt)
    caplog.clear()
    assert script.main(more) == 130
    warning = f"--resume_from_checkpoint '{out / 'checkpoint-2'}' was trained on other images"
    assert warning in caplog.text
    assert (out / TRAINING_IMAGES).read_bytes() == before  # as the weights
    caplog.clear()
    assert script.main(["--do_eval", "--model_name_or_path", str(out), *command[1:2], f"--output_dir={tmp_path}"]) == 0
    assert "was trained on other images" in caplog.text

    def stop_before_the_arguments(self, target):
        if self.name == UNFINISHED_RUN_ARGUMENTS:
            raise KeyboardInterrupt
        return replace(self, target)

    replace = Path.replace
    monkeypatch.setattr(run_steps, "record_end", finish)
    for stop in (stop_before_the_arguments, replace):
        monkeypatch.setattr(Path, "replace", stop)
        assert script.main(more[:-1]) == (0 if stop is replace else 130)
        assert (out / TRAINING_IMAGES).read_bytes() != before
    assert not list(out.glob("_unfinished*"))


ONE_TOKEN = tiny_config(image_size=(8, 8))
VIT = ViTConfig(image_size=[16, 32], patch_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)


@pytest.mark.parametrize(
    "config, flags, message",
    [
        (tiny_config(), ["--per_device_train_batch_size=15", "--dataloader_drop_last"], "leaves nothing to train on"),
        (tiny_config(), ["--per_device_train_batch_size=15", "--batch_norm_reestimation_batches=1"], "no whole batch"),
        (VIT, ["--batch_norm_reestimation_batches=1"], "for networks with batch normalisation"),
        (ONE_TOKEN, ["--per_device_train_batch_size=13"], "A batch of one image"),
        (ONE_TOKEN, ["--per_device_train_batch_size=1"], "A batch of one image"),
        (ResNetConfig(), [], "without an image_size"),
    ],
    ids=["nothing", "no-batch", "no-norm", "last-of-one", "ones", "resnet"],
)
def test_unusable_batches_are_refused_before_training(config, flags, message, command, tmp_path, capsys):
    config.save_pretrained(tmp_path / "tiny")
    assert script.main([*command, "--max_steps=5", *flags]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "config, flags",
    [
        (ONE_TOKEN, ["--per_device_train_batch_size=13", "--dataloader_drop_last"]),
        (ONE_TOKEN, ["--per_device_train_batch_size=13", "--max_steps=1"]),
        (tiny_config(), ["--per_device_train_batch_size=13"]),
    ],
)
def test_a_last_batch_of_one_image_is_used_if_the_network_can_train_on_it(config, flags, command, tmp_path):
    config.save_pretrained(tmp_path / "tiny")
    assert script.main([*command, "--max_steps=2", "--save_strategy=no", *flags]) == 0


def test_statistics_of_one_row_are_refused_as_in_pytorch():
    norm = tiny_model().binaryvit.embeddings.norm.batch_norm
    rows = torch.randn(1, norm.num_features)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        batch_statistics([rows], norm)


def test_a_run_resumed_after_its_end_keeps_its_training_time(command, tmp_path):
    command = [*command, "--max_steps=2", "--save_strategy=steps", "--save_steps=1", "--report_to=none"]
    assert script.main(command) == 0
    before = json.loads((tmp_path / "out" / "train_results.json").read_text())
    assert script.main([*command, "--resume_from_checkpoint"]) == 0
    assert json.loads((tmp_path / "out" / "train_results.json").read_text()) == before


def test_a_folder_in_which_another_run_trains_is_refused_until_that_run_ends(command, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script, "WAIT_FOR_KILLED_RUN", 0.3)
    command, out = [*command, "--max_steps=1", "--report_to=none"], tmp_path / "out"
    out.mkdir()
    with lock(out):
        assert script.main(command) == 2
        assert list(out.iterdir()) == []
        assert script.main([*command, f"--output_dir={tmp_path / 'other'}"]) == 0
    assert f"error: Another run is training in {str(out)!r}: wait for its end" in capsys.readouterr().err
    assert script.main(command) == 0


def test_the_later_of_two_runs_that_start_together_ends_before_it_trains(command, tmp_path, monkeypatch, capsys):
    out, prepare = tmp_path / "out", script.prepare

    def prepare_slowly(*arguments, **keywords):
        inputs = prepare(*arguments, **keywords)
        out.mkdir()
        locks.enter_context(lock(out))  # of the other run
        return inputs

    monkeypatch.setattr(script, "prepare", prepare_slowly)
    with contextlib.ExitStack() as locks:
        assert script.main([*command, "--max_steps=1", "--report_to=none"]) == 2
    assert "Another run is training" in capsys.readouterr().err
    assert list(out.iterdir()) == []

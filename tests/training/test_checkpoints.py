"""Every checkpoint is whole, training skips damaged ones, and SIGTERM saves one."""

import json
import logging
import shutil

import pytest
from tiny_training import EVERY_STEP, tiny_trainer
from transformers import TrainerControl, TrainerState, TrainingArguments

from binaryvit_hf.training.callbacks.termination import SaveOnTermination
from binaryvit_hf.training.checkpoints import describe_damage, last_whole_checkpoint


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    trainer = tiny_trainer(folder, save_strategy="steps", save_steps=1, max_steps=3, save_total_limit=2)
    trainer.train()
    return folder


def test_checkpoints_are_whole_and_old_ones_and_the_staging_folder_are_removed(run):
    assert sorted(path.name for path in run.iterdir()) == ["checkpoint-2", "checkpoint-3"]
    for path in run.iterdir():
        assert describe_damage(path) is None
    assert last_whole_checkpoint(run) == run / "checkpoint-3"
    assert json.loads((run / "checkpoint-3" / "trainer_state.json").read_text())["global_step"] == 3


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "config.json"]
)
def test_a_truncated_checkpoint_is_skipped_for_an_earlier_one(run, tmp_path, name, caplog):
    copy = shutil.copytree(run, tmp_path / "copy")
    file = copy / "checkpoint-3" / name
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with caplog.at_level(logging.WARNING):
        assert last_whole_checkpoint(copy) == copy / "checkpoint-2"
    assert f"checkpoint-3 is damaged ({name}" in caplog.text
    file.unlink()
    if name != "rng_state.pth":  # each process writes one, and a checkpoint does not record how many
        assert describe_damage(copy / "checkpoint-3") == f"{name} is missing"


def test_no_checkpoint_is_none(tmp_path):
    assert last_whole_checkpoint(tmp_path) is None
    assert last_whole_checkpoint(tmp_path / "nowhere") is None


def test_the_best_checkpoint_is_recorded_by_its_final_name(tmp_path):
    trainer = tiny_trainer(
        tmp_path,
        **EVERY_STEP,
        max_steps=3,
        load_best_model_at_end=True,
    )
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best in {str(tmp_path / f"checkpoint-{step}") for step in (1, 2, 3)}
    saved = json.loads((tmp_path / "checkpoint-3" / "trainer_state.json").read_text())
    assert saved["best_model_checkpoint"] == best


@pytest.mark.parametrize(
    "field, value",
    [("global_step", 2), ("epoch", float("nan")), ("best_model_checkpoint", 0.5), ("log_history", None)],
)
def test_a_checkpoint_with_a_wrong_state_is_skipped_for_an_earlier_one(run, tmp_path, field, value):
    copy = shutil.copytree(run, tmp_path / "copy")
    file = copy / "checkpoint-3" / "trainer_state.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), field: value}))
    assert last_whole_checkpoint(copy) == copy / "checkpoint-2"
    assert field in describe_damage(copy / "checkpoint-3")


def test_on_sigterm_a_run_saves_and_does_not_evaluate_first():
    callback, control = SaveOnTermination(), TrainerControl(should_evaluate=True)
    args, state = TrainingArguments(use_cpu=True), TrainerState()
    callback.on_step_end(args, state, control)
    assert (control.should_evaluate, control.should_save, control.should_training_stop) == (True, False, False)
    callback.request(15, None)
    callback.on_step_end(args, state, control)
    assert (control.should_evaluate, control.should_save, control.should_training_stop) == (False, True, True)
    control.should_save, control.should_evaluate = False, True  # the epoch ends with the training
    callback.on_epoch_end(args, state, control)
    assert (control.should_evaluate, control.should_save) == (False, False)

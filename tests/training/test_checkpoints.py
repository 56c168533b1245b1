"""Every checkpoint is whole, training skips damaged ones, and SIGTERM saves one."""

import json
import logging
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny_training import EVERY_STEP, tiny_trainer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import HPSearchBackend

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


def test_a_folder_called_checkpoints_gets_the_final_model_without_the_arguments_and_their_token(tmp_path):
    folder = tmp_path / "checkpoints"
    trainer = tiny_trainer(folder)
    (folder / "training_args.bin").touch()  # of transformers' Trainer
    trainer.save_model()
    assert {path.name for path in folder.iterdir()} >= {"model.safetensors", "latent"}
    assert not list(folder.rglob("training_args.bin"))


def test_no_file_of_a_run_holds_the_token(tmp_path):
    trainer = tiny_trainer(tmp_path, **EVERY_STEP, hub_token="hf_secret")
    trainer.train()
    trainer.save_model()
    assert (tmp_path / "checkpoint-2" / "training_args.bin").is_file()
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and b"hf_secret" in path.read_bytes()]
    assert trainer.args.hub_token == "hf_secret"


@pytest.mark.parametrize("spelling", ["{}", "{}/../after"])  # of the folder that a run resumes from
def test_the_best_checkpoint_of_a_moved_run_is_found(tmp_path, spelling):
    saving = {**EVERY_STEP, "load_best_model_at_end": True, "save_total_limit": 1}
    interrupted = tiny_trainer(tmp_path / "before", **saving, metric_for_best_model="loss", max_steps=3)
    interrupted.add_callback(Losses({1: 1.0, 2: 5.0}))
    with pytest.raises(KeyboardInterrupt):
        interrupted.train()
    (tmp_path / "before").rename(tmp_path / "after")
    moved = tiny_trainer(tmp_path / "after", **saving, metric_for_best_model="loss", max_steps=3)
    moved.add_callback(Losses({3: 5.0}))
    moved.train(resume_from_checkpoint=str(Path(spelling.format(tmp_path / "after"), "checkpoint-2")))
    assert moved.state.best_model_checkpoint == str(tmp_path / "after" / "checkpoint-1")
    assert [path.name for path in (tmp_path / "after").iterdir()] == ["checkpoint-1"]


class Losses(TrainerCallback):
    """Replaces the losses of evaluations, by the step, and interrupts the first one that has none."""

    def __init__(self, losses: dict[int, float]):
        self.losses = losses

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        if state.global_step not in self.losses:
            raise KeyboardInterrupt
        metrics["eval_loss"] = self.losses[state.global_step]


def test_checkpoints_of_a_hyperparameter_search_are_in_the_folder_of_their_trial(tmp_path, monkeypatch):
    trainer = tiny_trainer(tmp_path, save_strategy="steps", save_steps=1)
    trainer.hp_search_backend, trainer.hp_name = HPSearchBackend.OPTUNA, None
    trainer.hp_space = lambda trial: {}
    monkeypatch.setattr("transformers.integrations.hp_params", lambda trial: trial.params)  # knows those of optuna
    trainer.train(trial=SimpleNamespace(number=7, params={}))
    assert sorted(path.name for path in (tmp_path / "run-7").iterdir()) == ["checkpoint-1", "checkpoint-2"]


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

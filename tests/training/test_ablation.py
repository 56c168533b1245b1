"""A complete ablation: its runs, its interruption, its table and its errors."""

import json
import signal
import time
from pathlib import Path

import pytest
from command_line import assert_refused
from tiny import tiny_config
from transformers import ViTConfig

from binaryvit_cli import main
from binaryvit_hf.training.ablation import Ablation, mean_and_deviation
from binaryvit_hf.training.run_folder import RUN_ARGUMENTS


ROOT = Path(__file__).parents[2]
RECIPE = {
    "dataset_name": "sklearn-digits",
    "train_val_split": 0.5,
    "test_split_name": "validation",
    "max_train_samples": 64,
    "max_eval_samples": 40,
    "do_train": True,
    "do_eval": True,
    "do_predict": True,
    "num_train_epochs": 1,
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 200,
    "report_to": "none",
    "disable_tqdm": True,
}


@pytest.fixture
def folder(tmp_path):
    """Recipes of one binary row and its teacher."""
    folder = tmp_path / "recipes"
    folder.mkdir()
    table = {
        "title": "Digits",
        "description": "Two rows.",
        "teacher": "vit",
        "rows": {"vit": "the teacher", "binary": "1 bit"},
    }
    for name, content in (("table", table), ("teacher", RECIPE), ("student", RECIPE)):
        (folder / f"{name}.json").write_text(json.dumps(content))
    vit = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=16)
    vit.save_pretrained(folder / "vit")
    tiny_config(image_size=16).save_pretrained(folder / "binary")
    return folder


def test_ablation_trains_every_row_once_and_tabulates_what_the_runs_recorded(folder, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["ablation", str(folder), str(out), "--seeds", "1", "2", "--jobs", "2"]
    assert main(command) == 0, capsys.readouterr().err
    accuracies = {
        name: 100 * json.loads((out / name / "all_results.json").read_text())["test_accuracy"]
        for name in ("vit", "binary-seed1", "binary-seed2")
    }
    lines = (out / "results.md").read_text().splitlines()
    cells = {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")]
        for line in lines
        if "%" not in line and line.count("|") > 8
    }
    assert cells["the teacher"][2] == f"{accuracies['vit']:.2f}"
    assert cells["1 bit"][2] == mean_and_deviation([accuracies["binary-seed1"], accuracies["binary-seed2"]])
    assert cells["1 bit"][3] == "2"
    assert (out / "ablation.png").stat().st_size > 10_000

    before = {path: path.stat().st_mtime_ns for path in out.glob("*/model.safetensors")}
    (out / "results.md").unlink()
    assert main(command) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before  # nothing was trained again
    assert (out / "results.md").is_file()

    student = json.loads((folder / "student.json").read_text()) | {"learning_rate": 0.1}
    (folder / "student.json").write_text(json.dumps(student))
    capsys.readouterr()
    assert_refused(capsys, command, "learning_rate", "binary-seed1")


def test_an_interrupted_ablation_ends_its_runs_with_a_checkpoint(folder, tmp_path, warm_python):
    (folder / "teacher.json").write_text(json.dumps(RECIPE | {"num_train_epochs": 10**6, "save_strategy": "no"}))
    out = tmp_path / "out"
    ablation = warm_python.start("-m", "binaryvit_cli", "ablation", folder, out, folder=tmp_path)
    while not ablation.has_ended() and not (out / "vit" / RUN_ARGUMENTS).is_file():  # written when training begins
        time.sleep(0.1)
    time.sleep(2)
    ablation.send_signal(signal.SIGINT)
    ended = ablation.wait(timeout=60)
    assert ended.returncode == 128 + signal.SIGINT, ended.stderr
    assert "Traceback" not in ended.stderr
    assert len(list((out / "vit").glob("checkpoint-*"))) == 1


def test_failing_run_is_named_with_its_log(folder, tmp_path, capsys):
    (folder / "teacher.json").write_text(json.dumps(RECIPE | {"image_column_name": "picture"}))
    out = tmp_path / "out"
    assert_refused(capsys, ["ablation", folder, out], "vit failed", "vit.log", code=1)
    assert "no column 'picture'" in (out / "vit.log").read_text()


def test_a_folder_without_a_table_and_zero_jobs_are_refused(folder, tmp_path, capsys):
    assert_refused(capsys, ["ablation", tmp_path, tmp_path / "out"], "table.json")
    assert_refused(capsys, ["ablation", folder, tmp_path / "out", "--jobs", "0"], "--jobs")


def test_the_teacher_comes_first_and_the_students_seed_by_seed(folder, tmp_path):
    assert [run.name for run in Ablation(folder, tmp_path, (3, 4)).runs()] == ["vit", "binary-seed3", "binary-seed4"]


def test_the_command_restores_the_handlers_of_signals(tmp_path, capsys):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    assert_refused(capsys, ["ablation", tmp_path, tmp_path / "out"], "table.json")
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before

"""`python -m binaryvit_hf.training`, run in this process."""

import os
import re
import runpy
import sys
from dataclasses import fields

import pytest
from tiny import tiny_config
from transformers import TrainingArguments

from binaryvit_hf.training.arguments import UNSUPPORTED
from binaryvit_hf.training.help import ARGUMENT_CLASSES
from binaryvit_hf.training.run import show_results


def run_as_module(monkeypatch, *arguments) -> int:
    """The exit code of `python -m binaryvit_hf.training ARGUMENTS`."""
    monkeypatch.setattr(sys, "argv", ["__main__.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        runpy.run_module("binaryvit_hf.training", run_name="__main__")
    return end.value.code


def test_python_m_trains_outside_of_the_clone(photos, tmp_path, monkeypatch):
    tiny_config(num_labels=2).save_pretrained(tmp_path / "tiny")
    (photos / "ant" / "1.png").write_bytes((photos / "ant" / "0.png").read_bytes())
    monkeypatch.chdir(tmp_path)
    arguments = [
        "--config_name=tiny",
        "--train_dir=photos",
        "--validation_dir=photos",
        "--output_dir=out",
        "--do_train",
    ]
    assert run_as_module(monkeypatch, *arguments, "--max_steps=1", "--use_cpu", "--report_to=none") == 0
    assert {"config.json", "latent", "README.md", "run_arguments.json"} <= {
        path.name for path in (tmp_path / "out").iterdir()
    }


def help_of(monkeypatch, capsys, *words) -> str:
    assert run_as_module(monkeypatch, "--help", *words) == 0
    return capsys.readouterr().out


def test_help_names_the_command_and_every_supported_argument_once_ours_first(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "100")
    shown = help_of(monkeypatch, capsys)
    assert shown.startswith("usage: python -m binaryvit_hf.training [FILE] [--NAME VALUE ...]")
    assert "python -m binaryvit_hf.training configs/quickstart.json" in shown
    ours, of_the_trainer = shown.split("Other arguments of transformers' Trainer")
    explained = re.findall(r"^  --(\w+)(?= \w+$|$)", ours, re.MULTILINE)
    listed = re.findall(r"--(\w+)(?=,| \(|$)", of_the_trainer, re.MULTILINE)
    known = {field.name for part in ARGUMENT_CLASSES for field in fields(part)}
    assert known >= UNSUPPORTED.keys()
    assert sorted([*explained, *listed]) == sorted(known - UNSUPPORTED.keys())
    assert {field.name for field in fields(TrainingArguments)} >= set(listed)


def test_help_tells_values_choices_and_defaults(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "100")
    shown = help_of(monkeypatch, capsys)
    assert "  --crop_pct X\n        For evaluation, resize the shorter side" in shown
    assert "Default: 0.875." in shown
    assert "  --train_dir FOLDER\n        Training images, one sub-folder per class. Default: none.\n" in shown
    assert (
        "  --eval_strategy VALUE\n        When to evaluate during training. One of no, steps, epoch. Default: no."
        in shown
    )
    assert "  --streaming\n" in shown
    assert "default: default:" not in shown.lower()


def test_help_with_a_word_explains_the_arguments_with_it(monkeypatch, capsys):
    shown = help_of(monkeypatch, capsys, "optim")
    assert re.findall(r"^  --(\w+)", shown, re.MULTILINE) == ["optim", "optim_args", "optim_target_modules"]
    assert "schedule_free_adamw" in shown
    assert "--ema_decay" in help_of(monkeypatch, capsys, "moving average")
    assert help_of(monkeypatch, capsys, "all").count("\n  --") > 120
    assert run_as_module(monkeypatch, "--help", "leraning_rate") == 2
    assert "did you mean 'learning_rate'?" in capsys.readouterr().err
    assert run_as_module(monkeypatch, "--help", "label_names") == 2
    assert "--label_names is not supported: batches have their labels in 'labels'." in capsys.readouterr().err
    assert run_as_module(monkeypatch, "--label_name", "x") == 2
    assert "label_names" not in capsys.readouterr().err


def test_a_reader_that_has_gone_is_no_error(monkeypatch):
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        show_results("Accuracy: 98 %")  # Closing the file flushes it again, as Python does at exit.

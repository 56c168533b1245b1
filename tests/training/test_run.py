"""`python -m binaryvit_hf.training`, run in this process."""

import runpy
import sys

import pytest
from tiny import tiny_config


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


def test_help_names_the_command_and_every_group_of_arguments(monkeypatch, capsys):
    assert run_as_module(monkeypatch, "--help") == 0
    shown = capsys.readouterr().out
    assert shown.startswith("usage: python -m binaryvit_hf.training [-h]")
    assert {"--config_name", "--train_dir", "--label_loss_weight", "--ema_decay"} <= set(shown.split())

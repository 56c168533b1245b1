"""The training script in processes of its own, on folders of generated images."""

import functools
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load, load_file
from tiny import tiny_config, tiny_images, tiny_model
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification

from binaryvit_cli import main


ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "run_image_classification.py"
TRAIN = [
    "--do_train",
    "--do_eval",
    "--per_device_train_batch_size=4",
    "--max_steps=2",
    "--report_to=none",
    "--use_cpu",
    "--crop_pct=1.0",
]


@pytest.fixture
def run_script(warm_python, tmp_path):
    return functools.partial(warm_python.run, SCRIPT, folder=tmp_path)


def assert_refused(result: subprocess.CompletedProcess, *words: str) -> None:
    """The script ended with exit code 2, one sentence that contains `words`, and no stack trace."""
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    message = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(message) == 1, result.stderr
    for word in words:
        assert word in message[0]


@pytest.fixture
def photos(tmp_path) -> Path:
    """Three classes of eight images, of several sizes and modes."""
    rng = np.random.default_rng(0)
    for index, name in enumerate(("ant", "bee", "cat")):
        folder = tmp_path / "photos" / name
        folder.mkdir(parents=True)
        for number in range(8):
            pixels = rng.integers(0, 80, (20 + number, 40, 3)).astype("uint8")
            pixels[..., index] += 150
            image = Image.fromarray(pixels)
            image = {0: image.convert("RGBA"), 1: image.convert("P")}.get(number, image)
            image.save(folder / f"{number}.png")
    return tmp_path / "photos"


@pytest.fixture
def config(tmp_path) -> Path:
    tiny_config().save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.fixture
def teacher(tmp_path) -> Path:
    fields = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = ViTConfig(image_size=[16, 32], patch_size=8, id2label={0: "ant", 1: "bee", 2: "cat"}, **fields)
    ViTForImageClassification(config).save_pretrained(tmp_path / "teacher")
    return tmp_path / "teacher"


def test_distillation_on_folders_writes_all_files_and_evaluates_again(photos, config, teacher, tmp_path, run_script):
    output = tmp_path / "out"
    common = ["--train_dir", photos, "--output_dir", output]
    result = run_script("--config_name", config, "--teacher_model_name_or_path", teacher, *common, *TRAIN)
    assert result.returncode == 0, result.stderr
    assert "held-out images (95 % confidence interval:" in result.stdout
    classify, load, publish = (shlex.split(line) for line in result.stdout.splitlines()[-3:])
    assert main(classify[1:]) == 0
    exec(load[-1], {})
    assert publish == ["binaryvit", "push", str(output), "out"]
    assert str(output / "README.md") in result.stdout

    results = json.loads((output / "all_results.json").read_text())
    assert {"eval_accuracy", "teacher_accuracy", "train_loss"} <= results.keys()
    card = (output / "README.md").read_text()
    assert f"{100 * results['eval_accuracy']:.2f} %" in card
    assert f"{100 * results['teacher_accuracy']:.2f} %" in card
    assert Image.open(output / "learning_curves.png").width > 500
    assert (output / "preprocessor_config.json").is_file()
    recorded = json.loads((output / "run_arguments.json").read_text())
    assert recorded["teacher_model_name_or_path"] == str(teacher)
    assert recorded["learning_rate"] == 5e-5

    packed = AutoModelForImageClassification.from_pretrained(output)
    latent = AutoModelForImageClassification.from_pretrained(output / "latent")
    assert packed.is_packed
    assert not latent.is_packed
    with torch.no_grad():
        torch.testing.assert_close(packed(tiny_images()).logits, latent(tiny_images()).logits)
    assert {path.parent.name for path in output.rglob("training_args.bin")} == {"checkpoint-2"}
    assert main(["pack", str(output / "latent"), str(tmp_path / "packed")]) == 0
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (output, tmp_path / "packed"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    for size in ("packed, one bit per weight", "latent, float32", "its teacher"):
        assert f"| {size}, on disk |" in card
    assert "| learning_rate | 5e-05 |" in card

    weights = (output / "model.safetensors").read_bytes()
    again = run_script("--config_name", config, "--teacher_model_name_or_path", teacher, *common, *TRAIN)
    assert again.returncode == 0, again.stderr
    assert "is trained already" in again.stderr
    assert json.loads((output / "all_results.json").read_text())["epoch"] == results["epoch"] > 0
    assert (output / "model.safetensors").read_bytes() == weights
    evaluated = run_script(
        "--model_name_or_path",
        output,
        "--train_dir",
        photos,
        "--do_eval",
        "--use_cpu",
        "--report_to=none",
        "--output_dir",
        tmp_path / "evaluated",
    )
    assert evaluated.returncode == 0, evaluated.stderr
    ours = json.loads((tmp_path / "evaluated" / "all_results.json").read_text())
    assert ours["eval_accuracy"] == results["eval_accuracy"]

    lower = run_script(
        "--config_name", config, "--teacher_model_name_or_path", teacher, *common, *TRAIN, "--learning_rate=1e-3"
    )
    assert_refused(
        lower, "run of other arguments", "learning_rate was 5e-05, not 0.001", "choose another --output_dir"
    )


def test_all_augmentations_train_together_and_the_batch_is_logged(photos, config, teacher, tmp_path, run_script):
    result = run_script(
        *["--config_name", config, "--teacher_model_name_or_path", teacher, "--train_dir", photos],
        *["--output_dir", tmp_path / "out", *TRAIN, "--gradient_accumulation_steps=2"],
        *["--learning_rate=0.1", "--learning_rate_batch_size=512", "--label_smoothing_factor=0.1"],
        *["--rand_augment=rand-m9-mstd0.5-inc1", "--random_erasing_prob=0.25", "--color_jitter=0.4"],
        *["--mixup_alpha=0.8", "--cutmix_alpha=1.0", "--repeated_augmentations=3", "--weight_decay=0.05"],
    )
    assert result.returncode == 0, result.stderr
    assert "Batch: 8 images (1 process of 4, 2 accumulated); learning rate: 0.0015625" in result.stderr
    assert "The recipe is for a batch of 512 images, so the learning rate was scaled from 0.1" in result.stderr
    assert "| cutmix_alpha | 1.0 |" in (tmp_path / "out" / "README.md").read_text()


def test_quickstart_in_short_then_the_pipeline_in_a_fresh_process(tmp_path, run_script, warm_python):
    short = ["--max_train_samples=96", "--num_train_epochs=2", "--teacher.num_train_epochs=1", "--use_cpu"]
    result = run_script(ROOT / "configs" / "quickstart.json", "--output_dir", tmp_path / "out", *short)
    assert result.returncode == 0, result.stderr
    student, teacher = tmp_path / "out", tmp_path / "out-teacher"
    assert json.loads((student / "config.json").read_text())["model_type"] == "binaryvit"
    assert json.loads((teacher / "config.json").read_text())["model_type"] == "vit"
    results = json.loads((student / "all_results.json").read_text())
    assert results["train_samples"] == 96
    assert results["eval_samples"] == 360
    taught = json.loads((teacher / "all_results.json").read_text())
    assert results["teacher_accuracy"] == taught["eval_accuracy"]

    Image.fromarray(np.eye(8, dtype="uint8") * 255).save(tmp_path / "digit.png")
    code = (
        "import sys, json, binaryvit_hf; from transformers import pipeline;"
        "print(json.dumps(pipeline('image-classification', sys.argv[1])(sys.argv[2])))"
    )
    classified = warm_python.run("-c", code, student, tmp_path / "digit.png", folder=tmp_path)
    assert classified.returncode == 0, classified.stderr
    answers = json.loads(classified.stdout)
    assert {answer["label"] for answer in answers} <= {str(digit) for digit in range(10)}


def test_local_dataset_by_name_with_its_own_column_names(photos, config, tmp_path, run_script):
    from datasets import Dataset
    from datasets import Image as ImageFeature

    paths = sorted(photos.rglob("*.png"))
    rows = {"img": [str(path) for path in paths], "fine": [path.parent.name for path in paths]}
    Dataset.from_dict(rows).cast_column("img", ImageFeature()).to_parquet(tmp_path / "data" / "train.parquet")
    common = ["--config_name", config, "--dataset_name", tmp_path / "data", "--output_dir", tmp_path / "out", *TRAIN]
    assert_refused(run_script(*common), "no column 'label'", "'fine'", "--label_column_name")
    result = run_script(*common, "--label_column_name=fine", "--max_eval_samples=2")
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "out" / "all_results.json").read_text())["eval_samples"] == 2
    assert json.loads((tmp_path / "out" / "config.json").read_text())["id2label"] == {
        "0": "ant",
        "1": "bee",
        "2": "cat",
    }


def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(photos, tmp_path, run_script):
    tiny_config(drop_path_rate=0.5, hidden_dropout_prob=0.3).save_pretrained(tmp_path / "config")
    common = [
        *["--config_name", tmp_path / "config", "--train_dir", photos, "--output_dir", tmp_path / "out", *TRAIN],
        *["--max_steps=12", "--save_steps=1", "--learning_rate=0.01", "--dataloader_num_workers=2"],
        *[
            "--rand_augment=rand-m9-mstd0.5-inc1",
            "--random_erasing_prob=0.5",
            "--mixup_alpha=0.8",
            "--cutmix_alpha=1.0",
        ],
    ]
    result = run_script(*common)
    assert result.returncode == 0, result.stderr
    weights = (tmp_path / "out" / "latent" / "model.safetensors").read_bytes()
    steps_of_an_epoch = 5
    for last in (7, steps_of_an_epoch):  # within an epoch, and between two epochs
        (tmp_path / "out" / "train_results.json").unlink()
        for step in range(last + 1, 13):
            shutil.rmtree(tmp_path / "out" / f"checkpoint-{step}")
        result = run_script(*common)
        assert result.returncode == 0, result.stderr
        assert f"Resuming from {tmp_path / 'out' / f'checkpoint-{last}'}" in result.stderr
        again = load_file(tmp_path / "out" / "latent" / "model.safetensors")
        for name, tensor in load(weights).items():
            assert torch.equal(again[name], tensor), name


def test_the_same_command_resumes_a_run_after_sigkill_and_sigterm(photos, config, tmp_path, warm_python, run_script):
    def command(folder: str) -> list[str]:
        arguments = ["--config_name", config, "--train_dir", photos, "--output_dir", tmp_path / folder, *TRAIN]
        return [*map(str, arguments), "--max_steps=15", "--save_steps=1", "--save_total_limit=3", "--mixup_alpha=0.8"]

    whole = run_script(*command("whole"))
    assert whole.returncode == 0, whole.stderr
    expected = load_file(tmp_path / "whole" / "latent" / "model.safetensors")
    for ending, code in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 128 + signal.SIGTERM)):
        folder = tmp_path / ending.name
        run = warm_python.start(SCRIPT, *command(ending.name), folder=tmp_path)
        while not (folder / "checkpoint-5").is_dir() and not run.has_ended():
            time.sleep(0.01)
        run.send_signal(ending)
        ended = run.wait(timeout=60)
        assert ended.returncode == code, ended.stderr
        if ending == signal.SIGTERM:
            assert "Run the same command again to resume" in ended.stderr
            assert "Traceback" not in ended.stderr
        assert not (folder / "train_results.json").exists()
        result = run_script(*command(ending.name))
        assert result.returncode == 0, result.stderr
        assert "Resuming from" in result.stderr
        weights = load_file(folder / "latent" / "model.safetensors")
        assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())
        assert not (folder / "_writing").exists()


def test_yaml_file_of_arguments_is_overridden_by_flags(photos, config, tmp_path, run_script):
    (tmp_path / "run.yaml").write_text(
        f"config_name: {config}\ntrain_dir: {photos}\noutput_dir: {tmp_path / 'out'}\ndo_train: true\nmax_steps: 7\n"
        "learning_rate: 1e-3\nuse_cpu: true\nreport_to: none\n"
    )
    result = run_script(tmp_path / "run.yaml", "--max_steps=1")
    assert result.returncode == 0, result.stderr
    recorded = json.loads((tmp_path / "out" / "run_arguments.json").read_text())
    assert (recorded["max_steps"], recorded["learning_rate"]) == (1, 1e-3)


def test_broken_image_is_named_and_left_out_on_request(photos, config, tmp_path, run_script):
    (photos / "bee" / "notes.png").write_text("no image")
    common = ["--config_name", config, "--train_dir", photos, "--output_dir", tmp_path / "out", *TRAIN]
    assert_refused(run_script(*common), "bee/notes.png", "cannot be read", "--skip_broken_images")
    assert not (tmp_path / "out").exists()

    whole = (photos / "ant" / "7.png").read_bytes()
    (photos / "ant" / "7.png").write_bytes(whole[: len(whole) // 2])  # its header is fine
    result = run_script(*common, "--skip_broken_images")
    assert result.returncode == 0, result.stderr
    assert "Left out 2 images: broken, or too large." in result.stderr
    assert json.loads((tmp_path / "out" / "all_results.json").read_text())["skipped_images"] == 2


def test_truncated_image_is_named_before_training(photos, config, tmp_path, run_script):
    for path in photos.rglob("*.png"):
        path.write_bytes(path.read_bytes()[:-30])
    common = ["--config_name", config, "--train_dir", photos, "--output_dir", tmp_path / "out", *TRAIN]
    assert_refused(run_script(*common), ".png", "cannot be decoded")
    assert not (tmp_path / "out").exists()


def test_a_nan_loss_ends_with_exit_code_one(photos, config, tmp_path, run_script):
    common = ["--config_name", config, "--train_dir", photos, "--output_dir", tmp_path / "out", *TRAIN]
    result = run_script(*common, "--max_steps=20", "--learning_rate=1e38", "--max_grad_norm=0")
    assert result.returncode == 1, result.stderr
    assert "Traceback" not in result.stderr
    assert "at step" in result.stderr


def test_teacher_of_other_labels_is_refused(photos, config, teacher, tmp_path, run_script):
    common = ["--config_name", config, "--train_dir", photos, "--output_dir", tmp_path / "out", *TRAIN]
    (photos / "cat").rename(photos / "cow")
    result = run_script(*common, "--teacher_model_name_or_path", teacher)
    assert_refused(result, "calls label 2 'cat', the images call it 'cow'")
    (photos / "dog").mkdir()
    Image.new("RGB", (8, 8)).save(photos / "dog" / "0.png")
    result = run_script(*common, "--teacher_model_name_or_path", teacher)
    assert_refused(result, "has 3 labels, the images have 4")
    assert not (tmp_path / "out").exists()


def test_output_directory_of_another_model_is_refused(photos, config, tmp_path, run_script):
    tiny_model(tiny_config(depths=[1, 1])).save_pretrained(tmp_path / "out")
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.is_file()}
    common = ["--config_name", config, "--train_dir", photos, "--output_dir", tmp_path / "out", *TRAIN]
    assert_refused(run_script(*common), "holds another model's run", "depths", "choose another --output_dir")
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.is_file()} == before


@pytest.mark.skipif(os.name == "nt", reason="Windows has no signals to a process of its own")
def test_an_interruption_of_the_imports_has_no_stack_trace(tmp_path):
    shutil.copy(SCRIPT, tmp_path)
    (tmp_path / "binaryvit_hf").mkdir()
    interrupt = "import os, signal; os.kill(os.getpid(), signal.SIGINT)"
    (tmp_path / "binaryvit_hf" / "__init__.py").write_text(interrupt)
    result = subprocess.run([sys.executable, SCRIPT.name], cwd=tmp_path, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (-signal.SIGINT, "")


@pytest.mark.parametrize(
    "raised, shown",
    [
        ("ValueError('torchvision 1 does not fit PyTorch 2')", "error: torchvision 1 does not fit PyTorch 2\n"),
        ("ModuleNotFoundError('No module named torch')", "error: No module named torch\nInstall what training needs"),
    ],
)
def test_libraries_that_are_missing_or_do_not_fit_end_the_script_without_a_stack_trace(raised, shown, tmp_path):
    shutil.copy(SCRIPT, tmp_path)
    (tmp_path / "binaryvit_hf").mkdir()
    (tmp_path / "binaryvit_hf" / "__init__.py").write_text(f"raise {raised}")  # what a package raises at its import
    result = subprocess.run([sys.executable, SCRIPT.name], cwd=tmp_path, capture_output=True, text=True)
    assert (result.returncode, result.stderr[: len(shown)]) == (1, shown)
    assert "Traceback" not in result.stderr

"""What a run says before and while it trains: images, classes, time, memory and progress."""

import io
import json
import logging
import re
import sys
from types import SimpleNamespace

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from pictures import write_pictures
from safetensors.torch import load_file
from tiny import tiny_config
from tiny_training import tiny_teacher, tiny_trainer

from binaryvit_hf.training import forecast
from binaryvit_hf.training import run as script
from binaryvit_hf.training.callbacks import progress
from binaryvit_hf.training.callbacks.progress import NamedProgress, describe_metrics, name_images
from binaryvit_hf.training.forecast import describe_images, log_forecast, run_seconds, steps_left
from binaryvit_runtime.progress import format_time


def splits(**counts: int) -> dict[str, Dataset]:
    labels = [index for index, count in enumerate(counts.values()) for _ in range(count)]
    features = Features({"image": Value("int64"), "label": ClassLabel(names=list(counts))})
    dataset = Dataset.from_dict({"image": [0] * len(labels), "label": labels}, features=features)
    return {"train": dataset, "validation": dataset.select(range(4))}


def test_images_and_the_largest_and_smallest_class_are_logged(caplog):
    with caplog.at_level(logging.INFO):
        describe_images(splits(ant=30, bee=42, cat=21), balanced=False)
    assert caplog.messages == [
        "Images: 93 to train on, 4 to evaluate on; 3 classes, from 21 training images ('cat') to 42 ('bee')."
    ]


@pytest.mark.parametrize("balanced", [False, True])
def test_small_classes_are_named_and_balancing_is_offered(balanced, caplog):
    with caplog.at_level(logging.INFO):
        describe_images(splits(ant=30, bee=19, cat=2, dog=20), balanced)
    warnings = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "Fewer than 20 training images, too few to learn from, in 2 classes" in warnings[0]
    assert "'bee' (19), 'cat' (2)." in warnings[0]
    assert ("Add --balance_classes" in caplog.text) is not balanced


def test_at_most_ten_small_classes_are_named(caplog):
    describe_images(splits(**{f"c{index}": 2 for index in range(13)}), balanced=False)
    assert "'c9' (2) and 3 more." in caplog.text
    assert "'c10'" not in caplog.text


@pytest.fixture
def command(tmp_path):
    """The command line of a teacher's run and its student's."""
    write_pictures(tmp_path / "photos", ("ant", "bee"), 7)
    tiny_config().save_pretrained(tmp_path / "tiny")
    tiny_teacher().config.save_pretrained(tmp_path / "vit")
    values = {
        "config_name": str(tmp_path / "tiny"),
        "train_dir": str(tmp_path / "photos"),
        "do_train": True,
        "do_eval": True,
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "logging_steps": 2,
        "save_strategy": "no",
        "use_cpu": True,
        "report_to": "none",
        "learning_rate": 0.01,
        "teacher": {"config_name": str(tmp_path / "vit"), "max_steps": 3},
    }
    (tmp_path / "run.json").write_text(json.dumps(values))
    return [str(tmp_path / "run.json"), "--output_dir"]


def test_time_and_memory_are_estimated_for_both_runs_and_no_weight_changes(command, tmp_path, caplog, monkeypatch):
    weights, logs = [], []
    for out in ("timed", "untimed"):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            assert script.main([*command, str(tmp_path / out)]) == 0
        logs.append(caplog.text)
        weights.append([load_file(tmp_path / f"{out}{name}" / "model.safetensors") for name in ("", "-teacher")])
        monkeypatch.setattr(script, "log_forecast", lambda *arguments: None)
    for ours, theirs in zip(*weights):
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert re.search(r"Time: about .* on this machine \(.* for the teacher, .* for the student\)\.", logs[0])
    assert ("Memory: about" in logs[0]) is (sys.platform == "linux")
    assert logs[0].count("Time: about") == logs[0].count("Images: 11 to train on") == 1
    assert "Time: about" not in logs[1]
    line = r"{}: Training loss: [\d.]+ \(epoch 0.67 of {}, step 2 of {}\); about \d+ seconds? left\.\n"
    assert re.search(line.format(r"teacher \(1 of 2\)", 1, 3), logs[1])
    assert re.search(line.format(r"student \(2 of 2\)", 2, 4), logs[1])
    assert re.search(r"student \(2 of 2\): Training loss: [\d.]+ \(epoch 1.33 of 2, step 4 of 4\)\.\n", logs[1])


def test_a_single_run_is_estimated_too(command, tmp_path, caplog):
    values = json.loads((tmp_path / "run.json").read_text())
    del values["teacher"]
    (tmp_path / "run.json").write_text(json.dumps(values))
    with caplog.at_level(logging.INFO):
        assert script.main([*command, str(tmp_path / "out")]) == 0
    assert "Time: about 1 second on this machine." in caplog.text


@pytest.mark.parametrize(
    "names, line",
    [
        ([""], "Time: 40 steps; the first lines of progress tell how long they take."),
        (
            ["teacher (1 of 2)", "student (2 of 2)"],
            "Time: 40 steps for the teacher, 40 steps for the student; the first lines of progress tell how long they take.",
        ),
    ],
)
def test_runs_that_are_not_timed_tell_their_steps(names, line, caplog):
    run, inputs = run_with({"device": torch.device("cuda"), "world_size": 1})
    with caplog.at_level(logging.INFO):
        log_forecast(range(80), None, None, dict.fromkeys(names, (run, inputs)))
    assert caplog.messages == [line]


@pytest.mark.parametrize("steps, images", [(1, 2), (20, 4), (1000, 32)])
def test_timed_steps_of_a_short_run_have_few_images(steps, images, monkeypatch):
    timed = []
    monkeypatch.setattr(forecast, "StepTimer", lambda dataset, workers, number: timed.append(number) or sys.exit())
    training = {"device": torch.device("cpu"), "world_size": 1, "max_steps": steps, "dataloader_num_workers": 0}
    run, inputs = run_with(training)
    run.data = SimpleNamespace(streaming=False)
    with pytest.raises(SystemExit):
        log_forecast(range(80), None, None, {"": (run, inputs)})
    assert timed == [images]


def run_with(training: dict, **inputs):
    defaults = {"do_train": True, "do_eval": True, "max_steps": -1, "num_train_epochs": 4.0, "eval_strategy": "epoch"}
    defaults |= {"train_batch_size": 4, "world_size": 1, "gradient_accumulation_steps": 2}
    defaults |= {"effective_batch_size": 8, "dataloader_drop_last": False}
    arguments = SimpleNamespace(training=SimpleNamespace(**(defaults | training)))
    images = {"train": range(80), "validation": range(30)}
    return arguments, SimpleNamespace(**({"images": images, "finished": False, "checkpoint": None} | inputs))


def test_the_time_of_a_run_is_that_of_its_steps_and_evaluations(tmp_path):
    run = run_with({})
    assert steps_left(*run) == 40
    assert run_seconds(0.5, *run) == pytest.approx(0.5 * (4 * 80 + 5 * 30 / 3))  # four epochs and the final evaluation
    assert run_seconds(0.5, *run_with({"eval_strategy": "no"})) == pytest.approx(0.5 * (4 * 80 + 30 / 3))
    assert steps_left(*run_with({"max_steps": 7})) == 7
    uneven = {"train": range(82), "validation": range(30)}
    assert steps_left(*run_with({}, images=uneven)) == 44
    assert steps_left(*run_with({"dataloader_drop_last": True}, images=uneven)) == 40
    assert steps_left(*run_with({}, finished=True)) == steps_left(*run_with({"do_train": False})) == 0
    (tmp_path / "trainer_state.json").write_text('{"global_step": 30}')
    assert steps_left(*run_with({}, checkpoint=str(tmp_path))) == 10


@pytest.mark.parametrize(
    "seconds, text",
    [
        (0, "1 second"),
        (2, "2 seconds"),
        (89, "89 seconds"),
        (600, "10 minutes"),
        (5399, "90 minutes"),
        (9000, "2.5 hours"),
    ],
)
def test_times_are_in_a_unit_of_a_readable_size(seconds, text):
    assert format_time(seconds) == text


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("output", [Terminal, io.StringIO])
def test_a_terminal_shows_a_bar_with_the_runs_name_and_a_log_file_lines(output, tmp_path, monkeypatch, caplog, capsys):
    trainer = tiny_trainer(tmp_path, disable_tqdm=True, logging_steps=1)
    trainer.add_callback(NamedProgress("student (2 of 2)"))
    monkeypatch.setattr(sys, "stderr", output())
    with caplog.at_level(logging.INFO):
        trainer.train()
    shown = sys.stderr.getvalue()
    assert ("student (2 of 2): 100%" in shown) is (output is Terminal)
    line = r"student \(2 of 2\): Training loss: [\d.]+ \(epoch 0.25 of 1, step 1 of 2\)"
    assert bool(re.search(rf"{line}; about \d+ seconds? left\.", caplog.text)) is (output is not Terminal)
    assert bool(re.search(line, capsys.readouterr().out)) is (output is Terminal)


@pytest.mark.parametrize("output, silence", [(Terminal, 0), (io.StringIO, 0), (io.StringIO, 3600)])
def test_a_log_file_gets_a_line_after_a_minute_of_silence(output, silence, tmp_path, monkeypatch, caplog):
    trainer = tiny_trainer(tmp_path, disable_tqdm=True, logging_steps=500, max_steps=3, eval_strategy="epoch")
    trainer.add_callback(NamedProgress())
    monkeypatch.setattr(sys, "stderr", output())
    monkeypatch.setattr(progress, "MAX_SILENCE", silence)
    with caplog.at_level(logging.INFO):
        trainer.train()
        trainer.evaluate()
    wanted = output is not Terminal and silence == 0
    assert bool(re.search(r"Training: epoch 0.5 of 1, step 2 of 3, about \d+ seconds? left\.", caplog.text)) is wanted
    assert ("Evaluation: batch 1 of 1." in caplog.messages) is wanted


@pytest.mark.parametrize(
    "logs, sentence",
    [
        (
            {"eval_loss": 0.3141, "eval_accuracy": 0.8971, "epoch": 3},
            "Accuracy on 5,000 held-out images: 89.7 % (epoch 3 of 15), loss 0.314",
        ),
        ({"eval_loss": 0.3141}, "Loss on 5,000 held-out images: 0.314 (epoch 3 of 15)"),
        ({"loss": 1.23456, "grad_norm": 3.0}, "Training loss: 1.235 (epoch 3 of 15, step 1,200 of 6,000)"),
        ({"train_runtime": 600.0, "train_loss": 1.0}, "Trained in 10 minutes"),
        ({"epoch": 3}, None),
    ],
)
def test_metrics_are_sentences(logs, sentence):
    state = SimpleNamespace(epoch=3.0, num_train_epochs=15, global_step=1200, max_steps=6000)
    assert describe_metrics(logs, state, name_images("held-out", 5000)) == sentence


def test_a_stream_of_unknown_length_has_no_number_of_epochs():
    state = SimpleNamespace(epoch=0.5, num_train_epochs=sys.maxsize, global_step=5, max_steps=10)
    assert describe_metrics({"loss": 2.0}, state, "images") == "Training loss: 2 (epoch 0.5, step 5 of 10)"


@pytest.mark.parametrize("disable_tqdm", [False, True])
def test_the_phases_of_a_run_are_announced_and_no_metrics_are_printed_as_a_dictionary(
    disable_tqdm, command, tmp_path, caplog, capfd
):
    flags = ["--disable_tqdm", "--do_eval", "--eval_strategy", "epoch"] if disable_tqdm else []
    with caplog.at_level(logging.INFO):
        assert script.main([*command, str(tmp_path / "out"), *flags]) == 0
    phases = [
        "Reading and checking the images of ",
        "Timing a few training steps.",
        "teacher (1 of 2): Training: 3 steps.",
        "teacher (1 of 2): Saving the weights in ",
        "teacher (1 of 2): Evaluating on 3 held-out images.",
        "teacher (1 of 2): Writing the model card",
        "student (2 of 2): Loading the teacher ",
        "student (2 of 2): Training: 4 steps.",
        "student (2 of 2): Saving the packed and latent weights in ",
        "student (2 of 2): Evaluating on 3 held-out images.",
        "student (2 of 2): Evaluating the teacher on the same images.",
        "student (2 of 2): Writing the model card",
    ]
    found = [phase for message in caplog.messages for phase in phases if message.startswith(phase)]
    assert found == phases
    printed = "".join(capfd.readouterr())
    assert "{'" not in printed
    if disable_tqdm:
        assert "Accuracy on 3 held-out images: " in caplog.text
        assert "\r" not in printed
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    assert {"loss", "learning_rate", "epoch"} <= history[0].keys()

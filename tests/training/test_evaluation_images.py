"""Every accuracy says which images it is of: images held out of training, test images, or training images."""

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from command_line import refusal
from datasets import ClassLabel, Dataset, Features, Image
from datasets import config as datasets_config
from huggingface_hub import ModelCard
from matplotlib.figure import Figure
from pictures import write_pictures
from streams import encode
from tiny import tiny_config, tiny_model

from binaryvit_cli import main as binaryvit
from binaryvit_hf.data.arguments import DataArguments
from binaryvit_hf.data.loading import load_described_images, load_images
from binaryvit_hf.run_history import ALL_RESULTS, evaluation_images
from binaryvit_hf.training.command_line import parse
from binaryvit_hf.training.model_card import write_model_card
from binaryvit_hf.training.preparation import load_checked_images, warn_of_learned_images
from binaryvit_hf.training.run import main
from binaryvit_hf.training.run_folder import (
    RUN_ARGUMENTS,
    TRAINING_IMAGES,
    compare_with_training_images,
    record_start,
)


def write_splits(folder, *names: str, labels=(0, 1) * 4):
    features = Features({"image": Image(decode=False), "label": ClassLabel(names=["ant", "bee"])})
    images = [{"bytes": encode(number), "path": None} for number in range(len(labels))]
    folder.mkdir()
    for name in names:
        Dataset.from_dict({"image": images, "label": list(labels)}, features=features).to_parquet(
            folder / f"{name}.parquet"
        )
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets_config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize(
    "splits, arguments, kind",
    [
        (["train", "validation"], {}, "held-out"),
        (["train", "validation", "test"], {}, "held-out"),
        (["train"], {}, "held-out"),
        (["train", "test"], {}, "test"),
        (["train", "test"], {"max_eval_samples": 2}, "test"),
        (["train", "test"], {"streaming": True}, "test"),
        (["train", "test"], {"train_val_split": 0.5}, "held-out"),
        (["train", "validation", "test"], {"validation_split_name": "test"}, "test"),
        (["train", "validation"], {"test_split_name": "validation"}, "test"),
        (["train", "validation"], {"validation_split_name": "train"}, "training"),
        (["test"], {"train_split_name": "test"}, "training"),
        (["a", "b"], {"train_files": "a.*", "validation_files": "b.*"}, "held-out"),
        (["a", "b"], {"train_files": "a.*", "validation_files": "*.parquet"}, "training"),
        (
            ["a", "b"],
            {"train_files": "*.parquet", "validation_files": "b.*", "validation_split_name": "b"},
            "training",
        ),
    ],
)
@pytest.mark.parametrize("test", [False, True])
def test_the_split_that_was_loaded_says_what_the_images_are(splits, arguments, kind, test, tmp_path):
    folder = write_splits(tmp_path / "data", *splits)
    chosen = DataArguments(dataset_name=str(folder), **arguments)
    if test and chosen.test_split_name not in splits:
        pytest.skip("there is nothing to test on")
    assert load_described_images(chosen, 0, None, None, test=test).evaluation_images == kind


@pytest.mark.parametrize(
    "validation, split, kind",
    [
        ("other", None, "held-out"),
        ("photos/../photos", None, "training"),
        ("photos", 0.5, "held-out"),
        (None, None, "held-out"),
    ],
)
def test_a_folder_of_evaluation_images_may_be_the_training_folder(validation, split, kind, tmp_path):
    for name in ("photos", "other"):
        write_pictures(tmp_path / name, ("ant", "bee"), 2)
    folder = validation and str(tmp_path / validation)
    arguments = DataArguments(train_dir=str(tmp_path / "photos"), validation_dir=folder, train_val_split=split)
    loaded = load_described_images(arguments, 0, None, None)
    assert loaded.evaluation_images == kind
    assert loaded.divided is (validation is None or split is not None)


@pytest.mark.parametrize("argument", ["init_from", "model_name_or_path", "teacher_model_name_or_path"])
@pytest.mark.parametrize("source", ["earlier", "earlier/checkpoint-7"])
def test_a_run_that_starts_from_one_on_other_photos_of_the_folder_is_told(argument, source, tmp_path, caplog):
    photos, earlier = tmp_path / "photos", tmp_path / "earlier"
    write_pictures(photos, ("ant", "bee"), 5)
    values = {"train_dir": str(photos), "use_cpu": True, "do_train": True}
    first = parse(values | {"output_dir": str(earlier), "config_name": "any"}, [])
    earlier.mkdir()
    record_start(earlier, first, load_images(first.data, 42, None, None)["train"])
    second = parse(values | {"output_dir": str(tmp_path / "out"), argument: str(tmp_path / source)}, [])

    def warning(**changes) -> str:
        caplog.clear()
        data = replace(second.data, **changes)
        warn_of_learned_images(second._replace(data=data), load_images(data, 42, None, None)["train"])
        return caplog.text

    assert warning() == ""
    (photos / "ant" / "0.png").rename(photos / "ant" / "new.png")
    assert warning() == ""  # nothing was saved: a teacher's folder, which is trained anew
    (earlier / "checkpoint-7").mkdir()
    assert (
        f"--{argument} '{tmp_path / source}' was trained on other images of '{photos}' than the training images of"
        in warning()
    )
    assert "(8 then, 8 now)" in warning()
    assert warning(max_train_samples=2) == ""  # nobody knows
    assert warning(train_dir=str(shutil.copytree(photos, tmp_path / "others"))) == ""


@pytest.mark.parametrize("is_relative", [True, False])  # the output directory
def test_relative_photos_of_a_run_are_known_only_where_it_ran(is_relative, tmp_path, monkeypatch):
    for name in ("here", "there"):
        write_pictures(tmp_path / name / "photos", ("ant", "bee"), 5)
    monkeypatch.chdir(tmp_path / "here")
    values = {"train_dir": "photos", "use_cpu": True, "do_train": True, "config_name": "any"}
    earlier = tmp_path / "here" / "earlier"
    first = parse(values | {"output_dir": "earlier" if is_relative else str(earlier)}, [])
    (earlier / "checkpoint-7").mkdir(parents=True)
    record_start(earlier, first, load_images(first.data, 42, None, None)["train"])

    def difference(folder: str) -> str | None:
        data = replace(first.data, train_val_split=0.4)
        return compare_with_training_images(Path(folder), data, load_images(data, 42, None, None)["train"])

    assert difference("earlier") == "8 then, 6 now"  # others are held out
    monkeypatch.chdir(tmp_path / "there")
    assert difference("../here/earlier") is None


def test_a_model_is_evaluated_with_a_warning_if_it_learned_the_held_out_photos(tmp_path, caplog):
    write_pictures(tmp_path / "photos", ("ant", "bee"), 5)
    command = ["--train_dir", str(tmp_path / "photos"), "--do_eval", "--use_cpu", "--report_to=none"]
    model = tiny_model(tiny_config(num_labels=2))
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / RUN_ARGUMENTS).write_text(
        json.dumps({"train_dir": str(tmp_path / "photos"), "train_split_name": "train"})
    )
    (tmp_path / "model" / TRAINING_IMAGES).write_text(json.dumps({"images": 7}))
    command += ["--model_name_or_path", str(tmp_path / "model"), "--output_dir", str(tmp_path / "out")]
    assert main(command) == 0
    assert "(7 then, 8 now)" in caplog.text
    caplog.clear()
    assert main([*command, "--validation_dir", str(tmp_path / "photos")]) == 0
    assert "7 then" not in caplog.text


@pytest.fixture
def network(tmp_path) -> str:
    tiny_config().save_pretrained(tmp_path / "tiny")
    return str(tmp_path / "tiny")


@pytest.mark.parametrize(
    "splits, flags, kind, other_kinds",
    [
        (["train", "test"], ["--do_predict"], "test", ["held-out", "validation"]),
        (
            ["train"],
            ["--validation_split_name=train", "--load_best_model_at_end"],
            "training",
            ["held-out", "test image"],
        ),
    ],
)
def test_everything_that_a_run_writes_names_its_evaluation_images(
    splits, flags, kind, other_kinds, network, tmp_path, caplog, capsys, monkeypatch
):
    drawn: list[str] = []
    write = Figure.savefig

    def save(figure, *arguments, **keywords):
        drawn.extend(axes.get_title() for axes in figure.axes)
        drawn.extend(text for axes in figure.axes for text in axes.get_legend_handles_labels()[1])
        write(figure, *arguments, **keywords)

    monkeypatch.setattr(Figure, "savefig", save)
    data, out = write_splits(tmp_path / "data", *splits), tmp_path / "out"
    command = [
        "--config_name",
        network,
        "--dataset_name",
        str(data),
        "--output_dir",
        str(out),
        "--do_train",
        "--do_eval",
    ]
    command += ["--max_steps=2", "--eval_strategy=steps", "--eval_steps=1", "--save_steps=1", "--report_to=none"]
    with caplog.at_level(logging.INFO):
        assert main([*command, "--use_cpu", "--disable_tqdm=true", *flags]) == 0
    printed, card = capsys.readouterr().out, ModelCard.load(out / "README.md")
    for text in (caplog.text, printed, card.text):
        assert f"8 {kind} images" in text or f"4 {kind} images" in text
    assert f"Top-1 accuracy on {kind} images" in drawn
    assert f"Confusion matrix of 8 {kind} images" in drawn
    results = json.loads((out / ALL_RESULTS).read_text())
    assert results["eval_images"] == kind
    claims = "\n".join([caplog.text, printed, card.text.partition("## Training")[0], *drawn])
    assert [other for other in other_kinds if other in claims.replace(str(tmp_path), "")] == []
    assert ("The best checkpoint was chosen on these images." in card.text) is ("--load_best_model_at_end" in flags)
    assert (card.data.eval_results is None) is (kind == "training")
    assert ("evaluated on its training images" in caplog.text) is (kind == "training")
    assert binaryvit(["inspect", str(out), "--out", str(tmp_path / "report.html")]) == 0
    assert f"8 {'test' if '--do_predict' in flags else kind} images" in capsys.readouterr().out


@pytest.mark.parametrize("trains, kind", [(True, "held-out"), (False, "evaluation")])
def test_an_evaluation_alone_claims_nothing_about_the_models_training(trains, kind, tmp_path):
    write_pictures(tmp_path / "photos", ("ant", "bee"), 2)
    values = {"train_dir": str(tmp_path / "photos"), "output_dir": str(tmp_path / "out"), "use_cpu": True}
    arguments = parse(values | {"do_train": trains, "do_eval": True}, [])
    assert load_checked_images(arguments, None).evaluation_images == kind


@pytest.mark.parametrize(
    "kind, test_samples, sentence, published",
    [
        ("held-out", 8, "On 8 test images, which were used for no choice:", 0.25),
        ("training", 8, "On 8 test images, which were used for no choice:", 0.25),
        ("evaluation", 8, "On 8 test images:", 0.25),
        ("test", 8, None, 0.5),
        ("test", 16, "On 16 test images:", 0.25),
    ],
)
def test_the_card_claims_no_more_for_test_images_than_is_known(kind, test_samples, sentence, published, tmp_path):
    tiny_config().save_pretrained(tmp_path)
    results = {"eval_accuracy": 0.5, "eval_samples": 8, "eval_images": kind}
    results |= {"test_accuracy": 0.25, "test_samples": test_samples}
    (tmp_path / ALL_RESULTS).write_text(json.dumps(results))
    (tmp_path / RUN_ARGUMENTS).write_text(json.dumps({"dataset_name": "photos"}))
    write_model_card(tmp_path, "model")
    card = ModelCard.load(tmp_path / "README.md")
    assert f"On 8 {kind} images:" in card.text
    assert ("25.00 %" in card.text) is (sentence is not None)
    assert sentence is None or sentence in card.text
    assert [result.metric_value for result in card.data.eval_results] == [published]


def test_testing_on_the_training_images_is_refused(network, tmp_path, capsys):
    data = write_splits(tmp_path / "data", "train")
    command = ["--config_name", network, "--dataset_name", data, "--output_dir", tmp_path / "out", "--do_train"]
    message = refusal(capsys, *command, "--do_predict", "--test_split_name=train", "--use_cpu")
    assert (
        message
        == "error: --test_split_name 'train' is the split to train on: name another one, or leave out --do_predict."
    )


@pytest.mark.parametrize(
    "arguments, kind",
    [
        ({}, "evaluation"),
        ({"dataset_name": "photos", "validation_split_name": None, "test_split_name": "test"}, "evaluation"),
        ({"dataset_name": "photos", "train_val_split": 0.5, "test_split_name": "validation"}, "held-out"),
        ({"dataset_name": "photos", "validation_split_name": "val", "test_split_name": "test"}, "held-out"),
        ({"dataset_name": "photos", "validation_split_name": "test", "test_split_name": "test"}, "test"),
        ({"dataset_name": "photos", "validation_split_name": None, "test_split_name": "validation"}, "test"),
        ({"dataset_name": "photos", "validation_split_name": "a", "train_split_name": "a"}, "training"),
        ({"train_dir": "photos", "validation_dir": None}, "held-out"),
        ({"train_dir": "photos", "validation_dir": "other"}, "held-out"),
        ({"train_dir": "photos", "validation_dir": "photos/"}, "training"),
        ({"dataset_name": "photos", "validation_split_name": ["a"], "train_split_name": {}}, "evaluation"),
    ],
)
def test_the_arguments_of_an_earlier_version_tell_what_they_can(arguments, kind, tmp_path):
    (tmp_path / RUN_ARGUMENTS).write_text(json.dumps(arguments))
    (tmp_path / ALL_RESULTS).write_text(json.dumps({"eval_accuracy": 0.5, "eval_samples": 10, "eval_loss": 0.1}))
    assert evaluation_images(tmp_path) == kind


@pytest.mark.parametrize(
    "changes, kind",
    [
        ({}, "test"),
        ({"test_loss": 0.2}, "held-out"),
        ({"test_samples": 20}, "held-out"),
        ({"eval_images": "held-out"}, "held-out"),
        ({"eval_images": ["unknown"]}, "test"),
        ({"max_eval_samples": 10}, "evaluation"),
    ],
)
def test_equal_results_of_an_earlier_version_are_of_the_same_images(changes, kind, tmp_path):
    metrics = {"accuracy": 0.5, "samples": 10, "loss": 0.1}
    results = {f"{split}_{name}": value for split in ("eval", "test") for name, value in metrics.items()}
    (tmp_path / ALL_RESULTS).write_text(json.dumps(results | changes))
    (tmp_path / RUN_ARGUMENTS).write_text(json.dumps({"max_eval_samples": changes.get("max_eval_samples")}))
    assert evaluation_images(tmp_path) == kind

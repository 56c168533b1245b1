"""What a run says and draws about its results: confidence interval, confusion matrix, learning curves, next steps."""

import ast
import io
import json
import re
import shlex
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image
from scipy.stats import binomtest
from tiny import tiny_config, tiny_model

from binaryvit_cli import main
from binaryvit_hf.data.model_inputs import create_image_processor
from binaryvit_hf.network.quantization_binaryvit import ShippedModel
from binaryvit_hf.run_history import find_values, read_training_history
from binaryvit_hf.training import confusion, learning_curves
from binaryvit_hf.training.confusion import ConfusionMatrix, describe, predict_classes, wilson_interval
from binaryvit_hf.training.example_image import evaluation_image
from binaryvit_hf.training.learning_curves import plot_learning_curves
from binaryvit_hf.training.metrics import TopKAccuracy
from binaryvit_hf.training.run import next_steps
from binaryvit_runtime.errors import UserError
from binaryvit_runtime.pixels import write_background


@pytest.fixture
def figures(monkeypatch) -> list:
    """All figures that are drawn."""
    drawn = []

    def create(module):
        figure_class = module.Figure

        def keep(*args, **kwargs):
            drawn.append(figure_class(*args, **kwargs))
            return drawn[-1]

        monkeypatch.setattr(module, "Figure", keep)

    create(confusion)
    create(learning_curves)
    return drawn


@pytest.mark.parametrize(("correct", "images"), [(0, 1), (1, 1), (0, 40), (40, 40), (37, 40), (8931, 10_000)])
def test_the_interval_is_wilsons(correct, images):
    expected = binomtest(correct, images).proportion_ci(method="wilson")
    assert wilson_interval(correct, images) == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_the_matrix_counts_as_accuracy_does_with_ties_and_nan():
    generator = np.random.default_rng(0)
    logits = generator.integers(0, 3, (500, 4)).astype(np.float16)
    logits[::50, 1] = np.nan
    labels = generator.integers(0, 4, 500)
    matrix = ConfusionMatrix.from_predictions(labels, predict_classes(logits, labels), list("abcd"))
    accuracy = TopKAccuracy().compute(predictions=logits.astype(np.float32), references=labels)["accuracy"]
    assert matrix.correct / matrix.images == accuracy
    assert matrix.counts.sum(axis=1).tolist() == np.bincount(labels, minlength=4).tolist()


def test_rows_of_the_matrix_are_labels_and_the_worst_pairs_come_first():
    counts = np.array([[8, 2, 0], [5, 1, 0], [0, 0, 9]])
    lines = describe(ConfusionMatrix(counts, ["ant", "bee", "cat"]), "test")
    assert lines[0].startswith("accuracy:  72.0% of 25 test images")
    assert lines[1:] == [
        "confused:  'bee' taken for 'ant': 5 of 6 images",
        "confused:  'ant' taken for 'bee': 2 of 10 images",
    ]


def test_describing_thousands_of_classes_copies_no_matrix():
    matrix = ConfusionMatrix(np.diag(np.full(1000, 5)), [str(number) for number in range(1000)])
    matrix.counts[7, 900] = 3
    tracemalloc.start()
    (pair,) = matrix.most_confused(3)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert pair == ("7", "900", 3, 8)
    assert peak < matrix.counts.nbytes / 4


@pytest.mark.parametrize(
    ("counts", "guessing"),
    [
        ([[0, 3], [1, 1]], "60.0% for the answer 'ant'"),  # worse
        ([[3, 0], [1, 1]], "60.0% for the answer 'ant'"),  # better, by chance
        ([[0, 0, 9], [0, 5, 5], [0, 0, 0]], "52.6% for the answer 'bee'"),
        ([[20, 0], [0, 20]], None),
    ],
)
def test_an_accuracy_that_guessing_reaches_too_is_no_success(counts, guessing):
    lines = describe(ConfusionMatrix(np.array(counts), ["ant", "bee", "cat"][: len(counts)]), "test")
    line = f"guessing:  the network cannot be told from guessing ({guessing} to every image): see {confusion.BETTER_RESULTS}"
    assert [text for text in lines if text.startswith("guessing")] == ([line] if guessing else [])
    section, page = re.fullmatch('"(.+)" in (.+)', confusion.BETTER_RESULTS).groups()
    assert f"\n## {section}\n" in (Path(__file__).parents[2] / page).read_text()


def test_a_network_of_one_class_is_not_compared_with_guessing():
    assert len(describe(ConfusionMatrix(np.array([[5]]), ["ant"]), "test")) == 1


def test_the_picture_shows_per_cent_of_each_label(figures, tmp_path):
    counts = np.array([[3, 1, 0], [0, 0, 0], [0, 2, 0]])
    ConfusionMatrix(counts, ["$\\frac$", "no images", "x" * 100]).plot(tmp_path / "a.png", "6 images")
    axes = figures[0].axes[0]
    assert axes.images[0].get_array().tolist() == [[75, 25, 0], [0, 0, 0], [0, 100, 0]]
    assert [text.get_text() for text in axes.texts] == ["75", "25", "0", "0", "100", "0"]  # none without images
    assert axes.get_yticklabels()[0].get_text() == "$\\frac$"
    assert (axes.get_ylabel(), axes.get_xlabel()) == ("label", "predicted class")
    assert Image.open(tmp_path / "a.png").width < 1000


def test_a_class_name_without_a_font_is_one_sentence_and_no_warning_of_matplotlib(tmp_path, caplog, recwarn):
    names = ["$x$\tand $", "-rf", "\u0378" * 40]  # U+0378 is no character, so that no font has it
    ConfusionMatrix(np.eye(3, dtype=np.int64), names).plot(tmp_path / "matrix.png", "Title")
    assert [record.message.split(";")[0] for record in caplog.records] == [
        f"{tmp_path / 'matrix.png'} shows boxes for characters of class names that no font here has"
    ]
    assert not recwarn.list


def test_the_picture_of_many_classes_shows_those_with_the_most_errors(figures, tmp_path):
    counts = np.diag(np.full(1000, 5))
    counts[700, 900] = 3
    ConfusionMatrix(counts, [f"class {index}" for index in range(1000)]).plot(tmp_path / "a.png", "images")
    names = [label.get_text() for label in figures[0].axes[0].get_xticklabels()]
    assert len(names) == confusion.MAX_DRAWN_CLASSES
    assert {"class 700", "class 900"} <= set(names)
    assert "30 of 1000 classes" in figures[0].axes[0].get_title()
    assert Image.open(tmp_path / "a.png").width < 2500


def write_run(folder, entries: list[dict], results: dict, **arguments) -> None:
    folder.mkdir()
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": entries}))
    (folder / "all_results.json").write_text(json.dumps(results))
    (folder / "run_arguments.json").write_text(json.dumps(arguments))


def test_distillation_loss_and_label_loss_have_panels_of_their_own(figures, tmp_path):
    write_run(
        tmp_path / "teacher",
        [{"epoch": 1, "loss": 2.0}, {"epoch": 1, "eval_loss": 1.5, "eval_accuracy": 0.5}, {"epoch": 2, "loss": 1.0}],
        {"epoch": 2, "train_loss": 1.5, "eval_loss": 1.2, "eval_accuracy": 0.75, "eval_images": "held-out"},
    )
    write_run(tmp_path / "student", [{"epoch": 1, "loss": 3.0}], {"epoch": 1}, teacher_model_name_or_path="teacher")
    histories = {name: read_training_history(tmp_path / name) for name in ("student", "teacher")}
    plot_learning_curves(histories, tmp_path / "a.png")
    panels = {
        axes.get_title(): {line.get_label(): line.get_ydata().tolist() for line in axes.lines}
        for axes in figures[0].axes
    }
    assert panels == {
        "Distillation loss": {"student, training images": [3]},
        "Label loss": {"teacher, training images": [2, 1], "teacher, held-out images": [1.5, 1.2]},
        "Top-1 accuracy on held-out images": {"teacher": [50, 75]},
    }
    units = [axes.get_ylabel() for axes in figures[0].axes]
    assert units == ["cross-entropy with the teacher's probabilities", "cross-entropy with the labels", "%"]


def test_the_result_of_the_best_epoch_is_no_value_of_the_last_one(tmp_path):
    log = [{"epoch": epoch, "eval_accuracy": accuracy} for epoch, accuracy in ((1, 0.9), (2, 0.5))]
    write_run(tmp_path / "run", log, {"epoch": 2, "eval_accuracy": 0.9, "train_loss": 1.5})
    history = read_training_history(tmp_path / "run")
    assert find_values(history, "eval_accuracy") == [(1, 0.9), (2, 0.5)]
    assert find_values(history, "train_loss") == [(2, 1.5)]


def test_accuracies_on_other_kinds_of_images_are_named_apart(figures, tmp_path):
    for name, kind in (("student", "test"), ("teacher", "held-out")):
        write_run(tmp_path / name, [], {"epoch": 1, "eval_accuracy": 0.5, "eval_images": kind})
    histories = {name: read_training_history(tmp_path / name) for name in ("student", "teacher")}
    plot_learning_curves(histories, tmp_path / "a.png")
    (axes,) = figures[0].axes
    assert axes.get_title() == "Top-1 accuracy"
    assert [line.get_label() for line in axes.lines] == ["student, test images", "teacher, held-out images"]


def test_a_run_too_short_to_log_still_has_a_picture(figures, tmp_path):
    write_run(tmp_path / "run", [], {"epoch": 0.1, "train_loss": 1.5, "eval_accuracy": 0.5}, train_val_split=9)
    plot_learning_curves({"model": read_training_history(tmp_path / "run")}, tmp_path / "a.png")
    assert [axes.get_title() for axes in figures[0].axes] == ["Label loss", "Top-1 accuracy on held-out images"]
    assert all(line.get_marker() == "." for axes in figures[0].axes for line in axes.lines)


@pytest.mark.parametrize("epochs", [2, 3, 5, 16, 300])
def test_the_ticks_of_epochs_are_whole_numbers(epochs, figures, tmp_path):
    write_run(tmp_path / "run", [{"epoch": epoch, "loss": 1.0} for epoch in range(1, epochs + 1)], {"epoch": epochs})
    plot_learning_curves({"model": read_training_history(tmp_path / "run")}, tmp_path / "a.png")
    ticks = figures[0].axes[0].get_xticks()
    assert len(ticks) > 1
    assert all(tick == round(tick) for tick in ticks)


def test_folders_without_results_have_no_picture(tmp_path):
    plot_learning_curves({"model": read_training_history(tmp_path)}, tmp_path / "a.png")
    assert not (tmp_path / "a.png").exists()


def test_the_closing_commands_put_transparent_pictures_on_the_runs_background(tmp_path, capsys):
    Image.new("RGBA", (32, 16), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    ShippedModel(tiny_model()).save_pretrained(tmp_path / "out")
    processor = create_image_processor(tiny_model().config, 1.0)
    images = Dataset.from_list([{"image": {"path": str(tmp_path / "clear.png"), "bytes": None}}])
    answers = {}
    for background in ("#ffffff", None):
        write_background(processor, background)
        processor.save_pretrained(tmp_path / "out")
        arguments = SimpleNamespace(output_dir=str(tmp_path / "out"))
        inputs = SimpleNamespace(images={"validation": images}, background=background, config=tiny_config())
        classify, load, _ = map(shlex.split, next_steps(SimpleNamespace(training=arguments), inputs)[-3:])
        assert not [word for word in classify if "background" in word]
        assert main([*classify[1:], "--json"]) == 0
        (answer,) = json.loads(capsys.readouterr().out)
        exec(load[-1], {})
        assert ast.literal_eval(capsys.readouterr().out) == answer["labels"]
        answers[background] = answer["labels"]
    assert answers["#ffffff"] != answers[None]


@pytest.mark.parametrize("streaming", [False, True])
def test_the_closing_commands_of_images_that_are_no_files_work_too(streaming, tmp_path, capsys):
    ShippedModel(tiny_model()).save_pretrained(tmp_path / "out")
    processor = create_image_processor(tiny_model().config, 1.0)
    write_background(processor, "#ffffff")  # of the model that the run started from
    processor.save_pretrained(tmp_path / "out")
    pixels = io.BytesIO()
    Image.new("RGBA", (32, 16), (255, 0, 0, 0)).save(pixels, "PNG")
    pictures = {"image": [{"bytes": pixels.getvalue(), "path": None}] * 4, "label": [0, 1, 0, 1]}
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=["ant", "bee"])})
    dataset = Dataset.from_dict(pictures, features=features)
    for split in ("train", "validation"):
        (tmp_path / "data").mkdir(exist_ok=True)
        dataset.to_parquet(tmp_path / "data" / f"{split}-0.parquet")
    values = {"dataset_name": str(tmp_path / "data"), "background": None, "streaming": streaming, "seed": 0}
    (tmp_path / "out" / "run_arguments.json").write_text(json.dumps(values))
    run = SimpleNamespace(
        training=SimpleNamespace(output_dir=str(tmp_path / "out")),
        model=SimpleNamespace(cache_dir=str(tmp_path / "cache")),
    )
    embedded = dataset.cast_column("image", ImageFeature(decode=False))
    lines = next_steps(
        run,
        SimpleNamespace(
            images={"validation": embedded},
            evaluation_images="held-out",
            background="#ffffff",
            config=tiny_config(),
        ),
    )
    assert not any("IMAGE" in line or "classify " in line for line in lines)
    load, publish = map(shlex.split, lines[-2:])
    exec(load[-1], {})
    Image.new("RGB", (32, 16), "white").save(tmp_path / "white.png")
    answer = ast.literal_eval(capsys.readouterr().out)
    assert main(["classify", str(tmp_path / "out"), str(tmp_path / "white.png"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["labels"] == answer
    assert publish[:2] == ["binaryvit", "push"]


def test_a_folder_without_a_run_has_no_evaluation_image(tmp_path):
    with pytest.raises(UserError, match="no output directory of a run"):
        evaluation_image(tmp_path)

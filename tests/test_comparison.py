"""`binaryvit compare`: a packed run and two of full precision, on scikit-learn's digits."""

import json
import logging
import shutil
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from command_line import assert_refused, run
from PIL import Image
from tiny import tiny_config
from transformers import ResNetConfig
from workers import InThisProcess

from binaryvit_hf import comparison
from binaryvit_hf.benchmarks import inference
from binaryvit_hf.benchmarks.inference import Competitor
from binaryvit_hf.data.arguments import DataArguments
from binaryvit_hf.data.image_checks import leave_out_broken
from binaryvit_hf.data.loading import load_images
from binaryvit_hf.training.ablation.estimates import SeedVariance, estimate_accuracy
from binaryvit_hf.training.confusion import wilson_interval
from binaryvit_hf.training.run import main as train
from binaryvit_hf.training.run_folder import RUN_ARGUMENTS, TRAINING_IMAGES, identify_images
from binaryvit_runtime.errors import UserError


ARGUMENTS = ["--dataset_name=sklearn-digits", "--do_train", "--do_eval", "--max_steps=2", "--use_cpu"]
ARGUMENTS += ["--report_to=none", "--disable_tqdm=true", "--max_train_samples=64", "--max_eval_samples=48"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """Output directories of a binary run and of a ResNet."""
    folder = tmp_path_factory.mktemp("runs")
    configs = {
        "binary": tiny_config(image_size=16),
        "resnet": ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", image_size=16, num_labels=10
        ),
    }
    for name, config in configs.items():
        config.save_pretrained(folder / "configs" / name)
        places = ["--config_name", str(folder / "configs" / name), "--output_dir", str(folder / name)]
        assert train([*ARGUMENTS, *places]) == 0
    return {name: folder / name for name in configs}


@pytest.fixture
def quick(monkeypatch):
    """No processes: two forwards of each competitor, which take 1 ms, 2 ms, …"""
    monkeypatch.setattr(
        comparison,
        "take_turns",
        lambda competitors, turns: [[number / 1000] * 2 for number, _ in enumerate(competitors, start=1)],
    )


@pytest.fixture(scope="module")
def exported(runs, tmp_path_factory) -> list[comparison.Contestant]:
    """The ResNet in onnxruntime, in float32 and in 8 bits. An export takes seconds."""
    trained = comparison.TrainedRun(str(runs["resnet"]))
    images = comparison.load_common_images([trained], "validation")[0]
    return comparison.create_contestants(trained, images["train"], tmp_path_factory.mktemp("exported") / "onnx")


@pytest.fixture
def export_once(exported, monkeypatch):
    """An export copies the files that are exported already."""
    float32, int8 = (contestant.competitor.file for contestant in exported)
    monkeypatch.setattr(comparison, "export_float32", lambda network, shape, file: shutil.copy(float32, file))
    monkeypatch.setattr(comparison, "quantize", lambda source, file, calibration: shutil.copy(int8, file))


def test_every_network_is_measured_on_the_runtime_that_one_would_ship_it_with(
    runs, quick, export_once, capsys, tmp_path
):
    out = tmp_path / "table.md"
    measured = json.loads(run(capsys, "compare", *runs.values(), "--out", out, "--json"))
    rows = {(row["network"], row["engine"]): row for row in measured["results"]}
    packed, resnet = map(str, runs.values())
    assert list(rows) == [(packed, "engine"), (resnet, "onnxruntime float32"), (resnet, "onnxruntime int8")]
    assert (measured["split"], measured["images"]) == ("validation", 48)
    for name, engine in ((packed, "engine"), (resnet, "onnxruntime float32")):
        evaluated = json.loads(Path(name, "all_results.json").read_text())
        assert rows[name, engine]["accuracy"] == evaluated["eval_accuracy"]
        low, high = rows[name, engine]["accuracy_interval"]
        assert (low, high) == (evaluated["eval_accuracy_low"], evaluated["eval_accuracy_high"])
        assert rows[name, engine]["epochs"] == evaluated["epoch"]
    assert rows[packed, "engine"]["file_bytes"] == Path(packed, "model.safetensors").stat().st_size
    assert rows[resnet, "onnxruntime int8"]["file_bytes"] < rows[resnet, "onnxruntime float32"]["file_bytes"]
    head, _, *lines = out.read_text().splitlines()
    assert head.startswith("| network | runs on | epochs | top-1, %")
    epochs = f"{rows[packed, 'engine']['epochs']:.3g}"
    assert lines[0].startswith(f"| {packed} | engine | {epochs} | {100 * rows[packed, 'engine']['accuracy']:.2f} |")
    assert "Accuracy on 48 held-out images of sklearn-digits" in lines[-1]


def test_a_quantised_network_has_weights_of_8_bits_and_the_ranges_of_the_images(exported):
    floats, integers = exported
    weights = {tensor.data_type for tensor in onnx.load(integers.competitor.file).graph.initializer}
    assert onnx.TensorProto.INT8 in weights
    trained = floats.run
    images = comparison.load_common_images([trained], "validation")[0]["validation"]
    pixel_values = next(comparison.pixel_batches(trained, images))
    with torch.inference_mode():
        expected = trained.load_model().eval()(torch.from_numpy(pixel_values)).logits.numpy()
    np.testing.assert_allclose(floats.forward(pixel_values), expected, atol=1e-4)
    np.testing.assert_allclose(integers.forward(pixel_values), expected, atol=0.1 * np.abs(expected).max())


def test_what_cannot_be_quantised_is_named_and_stays_in_float32(runs, quick, export_once, capsys, caplog, monkeypatch):
    def fail(*_):
        raise ValueError("There is no such operator.\nMore lines.")

    monkeypatch.setattr(comparison, "quantize", fail)
    measured = json.loads(run(capsys, "compare", runs["resnet"], "--json"))
    assert [row["engine"] for row in measured["results"]] == ["onnxruntime float32"]
    assert (
        f"onnxruntime cannot quantise {str(runs['resnet'])!r}, which stays in float32: There is no such" in caplog.text
    )


def test_networks_take_turns_of_one_image_after_all_are_loaded(runs, monkeypatch):
    monkeypatch.setattr(logging.root.manager, "disable", logging.root.manager.disable)  # workers change it
    monkeypatch.setattr(comparison, "Worker", InThisProcess)
    monkeypatch.setattr(InThisProcess, "requests", [])
    file = runs["binary"] / "model.safetensors"
    competitors = [Competitor(name, "engine", file, comparison.load_in_runtime) for name in ("one", "two")]
    seconds = comparison.take_turns(competitors, turns=2)
    assert [message for _, message in InThisProcess.requests] == ["ready", "ready", 1, 1, 1, 1, 1, 1]
    assert [name for name, _ in InThisProcess.requests] == 4 * ["one on engine", "two on engine"]
    assert all(len(times) >= 2 and min(times) > 0 for times in seconds)


@pytest.fixture
def changed(runs, tmp_path):
    """A copy of the binary run's files with other recorded arguments: `changed(name, **arguments)`."""

    def copy_run(name: str, **values) -> Path:
        copy = tmp_path / name
        copy.mkdir()
        for file in runs["binary"].glob("*.*"):
            if file.name == TRAINING_IMAGES:
                continue  # those of another seed are others
            (copy / file.name).write_bytes(file.read_bytes())
        recorded = json.loads((copy / RUN_ARGUMENTS).read_text())
        (copy / RUN_ARGUMENTS).write_text(json.dumps(recorded | {"output_dir": str(copy)} | values))
        return copy

    return copy_run


def test_the_epochs_of_a_run_that_did_not_record_them_are_left_open(changed, quick, capsys, tmp_path):
    folder = changed("unknown")
    (folder / "all_results.json").unlink()
    out = tmp_path / "table.md"
    measured = json.loads(run(capsys, "compare", folder, "--out", out, "--json"))
    assert [row["epochs"] for row in measured["results"]] == [None]
    assert f"| {folder} | engine | - |" in out.read_text()


def test_damaged_results_of_a_run_are_refused_before_anything_is_measured(changed, capsys, monkeypatch):
    folder = changed("damaged")
    (folder / "all_results.json").write_text("{")
    monkeypatch.setattr(comparison, "load_common_images", None)
    assert_refused(capsys, ["compare", folder], "all_results.json' is damaged", "repair or remove it")


def test_runs_that_differ_by_their_seed_are_one_line_with_their_mean(changed, quick, capsys, tmp_path, monkeypatch):
    def run_of(name: str, **values) -> Path:
        return changed(name, teacher_model_name_or_path=f"{tmp_path / name}-teacher", **values)

    seeds = [run_of(f"seed-{seed}", seed=seed) for seed in (1, 2, 3)]
    again, other = run_of("again", seed=1), run_of("other", seed=4, learning_rate=1.0)
    answers = {path: np.arange(48) % number == 0 for number, path in enumerate(map(str, [*seeds, again, other]), 2)}
    monkeypatch.setattr(
        comparison, "find_correct", lambda contestants, images: [answers[each.run.name] for each in contestants]
    )
    out = tmp_path / "table.md"
    measured = json.loads(run(capsys, "compare", *answers, "--out", out, "--json"))
    assert [(row["network"], row["seeds"]) for row in measured["results"]] == [
        (str(seeds[0]), [1, 2, 3]),
        (str(again), [1]),
        (str(other), [4]),
    ]
    correct = np.stack([answers[str(path)] for path in seeds])
    row, single, _ = measured["results"]
    assert row["accuracy"] == correct.mean()
    expected = estimate_accuracy(correct, SeedVariance.of_rows([correct]))
    assert row["accuracy_interval"] == [max(0, expected.low), expected.high]
    assert single["accuracy_interval"] == list(wilson_interval(10, 48))
    assert [row["seconds"] for row in measured["results"]] == [0.001, 0.002, 0.003]  # measured once
    assert f"| {seeds[0]} (seeds 1, 2, 3) | engine |" in out.read_text()
    assert "Runs that differ by their seed alone are one line" in out.read_text()


def test_a_run_under_several_names_is_measured_once(changed, tmp_path, monkeypatch):
    run_folder = changed("run")
    (tmp_path / "link").symlink_to(run_folder)
    monkeypatch.chdir(tmp_path)
    names = ["run", "run/", "./run", str(run_folder), "link", "link/../run"]
    assert [trained.name for trained in comparison.load_runs(names)] == ["run"]
    other = changed("other")
    assert [trained.name for trained in comparison.load_runs(["link", str(other), "run"])] == ["link", str(other)]


def test_two_seeds_that_differ_have_no_interval(changed, quick, capsys, tmp_path, monkeypatch):
    seeds = {str(changed(f"seed-{seed}", seed=seed)): np.arange(48) < 20 * seed for seed in (1, 2)}
    monkeypatch.setattr(
        comparison, "find_correct", lambda contestants, images: [seeds[each.run.name] for each in contestants]
    )
    out = tmp_path / "table.md"
    (row,) = json.loads(run(capsys, "compare", *seeds, "--out", out, "--json"))["results"]
    assert row["accuracy_interval"] is None
    assert f"| engine | {row['epochs']:.3g} | 62.50 |  | 1 |" in out.read_text()
    assert "Intervals and tests need three seeds of a row." in out.read_text()


def test_runs_without_common_images_are_refused(runs, changed, capsys, tmp_path):
    other = changed("other", train_val_split=0.25)
    words = ("different images (train_val_split is None and 0.25)", "compare runs on the same images")
    assert_refused(capsys, ["compare", runs["binary"], other], *words)
    other = changed("of-split", test_split_name="validation")
    both = [comparison.TrainedRun(str(folder)) for folder in (runs["binary"], other)]
    assert len(comparison.load_common_images(both, "validation")[0]["validation"]) == 48
    with pytest.raises(UserError, match=r"different images \(test_split_name is test and validation\)"):
        comparison.load_common_images(both, "test")
    assert_refused(capsys, ["compare", changed("stream", streaming=True)], "was trained on a stream")
    assert_refused(capsys, ["compare", tmp_path / "none"], "is no output directory of a run")
    assert_refused(capsys, ["compare", runs["binary"], "--steps", "1"], "--steps is 2 or more")


def test_a_damaged_image_processor_is_refused_before_anything_is_measured(changed, capsys, monkeypatch):
    folder = changed("damaged")
    (folder / "preprocessor_config.json").write_text("{")
    monkeypatch.setattr(comparison, "load_common_images", None)
    assert_refused(capsys, ["compare", folder], f"{str(folder)!r} cannot be loaded")


def test_runs_with_a_first_stage_of_their_own_differ_by_their_seed(changed):
    seeds = [changed(f"seed-{seed}", seed=seed, init_from=f"out/first-stage-seed{seed}") for seed in (1, 2)]
    one, two = (comparison.TrainedRun(str(folder)) for folder in seeds)
    assert one.differs_by_seed(two)
    of_the_same_stage = comparison.TrainedRun(str(changed("seed-3", seed=3, init_from="out/first-stage-seed1")))
    assert not one.differs_by_seed(of_the_same_stage)


def test_the_seeds_of_a_network_in_float32_and_8_bits_count_once(changed, quick, capsys, monkeypatch):
    def create(run, calibration, folder):
        file = run.folder / "model.safetensors"
        engines = comparison.FLOAT32, comparison.INT8
        return [comparison.Contestant(run, Competitor(run.name, engine, file, None), None) for engine in engines]

    answers = {str(changed(f"seed-{seed}", seed=seed)): np.arange(48) % (seed + 1) > 0 for seed in (1, 2, 3)}
    monkeypatch.setattr(comparison, "create_contestants", create)
    monkeypatch.setattr(
        comparison, "find_correct", lambda contestants, images: [answers[each.run.name] for each in contestants]
    )
    correct = np.stack(list(answers.values()))
    expected = estimate_accuracy(correct, SeedVariance.of_rows([correct]))
    rows = json.loads(run(capsys, "compare", *answers, "--json"))["results"]
    assert [row["accuracy_interval"] for row in rows] == 2 * [[max(0, expected.low), min(1, expected.high)]]


@pytest.fixture
def photos(runs, tmp_path, monkeypatch):
    """
    A folder `photos` with twenty images of each of ten classes, and `photo_run(name, **arguments)`, the name of a run on it.
    """
    monkeypatch.chdir(tmp_path)
    add_photos(range(20))

    def photo_run(name: str, **values) -> str:
        Path(name).mkdir()
        shutil.copy(runs["binary"] / "config.json", name)
        arguments = {"train_dir": "photos", "seed": 1, "output_dir": name} | values
        Path(name, RUN_ARGUMENTS).write_text(json.dumps(arguments))
        images = load_images(DataArguments(train_dir="photos"), 1, None, None)["train"]
        Path(name, TRAINING_IMAGES).write_text(json.dumps(identify_images(images)))
        return name

    return photo_run


def add_photos(numbers: range) -> None:
    for label in map(str, range(10)):
        Path("photos", label).mkdir(parents=True, exist_ok=True)
        for number in numbers:
            Image.new("RGB", (8, 8), (number, 0, 0)).save(Path("photos", label, f"{number:03}.png"))


def load_photos(*names: str) -> dict:
    return comparison.load_common_images(list(map(comparison.TrainedRun, names)), "validation")[0]


def test_a_run_is_not_measured_on_photos_that_it_learned(photos):
    name = photos("before")
    trained = len(load_photos(name)["train"])
    add_photos(range(20, 30))
    with pytest.raises(
        UserError, match=rf"'before' was trained on other images .* \({trained} then, .*: train it again"
    ):
        load_photos(name)
    assert load_photos(photos("after"))


def test_photos_that_a_run_learned_are_refused_also_without_the_broken_ones(photos):
    name = photos("run", skip_broken_images=True)
    broken = Path(load_photos(name)["train"][0]["image"]["path"])
    broken.write_bytes(b"no image")
    # As the run recorded it.
    trained = load_images(DataArguments(train_dir="photos"), 1, None, None)["train"]
    Path(name, TRAINING_IMAGES).write_text(json.dumps(identify_images(leave_out_broken(trained, "train", True)[0])))
    Path(name, "all_results.json").write_text('{"skipped_images": 1}')
    assert load_photos(name)
    add_photos(range(20, 30))
    with pytest.raises(UserError, match="'run' was trained on other images"):
        load_photos(name)


def test_a_folder_under_another_spelling_has_the_same_images(photos):
    names = photos("one"), photos("two", train_dir=f"{Path.cwd()}/photos/", seed=2)
    assert load_photos(*names)
    one, two = map(comparison.TrainedRun, names)
    assert one.differs_by_seed(two)


def test_a_class_may_lose_its_only_image_for_calibration(photos, monkeypatch):
    name = photos("run", skip_broken_images=True)
    monkeypatch.setattr(comparison, "CALIBRATION_IMAGES", 10)
    train = load_photos(name)["train"]
    assert len(train) == 10
    Path(train[0]["image"]["path"]).write_bytes(b"no image")
    assert len(load_photos(name)["train"]) == 9


def test_a_latent_run_is_refused_before_anything_is_measured(runs, capsys, tmp_path):
    latent = tmp_path / "latent"
    latent.mkdir()
    for file in (*(runs["binary"] / "latent").iterdir(), runs["binary"] / RUN_ARGUMENTS):
        (latent / file.name).write_bytes(file.read_bytes())
    assert_refused(capsys, ["compare", latent], "cannot be compared, because the engine does not compute it")


def test_a_run_without_weights_is_not_said_to_be_beyond_the_engine(runs, tmp_path, capsys):
    unfinished = shutil.copytree(runs["binary"], tmp_path / "unfinished")
    (unfinished / "model.safetensors").unlink()
    assert_refused(capsys, ["compare", unfinished], "cannot be compared: The weights", "there is no model.safetensors")


@pytest.mark.parametrize("library", inference.ONNX_LIBRARIES)
def test_a_missing_library_is_named_before_anything_is_loaded(library, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    assert_refused(
        capsys, ["compare", "none"], f"Comparisons need {library!r}: run `pip install '.[benchmark]'` in a clone"
    )

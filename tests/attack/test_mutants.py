"""Damaged files of every format: refused in one sentence, or answered correctly."""

import contextlib
import io
import json
import math
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
import torch
import yaml
from harness import Said, Wrong, few_or_many, judge, run
from mutations import mutate_bytes, mutate_json, mutate_safetensors
from PIL import Image
from shelf import LABELS, assert_whole, classify, read_scores, training_arguments, write_pth

from binaryvit_cli import main
from binaryvit_hf.data.arguments import DataArguments
from binaryvit_hf.data.image_checks import check_images
from binaryvit_hf.data.loading import load_images
from binaryvit_hf.run_history import read_training_history
from binaryvit_hf.training.learning_curves import plot_learning_curves
from binaryvit_hf.training.run import main as train
from binaryvit_runtime.errors import LINE_LENGTH, UserError


@pytest.fixture(scope="module")
def expected(shelf) -> list[list[float]]:
    scores = read_scores(classify(shelf / "packed", shelf / "a.png"))
    assert len(scores[0]) == 3
    return scores


def mutant_of(source: Path, folder: Path, name: str, mutate: Callable[[bytes], bytes]) -> Path:
    model = folder / "model"
    model.mkdir()
    for file in source.iterdir():
        if file.name != name and not file.name.endswith(".py"):
            (model / file.name).symlink_to(file)
    (model / name).write_bytes(mutate((source / name).read_bytes()))
    return model


def judge_scores(said: Said) -> str:
    """The ending of a `classify`; one that answers has finite scores."""
    ending = judge(said)
    if ending == "answered":
        read_scores(said)
    return ending


@few_or_many(15, 1000)
def test_mutants_of_packed_weights(cases, assert_withstood, shelf, expected):
    donor = (shelf / "latent" / "model.safetensors").read_bytes()

    def attack(rng: Random, folder: Path) -> str:
        model = mutant_of(
            shelf / "packed", folder, "model.safetensors", lambda content: mutate_safetensors(rng, content, donor)
        )
        said = classify(model, shelf / "a.png")
        ending = judge(said)
        if ending == "answered" and read_scores(said) != expected:
            raise Wrong(f"scores {read_scores(said)}, not {expected}")
        return ending

    assert_withstood(attack, cases, "packed weights")


@few_or_many(6, 400)
def test_mutants_of_latent_weights(cases, assert_withstood, shelf):
    donor = (shelf / "packed" / "model.safetensors").read_bytes()

    def attack(rng: Random, folder: Path) -> str:
        model = mutant_of(
            shelf / "latent", folder, "model.safetensors", lambda content: mutate_safetensors(rng, content, donor)
        )
        if rng.random() < 0.3:
            return judge(run(main, "pack", model, folder / "out"))
        return judge_scores(classify(model, shelf / "a.png"))

    assert_withstood(attack, cases, "latent weights")


@few_or_many(12, 800)
def test_mutants_of_config_json(cases, assert_withstood, shelf, expected):
    def attack(rng: Random, folder: Path) -> str:
        source = shelf / rng.choice(["packed", "packed", "latent"])
        model = mutant_of(source, folder, "config.json", lambda content: mutate_json(rng, content.decode()))
        command = rng.choice(["classify", "classify", "ops", "card", "pack"])
        if command == "pack":
            return judge(run(main, "pack", model, folder / "out"))
        if command != "classify":
            return judge(run(main, command, model))
        said = classify(model, shelf / "a.png")
        ending = judge(said)
        if ending == "answered" and source.name == "packed" and read_scores(said) != expected:
            raise Wrong(f"scores {read_scores(said)}, not {expected}")
        return ending

    assert_withstood(attack, cases, "config.json")


@few_or_many(5, 400)
def test_mutants_of_preprocessor_config_json(cases, assert_withstood, shelf):
    def attack(rng: Random, folder: Path) -> str:
        model = mutant_of(
            shelf / "packed",
            folder,
            "preprocessor_config.json",
            lambda content: mutate_json(rng, content.decode()),
        )
        if rng.random() < 0.2:
            return judge(run(main, "pack", model, folder / "out"))
        return judge_scores(classify(model, shelf / "a.png"))

    assert_withstood(attack, cases, "preprocessor_config.json")


DOCUMENTS = {
    "all_results.json": {"epoch": 1.0, "eval_accuracy": 0.9, "eval_loss": 0.3, "eval_samples": 9, "teacher_bytes": 7},
    "run_arguments.json": {"train_dir": "photos", "output_dir": "out", "learning_rate": 1e-3, "license": "mit"},
    "trainer_state.json": {"log_history": [{"epoch": 1.0, "loss": 2.0, "step": 1}, {"epoch": 1.0, "eval_loss": 1.0}]},
}


@few_or_many(2, 200)
def test_mutants_of_a_runs_documents(cases, assert_withstood, shelf):
    def attack(rng: Random, folder: Path) -> str:
        model = shutil.copytree(shelf / "latent", folder / "model")
        for name, content in DOCUMENTS.items():
            (model / name).write_text(json.dumps(content))
        name = rng.choice(list(DOCUMENTS))
        (model / name).write_bytes(mutate_json(rng, json.dumps(DOCUMENTS[name])))
        if rng.random() < 0.3:
            said = run(main, "pack", model, folder / "out")
            assert said.code == 0, said  # packing does not need a card
            assert_whole(folder / "out", shelf)
            return judge(said)
        if name == "trainer_state.json":
            try:
                plot_learning_curves({"student": read_training_history(model)}, folder / "a.png")
            except UserError:
                return "refused"
        return judge(run(main, "card", model))

    assert_withstood(attack, cases, "documents of a run")


@few_or_many(6, 300)
def test_mutants_of_pth_files(cases, assert_withstood, shelf, tmp_path):
    tensors = write_pth(tmp_path)
    whole = (tmp_path / "whole.pth").read_bytes()

    def attack(rng: Random, folder: Path) -> str:
        file = folder / "a.pth"
        if rng.random() < 0.7:
            file.write_bytes(mutate_bytes(rng, whole, (shelf / "latent" / "model.safetensors").read_bytes()))
        else:
            write_strange_pth(rng, file, tensors)
        ending = judge(run(main, "convert", file, folder / "out", "--config", tmp_path / "vit"))
        if ending == "answered":
            assert_whole(folder / "out", shelf)
        elif (folder / "out").exists():
            raise Wrong("something was left behind")
        return ending

    assert (
        judge(run(main, "convert", tmp_path / "whole.pth", tmp_path / "out", "--config", tmp_path / "vit"))
        == "answered"
    )
    assert_withstood(attack, cases, ".pth files")


def write_strange_pth(rng: Random, file: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write a file of torch.save that is not a network of the public code, or one that grows when it is read."""
    name = rng.choice(list(tensors))
    others = [
        None,
        5,
        "x" * 10**6,
        torch.zeros(1).expand(2**40),
        torch.eye(3).to_sparse(),
        torch.zeros(3, dtype=torch.complex64),
        torch.zeros((), dtype=torch.bool),
        torch.full_like(tensors[name], math.nan),
        torch.empty(0),
        torch.empty(2**40, device="meta"),
        nested_lists(100),
        {"a": torch.ones(3)},
    ]
    strange = rng.choice(others)
    keys = [5, ("a", 1), None, "", "x" * 10**5, "\ud800", name]
    content = rng.choice(
        [{"model": {**tensors, rng.choice(keys): strange}}, {"model": strange}, {rng.choice(keys): strange}, strange]
    )
    torch.save(content, file, _use_new_zipfile_serialization=rng.random() < 0.8)
    if rng.random() < 0.3:  # zeros shrink when they are compressed
        torch.save({"model": {**tensors, name: torch.zeros(2**26)}}, file)
        with (
            zipfile.ZipFile(file) as stored,
            zipfile.ZipFile(file.with_suffix(".zip"), "w", zipfile.ZIP_DEFLATED) as zip,
        ):
            for member in stored.infolist():
                zip.writestr(member.filename, stored.read(member))
        file.with_suffix(".zip").replace(file)


def nested_lists(depth: int) -> list:
    nested = []
    for _ in range(depth):
        nested = [nested]
    return nested


@few_or_many(6, 400)
def test_mutants_of_argument_files(cases, assert_withstood, shelf):
    arguments = {
        "config_name": str(shelf / "latent"),
        "train_dir": "nowhere/photos",
        "output_dir": "nowhere/out",
        "do_train": True,
        "do_eval": True,
        "use_cpu": True,
        "report_to": "none",
        "num_train_epochs": 3,
        "max_steps": 7,
        "learning_rate": 1e-3,
        "weight_decay": 0.05,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 1,
        "per_device_train_batch_size": 8,
        "seed": 1,
        "mixup_alpha": 0.2,
        "label_smoothing_factor": 0.1,
        "random_erasing_probability": 0.1,
        "train_val_split": 0.2,
        "max_train_samples": 5,
        "class_names": "names.txt",
        "batch_norm_reestimation_batches": 2,
        "teacher": {"config_name": str(shelf / "latent"), "num_train_epochs": 1, "learning_rate": 1e-4},
    }

    def attack(rng: Random, folder: Path) -> str:
        os.chdir(folder)
        content = mutate_json(rng, json.dumps(arguments))
        file = folder / f"arguments{rng.choice(['.json', '.yaml'])}"
        if file.suffix == ".yaml" and rng.random() < 0.7:
            with contextlib.suppress(ValueError, RecursionError):
                content = mutate_bytes(rng, yaml.safe_dump(json.loads(content), allow_unicode=True).encode(), content)
        file.write_bytes(content)
        ending = judge(run(train, file))
        if ending == "answered":
            raise Wrong("there are no images")
        return ending

    assert_withstood(attack, cases, "argument files", apart=True)


@few_or_many(2, 150)
def test_mutants_of_csv_datasets(cases, assert_withstood, shelf):
    rows = [f"{name}/{number}.png,{name}" for name in LABELS.values() for number in range(4)]
    whole = "\n".join(["image,label", *rows, ""]).encode()

    def attack(rng: Random, folder: Path) -> str:
        photos = shutil.copytree(shelf / "photos", folder / "photos")
        (photos / "metadata.txt").write_text("not of it")
        (photos / "train.csv").write_bytes(mutate_bytes(rng, whole, b"PK\3\4" + bytes(1020)))
        arguments = DataArguments(dataset_name=str(photos / "train.csv"))
        try:
            images = load_images(arguments, seed=0, cache_dir=str(folder / "cache"), token=None)
            check_images(images, skip_broken=False)
        except UserError as error:
            assert len(str(error)) < LINE_LENGTH, error
            return "refused"
        return "answered"

    assert_withstood(attack, cases, "csv datasets")


FORMATS = ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "ICO", "TGA", "JPEG2000", "PCX", "SGI"]


@few_or_many(40, 1500)
def test_mutants_of_image_files(cases, assert_withstood, shelf, look_at):
    picture = Image.open(shelf / "a.png").convert("RGB")
    files = {}
    for format in FORMATS:
        encoded = io.BytesIO()
        picture.save(encoded, format)
        files[format] = encoded.getvalue()
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a picture"
    encoded = io.BytesIO()
    picture.save(encoded, "JPEG", exif=exif, progressive=True)
    files["EXIF"] = encoded.getvalue()

    def attack(rng: Random, folder: Path) -> str:
        file = folder / f"a.{rng.choice(['png', 'jpg', 'tif'])}"
        file.write_bytes(mutate_bytes(rng, files[rng.choice(list(files))], files[rng.choice(list(files))]))
        return look_at(file)

    assert_withstood(attack, cases, "image files")


@few_or_many(1, 100)
def test_mutants_of_checkpoints(cases, assert_withstood, shelf, interrupted):
    names = [
        *["optimizer.pt", "scheduler.pt", "trainer_state.json", "rng_state.pth", "model.safetensors", "config.json"],
        *["training_args.bin", "preprocessor_config.json"],
    ]

    def attack(rng: Random, folder: Path) -> str:
        out = shutil.copytree(interrupted, folder / "out")
        file = out / "checkpoint-2" / rng.choice([name for name in names if (out / "checkpoint-2" / name).is_file()])
        content = file.read_bytes()
        if file.suffix == ".json" and rng.random() < 0.8:
            file.write_bytes(mutate_json(rng, content.decode()))
        else:
            file.write_bytes(mutate_bytes(rng, content, (shelf / "a.png").read_bytes()))
        record = out / "run_arguments.json"
        record.write_text(record.read_text().replace(str(interrupted), str(out)))
        ending = judge(run(train, *training_arguments(shelf, out)))
        if ending == "answered":
            assert_whole(out, shelf)
        return ending

    assert_withstood(attack, cases, "checkpoints", apart=True)

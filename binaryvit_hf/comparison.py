"""
Trained networks beside each other: the accuracy, latency and size of the file that one would ship.

A packed BinaryViT runs on the engine. Any other image classifier of transformers is exported to ONNX and runs in onnxruntime,
in float32 and in 8 bits: static quantisation, a scale for each channel of a weight, ranges of activations from training images.
Accuracy is that of exactly what is timed.
"""

import json
import logging
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import nn
from transformers import BaseImageProcessor, PreTrainedConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_NAME

from binaryvit_runtime.classifier import Classifier
from binaryvit_runtime.errors import LoadingError, UnsupportedModelError, UserError, counted, first_sentence
from binaryvit_runtime.pixels import read_background
from binaryvit_runtime.progress import Progress
from binaryvit_runtime.resources import find_source

from .benchmarks.inference import Competitor, create_responder, load_in_runtime
from .benchmarks.interleaved import Worker, describe_seconds
from .benchmarks.machine import describe_machine
from .benchmarks.onnx_peers import FLOAT32, INT8, export_float32, hide_warnings, load_onnx, open_session, quantize
from .data.arguments import DataArguments
from .data.decoding import decode_image
from .data.image_checks import evenly_spaced, leave_out_broken
from .data.label_names import compare_labels
from .data.loading import load_described_images, load_images
from .data.model_inputs import describe_input
from .data.transforms import TransformedImages, process_image
from .loading import load_classifier, load_config, load_image_processor
from .network.quantization_binaryvit import QUANT_METHOD
from .ops import align_columns, readable
from .run_history import ALL_RESULTS, TEST, finite_numbers
from .training.ablation.estimates import FEW_SEEDS, SeedVariance, estimate_accuracy
from .training.confusion import predict_classes, wilson_interval
from .training.run_folder import (
    NOT_RECORDED,
    PROCESSES,
    RUN_ARGUMENTS,
    TRAINING_IMAGES,
    WITHOUT_EFFECT_ON_WEIGHTS,
    identify_images,
    normalize,
    read_json,
)


ENGINE = "engine"
CALIBRATION_IMAGES = 512
BATCH = 100  # images that are evaluated at once
TABLE_HEAD = ("network", "runs on", "epochs", "top-1, %", "95 % interval", "ms", "10-90 %", "file")
# Arguments of a run that choose its test images, and its held-out ones.
ALL_IMAGES = ("dataset_name", "dataset_config_name", "image_column_name", "label_column_name", "class_names")
TEST_IMAGES = (*ALL_IMAGES, "test_split_name")
HELD_OUT_IMAGES = (
    *ALL_IMAGES,
    *("train_dir", "validation_dir", "train_files", "validation_files", "train_split_name", "validation_split_name"),
    *("train_val_split", "max_eval_samples"),
)

logger = logging.getLogger(__name__)

Forward = Callable[[np.ndarray], np.ndarray]  # pixel_values -> logits


class TrainedRun:
    """
    A trained model with the arguments of its run.

    Args:
        name: the output directory of a run, or the name of a model that comes with the package.

    Raises:
        UserError: there is no such run, or its files are damaged.
    """

    def __init__(self, name: str):
        self.name, self.folder = name, Path(find_source(name))
        self.recorded = read_json(self.folder / RUN_ARGUMENTS)
        if not self.recorded:
            raise UserError(f"{name!r} is no output directory of a run: it has no {RUN_ARGUMENTS}.")
        if self.recorded.get("streaming"):
            raise UserError(f"{name!r} was trained on a stream, and a comparison needs images that can be read again.")
        names = {field.name for field in fields(DataArguments)}
        self.arguments = DataArguments(**{key: value for key, value in self.recorded.items() if key in names})
        self.results = finite_numbers(read_json(self.folder / ALL_RESULTS))
        # Epochs of training, of the last of several stages alone; None if they are not recorded.
        self.epochs: float | None = self.results.get("epoch")

    @property
    def seed(self) -> int:
        return self.recorded.get("seed", 42)

    def differs_by_seed(self, other: "TrainedRun") -> bool:
        """Whether the seed is all that makes this run another than `other`: same network, data and recipe."""
        return self.seed != other.seed and self.described == other.described

    @cached_property
    def described(self) -> str:
        """
        What equal runs of other seeds have in common, with a teacher that was trained in the same command, and a first stage
        of the same seed (`...-seed1`), as those of an ablation.
        """
        left_out = {"seed", "data_seed", "output_dir", PROCESSES} | NOT_RECORDED | WITHOUT_EFFECT_ON_WEIGHTS
        arguments = {name: normalize(name, value) for name, value in self.recorded.items() if name not in left_out}
        output_dir = normalize("output_dir", self.recorded.get("output_dir"))
        if arguments.get("teacher_model_name_or_path") == f"{output_dir}-teacher":
            arguments["teacher_model_name_or_path"] = "its own"
        if isinstance(first_stage := arguments.get("init_from"), str):
            arguments["init_from"] = first_stage.removesuffix(f"-seed{self.seed}")
        config = self.config.to_dict() | {"_name_or_path": None}
        return json.dumps([arguments, config], sort_keys=True, default=str)

    @cached_property
    def config(self) -> PreTrainedConfig:
        return self.load(load_config, self.folder)

    @cached_property
    def processor(self) -> BaseImageProcessor:
        processor = self.load(load_image_processor, self.folder, self.config)
        if processor is None:
            raise UserError(f"{self.name!r} has no image processor (preprocessor_config.json).")
        return processor

    def load_model(self) -> PreTrainedModel:
        return self.load(load_classifier, self.folder, dtype=torch.float32)

    def load(self, function: Callable, *arguments, **keywords):
        try:
            return function(*arguments, **keywords)
        except LoadingError as error:
            raise UserError(f"{self.name!r} cannot be loaded: {error}") from error

    def transform(self, images: Dataset) -> TransformedImages:
        """The images as the model takes them."""
        decode = partial(decode_image, background=read_background(self.processor))
        return TransformedImages(images, decode, partial(process_image, self.processor), seed=0)


@dataclass(frozen=True)
class Contestant:
    """A network on a runtime: how it is timed, and how it answers."""

    run: TrainedRun
    competitor: Competitor
    forward: Forward


def group_by_network(contestants: list[Contestant]) -> list[list[Contestant]]:
    """Contestants that differ by the seed of their run alone are one network on one runtime."""
    groups: list[list[Contestant]] = []
    for contestant in contestants:
        for group in groups:
            if contestant.competitor.engine == group[0].competitor.engine and all(
                contestant.run.differs_by_seed(other.run) for other in group
            ):
                group.append(contestant)
                break
        else:
            groups.append([contestant])
    return groups


def compare_runs(names: list[str], turns: int = 7) -> dict:
    """
    Measure the networks of finished runs on the images that they have in common, and on one thread of this machine.

    Args:
        names: see `TrainedRun`.
        turns: timed turns of each network, 2 or more. Networks take turns, so a load on the machine slows all of them.

    Returns:
        - `images`: number of the evaluation images; `split`: "test" if all runs have test images, else "validation";
          `evaluation_images`: what they are (`run_history.EVALUATION_KINDS`),
        - `data`: the name of the data set or folder,
        - `cpu`, `kernels`: see `describe_machine`,
        - `results`: for each network and runtime `network`, `engine`, `seeds`, `epochs` (`None` if not recorded), `accuracy`
          (0 to 1), `accuracy_interval` (95 %; `None` if the seeds are too few),
          `file_bytes`, and the seconds of one image, `seconds` (median) and `seconds_10_90`. Runs that differ by their seed
          alone are one network: `network`, size and time are those of the first, and `accuracy` is the mean.

    Raises:
        UserError: a run cannot be compared with the others, or cannot be exported.
    """
    runs = load_runs(names)
    for run in runs:
        _ = run.processor  # a damaged one is refused before images are loaded and networks exported
    split = "test" if all(run.recorded.get("do_predict") for run in runs) else "validation"
    images, kind = load_common_images(runs, split)
    with tempfile.TemporaryDirectory() as folder:
        contestants = [
            contestant
            for index, run in enumerate(runs)
            for contestant in create_contestants(run, images["train"], Path(folder, str(index)))
        ]
        groups = group_by_network(contestants)
        answers = dict(zip(contestants, find_correct(contestants, images[split])))
        correct = [np.stack([answers[contestant] for contestant in group]) for group in groups]
        # A network in 8 bits has the seeds of its float32 one, which must not count twice.
        between_seeds = SeedVariance.of_rows(
            of_group for (first, *_), of_group in zip(groups, correct) if first.competitor.engine != INT8
        )
        seconds = take_turns([first.competitor for first, *_ in groups], turns)
        return {
            "data": runs[0].arguments.dataset_name or runs[0].arguments.train_dir,
            "split": split,
            "images": len(images[split]),
            "evaluation_images": kind,
            **describe_machine(),
            "results": [
                {
                    "network": group[0].run.name,
                    "engine": group[0].competitor.engine,
                    "seeds": [contestant.run.seed for contestant in group],
                    "epochs": group[0].run.epochs,
                    "accuracy": float(of_group.mean()),
                    "accuracy_interval": accuracy_interval(of_group, between_seeds),
                    "file_bytes": group[0].competitor.file.stat().st_size,
                    **describe_seconds(times, 1),
                }
                for group, of_group, times in zip(groups, correct, seconds)
            ],
        }


def load_runs(names: list[str]) -> list[TrainedRun]:
    """The runs, each folder once: `out/a`, `out/a/`, its absolute path and a link to it are one run."""
    by_folder: dict[Path, TrainedRun] = {}
    for run in map(TrainedRun, dict.fromkeys(names)):
        by_folder.setdefault(run.folder.resolve(), run)
    return [*by_folder.values()]


def accuracy_interval(correct: np.ndarray, between_seeds: SeedVariance | None) -> list[float] | None:
    """
    The 95 % confidence interval of a network's accuracy; `None` if its seeds are too few for one.

    Args:
        correct: whether each answer is right, `(seeds, images)`. One seed has Wilson's interval, which counts images alone.
        between_seeds: of all networks that are compared.
    """
    if len(correct) == 1:
        return list(wilson_interval(int(correct.sum()), correct.size))
    estimate = estimate_accuracy(correct, between_seeds)
    return None if estimate is None else [estimate.low, estimate.high]


def load_common_images(runs: list[TrainedRun], split: str) -> tuple[dict[str, Dataset], str]:
    """
    Calibration images, as `train`, and the evaluation images of all runs, with the kind of these.

    Raises:
        UserError: the runs have different images or classes, or the images cannot be loaded.
    """
    first, *others = runs
    for other in others:
        for name in TEST_IMAGES if split == "test" else HELD_OUT_IMAGES:
            before, now = getattr(first.arguments, name), getattr(other.arguments, name)
            if normalize(name, before) != normalize(name, now):
                raise UserError(
                    f"{first.name!r} and {other.name!r} have different images ({name} is {before} and {now}): compare runs on "
                    "the same images."
                )
    loaded: dict[str, Any]
    arguments = DataArguments(**vars(first.arguments) | {"max_train_samples": None})
    loaded, kind, divided = load_described_images(arguments, first.seed, None, None, test=split == "test")
    if "train" not in loaded:
        raise UserError(f"The images of {first.name!r} have no training images, which quantisation needs.")
    train = loaded["train"]
    without_broken = cache(lambda images: leave_out_broken(images, "train", True)[0])  # which decodes all images
    for run in runs:
        compare_labels(run.config, train.features["label"].names, repr(run.name), "compare runs on the same images")
        if split != "test" and divided:
            check_training_images(run, train, without_broken)
    chosen = train.select(evenly_spaced(range(len(train)), CALIBRATION_IMAGES))
    skip = any(run.arguments.skip_broken_images for run in runs)
    images: dict[str, Dataset] = {}
    broken: list[str] = []
    for name, of_split in (("train", chosen), (split, loaded[split])):
        # Not `check_images`: a class may have a single image among the chosen ones.
        images[name], names, _ = leave_out_broken(of_split, name, skip)
        broken += names
    if broken:
        logger.warning("Left out %s: broken, or too large.", counted(len(broken), "image"))
    return images, TEST if split == "test" else kind


def check_training_images(run: TrainedRun, train: Dataset, without_broken: Callable[[Dataset], Dataset]) -> None:
    """
    Images that are added to a folder change which ones are held out, and a run would be measured on images that it learned.

    Args:
        train: all images of today that are not held out.
        without_broken: leaves out broken images.

    Raises:
        UserError: the run was trained on others.
    """
    recorded = read_json(run.folder / TRAINING_IMAGES)
    if not recorded:
        return
    if run.arguments.max_train_samples is not None:
        train = load_images(run.arguments, run.seed, None, None)["train"]
    if "skipped_images" in run.results:  # it recorded the images without the broken ones
        train = without_broken(train)
    now = identify_images(train)
    if recorded != now:
        place = run.arguments.train_dir or run.arguments.dataset_name
        raise UserError(
            f"{run.name!r} was trained on other images than are in {place!r} now ({recorded.get('images')} then, "
            f"{now['images']} now), so its held-out images are others, too: train it again."
        )


# ---- Networks and runtimes ----


def create_contestants(run: TrainedRun, calibration: Dataset, folder: Path) -> list[Contestant]:
    """
    The network of a run on every runtime that computes it. Files of ONNX are written to `folder`.

    Raises:
        UserError: no runtime computes it.
    """
    if run.config.model_type == QUANT_METHOD:
        return [create_packed(run)]
    folder.mkdir()
    float32, int8 = (folder / f"model.{kind}.onnx" for kind in ("float32", "int8"))
    shape = (3, *describe_input(run.processor, repr(run.name)).size)
    try:
        with hide_warnings(), Progress(f"Exporting {run.name} to ONNX"):
            export_float32(Logits(run.load_model()), shape, float32)
    except UserError:
        raise
    except Exception as error:  # exporters raise any exception
        raise UserError(f"{run.name!r} cannot be exported to ONNX: {first_sentence(error)}") from error
    files = {FLOAT32: float32}
    try:
        with hide_warnings(), Progress(f"Quantising {run.name} to 8 bits"):
            quantize(float32, int8, pixel_batches(run, calibration))
        files[INT8] = int8
    except UserError:  # of an image
        raise
    except Exception as error:  # so do quantisers
        logger.warning("onnxruntime cannot quantise %r, which stays in float32: %s", run.name, first_sentence(error))
    return [
        Contestant(run, Competitor(run.name, engine, file, load_onnx), answer_in_onnxruntime(file))
        for engine, file in files.items()
    ]


class Logits(nn.Module):
    """An image classifier as a function of its images alone: `pixel_values -> logits`."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.model(pixel_values=pixel_values, return_dict=True).logits


def create_packed(run: TrainedRun) -> Contestant:
    try:
        classifier = Classifier.from_pretrained(run.folder)
    except UnsupportedModelError as error:
        raise UserError(f"{run.name!r} cannot be compared, because the engine does not compute it: {error}") from error
    except UserError as error:
        raise UserError(f"{run.name!r} cannot be compared: {error}") from error

    def forward(images: np.ndarray) -> np.ndarray:
        return classifier.network.classify(images, *classifier.head, threads=classifier.threads)

    return Contestant(run, Competitor(run.name, ENGINE, run.folder / SAFE_WEIGHTS_NAME, load_in_runtime), forward)


def answer_in_onnxruntime(file: Path) -> Forward:
    session = open_session(file)
    (images,) = session.get_inputs()
    return lambda pixel_values: session.run(None, {images.name: pixel_values})[0]


# ---- Measurements ----


def pixel_batches(run: TrainedRun, images: Dataset) -> Iterator[np.ndarray]:
    """`pixel_values` of all images, in batches."""
    transformed = run.transform(images)
    for start in range(0, len(images), BATCH):
        indices = range(start, min(start + BATCH, len(images)))
        yield torch.stack([transformed[index]["pixel_values"] for index in indices]).numpy()


def find_correct(contestants: list[Contestant], images: Dataset) -> list[np.ndarray]:
    """Whether each contestant classifies each image as labelled, `(images,)`. Equal image processors run once."""
    labels = np.array(images["label"][:])
    correct = [np.zeros(len(labels), bool) for _ in contestants]
    by_processor: dict[str, list[int]] = {}
    for index, contestant in enumerate(contestants):
        described = json.dumps(contestant.run.processor.to_dict(), sort_keys=True, default=str)
        by_processor.setdefault(described, []).append(index)
    with Progress("Classifying images", total=len(images) * len(by_processor)) as progress:
        for indices in by_processor.values():
            start = 0
            for pixel_values in pixel_batches(contestants[indices[0]].run, images):
                of_batch = slice(start, start + len(pixel_values))
                wanted = labels[of_batch]
                for index in indices:
                    answers = predict_classes(contestants[index].forward(pixel_values), wanted)
                    correct[index][of_batch] = answers == wanted
                start = of_batch.stop
                progress.update(len(pixel_values))
    return correct


def take_turns(competitors: list[Competitor], turns: int) -> list[list[float]]:
    """Seconds of forwards of one image on one thread, for each competitor. Each is a process of its own."""
    workers = [Worker(str(competitor), create_responder, competitor, 1) for competitor in competitors]
    with Progress("Loading the networks"):
        for message in ("ready", 1):  # load all, then one turn to warm up
            for worker in workers:
                worker.request(message)
    seconds: list[list[float]] = [[] for _ in workers]
    for _ in range(turns):
        for times, worker in zip(seconds, workers):
            times += worker.request(1)
    for worker in workers:
        worker.stop()
    return seconds


# ---- Output ----


def describe_table(measured: dict) -> str:
    images = counted(measured["images"], f"{measured['evaluation_images']} image")
    seeds = ""
    if any(len(result["seeds"]) > 1 for result in measured["results"]):
        seeds = (
            " Runs that differ by their seed alone are one line: the mean of their accuracies, with an interval for other seeds "
            "too, and the time and size of the first."
        )
    if any(result["accuracy_interval"] is None for result in measured["results"]):
        seeds += f" {FEW_SEEDS}"
    return (
        f"Accuracy on {images} of {measured['data']}, with its 95 % confidence interval for other images.{seeds} Milliseconds of a forward of one "
        f"image on one thread ({measured['cpu']}): median, and first to last decile. All networks took turns in one run."
    )


def name_with_seeds(result: dict) -> str:
    seeds = result["seeds"]
    return result["network"] if len(seeds) == 1 else f"{result['network']} (seeds {', '.join(map(str, seeds))})"


def table_rows(measured: dict) -> list[tuple[str, ...]]:
    return [
        (
            name_with_seeds(result),
            result["engine"],
            "-" if result["epochs"] is None else f"{result['epochs']:.3g}",
            f"{100 * result['accuracy']:.2f}",
            " to ".join(f"{100 * bound:.2f}" for bound in result["accuracy_interval"] or ()),
            f"{1000 * result['seconds']:.3g}",
            " to ".join(f"{1000 * seconds:.3g}" for seconds in result["seconds_10_90"]),
            readable(result["file_bytes"], "B"),
        )
        for result in measured["results"]
    ]


def format_text(measured: dict) -> str:
    """The measurements of `compare_runs` for the terminal."""
    return f"{align_columns([TABLE_HEAD, *table_rows(measured)])}\n\n{describe_table(measured)}"


def format_markdown(measured: dict) -> str:
    """The measurements of `compare_runs` as a table of Markdown."""
    lines = [" | ".join(cells) for cells in (TABLE_HEAD, ("---",) * len(TABLE_HEAD), *table_rows(measured))]
    return "\n".join([*(f"| {line} |" for line in lines), "", describe_table(measured), ""])

"""What a run is about to do, logged before it starts: its images and classes, and about how long it will take."""

import copy
import logging
import math
import statistics
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.trainer import TRAINER_STATE_NAME

from binaryvit_runtime.errors import counted
from binaryvit_runtime.progress import format_time

from ..data.image_checks import evenly_spaced
from ..data.sampling import SampleKey, seeded_rng
from ..data.streaming import ImageSplits, ImageStream
from ..data.transforms import TransformedImages, collate_images
from ..host_memory import available_memory, peak_of_process
from ..loading import build_classifier
from ..network.configuration_binaryvit import as_pair
from .arguments import RunArguments
from .preparation import Inputs
from .run_folder import read_json


FEW_IMAGES = 20  # of a class, for training
UNBALANCED = 3  # the largest class has this many times the images of the smallest
NAMED_CLASSES = 10

TIMED_STEPS, TIMED_IMAGES = 3, 32
TIMED_SHARE = 1 / 40  # of a run's images in a timed step, so that the steps take at most a tenth of a short run's time
SECONDS_TO_TIME = 5  # after which no further step is timed
EVALUATION_COST = 1 / 3  # of a training step: a forward without a backward

logger = logging.getLogger(__name__)


def describe_images(images: ImageSplits, balanced: bool) -> None:
    """
    Log the numbers of training images and classes, and warn of classes with few images.

    Args:
        balanced: the run has `--balance_classes`.
    """
    train, names = images["train"], images["train"].features["label"].names
    if isinstance(train, ImageStream):
        logger.info("Images: %s; %d classes.", train, len(names))
        return
    counts = Counter(dict.fromkeys(names, 0))
    counts.update(names[label] for label in train["label"][:])
    (largest, most), (smallest, least) = max_and_min(counts)
    sizes = f"{counted(least, 'training image')} each"
    if least < most:
        sizes = f"from {counted(least, 'training image')} ({smallest!r}) to {most} ({largest!r})"
    logger.info(
        "Images: %d to train on, %d to evaluate on; %d classes, %s.",
        len(train),
        len(images["validation"]),
        len(names),
        sizes,
    )
    few = [f"{name!r} ({count})" for name, count in counts.items() if count < FEW_IMAGES]
    if few:
        more = f" and {len(few) - NAMED_CLASSES} more" if len(few) > NAMED_CLASSES else ""
        logger.warning(
            "Fewer than %d training images, too few to learn from, in %s: %s%s. Add images of them.",
            FEW_IMAGES,
            counted(len(few), "class"),
            ", ".join(few[:NAMED_CLASSES]),
            more,
        )
    if most >= UNBALANCED * max(least, 1) and not balanced:
        logger.info("Add --balance_classes if small classes must be found as often as large ones.")


def max_and_min(counts: Counter) -> tuple[tuple[str, int], tuple[str, int]]:
    """The first of the largest and the first of the smallest classes, each with its count."""
    return max(counts.items(), key=lambda item: item[1]), min(counts.items(), key=lambda item: item[1])


class StepTimer:
    """
    Times training steps on copies of networks. The weights and the random numbers of the runs do not change.

    Args:
        dataset: training images, some of which are read and augmented to time the loader.
        num_workers: processes that load images during training.
        num_images: images of a step.
    """

    def __init__(self, dataset: TransformedImages, num_workers: int, num_images: int = TIMED_IMAGES):
        keys = [SampleKey(0, index, 0) for index in evenly_spaced(range(len(dataset)), num_images)]
        examples = [dataset[keys[0]]]  # the first image takes longer: it imports and caches
        start = time.perf_counter()
        examples += [dataset[key] for key in keys[1:]]
        self.loading = (time.perf_counter() - start) / max(1, len(keys) - 1)
        self.images, self.num_workers = collate_images(examples)["pixel_values"], num_workers

    def seconds_per_image(self, network: nn.Module, teacher: nn.Module | None = None) -> float:
        """
        Time of a training step, divided by its images.

        Args:
            network: its statistics are changed.
        """
        images = self.images_for(network.config)
        taught = None if teacher is None else self.images_for(teacher.config)
        labels = torch.zeros(len(images), dtype=torch.long)
        network.train()

        def step() -> None:
            if teacher is not None:
                with torch.no_grad():
                    teacher.eval()(pixel_values=taught)
            nn.functional.cross_entropy(network(pixel_values=images).logits, labels).backward()
            network.zero_grad()

        with seeded_rng(0):
            step()
            computing = median_time(step) / len(images)
        if self.num_workers:
            return max(computing, self.loading / self.num_workers)
        return computing + self.loading

    def images_for(self, config: PreTrainedConfig) -> torch.Tensor:
        size = getattr(config, "image_size", None)
        if size is None or as_pair(size) == tuple(self.images.shape[-2:]):
            return self.images
        return nn.functional.interpolate(self.images, as_pair(size))


def median_time(step: Callable[[], None]) -> float:
    """The median of a few timed calls, in seconds."""
    times: list[float] = []
    while len(times) < TIMED_STEPS and sum(times) < SECONDS_TO_TIME:
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def steps_left(run: RunArguments, inputs: Inputs) -> int:
    """Steps of the optimiser that a run has still to make."""
    arguments = run.training
    if not arguments.do_train or inputs.finished:
        return 0
    done = read_json(Path(inputs.checkpoint) / TRAINER_STATE_NAME).get("global_step", 0) if inputs.checkpoint else 0
    batches = len(inputs.images["train"]) / (arguments.train_batch_size * arguments.world_size)
    batches = math.floor(batches) if arguments.dataloader_drop_last else math.ceil(batches)
    per_epoch = math.ceil(batches / arguments.gradient_accumulation_steps)
    steps = arguments.max_steps if arguments.max_steps > 0 else math.ceil(arguments.num_train_epochs * per_epoch)
    return max(0, steps - done)


def images_left(run: RunArguments, inputs: Inputs) -> int:
    """Images of the training steps that a run has still to make, repetitions counted."""
    return steps_left(run, inputs) * min(run.training.effective_batch_size, len(inputs.images["train"]))


def run_seconds(per_image: float, run: RunArguments, inputs: Inputs) -> float:
    """Time of a run's training steps and evaluations, from the time of training on one image."""
    arguments, trained = run.training, images_left(run, inputs)
    evaluations = arguments.do_eval + (arguments.eval_strategy == "epoch") * trained / len(inputs.images["train"])
    return per_image * (trained + EVALUATION_COST * evaluations * len(inputs.images["validation"]))


def log_forecast(
    dataset: TransformedImages,
    network: nn.Module,
    teacher: nn.Module | None,
    runs: dict[str, tuple[RunArguments, Inputs]],
) -> None:
    """
    Time steps on the CPU, and log about how long the runs take and how much memory. Streams, several processes and
    accelerators are not timed: the number of steps is logged, and the lines of progress tell the time left.

    Args:
        dataset: the training images of the first run.
        network, teacher: of the first run. The network is copied.
        runs: by name; the first begins now, and each later one learns from the one before.
    """
    arguments = next(iter(runs.values()))[0]
    training = arguments.training
    if training.device.type != "cpu" or training.world_size > 1 or arguments.data.streaming or len(dataset) < 2:
        steps = {name: counted(steps_left(*run), "step") for name, run in runs.items()}
        logger.info("Time: %s; the first lines of progress tell how long they take.", of_each(steps))
        return
    logger.info("Timing a few training steps.")
    num_images = min(TIMED_IMAGES, max(2, int(TIMED_SHARE * min(images_left(*run) for run in runs.values()))))
    timer, seconds = StepTimer(dataset, training.dataloader_num_workers, num_images), {}
    network = copy.deepcopy(network)
    for name, (run, inputs) in runs.items():
        if seconds:
            teacher, network = network, build_classifier(inputs.config, trust_remote_code=run.model.trust_remote_code)
        seconds[name] = run_seconds(timer.seconds_per_image(network, teacher), run, inputs)
    times = {name: format_time(value) for name, value in seconds.items()}
    parts = f" ({of_each(times)})" if len(times) > 1 else ""
    logger.info("Time: about %s on this machine%s.", format_time(sum(seconds.values())), parts)
    if (free := available_memory()) is not None:
        weights = sum(weight.nbytes for weight in network.parameters())
        logger.info(
            "Memory: about %.1f GB; this machine has %.1f GB for it.", (peak_of_process() + weights) / 1e9, free / 1e9
        )


def of_each(values: dict[str, str]) -> str:
    """`3 steps for the teacher, 4 steps for the student`; of a single run its value alone."""
    if len(values) == 1:
        return next(iter(values.values()))
    return ", ".join(f"{value} for the {name.split()[0]}" for name, value in values.items())

"""Speed of loading training batches of JPEGs on one core, for our loader and the loader of the paper's public code."""

import statistics
import tempfile
import time
from itertools import chain, repeat
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from binaryvit_runtime.progress import Progress, with_progress

from ..data.arguments import DataArguments
from ..data.loading import load_images
from ..data.model_inputs import create_image_processor
from ..data.sampling import TrainSampler
from ..data.transforms import add_transforms, collate_images
from ..network.configuration_binaryvit import BinaryViTConfig
from .photographs import write_photographs


QUALITY = 90  # of JPEGs; files have about 110 kB, as in ImageNet
CLASSES = 4
WARM_UP = 4  # untimed batches


def benchmark_loader(num_images: int = 64, batch_size: int = 32, rounds: int = 40) -> dict[str, float]:
    """
    Measure images per second of both loaders on one core, without workers.

    The loaders take turns, batch by batch. The times are CPU times of this process: other processes hardly matter.

    Returns:
        `ours_images_per_second`, `baseline_images_per_second` (of the median batch), their `ratio`, `bytes_per_image`,
        `batch_size`.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as folder:
            files = [Path(folder, f"class{index % CLASSES}", f"{index}.jpg") for index in range(num_images)]
            with Progress("writing the pictures"):
                write_photographs(files, QUALITY)
            size = sum(file.stat().st_size for file in files)
            loaders = {name: create(folder, batch_size) for name, create in LOADERS.items()}
            batches = {name: chain.from_iterable(repeat(loader)) for name, loader in loaders.items()}
            seconds = {name: [] for name in LOADERS}
            for _ in with_progress(range(WARM_UP + rounds), "batches of each loader", WARM_UP + rounds):
                for name in LOADERS:
                    start = time.process_time()
                    next(batches[name])
                    seconds[name].append(time.process_time() - start)
    finally:
        torch.set_num_threads(threads)
    speeds = {name: batch_size / statistics.median(measured[WARM_UP:]) for name, measured in seconds.items()}
    return {
        **{f"{name}_images_per_second": speed for name, speed in speeds.items()},
        "ratio": speeds["ours"] / speeds["baseline"],
        "bytes_per_image": size / num_images,
        "batch_size": batch_size,
    }


def format_speeds(measured: dict[str, float]) -> str:
    return (
        f"ours:                    {measured['ours_images_per_second']:8.1f} images/s of one core\n"
        f"the paper's public code: {measured['baseline_images_per_second']:8.1f} images/s of one core\n"
        f"ratio:                   {measured['ratio']:8.2f}"
    )


def our_loader(folder: str, batch_size: int) -> DataLoader:
    """The loader of training, with the augmentation of the paper's students."""
    arguments = DataArguments(train_dir=folder, validation_dir=folder)
    images = load_images(arguments, seed=0, cache_dir=None, token=None)
    processor = create_image_processor(BinaryViTConfig(), arguments.crop_pct)
    dataset = add_transforms(images, processor, arguments, seed=0)["train"]
    sampler = TrainSampler(len(dataset), 1, batch_size, num_processes=1, seed=0, yield_keys=True)
    return DataLoader(dataset, batch_size, sampler=sampler, collate_fn=collate_images)


def baseline_loader(folder: str, batch_size: int) -> DataLoader:
    """The loader of the paper's public code."""
    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(224, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
        ]
    )
    return DataLoader(ImageFolder(folder, transform), batch_size, shuffle=True)


LOADERS = {"ours": our_loader, "baseline": baseline_loader}

"""Speed of loading training batches of JPEGs on one core, for our loader and the loader of the paper's public code."""

import statistics
import tempfile
import time
from itertools import chain, repeat
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from ..data.arguments import DataArguments
from ..data.loading import load_images
from ..data.model_inputs import create_image_processor
from ..data.sampling import TrainSampler
from ..data.transforms import add_transforms, collate_images
from ..network.configuration_binaryvit import BinaryViTConfig


WIDTH, HEIGHT, QUALITY = 500, 375, 90  # typical of ImageNet, with files of about 110 kB
CLASSES = 4
DETAIL = 0.1  # the amplitude of noise is its scale to this power: chosen for files of about 110 kB
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
            size = write_images(Path(folder), num_images)
            loaders = {name: create(folder, batch_size) for name, create in LOADERS.items()}
            batches = {name: chain.from_iterable(repeat(loader)) for name, loader in loaders.items()}
            seconds = {name: [] for name in LOADERS}
            for _ in range(WARM_UP + rounds):
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


def write_images(folder: Path, number: int) -> int:
    """Write JPEGs of noise in folders of classes. Returns the sum of their bytes."""
    rng = np.random.default_rng(0)
    for index in range(number):
        path = folder / f"class{index % CLASSES}" / f"{index}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(draw_photograph(rng)).save(path, quality=QUALITY)
    return sum(path.stat().st_size for path in folder.rglob("*.jpg"))


def draw_photograph(rng: np.random.Generator) -> np.ndarray:
    """Noise of all scales, as in photographs, more in grey than in colour: `uint8 (height, width, 3)`."""
    pixels = np.zeros((HEIGHT, WIDTH, 3), np.float32)
    for scale in (2**octave for octave in range(8)):
        shape = (HEIGHT // scale + 2, WIDTH // scale + 2)
        grey = rng.standard_normal((1, *shape), np.float32)
        noise = torch.from_numpy(grey + 0.35 * rng.standard_normal((3, *shape), np.float32))[None]
        noise = torch.nn.functional.interpolate(noise, (HEIGHT, WIDTH), mode="bicubic")
        pixels += scale**DETAIL * noise[0].permute(1, 2, 0).numpy()
    return (120 + 55 * pixels / pixels.std()).clip(0, 255).astype("uint8")

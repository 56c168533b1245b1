"""The datasets that a `DataLoader` reads: encoded images are decoded and transformed one at a time."""

import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from PIL.Image import Image, Resampling
from torchvision.transforms import v2
from transformers import BaseImageProcessor

from binaryvit_runtime.errors import UserError, counted
from binaryvit_runtime.pixels import read_background, to_rgb

from ..host_memory import free_memory
from .arguments import DataArguments
from .augmentation import create_train_transform
from .batch_crops import BatchCrops
from .decoding import CroppingDecoder, decode_image, open_encoded
from .image_checks import describe_fault, evenly_spaced, image_name, iterate_inspected, lock_if_large
from .model_inputs import RGB, describe_input
from .sampling import SampleKey, StreamedSample, seeded_rng
from .streaming import ImageSplits, ImageStream


SAMPLED_IMAGES = 32  # to estimate the memory of all images
# The name of a split's images, and the argument that limits their number.
LIMITS = {"train": ("training image", "--max_train_samples"), "validation": ("evaluation image", "--max_eval_samples")}
MAX_MATRIX_SIZE = 2 * 10_000  # above it, crops are made faster one image at a time
PROCESSED_ALONE = 2**22  # pixels; larger images are processed one at a time

logger = logging.getLogger(__name__)


class ImagesInMemory(torch.utils.data.Dataset):
    """
    The images of a dataset, each converted once, when this object is created.

    Args:
        images: columns `image` (encoded) and `label`.
        convert: function of an encoded image. Threads call it.
        split: "train" or "validation", for messages.
        argument: name of the argument that asks for it, for messages.

    Raises:
        UserError: an image cannot be decoded, or the memory is too small.
    """

    converted: Any

    def __init__(self, images: Dataset, convert: Callable, split: str, argument: str = "keep_images_in_memory"):
        self.labels = images["label"][:]
        some = list(self.read(images, evenly_spaced(range(len(images)), SAMPLED_IMAGES), convert))
        need, free = len(images) * sum(image.nbytes for image in some) / len(some), free_memory()
        if free is not None and need > free:
            images_name, limit = LIMITS[split]
            raise UserError(
                f"--{argument} needs {need / 1e9:.1f} GB for {counted(len(images), images_name)}, and {free / 1e9:.1f} GB are "
                f"free: give --{argument} false, or limit the images with {limit}."
            )
        self.converted = self.gather(images, self.read(images, range(len(images)), convert))

    def gather(self, images: Dataset, converted: Iterator) -> Sequence:
        return list(converted)

    @staticmethod
    def read(images: Dataset, indices: Sequence[int], convert: Callable) -> Iterator:
        results = iterate_inspected(images, indices, convert, "Reading images")
        for index, result in zip(indices, results):
            if isinstance(result, Exception):
                raise UserError(describe_fault(images[index]["image"], index, result)) from result
            yield result

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict:
        return {"image": self.converted[index], "label": self.labels[index]}

    @property
    def nbytes(self) -> int:
        return sum(image.nbytes for image in self.converted)


class ImagesOfOneSize(ImagesInMemory):
    """
    Images in memory that are one array, `converted`: `uint8 (images, height, width, 3)`.

    Raises:
        UserError: the images have several sizes.
    """

    def gather(self, images: Dataset, converted: Iterator[np.ndarray]) -> np.ndarray:
        # Not np.stack: it would need the memory twice.
        pixels = np.empty(0, np.uint8)
        for index, image in enumerate(converted):
            if index == 0:
                pixels = np.empty((len(images), *image.shape), image.dtype)
            if image.shape != pixels.shape[1:]:
                first, other = (
                    f"{image_name(images[number]['image'], number)!r} has {shape[1]} x {shape[0]}"
                    for number, shape in ((0, pixels.shape[1:]), (index, image.shape))
                )
                raise UserError(
                    f"--crop_in_batches needs images of one size, but {first} pixels and {other}: leave it out."
                )
            pixels[index] = image
        return pixels


class TransformedImages(torch.utils.data.Dataset):
    """
    Images as `pixel_values`, a float tensor `(channels, height, width)`, and their `labels`.

    An item is requested by its index or by a `SampleKey`. A `StreamedSample` contains its encoded image. The random numbers
    of an item depend on the seed and the key alone, so workers, processes and interruptions do not change an image.

    Args:
        images: columns `image` (encoded) and `label`.
        decode: function of an encoded image.
        transform: function of a decoded image.
        seed: seed of the random numbers.
    """

    accepts_sample_keys = True  # read by `sampling.create_train_sampler`

    def __init__(
        self, images: Dataset | ImageStream | ImagesInMemory, decode: Callable, transform: Callable, seed: int
    ):
        self.images, self.decode, self.transform, self.seed = images, decode, transform, seed

    def __len__(self) -> int:
        return len(self.images)

    @property
    def labels(self) -> list[int]:
        """The class of each image. A stream has no such list."""
        return self.images["label"][:] if isinstance(self.images, Dataset) else self.images.labels  # type: ignore[union-attr]

    @property
    def stream(self) -> ImageStream | None:
        return self.images if isinstance(self.images, ImageStream) else None

    def __getitem__(self, item: int | SampleKey | StreamedSample) -> dict:
        """
        Raises:
            UserError: the image cannot be decoded.
        """
        return self.__getitems__([item])[0]

    def __getitems__(self, items: Sequence[int | SampleKey | StreamedSample]) -> list[dict]:
        """The items of a batch, which a `DataLoader` requests at once: one reading of a table takes as long as for one."""
        return [self.transform_row(key, row) for key, row in self.read_samples(items)]

    def read_samples(self, items: Sequence[int | SampleKey | StreamedSample]) -> Sequence[tuple[SampleKey, dict]]:
        if isinstance(self.images, ImageStream):
            return items  # type: ignore[return-value]  # a stream gets only StreamedSamples, and nothing else gets any
        keys = [as_key(item) for item in items]  # type: ignore[arg-type]
        indices = [key.image_index for key in keys]
        if not isinstance(self.images, Dataset):
            return [(key, self.images[index]) for key, index in zip(keys, indices)]
        columns = self.images[indices]
        return [(key, dict(zip(columns, row))) for key, row in zip(keys, zip(*columns.values()))]

    def transform_row(self, key: SampleKey, row: dict) -> dict:
        with seeded_rng(self.seed, *key):
            try:
                decoded = self.decode(row["image"])
            except Exception as error:  # Pillow raises any exception on a damaged file
                raise UserError(describe_fault(row["image"], key.image_index, error, skip=not self.stream)) from error
            return {"pixel_values": self.transform(decoded), "labels": row["label"]}


class BatchCroppedImages(TransformedImages):
    """`TransformedImages` that are all in memory, and are cropped a batch at once."""

    def __init__(self, images: ImagesInMemory, crop: BatchCrops, seed: int):
        super().__init__(images, identity, identity, seed)
        self.crop = crop

    def __getitems__(self, items: Sequence[int | SampleKey | StreamedSample]) -> list[dict]:
        keys = [as_key(item) for item in items]  # type: ignore[arg-type]  # a StreamedSample is of a stream
        labels = [self.images.labels[key.image_index] for key in keys]  # type: ignore[union-attr]
        return [{"pixel_values": crop, "labels": label} for crop, label in zip(self.crop(keys), labels)]


def as_key(item: int | SampleKey) -> SampleKey:
    return item if isinstance(item, SampleKey) else SampleKey(0, item, 0)


def add_transforms(
    images: ImageSplits, processor: BaseImageProcessor, arguments: DataArguments, seed: int, keep: bool = False
) -> dict[str, TransformedImages]:
    """
    Training images are cropped at random and augmented. All other splits go through the image processor.

    Args:
        processor: its field `background` is the colour behind transparent pixels.
        keep: read the training and validation images now, and keep them in memory. Evaluation sees the same values as
            without. Training crops are from images that may be reduced; with `--crop_in_batches` from whole ones.
    """
    wanted, background = describe_input(processor, "The model"), read_background(processor)
    crop = CroppingDecoder(wanted.size, arguments.random_resized_crop_min_scale, background)
    augment = create_train_transform(arguments, wanted.size, wanted.mean, wanted.std)
    if wanted.channels != RGB:
        augment = v2.Compose([augment, partial(reorder_channels, wanted.channels)])
    decode, process = partial(decode_image, background=background), partial(process_image, processor)
    transformed = {
        split: TransformedImages(dataset, crop, augment, seed)
        if split == "train"
        else TransformedImages(dataset, decode, process, seed)
        for split, dataset in images.items()
    }
    if keep:
        argument = "crop_in_batches" if arguments.crop_in_batches else "keep_images_in_memory"
        kept: ImagesInMemory
        if arguments.crop_in_batches:
            kept = ImagesOfOneSize(images["train"], partial(decode_array, background=background), "train", argument)
            crops = BatchCrops(kept.converted, arguments, wanted, seed)
            if crops.matrix_size > MAX_MATRIX_SIZE:
                (height, width), (crop_height, crop_width) = kept.converted.shape[1:3], wanted.size
                logger.warning(
                    "--crop_in_batches is for small images: crops of %d x %d pixels, from images of %d x %d, are made faster "
                    "without it.",
                    *(crop_width, crop_height, width, height),
                )
            transformed["train"] = BatchCroppedImages(kept, crops, seed)
        else:
            kept = ImagesInMemory(images["train"], crop.reduce, "train", argument)
            transformed["train"] = TransformedImages(kept, crop, augment, seed)
        process_kept = partial(process_encoded, process, background)
        processed = ImagesInMemory(images["validation"], process_kept, "validation", argument)
        transformed["validation"] = TransformedImages(processed, identity, identity, seed)
        count, size = len(kept) + len(processed), (kept.nbytes + processed.nbytes) / 1e6
        logger.info("Keeping %s in memory: %.0f MB.", counted(count, "image"), size)
    return transformed


def describe_sizes(processor: BaseImageProcessor, arguments: DataArguments, training: bool) -> str:
    """
    One sentence about the size of the model's images, and how images of other sizes get it.

    Args:
        training: also describe the crops of training.
    """
    height, width = describe_input(processor, "The model").size
    parts = [f"{width} x {height} pixels"]
    if training:
        shares = f"{100 * arguments.random_resized_crop_min_scale:.3g} to 100 % of the image"
        parts.append(f"for training a random crop of {shares}, resized (bicubic)")
    settings = processor.to_dict()
    size = settings.get("size") or {}
    if not settings.get("do_resize", True):
        resized = "not resized"
    elif side := size.get("shortest_edge"):
        resized = f"the shorter side resized to {side}"
    elif {"height", "width"} <= size.keys():
        resized = f"resized to {size['width']} x {size['height']}"
    else:
        resized = f"processed by {type(processor).__name__}"
    if (resample := settings.get("resample")) in list(Resampling):
        resized += f" ({Resampling(resample).name.lower()})"
    crop = ", then a centre crop" if settings.get("do_center_crop") else ""
    return f"Image size: {'; '.join([*parts, f'for evaluation {resized}{crop}'])}."


def identity(value):
    return value


def decode_array(encoded: dict | None, background: str | None) -> np.ndarray:
    """The pixels of the whole image, `uint8 (height, width, 3)`."""
    return np.array(decode_image(encoded, background))


def process_encoded(process: Callable, background: str | None, encoded: dict | None) -> torch.Tensor:
    """`process` of an encoded image. A large one waits for others: resizing it in floats takes ten times its pixels."""
    with open_encoded(encoded) as image, lock_if_large(image, PROCESSED_ALONE):
        return process(to_rgb(image, background))


def reorder_channels(channels: tuple[int, ...], image: torch.Tensor) -> torch.Tensor:
    return image[list(channels)]


def process_image(processor: BaseImageProcessor, image: Image) -> torch.Tensor:
    return processor(images=image, return_tensors="pt")["pixel_values"][0]


def collate_images(examples: list[dict]) -> dict[str, torch.Tensor]:
    """`pixel_values (batch, channels, height, width)` and `labels (batch,)`."""
    return {
        "pixel_values": torch.stack([example["pixel_values"] for example in examples]),
        "labels": torch.tensor([example["labels"] for example in examples]),
    }

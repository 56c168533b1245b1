"""The datasets that a `DataLoader` reads: encoded images are decoded and transformed one at a time."""

from collections.abc import Callable
from functools import partial

import torch
from datasets import Dataset
from PIL.Image import Image
from torchvision.transforms import v2
from transformers import BaseImageProcessor

from ..errors import UserError
from .arguments import DataArguments
from .augmentation import create_train_transform
from .decoding import CroppingDecoder, decode_image
from .image_checks import describe_fault
from .model_inputs import RGB, describe_input
from .sampling import SampleKey, StreamedSample, seeded_rng
from .streaming import ImageSplits, ImageStream


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

    def __init__(self, images: Dataset | ImageStream, decode: Callable, transform: Callable, seed: int):
        self.images, self.decode, self.transform, self.seed = images, decode, transform, seed

    def __len__(self) -> int:
        return len(self.images)

    @property
    def stream(self) -> ImageStream | None:
        return self.images if isinstance(self.images, ImageStream) else None

    def __getitem__(self, item: int | SampleKey | StreamedSample) -> dict:
        """
        Raises:
            UserError: the image cannot be decoded.
        """
        if isinstance(item, StreamedSample):
            key, row = item
        else:
            key = item if isinstance(item, SampleKey) else SampleKey(epoch=0, image_index=item, repeat=0)
            row = self.images[key.image_index]  # type: ignore[index]  # a stream gets only StreamedSamples
        with seeded_rng(self.seed, *key):
            try:
                decoded = self.decode(row["image"])
            except Exception as error:  # Pillow raises any exception on a damaged file
                raise UserError(describe_fault(row["image"], key.image_index, error, skip=not self.stream)) from error
            return {"pixel_values": self.transform(decoded), "labels": row["label"]}


def add_transforms(
    images: ImageSplits, processor: BaseImageProcessor, arguments: DataArguments, seed: int
) -> dict[str, TransformedImages]:
    """Training images are cropped at random and augmented. All other splits go through the image processor."""
    wanted = describe_input(processor, "The model")
    crop = CroppingDecoder(wanted.size, arguments.random_resized_crop_min_scale, arguments.background)
    augment = create_train_transform(arguments, wanted.size, wanted.mean, wanted.std)
    if wanted.channels != RGB:
        augment = v2.Compose([augment, partial(reorder_channels, wanted.channels)])
    decode, process = partial(decode_image, background=arguments.background), partial(process_image, processor)
    return {
        split: TransformedImages(dataset, crop, augment, seed)
        if split == "train"
        else TransformedImages(dataset, decode, process, seed)
        for split, dataset in images.items()
    }


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

"""Images that are read as they are needed, from the Hub or a disk that others fill, and never all at once."""

import logging
from collections.abc import Iterator
from itertools import count

from datasets import Dataset, Features, IterableDataset

from ..errors import UserError, first_sentence


logger = logging.getLogger(__name__)


class ImageStream:
    """
    Encoded images and labels that come one after the other, from the first one again in each epoch.

    Args:
        dataset: columns `image` and `label`; what of it is random depends on its seed and the epoch.
        num_images: how many there are, if anybody knows.
        endless: go on with the next epoch where one ends; `num_images` is then how many are asked for, of all epochs.
    """

    def __init__(self, dataset: IterableDataset, num_images: int | None, endless: bool = False):
        self.dataset, self.num_images, self.endless = dataset, num_images, endless

    def __len__(self) -> int:
        return self.num_images

    @property
    def features(self) -> Features:
        return self.dataset.features

    def __str__(self) -> str:
        known = f"{self.num_images} images an epoch" if not self.endless else "a number of images that is not known"
        return f"{known}, in {self.dataset.num_shards} shards"

    def shuffle(self, seed: int, buffer_size: int) -> "ImageStream":
        """The shards in another order each epoch, and the images of `buffer_size` mixed."""
        return ImageStream(self.dataset.shuffle(seed=seed, buffer_size=buffer_size), self.num_images)

    def take(self, most: int) -> "ImageStream":
        """The first images alone; where nobody knows how many there are, they are taken to be so many."""
        if self.num_images is not None and self.num_images <= most:
            return self
        return ImageStream(self.dataset.take(most), most)

    def for_evaluation(self) -> "ImageStream":
        """
        With the number of images, for which those that do not tell it are read through. Of the others the first is read.

        Raises:
            UserError: reading fails, or an image that is read has no label of the classes.
        """
        if self.num_images is not None:
            next(self.read(0))
            return self
        logger.info("Counting the images to evaluate on, as their number is not known.")
        return ImageStream(self.dataset, sum(1 for _ in self.read(0)))

    def for_training(self, max_steps: int, batch_size: int) -> "ImageStream":
        """
        As it is where its number of images is known; or else endless, for so many steps.

        Raises:
            UserError: neither is known.
        """
        if self.num_images is not None:
            return self
        if max_steps < 1:
            raise UserError(
                "How many images the stream has is not known, so neither is the length of an epoch: give --max_steps, or "
                "the number of images as --max_train_samples."
            )
        return ImageStream(self.dataset, max_steps * batch_size, endless=True)

    def read(self, epoch: int) -> Iterator[tuple[int, int, dict]]:
        """
        Epoch, index in the epoch, and the row of every image.

        Raises:
            UserError: reading fails, a label is none of the classes, or there are fewer images than was said.
        """
        for current in count(epoch):
            self.dataset.set_epoch(current)
            images = 0
            try:
                for images, row in enumerate(self.dataset, start=1):
                    yield current, images - 1, row
            except UserError:
                raise
            except Exception as error:  # whatever its file system, network, builder or features raised
                raise UserError(
                    f"The stream of images broke off after {images} images: {first_sentence(error)}"
                ) from error
            if images == 0:
                raise UserError("The stream of images is empty.")
            if not self.endless:
                break
        if self.num_images is not None and images < self.num_images:
            raise UserError(f"The stream of images ended after {images}; it was said to have {self.num_images}.")


def declared_num_images(dataset: IterableDataset) -> int | None:
    """The number of rows that a dataset tells of itself, in the README.md that it comes with."""
    splits = dataset.info.splits or {}
    return splits[dataset.split].num_examples if dataset.split in splits else None


ImageSplits = dict[str, Dataset | ImageStream]  # by name: train, validation, test

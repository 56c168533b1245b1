"""Streamed datasets: images are read one at a time from the Hub or a disk, without a download of all."""

import logging
from collections.abc import Iterator
from itertools import count

from datasets import Dataset, Features, IterableDataset

from binaryvit_runtime.errors import UserError, counted, first_sentence


MANY_OF_ONE_CLASS = 100  # images in a row that are no coincidence

logger = logging.getLogger(__name__)


class ImageStream:
    """
    A dataset whose encoded images and labels can only be read in order.

    Args:
        dataset: columns `image` and `label`. Its seed and the epoch determine its order.
        num_images: number of images in an epoch; `None` if it is unknown.
        endless: read epochs one after the other. `num_images` is then the number of images in the whole training.
    """

    def __init__(self, dataset: IterableDataset, num_images: int | None, endless: bool = False):
        self.dataset, self.num_images, self.endless = dataset, num_images, endless

    def __len__(self) -> int:
        return self.num_images

    @property
    def features(self) -> Features:
        return self.dataset.features

    def __str__(self) -> str:
        number = "an unknown number of images" if self.endless else f"{counted(self.num_images, 'image')} per epoch"
        return f"{number}, in {counted(self.dataset.num_shards, 'shard')}"

    def shuffle(self, seed: int, buffer_size: int) -> "ImageStream":
        """The stream in another order: shuffles shards in each epoch, and images within a buffer of `buffer_size`."""
        return ImageStream(self.dataset.shuffle(seed=seed, buffer_size=buffer_size), self.num_images)

    def take(self, most: int) -> "ImageStream":
        """At most the first `most` images. An unknown number stays unknown."""
        if self.num_images is not None and self.num_images <= most:
            return self
        return ImageStream(self.dataset.take(most), None if self.num_images is None else most)

    def for_evaluation(self) -> "ImageStream":
        """
        The stream with a known number of images. If the number is unknown, all images are read and counted. Otherwise the
        first image is read, to find errors before training.

        Raises:
            UserError: reading fails, or an image that was read has a label of no class.
        """
        if self.num_images is not None:
            next(self.read(0))
            return self
        logger.info("Counting the evaluation images, because their number is unknown.")
        return ImageStream(self.dataset, sum(1 for _ in self.read(0)))

    def for_training(self, max_steps: int, batch_size: int) -> "ImageStream":
        """
        The stream with a length for a training run: itself if the number of images is known, or else an endless stream.

        Raises:
            UserError: neither the number of images nor `max_steps` is known.
        """
        if self.num_images is not None:
            return self
        if max_steps < 1:
            raise UserError(
                "The number of images in the stream is unknown, and so is the length of an epoch: give --max_steps, or the "
                "number of images as --max_train_samples."
            )
        return ImageStream(self.dataset, max_steps * batch_size, endless=True)

    def read(self, epoch: int) -> Iterator[tuple[int, int, dict]]:
        """
        Yields the epoch, the index in the epoch and the row of each image.

        Raises:
            UserError: reading fails, a label is of no class, or the stream has fewer images than `num_images`.
        """
        for current in count(epoch):
            self.dataset.set_epoch(current)
            images = 0
            try:
                for images, row in enumerate(self.dataset, start=1):
                    yield current, images - 1, row
            except UserError:
                raise
            except Exception as error:  # file systems, networks, builders and features raise any exception
                raise UserError(
                    f"The stream of images broke off after {counted(images, 'image')}: {first_sentence(error)}"
                ) from error
            if images == 0:
                raise UserError("The stream of images is empty.")
            if not self.endless:
                break
        if self.num_images is not None and images < self.num_images:
            raise UserError(f"The stream of images ended after {images}, but it should have {self.num_images}.")


def warn_of_one_class(stream: ImageStream, labels: list[int], split: str, remedy: str) -> None:
    """
    Warn if all images, or the first 100, have one label: many datasets are sorted by class.

    Args:
        labels: of the first images.
        remedy: what to do about it, for the message.
    """
    are_all = len(labels) == stream.num_images
    if len(set(labels)) == 1 and (are_all or len(labels) >= MANY_OF_ONE_CLASS):
        logger.warning(
            "%s %s have one class, %r: if the dataset is sorted by class, %s.",
            "All" if are_all else "The first",
            counted(len(labels), f"{split} image"),
            stream.features["label"].names[labels[0]],
            remedy,
        )


def declared_num_images(dataset: IterableDataset) -> int | None:
    """The number of images according to the dataset's README.md; `None` if it declares none."""
    splits = dataset.info.splits or {}
    return splits[dataset.split].num_examples if dataset.split in splits else None


ImageSplits = dict[str, Dataset | ImageStream]  # by name: train, validation, test

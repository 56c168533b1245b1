"""The order in which training reads its images, and the random numbers of each augmentation."""

import contextlib
import math
import random
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from .streaming import MANY_OF_ONE_CLASS, ImageStream, warn_of_one_class


# The generator of numpy inside `seeded_rng`. Exchanging generators takes 1 % of the time of saving and restoring a state.
SEEDED_GENERATOR = np.random.MT19937(0)


class SampleKey(NamedTuple):
    """Identifies one augmentation of an image: the `repeat`-th of this epoch."""

    epoch: int
    image_index: int
    repeat: int


class StreamedSample(NamedTuple):
    """A `SampleKey` and the row of its image: columns `image` (encoded) and `label`."""

    key: SampleKey
    row: dict


def create_train_sampler(
    dataset: Dataset, repeats: int, batch_size: int, num_processes: int, seed: int, balance_classes: bool = False
) -> "TrainSampler | StreamSampler":
    """
    A `StreamSampler` for a dataset with a `stream`, a `TrainSampler` for others. The `TrainSampler` yields `SampleKey`s if
    the dataset has `accepts_sample_keys`, otherwise indices.

    Args:
        balance_classes: show every class equally often. The dataset needs `labels`; a stream has none.
    """
    stream = getattr(dataset, "stream", None)
    if stream is not None:
        return StreamSampler(stream, repeats, batch_size, num_processes, training=True)
    yield_keys = getattr(dataset, "accepts_sample_keys", False)
    labels = dataset.labels if balance_classes else None
    return TrainSampler(len(dataset), repeats, batch_size, num_processes, seed, yield_keys, labels)


class TrainSampler(Sampler):
    """
    Shuffles the images in each epoch.

    Repeated augmentation (Hoffer et al., CVPR 2020) reads fewer images, each `repeats` times with different augmentations.
    The length of an epoch stays the same. As in DeiT (Touvron et al., ICML 2021), different processes get the repeats of an
    image, as far as there are enough processes.

    With `labels`, every class has the same share of an epoch. Images of small classes repeat with other augmentations, and
    each epoch draws other images of large classes. The length of an epoch stays the same.

    Args:
        num_images: number of images in the dataset.
        repeats: number of times that an epoch shows an image.
        batch_size: batch size of one process.
        num_processes: number of processes that share the batches.
        seed: the seed and the epoch determine the order. It is the same in all processes.
        yield_keys: yield a `SampleKey` instead of the image's index.
        labels: the class of each image, to balance the classes.
    """

    def __init__(
        self,
        num_images: int,
        repeats: int,
        batch_size: int,
        num_processes: int,
        seed: int,
        yield_keys: bool = False,
        labels: Sequence[int] | None = None,
    ):
        self.classes = (
            None if labels is None else [(torch.tensor(labels) == c).nonzero()[:, 0] for c in sorted({*labels})]
        )
        self.num_images, self.repeats = num_images, repeats
        self.batch_size, self.num_processes = batch_size, num_processes
        self.seed, self.yield_keys = seed, yield_keys
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_images

    def __iter__(self) -> Iterator[int | SampleKey]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        if self.classes is None:
            order = torch.randperm(self.num_images, generator=generator)
            passes = torch.zeros_like(order)
        else:
            order, passes = draw_balanced(self.classes, math.ceil(self.num_images / self.repeats), generator)
        for position in interleave_processes(range(self.num_images), self.batch_size, self.num_processes):
            place, repeat = divmod(position, self.repeats)
            index = order[place].item()
            repeat += self.repeats * passes[place].item()
            yield SampleKey(self.epoch, index, repeat) if self.yield_keys else index


def draw_balanced(
    classes: list[torch.Tensor], number: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Draw images so that the numbers of two classes differ by at most 1. A class shows all its images before it repeats one.

    Args:
        classes: indices of the images of each class.
        number: of images to draw.

    Returns:
        The indices of the images in random order, and how often each has been drawn before; both `(number,)`.
    """
    larger = torch.randperm(len(classes), generator=generator) < number % len(classes)
    images, passes = [], []
    for indices, one_more in zip(classes, larger.tolist()):
        share = number // len(classes) + one_more
        whole_passes = -(-share // len(indices))
        shuffled = [indices[torch.randperm(len(indices), generator=generator)] for _ in range(whole_passes)]
        images.append(torch.cat(shuffled)[:share] if shuffled else indices[:0])
        passes.append(torch.arange(share) // len(indices))
    order = torch.randperm(number, generator=generator)
    return torch.cat(images)[order], torch.cat(passes)[order]


class StreamSampler(Sampler):
    """
    Yields the images of a stream in its order, as `StreamedSample`. Repeated augmentation works as in `TrainSampler`.

    The main process reads the stream, and workers decode the images. The order therefore does not depend on the numbers of
    shards and workers. Every process reads the whole stream, because shards differ in length, but decodes only its own
    batches.

    Args:
        stream: its `len` is the length of an epoch.
        repeats: number of times that an epoch shows an image.
        batch_size: batch size of one process.
        num_processes: number of processes that share the batches.
        training: warn if the images are sorted by class.
    """

    def __init__(
        self,
        stream: ImageStream,
        repeats: int = 1,
        batch_size: int = 1,
        num_processes: int = 1,
        training: bool = False,
    ):
        self.stream, self.repeats, self.training = stream, repeats, training
        self.batch_size, self.num_processes = batch_size, num_processes
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.stream)

    def __iter__(self) -> Iterator[StreamedSample]:
        samples = (
            StreamedSample(SampleKey(epoch, index, repeat), row)
            for epoch, index, row in self.watch_labels(self.stream.read(self.epoch))
            for repeat in range(self.repeats)
        )
        yield from interleave_processes(islice(samples, len(self)), self.batch_size, self.num_processes)

    def watch_labels(self, rows: Iterator[tuple[int, int, dict]]) -> Iterator[tuple[int, int, dict]]:
        """The same rows. Warns in the first epoch of training if they begin with many of one class."""
        labels: list[int] = []
        for epoch, index, row in rows:
            if self.training and epoch == 0 and len(labels) < MANY_OF_ONE_CLASS:
                labels.append(row["label"])
                if len(labels) == MANY_OF_ONE_CLASS:
                    warn_of_one_class(
                        self.stream, labels, "training", "shuffle it, or give a larger --shuffle_buffer_size"
                    )
            yield epoch, index, row


def interleave_processes(items: Iterable, batch_size: int, num_processes: int) -> Iterator:
    """
    Reorder items so that neighbours are in batches of different processes.

    Process 0 takes the first batch, process 1 the second, and so on. Items that do not fill a batch for every process keep
    their order.
    """
    items = iter(items)
    while len(group := list(islice(items, batch_size * num_processes))) == batch_size * num_processes:
        for process in range(num_processes):
            yield from group[process::num_processes]
    yield from group


@contextlib.contextmanager
def seeded_rng(*seeds: int) -> Iterator[None]:
    """
    Make the random numbers of Python, numpy and torch on the CPU depend on the seeds alone inside this context. The earlier
    states of the generators are restored at its end.
    """
    states = random.getstate(), np.random.get_bit_generator(), torch.get_rng_state()
    seed = int(np.random.SeedSequence(seeds).generate_state(1)[0])
    random.seed(seed)
    np.random.set_bit_generator(SEEDED_GENERATOR)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed also seeds the devices
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_bit_generator(states[1])
        torch.set_rng_state(states[2])

"""The order in which training reads its images, and the random numbers of each augmentation."""

import contextlib
import random
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from .streaming import ImageStream


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
    dataset: Dataset, repeats: int, batch_size: int, num_processes: int, seed: int
) -> "TrainSampler | StreamSampler":
    """
    A `StreamSampler` for a dataset with a `stream`, a `TrainSampler` for others. The `TrainSampler` yields `SampleKey`s if
    the dataset has `accepts_sample_keys`, otherwise indices.
    """
    stream = getattr(dataset, "stream", None)
    if stream is not None:
        return StreamSampler(stream, repeats, batch_size, num_processes)
    yield_keys = getattr(dataset, "accepts_sample_keys", False)
    return TrainSampler(len(dataset), repeats, batch_size, num_processes, seed, yield_keys)


class TrainSampler(Sampler):
    """
    Shuffles the images in each epoch.

    Repeated augmentation (Hoffer et al., CVPR 2020) reads fewer images, each `repeats` times with different augmentations.
    The length of an epoch stays the same. As in DeiT (Touvron et al., ICML 2021), different processes get the repeats of an
    image, as far as there are enough processes.

    Args:
        num_images: number of images in the dataset.
        repeats: number of times that an epoch shows an image.
        batch_size: batch size of one process.
        num_processes: number of processes that share the batches.
        seed: the seed and the epoch determine the order. It is the same in all processes.
        yield_keys: yield a `SampleKey` instead of the image's index.
    """

    def __init__(
        self, num_images: int, repeats: int, batch_size: int, num_processes: int, seed: int, yield_keys: bool = False
    ):
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
        order = torch.randperm(self.num_images, generator=generator)
        for position in interleave_processes(range(self.num_images), self.batch_size, self.num_processes):
            index = order[position // self.repeats].item()
            yield SampleKey(self.epoch, index, position % self.repeats) if self.yield_keys else index


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
    """

    def __init__(self, stream: ImageStream, repeats: int = 1, batch_size: int = 1, num_processes: int = 1):
        self.stream, self.repeats = stream, repeats
        self.batch_size, self.num_processes = batch_size, num_processes
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.stream)

    def __iter__(self) -> Iterator[StreamedSample]:
        samples = (
            StreamedSample(SampleKey(epoch, index, repeat), row)
            for epoch, index, row in self.stream.read(self.epoch)
            for repeat in range(self.repeats)
        )
        yield from interleave_processes(islice(samples, len(self)), self.batch_size, self.num_processes)


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

"""In which order training sees its images, and the random numbers of each time that it sees one."""

import contextlib
import random
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler


# numpy's generator inside of `seeded`: changing it takes a hundredth of the time of saving and restoring its state.
SHOWING_GENERATOR = np.random.MT19937(0)


class Showing(NamedTuple):
    """One of the times that an image is shown: the `repeat`-th in an epoch."""

    epoch: int
    index: int  # type: ignore[assignment]  # hides `tuple.index`, which nobody calls
    repeat: int


class Streamed(NamedTuple):
    """A showing of an image that comes in a stream, with the image: its row of the dataset, encoded."""

    showing: Showing
    row: dict


def deal(items: Iterable, batch_size: int, num_processes: int) -> Iterator:
    """
    Put items that are neighbours into batches of different processes.

    Batches go to the processes in turn, the first to process 0, the second to process 1; what is less than a batch for each
    of them is left in its order.
    """
    items = iter(items)
    while len(together := list(islice(items, batch_size * num_processes))) == batch_size * num_processes:
        for process in range(num_processes):
            yield from together[process::num_processes]
    yield from together


class TrainSampler(Sampler):
    """
    Every image once an epoch, in random order; or, with repeated augmentation, that many times fewer images several
    times each, to be augmented another way each time (Hoffer et al., CVPR 2020), in an epoch as long as without.

    The repeats of an image fall to different processes where there are enough, as in DeiT (Touvron et al., ICML 2021).

    Args:
        num_images: of the data set.
        repeats: of each image.
        batch_size: of one process.
        num_processes: that share the batches.
        seed: with the epoch it determines the order, the same in every process.
        showings: yield a `Showing` instead of the image's index.
    """

    def __init__(
        self, num_images: int, repeats: int, batch_size: int, num_processes: int, seed: int, showings: bool = False
    ):
        self.num_images, self.repeats = num_images, repeats
        self.batch_size, self.num_processes = batch_size, num_processes
        self.seed, self.showings = seed, showings
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_images

    def __iter__(self) -> Iterator[int | Showing]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(self.num_images, generator=generator)
        for position in deal(range(self.num_images), self.batch_size, self.num_processes):
            index = order[position // self.repeats].item()
            yield Showing(self.epoch, index, position % self.repeats) if self.showings else index


class StreamSampler(Sampler):
    """
    The images of a stream in its order, as `Streamed`; with repeated augmentation as in `TrainSampler`.

    The stream is read here, in the main process, and workers are sent encoded images to decode: so every image is shown
    once an epoch and in the same order, whatever the numbers of shards and workers. Every process reads the whole stream,
    as shards of unequal lengths cannot be shared out evenly before they are read, and decodes its own batches alone.

    Args:
        stream: `read(epoch)` gives epoch, index and row of one image after the other; as many as its length are taken.
        repeats, batch_size, num_processes: as of `TrainSampler`.
    """

    def __init__(self, stream, repeats: int = 1, batch_size: int = 1, num_processes: int = 1):
        self.stream, self.repeats = stream, repeats
        self.batch_size, self.num_processes = batch_size, num_processes
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.stream)

    def __iter__(self) -> Iterator[Streamed]:
        images = (
            Streamed(Showing(epoch, index, repeat), row)
            for epoch, index, row in self.stream.read(self.epoch)
            for repeat in range(self.repeats)
        )
        yield from deal(islice(images, len(self)), self.batch_size, self.num_processes)


def create_train_sampler(
    dataset: Dataset, repeats: int, batch_size: int, num_processes: int, seed: int
) -> TrainSampler | StreamSampler:
    """The sampler of a data set: of a stream where it has one, and of showings where it takes them."""
    stream = getattr(dataset, "stream", None)
    if stream is not None:
        return StreamSampler(stream, repeats, batch_size, num_processes)
    showings = getattr(dataset, "takes_showings", False)
    return TrainSampler(len(dataset), repeats, batch_size, num_processes, seed, showings)


@contextlib.contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Random numbers that depend on the key alone, of Python, numpy and torch on the CPU; afterwards all is as before."""
    states = random.getstate(), np.random.get_bit_generator(), torch.get_rng_state()
    seed = int(np.random.SeedSequence(key).generate_state(1)[0])
    random.seed(seed)
    np.random.set_bit_generator(SHOWING_GENERATOR)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the devices, too
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_bit_generator(states[1])
        torch.set_rng_state(states[2])

"""In which order training sees its images, and the random numbers of each time that it sees one."""

import contextlib
import random
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Sampler


class Showing(NamedTuple):
    """One of the times that an image is shown: the `repeat`-th in an epoch."""

    epoch: int
    index: int
    repeat: int


class TrainSampler(Sampler):
    """
    Every image once an epoch, in random order; or, with repeated augmentation, that many times fewer images several
    times each, to be augmented another way each time (Hoffer et al., CVPR 2020), in an epoch as long as without.

    Batches go to the processes in turn, the first to process 0, the second to process 1; the order is such that the
    repeats of an image fall to different processes where there are enough, as in DeiT (Touvron et al., ICML 2021).

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
        positions = torch.arange(self.num_images)
        whole = self.num_images - self.num_images % (self.batch_size * self.num_processes)
        # (rounds, batch_size, num_processes): neighbours to different processes
        rounds = positions[:whole].view(-1, self.batch_size, self.num_processes).transpose(1, 2).flatten()
        for position in [*rounds.tolist(), *positions[whole:].tolist()]:
            index = order[position // self.repeats].item()
            yield Showing(self.epoch, index, position % self.repeats) if self.showings else index


@contextlib.contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Random numbers that depend on the key alone, of Python, numpy and torch on the CPU; afterwards all is as before."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seed = int(np.random.SeedSequence(key).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the devices, too
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])

"""In which order training sees its images."""

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler


class RepeatedAugmentationSampler(Sampler[int]):
    """
    Every chosen image several times in a row of batches, to be augmented another way each time (Hoffer et al., CVPR
    2020). An epoch is as long as without, so it sees that many times fewer images.

    Batches go to the processes in turn, the first to process 0, the second to process 1; the order is such that the
    repeats of an image fall to different processes where there are enough, as in DeiT (Touvron et al., ICML 2021).

    Args:
        num_images: of the data set.
        repeats: of each image.
        batch_size: of one process.
        num_processes: that share the batches.
        seed: with the epoch it determines the order, the same in every process.
    """

    def __init__(self, num_images: int, repeats: int, batch_size: int, num_processes: int, seed: int):
        self.num_images, self.repeats = num_images, repeats
        self.batch_size, self.num_processes = batch_size, num_processes
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_images

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(self.num_images, generator=generator)
        order = order.repeat_interleave(self.repeats)[: self.num_images]
        whole = len(order) - len(order) % (self.batch_size * self.num_processes)
        # (rounds, batch_size, num_processes): neighbours to different processes
        rounds = order[:whole].view(-1, self.batch_size, self.num_processes).transpose(1, 2).flatten()
        return iter([*rounds.tolist(), *order[whole:].tolist()])

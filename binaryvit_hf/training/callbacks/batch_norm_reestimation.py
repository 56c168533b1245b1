"""
Re-estimation of batch norm statistics. Running statistics lag behind weights whose signs flip, and averaged weights have
none of their own.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from binaryvit_runtime.errors import UserError, counted

from ...data.sampling import create_train_sampler, seeded_rng
from ...data.workers import shield_workers


@torch.no_grad()
def reestimate_batch_norm(model: nn.Module, batches: Iterable[torch.Tensor]) -> None:
    """
    Set the running statistics of a model to their mean over `batches` of images, `(batch, channels, height, width)`.

    Each batch is normalised by its own statistics over all processes, as in training; every other module is in evaluation
    mode, as is the whole model afterwards. `num_batches_tracked` does not change. ("Precise BN", Wu & Johnson, 2021; for
    quantised weights Nagel et al., ICML 2022.)

    Raises:
        UserError: the model has no batch normalisation.
    """
    norms = find_batch_norms(model)
    before = [(norm.momentum, norm.num_batches_tracked.clone()) for norm in norms]
    model.eval()
    for norm in norms:
        norm.train()
    for number, images in enumerate(batches, start=1):
        for norm in norms:
            norm.momentum = 1 / number
        model(pixel_values=images)
    for norm, (momentum, count) in zip(norms, before):
        norm.momentum = momentum
        norm.num_batches_tracked.copy_(count)
    model.eval()


def find_batch_norms(model: nn.Module) -> list[nn.Module]:
    """The batch norm modules; raises UserError if there are none."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    if not norms:
        raise UserError(
            "--batch_norm_reestimation_batches is for networks with batch normalisation, which this is not."
        )
    return norms


def count_whole_batches(num_images: int, batch_size: int) -> int:
    """Number of whole batches; raises UserError if there are none."""
    if num_images < batch_size:
        raise UserError(
            f"--batch_norm_reestimation_batches: no whole batch of {batch_size} in {counted(num_images, 'image')}; reduce "
            "--per_device_train_batch_size."
        )
    return num_images // batch_size


def first_batches(dataset: Dataset, collate: Callable, count: int, args) -> Iterator[torch.Tensor]:
    """
    This process's images of the first `count` training batches; fewer if the dataset has fewer whole batches. The random
    state of training does not change.

    Args:
        args: the `DistillationTrainingArguments`.

    Raises:
        UserError: the dataset has no whole batch.
    """
    batch, processes, rank = args.train_batch_size, args.world_size, args.process_index
    count = min(count, count_whole_batches(len(dataset), batch * processes))
    sampler = create_train_sampler(dataset, 1, batch, processes, args.sampling_seed, args.balance_classes)
    keys = list(itertools.islice(sampler, count * batch * processes))
    own = [keys[start : start + batch] for start in range(rank * batch, len(keys), batch * processes)]
    loader = DataLoader(dataset, batch_sampler=own, collate_fn=collate, num_workers=args.dataloader_num_workers)
    with seeded_rng(args.sampling_seed):  # the loader draws a seed for its workers
        for inputs in shield_workers(loader):
            yield inputs["pixel_values"].to(args.device)

"""Check before training that batch normalisation can take statistics of every batch."""

import contextlib

import torch
from torch import nn

from binaryvit_runtime.errors import UserError, counted

from ..network.configuration_binaryvit import as_pair
from .arguments import DistillationTrainingArguments
from .callbacks.batch_norm_reestimation import count_whole_batches, find_batch_norms


def check_batches(network: nn.Module, num_images: int, arguments: DistillationTrainingArguments) -> None:
    """
    Args:
        network: on the meta device; it is set to training mode.
        num_images: images per epoch.

    Raises:
        UserError: an epoch has no batch, or batch normalisation has no statistics of a batch.
    """
    batch_size = arguments.train_batch_size * arguments.world_size
    if arguments.dataloader_drop_last and num_images < batch_size:
        raise UserError(
            f"--dataloader_drop_last leaves nothing to train on: no whole batch of {batch_size} in {counted(num_images, 'image')}; "
            "remove it, or reduce --per_device_train_batch_size."
        )
    if arguments.batch_norm_reestimation_batches:
        find_batch_norms(network)
        count_whole_batches(num_images, batch_size)
    if has_batch_of_one(num_images, arguments) and not trains_on_one_image(network):
        remedy = ", or add --dataloader_drop_last" if batch_size > 1 else ""
        raise UserError(
            f"A batch of one image, the last of {counted(num_images, 'image')} in batches of {batch_size}, has no statistics for the "
            f"batch normalisation of this network: change --per_device_train_batch_size{remedy}."
        )


def has_batch_of_one(num_images: int, arguments: DistillationTrainingArguments) -> bool:
    """Whether training meets a batch of one image. With several processes it does not: they fill up their last batches."""
    if arguments.world_size > 1:
        return False
    if arguments.train_batch_size == 1:
        return True
    whole = num_images // arguments.train_batch_size
    ends_before = 0 < arguments.max_steps * arguments.gradient_accumulation_steps <= whole
    return num_images % arguments.train_batch_size == 1 and not arguments.dataloader_drop_last and not ends_before


def trains_on_one_image(network: nn.Module) -> bool:
    """Try a forward in training mode on the meta device, which computes shapes only. Other errors than batch norm's pass."""
    size = getattr(network.config, "image_size", None)
    if size is None:
        return True
    try:
        with contextlib.suppress(RuntimeError):  # it may need more than shapes
            network.train()(pixel_values=torch.empty(1, 3, *as_pair(size), device="meta"))
    except ValueError as error:
        return "more than 1 value per channel" not in str(error)  # in the message of PyTorch's batch norm
    return True

"""Holds out training images for evaluation, from every class the same share."""

import logging
import math
from collections.abc import Sequence

import numpy as np
from datasets import Dataset

from binaryvit_runtime.errors import UserError, counted

from .arguments import HELD_OUT_SHARE


logger = logging.getLogger(__name__)

HELD_OUT_SEED = 0
NAMED_CLASSES = 10


def hold_out(splits: dict[str, Dataset], size: float | None) -> dict[str, Dataset]:
    """
    Divide the training images into `train` and `validation`. The division depends on the images alone, not on the run's
    seed, so a teacher and its student get the same one. An image that is added or removed changes all of the division:
    images that were held out before are trained on, and the other way round.

    Both parts have the classes in the same proportions. Every class with two or more images is in both parts, if `size` is
    large enough. The only image of a class stays in `train`.

    Args:
        size: share (below 1) or number of the images held out. Default: 0.15.

    Raises:
        UserError: there are no training images, or too few of them to hold out `size`.
    """
    if "train" not in splits:
        raise UserError(
            "--train_val_split holds out training images, and there are none: give --train_dir or --train_split_name, "
            "or leave it out."
        )
    if "validation" in splits:
        logger.warning("--train_val_split holds out training images, so the evaluation split is not used.")
    dataset, size = splits["train"], HELD_OUT_SHARE if size is None else size
    number = math.ceil(size * len(dataset)) if size < 1 else size
    remedy = "give images to evaluate on with --validation_dir or --validation_split_name"
    labels, names = np.array(dataset["label"][:]), dataset.features["label"].names
    counts = np.bincount(labels, minlength=len(names))
    most = sum(max(0, count - 1) for count in counts)
    if most == 0:
        raise UserError(
            "No image can be held out for evaluation, because every class keeps one to train on, and no class has more: "
            f"{describe_smallest(names, counts)}. Add images of these classes, or {remedy}."
        )
    if not 0 < size < 1 and (number >= len(dataset) or number != int(number)):
        raise UserError(
            f"--train_val_split is a share between 0 and 1 or a number of images below {len(dataset)}, not {size:g}; or "
            f"{remedy}."
        )
    if size < 1:  # a share of few images per class may need to grow, or to shrink
        number = min(max(number, sum(count > 1 for count in counts)), most)
    if not 0 < number <= most:
        raise UserError(
            f"--train_val_split {size:g} is too large: every class keeps an image to train on, so at most {most} of "
            f"{counted(len(dataset), 'image')} can be held out for evaluation ({describe_smallest(names, counts)}). Reduce it, "
            f"add images of these classes, or {remedy}."
        )
    alone = [name for name, count in zip(names, counts) if count == 1]
    if alone:
        logger.warning(
            "%s with a single image, which is trained on and not evaluated: %s%s.",
            counted(len(alone), "class"),
            ", ".join(map(repr, alone[:NAMED_CLASSES])),
            ", …" if len(alone) > NAMED_CLASSES else "",
        )
    # RandomState's numbers are the same in every version of numpy.
    order = np.random.RandomState(HELD_OUT_SEED).permutation(len(dataset))
    left, held_out = share_out(counts, int(number)), np.zeros(len(dataset), dtype=bool)
    for index in order:
        if left[labels[index]] > 0:
            left[labels[index]] -= 1
            held_out[index] = True
    return {"train": dataset.select(np.flatnonzero(~held_out)), "validation": dataset.select(np.flatnonzero(held_out))}


def describe_smallest(names: Sequence[str], counts: Sequence[int]) -> str:
    """The classes with the fewest images, each with its number: `'ant' has 1, 'bee' has 2`."""
    order = sorted(range(len(names)), key=lambda index: counts[index])
    named = ", ".join(f"{names[index]!r} has {counts[index]}" for index in order[:NAMED_CLASSES])
    return f"{named}, …" if len(names) > NAMED_CLASSES else named


def share_out(counts: Sequence[int], number: int) -> list[int]:
    """
    Divide a number of images among classes in proportion to their sizes.

    A class gives at most all of its images but one. It gives at least one if it has two and `number` suffices for all of
    these classes.

    Args:
        counts: images of each class.
        number: at most the sum of `count - 1` over the classes.
    """
    quotas = [number * count / max(1, sum(counts)) for count in counts]
    divisible = [count > 1 for count in counts]
    least = int(number >= sum(divisible))
    shares = [
        min(max(int(quota), least), count - 1) if can else 0 for quota, count, can in zip(quotas, counts, divisible)
    ]
    while sum(shares) != number:
        step = 1 if sum(shares) < number else -1
        free = [
            index
            for index, count in enumerate(counts)
            if divisible[index] and least <= shares[index] + step < count  # a class keeps one image
        ]
        index = max(free, key=lambda index: step * (quotas[index] - shares[index]))
        shares[index] += step
    return shares

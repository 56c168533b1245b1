"""Augmentation of single training images when they are read, and mixing of whole batches on the device."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from timm.data.auto_augment import rand_augment_transform
from torchvision.transforms import v2

from ..argument_checks import argument, check_ranges


ERASED_AREA, ERASED_ASPECT = (0.02, 1 / 3), (0.3, 1 / 0.3)  # Zhong et al., AAAI 2020; values of timm


@dataclass
class AugmentationArguments:
    """How training images are cropped, augmented and mixed. The defaults are the paper's for its students."""

    random_resized_crop_min_scale: float = argument(
        0.08, "Smallest share of the image's area in a random training crop; 1 is no crop."
    )
    horizontal_flip_prob: float = argument(0.5, "Probability of mirroring a training image.")
    rand_augment: str | None = argument(
        None, "RandAugment policy in timm's notation, such as rand-m9-mstd0.5-inc1. Default: none."
    )
    color_jitter: float = argument(
        0.0,
        "Change brightness, contrast and saturation by up to this share. Ignored with --rand_augment, which "
        "changes colours itself, as in DeiT's recipe.",
    )
    random_erasing_prob: float = argument(0.0, "Probability of filling a rectangle of a training image with noise.")
    mixup_alpha: float = argument(0.0, "Mixup: shares are from Beta(alpha, alpha); 0 is off.")
    cutmix_alpha: float = argument(0.0, "CutMix: areas are from Beta(alpha, alpha); 0 is off.")
    mixup_prob: float = argument(1.0, "Probability of mixing a batch, if mixing is on.")
    mixup_switch_prob: float = argument(0.5, "Probability of CutMix instead of mixup, if both are on.")

    def __post_init__(self):
        check_ranges(self)
        if self.rand_augment is not None:
            create_rand_augment(self.rand_augment, (224, 224), (0.5, 0.5, 0.5))


def create_rand_augment(policy: str, size: tuple[int, int], mean: tuple[float, ...]) -> Callable:
    """
    RandAugment (Cubuk et al., CVPR workshops 2020) for PIL images.

    Raises:
        ValueError: the policy is not in timm's notation.
    """
    # As in timm: uncovered areas get the mean colour, and shifts are at most 45 % of the shorter side.
    fill = tuple(min(255, round(255 * channel)) for channel in mean)
    try:
        return rand_augment_transform(policy, {"translate_const": int(min(size) * 0.45), "img_mean": fill})
    except (AssertionError, ValueError, KeyError, IndexError) as error:
        raise ValueError(f"rand_augment: {policy!r} is not a policy such as 'rand-m9-mstd0.5-inc1'.") from error


def create_train_transform(
    arguments: AugmentationArguments, size: tuple[int, int], mean: Sequence[float], std: Sequence[float]
) -> v2.Compose:
    """Create the random augmentation of a crop: `uint8 (3, height, width)` to a normalised float tensor of this shape."""
    distort = []
    if arguments.rand_augment is not None:
        distort.append(create_rand_augment(arguments.rand_augment, size, tuple(mean)))
    elif arguments.color_jitter > 0:
        distort.append(v2.ColorJitter(*[arguments.color_jitter] * 3))  # brightness, contrast and saturation
    if distort:
        distort = [v2.ToPILImage(), *distort, v2.PILToTensor()]
    steps = [v2.RandomHorizontalFlip(arguments.horizontal_flip_prob), *distort, Normalize(mean, std)]
    erase = create_erasing(arguments)
    return v2.Compose(steps if erase is None else [*steps, erase])


def create_erasing(arguments: AugmentationArguments) -> v2.RandomErasing | None:
    """Random erasing (Zhong et al., AAAI 2020) of a normalised image; `None` if it is off."""
    if arguments.random_erasing_prob == 0:
        return None
    return v2.RandomErasing(arguments.random_erasing_prob, ERASED_AREA, ERASED_ASPECT, value="random")


class Normalize:
    """`(pixels / 255 - mean) / std` of pixels from 0 to 255, `(…, 3, height, width)`: two passes over memory, torchvision needs four."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        offset, deviation = torch.tensor(mean).view(3, 1, 1), torch.tensor(std).view(3, 1, 1)
        self.scale, self.shift = 1 / (255 * deviation), -offset / deviation

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        pixels = pixels.to(torch.float32, memory_format=torch.contiguous_format)
        return pixels.mul_(self.scale).add_(self.shift)


def create_mix(arguments: AugmentationArguments, num_labels: int) -> Callable | None:
    """
    Mixup (Zhang et al., ICLR 2018) or CutMix (Yun et al., ICCV 2019) of a batch; `None` if both are off.

    The function takes `pixel_values (batch, channels, height, width)` and class indices `(batch,)`. It returns mixed images
    and the shares of their labels `(batch, num_labels)`. With probability `1 - mixup_prob` it returns its inputs.
    """
    kinds = []
    if arguments.cutmix_alpha > 0:
        kinds.append((v2.CutMix(alpha=arguments.cutmix_alpha, num_classes=num_labels), arguments.mixup_switch_prob))
    if arguments.mixup_alpha > 0:
        kinds.append((v2.MixUp(alpha=arguments.mixup_alpha, num_classes=num_labels), 1 - arguments.mixup_switch_prob))
    if not kinds:
        return None
    mix = kinds[0][0] if len(kinds) == 1 else v2.RandomChoice(*map(list, zip(*kinds)))
    return v2.RandomApply([mix], p=arguments.mixup_prob)

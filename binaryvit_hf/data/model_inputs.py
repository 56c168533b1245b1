"""The input of a model: image processors, and conversion of batches between a student and its teacher."""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from PIL import Image
from torch import nn
from transformers import BaseImageProcessor, PreTrainedConfig, PreTrainedModel, ViTImageProcessor
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from binaryvit_runtime.errors import UserError, first_sentence

from ..network.configuration_binaryvit import as_pair


BLACK, WHITE, COLOR = (0, 0, 0), (255, 255, 255), (51, 102, 204)
WIDE, TALL, SQUARE = (512, 768), (768, 512), (512, 512)  # height, width
RGB = (0, 1, 2)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelInput:
    """
    The input of an image classifier: `((rgb / 255 - mean) / std)[channels]`, a float tensor `(3, *size)`.

    Args:
        size: height and width in pixels.
        mean, std: of red, green and blue, for values from 0 to 1.
        channels: the order of red (0), green (1) and blue (2); `(2, 1, 0)` is BGR.
    """

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    channels: tuple[int, ...] = RGB

    def equals(self, other: "ModelInput") -> bool:
        """Whether both are equal within float32 rounding."""
        numbers = zip((*self.mean, *self.std), (*other.mean, *other.std))
        return (self.size, self.channels) == (other.size, other.channels) and all(equal(*pair) for pair in numbers)


def create_image_processor(config, crop_pct: float, like: ModelInput | None = None) -> ViTImageProcessor:
    """
    An image processor that resizes the shorter side to `image_size / crop_pct` (bicubic), crops the centre and normalises.

    Args:
        config: the model's config.
        like: an RGB input with the mean and standard deviation to use. Default: ImageNet's.

    Raises:
        UserError: the config has no image size.
    """
    if getattr(config, "image_size", None) is None:
        raise UserError(
            f"The config of the {config.model_type!r} has no image_size; add an image processor to the model "
            "(preprocessor_config.json)."
        )
    height, width = as_pair(config.image_size)
    resized = [round(side / crop_pct) for side in (height, width)]
    return ViTImageProcessor(
        size={"shortest_edge": resized[0]} if height == width else {"height": resized[0], "width": resized[1]},
        do_center_crop=True,
        crop_size={"height": height, "width": width},
        resample=Image.Resampling.BICUBIC,
        do_convert_rgb=True,
        image_mean=list(like.mean if like else IMAGENET_DEFAULT_MEAN),
        image_std=list(like.std if like else IMAGENET_DEFAULT_STD),
    )


def describe_input(
    processor: BaseImageProcessor, model_name: str, image_size: tuple[int, int] | None = None
) -> ModelInput:
    """
    Measure the output of an image processor for three images of one colour each.

    Its fields are not reliable: some processors ignore a field, shift after scaling, or store their steps elsewhere.

    Args:
        model_name: for messages.
        image_size: height and width of all images that the processor will get. Default: images of any shape.

    Raises:
        UserError: the processor fails, or does more than resize, crop, reorder channels, scale and shift.
    """
    shapes = (image_size,) * 3 if image_size else (WIDE, TALL, SQUARE)
    unsupported = partial(unsupported_processor, processor, model_name)
    images = zip(shapes, (BLACK, WHITE, COLOR))
    black, white, color = (process_uniform(processor, shape, rgb, unsupported) for shape, rgb in images)
    if not black.shape == white.shape == color.shape:
        raise unsupported("returns images of different sizes, which cannot form a batch")
    size = tuple(black.shape[1:])
    black, white, color = (image.double().flatten(1) for image in (black, white, color))
    span, shift = (white - black).mean(1), black.mean(1)
    ripple = max((image.amax(1) - image.amin(1)).max() for image in (black, white, color))
    if not (span.isfinite().all() and ripple < 1e-3 * span.abs().min()):
        raise unsupported("pads images, or scales them to nothing")
    channels = recognise_channels((255 * (color.mean(1) - shift) / span).tolist())
    if channels is None:
        raise unsupported("mixes channels, or changes values by more than a factor and a shift")
    order = [channels.index(channel) for channel in RGB]
    mean, std = (0 - shift / span)[order].tolist(), (1 / span)[order].tolist()
    mean = prefer_stated(mean, getattr(processor, "image_mean", None))
    std = prefer_stated(std, getattr(processor, "image_std", None))
    return ModelInput(size, mean, std, channels)


def recognise_channels(values: list[float]) -> tuple[int, ...] | None:
    """The index in `COLOR` of each value; `None` if the values are not a permutation of `COLOR`."""
    channels = tuple(min(RGB, key=lambda channel: abs(COLOR[channel] - value)) for value in values)
    exact = all(abs(COLOR[channel] - value) < 0.5 for channel, value in zip(channels, values))
    return channels if exact and sorted(channels) == list(RGB) else None


def process_uniform(
    processor: BaseImageProcessor, size: tuple[int, int], rgb: tuple[int, int, int], unsupported: Callable
) -> torch.Tensor:
    """The tensor `(3, height, width)` of an image of one colour; raises `unsupported(reason)` if there is none."""
    try:
        image = Image.new("RGB", size[::-1], rgb)
        pixel_values = processor(images=image, return_tensors="pt")["pixel_values"]
    except Exception as error:  # processors raise any exception
        raise unsupported(f"fails on an image of {size[0]} x {size[1]}: {first_sentence(error)}") from error
    if pixel_values.dim() != 4 or pixel_values.shape[:2] != (1, 3):
        raise unsupported(f"returns {tuple(pixel_values.shape)} for one image, not (1, 3, height, width)")
    return pixel_values[0]


def unsupported_processor(processor: BaseImageProcessor, model_name: str, reason: str) -> UserError:
    return UserError(
        f"{model_name}: its image processor, of class {type(processor).__name__}, {reason.rstrip('.')}; choose a model whose "
        "image processor only resizes, crops and normalises, or change its preprocessor_config.json."
    )


def prefer_stated(measured: list[float], stated) -> tuple[float, ...]:
    """The stated numbers if they equal the measured ones, which have rounding errors of float32."""
    if isinstance(stated, (list, tuple)) and len(stated) == len(measured) and all(map(equal, measured, stated)):
        return tuple(stated)
    return tuple(measured)


def equal(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=1e-6, abs_tol=1e-9)


class InputAdapter(nn.Module):
    """
    Converts a batch for one model into a batch for another: size, order of channels, mean and standard deviation.

    `(batch, 3, *given.size)` -> `(batch, 3, *wanted.size)`. Linear in the images, so it can follow mixup and CutMix.
    """

    def __init__(self, given: ModelInput, wanted: ModelInput):
        super().__init__()
        self.size = None if wanted.size == given.size else wanted.size
        order = [given.channels.index(channel) for channel in wanted.channels]
        numbers = (given.mean, given.std, wanted.mean, wanted.std)
        rows = torch.tensor(numbers, dtype=torch.float64)[:, list(wanted.channels), None, None]
        given_mean, given_std, mean, std = rows
        self.register_buffer("order", torch.tensor(order), persistent=False)
        self.register_buffer("scale", (given_std / std).float(), persistent=False)
        self.register_buffer("shift", ((given_mean - mean) / std).float(), persistent=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if self.size is not None:
            images = nn.functional.interpolate(images, self.size, mode="bicubic", antialias=True)
        return images.index_select(1, self.order) * self.scale + self.shift


def adapt_input(model: nn.Module, given: ModelInput, wanted: ModelInput) -> None:
    """Make a model accept batches of another model's input. If both inputs are equal, the model is unchanged."""
    if not given.equals(wanted):
        model.input_adapter = InputAdapter(given, wanted)  # a sub-module, so it moves with the model
        model.register_forward_pre_hook(adapt_pixel_values, with_kwargs=True)


def adapt_pixel_values(model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    return args, kwargs | {"pixel_values": model.input_adapter(kwargs["pixel_values"])}


def teacher_normalization(processor: BaseImageProcessor | None, student: PreTrainedConfig) -> ModelInput | None:
    """
    The teacher's input, for a new student to have the same mean and standard deviation. `None` if it is not RGB, or if a
    mean or deviation is not one of values from 0 to 1.
    """
    if processor is None:
        return None
    teacher_input = describe_input(processor, "The teacher", as_pair(student.image_size))
    plausible = all(0 <= mean <= 1 and 0.05 < std <= 1 for mean, std in zip(teacher_input.mean, teacher_input.std))
    return teacher_input if plausible and teacher_input.channels == RGB else None


def describe_teacher_input(
    teacher: PreTrainedModel, processor: BaseImageProcessor | None, student: ModelInput, model_name: str
) -> ModelInput:
    """
    The teacher's input. A teacher without a processor gets the student's normalisation, in the image size of the teacher's
    config.
    """
    if processor is not None:
        return describe_input(processor, model_name, student.size)
    logger.info("%s has no image processor; its images get the normalisation of the student.", model_name)
    size = getattr(teacher.config, "image_size", None)
    return student if size is None else replace(student, size=as_pair(size))


def check_forward(model: PreTrainedModel, given: ModelInput, model_name: str) -> None:
    """
    Run a model, in evaluation mode, on one image.

    Raises:
        UserError: the model fails, or does not return one logit per label.
    """
    images = torch.zeros(1, 3, *given.size, device=model.device)
    try:
        with torch.no_grad():
            shape = tuple(model(pixel_values=images).logits.shape)
    except Exception as error:  # models raise any exception
        raise UserError(
            f"{model_name} cannot classify images of {given.size[0]} x {given.size[1]} pixels, the size in its image "
            f"processor or config: {first_sentence(error)}"
        ) from error
    if shape != (1, model.config.num_labels):
        raise UserError(f"{model_name} returns logits {shape} for one image, not (1, {model.config.num_labels}).")

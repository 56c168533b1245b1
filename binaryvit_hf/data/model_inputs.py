"""The pixels that a model was made for, and how a batch made for one model becomes another's."""

import logging
import math
from dataclasses import dataclass, replace

import torch
from PIL import Image
from torch import nn
from transformers import BaseImageProcessor, PreTrainedConfig, PreTrainedModel, ViTImageProcessor
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from ..errors import UserError, first_sentence
from ..network.configuration_binaryvit import as_pair


BLACK, WHITE, COLOR = (0, 0, 0), (255, 255, 255), (51, 102, 204)
WIDE, TALL, SQUARE = (512, 768), (768, 512), (512, 512)  # height, width
RGB = (0, 1, 2)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelInput:
    """
    What an image classifier takes: `((rgb / 255 - mean) / std)[channels]`, a float tensor `(3, *size)`.

    Args:
        size: height and width in pixels.
        mean, std: of red, green and blue, for values from 0 to 1.
        channels: the model's channels as indices of red, green and blue; `(2, 1, 0)` is BGR.
    """

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    channels: tuple[int, ...] = RGB

    def equals(self, other: "ModelInput") -> bool:
        """Whether both are the same, rounding aside."""
        numbers = zip((*self.mean, *self.std), (*other.mean, *other.std))
        return (self.size, self.channels) == (other.size, other.channels) and all(equal(*pair) for pair in numbers)


def create_image_processor(config, crop_pct: float, like: ModelInput | None = None) -> ViTImageProcessor:
    """
    Resize the shorter side to the image size over `crop_pct` (bicubic), crop the centre, normalise. Mean and deviation
    are those of `like`, of RGB images; default: ImageNet's.

    Raises:
        UserError: the config has no image size.
    """
    if getattr(config, "image_size", None) is None:
        raise UserError(
            f"The config of a {config.model_type!r} has no image_size, and there is no image processor to tell it; write "
            "one beside the model (preprocessor_config.json)."
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


def describe_input(processor: BaseImageProcessor, who: str, image_size: tuple[int, int] | None = None) -> ModelInput:
    """
    Measure what an image processor makes of three images of one colour each.

    Its fields do not tell: some processors ignore a field, shift after scaling, or keep their steps in another form.

    Args:
        who: the model, for messages.
        image_size: height and width of the images that the processor will get. Default: images of any shape.

    Raises:
        UserError: the processor fails, or does more than resize, crop, reorder channels, scale and shift.
    """
    shapes = (image_size,) * 3 if image_size else (WIDE, TALL, SQUARE)
    black, white, color = (
        process_uniform(processor, shape, rgb, who) for shape, rgb in zip(shapes, (BLACK, WHITE, COLOR))
    )
    if not black.shape == white.shape == color.shape:
        raise refusal(processor, who, "makes images of another size of each shape of image, and they form no batch")
    size = tuple(black.shape[1:])
    black, white, color = (image.double().flatten(1) for image in (black, white, color))
    span, shift = (white - black).mean(1), black.mean(1)
    ripple = max((image.amax(1) - image.amin(1)).max() for image in (black, white, color))
    if not (span.isfinite().all() and ripple < 1e-3 * span.abs().min()):
        raise refusal(processor, who, "pads images, or scales them to nothing")
    channels = recognise_channels((255 * (color.mean(1) - shift) / span).tolist())
    if channels is None:
        raise refusal(processor, who, "mixes channels, or changes values by more than a factor and a shift")
    order = [channels.index(channel) for channel in RGB]
    mean, std = (0 - shift / span)[order].tolist(), (1 / span)[order].tolist()
    mean = as_stated(mean, getattr(processor, "image_mean", None))
    std = as_stated(std, getattr(processor, "image_std", None))
    return ModelInput(size, mean, std, channels)


def recognise_channels(values: list[float]) -> tuple[int, ...] | None:
    """Which of `COLOR`'s channels each value is, or `None` where it is none, or not each is there."""
    channels = tuple(min(RGB, key=lambda channel: abs(COLOR[channel] - value)) for value in values)
    exact = all(abs(COLOR[channel] - value) < 0.5 for channel, value in zip(channels, values))
    return channels if exact and sorted(channels) == list(RGB) else None


def process_uniform(processor, size: tuple[int, int], rgb: tuple[int, int, int], who: str) -> torch.Tensor:
    """`(3, height, width)` of an image of one colour."""
    try:
        image = Image.new("RGB", size[::-1], rgb)
        pixel_values = processor(images=image, return_tensors="pt")["pixel_values"]
    except Exception as error:  # processors raise whatever their libraries raise
        raise refusal(
            processor, who, f"fails on an image of {size[0]} x {size[1]}: {first_sentence(error)}"
        ) from error
    if pixel_values.dim() != 4 or pixel_values.shape[:2] != (1, 3):
        raise refusal(processor, who, f"makes {tuple(pixel_values.shape)} of one image, not (1, 3, height, width)")
    return pixel_values[0]


def refusal(processor: BaseImageProcessor, who: str, reason: str) -> UserError:
    return UserError(
        f"{who}: its image processor, of class {type(processor).__name__}, {reason.rstrip('.')}; choose a model of which the "
        "image processor only resizes, crops and normalises, or change its preprocessor_config.json."
    )


def as_stated(measured: list[float], stated) -> tuple[float, ...]:
    """The processor's own numbers where they are the measured ones, which float32 has rounded."""
    if isinstance(stated, (list, tuple)) and len(stated) == len(measured) and all(map(equal, measured, stated)):
        return tuple(stated)
    return tuple(measured)


def equal(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=1e-6, abs_tol=1e-9)


class InputAdapter(nn.Module):
    """
    Turns a batch made for one model into another's: its size, its order of channels, its mean and deviation.

    `(batch, 3, *given.size)` -> `(batch, 3, *wanted.size)`. Linear in the images, so mixed images stay mixed.
    """

    def __init__(self, given: ModelInput, wanted: ModelInput):
        super().__init__()
        self.size = None if wanted.size == given.size else wanted.size
        order = [given.channels.index(channel) for channel in wanted.channels]
        numbers = (given.mean, given.std, wanted.mean, wanted.std)
        given_mean, given_std, mean, std = torch.tensor(numbers, dtype=torch.float64)[
            :, list(wanted.channels), None, None
        ]
        self.register_buffer("order", torch.tensor(order), persistent=False)
        self.register_buffer("scale", (given_std / std).float(), persistent=False)
        self.register_buffer("shift", ((given_mean - mean) / std).float(), persistent=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if self.size is not None:
            images = nn.functional.interpolate(images, self.size, mode="bicubic", antialias=True)
        return images.index_select(1, self.order) * self.scale + self.shift


def adapt_input(model: nn.Module, given: ModelInput, wanted: ModelInput) -> None:
    """Have a model take batches that were made for another. Where both inputs are equal it gets the same tensor."""
    if not given.equals(wanted):
        model.input_adapter = InputAdapter(given, wanted)  # a module of the model, to move with it
        model.register_forward_pre_hook(adapt_pixel_values, with_kwargs=True)


def adapt_pixel_values(model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    return args, kwargs | {"pixel_values": model.input_adapter(kwargs["pixel_values"])}


def teacher_normalization(processor: BaseImageProcessor | None, student: PreTrainedConfig) -> ModelInput | None:
    """The teacher's input for a new student to share, if it is RGB, about 0 to 1, and scaled no further than usual."""
    if processor is None:
        return None
    teacher_input = describe_input(processor, "The teacher", as_pair(student.image_size))
    ordinary = all(0 <= mean <= 1 and 0.05 < std <= 1 for mean, std in zip(teacher_input.mean, teacher_input.std))
    return teacher_input if ordinary and teacher_input.channels == RGB else None


def describe_teacher_input(
    teacher: PreTrainedModel, processor: BaseImageProcessor | None, student: ModelInput, who: str
) -> ModelInput:
    """What a teacher takes; without a processor what the student takes, in the size of its config if it has one."""
    if processor is not None:
        return describe_input(processor, who, student.size)
    logger.info("%s has no image processor; its images are normalised as the student's.", who)
    size = getattr(teacher.config, "image_size", None)
    return student if size is None else replace(student, size=as_pair(size))


def check_forward(model: PreTrainedModel, given: ModelInput, who: str) -> None:
    """
    Try a loaded model, in evaluation mode, on an image.

    Raises:
        UserError: the model does not take a batch of such images, or does not answer with a logit for each label.
    """
    images = torch.zeros(1, 3, *given.size, device=model.device)
    try:
        with torch.no_grad():
            shape = tuple(model(pixel_values=images).logits.shape)
    except Exception as error:  # models raise whatever their layers raise
        raise UserError(
            f"{who} cannot classify images of {given.size[0]} x {given.size[1]} pixels, which its image processor or its "
            f"config says it takes: {first_sentence(error)}"
        ) from error
    if shape != (1, model.config.num_labels):
        raise UserError(f"{who} answers with logits {shape}, not (1, {model.config.num_labels}), for one image.")

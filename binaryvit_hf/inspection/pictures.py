"""The pictures that activations and attention are measured on."""

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple, TypeAlias

import torch
from PIL import Image
from transformers import BaseImageProcessor, PreTrainedModel

from binaryvit_runtime.image_files import ImageFile
from binaryvit_runtime.pixels import describe_unreadable, open_picture, read_background, to_rgb


MOST_PICTURES = 256
BATCH_SIZE = 16


Picture: TypeAlias = ImageFile | Image.Image  # a file, or a decoded RGB picture on the model's background


class Pictures(NamedTuple):
    """
    Args:
        pictures: to measure on.
        found: number of pictures that they were chosen from.
        kind: what they are: pictures that the user gave, the model's examples, or pictures that its run was evaluated on.
    """

    pictures: Sequence[Picture]
    found: int
    kind: Literal["picture", "example picture", "evaluation picture"]


def choose_evenly(pictures: Sequence[Picture], most: int = MOST_PICTURES) -> list[Picture]:
    """At most `most` pictures, evenly spaced, because those of one class lie side by side."""
    if len(pictures) <= most:
        return list(pictures)
    return [pictures[index * len(pictures) // most] for index in range(most)]


def choose_given(files: Sequence[ImageFile]) -> Pictures:
    """Pictures that the user gave. Names without a file are all kept, because each is an error to report."""
    faults = [file for file in files if file.fault is not None]
    return Pictures([*faults, *choose_evenly([file for file in files if file.fault is None])], len(files), "picture")


def read_batches(
    pictures: Sequence[Picture], model: PreTrainedModel, processor: BaseImageProcessor, faults: list[str]
) -> Iterator[torch.Tensor]:
    """
    Yield the inputs of the network, `(images, channels, height, width)`, in its dtype. Pictures that it cannot take are left
    out, and `faults` gets a sentence for each of them.
    """
    background, shape = read_background(processor), model.base_model.embeddings.image_shape
    batch: list[torch.Tensor] = []
    for picture in pictures:
        name, fault = (repr(picture), None) if isinstance(picture, Image.Image) else picture
        if fault is not None:
            faults.append(f"{name!r} {fault}.")
            continue
        try:
            rgb = picture if isinstance(picture, Image.Image) else read_picture(name, background)
            inputs = processor(images=rgb, return_tensors="pt")["pixel_values"]
        except Exception as error:  # Pillow raises anything for a damaged file
            faults.append(describe_unreadable(name, error))
            continue
        if tuple(inputs.shape[1:]) != shape:
            faults.append(f"{name!r} becomes an image of {tuple(inputs.shape[1:])}, but the network takes {shape}.")
            continue
        batch.append(inputs.to(model.dtype))
        if len(batch) == BATCH_SIZE:
            yield torch.cat(batch)
            batch = []
    if batch:
        yield torch.cat(batch)


def read_picture(name: str, background: str | None) -> Image.Image:
    with open_picture(name) as picture:
        return to_rgb(picture, background)

"""Decodes images: whole for evaluation; for training a random crop, at no more resolution than it needs."""

import io
import math
import os
from urllib.parse import quote_from_bytes, unquote_to_bytes

import fsspec
import numpy as np
import torch
from PIL import Image
from torch import nn
from torchvision.transforms import v2

from binaryvit_runtime.pixels import find_orientation, open_picture, to_rgb


QUOTED = "\0"  # marks a quoted path; file names cannot contain it


def open_encoded(encoded: dict | None) -> Image.Image:
    """
    Open an image of a dataset, `{"bytes", "path"}`. This reads its header, not its pixels.

    Raises:
        Exception: the image is missing, or Pillow cannot open it.
    """
    encoded = encoded or {}
    if encoded.get("bytes") is not None:
        return open_picture(io.BytesIO(encoded["bytes"]))
    if encoded.get("path") is None:
        raise ValueError("there is none")
    if "://" in encoded["path"]:  # an image of a stream
        with fsspec.open(encoded["path"]) as file:
            return open_picture(io.BytesIO(file.read()))
    return open_picture(unquote_path(encoded["path"]))


def quote_path(path: str) -> str:
    """The path as a string that a dataset can hold. Its strings are UTF-8, but file names can have any bytes."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return QUOTED + quote_from_bytes(os.fsencode(path))
    return path


def unquote_path(path: str) -> str:
    """The inverse of `quote_path`."""
    return os.fsdecode(unquote_to_bytes(path[len(QUOTED) :])) if path.startswith(QUOTED) else path


def decode_image(encoded: dict | None, background: str | None = None) -> Image.Image:
    """The whole image in RGB (see `pixels.to_rgb`)."""
    return to_rgb(open_encoded(encoded), background)


class CroppingDecoder(nn.Module):
    """
    A random crop of an encoded image, resized (bicubic): `uint8 (3, height, width)`.

    `v2.RandomResizedCrop` draws the box from the size of the upright image. If the box is large, a JPEG is decoded at 1/2,
    1/4 or 1/8 of its size, but with at least the pixels of the crop. Otherwise torch resizes: several times as fast as
    Pillow, and some values differ by 1 of 255.

    Args:
        size: height and width of the crop.
        min_scale: smallest share of the image's area.
        background: colour behind transparent pixels.
    """

    def __init__(self, size: tuple[int, int], min_scale: float, background: str | None = None):
        super().__init__()
        self.size, self.background = size, background
        self.crop = v2.RandomResizedCrop(size, scale=(min_scale, 1.0))

    def reduce(self, encoded: dict | None) -> np.ndarray:
        """The whole upright image, `uint8 (height, width, 3)`, at the smallest size that gives every crop its pixels."""
        side = math.ceil(max(self.size) / math.sqrt(self.crop.scale[0]))
        image = open_encoded(encoded)
        draft(image, min(image.size) // side)
        image = to_rgb(image, self.background)
        if min(image.size) > side:
            scale = side / min(image.size)
            image = image.resize([max(side, round(scale * length)) for length in image.size], Image.Resampling.BICUBIC)
        return np.array(image)

    def forward(self, encoded: dict | np.ndarray | None) -> torch.Tensor:
        """
        Args:
            encoded: an image of a dataset, or its pixels from `reduce`.
        """
        image = Image.fromarray(encoded) if isinstance(encoded, np.ndarray) else open_encoded(encoded)
        upright = image
        if not is_jpeg(image):
            image = upright = to_rgb(image, self.background)
        elif find_orientation(image) > 4:
            upright = torch.empty(image.width, image.height, device="meta")
        box = self.crop.make_params([upright])
        return self.decode(image, box["top"], box["left"], box["height"], box["width"])

    def decode(self, image: Image.Image, top: int, left: int, height: int, width: int) -> torch.Tensor:
        """The crop of a box, given in pixels of the upright image."""
        scale = draft(image, min(width // self.size[1], height // self.size[0]))
        image = to_rgb(image, self.background)
        if scale == 1:
            cropped = to_tensor(image.crop((left, top, left + width, top + height)))
            return nn.functional.interpolate(cropped[None], self.size, mode="bicubic", antialias=True)[0]
        # The corners of the box lie between pixels. `resize` of Pillow accepts that.
        box = (left / scale, top / scale, (left + width) / scale, (top + height) / scale)
        return to_tensor(image.resize(self.size[::-1], Image.Resampling.BICUBIC, box=box))


def is_jpeg(image: Image.Image) -> bool:
    return image.format in ("JPEG", "MPO")


def draft(image: Image.Image, most: int) -> float:
    """
    Make Pillow decode a JPEG at 1/2, 1/4 or 1/8 of its size.

    Args:
        most: largest reduction.

    Returns:
        The reduction; 1 if the image is decoded in full.
    """
    width = image.width
    if most <= 1 or not is_jpeg(image):
        return 1
    if (width % 8 or image.height % 8) and find_orientation(image) > 1:
        return 1  # turning would move the partial last pixel to the front and shift the box
    drafted = image.draft(None, (width // most, image.height // most))
    return 1 if drafted is None else width / drafted[1][2]


def to_tensor(image: Image.Image) -> torch.Tensor:
    """`uint8 (3, height, width)` of an RGB image, channels last in memory."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)

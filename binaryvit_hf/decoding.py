"""Encoded images to pixels: whole for evaluation, a random crop for training, no finer than it will be seen."""

import io

import fsspec
import numpy as np
import torch
from PIL import Image
from torch import nn
from torchvision.transforms import v2


def open_encoded(encoded: dict | None) -> Image.Image:
    """The image of a dataset's `{"bytes", "path"}`, its header read and its pixels not yet."""
    encoded = encoded or {}
    if encoded.get("bytes") is not None:
        return Image.open(io.BytesIO(encoded["bytes"]))
    if encoded.get("path") is None:
        raise ValueError("there is none")
    if "://" in encoded["path"]:  # of a stream, on the Hub
        with fsspec.open(encoded["path"]) as file:
            return Image.open(io.BytesIO(file.read()))
    return Image.open(encoded["path"])


def decode_image(encoded: dict | None) -> Image.Image:
    return to_rgb(open_encoded(encoded))


def to_rgb(image: Image.Image) -> Image.Image:
    image.load()
    return image if image.mode == "RGB" else image.convert("RGB")


class CroppingDecoder(nn.Module):
    """
    A random crop of an encoded image as `uint8 (3, height, width)`: boxes as `v2.RandomResizedCrop` draws them, bicubic.

    The box is drawn by the header's size. A JPEG of which the box is large is decoded at half, a quarter or an eighth of its
    size, as long as the box keeps the pixels of the crop. Where it is not, torch resizes, several times as fast as Pillow
    and to the same values but for one step of 255 here and there.

    Args:
        size: height and width of the crop.
        min_scale: smallest share of the image's area.
    """

    def __init__(self, size: tuple[int, int], min_scale: float):
        super().__init__()
        self.size = size
        self.crop = v2.RandomResizedCrop(size, scale=(min_scale, 1.0))

    def forward(self, encoded: dict | None) -> torch.Tensor:
        image = open_encoded(encoded)
        box = self.crop.make_params([image])
        return self.decode(image, box["top"], box["left"], box["height"], box["width"])

    def decode(self, image: Image.Image, top: int, left: int, height: int, width: int) -> torch.Tensor:
        scale = draft(image, min(width // self.size[1], height // self.size[0]))
        if scale == 1:
            cropped = to_tensor(to_rgb(image.crop((left, top, left + width, top + height))))
            return nn.functional.interpolate(cropped[None], self.size, mode="bicubic", antialias=True)[0]
        # The box falls between the pixels, which Pillow's resize takes.
        box = (left / scale, top / scale, (left + width) / scale, (top + height) / scale)
        return to_tensor(to_rgb(image).resize(self.size[::-1], Image.Resampling.BICUBIC, box=box))


def draft(image: Image.Image, most: int) -> float:
    """Have a JPEG decoded smaller, by 8, 4 or 2, which its decoder can, but not by more than `most`; returns by what."""
    width = image.width
    drafted = image.draft(None, (width // most, image.height // most)) if most > 1 else None
    return 1 if drafted is None else width / drafted[1][2]  # None of other files than JPEGs


def to_tensor(image: Image.Image) -> torch.Tensor:
    """`uint8 (3, height, width)` of an RGB image, channels last in memory."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)

"""Image files, and how an image becomes the input of a network."""

import glob
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError
from transformers import BaseImageProcessor, ViTImageProcessor
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from .configuration_binaryvit import as_pair
from .errors import UserError, first_sentence


BROKEN_IMAGE_ERRORS = (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError)


def list_images(names: list[str]) -> list[Path]:
    """
    The files that names stand for: each a file, a folder (every image in it and below) or a pattern with `*`, `?`, `[]`.

    Raises:
        UserError: a name stands for no image.
    """
    files = []
    for name in names:
        path = Path(name)
        if path.is_dir():
            found = sorted(file for file in path.rglob("*") if is_image_name(file))
        elif path.exists():
            found = [path]
        else:
            found = sorted(Path(match) for match in glob.glob(name, recursive=True) if Path(match).is_file())
        if not found:
            raise UserError(f"There is no image {name!r}.")
        files += found
    return files


def is_image_name(path: Path) -> bool:
    return path.suffix.lower() in Image.registered_extensions() and not path.name.startswith(".")


def open_image(path: Path) -> Image.Image:
    """
    Raises:
        UserError: the file is no image, or a broken one.
    """
    try:
        return ImageOps.exif_transpose(Image.open(path)).convert("RGB")  # upright, as transformers' pipelines see it
    except BROKEN_IMAGE_ERRORS as error:
        raise UserError(f"{str(path)!r} is no image that can be read ({first_sentence(error)}).") from error


def create_image_processor(config, crop_pct: float, like: BaseImageProcessor | None = None) -> ViTImageProcessor:
    """
    Resize the shorter side to the image size over `crop_pct` (bicubic), crop the centre, normalise. Mean and deviation
    are those of `like`, the teacher's processor, whose inputs the student shares; otherwise ImageNet's.
    """
    height, width = as_pair(config.image_size)
    resized = [round(side / crop_pct) for side in (height, width)]
    return ViTImageProcessor(
        size={"shortest_edge": resized[0]} if height == width else {"height": resized[0], "width": resized[1]},
        do_center_crop=True,
        crop_size={"height": height, "width": width},
        resample=Image.Resampling.BICUBIC,
        do_convert_rgb=True,
        image_mean=list(getattr(like, "image_mean", None) or IMAGENET_DEFAULT_MEAN),
        image_std=list(getattr(like, "image_std", None) or IMAGENET_DEFAULT_STD),
    )

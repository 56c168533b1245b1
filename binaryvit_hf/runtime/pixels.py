"""Reads pictures: training, evaluation, checks and `binaryvit classify` all get the same pixels of a file."""

import os
import stat
import threading
import warnings
from typing import Any, BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageColor, UnidentifiedImageError

from .errors import UserError, first_sentence


# By EXIF orientation, as in `PIL.ImageOps.exif_transpose`. Orientation 1 is upright.
ORIENTATION_TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
MAX_ASPECT_RATIO = 1000  # resizing the shorter side of a longer picture would run out of memory
MAX_PIXELS = 2**27  # decoding and resizing them takes more than 1 GB of memory
NO_BACKGROUND = "none"  # as an argument: transparency is dropped, whatever the model's background
PIXEL_LIMIT_LOCK = threading.Lock()  # held while Pillow's limit is disabled for the process
if hasattr(os, "register_at_fork"):  # a forked process gets the lock free and the limit enabled
    os.register_at_fork(
        before=PIXEL_LIMIT_LOCK.acquire,
        after_in_parent=PIXEL_LIMIT_LOCK.release,
        after_in_child=PIXEL_LIMIT_LOCK.release,
    )

# Pillow's warnings would only repeat ours about large pictures, damaged EXIF and transparent palettes.
warnings.filterwarnings("ignore", module=r"PIL\.")


def open_picture(source: str | os.PathLike | BinaryIO, max_pixels: int | None = None) -> Image.Image:
    """
    Open a picture. Its header is read, and its pixels are not.

    Args:
        max_pixels: the largest number of pixels. Default: `MAX_PIXELS`.

    Raises:
        PIL.Image.DecompressionBombError: it has more than `max_pixels`, or an aspect ratio above `MAX_ASPECT_RATIO`.
        Exception: Pillow cannot open it.
    """
    # Opening a FIFO would wait for a writer.
    if isinstance(source, (str, os.PathLike)) and not stat.S_ISREG(os.stat(source).st_mode):
        raise OSError("it is not a regular file")
    try:
        picture = Image.open(source)
    except Image.DecompressionBombError:
        picture = open_unlimited(source)
    except UnidentifiedImageError as error:  # its message may contain a memory address
        raise UnidentifiedImageError("it has no format that Pillow knows") from error
    fault, most = None, max_pixels or MAX_PIXELS
    if picture.width * picture.height > most:
        fault = f"more than {most}; make it smaller, or remove it"
    elif max(picture.size) > MAX_ASPECT_RATIO * min(picture.size):
        fault = f"one side more than {MAX_ASPECT_RATIO} times the other; cut it, or remove it"
    if fault is not None:
        picture.close()
        raise Image.DecompressionBombError(f"it has {picture.width} x {picture.height} pixels, {fault}")
    return picture


def open_unlimited(source: str | os.PathLike | BinaryIO) -> Image.Image:
    """Open a picture of any size, to learn its size."""
    with PIXEL_LIMIT_LOCK:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(source)
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def to_rgb(picture: Image.Image, background: str | None = None) -> Image.Image:
    """
    Decode a picture to RGB, 8 bits per channel.

    - EXIF's orientation turns it upright. Damaged EXIF is ignored.
    - 16-bit grey values are divided by 257. 32-bit and float values are scaled by their range (see `to_8_bits`).
    - All other modes use Pillow's `convert("RGB")`. Transparency is dropped, or composited on `background`.

    transformers' pipelines differ in two points: they clip values above 255, and put a single transparent colour, of a
    palette or of RGB, on white.

    Args:
        background: a colour, such as `white` or `#ffcc00`.

    Raises:
        ValueError: the range of 32-bit or float values is unknown.
        Exception: the file is damaged.
    """
    picture.load()  # Pillow turns a TIFF in `load`
    turn = ORIENTATION_TRANSPOSES.get(find_orientation(picture))
    picture = to_8_bits(picture)
    if turn is not None:
        transparency = {name: value for name, value in picture.info.items() if name == "transparency"}
        picture = picture.transpose(turn)
        picture.info = transparency  # without the orientation, which no longer applies
    if background is not None and may_be_transparent(picture):
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, background), picture.convert("RGBA"))
    if picture.mode != "RGB":
        picture = picture.convert("RGB")
    if "transparency" in picture.info:  # a colour, which transformers' image processors would replace by white
        picture = picture.copy()
        del picture.info["transparency"]
    return picture


def find_orientation(picture: Image.Image) -> int:
    """EXIF's orientation, 1 to 8; 1 if EXIF is missing or damaged."""
    try:
        orientation = int(picture.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # Pillow raises any exception on damaged EXIF
        return 1
    return orientation if orientation in ORIENTATION_TRANSPOSES else 1


def to_8_bits(picture: Image.Image) -> Image.Image:
    """
    Scale values of more than 8 bits to 8 bits. Other pictures are returned unchanged.

    The range of 16-bit values is 0 to 65535. The range of 32-bit values is the smallest of 0 to 1 (only floats), 0 to 255
    and 0 to 65535 that contains all of them.

    Raises:
        ValueError: a value is below 0, above 65535 or not a number.
    """
    if picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format in ("PNG", "PPM")):
        ranges: tuple[int, ...] = (65535,)
    elif picture.mode in ("I", "F"):
        ranges = (255, 65535) if picture.mode == "I" else (1, 255, 65535)
    else:
        return picture
    values = np.asarray(picture.convert("I") if picture.mode.startswith("I;16") else picture).astype(np.float32)
    low, high = values.min(), values.max()
    top = next((top for top in ranges if low >= 0 and high <= top), None)
    if top is None:
        raise ValueError(f"its values, {low:g} to {high:g}, have no known range; save it with 8 or 16 bits")
    opaque = values != picture.info["transparency"] if "transparency" in picture.info else None
    values *= 255 / top
    grey = Image.fromarray(np.rint(values, out=values).astype(np.uint8))
    return grey if opaque is None else Image.merge("LA", (grey, Image.fromarray(opaque).convert("L")))


def may_be_transparent(picture: Image.Image) -> bool:
    """Whether the mode, header or palette allows transparency."""
    return (
        picture.mode in ("RGBA", "LA", "PA", "RGBa", "La")
        or "transparency" in picture.info
        or (picture.mode == "P" and getattr(picture.palette, "mode", "RGB") == "RGBA")
    )


def is_transparent(picture: Image.Image) -> bool:
    """Whether any pixel is not opaque. Decodes the picture only if its header allows transparency."""
    if not may_be_transparent(picture):
        return False
    picture.load()
    return to_8_bits(picture).convert("RGBA").getchannel("A").getextrema()[0] < 255


def describe_unreadable(name: str, error: Exception) -> str:
    if isinstance(error, Image.DecompressionBombError):
        return f"{name!r} is too large: {first_sentence(error).rstrip('.')}."
    if isinstance(error, FileNotFoundError) and not os.path.lexists(name):
        return f"{name!r} does not exist."
    return f"{name!r} cannot be read as an image ({first_sentence(error)})."


def describe_transparent(number: int, images: str, first: str, dropped: str = "Transparency is dropped") -> str:
    return (
        f"Transparent in places: {number} of {images}, {first!r} first. {dropped}, which shows "
        "the colours beneath it; --background white puts such images on white."
    )


def is_of_one_colour(picture: Image.Image) -> bool:
    """Whether all pixels of an RGB picture are equal."""
    return all(low == high for low, high in picture.getextrema())


# ---- The colour behind transparent pixels ----


def normalize_colour(colour: str) -> str:
    """
    A colour in Pillow's words, such as `white` or `hsl(30, 50%, 50%)`, as `#rrggbb`.

    Raises:
        ValueError: the colour is not opaque, or Pillow does not know it.
    """
    try:
        red, green, blue = (max(0, min(value, 255)) for value in ImageColor.getrgb(colour))
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"an opaque colour such as white or '#ffcc00', not {colour!r}") from error
    return f"#{red:02x}{green:02x}{blue:02x}"


def choose_background(given: str | None, of_model: str | None) -> str | None:
    """
    The colour, as `#rrggbb`, to put behind transparent pixels. `None` drops transparency.

    Args:
        given: the argument `--background`, a colour in Pillow's words or `none`. `None`: use the model's.
        of_model: from `read_background`.

    Raises:
        UserError: `given` is not an opaque colour.
    """
    if given is None:
        return of_model
    try:
        return None if given == NO_BACKGROUND else normalize_colour(given)
    except ValueError as error:
        raise UserError(f"--background must be {NO_BACKGROUND!r} or {error}.") from error


def read_background(processor: Any) -> str | None:
    """
    The colour, as `#rrggbb`, that a model's training put behind transparent pixels. `None` if it is unknown.

    Args:
        processor: the model's image processor, or the content of its preprocessor_config.json. Its field `background` is the
            colour.

    Raises:
        UserError: the field is not an opaque colour.
    """
    colour = (processor if isinstance(processor, dict) else vars(processor)).get("background")
    try:
        return None if colour is None else normalize_colour(colour)
    except ValueError as error:
        raise UserError(f"background must be {error}.") from error


def write_background(processor: Any, background: str | None) -> None:
    """Set the field `background`, which the image processor saves in preprocessor_config.json. `None` removes the field."""
    vars(processor).pop("background", None)
    if background is not None:
        processor.background = background

"""What is said of images before training: which are broken, transparent or of one colour."""

import contextlib
import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

from datasets import Dataset
from PIL.Image import DecompressionBombError, Image

from ..errors import UserError, first_sentence
from ..pixels import (
    describe_transparent,
    describe_unreadable,
    is_of_one_colour,
    is_transparent,
    may_be_transparent,
    to_rgb,
)
from .decoding import draft, is_jpeg, open_encoded, unquote_path
from .streaming import ImageStream


MAX_EMBEDDED_HEADERS = (
    100_000  # headers looked at of the images inside of a dataset, whose bytes must be read from the disk
)
MAX_STREAMED_IMAGES = 100  # evaluation images of a stream decoded, which are downloaded for it
MAX_DECODED_IMAGES = 1000  # opaque training images decoded to see whether they show anything
IMAGES_PER_READ = 16  # images that a thread reads at once

LARGE_PIXELS = 2**25
LARGE_IMAGE_LOCK = threading.Lock()  # held while an image of more pixels is decoded

logger = logging.getLogger(__name__)


class Pixels(NamedTuple):
    transparent: bool
    one_colour: bool


def check_images(
    images: dict[str, Dataset | ImageStream], skip_broken: bool, background: str | None = None
) -> tuple[dict[str, Dataset | ImageStream], list[str]]:
    """
    Look at the images before training, and warn of those that are transparent or of one colour.

    - Every header is read, of the images inside of a dataset an evenly spread 100,000. With `skip_broken` every image
      is decoded, and those that fail are left out.
    - Decoded are also those that may be transparent, and of the other training images an evenly spread 1,000.
    - Of a stream the first 100 evaluation images are decoded; the others are left to their turn.

    Args:
        background: the colour that the run puts behind transparent images.

    Returns:
        The images, and the names of those left out.

    Raises:
        UserError: an image that is broken or too large, named; or nothing is left.
    """
    kept, broken = {}, []
    for split, dataset in images.items():
        if isinstance(dataset, ImageStream):
            if split != "train" and background is None:
                warn_of_transparent_stream(dataset, split)
        else:
            dataset, names, may_be = leave_out_broken(dataset, split, skip_broken)
            warn_of_pixels(dataset, split, may_be, background)
            broken += names
        kept[split] = dataset
    for name in broken:
        logger.warning("Left out, as it is no image: %s", name)
    return kept, broken


def leave_out_broken(dataset: Dataset, split: str, skip_broken: bool) -> tuple[Dataset, list[str], dict[int, bool]]:
    """The dataset without broken images, their names, and by index whether an image may be transparent, if looked at."""
    looked_at: Sequence[int] = range(len(dataset))
    if is_embedded(dataset) and not skip_broken:
        looked_at = evenly_spaced(looked_at, MAX_EMBEDDED_HEADERS)
    seen = look(dataset, looked_at, see_all if skip_broken else see_header)
    faults = {index: result for index, result in zip(looked_at, seen) if isinstance(result, Exception)}
    for index, fault in faults.items():
        if isinstance(fault, DecompressionBombError) or not skip_broken:
            more = f"; {len(faults)} such image(s) in all" if len(faults) > 1 else ""
            raise UserError(
                describe_fault(dataset[index]["image"], index, fault, "is no image that can be read", more)
            )
    if len(faults) == len(dataset):  # an empty split too
        raise UserError(f"No image of the {split} split can be read.")
    names = [image_name(dataset[index]["image"], index) for index in faults]
    whole = {index: result for index, result in zip(looked_at, seen) if index not in faults}
    if faults:
        dataset, whole = dataset.select(list(whole)), dict(enumerate(whole.values()))
    return dataset, names, whole


def warn_of_pixels(dataset: Dataset, split: str, may_be: dict[int, bool], background: str | None) -> None:
    """
    Args:
        may_be: by index whether the header of an image leaves room for transparency.
    """
    looked_at = [index for index, transparent in may_be.items() if transparent]
    if split == "train":
        opaque = [index for index, transparent in may_be.items() if not transparent]
        looked_at = sorted([*looked_at, *evenly_spaced(opaque, MAX_DECODED_IMAGES)])
    elif background is not None:
        return
    seen = dict(zip(looked_at, look(dataset, looked_at, partial(see_pixels, background))))
    for index, result in seen.items():
        if isinstance(result, Exception):
            raise UserError(describe_fault(dataset[index]["image"], index, result))

    def first_of(indices: list[int]) -> str:
        return image_name(dataset[indices[0]]["image"], indices[0])

    see_through = [index for index, pixels in seen.items() if pixels.transparent]
    if see_through and background is None:
        logger.warning(
            "%s", describe_transparent(len(see_through), f"{len(may_be)} {split} images", first_of(see_through))
        )
    plain = [index for index, pixels in seen.items() if pixels.one_colour]
    if plain and split == "train":
        logger.warning(
            "%d of the %d training images looked at are of one colour, %r first.",
            len(plain),
            len(seen),
            first_of(plain),
        )


def warn_of_transparent_stream(stream: ImageStream, split: str) -> None:
    rows = [row["image"] for _, _, row in islice(stream.read(0), MAX_STREAMED_IMAGES)]
    see_through = []
    for index, encoded in enumerate(rows):
        try:
            with open_encoded(encoded) as image:
                if is_transparent(image):
                    see_through.append(image_name(encoded, index))
        except Exception as error:  # a damaged file makes Pillow raise anything
            raise UserError(describe_fault(encoded, index, error, skip=False)) from error
    if see_through:
        of_what = f"first {len(rows)} {split} images"
        logger.warning("%s", describe_transparent(len(see_through), of_what, see_through[0]))


def evenly_spaced(indices: Sequence[int], most: int) -> Sequence[int]:
    """At most so many of the indices, evenly spread."""
    return indices if len(indices) <= most else [indices[number * len(indices) // most] for number in range(most)]


def look(dataset: Dataset, indices: Sequence[int], see: Callable) -> list[Any]:
    """What `see` returns of the encoded images of these indices, or the exception that it raises."""

    def see_some(indices: Sequence[int]) -> list[Any]:
        return [attempt(see, encoded) for encoded in dataset[indices]["image"]]

    with ThreadPoolExecutor() as pool:
        starts = range(0, len(indices), IMAGES_PER_READ)
        return [
            one
            for some in pool.map(see_some, (indices[start : start + IMAGES_PER_READ] for start in starts))
            for one in some
        ]


def attempt(see: Callable, encoded: dict | None) -> Any:
    try:
        return see(encoded)
    except Exception as error:  # a damaged file makes Pillow raise anything
        return error


def see_header(encoded: dict | None) -> bool:
    """Whether the image may be transparent."""
    with open_encoded(encoded) as image:
        return may_be_transparent(image)


def see_all(encoded: dict | None) -> bool:
    """Likewise of an image that is decoded whole."""
    with open_encoded(encoded) as image, one_large_at_a_time(image):
        transparent = may_be_transparent(image)
        to_rgb(image)
        return transparent


def see_pixels(background: str | None, encoded: dict | None) -> Pixels:
    with open_encoded(encoded) as image, one_large_at_a_time(image):
        if is_jpeg(image):  # an eighth of a JPEG is quick to decode, and settles most of them
            draft(image, min(8, *image.size))
            if not is_of_one_colour(to_rgb(image)):
                return Pixels(transparent=False, one_colour=False)
    with open_encoded(encoded) as image, one_large_at_a_time(image):
        transparent = is_transparent(image)
        return Pixels(transparent, is_of_one_colour(to_rgb(image, background)))


def one_large_at_a_time(image: Image) -> contextlib.AbstractContextManager:
    """Threads that each decoded a large image would fill the memory."""
    return LARGE_IMAGE_LOCK if image.width * image.height > LARGE_PIXELS else contextlib.nullcontext()


def is_embedded(dataset: Dataset) -> bool:
    return len(dataset) > 0 and (dataset[0]["image"] or {}).get("bytes") is not None


def describe_fault(
    encoded: dict | None,
    index: int,
    fault: Exception,
    what: str = "cannot be decoded",
    more: str = "",
    skip: bool = True,
) -> str:
    """One sentence about an image that cannot be used."""
    name = image_name(encoded, index)
    if isinstance(fault, DecompressionBombError):  # a whole image
        return describe_unreadable(name, fault)
    remedy = "remove it, or train without with --skip_broken_images" if skip else "remove it"
    return f"{name!r} {what} ({first_sentence(fault)}{more}): {remedy}."


def image_name(encoded: dict | None, index: int) -> str:
    path = (encoded or {}).get("path")
    return unquote_path(path) if path else f"image {index}"

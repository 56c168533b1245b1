"""Checks of the images before training: broken, too large, transparent or of one colour."""

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice, takewhile
from typing import Any, NamedTuple

from datasets import Dataset
from PIL.Image import DecompressionBombError, Image

from binaryvit_runtime.errors import UserError, counted, first_sentence
from binaryvit_runtime.pixels import (
    describe_transparent,
    describe_unreadable,
    is_of_one_colour,
    is_transparent,
    may_be_transparent,
    to_rgb,
)
from binaryvit_runtime.progress import Progress

from .decoding import draft, is_jpeg, open_encoded, unquote_path
from .streaming import ImageSplits, ImageStream, warn_of_one_class


MAX_EMBEDDED_HEADERS = 100_000  # images inside a dataset whose header is checked: it is read with the whole image
MAX_STREAMED_IMAGES = 100  # evaluation images of a stream that are downloaded and decoded
MAX_DECODED_IMAGES = 1000  # opaque training images that are decoded to see whether they are of one colour
IMAGES_PER_READ = 16  # that a thread reads at once

LARGE_IMAGE_PIXELS = 2**25
LARGE_IMAGE_LOCK = threading.Lock()  # one thread at a time decodes an image with more pixels

logger = logging.getLogger(__name__)


class Appearance(NamedTuple):
    transparent: bool
    one_colour: bool


def check_images(
    images: ImageSplits, skip_broken: bool, background: str | None = None, max_eval_samples: int | None = None
) -> tuple[ImageSplits, list[str]]:
    """
    Stop at broken images, or leave them out. Warn of images that are transparent or of one colour, and of
    streams that have one class, or begin with one class and are cut short.

    It checks

    - the headers of all image files, and of at most 100,000 images inside a dataset, evenly spaced,
    - the pixels of images that may be transparent, and of at most 1,000 other training images, evenly spaced,
    - with `skip_broken`, the pixels of every image,
    - in a stream, the pixels and classes of the first 100 evaluation images.

    Args:
        skip_broken: leave out images that are broken or too large.
        background: the colour that the run puts behind transparent images.
        max_eval_samples: the limit of the evaluation images. It may have cut a stream short.

    Returns:
        The images, and the names of those left out.

    Raises:
        UserError: an image is broken or too large, or none is left.
    """
    kept: ImageSplits = {}
    broken: list[str] = []
    for split, dataset in images.items():
        if isinstance(dataset, ImageStream):
            if split != "train":
                check_first_images(dataset, split, background, max_eval_samples if split == "validation" else None)
        else:
            whole, names, maybe_transparent = leave_out_broken(dataset, split, skip_broken)
            if split == "train" and names:
                check_classes_left(dataset, whole)
            dataset = whole
            warn_of_appearance(dataset, split, maybe_transparent, background)
            broken += names
        kept[split] = dataset
    return kept, broken


def leave_out_broken(dataset: Dataset, split: str, skip_broken: bool) -> tuple[Dataset, list[str], dict[int, bool]]:
    """
    Returns:
        The dataset without broken and too large images, the names of these, and for each index that was checked whether the
        image may be transparent.
    """
    checked: Sequence[int] = range(len(dataset))
    if is_embedded(dataset) and not skip_broken:
        checked = evenly_spaced(checked, MAX_EMBEDDED_HEADERS)
    results = inspect_images(
        dataset, checked, decode_fully if skip_broken else read_header, f"Checking the {split} images"
    )
    faults = {index: result for index, result in zip(checked, results) if isinstance(result, Exception)}
    if faults and not skip_broken:
        index, fault = next(iter(faults.items()))
        count = f"; {len(faults)} such images in all" if len(faults) > 1 else ""
        raise UserError(describe_fault(dataset[index]["image"], index, fault, "cannot be read as an image", count))
    if len(faults) == len(dataset):  # also true of an empty split
        raise UserError(f"No image of the {split} split can be read.")
    names = [image_name(dataset[index]["image"], index) for index in faults]
    for name, fault in zip(names, faults.values()):
        logger.warning("Left out %s: %s.", name, first_sentence(fault).rstrip("."))
    maybe_transparent = {index: result for index, result in zip(checked, results) if index not in faults}
    if faults:
        dataset = dataset.select(list(maybe_transparent))
        maybe_transparent = dict(enumerate(maybe_transparent.values()))
    return dataset, names, maybe_transparent


def check_classes_left(before: Dataset, after: Dataset) -> None:
    """Raise UserError if all training images of a class are broken: the network could not learn it."""
    lost = sorted(set(before["label"][:]) - set(after["label"][:]))
    if lost:
        name = before.features["label"].names[lost[0]]
        raise UserError(
            f"No training image of the class {name!r} can be read: replace its broken images, or remove the class."
        )


def warn_of_appearance(
    dataset: Dataset, split: str, maybe_transparent: dict[int, bool], background: str | None
) -> None:
    """
    Args:
        maybe_transparent: by index, whether the header of the image allows transparency.
    """
    checked = [index for index, transparent in maybe_transparent.items() if transparent]
    if split == "train":
        opaque = [index for index, transparent in maybe_transparent.items() if not transparent]
        checked = sorted([*checked, *evenly_spaced(opaque, MAX_DECODED_IMAGES)])
    elif background is not None:
        return
    appearances = dict(
        zip(
            checked,
            inspect_images(dataset, checked, partial(see_appearance, background), f"Decoding {split} images"),
        )
    )
    for index, result in appearances.items():
        if isinstance(result, Exception):
            raise UserError(describe_fault(dataset[index]["image"], index, result))
    transparent = [index for index, appearance in appearances.items() if appearance.transparent]
    if transparent and background is None:
        first = image_name(dataset[transparent[0]]["image"], transparent[0])
        total = counted(len(maybe_transparent), f"{split} image")
        logger.warning("%s", describe_transparent(len(transparent), total, first))
    plain = [index for index, appearance in appearances.items() if appearance.one_colour]
    if plain and split == "train":
        logger.warning(
            "Of one colour: %d of %s, %r first.",
            len(plain),
            counted(len(appearances), "decoded training image"),
            image_name(dataset[plain[0]]["image"], plain[0]),
        )


def check_first_images(stream: ImageStream, split: str, background: str | None, limit: int | None) -> None:
    """
    Warn if the first images of a stream are transparent and the run has no background, if all images have one class, or if
    the first have one and the stream has as many images as its limit.
    """
    rows = [row for _, _, row in islice(stream.read(0), MAX_STREAMED_IMAGES)]
    labels = [row["label"] for row in rows]
    is_cut_short = limit is not None and stream.num_images == limit
    if not is_cut_short and len(set(labels)) == 1:  # the order of a complete stream is of no effect: read on
        labels = list(takewhile(labels[0].__eq__, (row["label"] for _, _, row in stream.read(0))))
    if is_cut_short or stream.num_images == len(labels):
        remedy = "leave out --max_eval_samples" if is_cut_short else "choose files of all classes"
        warn_of_one_class(stream, labels, split, f"shuffle it, or {remedy}")
    if background is None:
        warn_of_transparent_images([row["image"] for row in rows], split)


def warn_of_transparent_images(images: list[dict | None], split: str) -> None:
    transparent = []
    for index, encoded in enumerate(images):
        try:
            with open_encoded(encoded) as image:
                if is_transparent(image):
                    transparent.append(image_name(encoded, index))
        except Exception as error:  # Pillow raises any exception on a damaged file
            raise UserError(describe_fault(encoded, index, error, skip=False)) from error
    if transparent:
        total = f"the first {counted(len(images), f'{split} image')}"
        logger.warning("%s", describe_transparent(len(transparent), total, transparent[0]))


def evenly_spaced(indices: Sequence[int], most: int) -> Sequence[int]:
    """At most `most` of the indices, evenly spaced."""
    return indices if len(indices) <= most else [indices[number * len(indices) // most] for number in range(most)]


def inspect_images(
    dataset: Dataset, indices: Sequence[int], inspect: Callable[[dict | None], Any], progress: str
) -> list[Any]:
    """
    For each index, the result of `inspect(encoded image)`, or the exception that it raised. Runs in threads.

    Args:
        progress: what is done, for the lines that tell how far it is if it takes long.
    """
    return list(iterate_inspected(dataset, indices, inspect, progress))


def iterate_inspected(
    dataset: Dataset, indices: Sequence[int], inspect: Callable[[dict | None], Any], progress: str
) -> Iterator[Any]:
    """The results of `inspect_images` one after the other."""

    def inspect_some(indices: Sequence[int]) -> list[Any]:
        return [attempt(inspect, encoded) for encoded in dataset[indices]["image"]]

    starts = range(0, len(indices), IMAGES_PER_READ)
    with ThreadPoolExecutor() as pool:
        results = pool.map(inspect_some, (indices[start : start + IMAGES_PER_READ] for start in starts))
        try:
            with Progress(progress, len(indices), logger.info) as lines:
                for some in results:
                    yield from some
                    lines.update(len(some))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # the reader may stop early


def attempt(inspect: Callable[[dict | None], Any], encoded: dict | None) -> Any:
    try:
        return inspect(encoded)
    except Exception as error:  # Pillow raises any exception on a damaged file
        return error


def read_header(encoded: dict | None) -> bool:
    """Whether the header of the image allows transparency."""
    with open_encoded(encoded) as image:
        return may_be_transparent(image)


def decode_fully(encoded: dict | None) -> bool:
    """Whether the header of the image allows transparency. Raises an exception if its pixels cannot be decoded."""
    with open_encoded(encoded) as image, lock_if_large(image):
        transparent = may_be_transparent(image)
        draft(image, min(8, *image.size))  # reads all of a JPEG's data, in a third of the time
        to_rgb(image)
        return transparent


def see_appearance(background: str | None, encoded: dict | None) -> Appearance:
    with open_encoded(encoded) as image, lock_if_large(image):
        if is_jpeg(image):  # decoding a JPEG at an eighth of its size is fast, and usually shows two colours
            draft(image, min(8, *image.size))
            if not is_of_one_colour(to_rgb(image)):
                return Appearance(transparent=False, one_colour=False)
    with open_encoded(encoded) as image, lock_if_large(image):
        transparent = is_transparent(image)
        return Appearance(transparent, is_of_one_colour(to_rgb(image, background)))


def lock_if_large(image: Image, limit: int = LARGE_IMAGE_PIXELS) -> contextlib.AbstractContextManager:
    """
    A lock for images of more than `limit` pixels, which only one thread may decode at a time: several at once would run
    out of memory.
    """
    return LARGE_IMAGE_LOCK if image.width * image.height > limit else contextlib.nullcontext()


def is_embedded(dataset: Dataset) -> bool:
    """Whether the dataset contains the bytes of its images, not their paths."""
    return len(dataset) > 0 and (dataset[0]["image"] or {}).get("bytes") is not None


def describe_fault(
    encoded: dict | None,
    index: int,
    fault: Exception,
    problem: str = "cannot be decoded",
    count: str = "",
    skip: bool = True,
) -> str:
    """
    One sentence about an image that cannot be used.

    Args:
        skip: recommend `--skip_broken_images`, which streams do not have.
    """
    name = image_name(encoded, index)
    if isinstance(fault, DecompressionBombError):
        return describe_unreadable(name, fault)
    remedy = "remove it, or leave it out with --skip_broken_images" if skip else "remove it"
    return f"{name!r} {problem} ({first_sentence(fault)}{count}): {remedy}."


def image_name(encoded: dict | None, index: int) -> str:
    """The path of an image, or its index in the split."""
    path = (encoded or {}).get("path")
    return unquote_path(path) if path else f"image {index}"

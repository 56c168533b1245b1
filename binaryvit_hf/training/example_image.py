"""Images that a finished run was evaluated on, for the commands that the run prints at its end and for its report."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import fields
from pathlib import Path

import datasets
import huggingface_hub
from datasets import Dataset
from PIL.Image import Image
from transformers.utils import IMAGE_PROCESSOR_NAME

from binaryvit_runtime.errors import UserError
from binaryvit_runtime.hub import list_causes
from binaryvit_runtime.pixels import read_background

from ..data.arguments import DataArguments
from ..data.decoding import decode_image
from ..data.loading import load_images
from ..data.streaming import ImageStream
from .run_folder import RUN_ARGUMENTS, read_json


def evaluation_image(output_dir: str | Path, cache_dir: str | None = None) -> Image:
    """
    The first image that a run was evaluated on, in RGB, on the model's background.

    The images are loaded as the run loaded them: a dataset of the Hub from its cache, or from the Hub.

    Args:
        output_dir: of the run.
        cache_dir: the run's `--cache_dir`, which is not recorded.

    Raises:
        UserError: the folder holds no arguments of a run, or its images cannot be loaded any more.
    """
    return evaluation_images(output_dir, 1, cache_dir)[0]


def evaluation_images(
    output_dir: str | Path, most: int, cache_dir: str | None = None, download: bool = True
) -> list[Image]:
    """
    At most `most` images as `evaluation_image` gives one, spaced evenly; of a stream the first ones. Without `download` a
    dataset of the Hub comes from the cache, and is an error if it is not there.
    """
    with nullcontext() if download else no_downloads():
        return load_evaluation_images(output_dir, most, cache_dir)


def load_evaluation_images(output_dir: str | Path, most: int, cache_dir: str | None) -> list[Image]:
    recorded = read_json(Path(output_dir) / RUN_ARGUMENTS)
    if not recorded:
        raise UserError(f"{str(output_dir)!r} is no output directory of a run: it has no {RUN_ARGUMENTS}.")
    names = {field.name for field in fields(DataArguments)}
    arguments = DataArguments(**{name: value for name, value in recorded.items() if name in names})
    images = load_images(arguments, recorded.get("seed", 42), cache_dir, None)["validation"]
    background = read_background(read_json(Path(output_dir) / IMAGE_PROCESSOR_NAME))
    if isinstance(images, ImageStream):
        return [decode_image(row["image"], background) for _, _, row in itertools.islice(images.read(0), most)]
    pictures = list(decode_spaced(images, most, background, arguments.skip_broken_images))
    if not pictures:
        raise UserError("No image of the validation split can be read.")
    return pictures


@contextmanager
def no_downloads() -> Iterator[None]:
    """Set HF_HUB_OFFLINE for a while. Its variable would be too late: both libraries read it when they are imported."""
    modules = (datasets.config, huggingface_hub.constants)
    before, verbosity = [module.HF_HUB_OFFLINE for module in modules], datasets.logging.get_verbosity()
    for module in modules:
        module.HF_HUB_OFFLINE = True
    datasets.logging.set_verbosity_error()  # it warns that the Hub does not have the dataset
    try:
        yield
    except UserError as error:
        if any(isinstance(cause, ConnectionError) for cause in list_causes(error)):
            raise UserError("their dataset is not in the cache of this machine.") from error
        raise
    finally:
        datasets.logging.set_verbosity(verbosity)
        for module, value in zip(modules, before):
            module.HF_HUB_OFFLINE = value


def decode_spaced(images: Dataset, most: int, background: str | None, skip_broken: bool) -> Iterator[Image]:
    """The first image of each of `most` equal parts of a dataset; with `skip_broken` the first that can be decoded."""
    parts = max(1, min(most, len(images)))
    bounds = [number * len(images) // parts for number in range(parts + 1)]
    for start, end in itertools.pairwise(bounds):
        for index in range(start, end):
            try:
                picture = decode_image(images[index]["image"], background)
            except Exception:  # Pillow raises any exception on a damaged file
                if not skip_broken:
                    raise
            else:
                yield picture
                break


held_out_image = evaluation_image  # the name in the commands that earlier versions printed

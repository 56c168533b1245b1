"""Finds what lies beside a model: its files, records, example pictures and latent weights."""

import contextlib
import os
from pathlib import Path

from transformers import PreTrainedModel
from transformers.utils import CONFIG_NAME, cached_file

from binaryvit_runtime.browser.page import EXAMPLES, example_files
from binaryvit_runtime.errors import UserError
from binaryvit_runtime.image_files import ImageFile

from ..loading import has_config, load_classifier
from ..network.quantization_binaryvit import LATENT
from .pictures import Pictures
from .records import RECORD_FILES, records_folder


def files_folder(source: str, token: str | None) -> Path:
    """The folder of a model. For a model of the Hub, its folder in the local cache, after a download of its records."""
    folder = Path(os.path.abspath(source))  # the name of `.` tells a checkpoint, too
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download

    with contextlib.suppress(Exception):  # a report without them is still a report
        snapshot_download(source, token=token, allow_patterns=[*RECORD_FILES, *EXAMPLES])
    return Path(cached_file(source, CONFIG_NAME, token=token)).parent


def example_pictures(folder: Path) -> Pictures | None:
    """The example pictures of a model, None if it has none."""
    files = [ImageFile(str(file)) for file in example_files(records_folder(folder))]
    return Pictures(files, len(files), "example picture") if files else None


def load_latent(model: PreTrainedModel, source: str, token: str | None) -> PreTrainedModel | None:
    """
    The latent weights of a model: the model itself, or those in its folder `latent`; None if there are none.

    Raises:
        UserError: they are damaged.
    """
    if not model.is_packed:
        return model
    if not has_config(source, subfolder=LATENT, token=token):
        return None
    try:
        return load_classifier(source, subfolder=LATENT, token=token)
    except UserError as error:
        raise UserError(f"The latent weights of {source!r} cannot be loaded: {error}") from error

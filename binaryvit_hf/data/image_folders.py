"""Datasets of image folders: one sub-folder per class."""

import logging
import unicodedata
from pathlib import Path

from datasets import ClassLabel, Dataset, Features, Image

from binaryvit_runtime.errors import UserError, did_you_mean
from binaryvit_runtime.image_files import describe_left_out, find_images, is_hidden
from binaryvit_runtime.sources import did_you_mean_path

from .arguments import DataArguments
from .decoding import quote_path


SPLIT_NAMES = {"train", "training", "val", "valid", "validation", "dev", "eval", "test", "testing"}

logger = logging.getLogger(__name__)


def load_folder_splits(arguments: DataArguments) -> dict[str, Dataset]:
    """
    The images of `--train_dir` and `--validation_dir`, as paths. The sub-folders of the training folder are the classes.

    Raises:
        UserError: a folder is unreadable, has no images, or has a class that training lacks.
    """
    folders = {"train": arguments.train_dir, "validation": arguments.validation_dir}
    files = {split: list_image_folder(Path(folder), split) for split, folder in folders.items() if folder}
    names = sorted(files.get("train") or files["validation"])
    indices = {name: index for index, name in enumerate(names)}
    for split, classes in files.items():
        unknown = sorted(set(classes) - set(names))
        if unknown:
            raise UserError(
                f"--{split}_dir has the class {unknown[0]!r}, which --train_dir does not have"
                + did_you_mean(unknown[0], names)
            )
    features = Features({"image": Image(decode=False), "label": ClassLabel(names=names)})
    return {
        split: Dataset.from_dict(
            {
                "image": [quote_path(str(path)) for paths in classes.values() for path in paths],
                "label": [indices[name] for name, paths in classes.items() for _ in paths],
            },
            features=features,
        )
        for split, classes in files.items()
    }


def list_image_folder(folder: Path, split: str) -> dict[str, list[Path]]:
    """The sorted image files of each class folder, and of the folders in it."""
    try:
        if not folder.is_dir():
            raise UserError(
                f"--{split}_dir: there is no folder {str(folder)!r}{did_you_mean_path(folder, Path.is_dir)}"
            )
        children = [child for child in sorted(folder.iterdir()) if child.is_dir() and not is_hidden(child.name)]
    except OSError as error:
        raise UserError(f"--{split}_dir: {str(folder)!r} cannot be read ({error.strerror}).") from error
    classes: dict[str, list[Path]] = {}
    left_out: list[Path] = []
    for child in children:
        if quote_path(str(child)) != str(child):
            raise UserError(f"--{split}_dir: the name of the class folder {str(child)!r} is not UTF-8; rename it.")
        found = find_images(child)
        for fault in found.unreadable:
            raise UserError(f"--{split}_dir: {fault.filename!r} cannot be read ({fault.strerror}).")
        # macOS and other systems write accents in different ways, so a folder's name may change in an archive.
        classes.setdefault(unicodedata.normalize("NFC", child.name), []).extend(found.images)
        left_out += found.left_out
    if not any(classes.values()):
        raise UserError(
            f"--{split}_dir: {str(folder)!r} has no images in sub-folders; it needs one sub-folder per class."
        )
    empty = [name for name, paths in classes.items() if not paths]
    if empty:
        raise UserError(
            f"--{split}_dir: the class folder {str(folder / empty[0])!r} has no file with an image's extension, such as "
            ".jpg; add images or remove the folder."
        )
    refuse_nested_classes(folder, split, classes)
    if left_out:
        logger.warning("%s", describe_left_out(left_out, folder))
    return classes


def refuse_nested_classes(folder: Path, split: str, classes: dict[str, list[Path]]) -> None:
    """Raise UserError if `folder` is one level too high: it holds splits, or the folder of the classes."""
    nested = [name for name, paths in classes.items() if all(path.parent.parent != folder for path in paths)]
    splits = [name for name in classes if name.lower() in SPLIT_NAMES]
    of_folders = [name for name in splits if name in nested]
    # One among others may be a class: pictures of trains, by kind.
    if len(of_folders) > 1 or (of_folders and len(splits) == len(classes)):
        raise UserError(
            f"--{split}_dir: {str(folder)!r} has the folders {', '.join(map(repr, splits))}, which are no classes: give the "
            "splits with --train_dir and --validation_dir."
        )
    if split == "train" and len(nested) == len(classes) == 1:
        inner = str(folder / nested[0])
        raise UserError(
            f"--train_dir: {str(folder)!r} has one folder, and the images are in the folders of that one: give "
            f"--train_dir {inner!r}."
        )

"""The splits of a run: loaded from folders, files, the Hub or this machine, and divided into training and evaluation."""

import glob
import logging
import os
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from datasets import Dataset, IterableDataset, load_dataset, load_dataset_builder, load_from_disk
from datasets.exceptions import DataFilesNotFoundError, DatasetGenerationError

from binaryvit_runtime.errors import UserError, did_you_mean, first_sentence, shorten
from binaryvit_runtime.hub import explain_hub_error
from binaryvit_runtime.image_files import find_images, is_hidden, is_image_name
from binaryvit_runtime.sources import did_you_mean_path

from ..run_history import HELD_OUT, TEST, TRAINING
from .arguments import EVALUATION_SPLITS, DataArguments
from .held_out import hold_out
from .image_folders import SPLIT_NAMES, load_folder_splits
from .known_datasets import FASHION_MNIST, FASHION_MNIST_HUB_ID, KNOWN_DATASETS, load_known_splits
from .schema import is_unlabelled, map_labels, read_class_names, standardize_columns, standardize_labels
from .streaming import ImageSplits, ImageStream, declared_num_images


logger = logging.getLogger(__name__)


class DescribedImages(NamedTuple):
    """Images that are loaded."""

    splits: ImageSplits
    evaluation_images: str  # the kind of those to evaluate on: "held-out", "test" or "training"
    divided: bool  # whether the evaluation images were held out of the training split or folder


def load_images(
    arguments: DataArguments, seed: int, cache_dir: str | None, token: str | bool | None, test: bool = False
) -> ImageSplits:
    """
    Load the splits `train`, `validation` and, on request, `test`. Their columns are `image` (encoded) and `label`.

    Raises:
        UserError: the arguments name no images, or a split, column or label is missing or unfit.
    """
    return load_described_images(arguments, seed, cache_dir, token, test).splits


def load_described_images(
    arguments: DataArguments, seed: int, cache_dir: str | None, token: str | bool | None, test: bool = False
) -> DescribedImages:
    """The splits as `load_images` loads them, and what the images to evaluate on are."""
    arguments.check_source(test)
    if arguments.dataset_name:
        splits, sources = load_named_splits(arguments, cache_dir, token, test)
    else:
        splits = load_folder_splits(arguments)
        folders = {"train": arguments.train_dir, "validation": arguments.validation_dir}
        sources = {split: os.path.realpath(folder) for split, folder in folders.items() if folder}

    names = next(iter(splits.values())).features["label"].names
    if "train" in splits and len(names) < 2:
        raise UserError(f"The images have one class, {names[0]!r}: a classifier needs two or more.")
    if arguments.streaming:
        return DescribedImages(
            stream_splits(splits, arguments, seed), name_evaluation_images(sources, arguments), divided=False
        )
    divided = "validation" not in splits or arguments.train_val_split is not None
    if divided:
        splits |= hold_out(splits, arguments.train_val_split)
        sources.pop("validation", None)
    for split, limit in (("train", arguments.max_train_samples), ("validation", arguments.max_eval_samples)):
        if limit is not None and split in splits and limit < len(splits[split]):
            # Image folders are sorted by class, so shuffle first.
            splits[split] = splits[split].shuffle(seed=seed).select(range(limit))
    return DescribedImages(splits, name_evaluation_images(sources, arguments), divided)


def name_evaluation_images(sources: dict[str, str], arguments: DataArguments) -> str:
    """
    The kind of images to evaluate on.

    Args:
        sources: where the images of `train`, `validation` and `test` are from: the name of a split, or a folder. Without
            `validation`, training images are held out.
    """
    source = sources.get("validation")
    if source is None:
        return HELD_OUT
    if source == sources.get("train"):
        return TRAINING
    return TEST if source in (sources.get("test"), arguments.test_split_name) else HELD_OUT


def stream_splits(splits: dict[str, IterableDataset], arguments: DataArguments, seed: int) -> dict[str, ImageStream]:
    """Streams of the splits, limited in length. The training images are shuffled."""
    if "validation" not in splits:
        raise UserError(
            f"--dataset_name {arguments.dataset_name!r} has no split to evaluate on, and a stream cannot be divided; name "
            "one with --validation_split_name."
        )
    # The number that a dataset declares is for all of its files.
    some_files = arguments.train_files or arguments.validation_files or Path(arguments.dataset_name).is_file()
    streams = {
        split: ImageStream(dataset, None if some_files else declared_num_images(dataset))
        for split, dataset in splits.items()
    }
    if "train" in streams:
        streams["train"] = streams["train"].shuffle(seed, arguments.shuffle_buffer_size)
        if arguments.max_train_samples is not None:  # after shuffling: many datasets are sorted by class
            limited = streams["train"].take(arguments.max_train_samples)
            # If the number of images is unknown, the argument states it.
            streams["train"] = ImageStream(limited.dataset, limited.num_images or arguments.max_train_samples)
    if arguments.max_eval_samples is not None:
        streams["validation"] = streams["validation"].take(arguments.max_eval_samples)
    return streams


def load_named_splits(
    arguments: DataArguments, cache_dir: str | None, token: str | bool | None, test: bool
) -> tuple[dict[str, Dataset | IterableDataset], dict[str, str]]:
    """
    The splits of `--dataset_name`, and the dataset's own name of each. The default evaluation split is the first of
    `EVALUATION_SPLITS`. Without streaming, a default split that has no labels is skipped, because training images can be
    held out instead.

    Raises:
        UserError: the dataset cannot be loaded, or lacks a split or column that the arguments name.
    """
    name = arguments.dataset_name
    loaded = load_named_dataset(arguments, cache_dir, token)
    candidates = {"train": [arguments.train_split_name]}
    if arguments.validation_split_name:
        candidates["validation"] = [arguments.validation_split_name]
    elif arguments.train_val_split is None:
        candidates["validation"] = sorted(EVALUATION_SPLITS, key=lambda split: split == arguments.train_split_name)
    if test:
        candidates["test"] = [arguments.test_split_name]
    required = {"train": arguments.train_val_split is not None, "validation": bool(arguments.validation_split_name)}
    splits, sources = {}, {}
    for split, names in candidates.items():
        may_skip = len(names) > 1 and "train" in splits and not arguments.streaming
        for found in (candidate for candidate in names if candidate in loaded):
            columns = arguments.image_column_name, arguments.label_column_name
            dataset = standardize_columns(loaded[found], *columns, partial(find_data_folders, arguments, found))
            if may_skip and is_unlabelled(dataset):
                logger.warning("The split %r has no labels, so it is not used for evaluation.", found)
                continue
            splits[split], sources[split] = dataset, found
            break
        if not splits and split == "validation" and not required[split]:
            raise UserError(
                f"--dataset_name {name!r} has neither a split {arguments.train_split_name!r} nor one to evaluate on; it has "
                f"{', '.join(map(repr, loaded))}. Name one to train on with --train_split_name, or one to evaluate on with "
                f"--validation_split_name{did_you_mean(arguments.train_split_name, loaded)}"
            )
        if split not in splits and required.get(split, True):
            raise UserError(
                f"--dataset_name {name!r} has no split {names[0]!r}; it has {', '.join(map(repr, loaded))}. "
                f"Name one with --{split}_split_name{did_you_mean(names[0], loaded)}"
            )
    if "validation" in sources and share_files(arguments, cache_dir, token):
        sources["validation"] = sources["train"]
    return standardize_labels(splits, read_class_names(arguments.class_names, name)), sources


def share_files(arguments: DataArguments, cache_dir: str | None, token: str | bool | None) -> bool:
    """Whether `--train_files` and `--validation_files` choose a file in common."""
    if not (arguments.train_files and arguments.validation_files):
        return False
    files = load_dataset_builder(**dataset_source(arguments), cache_dir=cache_dir, token=token).config.data_files
    train, validation = arguments.train_split_name, arguments.validation_split_name or "validation"
    return not set(files[train]).isdisjoint(files[validation])


def load_named_dataset(
    arguments: DataArguments, cache_dir: str | None, token: str | bool | None
) -> dict[str, Dataset | IterableDataset]:
    """All splits of `--dataset_name`, under their own names."""
    name, saved = arguments.dataset_name, is_saved_to_disk(Path(arguments.dataset_name))
    if saved and arguments.streaming:
        raise UserError(f"--dataset_name {name!r} was written by save_to_disk; leave out --streaming.")
    if saved and (arguments.train_files or arguments.validation_files):
        raise UserError(
            f"--dataset_name {name!r} was written by save_to_disk, which chooses no files: leave out --train_files and "
            "--validation_files."
        )
    source = dataset_source(arguments)
    try:
        if saved:
            loaded = load_from_disk(name)
            return loaded if isinstance(loaded, dict) else {arguments.train_split_name: loaded}
        refuse_classes_as_splits(arguments)
        # Chosen files hold fewer images than the dataset's README says, which datasets < 5.2 takes for damage.
        verified = "no_checks" if source["data_files"] else None
        return load_known_splits(name) or load_dataset(
            **source, cache_dir=cache_dir, token=token, streaming=arguments.streaming, verification_mode=verified
        )
    except UserError:
        raise
    except Exception as error:  # file systems, networks and dataset builders raise any exception
        cause = error.__cause__ if isinstance(error, DatasetGenerationError) and error.__cause__ else error
        reason = explain_hub_error(error) or first_sentence(cause)
        if isinstance(error, DataFilesNotFoundError) and source["data_files"]:
            reason = f"no file in it matches {' or '.join(map(repr, source['data_files'].values()))}."
        suggestion = "" if Path(name).exists() else did_you_mean_path(name, known=KNOWN_DATASETS, otherwise="")
        if suggestion:
            reason = f"{suggestion.removeprefix('; ')} {reason[0].upper()}{reason[1:]}"
        raise UserError(f"--dataset_name {name!r} cannot be loaded: {reason}") from error


def refuse_classes_as_splits(arguments: DataArguments) -> None:
    """
    Of `bus`, `car` and `train`, `datasets` reads `train` alone, which has the name of a split. Warn of folders with images
    that it leaves out.

    Raises:
        UserError: it would read some class folders and leave out others.
    """
    folder = Path(arguments.dataset_name)
    if not folder.is_dir() or arguments.train_files or arguments.validation_files:
        return
    children = [child for child in sorted(folder.iterdir()) if child.is_dir() and not is_hidden(child.name)]
    names = [child.name.lower() for child in children]
    if SPLIT_NAMES.issuperset(names) or not any(word in name for name in names for word in SPLIT_NAMES):
        return
    if (folder / "README.md").is_file() or any(folder.glob("metadata.*")) or any(folder.glob("*/metadata.*")):
        return  # they say what the splits are, or what the labels
    files = load_dataset_builder(**dataset_source(arguments)).config.data_files or {}
    all_files = [file for of_split in files.values() for file in of_split]
    classes = [child for child in children if any(is_image_name(file.name) for file in child.iterdir())]
    parents = resolved_parents(files.get(arguments.train_split_name) or all_files)
    left_out = [child.name for child in classes if child.resolve() not in parents]
    have_names_of_splits = SPLIT_NAMES.issuperset(child.name.lower() for child in classes)
    # Otherwise the files of the split are further down, as in train/ant.
    if 0 < len(left_out) < len(classes) and not have_names_of_splits:
        raise UserError(
            f"--dataset_name {str(folder)!r} is a folder of classes, and some of their names would be taken for names of "
            f"splits, which leaves out {left_out[0]!r}: give a folder of classes with --train_dir."
        )
    parents = resolved_parents(file for file in all_files if is_image_name(Path(file).name))
    unread = [child for child in children if not any(parent.is_relative_to(child.resolve()) for parent in parents)]
    unread_names = [child.name for child in unread if find_images(child).images]
    if parents and unread_names:  # a table's images may be anywhere
        logger.warning(
            "--dataset_name %r has folders with names of splits, so no image of %s is read. Give a folder of classes with "
            "--train_dir.",
            str(folder),
            shorten(", ".join(map(repr, unread_names)), 100),
        )


def resolved_parents(files: Iterable[str]) -> set[Path]:
    return {folder.resolve() for folder in {Path(file).parent for file in files}}


def dataset_source(arguments: DataArguments) -> dict:
    """Arguments of `datasets.load_dataset`: the dataset, and the files of each split. A single file is one split."""
    name = FASHION_MNIST_HUB_ID if arguments.dataset_name == FASHION_MNIST else arguments.dataset_name
    patterns = {
        arguments.train_split_name: arguments.train_files,
        arguments.validation_split_name or "validation": arguments.validation_files,
    }
    patterns = {split: pattern for split, pattern in patterns.items() if pattern}
    path = Path(name)
    if path.is_file():
        if patterns:
            raise UserError(
                f"--train_files and --validation_files choose files of a folder, and --dataset_name {name!r} is a file: give "
                "its folder."
            )
        name, patterns = str(path.absolute().parent), {arguments.train_split_name: glob.escape(path.name)}
    return {"path": name, "name": arguments.dataset_config_name, "data_files": patterns or None}


def find_data_folders(arguments: DataArguments, split: str) -> list[Path]:
    """The folders that contain the files of a split. Empty for datasets of the Hub and for `KNOWN_DATASETS`."""
    path = Path(arguments.dataset_name)
    if not path.exists() or arguments.dataset_name in KNOWN_DATASETS:
        return []
    if is_saved_to_disk(path):
        return [path]
    files = load_dataset_builder(**dataset_source(arguments)).config.data_files
    return sorted({Path(file).parent for file in files[split]})


def is_saved_to_disk(folder: Path) -> bool:
    """Whether `save_to_disk` of a `Dataset` or a `DatasetDict` wrote the folder."""
    return any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))


def relabel(images: ImageSplits, indices: list[int], num_labels: int) -> ImageSplits:
    """Replace each label by `indices[label]`, one of `num_labels`."""
    if indices == list(range(len(indices))):
        return images
    new_labels, names = dict(enumerate(indices)), [str(index) for index in range(num_labels)]
    return {
        split: ImageStream(map_labels(part.dataset, new_labels, names, split), part.num_images, part.endless)
        if isinstance(part, ImageStream)
        else map_labels(part, new_labels, names, split)
        for split, part in images.items()
    }

"""Images and labels: loaded, checked before training, and made tensors as they are read."""

import logging
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from datasets import (
    ClassLabel,
    Dataset,
    Features,
    Image,
    IterableDataset,
    load_dataset,
    load_dataset_builder,
    load_from_disk,
)
from datasets.exceptions import DatasetGenerationError
from PIL import Image as PILImage
from torchvision.transforms import v2
from transformers import BaseImageProcessor

from ..errors import UserError, first_sentence
from ..hub import find_cause
from .arguments import HELD_OUT, DataArguments
from .augmentation import create_train_transform
from .decoding import CroppingDecoder, decode_image, quote_path
from .image_checks import describe_fault
from .image_files import describe_left_out, find_images
from .known_datasets import FASHION_MNIST, FASHION_MNIST_HUB_ID, KNOWN_DATASETS, load_known_splits
from .model_inputs import RGB, describe_input
from .sampling import Showing, Streamed, seeded
from .schema import index_labels, is_unlabelled, name_columns, name_labels, read_class_names
from .streaming import ImageStream, told_number


logger = logging.getLogger(__name__)

HELD_OUT_SEED = 0

Images = dict[str, Dataset | ImageStream]  # by split


def load_images(
    arguments: DataArguments, seed: int, cache_dir: str | None, token: str | bool | None, test: bool = False
) -> Images:
    """
    Splits `train` and `validation`, and if asked `test`, with the columns `image` (encoded, with its path) and `label` (a
    `ClassLabel`).

    Raises:
        UserError: no images, no classes, broken images, missing columns or splits.
    """
    if arguments.dataset_name and (arguments.train_dir or arguments.validation_dir):
        raise UserError("Give either --dataset_name or --train_dir and --validation_dir, not both.")
    if arguments.dataset_name:
        splits = load_named_splits(arguments, cache_dir, token, test)
    elif arguments.train_dir or arguments.validation_dir:
        splits = load_folder_splits(arguments)
    else:
        raise UserError("There are no images: give --dataset_name, or --train_dir with a folder a class.")

    names = next(iter(splits.values())).features["label"].names
    if "train" in splits and len(names) < 2:
        raise UserError(f"The images have one class, {names[0]!r}: a classifier needs two or more.")
    if test and "test" not in splits:
        raise UserError("--do_predict needs a --dataset_name with images to test on (--test_split_name).")
    if arguments.streaming:
        return stream_splits(splits, arguments, seed)
    if "validation" not in splits or arguments.train_val_split is not None:
        if "train" not in splits:
            raise UserError(
                "--train_val_split holds out training images, and there are none: give --train_dir or --train_split_name, "
                "or leave it out."
            )
        if "validation" in splits:
            logger.warning(
                "--train_val_split holds out training images, so the other ones to evaluate on are not used."
            )
        size = HELD_OUT if arguments.train_val_split is None else arguments.train_val_split
        splits |= hold_out(splits["train"], size)
    for split, limit in (("train", arguments.max_train_samples), ("validation", arguments.max_eval_samples)):
        if limit is not None and split in splits and limit < len(splits[split]):
            # Shuffled first, for folders come sorted by class.
            splits[split] = splits[split].shuffle(seed=seed).select(range(limit))
    return splits


def stream_splits(splits: dict[str, IterableDataset], arguments: DataArguments, seed: int) -> Images:
    if "validation" not in splits:
        raise UserError(
            f"--dataset_name {arguments.dataset_name!r} has no split to evaluate on, and of a stream none can be held out; "
            "say which with --validation_split_name."
        )
    # A dataset tells the numbers of all of its files.
    chosen = arguments.train_files or arguments.validation_files or Path(arguments.dataset_name).is_file()
    streams = {
        split: ImageStream(dataset, None if chosen else told_number(dataset)) for split, dataset in splits.items()
    }
    for split, limit in (("train", arguments.max_train_samples), ("validation", arguments.max_eval_samples)):
        if limit is not None and split in streams:
            streams[split] = streams[split].take(limit)
    if "train" in streams:
        streams["train"] = streams["train"].shuffle(seed, arguments.shuffle_buffer_size)
    return streams


def load_folder_splits(arguments: DataArguments) -> dict[str, Dataset]:
    """Image folders, one sub-folder a class; the classes of the training folder are the model's."""
    folders = {"train": arguments.train_dir, "validation": arguments.validation_dir}
    files = {split: list_image_folder(Path(folder), split) for split, folder in folders.items() if folder}
    names = sorted(next(iter(files.values())))
    for split, classes in files.items():
        unknown = sorted(set(classes) - set(names))
        if unknown:
            raise UserError(f"--{split}_dir has the class {unknown[0]!r}, which --train_dir does not have.")
    features = Features({"image": Image(decode=False), "label": ClassLabel(names=names)})
    return {
        split: Dataset.from_dict(
            {
                "image": [quote_path(str(path)) for paths in classes.values() for path in paths],
                "label": [names.index(name) for name, paths in classes.items() for _ in paths],
            },
            features=features,
        )
        for split, classes in files.items()
    }


def list_image_folder(folder: Path, split: str) -> dict[str, list[Path]]:
    """Files of each class, sorted, as `images.find_images` finds them."""
    try:
        if not folder.is_dir():
            raise UserError(f"--{split}_dir: there is no folder {str(folder)!r}.")
        children = [child for child in sorted(folder.iterdir()) if child.is_dir() and not child.name.startswith(".")]
    except OSError as error:
        raise UserError(f"--{split}_dir: {str(folder)!r} cannot be read ({error.strerror}).") from error
    classes, left_out = {}, []
    for child in children:
        if quote_path(str(child)) != str(child):
            raise UserError(f"--{split}_dir: the name of the class folder {str(child)!r} is not UTF-8; rename it.")
        found = find_images(child)
        for fault in found.unreadable:
            raise UserError(f"--{split}_dir: {fault.filename!r} cannot be read ({fault.strerror}).")
        classes[child.name] = found.images
        left_out += found.left_out
    if not any(classes.values()):
        raise UserError(
            f"--{split}_dir: {str(folder)!r} has no images in sub-folders; it needs one sub-folder a class."
        )
    empty = [name for name, paths in classes.items() if not paths]
    if empty:
        raise UserError(
            f"--{split}_dir: the class folder {str(folder / empty[0])!r} is empty (a file without an image's extension, "
            "such as .jpg, counts for none); fill or remove it."
        )
    if left_out:
        logger.warning("%s", describe_left_out(left_out, folder))
    return classes


def load_named_splits(
    arguments: DataArguments, cache_dir: str | None, token: str | bool | None, test: bool
) -> dict[str, Dataset]:
    """A dataset of the Hub, of a local path or of this machine, with its columns under our names."""
    name = arguments.dataset_name
    loaded = load_named_dataset(arguments, cache_dir, token)
    wanted = {"train": [arguments.train_split_name]}
    if arguments.validation_split_name:
        wanted["validation"] = [arguments.validation_split_name]
    elif arguments.train_val_split is None:
        wanted["validation"] = ["validation", "test"]
    if test:
        wanted["test"] = [arguments.test_split_name]
    needed = {"train": arguments.train_val_split is not None, "validation": bool(arguments.validation_split_name)}
    splits = {}
    for split, candidates in wanted.items():
        by_default = len(candidates) > 1 and "train" in splits and not arguments.streaming  # else others are held out
        for candidate in (candidate for candidate in candidates if candidate in loaded):
            columns = arguments.image_column_name, arguments.label_column_name
            dataset = name_columns(loaded[candidate], *columns, partial(data_folders, arguments, candidate))
            if by_default and is_unlabelled(dataset):
                logger.warning("The split %r has no labels, so it is not evaluated on.", candidate)
                continue
            splits[split] = dataset
            break
        if split not in splits and (needed.get(split, True) or (split == "validation" and not splits)):
            raise UserError(
                f"--dataset_name {name!r} has no split {candidates[0]!r}; it has {', '.join(map(repr, loaded))}. "
                f"Say which with --{split}_split_name."
            )
    return name_labels(splits, read_class_names(arguments.class_names, name))


def load_named_dataset(
    arguments: DataArguments, cache_dir: str | None, token: str | bool | None
) -> dict[str, Dataset | IterableDataset]:
    """All splits of the dataset, by their own names."""
    name, saved = arguments.dataset_name, is_saved_to_disk(Path(arguments.dataset_name))
    if saved and arguments.streaming:
        raise UserError(f"--dataset_name {name!r} was saved to disk, and such a dataset is not streamed: go without.")
    source = dataset_source(arguments)
    try:
        if saved:
            loaded = load_from_disk(name)
            return loaded if isinstance(loaded, dict) else {arguments.train_split_name: loaded}
        return load_known_splits(name) or load_dataset(
            **source, cache_dir=cache_dir, token=token, streaming=arguments.streaming
        )
    except Exception as error:  # the loader raises whatever its file system, network or builder raised
        cause = error.__cause__ if isinstance(error, DatasetGenerationError) and error.__cause__ else error
        raise UserError(
            f"--dataset_name {name!r} cannot be loaded: {find_cause(error) or first_sentence(cause)}"
        ) from error


def dataset_source(arguments: DataArguments) -> dict:
    """What datasets calls the dataset and the files of each split; a file is a dataset of one split."""
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
                f"--train_files and --validation_files choose among the files of a folder, and --dataset_name {name!r} is a "
                "file: name its folder."
            )
        name, patterns = str(path.absolute().parent), {arguments.train_split_name: path.name}
    return {"path": name, "name": arguments.dataset_config_name, "data_files": patterns or None}


def data_folders(arguments: DataArguments, split: str) -> list[Path]:
    """The folders in which a local dataset's files of a split lie; none of a dataset of the Hub or of this machine."""
    path = Path(arguments.dataset_name)
    if not path.exists() or arguments.dataset_name in KNOWN_DATASETS:
        return []
    if is_saved_to_disk(path):
        return [path]
    files = load_dataset_builder(**dataset_source(arguments)).config.data_files
    return sorted({Path(file).parent for file in files[split]})


def is_saved_to_disk(folder: Path) -> bool:
    """Whether `save_to_disk` of a dataset, or of a dictionary of them, wrote it."""
    return any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))


def relabel(images: Images, indices: list[int], num_labels: int) -> Images:
    """The images with `indices[label]`, one of so many, in place of each label."""
    if indices == list(range(len(indices))):
        return images
    known, names = dict(enumerate(indices)), [str(index) for index in range(num_labels)]
    return {
        split: ImageStream(index_labels(part.dataset, known, names, split), part.num_images, part.endless)
        if isinstance(part, ImageStream)
        else index_labels(part, known, names, split)
        for split, part in images.items()
    }


def hold_out(dataset: Dataset, size: float) -> dict[str, Dataset]:
    """Part with a share (below 1) or a number of the images, the same ones whatever the run's seed."""
    number = math.ceil(size * len(dataset)) if 0 < size < 1 else size
    if not 0 < number < len(dataset) or (size >= 1 and size != int(size)):
        raise UserError(
            f"--train_val_split is a share between 0 and 1 or a number of images below {len(dataset)}, not {size:g}; or "
            "give images to evaluate on with --validation_dir or --validation_split_name."
        )
    parts = dataset.train_test_split(size if size < 1 else int(size), seed=HELD_OUT_SEED)
    return {"train": parts["train"], "validation": parts["test"]}


def add_transforms(
    images: Images, processor: BaseImageProcessor, arguments: DataArguments, seed: int
) -> dict[str, "TransformedImages"]:
    """Decode and transform images as they are read: augmented for training, by the image processor for evaluation."""
    wanted = describe_input(processor, "The model")
    crop = CroppingDecoder(wanted.size, arguments.random_resized_crop_min_scale, arguments.background)
    augment = create_train_transform(arguments, wanted.size, wanted.mean, wanted.std)
    if wanted.channels != RGB:
        augment = v2.Compose([augment, partial(reorder_channels, wanted.channels)])
    steps: dict[str, tuple[Callable, Callable]] = {"train": (crop, augment)}
    evaluate = (partial(decode_image, background=arguments.background), partial(process_image, processor))
    return {split: TransformedImages(dataset, *steps.get(split, evaluate), seed) for split, dataset in images.items()}


def reorder_channels(channels: tuple[int, ...], image: torch.Tensor) -> torch.Tensor:
    return image[list(channels)]


def process_image(processor: BaseImageProcessor, image: PILImage.Image) -> torch.Tensor:
    return processor(images=image, return_tensors="pt")["pixel_values"][0]


class TransformedImages(torch.utils.data.Dataset):
    """
    Encoded images and labels as tensors `pixel_values` and `labels`.

    An item is asked for by its index or by a `sampling.Showing`; of a stream by `sampling.Streamed`, which brings it. A
    showing has random numbers of its own, so what an image looks like depends on neither workers, nor processes, nor
    interruptions.
    """

    takes_showings = True

    def __init__(self, images: Dataset | ImageStream, decode: Callable, transform: Callable, seed: int):
        self.images, self.decode, self.transform, self.seed = images, decode, transform, seed

    def __len__(self) -> int:
        return len(self.images)

    @property
    def stream(self) -> ImageStream | None:
        return self.images if isinstance(self.images, ImageStream) else None

    def __getitem__(self, key: int | Showing | Streamed) -> dict:
        if isinstance(key, Streamed):
            showing, row = key
        else:
            showing = key if isinstance(key, Showing) else Showing(0, key, 0)
            row = self.images[showing.index]  # type: ignore[index]  # of a stream every key brings its row
        with seeded(self.seed, *showing):
            try:
                decoded = self.decode(row["image"])
            except Exception as error:  # a damaged file makes Pillow raise anything
                fault = describe_fault(row["image"], showing.index, error, skip=not self.stream)
                raise UserError(fault) from error
            return {"pixel_values": self.transform(decoded), "labels": row["label"]}


def collate_images(examples: list[dict]) -> dict[str, torch.Tensor]:
    """`pixel_values (batch, channels, height, width)` and `labels (batch,)`."""
    return {
        "pixel_values": torch.stack([example["pixel_values"] for example in examples]),
        "labels": torch.tensor([example["labels"] for example in examples]),
    }

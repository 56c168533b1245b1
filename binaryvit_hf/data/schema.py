"""The schema of every dataset here: columns `image` (encoded) and `label` (a `ClassLabel`)."""

import logging
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

from datasets import ClassLabel, Dataset, Features, Image, IterableDataset, Value

from binaryvit_runtime.errors import UserError, counted, did_you_mean, first_sentence


logger = logging.getLogger(__name__)

CLASS_NAMES = "classnames.txt"  # in the folder of a WebDataset's archives
STRINGS = ("string", "large_string", "string_view")
BINARIES = ("binary", "large_binary", "binary_view")


def standardize_columns(
    dataset: Dataset | IterableDataset, image_column: str, label_column: str, folders: Callable[[], list[Path]]
) -> Dataset | IterableDataset:
    """
    Keep two columns, under the names `image` (encoded) and `label`.

    Args:
        image_column, label_column: their names in the dataset.
        folders: returns the folders of the dataset's files. Relative paths of images are searched there first.

    Raises:
        UserError: a column is missing or has the wrong type, or a relative path matches several files.
    """
    features = dataset.features
    if features is None:
        raise UserError("The dataset does not declare its columns, so it cannot be streamed; leave out --streaming.")
    image, label = find_column("image", image_column, features), find_column("label", label_column, features)
    if image == label:
        raise UserError(
            f"{image!r} is the column of the images and of the labels: name another with --image_column_name or "
            "--label_column_name."
        )
    # A format, such as torch's, would turn labels into tensors.
    dataset = dataset.with_format(None).select_columns([image, label])
    for column in (image, label):
        dtype = getattr(features[column], "dtype", None)
        if dtype in ("string_view", "binary_view"):  # Arrow cannot cast them to images, and datasets loses nulls
            plain = Features(dataset.features | {column: Value(dtype.removesuffix("_view"))})
            dataset = dataset.cast(plain) if isinstance(dataset, Dataset) else dataset.map(features=plain)
    dataset = dataset.cast_column(image, Image(decode=False))  # first of all, otherwise a stream encodes images again
    dataset = dataset.rename_columns(
        {theirs: ours for ours, theirs in (("image", image), ("label", label)) if theirs != ours}
    )
    if holds_paths(features[image]) and (found := folders()):
        dataset = map_column(dataset, "image", partial(locate_image, found), Image(decode=False))
    return dataset


def find_column(kind: str, wanted: str, features: Features) -> str:
    """
    The column `wanted`. If `wanted` is the default and missing, the only column of that kind.

    Args:
        kind: `image` or `label`.
    """
    if wanted in features:
        if not (may_be_image if kind == "image" else may_be_label)(features[wanted]):
            raise UserError(f"{wanted!r} is not a column of {kind}s; name one with --{kind}_column_name.")
        return wanted
    if kind == "image":
        candidates = [name for name, feature in features.items() if is_image_file(feature)]
    else:  # WebDatasets call it cls
        candidates = [name for name, feature in features.items() if isinstance(feature, ClassLabel) or name == "cls"]
    if wanted == kind and len(candidates) == 1:  # the default name of a column is its kind
        return candidates[0]
    raise UserError(
        f"The dataset has no column {wanted!r}; it has {', '.join(map(repr, features))}. "
        f"Name one with --{kind}_column_name{did_you_mean(wanted, features)}"
    )


def may_be_image(feature) -> bool:
    return is_image_file(feature) or (isinstance(feature, Value) and feature.dtype in STRINGS + BINARIES)


def is_image_file(feature) -> bool:
    """Whether a feature is an `Image`, or its storage `{"bytes", "path"}` in a file without metadata of features."""
    if isinstance(feature, Image):
        return True
    kinds = {"bytes": BINARIES, "path": STRINGS}
    return (
        isinstance(feature, dict)
        and feature != {}
        and all(getattr(part, "dtype", None) in kinds.get(name, ()) for name, part in feature.items())
    )


def holds_paths(feature) -> bool:
    """Whether a feature certainly has paths of image files, not the images' bytes."""
    return getattr(feature, "dtype", None) in STRINGS or (isinstance(feature, dict) and "bytes" not in feature)


def may_be_label(feature) -> bool:
    numbers = ("bool", "int", "uint", "float")
    return isinstance(feature, ClassLabel) or (
        isinstance(feature, Value) and (feature.dtype in STRINGS or feature.dtype.startswith(numbers))
    )


def locate_image(folders: list[Path], encoded: dict | None) -> dict | None:
    """
    The image with its full path, if its relative path exists in one of the dataset's folders. Others are unchanged.

    Raises:
        UserError: the dataset has several folders, so the relative path is ambiguous.
    """
    path = None if encoded is None else encoded.get("path")
    if encoded is None or path is None or "://" in path or Path(path).is_absolute():
        return encoded
    # `os.path.isfile` is also False for strings that cannot be paths.
    found = [folder / path for folder in folders if os.path.isfile(folder / path)]
    if found and len(folders) > 1:
        raise UserError(
            f"The path {path!r} may be relative to {str(folders[0])!r} or to {str(folders[1])!r}; write absolute paths into the "
            "dataset."
        )
    return encoded | {"path": str(found[0])} if found else encoded


def map_column(dataset: Dataset | IterableDataset, column: str, function: Callable, feature):
    """Apply a function to each value of a column, without a copy of the other columns."""
    if isinstance(dataset, Dataset):
        values = [function(value) for value in dataset[column][:]]
        return dataset.remove_columns(column).add_column(column, values, feature=feature)
    features = Features(dataset.features | {column: feature})
    return dataset.map(partial(map_value, column, function), input_columns=column, features=features)


def map_value(column: str, function: Callable, value) -> dict:
    return {column: function(value)}


def read_class_names(file: str | None, dataset_name: str) -> list[str] | None:
    """
    Class names from `file`, or else from `classnames.txt` in the dataset's folder: one per line, label 0 first. `None` if
    there is neither.

    Raises:
        UserError: the file cannot be read, or has a name twice.
    """
    folder = Path(dataset_name).parent if Path(dataset_name).is_file() else Path(dataset_name)
    path = Path(file) if file else folder / CLASS_NAMES
    if not file and not path.is_file():
        return None
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()  # Windows writes a byte-order mark
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--class_names {str(path)!r} cannot be read: {first_sentence(error)}") from error
    names = [line.strip() for line in lines if line.strip()]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"--class_names {str(path)!r} has the name {twice!r} twice.")
    return names


def standardize_labels(splits: dict, names: list[str] | None) -> dict:
    """
    Convert the labels of all splits to one `ClassLabel`. Its names are the first split's if it has a `ClassLabel` of more
    than numbers, or else `names`, or else the sorted values of the first split.

    Raises:
        UserError: a label is of no class, or the names of a stream are unknown.
    """
    first = next(iter(splits.values()))
    feature = first.features["label"]
    from_file = names is not None and not isinstance(feature, ClassLabel)
    if isinstance(feature, ClassLabel):
        from_file = names is not None and is_numbered(feature) and len(names) == feature.num_classes
        if names not in (None, feature.names) and not from_file:
            logger.warning(
                "The file of %s has no effect: the dataset names its %d classes itself, %r first.",
                *(counted(len(names), "class name"), feature.num_classes, feature.names[0]),
            )
        names = names if from_file else feature.names
    elif names is None and isinstance(first, IterableDataset):
        raise UserError(
            "The labels of the stream have no names: give --class_names with a file of them, one per line, label 0 first."
        )
    indices = {key: index for index, name in enumerate(names or ()) for key in (name, index)}
    if names is None:
        values = sorted(value for value in first.unique("label") if not is_null(value))
        names = [name_label(value) for value in values]
        indices = {value: index for index, value in enumerate(values)}
    result = {}
    for split, dataset in splits.items():
        feature, new_labels = dataset.features["label"], indices
        same_names = isinstance(feature, ClassLabel) and feature.names == names
        if isinstance(feature, ClassLabel) and not same_names and not (from_file and is_numbered(feature)):
            new_labels = {index: indices[name] for index, name in enumerate(feature.names) if name in indices}
        if isinstance(dataset, Dataset):
            check_labels(dataset, new_labels, len(names), split)
        unchanged = isinstance(dataset, Dataset) and same_names  # a stream is checked by map_labels
        result[split] = dataset if unchanged else map_labels(dataset, new_labels, names, split)
    return result


def is_numbered(feature: ClassLabel) -> bool:
    """Whether the names of the classes are their numbers, as in a dataset without names."""
    return feature.names == [str(index) for index in range(feature.num_classes)]


def name_label(value: str | float) -> str:
    """
    The name of a class whose label is `value`.

    Raises:
        UserError: the value is a number with a fraction.
    """
    if isinstance(value, float):
        if not value.is_integer():
            raise UserError(
                f"The column of labels contains {value!r}, but classes are names or whole numbers; name the right column with "
                "--label_column_name."
            )
        value = int(value)
    return str(value)


def map_labels(dataset: Dataset | IterableDataset, indices: dict, names: list[str], split: str):
    """
    Replace each label by `indices[label]`, a `ClassLabel` of `names`.

    Raises:
        UserError: a label has no index. A stream raises it when it is read.
    """
    return map_column(dataset, "label", partial(map_label, indices, len(names), split), ClassLabel(names=names))


def map_label(indices: dict, num_classes: int, split: str, label) -> int:
    if label not in indices:
        if is_null(label) or label == -1:
            raise UserError(
                f"One of the {split} images has no label ({label!r}); remove it, or choose another split with --{split}_split_name."
            )
        raise UserError(f"The {split} images have the label {label!r}, which is not one of the {num_classes} classes.")
    return indices[label]


def check_labels(dataset: Dataset, indices: dict, num_classes: int, split: str) -> None:
    unknown = [label for label in dataset.unique("label") if label not in indices]
    missing = [label for label in unknown if is_null(label) or label == -1]
    if missing:
        labels = dataset["label"][:]
        count = sum(label not in indices for label in labels)
        raise UserError(
            f"Without a label ({missing[0]!r}): {count} of {counted(len(labels), f'{split} image')}. Remove them, or choose other "
            f"images.{explain_null(dataset) if any(map(is_null, missing)) else ''}"
        )
    for label in unknown:
        map_label(indices, num_classes, split, label)


def explain_null(dataset: Dataset) -> str:
    """A sentence about the class names that pandas reads as nothing, if the dataset is a CSV file."""
    if dataset.info.builder_name != "csv":
        return ""
    return " In a CSV file, empty cells and the words None, NA, nan and null are no label: give such a class another name."


def is_null(label) -> bool:
    return label is None or label != label  # NaN in a column of floats


def is_unlabelled(dataset: Dataset) -> bool:
    """Whether no image has a label, as in the test splits of competitions."""
    return all(is_null(label) or label == -1 for label in dataset.unique("label"))

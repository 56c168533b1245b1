"""Which columns of a dataset are its images and labels, and what the labels are called."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

from datasets import ClassLabel, Dataset, Features, Image, IterableDataset, Value

from ..errors import UserError, first_sentence


CLASS_NAMES = "classnames.txt"  # beside the archives of a WebDataset
DEFAULT_COLUMNS = {"image": "image", "label": "label"}
STRINGS = ("string", "large_string", "string_view")
BINARIES = ("binary", "large_binary", "binary_view")


def standardize_columns(
    dataset: Dataset | IterableDataset, image_column: str, label_column: str, folders: Callable[[], list[Path]]
) -> Dataset | IterableDataset:
    """
    Keep the two columns that are wanted as `image` (encoded) and `label`.

    Args:
        folders: gives the folders of the dataset's own files. Relative paths of images are looked up there first.

    Raises:
        UserError: a column is not there, or holds something else; or which file a relative path means is not clear.
    """
    features = dataset.features
    if features is None:
        raise UserError("The dataset does not tell its columns, so it cannot be streamed; go without --streaming.")
    image, label = find_column("image", image_column, features), find_column("label", label_column, features)
    dataset = dataset.select_columns([image, label])
    for column in (image, label):
        dtype = getattr(features[column], "dtype", None)
        if dtype in ("string_view", "binary_view"):  # Arrow casts them to little else, and datasets loses their nulls
            plain = Features(dataset.features | {column: Value(dtype.removesuffix("_view"))})
            dataset = dataset.cast(plain) if isinstance(dataset, Dataset) else dataset.map(features=plain)
    dataset = dataset.cast_column(image, Image(decode=False))  # before all else, or a stream encodes images anew
    dataset = dataset.rename_columns(
        {theirs: ours for ours, theirs in (("image", image), ("label", label)) if theirs != ours}
    )
    if holds_paths(features[image]) and (found := folders()):
        dataset = map_column(dataset, "image", partial(locate_image, found), Image(decode=False))
    return dataset


def find_column(kind: str, wanted: str, features: Features) -> str:
    """The column that is wanted; in place of a default that is not there, the only one of its kind."""
    if wanted in features:
        if not (may_be_image if kind == "image" else may_be_label)(features[wanted]):
            raise UserError(f"{wanted!r} is no column of {kind}s; say which is with --{kind}_column_name.")
        return wanted
    if kind == "image":
        candidates = [name for name, feature in features.items() if is_image_file(feature)]
    else:  # cls is that of a WebDataset
        candidates = [name for name, feature in features.items() if isinstance(feature, ClassLabel) or name == "cls"]
    if wanted == DEFAULT_COLUMNS[kind] and len(candidates) == 1:
        return candidates[0]
    raise UserError(
        f"The dataset has no column {wanted!r}; it has {', '.join(map(repr, features))}. "
        f"Say which with --{kind}_column_name."
    )


def may_be_image(feature) -> bool:
    return is_image_file(feature) or (isinstance(feature, Value) and feature.dtype in STRINGS + BINARIES)


def is_image_file(feature) -> bool:
    """Whether it is an `Image`, or what is left of one in a file without the feature's metadata."""
    if isinstance(feature, Image):
        return True
    kinds = {"bytes": BINARIES, "path": STRINGS}
    return (
        isinstance(feature, dict)
        and feature != {}
        and all(getattr(part, "dtype", None) in kinds.get(name, ()) for name, part in feature.items())
    )


def holds_paths(feature) -> bool:
    """Whether the images lie in files of their own, for certain."""
    return getattr(feature, "dtype", None) in STRINGS or (isinstance(feature, dict) and "bytes" not in feature)


def may_be_label(feature) -> bool:
    numbers = ("bool", "int", "uint", "float")
    return isinstance(feature, ClassLabel) or (
        isinstance(feature, Value) and (feature.dtype in STRINGS or feature.dtype.startswith(numbers))
    )


def locate_image(folders: list[Path], encoded: dict | None) -> dict | None:
    """
    The image by its path in the folder of the dataset's files, where it is there; otherwise as it is.

    Raises:
        UserError: the files lie in several folders, and which of them names the image is not known.
    """
    path = None if encoded is None else encoded.get("path")
    if encoded is None or path is None or "://" in path or Path(path).is_absolute():
        return encoded
    found = [folder / path for folder in folders if os.path.isfile(folder / path)]  # False too of what is no path
    if found and len(folders) > 1:
        raise UserError(
            f"The image {path!r} may be of {str(folders[0])!r} or of {str(folders[1])!r}, where the dataset's tables lie; write "
            "its whole path into them."
        )
    return encoded | {"path": str(found[0])} if found else encoded


def map_column(dataset: Dataset | IterableDataset, column: str, function: Callable, feature):
    """The dataset with another value in each row of a column; the other columns are not copied."""
    if isinstance(dataset, Dataset):
        values = [function(value) for value in dataset[column][:]]
        return dataset.remove_columns(column).add_column(column, values, feature=feature)
    features = Features(dataset.features | {column: feature})
    return dataset.map(partial(map_value, column, function), input_columns=column, features=features)


def map_value(column: str, function: Callable, value) -> dict:
    return {column: function(value)}


def read_class_names(file: str | None, dataset_name: str) -> list[str] | None:
    """
    One name a line, that of label 0 first: of `file`, or else of `classnames.txt` in the dataset's folder if it is there.

    Raises:
        UserError: there is no such file.
    """
    folder = Path(dataset_name).parent if Path(dataset_name).is_file() else Path(dataset_name)
    path = Path(file) if file else folder / CLASS_NAMES
    if not file and not path.is_file():
        return None
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--class_names {str(path)!r} cannot be read: {first_sentence(error)}") from error
    names = [line.strip() for line in lines if line.strip()]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"--class_names {str(path)!r} has the name {twice!r} twice.")
    return names


def standardize_labels(splits: dict, names: list[str] | None) -> dict:
    """
    Splits whose labels are of kind `ClassLabel`, each one a class: of the names that the first split's feature has; or else
    of these names; or else of all values that the first split has, sorted.

    Raises:
        UserError: a label is none of them, or they are not known, as the images are streamed.
    """
    first = next(iter(splits.values()))
    feature = first.features["label"]
    if isinstance(feature, ClassLabel):
        names = feature.names
    elif names is None and isinstance(first, IterableDataset):
        raise UserError(
            "The labels have no names, and how many there are is not known before all images were streamed: give "
            "--class_names with a file of them, one name a line, that of label 0 first."
        )
    indices = {key: index for index, name in enumerate(names or ()) for key in (name, index)}
    if names is None:
        values = sorted(value for value in first.unique("label") if not is_null(value))
        names = [name_label(value) for value in values]
        indices = {value: index for index, value in enumerate(values)}
    named = {}
    for split, dataset in splits.items():
        own, known = dataset.features["label"], indices
        if isinstance(own, ClassLabel) and own.names != names:
            known = {index: indices[name] for index, name in enumerate(own.names) if name in indices}
        if isinstance(dataset, Dataset):
            check_labels(dataset, known, len(names), split)
        done = isinstance(dataset, Dataset) and isinstance(own, ClassLabel) and own.names == names
        named[split] = dataset if done else map_labels(dataset, known, names, split)
    return named


def name_label(value: str | float) -> str:
    """
    Raises:
        UserError: a number with a fraction.
    """
    if isinstance(value, float):
        if not value.is_integer():
            raise UserError(
                f"The column of labels holds {value!r}, and classes are names or whole numbers; say which column is with "
                "--label_column_name."
            )
        value = int(value)
    return str(value)


def map_labels(dataset: Dataset | IterableDataset, indices: dict, names: list[str], split: str):
    """
    The dataset with `indices[label]` in place of each label, a `ClassLabel` of these names.

    Raises:
        UserError: a label has no index; of a stream when it comes.
    """
    return map_column(dataset, "label", partial(map_label, indices, len(names), split), ClassLabel(names=names))


def map_label(indices: dict, num_classes: int, split: str, label) -> int:
    if label not in indices:
        if is_null(label) or label == -1:
            raise UserError(f"One of the {split} images has no label ({label!r}); leave it out.")
        raise UserError(f"The {split} images have the label {label!r}, which is none of the {num_classes} classes.")
    return indices[label]


def check_labels(dataset: Dataset, indices: dict, num_classes: int, split: str) -> None:
    unknown = [label for label in dataset.unique("label") if label not in indices]
    missing = [label for label in unknown if is_null(label) or label == -1]
    if missing:
        labels = dataset["label"][:]
        count = sum(label not in indices for label in labels)
        raise UserError(
            f"{count} of the {len(labels)} {split} images have no label ({missing[0]!r}): leave them out, or choose other "
            "images."
        )
    for label in unknown:
        map_label(indices, num_classes, split, label)


def is_null(label) -> bool:
    return label is None or label != label  # a table of floats has NaN


def is_unlabelled(dataset: Dataset) -> bool:
    """Whether no image has a label, as in the test splits of contests."""
    return all(is_null(label) or label == -1 for label in dataset.unique("label"))

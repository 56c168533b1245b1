"""Which columns of a dataset are its images and labels, and what the labels are called."""

from pathlib import Path

from datasets import ClassLabel, Dataset, Features, Image, IterableDataset, Value

from .errors import UserError, first_sentence


CLASS_NAMES = "classnames.txt"  # beside the archives of a WebDataset
DEFAULT_COLUMNS = {"image": "image", "label": "label"}


def name_columns(
    dataset: Dataset | IterableDataset, image_column: str, label_column: str
) -> Dataset | IterableDataset:
    """
    Keep the two columns that are wanted as `image` (encoded) and `label`.

    Raises:
        UserError: a column is not there, or holds something else.
    """
    features = dataset.features
    if features is None:
        raise UserError("The dataset does not tell its columns, so it cannot be streamed; go without --streaming.")
    image, label = find_column("image", image_column, features), find_column("label", label_column, features)
    dataset = dataset.select_columns([image, label])
    dataset = dataset.cast_column(image, Image(decode=False))  # before all else, or a stream encodes images anew
    return dataset.rename_columns(
        {theirs: ours for ours, theirs in (("image", image), ("label", label)) if theirs != ours}
    )


def find_column(kind: str, wanted: str, features: Features) -> str:
    """The column that is wanted; in place of a default that is not there, the only one of its kind."""
    if wanted in features:
        if not (may_be_image if kind == "image" else may_be_label)(features[wanted]):
            raise UserError(f"{wanted!r} is no column of {kind}s; say which is with --{kind}_column_name.")
        return wanted
    if kind == "image":
        candidates = [name for name, feature in features.items() if isinstance(feature, Image)]
    else:  # cls is that of a WebDataset
        candidates = [name for name, feature in features.items() if isinstance(feature, ClassLabel) or name == "cls"]
    if wanted == DEFAULT_COLUMNS[kind] and len(candidates) == 1:
        return candidates[0]
    raise UserError(
        f"The dataset has no column {wanted!r}; it has {', '.join(map(repr, features))}. "
        f"Say which with --{kind}_column_name."
    )


def may_be_image(feature) -> bool:
    return isinstance(feature, Image) or (isinstance(feature, Value) and feature.dtype in ("string", "binary"))


def may_be_label(feature) -> bool:
    names_or_numbers = ("string", "large_string", "int", "uint")
    return isinstance(feature, ClassLabel) or (
        isinstance(feature, Value) and feature.dtype.startswith(names_or_numbers)
    )


def read_class_names(file: str | None, dataset_name: str) -> list[str] | None:
    """
    One name a line, that of label 0 first: of `file`, or else of `classnames.txt` in the dataset's folder if it is there.

    Raises:
        UserError: there is no such file.
    """
    path = Path(file) if file else Path(dataset_name) / CLASS_NAMES
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


def name_labels(splits: dict, names: list[str] | None) -> dict:
    """
    Splits whose labels are of kind `ClassLabel`: as they are; or else of these names; or else of all values that the first
    split has, sorted.

    Raises:
        UserError: a label is none of them, or they are not known, as the images are streamed.
    """
    first = next(iter(splits.values()))
    if isinstance(first.features["label"], ClassLabel):
        return splits
    if names is None:
        if isinstance(first, IterableDataset):
            raise UserError(
                "The labels have no names, and how many there are is not known before all images were streamed: give "
                "--class_names with a file of them, one name a line, that of label 0 first."
            )
        values = first.unique("label")
        names = [str(value) for value in sorted(value for value in values if value is not None)]
        splits = {split: dataset.cast_column("label", Value("string")) for split, dataset in splits.items()}
    for split, dataset in splits.items():
        if isinstance(dataset, Dataset):  # those of a stream are looked at as they come
            check_labels(dataset.unique("label"), names, split)
    return {split: dataset.cast_column("label", ClassLabel(names=names)) for split, dataset in splits.items()}


def check_labels(labels: list[str | int | None], names: list[str], split: str) -> None:
    for label in labels:
        if not (label in names if isinstance(label, str) else label is not None and 0 <= label < len(names)):
            raise UserError(f"The {split} images have the label {label!r}, which is none of the {len(names)} classes.")

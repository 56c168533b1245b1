"""Compares the class names of a model with a dataset's."""

import re
import unicodedata
from collections import Counter

from transformers import PreTrainedConfig

from binaryvit_runtime.errors import UserError, counted, did_you_mean


# Spaces and punctuation that a comparison ignores. It keeps them between digits (1.5 is not 15), and the minus sign of a number.
IGNORED_CHARACTERS = re.compile(
    r"""(?!(?<![^\W_])-\.?\d)(?:(?<!\d)[\s_'\u2019\u2018"./&()-]|[\s_'\u2019\u2018"./&()-](?!\d))"""
)


def compare_labels(config: PreTrainedConfig, labels: list[str], model_name: str, remedy: str) -> None:
    """
    Check that a model has the labels of the images. Default names (`LABEL_0`) match any name.

    Raises:
        UserError: the labels differ in number or names.
    """
    model_labels = label_names(config)
    if len(model_labels) != len(labels):
        raise UserError(
            f"{model_name} has {counted(len(model_labels), 'label')}, the images have {len(labels)}; {remedy}."
        )
    index = first_difference(model_labels, labels)
    if index is not None:
        raise UserError(
            f"{model_name} calls label {index} {model_labels[index]!r}, the images call it {labels[index]!r}; {remedy}."
        )


def match_labels(config: PreTrainedConfig, labels: list[str], model_name: str) -> list[int]:
    """
    Find the model's index of each label of the images. The images may have fewer labels, in another order.

    Raises:
        UserError: a label matches none or several of the model's labels.
    """
    model_labels = label_names(config)
    if len(model_labels) == len(labels) and first_difference(model_labels, labels) is None:
        return list(range(len(labels)))
    exact, synonym_of = set(labels), list(map(first_synonym, model_labels))
    indices: list[int] = []
    for label in labels:
        found = [index for index, name in enumerate(model_labels) if name == label]
        if not found and (wanted := first_synonym(label)):
            found = [i for i, name in enumerate(model_labels) if synonym_of[i] == wanted and name not in exact]
        if not found:
            remedy = "; evaluate it on images of its own classes."
            raise UserError(
                f"{model_name} has no class {label!r}, which the images have{did_you_mean(label, model_labels, remedy)}"
            )
        if len(found) > 1 or found[0] in indices:
            raise UserError(
                f"{model_name} has several classes that match the images' {label!r}; give the images the model's own names."
            )
        indices += found
    return indices


def label_names(config: PreTrainedConfig) -> list[str]:
    return [config.id2label.get(index, default_name(index)) for index in range(config.num_labels)]


def default_name(index: int) -> str:
    """The name that transformers gives to a label without a name."""
    return f"LABEL_{index}"


def first_difference(model_labels: list[str], labels: list[str]) -> int | None:
    """
    The first index at which two lists of the same length name different classes; `None` if there is none.

    It ignores how copies of ImageNet's names differ: in case, spaces, hyphens, apostrophes and the number of synonyms.
    """
    # The exact name of another class is not a spelling of this one: C, C# and C++; A and a.
    others = {label for model_label, label in zip(model_labels, labels) if model_label != label}
    counts = Counter(map(first_synonym, model_labels)) | Counter(map(first_synonym, labels))
    for index, (model_label, label) in enumerate(zip(model_labels, labels)):
        if model_label in (label, default_name(index)):
            continue
        first = first_synonym(label)
        same_first = first_synonym(model_label) == first != "" and model_label not in others
        contained = synonyms(model_label) <= synonyms(label) or synonyms(label) <= synonyms(model_label)
        if not same_first or not (counts[first] == 1 or contained):
            return index
    return None


def first_synonym(label: str) -> str:
    return normalize_spelling(label.split(",")[0])


def synonyms(label: str) -> set[str]:
    return set(map(normalize_spelling, label.split(",")))


def normalize_spelling(name: str) -> str:
    # NFC: macOS and other systems write accents in different ways.
    return IGNORED_CHARACTERS.sub("", unicodedata.normalize("NFC", name).casefold())

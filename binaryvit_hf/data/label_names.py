"""Whether a model's class names and the images' mean the same classes."""

import re
from collections import Counter

from transformers import PreTrainedConfig

from ..errors import UserError


# Spaces and punctuation that two copies of a name may differ in: neither between digits (1.5 is not 15) nor a minus sign.
SPELLING = re.compile(r"""(?!(?<![^\W_])-\.?\d)(?:(?<!\d)[\s_'\u2019\u2018"./&()-]|[\s_'\u2019\u2018"./&()-](?!\d))""")


def compare_labels(config: PreTrainedConfig, labels: list[str], who: str, remedy: str) -> None:
    """
    Raises:
        UserError: the labels of a model differ from the images' in number or, if it has names for them, in names.
    """
    theirs = label_names(config)
    if len(theirs) != len(labels):
        raise UserError(f"{who} has {len(theirs)} labels, the images have {len(labels)}; {remedy}.")
    index = first_difference(theirs, labels)
    if index is not None:
        raise UserError(
            f"{who} calls label {index} {theirs[index]!r}, the images call it {labels[index]!r}; {remedy}."
        )


def match_labels(config: PreTrainedConfig, labels: list[str], who: str) -> list[int]:
    """
    The model's index of each of the images' labels, which may be fewer and in another order.

    Raises:
        UserError: the model does not know a label, or has several of that name.
    """
    theirs = label_names(config)
    if len(theirs) == len(labels) and first_difference(theirs, labels) is None:
        return list(range(len(labels)))
    own, firsts = set(labels), list(map(first_synonym, theirs))
    indices: list[int] = []
    for label in labels:
        found = [index for index, name in enumerate(theirs) if name == label]
        if not found and (wanted := first_synonym(label)):
            found = [index for index, first in enumerate(firsts) if first == wanted and theirs[index] not in own]
        if not found:
            raise UserError(
                f"{who} has no class {label!r}, which the images have; evaluate it on images of its own classes."
            )
        if len(found) > 1 or found[0] in indices:
            raise UserError(
                f"{who}: which of its classes the images' {label!r} is, is not clear; give the images the model's own names."
            )
        indices += found
    return indices


def label_names(config: PreTrainedConfig) -> list[str]:
    return [config.id2label.get(index, unnamed(index)) for index in range(config.num_labels)]


def unnamed(index: int) -> str:
    """What transformers calls a label without a name."""
    return f"LABEL_{index}"


def first_difference(theirs: list[str], ours: list[str]) -> int | None:
    """
    The first index at which two lists of as many names differ in more than the spelling: copies of ImageNet's names differ
    in case, spaces, hyphens and apostrophes, and in how many synonyms follow the first one.
    """
    # What is the very name of another class is no other spelling of this one: C, C# and C++; A and a.
    others = {our for their, our in zip(theirs, ours) if their != our}
    counts = Counter(map(first_synonym, theirs)) | Counter(map(first_synonym, ours))
    for index, (their, our) in enumerate(zip(theirs, ours)):
        if their in (our, unnamed(index)):
            continue
        first = first_synonym(our)
        alike = first_synonym(their) == first != "" and their not in others
        contained = synonyms(their) <= synonyms(our) or synonyms(our) <= synonyms(their)
        if not alike or not (counts[first] == 1 or contained):
            return index
    return None


def first_synonym(label: str) -> str:
    return spelled(label.split(",")[0])


def synonyms(label: str) -> set[str]:
    return set(map(spelled, label.split(",")))


def spelled(name: str) -> str:
    return SPELLING.sub("", name.casefold())

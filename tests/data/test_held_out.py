"""Images held out for evaluation: the same share of every class, whatever the seed."""

import logging

import pytest
from datasets import ClassLabel, Dataset, Features, Value
from hypothesis import given
from hypothesis import strategies as st

from binaryvit_hf.data.held_out import hold_out, share_out
from binaryvit_runtime.errors import UserError


def numbered(*counts: int) -> Dataset:
    """Images that are numbers. Class `c0` has `counts[0]` of them, and so on."""
    labels = [label for label, count in enumerate(counts) for _ in range(count)]
    features = Features({"image": Value("int64"), "label": ClassLabel(names=[f"c{k}" for k in range(len(counts))])})
    return Dataset.from_dict({"image": list(range(len(labels))), "label": labels}, features=features)


def held(size: float | None, *counts: int) -> list[int]:
    """The number of images of each class that are held out. Each image is in one of the two parts."""
    images = numbered(*counts)
    parts = hold_out({"train": images}, size)
    both = sorted([*parts["train"]["image"], *parts["validation"]["image"]])
    assert both == list(range(len(images)))
    return [parts["validation"]["label"][:].count(label) for label in range(len(counts))]


@pytest.mark.parametrize(
    "size, counts, expected",
    [
        (None, (100, 100), [15, 15]),
        (None, (200, 60, 20), [30, 9, 3]),
        (0.5, (3, 3), [2, 1]),
        (10, (74, 26), [7, 3]),
        (None, (1000, 3, 2), [149, 1, 1]),  # a small class is in both parts
        (None, (2, 2, 2, 2), [1, 1, 1, 1]),  # so the share grows
        (0.7, (4, 2), [3, 1]),  # or shrinks
        (0.99, (4, 2), [3, 1]),  # also where it rounds to all images
        (None, (40, 1), [7, 0]),
        (1, (9, 30, 9), [0, 1, 0]),  # too few for all classes
        (34, (30, 6), [29, 5]),
    ],
)
def test_every_class_gives_its_share_and_keeps_an_image(size, counts, expected):
    assert held(size, *counts) == expected


@given(st.lists(st.integers(0, 30), min_size=1, max_size=12), st.data())
def test_any_possible_number_is_shared_out(counts, data):
    most = sum(max(0, count - 1) for count in counts)
    number = data.draw(st.integers(0, most))
    shares = share_out(counts, number)
    assert sum(shares) == number
    assert all(0 <= share < max(1, count) for share, count in zip(shares, counts))
    if number >= sum(count > 1 for count in counts):
        assert all(share > 0 for share, count in zip(shares, counts) if count > 1)


def test_the_same_images_are_held_out_each_time_and_not_the_first_ones():
    first, again = (hold_out({"train": numbered(60, 40)}, None)["validation"]["image"][:] for _ in range(2))
    assert first == again
    assert first == sorted(first)
    assert first != [*range(9), *range(60, 66)]


def test_a_class_of_one_image_is_trained_on_and_named(caplog):
    with caplog.at_level(logging.WARNING):
        held(None, 20, 1)
    assert "1 class with a single image, which is trained on and not evaluated: 'c1'." in caplog.text


@pytest.mark.parametrize(
    "size, counts, words",
    [
        (None, (1, 1), ["No image can be held out", "'c0' has 1, 'c1' has 1. Add images"]),
        (None, (1,), ["'c0' has 1. Add images"]),
        (1, (1, 0, 1), ["'c1' has 0, 'c0' has 1, 'c2' has 1. Add images"]),
        (6, (4, 3), ["--train_val_split 6 is too large", "at most 5 of 7 images", "'c1' has 3, 'c0' has 4"]),
        (None, (1,) * 12, ["'c9' has 1, …. Add images"]),
    ],
    ids=["single images", "one image", "an empty class", "too many", "many classes"],
)
def test_more_than_the_classes_can_give_is_refused_with_their_numbers(size, counts, words):
    with pytest.raises(UserError, match=r"every class keeps .* to train on.*--validation_dir") as refused:
        hold_out({"train": numbered(*counts)}, size)
    for word in words:
        assert word in str(refused.value)

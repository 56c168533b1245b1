"""Pictures that are classified at once do not share memory, and later ones use it again."""

import numpy as np
import pytest

from binaryvit_runtime import Classifier


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    return Classifier.from_pretrained("binaryvit-digits", threads=1)


PICTURES = [np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8) for seed in range(2)]


def test_a_picture_may_be_classified_while_another_one_is(classifier, monkeypatch):
    """As in a signal handler, or in another thread."""
    first, second = map(classifier, PICTURES)
    assert first != second
    compute, inner = classifier.network.classify, []

    def classify_another_first(images, *arguments, **options):
        if not inner:
            inner.append(None)  # the other picture's forward comes here too
            inner.append(classifier(PICTURES[1]))
        return compute(images, *arguments, **options)

    monkeypatch.setattr(classifier.network, "classify", classify_another_first)
    assert classifier(PICTURES[0]) == first
    assert inner[1] == second


def test_a_later_picture_takes_the_memory_of_an_earlier_one(classifier, monkeypatch):
    compute, addresses = classifier.network.classify, []

    def classify(images, *arguments, **options):
        addresses.append(images.ctypes.data)
        return compute(images, *arguments, **options)

    monkeypatch.setattr(classifier.network, "classify", classify)
    classifier(5 * PICTURES)
    assert len(addresses) == 10
    assert len(set(addresses)) == 1

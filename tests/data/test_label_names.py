"""Class names of a model and of images match in other spellings; names of other classes do not match."""

import pytest
from transformers import ViTConfig

from binaryvit_hf.data.label_names import compare_labels, match_labels
from binaryvit_runtime.errors import UserError


def config(*names: str) -> ViTConfig:
    return ViTConfig(id2label=dict(enumerate(names)))


@pytest.mark.parametrize(
    "theirs, ours",
    [
        (["tench, Tinca tinca", "LABEL_1"], ["Tench", "T - shirt / top"]),
        (["jack-o'-lantern", "T-shirt/top"], ["jack_o'_lantern", "T - shirt / top"]),
        (["carpenter\u2019s kit", "St. Bernard"], ["carpenter's_kit, tool kit", "st bernard"]),
        (["crane", "x", "crane"], ["crane", "x", "crane, bird"]),  # ImageNet has two classes of that name
        (["maillot", "maillot, tank suit"], ["maillot", "maillot"]),
        (["cardigan", "cardigan"], ["Cardigan, Cardigan Welsh corgi", "cardigan"]),
        (["class-1", "class-2"], ["class_1", "class 2"]),
        (["C", "C#", "C++"], ["C", "C#", "C++"]),
        (["A", "b"], ["a", "B"]),
        (["-1", "0"], ["-1", "0"]),
        (["cafe\u0301", "bar"], ["caf\u00e9", "bar"]),
    ],
)
def test_names_that_differ_only_in_spelling_match(theirs, ours):
    compare_labels(config(*theirs), ours, "the teacher", "choose another")
    assert match_labels(config(*theirs), ours, "the model") == list(range(len(ours)))


@pytest.mark.parametrize(
    "theirs, ours",
    [
        (["tench", "goldfish"], ["goldfish", "tench"]),
        (["C++", "C", "C#"], ["C", "C#", "C++"]),
        (["C#", "Java"], ["C++", "Java"]),
        (["-1", "0", "1"], ["1", "0", "-1"]),
        (["-1", "0"], ["1", "0"]),
        (["at -1", "at 0"], ["at 1", "at 0"]),
        (["1.5", "2"], ["15", "2"]),
        (["1/2", "2"], ["1.2", "2"]),
        (["A", "a"], ["a", "A"]),
        (["a, b", "a, c"], ["a, c", "a, b"]),
        (["a, b", "a, d"], ["a, c", "a, d"]),
        (["!", "?"], ["?", "!"]),
        (["-", "+"], ["/", "+"]),
        (["maillot, tank suit", "maillot"], ["maillot", "maillot, tank suit"]),
    ],
)
def test_names_of_other_classes_are_refused(theirs, ours):
    index = next(index for index, (their, our) in enumerate(zip(theirs, ours)) if their != our)
    with pytest.raises(UserError) as refused:
        compare_labels(config(*theirs), ours, "the teacher", "choose another")
    assert str(refused.value) == (
        f"the teacher calls label {index} {theirs[index]!r}, the images call it {ours[index]!r}; choose another."
    )


@pytest.mark.parametrize(
    "ours, indices",
    [
        (["cat", "ant"], [2, 0]),
        (["Bee"], [1]),
        (["C++", "C"], [5, 3]),
        (["1", "-1"], [7, 6]),
    ],
)
def test_labels_of_images_to_evaluate_are_found_among_the_models(ours, indices):
    model = config("ant", "bee, Apis", "cat", "C", "C#", "C++", "-1", "1")
    assert match_labels(model, ours, "the model") == indices


@pytest.mark.parametrize(
    "ours, message",
    [
        (["ant", "cow"], "has no class 'cow'"),
        (["ant", "C"], "has no class 'C'"),
        (["bee", "Bee"], "several classes that match the images' 'Bee'"),
        (["crane"], "several classes that match the images' 'crane'"),
    ],
)
def test_a_label_that_the_model_does_not_know_is_refused_by_name(ours, message):
    with pytest.raises(UserError, match=message):
        match_labels(config("ant", "bee, Apis", "C#", "crane", "crane"), ours, "the model")


def test_a_model_without_names_is_matched_by_the_number_of_labels_alone():
    assert match_labels(config("LABEL_0", "LABEL_1"), ["ant", "bee"], "the model") == [0, 1]
    with pytest.raises(UserError, match="no class 'ant'"):
        match_labels(config("LABEL_0", "LABEL_1"), ["ant"], "the model")

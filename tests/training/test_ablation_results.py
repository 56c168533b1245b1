"""Intervals, tests, words and pictures of an ablation, from the answers of its runs."""

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from scipy.stats import norm

from binaryvit_hf.training.ablation import pictures
from binaryvit_hf.training.ablation.estimates import (
    Difference,
    Interval,
    SeedVariance,
    correct_for_several,
    estimate_accuracy,
    estimate_difference,
)
from binaryvit_hf.training.ablation.pictures import Point, place_labels, plot_accuracy
from binaryvit_hf.training.ablation.results import RowResults, compare_rows, readable_interval, readable_p
from binaryvit_hf.training.ablation.table import Row


def draw_table(rng: np.random.Generator, quality: list[float], seeds: int, images: int) -> list[np.ndarray]:
    """Right answers `(seeds, images)` of each row: images, rows, seeds and their interactions all have an effect."""
    of_images = rng.normal(0, 2, images)
    return [
        row
        + of_images
        + rng.normal(0, 0.6, images)
        + rng.normal(0, 0.08, (seeds, 1))
        + rng.normal(0, 0.3, (seeds, images))
        > 0
        for row in quality
    ]


def test_intervals_of_differences_hold_the_truth_for_other_seeds_and_images():
    rng, held, found = np.random.default_rng(0), [], []
    for _ in range(400):
        rows = draw_table(rng, [2.0, 2.0, 2.0], seeds=3, images=1000)
        between_seeds = SeedVariance.of_rows(rows)
        estimate = estimate_difference(rows[1], rows[0], between_seeds)
        held.append(estimate.low <= 0 <= estimate.high)
        found.append(estimate.p < 0.05)
    assert 0.93 <= np.mean(held) <= 0.99
    assert np.mean(found) == pytest.approx(1 - np.mean(held))


def coverage(accuracy: float, images: int, seeds: int, deviations: list[float], tables: int = 400) -> np.ndarray:
    """The shares of intervals that hold the truth: of the last row's accuracy, and of its difference to the row before."""
    rng, held = np.random.default_rng(0), []
    others = 1 + 0.3**2 + 0.15**2  # the variance of an answer within a seed; it is right if the sum is above 0
    for _ in range(tables):
        of_images = rng.normal(0, 1, images)
        rows = [
            norm.ppf(accuracy) * (others + deviation**2) ** 0.5
            + of_images
            + rng.normal(0, deviation, (seeds, 1))
            + rng.normal(0, 0.3, images)
            + rng.normal(0, 0.15, (seeds, images))
            > 0
            for deviation in deviations
        ]
        between_seeds = SeedVariance.of_rows(rows)
        interval, difference = (
            estimate_accuracy(rows[-1], between_seeds),
            estimate_difference(*rows[-2:], between_seeds),
        )
        held.append(
            [interval.low <= accuracy <= interval.high, difference is None or difference.low <= 0 <= difference.high]
        )
    return np.mean(held, axis=0)


def test_intervals_hold_the_truth_of_a_row_whose_seeds_differ_more_than_those_of_the_others():
    assert np.all(coverage(0.88, 1000, 3, [0.05] * 8 + [0.15]) > 0.915)  # with the table's freedom: 0.895


def test_intervals_of_accuracies_near_100_percent_hold_the_truth():
    (of_accuracy, _) = coverage(0.993, 360, 5, [0.1, 0.1])
    assert of_accuracy > 0.92  # t intervals: 0.88


def test_an_accuracy_of_100_percent_has_the_interval_of_its_images():
    right = np.ones((3, 100), dtype=bool)
    for answers, ends in ((right, (100 / 103.8415, 1)), (~right, (0, 3.8415 / 103.8415))):
        estimate = estimate_accuracy(answers, SeedVariance.of_rows([answers]))
        assert (estimate.low, estimate.high) == pytest.approx(ends, abs=1e-5)
    apart = np.array([np.arange(100) < right for right in (80, 90, 99)])
    beside_others = estimate_accuracy(right, SeedVariance.of_rows([right, apart]))
    assert beside_others.low == pytest.approx(100 / 103.8415, abs=1e-5)


def test_a_row_near_100_percent_takes_no_interval_from_rows_with_more_room_to_vary():
    apart = np.array([np.arange(10000) < right for right in (9100, 9000, 8900)])
    near = np.array([np.arange(10000) < right for right in (9995, 9994, 9993)])
    estimate = estimate_accuracy(near, SeedVariance.of_rows([near, apart]))
    assert 0.995 < estimate.low < 0.9994 < estimate.high  # with the mean of the table: 0.899


def test_a_difference_far_larger_than_its_interval_is_found():
    rows = draw_table(np.random.default_rng(0), [2.0, 3.0], seeds=3, images=2000)
    estimate = estimate_difference(rows[1], rows[0], SeedVariance.of_rows(rows))
    assert estimate.value == pytest.approx(rows[1].mean() - rows[0].mean())
    assert estimate.low > 0
    assert estimate.p < 0.001


def test_paired_images_give_a_shorter_interval_than_the_accuracies_themselves():
    rows = draw_table(np.random.default_rng(0), [2.0, 2.0], seeds=3, images=2000)
    between_seeds = SeedVariance.of_rows(rows)
    ours, theirs = (estimate_accuracy(row, between_seeds) for row in rows)
    of_accuracies = np.hypot(*(interval.high - interval.value for interval in (ours, theirs)))
    assert estimate_difference(*rows, between_seeds).half_width < of_accuracies


def test_seeds_that_agree_by_chance_have_the_variance_of_the_table():
    rows = draw_table(np.random.default_rng(0), [2.0, 2.0], seeds=3, images=1000)
    alike = rows[0][:1].repeat(3, axis=0)
    alone = estimate_accuracy(alike, SeedVariance.of_rows([alike]))
    of_table = estimate_accuracy(alike, SeedVariance.of_rows([alike, rows[1]]))
    assert of_table.low < alone.low
    assert of_table.high > alone.high


def test_the_variance_of_seeds_is_the_mean_over_rows():
    rows = [np.array([[True, True], [True, False]]), np.array([[True, False]]), np.array([[False, False]] * 3)]
    assert SeedVariance.of_rows(rows) == SeedVariance(0.125 / 3, 3, 0.1875 / 3)
    assert SeedVariance.of_rows(rows[1:2]) is None


def test_one_or_two_seeds_have_no_interval_and_equal_answers_have_no_difference():
    three = np.array([[True, False, True]] * 3)
    between_seeds = SeedVariance.of_rows([three])
    assert estimate_accuracy(three, between_seeds) is not None
    for few in (three[:1], three[:2]):
        assert estimate_accuracy(few, between_seeds) is None
        assert estimate_difference(three, few, between_seeds) is None
        assert estimate_difference(few, three, between_seeds) is None
    assert estimate_difference(three, three, SeedVariance(0.0, 2, 0.2)) is None


def test_p_values_are_corrected_as_holm_says():
    assert correct_for_several([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert correct_for_several([0.9, 0.8]) == [1.0, 1.0]
    assert correct_for_several([]) == []


def results_of(key: str, correct: np.ndarray, compared_with: str | None = None, **changes) -> RowResults:
    row = Row(key, f"row {key}", key, "student.json", compared_with=compared_with)
    labels = changes.get("labels", np.zeros(correct.shape[1], dtype=int))
    return RowResults(row, correct, labels, [50.0] * len(correct), [None] * len(correct), None)


def in_words(*rows: RowResults) -> list[str]:
    results = {row.row.key: row for row in rows}
    comparisons = compare_rows(results, SeedVariance.of_rows(row.correct for row in rows))
    return [comparison.in_words(len(comparisons)) for comparison in comparisons.values()]


def test_words_claim_what_the_test_shows():
    base, same, better = draw_table(np.random.default_rng(1), [2.0, 2.0, 3.0], seeds=3, images=2000)
    rows = [
        results_of("a", base),
        results_of("b", same, "a"),
        results_of("c", better, "a"),
        results_of("d", base, "c"),
    ]
    nothing, gain, loss = in_words(*rows)
    assert nothing.startswith("row b: no difference could be shown, compared with row a (")
    assert gain.startswith(f"row c: helps by {100 * (better.mean() - base.mean()):.2f} ± ")
    assert gain.endswith(" points, compared with row a (p < 0.001).")
    assert loss.startswith(f"row d: costs {100 * (better.mean() - base.mean()):.2f} ± ")


def test_a_difference_that_only_one_of_many_tests_would_show_is_not_claimed():
    rng = np.random.default_rng(2)
    rows = draw_table(rng, [2.0, 2.25, *[2.0] * 8], seeds=3, images=3000)
    names = "abcdefghij"
    words = in_words(*(results_of(name, row, None if name == "a" else "a") for name, row in zip(names, rows)))
    assert words[0].startswith("row b: no difference could be shown after the correction for 9 comparisons")


def test_words_say_why_a_row_is_not_tested():
    base, other = draw_table(np.random.default_rng(1), [2.0, 3.0], seeds=3, images=100)
    (words,) = in_words(results_of("a", base), results_of("b", other[:1], "a"))
    assert words.endswith("compared with row a; not tested, as row b has 1 seed of at least 3.")
    (words,) = in_words(results_of("a", base[:2]), results_of("b", other, "a"))
    assert words.endswith("not tested, as row a has 2 seeds of at least 3.")
    (words,) = in_words(results_of("a", base), results_of("b", other, "a", labels=np.ones(100, dtype=int)))
    assert words.endswith("not tested, as their test images differ.")
    right = np.ones((3, 100), dtype=bool)
    (words,) = in_words(results_of("a", right), results_of("b", right, "a"))
    assert words.endswith("not tested, as all images and seeds have the same difference.")


def test_p_and_intervals_are_readable():
    values = (0.0001, 0.0123, 0.456, 0.0497, 0.0503)
    assert [readable_p(p) for p in values] == ["p < 0.001", "p = 0.012", "p = 0.46", "p = 0.0497", "p = 0.0503"]
    assert readable_interval(Interval(90.0, 88.9, 91.0), ".2f") == "[88.90, 91.00]"
    assert readable_interval(Difference(-0.5, 1.0, 0.3), "+.2f") == "[-1.50, +0.50]"
    assert readable_interval(None, ".2f") == ""


def test_a_title_may_have_dollars(tmp_path):
    point = Point("row", 1e6, 90.0, None)
    plot_accuracy([point], r"cost in $\eur and $", "OPs", tmp_path / "accuracy.png")
    bar = pictures.Bar("row", 0.5, None, False)
    pictures.plot_differences([bar], r"cost in $\eur and $", "other", tmp_path / "differences.png")


def test_labels_lie_on_no_point_interval_or_other_label(tmp_path, monkeypatch):
    points = [
        Point("DeiT, full precision", 17.6e6, 92.4, Interval(92.4, 91.9, 92.9)),
        Point("+ average pooling", 431e3, 88.4, Interval(88.4, 87.8, 89.0)),
        Point("+ multi-branch", 431e3, 88.7, Interval(88.7, 88.1, 89.3)),
        Point("+ $affine$ (LayerScale)", 431e3, 89.7, Interval(89.7, 89.1, 90.3)),
        Point("+ pyramid = BinaryViT", 281e3, 89.8, Interval(89.8, 89.1, 90.5)),
        Point("BinaryViT, some full precision", 861e3, 90.9, Interval(90.9, 90.3, 91.5)),
        Point("BinaryViT, four times as many epochs", 281e3, 91.1, None),
    ]
    drawn = []
    monkeypatch.setattr(
        pictures, "place_labels", lambda axes, points: drawn.append(axes) or place_labels(axes, points)
    )
    plot_accuracy(points, "Title", "OPs", tmp_path / "picture.png")
    (axes,) = drawn
    labels = [child for child in axes.get_children() if isinstance(child, Annotation)]
    assert [label.get_text() for label in labels] == [point.name for point in points]
    assert isinstance(axes.figure, Figure)
    boxes = [label.get_window_extent() for label in labels]
    of_points = [pictures.box_of(axes, point, axes.figure.dpi / 72) for point in points]
    for number, box in enumerate(boxes):
        assert box.count_overlaps([*boxes[:number], *boxes[number + 1 :], *of_points]) == 0
        assert pictures.contains(axes.bbox, box)

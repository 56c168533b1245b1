"""
Intervals and tests for accuracies of several seeds on the same test images.

Both the seeds and the images are samples: another seed gives another network, and other images other errors. Every run answers
all images, so the two are crossed. The variance of a mean is estimated from the mean squares of seeds, images and their
interaction, and its degrees of freedom by Satterthwaite's formula, as for readers and cases in radiology (Hillis, Statistics in
Medicine 26, 2007).

Three seeds of a row say little about the variance between seeds, so all rows of a table say it together: each row has its own
variance or the mean of the table, whichever is larger, with the degrees of freedom of that one. Two seeds say almost nothing: such
a row has the degrees of freedom of the table. A bootstrap over three seeds would give intervals that are too short.

In simulated tables of 7 and 16 rows with three seeds, 96 % of the intervals hold the truth if the seeds of all rows differ alike;
92 to 95 % of those of a row whose seeds differ two to four times as much as the others'.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from scipy.stats import t as student_t

from ..confusion import wilson_interval


LEVEL = 0.95
# One degree of freedom gives an interval 13 times as long as the standard error: it may hold all accuracies from 0 to 100 %.
LEAST_FREEDOM = 2
NO_INTERVAL = "Where the interval is missing, the seeds are too few."


@dataclass(frozen=True)
class Estimate:
    """
    A mean with its 95 % confidence interval.

    Args:
        half_width: the interval is `value - half_width` to `value + half_width`.
        p: of the two-sided test that the mean is zero.
    """

    value: float
    half_width: float
    p: float

    @property
    def low(self) -> float:
        return self.value - self.half_width

    @property
    def high(self) -> float:
        return self.value + self.half_width


@dataclass(frozen=True)
class SeedVariance:
    """The mean over rows of the variance of accuracies between seeds, with its degrees of freedom."""

    value: float
    freedom: int

    @classmethod
    def of_rows(cls, rows: Iterable[np.ndarray]) -> SeedVariance | None:
        """Of rows `(seeds, images)` of right answers; `None` if none has two seeds."""
        accuracies = [correct.mean(axis=1) for correct in rows if len(correct) > 1]
        freedom = sum(len(of_runs) - 1 for of_runs in accuracies)
        squares = sum(((of_runs - of_runs.mean()) ** 2).sum() for of_runs in accuracies)
        return cls(float(squares / freedom), freedom) if freedom else None


def estimate_accuracy(correct: np.ndarray, between_seeds: SeedVariance | None) -> Estimate | None:
    """
    The accuracy of a row, from 0 to 1; `None` if the seeds are too few (`estimate_sum`). If all answers of all seeds are right,
    or all wrong, the interval is Wilson's, which counts images alone.

    Args:
        correct: whether each answer is right, `(seeds, images)`.
        between_seeds: of the table that the row is in.
    """
    estimate = estimate_sum([(1, correct)], between_seeds)
    if estimate is None or estimate.half_width > 0:
        return estimate
    low, high = wilson_interval(int(correct[0].sum()), len(correct[0]))
    return Estimate(estimate.value, high - low, estimate.p)


def estimate_difference(ours: np.ndarray, theirs: np.ndarray, between_seeds: SeedVariance | None) -> Estimate | None:
    """
    Our accuracy minus theirs; `None` if the seeds are too few (`estimate_sum`), or if it is the same for all seeds and images.

    The images are paired: both rows answer the same ones. The seeds are not, because equal seeds do not make two networks
    alike; if they did, the interval would be too long.

    Args:
        ours, theirs: whether each answer is right, `(seeds, images)` with the same images in the same order.
        between_seeds: of the table that the rows are in.
    """
    estimate = estimate_sum([(1, ours), (-1, theirs)], between_seeds)
    return estimate if estimate is not None and estimate.half_width > 0 else None


def estimate_sum(rows: list[tuple[int, np.ndarray]], between_seeds: SeedVariance | None) -> Estimate | None:
    """
    The sum of accuracies, each with its sign; `None` for a single seed or image, which says nothing about others, and if the
    table has fewer degrees of freedom than `LEAST_FREEDOM`. The interval has no length if no seed and no image differs.
    """
    images = rows[0][1].shape[1]
    if between_seeds is None or between_seeds.freedom < LEAST_FREEDOM or images < 2:
        return None
    if min(len(correct) for _, correct in rows) < 2:
        return None
    of_images = np.zeros(images)
    # The rows that have the variance of the table share one estimate, with one number of degrees of freedom.
    from_table, from_interaction = 0.0, 0.0
    from_rows: list[tuple[float, int]] = []  # variances with their degrees of freedom
    for sign, answers in rows:
        correct = answers.astype(np.float64)
        seeds, of_runs = len(correct), correct.mean(axis=1)
        of_images += sign * correct.mean(axis=0)
        residual = correct - of_runs[:, None] - correct.mean(axis=0) + correct.mean()
        interaction = (residual**2).sum() / ((seeds - 1) * (images - 1))
        # Seeds of equal quality differ by the interaction, so the variance between seeds cannot be below it.
        own, least = of_runs.var(ddof=1), max(between_seeds.value, interaction / images)
        if own > least and seeds - 1 >= LEAST_FREEDOM:
            from_rows.append((own / seeds, seeds - 1))
        else:
            from_table += max(own, least) / seeds
        from_interaction += interaction / seeds
    from_images = max(0.0, of_images.var(ddof=1) - from_interaction) / images
    from_seeds = [(from_table, between_seeds.freedom), *from_rows]
    value, variance = float(of_images.mean()), from_images + sum(part for part, _ in from_seeds)
    if variance == 0:
        return Estimate(value, 0.0, 1.0 if value == 0 else 0.0)
    squares = sum(part**2 / freedom for part, freedom in from_seeds)
    freedom, error = variance**2 / squares if squares > 0 else np.inf, variance**0.5
    half_width = student_t.ppf((1 + LEVEL) / 2, freedom) * error
    return Estimate(value, float(half_width), float(2 * student_t.sf(abs(value) / error, freedom)))


def correct_for_several(p_values: list[float]) -> list[float]:
    """
    The p values of several tests, corrected so that the chance of any false finding among them keeps its level (Holm, Scandinavian
    Journal of Statistics 6, 1979).
    """
    corrected, largest = list(p_values), 0.0
    for rank, index in enumerate(np.argsort(p_values, kind="stable")):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected

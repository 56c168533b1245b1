"""
Intervals and tests for accuracies of several seeds on the same test images.

Both the seeds and the images are samples: another seed gives another network, and other images other errors. Every run answers
all images, so the two are crossed. The variance of a mean is estimated from the mean squares of seeds, images and their
interaction, and its degrees of freedom by Satterthwaite's formula, as for readers and cases in radiology (Hillis, Statistics in
Medicine 26, 2007).

Three seeds of a row say little about the variance between seeds, so all rows of a table say it together: each row has its own
variance or the mean of the table, whichever is larger. A bootstrap over three seeds would give intervals that are too short.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from scipy.stats import t as student_t


LEVEL = 0.95
LEAST_FREEDOM = 2.0  # Student's distribution has no variance at 2 degrees of freedom and below
NO_INTERVAL = "Where the interval is missing, the seeds are too few for how much they differ."


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
    The accuracy of a row, from 0 to 1; `None` for a single seed or image, which says nothing about others, and for seeds that
    are too few (`estimate_sum`).

    Args:
        correct: whether each answer is right, `(seeds, images)`.
        between_seeds: of the table that the row is in.
    """
    return estimate_sum([(1, correct)], between_seeds)


def estimate_difference(ours: np.ndarray, theirs: np.ndarray, between_seeds: SeedVariance | None) -> Estimate | None:
    """
    Our accuracy minus theirs; `None` if one of the rows has a single seed, or too few of them (`estimate_sum`).

    The images are paired: both rows answer the same ones. The seeds are not, because equal seeds do not make two networks
    alike; if they did, the interval would be too long.

    Args:
        ours, theirs: whether each answer is right, `(seeds, images)` with the same images in the same order.
        between_seeds: of the table that the rows are in.
    """
    return estimate_sum([(1, ours), (-1, theirs)], between_seeds)


def estimate_sum(rows: list[tuple[int, np.ndarray]], between_seeds: SeedVariance | None) -> Estimate | None:
    """
    The sum of accuracies, each with its sign; `None` below `LEAST_FREEDOM`. Two seeds that differ give one degree of freedom,
    and an interval 13 times as long as the standard error: it may hold all accuracies from 0 to 100 %.
    """
    images = rows[0][1].shape[1]
    if between_seeds is None or images < 2 or min(len(correct) for _, correct in rows) < 2:
        return None
    of_images = np.zeros(images)
    from_seeds, from_interaction = 0.0, 0.0
    for sign, answers in rows:
        correct = answers.astype(np.float64)
        seeds, of_runs = len(correct), correct.mean(axis=1)
        of_images += sign * correct.mean(axis=0)
        residual = correct - of_runs[:, None] - correct.mean(axis=0) + correct.mean()
        interaction = (residual**2).sum() / ((seeds - 1) * (images - 1))
        # Seeds of equal quality differ by the interaction, so the variance between seeds cannot be below it.
        from_seeds += max(of_runs.var(ddof=1), between_seeds.value, interaction / images) / seeds
        from_interaction += interaction / seeds
    from_images = max(0.0, of_images.var(ddof=1) - from_interaction) / images
    value, variance = float(of_images.mean()), from_seeds + from_images
    if variance == 0:  # every run gives the same answers
        return Estimate(value, 0.0, 1.0 if value == 0 else 0.0)
    freedom = between_seeds.freedom * (variance / from_seeds) ** 2 if from_seeds > 0 else np.inf
    error = variance**0.5
    if freedom < LEAST_FREEDOM:
        return None
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

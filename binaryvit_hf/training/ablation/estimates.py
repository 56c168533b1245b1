"""
Intervals and tests for accuracies of several seeds on the same test images.

Both the seeds and the images are samples: another seed gives another network, and other images other errors. Every run answers
all images, so the two are crossed. The variance of a mean is estimated from the mean squares of seeds, images and their
interaction, and its degrees of freedom by Satterthwaite's formula, as for readers and cases in radiology (Hillis, Statistics in
Medicine 26, 2007).

Three seeds of a row say little about the variance between seeds, so all rows of a table say it together. The variance of a row is the
largest of three: its own; the mean of the table; and that of seeds of equal quality, which answer other images wrongly by chance.
In the first case it has the row's degrees of freedom, otherwise those of the table. A row nearer to 0 or 100 % than the table has
less room to vary: it takes the mean of the table in proportion to p (1 - p), where p is its accuracy. A bootstrap over three seeds
would give intervals that are too short. Two seeds are too few: where those of one row differ more than the others', a tenth of the
intervals would not hold the truth.

A t interval is too short for an accuracy near 100 % on a few hundred images, and ends above it. So accuracies have Wilson's interval,
with as many independent answers as would have the same variance, and the quantile of t. Differences have t intervals.

In simulated tables of 2 to 16 rows with three seeds and 10,000 images, 95 to 99 % of the intervals hold the truth if the seeds of all
rows differ alike, and 93 to 95 % of those of a row whose seeds differ by 0.5 points beside 0.1 of the others. Without any difference
between the rows, 1 to 5 % of the tables have a finding.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from scipy.stats import t as student_t

from ..confusion import wilson_interval


LEVEL = 0.95
LEAST_SEEDS = 3
FEW_SEEDS = "Intervals and tests need three seeds of a row."


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """
    A difference of two means with its 95 % confidence interval.

    Args:
        half_width: the interval is `value - half_width` to `value + half_width`.
        p: of the two-sided test that the difference is zero.
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
class Spread:
    """A mean over seeds and images with its variance and the variance's degrees of freedom."""

    value: float
    variance: float
    freedom: float

    @property
    def quantile(self) -> float:
        """Standard errors from the mean to an end of its interval."""
        return float(student_t.ppf((1 + LEVEL) / 2, self.freedom))


@dataclass(frozen=True)
class SeedVariance:
    """
    The mean over rows of the variance of accuracies between seeds.

    Args:
        freedom: its degrees of freedom.
        answer_variance: the mean over the same rows of `p * (1 - p)`, the variance of an answer at accuracy `p`.
    """

    value: float
    freedom: int
    answer_variance: float

    @classmethod
    def of_rows(cls, rows: Iterable[np.ndarray]) -> SeedVariance | None:
        """Of rows `(seeds, images)` of right answers; `None` if none has two seeds."""
        accuracies = [correct.mean(axis=1) for correct in rows if len(correct) > 1]
        freedoms = [len(of_runs) - 1 for of_runs in accuracies]
        if not freedoms:
            return None
        squares = sum(((of_runs - of_runs.mean()) ** 2).sum() for of_runs in accuracies)
        answers = np.average([of_runs.mean() * (1 - of_runs.mean()) for of_runs in accuracies], weights=freedoms)
        return cls(float(squares / sum(freedoms)), sum(freedoms), float(answers))

    def at(self, accuracy: float, images: int) -> float:
        """The variance between seeds of a row with this accuracy on so many images."""
        # Few wrong answers say little about p: two more right and two more wrong ones (Agresti and Coull, 1998).
        p = (accuracy * images + 2) / (images + 4)
        answers = p * (1 - p)
        return self.value if answers >= self.answer_variance else self.value * answers / self.answer_variance


def estimate_accuracy(correct: np.ndarray, between_seeds: SeedVariance | None) -> Interval | None:
    """
    The accuracy of a row, from 0 to 1; `None` if the seeds are too few (`spread_of_sum`). If all answers of all seeds are right,
    or all wrong, the interval counts images alone.

    Args:
        correct: whether each answer is right, `(seeds, images)`.
        between_seeds: of the table that the row is in.
    """
    spread = spread_of_sum([(1, correct)], between_seeds)
    if spread is None:
        return None
    accuracy, (seeds, images) = spread.value, correct.shape
    if correct.all() or not correct.any():
        return Interval(accuracy, *wilson_interval(accuracy * images, images))
    answers = min(accuracy * (1 - accuracy) / spread.variance, seeds * images)
    return Interval(accuracy, *wilson_interval(accuracy * answers, answers, spread.quantile))


def estimate_difference(ours: np.ndarray, theirs: np.ndarray, between_seeds: SeedVariance | None) -> Difference | None:
    """
    Our accuracy minus theirs; `None` if the seeds are too few (`spread_of_sum`), or if it is the same for all seeds and images.

    The images are paired: both rows answer the same ones. The seeds are not, because equal seeds do not make two networks
    alike; if they did, the interval would be too long.

    Args:
        ours, theirs: whether each answer is right, `(seeds, images)` with the same images in the same order.
        between_seeds: of the table that the rows are in.
    """
    spread = spread_of_sum([(1, ours), (-1, theirs)], between_seeds)
    if spread is None or spread.variance == 0:
        return None
    error = spread.variance**0.5
    p = 2 * student_t.sf(abs(spread.value) / error, spread.freedom)
    return Difference(spread.value, spread.quantile * error, float(p))


def spread_of_sum(rows: list[tuple[int, np.ndarray]], between_seeds: SeedVariance | None) -> Spread | None:
    """
    The sum of accuracies, each with its sign; `None` if a row has fewer seeds than `LEAST_SEEDS`, or a single image, which says
    nothing about others. The variance is 0 if no seed and no image differs.
    """
    images = rows[0][1].shape[1]
    if between_seeds is None or images < 2 or min(len(answers) for _, answers in rows) < LEAST_SEEDS:
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
        own, least = of_runs.var(ddof=1), max(between_seeds.at(of_runs.mean(), images), interaction / images)
        if own > least:
            from_rows.append((own / seeds, seeds - 1))
        else:
            from_table += least / seeds
        from_interaction += interaction / seeds
    from_images = max(0.0, of_images.var(ddof=1) - from_interaction) / images
    from_seeds = [(from_table, between_seeds.freedom), *from_rows]
    value, variance = float(of_images.mean()), from_images + sum(part for part, _ in from_seeds)
    squares = sum(part**2 / freedom for part, freedom in from_seeds)
    return Spread(value, variance, variance**2 / squares if squares > 0 else np.inf)


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

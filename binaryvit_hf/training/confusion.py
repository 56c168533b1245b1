"""The confusion matrix of an evaluation: accuracy with its confidence interval, the most confused classes, a picture."""

from __future__ import annotations

import logging
import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib import font_manager
from matplotlib.figure import Figure

from binaryvit_runtime.errors import counted


NORMAL_QUANTILE = 1.959964  # of 0.975: 95 % of a normal distribution lie within this many standard deviations
MAX_DRAWN_CLASSES = 30  # more names cannot be read in one picture
MAX_NAME_LENGTH = 24
BETTER_RESULTS = '"Better results" in docs/pages/guides/photos.md'
FALLBACK_FONTS = (
    *("Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans CJK KR", "WenQuanYi Zen Hei"),  # Linux
    *("Microsoft YaHei", "Yu Gothic", "Malgun Gothic", "Segoe UI Emoji", "Nirmala UI"),  # Windows
    *("PingFang SC", "Hiragino Sans", "Apple SD Gothic Neo", "Arial Unicode MS"),  # macOS
)

logger = logging.getLogger(__name__)


class Confusion(NamedTuple):
    """`errors` of the `images` of class `label` were classified as `predicted`."""

    label: str
    predicted: str
    errors: int
    images: int


def predict_classes(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """
    The answers `(images,)` that logits `(images, classes)` give, as class indices.

    An equal logit counts against the image, as in `TopKAccuracy`, so both have the same accuracy. This needs the labels
    `(images,)`.
    """
    logits = logits.astype(np.float32)
    rows = np.arange(len(labels))
    label_logits = logits[rows, labels]
    logits[rows, labels] = -np.inf
    others = logits.argmax(axis=1)  # of a row with NaN the first NaN
    return np.where(label_logits > logits[rows, others], labels, others)


@dataclass
class ConfusionMatrix:
    """
    Counts of an evaluation.

    Args:
        counts: integers `(classes, classes)`: row is the label, column the predicted class.
        names: the names of the classes.
    """

    counts: np.ndarray
    names: list[str]

    @classmethod
    def from_predictions(cls, labels: np.ndarray, predicted: np.ndarray, names: list[str]) -> ConfusionMatrix:
        """Count predictions: class indices `(images,)` of labels and of answers."""
        counts = np.zeros((len(names), len(names)), dtype=np.int64)
        np.add.at(counts, (labels, predicted), 1)
        return cls(counts, names)

    @property
    def images(self) -> int:
        return int(self.counts.sum())

    @property
    def correct(self) -> int:
        return int(self.counts.trace())

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % confidence interval of the accuracy."""
        return wilson_interval(self.correct, self.images)

    @property
    def guessing_accuracy(self) -> float:
        """The accuracy of answering every image with the most frequent class: the share of that class in the images."""
        return int(self.counts.sum(axis=1).max()) / self.images

    @property
    def is_like_guessing(self) -> bool:
        """Whether guessing is as accurate: the confidence interval of the accuracy is not above `guessing_accuracy`."""
        return len(self.names) > 1 and self.interval[0] <= self.guessing_accuracy

    def most_confused(self, limit: int) -> list[Confusion]:
        """The pairs of classes with the most errors, at most `limit`."""
        labels, predicted = np.nonzero(self.counts)  # the matrix of thousands of classes is large, and almost empty
        is_error = labels != predicted
        labels, predicted = labels[is_error], predicted[is_error]
        order = np.argsort(-self.counts[labels, predicted], kind="stable")[:limit]
        images = self.counts.sum(axis=1)
        return [
            Confusion(self.names[label], self.names[answer], int(self.counts[label, answer]), int(images[label]))
            for label, answer in zip(labels[order], predicted[order])
        ]

    def plot(self, path: Path, title: str) -> None:
        """Draw the matrix in per cent of each label's images. Of many classes it shows those with the most errors."""
        errors = self.counts.sum(axis=0) + self.counts.sum(axis=1) - 2 * self.counts.diagonal()
        shown = np.sort(np.argsort(-errors, kind="stable")[:MAX_DRAWN_CLASSES])
        images = self.counts.sum(axis=1)
        shares = 100 * self.counts[np.ix_(shown, shown)] / np.maximum(images[shown], 1)[:, None]
        names = [shorten(self.names[index]) for index in shown]
        if len(shown) < len(self.names):
            title = f"{title}\nThe {len(shown)} of {len(self.names)} classes with the most errors"

        side = max(4.5, 2.5 + 0.4 * len(shown))
        figure = Figure(figsize=(side + 1, side), layout="constrained")
        axes = figure.subplots()
        drawn = axes.imshow(shares, cmap="Blues", vmin=0, vmax=100)
        figure.colorbar(drawn, ax=axes, label="% of the images of a class", shrink=0.8)
        axes.set(title=title, xlabel="predicted class", ylabel="label")
        # A name with a $ would be read as a formula.
        fonts = installed_fonts()
        axes.set_xticks(range(len(names)), names, rotation=45, ha="right", rotation_mode="anchor", parse_math=False)
        axes.set_yticks(range(len(names)), names, parse_math=False)
        for tick in (*axes.get_xticklabels(), *axes.get_yticklabels()):
            tick.set_fontfamily(fonts)
        for (row, column), share in np.ndenumerate(shares):
            if images[shown[row]]:
                color = "white" if share > 60 else "black" if share > 0 else "silver"
                axes.text(column, row, f"{share:.0f}", ha="center", va="center", color=color, fontsize=8)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            figure.savefig(path, dpi=120)
        if any("missing from font" in str(warning.message) for warning in caught):
            logger.warning(
                "%s shows boxes for characters of class names that no font here has; install Noto Sans CJK, for example.",
                path,
            )


def installed_fonts() -> list[str]:
    """matplotlib's own font, and those of this machine that have the characters it lacks."""
    installed = {font.name for font in font_manager.fontManager.ttflist}
    return ["DejaVu Sans", *(name for name in FALLBACK_FONTS if name in installed)]


def wilson_interval(correct: float, images: float, quantile: float = NORMAL_QUANTILE) -> tuple[float, float]:
    """
    The confidence interval of an accuracy, from 0 to 1 (Wilson, 1927).

    Args:
        correct: number of correct answers among `images`, which is at least 1.
        quantile: of the level and its distribution; for 95 % by default.
    """
    square = quantile**2
    center = (correct + square / 2) / (images + square)
    spread = quantile / (images + square) * math.sqrt(correct * (images - correct) / images + square / 4)
    return max(0.0, center - spread), min(1.0, center + spread)


def describe(matrix: ConfusionMatrix, images_name: str) -> list[str]:
    """
    Describe an evaluation in lines: accuracy with its interval, the accuracy of guessing if the network may be no better,
    and the most confused classes.

    Args:
        images_name: the kind of images, such as "held-out".
    """
    low, high = matrix.interval
    lines = [
        f"accuracy:  {matrix.correct / matrix.images:.1%} of {counted(matrix.images, f'{images_name} image')} "
        f"(95 % confidence interval: {low:.1%} to {high:.1%})"
    ]
    if matrix.is_like_guessing:
        most = matrix.names[int(matrix.counts.sum(axis=1).argmax())]
        lines.append(
            f"guessing:  the network cannot be told from guessing ({matrix.guessing_accuracy:.1%} for the answer {most!r} to "
            f"every image): see {BETTER_RESULTS}"
        )
    for pair in matrix.most_confused(3):
        lines.append(
            f"confused:  {pair.label!r} taken for {pair.predicted!r}: {pair.errors} of {counted(pair.images, 'image')}"
        )
    return lines


def shorten(name: str) -> str:
    name = " ".join(name.split())
    return name if len(name) <= MAX_NAME_LENGTH else name[: MAX_NAME_LENGTH - 1] + "…"

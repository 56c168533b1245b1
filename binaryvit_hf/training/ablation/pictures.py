"""Pictures of an ablation: accuracy against a cost, and the differences between rows with their intervals."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from matplotlib.ticker import LogLocator, NullLocator
from matplotlib.transforms import Bbox

from ...ops import readable
from .estimates import Difference, Interval


DPI = 120
MARKER = 8  # points, on which no label may lie
# Places of a label around its point: offset in points and alignment. The first that is free is taken.
PLACES = [
    *(((9, 0), "left", "center"), ((-9, 0), "right", "center")),
    *(((9, 7), "left", "bottom"), ((9, -7), "left", "top"), ((-9, 7), "right", "bottom"), ((-9, -7), "right", "top")),
    *(((0, 14), "center", "bottom"), ((0, -14), "center", "top")),
    *(
        ((9, 20), "left", "bottom"),
        ((9, -20), "left", "top"),
        ((-9, 20), "right", "bottom"),
        ((-9, -20), "right", "top"),
    ),
]


@dataclass(frozen=True)
class Point:
    """
    A row in a picture of accuracy against a cost.

    Args:
        accuracy: in per cent.
        interval: of the accuracy, or `None`.
    """

    name: str
    cost: float
    accuracy: float
    interval: Interval | None

    @property
    def ends(self) -> tuple[float, float]:
        """Of the interval; without one, both are the accuracy."""
        return (self.interval.low, self.interval.high) if self.interval else (self.accuracy, self.accuracy)


@dataclass(frozen=True)
class Bar:
    """A comparison in a picture of differences. `estimate` is `None` if it has no interval."""

    name: str
    difference: float
    estimate: Difference | None
    is_shown: bool  # whether the test finds a difference


def plot_accuracy(points: list[Point], title: str, cost: str, path: Path) -> None:
    """
    Draw test accuracy against a cost, with a label at every point.

    Args:
        cost: label of the axis of costs.
    """
    figure = Figure(figsize=(10, 6), layout="constrained")
    axes = figure.subplots()
    for point in points:
        low, high = point.ends
        # Rounding may put an end on the wrong side of the accuracy.
        reach = [[max(0.0, point.accuracy - low)], [max(0.0, high - point.accuracy)]] if point.interval else None
        axes.errorbar(point.cost, point.accuracy, reach, fmt="o", markersize=MARKER / 1.5, capsize=4)
    axes.set(xlabel=cost, ylabel="test top-1 accuracy, %", xscale="log")
    axes.set_title(title, parse_math=False)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(lambda value, _: readable(value) if value >= 1000 else f"{value:g}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(alpha=0.3, which="both")
    axes.margins(x=0.35, y=0.1)  # room for labels
    FigureCanvasAgg(figure)
    figure.draw_without_rendering()  # places the axes, on which the places of labels depend
    place_labels(axes, points)
    figure.savefig(path, dpi=DPI)


def place_labels(axes: Axes, points: list[Point]) -> None:
    """Write the name of each point where it lies on no point, interval or other label, if there is such a place."""
    pixels = axes.figure.dpi / 72
    taken = [box_of(axes, point, pixels) for point in points]
    for point in points:
        best: tuple[int, Annotation] | None = None
        for offset, horizontal, vertical in PLACES:
            label = axes.annotate(
                point.name,
                (point.cost, point.accuracy),
                offset,
                textcoords="offset points",
                ha=horizontal,
                va=vertical,
                fontsize="small",
                parse_math=False,
            )
            label.set_in_layout(False)
            box = label.get_window_extent()
            # A label over the edge of the axes counts like one over all others.
            faults = box.count_overlaps(taken) + len(taken) * (not contains(axes.bbox, box))
            if best is not None and faults >= best[0]:
                label.remove()
                continue
            if best is not None:
                best[1].remove()
            best = faults, label
            if not faults:
                break
        if best is not None:
            taken.append(best[1].get_window_extent())


def box_of(axes: Axes, point: Point, pixels: float) -> Bbox:
    """The box of a point and its interval in pixels."""
    (x, low), (_, high) = axes.transData.transform([(point.cost, end) for end in point.ends])
    margin = MARKER * pixels / 2
    return Bbox([[x - margin, low - margin], [x + margin, high + margin]])


def contains(outer: Bbox, inner: Bbox) -> bool:
    return outer.x0 <= inner.x0 and inner.x1 <= outer.x1 and outer.y0 <= inner.y0 and inner.y1 <= outer.y1


def plot_differences(bars: Iterable[Bar], title: str, other: str, path: Path) -> None:
    """
    Draw differences of accuracy with their intervals, the largest on top. Those that a test finds are filled.

    Args:
        other: the row that the others are compared with.
    """
    bars = sorted(bars, key=lambda bar: bar.difference)
    figure = Figure(figsize=(10, 1.6 + 0.3 * len(bars)), layout="constrained")
    axes = figure.subplots()
    for height, bar in enumerate(bars):
        color = "C0" if bar.is_shown else "gray"
        width = bar.estimate and bar.estimate.half_width
        axes.errorbar(
            bar.difference, height, xerr=width, fmt="o", capsize=3, color=color, mfc=color if bar.is_shown else "white"
        )
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(bars)), [bar.name for bar in bars], parse_math=False)
    figure.suptitle(title, parse_math=False)
    axes.set_xlabel(
        f"test top-1 accuracy minus that of: {other}, points (filled: corrected p < 0.05)", parse_math=False
    )
    axes.margins(y=0.6 / max(1, len(bars)))
    axes.grid(alpha=0.3, axis="x")
    numbers = axes.secondary_yaxis("right")
    numbers.set_yticks(range(len(bars)), [readable_difference(bar) for bar in bars])
    numbers.tick_params(length=0)
    figure.savefig(path, dpi=DPI)


def readable_difference(bar: Bar) -> str:
    return f"{bar.difference:+.2f}" + (f" ± {bar.estimate.half_width:.2f}" if bar.estimate else "")

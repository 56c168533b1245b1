"""
Figures of a page without scripts: tables with bars, maps of cells, columns and curves, as HTML and SVG.

All texts are escaped here. Colours are classes of report.css, which has a light and a dark theme.
"""

import html
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from binaryvit_runtime.errors import one_line


WIDTH, HEIGHT = 360, 220  # of a panel, in the units of its text
LEFT, RIGHT, TOP, BOTTOM = 50, 10, 12, 34  # margins of a panel, for the labels of its axes
MINUS, TIMES = "\N{MINUS SIGN}", "\N{MULTIPLICATION SIGN}"
TINTS = 9  # strengths of a cell's colour, beside none
MOST_POINTS = 600  # of a drawn curve


class Raw(str):
    """HTML that is not escaped again."""


def text(value: object) -> Raw:
    """A text in HTML, on one line. Characters that cannot be printed are escaped, and no line breaks before a `%`."""
    if isinstance(value, Raw):
        return value
    return Raw(html.escape(one_line(str(value))).replace(" %", "\N{NO-BREAK SPACE}%"))


def join(pieces: Iterable[object]) -> Raw:
    return Raw("".join(map(text, pieces)))


def tag(name: str, *content: object, **attributes: object) -> Raw:
    """An element. Attributes that are None are left out; `class_` is `class`, and `_` in names is `-`."""
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{text(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Raw(f"<{name}{written}>{join(content)}</{name}>")


# ---- Tables ----


class Cell(NamedTuple):
    """
    A cell of a table.

    Args:
        content: text, or HTML that is `Raw`.
        tint: strength of the colour from -1 to 1; the sign chooses one of two colours.
    """

    content: object
    tint: float = 0.0


def table(
    caption: str,
    head: Sequence[object],
    rows: Iterable[Sequence[object]],
    foot: Iterable[Sequence[object]] = (),
    groups: Sequence[tuple[str, int]] = (),
    class_: str | None = None,
) -> Raw:
    """
    A table that scrolls sideways where it is too wide for the screen.

    Args:
        caption: what the table holds. Not a `caption` element, which would scroll with the table.
        head: names of the columns.
        rows: cells, texts or `Raw` HTML. The first of a row is its name.
        foot: rows below a line.
        groups: names of groups of columns and their numbers of columns, above the names; "" has no name.
    """
    head_row = tag("tr", *(tag("th", name, scope="col") for name in head))
    group_row = tag("tr", *(group_head(name, span) for name, span in groups)) if groups else ""
    body = tag("tbody", *map(table_row, rows))
    footer = tag("tfoot", *map(table_row, foot)) if foot else ""
    content = tag("table", tag("thead", group_row, head_row), body, footer, class_=class_, aria_label=caption)
    scrolled = tag("div", content, class_="scroll", role="region", aria_label=caption, tabindex="0")
    return tag("figure", tag("figcaption", caption, class_="note"), scrolled, class_="table")


def group_head(name: str, span: int) -> Raw:
    return tag("th", name, scope="colgroup", colspan=span) if name else tag("td", colspan=span)


def table_row(cells: Sequence[object]) -> Raw:
    name, *others = cells
    return tag("tr", tag("th", name, scope="row"), *map(table_cell, others))


def table_cell(cell: object) -> Raw:
    content, tint = cell if isinstance(cell, Cell) else (cell, 0.0)
    return tag("td", content, class_=tint_class(tint))


def tint_class(tint: float) -> str | None:
    strength = math.ceil(min(abs(tint), 1) * TINTS)
    return f"{'high' if tint > 0 else 'low'}-{strength}" if strength else None


def details(summary: str, *content: object) -> Raw:
    return tag("details", tag("summary", summary), *content)


def bar(parts: Sequence[tuple[str, float]]) -> Raw:
    """A stacked bar: class of the colour and share of the whole width, of each part. The number beside it says the same."""
    rects, left = [], 0.0
    for kind, share in parts:
        rects.append(Raw(f'<rect class="{kind}" x="{100 * left:.2f}" width="{100 * share:.2f}" height="1"/>'))
        left += share
    return tag("svg", *rects, class_="bar", viewBox="0 0 100 1", preserveAspectRatio="none", aria_hidden="true")


def legend(entries: Sequence[tuple[str, str]]) -> Raw:
    """Names of colours: class and name of each."""
    swatch = '<svg class="swatch" viewBox="0 0 1 1" aria-hidden="true"><rect class="{}" width="1" height="1"/></svg>'
    return tag("p", *(tag("span", Raw(swatch.format(kind)), name) for kind, name in entries), class_="legend")


# ---- Panels ----


class Series(NamedTuple):
    """A curve: its name, points from left to right, and the class of its colour. `dashed` for evaluation images."""

    name: str
    points: list[tuple[float, float]]
    kind: str = "first"
    dashed: bool = False


def curves(title: str, unit: str, series: Sequence[Series], x_name: str = "epoch") -> Raw:
    """A panel with curves. A loss that is positive and falls more than tenfold has a logarithmic axis."""
    points = [point for each in series for point in each.points]
    x_axis = Axis.of([x for x, _ in points], LEFT, WIDTH - RIGHT)
    values = [y for _, y in points]
    y_axis = Axis.of(values, HEIGHT - BOTTOM, TOP, logarithmic="loss" in title and 0 < 10 * min(values) < max(values))
    drawn = [curve(each, x_axis, y_axis) for each in series]
    names = [(f"{each.kind}{' dashed' if each.dashed else ''}", each.name) for each in series]
    return panel(title, f"{title} ({unit}) by {x_name}", [*frame(x_axis, y_axis, x_name), *drawn], line_legend(names))


def curve(series: Series, x_axis: "Axis", y_axis: "Axis") -> Raw:
    step = math.ceil(len(series.points) / MOST_POINTS)
    shown = series.points[::step] + ([series.points[-1]] if (len(series.points) - 1) % step else [])
    places = [(x_axis.place(x), y_axis.place(y)) for x, y in shown]
    kind = f"curve {series.kind}{' dashed' if series.dashed else ''}"
    if len(set(places)) == 1:  # a line without a length would be invisible
        x, y = places[0]
        return Raw(f'<circle class="point {series.kind}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>')
    return Raw(f'<polyline class="{kind}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in places)}"/>')


def line_legend(names: Sequence[tuple[str, str]]) -> Raw:
    sample = '<svg class="sample" viewBox="0 0 24 8" aria-hidden="true"><path class="curve {}" d="M0 4h24"/></svg>'
    return tag("p", *(tag("span", Raw(sample.format(kind)), name) for kind, name in names), class_="legend")


def columns(
    title: str, description: str, heights: Sequence[float], range_: tuple[float, float], marked: set[int]
) -> Raw:
    """A panel with a histogram. `marked` are the indices of the columns in the second colour."""
    x_axis = Axis(*range_, LEFT, WIDTH - RIGHT)
    y_axis = Axis.of([0.0, *heights], HEIGHT - BOTTOM, TOP)
    width = (WIDTH - LEFT - RIGHT) / len(heights)
    drawn = []
    for index, height in enumerate(heights):
        top = y_axis.place(height)
        kind = "warning" if index in marked else "bits"
        drawn.append(
            Raw(
                f'<rect class="{kind}" x="{LEFT + index * width:.2f}" y="{top:.2f}" width="{width * 0.9:.2f}" '
                f'height="{HEIGHT - BOTTOM - top:.2f}"/>'
            )
        )
    return panel(title, description, [*frame(x_axis, y_axis, "distance / mean distance of the row"), *drawn])


def panel(title: str, description: str, content: Sequence[Raw], below: object = "") -> Raw:
    drawing = tag("svg", *content, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=description, class_="panel")
    return tag("figure", tag("figcaption", title), drawing, below)


class Axis(NamedTuple):
    """Maps values from `low` to `high` to places from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False

    @classmethod
    def of(cls, values: Sequence[float], start: float, end: float, logarithmic: bool = False) -> "Axis":
        """The axis that shows all values, with a little space at both ends, but not below zero without need."""
        low, high = min(values), max(values)
        if low == high:  # one value, in the middle
            spread = abs(low) / 2 or 0.5
            return cls(low - spread, high + spread, start, end)
        if logarithmic:
            space = (high / low) ** 0.05
            return cls(low / space, high * space, start, end, True)
        space = (high - low) * 0.05
        return cls(low - space if low - space >= 0 or low < 0 else 0.0, high + space, start, end)

    def place(self, value: float) -> float:
        low, high, value = (
            map(math.log10, (self.low, self.high, value)) if self.logarithmic else (self.low, self.high, value)
        )
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round values, two to seven."""
        if self.logarithmic:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            fine = [factor * 10.0**power for power in powers for factor in (1, 2, 5)]
            inside = [tick for tick in fine if self.low <= tick <= self.high]
            return inside if len(inside) <= 7 else [tick for tick in inside if math.log10(tick) % 1 < 1e-9]
        step = 10.0 ** math.floor(math.log10((self.high - self.low) / 2))
        step *= next(factor for factor in (1, 2, 5, 10) if (self.high - self.low) / (step * factor) <= 5)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [index * step for index in range(first, last + 1)]


def frame(x_axis: Axis, y_axis: Axis, x_name: str) -> list[Raw]:
    """Lines and labels of the ticks of both axes, and the name of the lower one."""
    drawn = []
    for value in y_axis.ticks():
        y = y_axis.place(value)
        drawn.append(Raw(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>'))
        drawn.append(label(LEFT - 6, y + 4, value, "end"))
    for value in x_axis.ticks():
        drawn.append(label(x_axis.place(value), HEIGHT - BOTTOM + 15, value, "middle"))
    drawn.append(Raw(f'<path class="axis" d="M{LEFT} {HEIGHT - BOTTOM}H{WIDTH - RIGHT}"/>'))
    middle = (LEFT + WIDTH - RIGHT) / 2
    return [*drawn, Raw(f'<text x="{middle}" y="{HEIGHT - 4}" text-anchor="middle">{text(x_name)}</text>')]


def label(x: float, y: float, value: float, anchor: str) -> Raw:
    return Raw(f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{text(format_tick(value))}</text>')


def format_tick(value: float) -> str:
    """`0.25`, `1000`, `1e-05`, and 0 without its rounding error."""
    return f"{0.0 if abs(value) < 1e-12 else value:.4g}".replace("-", MINUS)

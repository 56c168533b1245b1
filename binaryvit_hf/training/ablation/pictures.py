"""Pictures of an ablation."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.figure import Figure


if TYPE_CHECKING:
    from .results import RowResults


def plot_rows(rows: list[RowResults], title: str, path: Path) -> None:
    """Draw test accuracy against OPs."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for row in rows:
        if row.cost is not None:
            error = row.interval and row.interval.half_width
            axes.errorbar(row.cost.ops, row.mean, error, fmt="o", capsize=4, label=row.name)
    axes.set(title=title, xlabel="OPs of one image = FLOPs + BOPs/64", ylabel="test top-1 accuracy, %", xscale="log")
    axes.grid(alpha=0.3, which="both")
    axes.legend(loc="lower right", fontsize="small")
    figure.savefig(path, dpi=120)

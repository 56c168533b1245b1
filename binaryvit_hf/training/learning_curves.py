"""Learning curves of a run and its teacher, drawn from the files in their output directories."""

from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..run_history import TrainingHistory, find_values


COLORS = ("tab:blue", "tab:orange")


class Curve(NamedTuple):
    """The values of one metric of a model over the epochs."""

    label: str
    color: str
    epochs: list[float]
    values: list[float]
    style: str = "-"


def plot_learning_curves(histories: dict[str, TrainingHistory], path: Path) -> None:
    """
    Draw loss and accuracy over the epochs. Nothing is written if there is no value to draw.

    Distillation loss and label loss have panels of their own: their values cannot be compared.

    Args:
        histories: by the name of the model.
        path: the picture to write.
    """
    distillation, label, accuracy = [], [], []
    evaluated = [history for history in histories.values() if find_values(history, "eval_accuracy")]
    kinds = {history.evaluation_images for history in evaluated}
    for (name, history), color in zip(histories.items(), COLORS):
        training = distillation if history.is_distilled else label
        # A run shorter than --logging_steps logs only the mean over the whole run.
        loss = find_values(history, "loss") or find_values(history, "train_loss")
        training.append(Curve(f"{name}, training images", color, *split_points(loss)))
        label.append(
            Curve(
                f"{name}, {history.evaluation_images} images",
                color,
                *split_points(find_values(history, "eval_loss")),
                style="--",
            )
        )
        points = [(epoch, 100 * value) for epoch, value in find_values(history, "eval_accuracy")]
        of_which = f", {history.evaluation_images} images" if len(kinds) > 1 else ""
        accuracy.append(Curve(name + of_which, color, *split_points(points)))
    panels = [
        ("Distillation loss", "cross-entropy with the teacher's probabilities", distillation),
        ("Label loss", "cross-entropy with the labels", label),
        (f"Top-1 accuracy on {kinds.pop()} images" if len(kinds) == 1 else "Top-1 accuracy", "%", accuracy),
    ]
    drawn = [(title, unit, curves) for title, unit, curves in panels if any(curve.epochs for curve in curves)]
    if not drawn:
        return
    figure = Figure(figsize=(5 * len(drawn), 4), layout="constrained")
    for axes, (title, unit, curves) in zip(figure.subplots(1, len(drawn), squeeze=False)[0], drawn):
        for curve in curves:
            if curve.epochs:
                axes.plot(curve.epochs, curve.values, curve.style, color=curve.color, marker=".", label=curve.label)
        axes.set(title=title, xlabel="epoch", ylabel=unit)
        if max(max(curve.epochs, default=0) for curve in curves) >= 2:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        values = [value for curve in curves for value in curve.values]
        if min(values) > 0 and max(values) > 10 * min(values):
            axes.set_yscale("log")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)


def split_points(points: list[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]

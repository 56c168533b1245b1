"""Learning curves of a run and its teacher, drawn from the files in their output directories."""

from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from transformers.trainer import TRAINER_STATE_NAME

from .run_folder import RUN_ARGUMENTS, finite_numbers, read_json


COLORS = ("tab:blue", "tab:orange")


class TrainingHistory(NamedTuple):
    """The metrics that a run logged, and whether it minimised the distillation loss instead of the label loss."""

    entries: list[dict[str, float]]
    is_distilled: bool


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
    for (name, history), color in zip(histories.items(), COLORS):
        training = distillation if history.is_distilled else label
        # A run shorter than --logging_steps logs only the mean over the whole run.
        loss = find_values(history, "loss") or find_values(history, "train_loss")
        training.append(Curve(f"{name}, training images", color, *split_points(loss)))
        label.append(
            Curve(f"{name}, held-out images", color, *split_points(find_values(history, "eval_loss")), style="--")
        )
        points = [(epoch, 100 * value) for epoch, value in find_values(history, "eval_accuracy")]
        accuracy.append(Curve(name, color, *split_points(points)))
    panels = [
        ("Distillation loss", "cross-entropy with the teacher's probabilities", distillation),
        ("Label loss", "cross-entropy with the labels", label),
        ("Top-1 accuracy on held-out images", "%", accuracy),
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


def find_values(history: TrainingHistory, key: str) -> list[tuple[float, float]]:
    """Epochs and values of one metric."""
    entries = [entry for entry in history.entries if {"epoch", key} <= entry.keys()]
    # matplotlib finds no ticks for larger numbers.
    return [(entry["epoch"], entry[key]) for entry in entries if max(abs(entry["epoch"]), abs(entry[key])) < 1e30]


def split_points(points: list[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def read_training_history(output_dir: Path) -> TrainingHistory:
    """
    The history of a run: what the Trainer logged, and the results at its end. Without entries if the folder holds none, for
    example the folder of a model from the Hub.
    """
    logged = read_json(output_dir / TRAINER_STATE_NAME).get("log_history")
    entries = [entry for entry in logged if isinstance(entry, dict)] if isinstance(logged, list) else []
    entries.append(read_json(output_dir / "all_results.json"))
    is_distilled = bool(read_json(output_dir / RUN_ARGUMENTS).get("teacher_model_name_or_path"))
    return TrainingHistory([finite_numbers(entry) for entry in entries], is_distilled)

"""Learning curves of a run and its teacher, drawn from the log histories in their output directories."""

from pathlib import Path

from matplotlib.figure import Figure
from transformers.trainer import TRAINER_STATE_NAME

from .run_folder import finite_numbers, read_json


def plot_learning_curves(histories: dict[str, list[dict]], path: Path) -> None:
    """
    Draw loss and accuracy over the epochs.

    Args:
        histories: for each model its `log_history`, as the Trainer keeps it.
        path: the picture to write.
    """
    figure = Figure(figsize=(10, 4), layout="constrained")
    loss_axes, accuracy_axes = figure.subplots(1, 2)
    for (name, history), color in zip(histories.items(), ("tab:blue", "tab:orange")):
        loss_axes.plot(*curve(history, "loss"), color=color, label=f"{name}, training")
        loss_axes.plot(*curve(history, "eval_loss"), color=color, linestyle="--", label=f"{name}, held out")
        epochs, accuracy = curve(history, "eval_accuracy")
        accuracy_axes.plot(epochs, [100 * value for value in accuracy], color=color, marker=".", label=name)
    loss_axes.set(title="Loss", xlabel="epoch", ylabel="loss", yscale="log")
    accuracy_axes.set(title="Top-1 accuracy on held-out images", xlabel="epoch", ylabel="%")
    for axes in (loss_axes, accuracy_axes):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)


def curve(history: list[dict], key: str) -> tuple[list[float], list[float]]:
    """Epochs and values of one metric."""
    entries = [entry for entry in map(finite_numbers, history) if {"epoch", key} <= entry.keys()]
    # matplotlib finds no ticks for larger numbers.
    entries = [entry for entry in entries if max(abs(entry["epoch"]), abs(entry[key])) < 1e30]
    return [entry["epoch"] for entry in entries], [entry[key] for entry in entries]


def read_log_history(output_dir: Path) -> list[dict]:
    """The `log_history` of a run; empty if the folder holds none, for example the folder of a model from the Hub."""
    history = read_json(output_dir / TRAINER_STATE_NAME).get("log_history")
    return [entry for entry in history if isinstance(entry, dict)] if isinstance(history, list) else []

"""What a run leaves for people: learning curves and a model card, made from its own files."""

import json
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from matplotlib.figure import Figure

from .data import DIGITS


METRIC_NAMES = {"accuracy": "top-1 accuracy", "top5_accuracy": "top-5 accuracy"}


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
    points = [(entry["epoch"], entry[key]) for entry in history if key in entry]
    return [epoch for epoch, _ in points], [value for _, value in points]


def read_log_history(run: Path) -> list[dict]:
    """`log_history` of a finished run, empty if the folder holds none (a model of the Hub)."""
    state = run / "trainer_state.json"
    return json.loads(state.read_text())["log_history"] if state.is_file() else []


def write_model_card(
    path: Path,
    template: Path,
    *,
    config,
    results: dict[str, float],
    arguments: dict,
    dataset: str,
    teacher: str | None,
) -> None:
    """
    Write the card of a run, metadata in the Hub's format included.

    Args:
        config: of the trained model.
        results: the content of `all_results.json`.
        arguments: what the run was told; the card lists it.
        dataset: name of the images.
        teacher: Hub id or path, if there was one.
    """
    metrics = {name: results[f"eval_{key}"] for key, name in METRIC_NAMES.items() if f"eval_{key}" in results}
    teacher_metrics = {
        name: results.get(f"teacher_{key}") for key, name in METRIC_NAMES.items() if f"eval_{key}" in results
    }
    # A local path is no dataset of the Hub, and neither are scikit-learn's digits; the metadata must name one of the Hub.
    on_hub = dataset != DIGITS and not Path(dataset).exists()
    card_data = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-classification",
        tags=["image-classification", "binaryvit_hf", *(["1-bit"] if config.model_type == "binaryvit" else [])],
        datasets=[dataset] if on_hub else None,
        base_model=teacher if teacher and not Path(teacher).exists() else None,
        model_name=path.parent.name,
        eval_results=[
            EvalResult(
                task_type="image-classification",
                dataset_type=dataset if on_hub else "local",
                dataset_name=dataset,
                metric_type="accuracy",
                metric_name=name,
                metric_value=value,
            )
            for name, value in metrics.items()
        ],
    )
    card = ModelCard.from_template(
        card_data,
        template_path=str(template),
        name=path.parent.name,
        binary=config.model_type == "binaryvit",
        is_teacher=path.parent.name == "teacher",
        dataset=dataset,
        num_train_images=results.get("train_samples", "no"),
        num_eval_images=results.get("eval_samples"),
        image_size=config.image_size,
        labels=list(config.id2label.values()),
        metrics={name: f"{100 * value:.2f} %" for name, value in metrics.items()},
        teacher=teacher,
        teacher_metrics={name: f"{100 * value:.2f} %" for name, value in teacher_metrics.items() if value is not None},
        skipped_images=results.get("skipped_images"),
        output_dir=path.parent,
        arguments=arguments,
    )
    path.write_text(str(card), encoding="utf-8")

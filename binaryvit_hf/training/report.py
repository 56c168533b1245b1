"""What a run leaves for people: learning curves and a model card, made from its own files."""

import json
import os
import sys
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from matplotlib.figure import Figure

from ..data.arguments import DataArguments
from ..data.known_datasets import DIGITS, FASHION_MNIST, FASHION_MNIST_HUB_ID
from ..errors import LoadingError, UserError, first_sentence
from ..loading import load_config
from ..network.quantization_binaryvit import LATENT
from ..ops import CONFIG_CLASSES, count_operations, readable, total
from ..resources import shipped_folder
from ..writing import write_file
from .arguments import DEFAULT_LICENSE, ModelArguments, describe
from .trainer import DistillationTrainingArguments


MOST_DRAWN = 1e30  # matplotlib finds no ticks for larger numbers
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
    points = [(entry["epoch"], entry[key]) for entry in map(numbers, history) if {"epoch", key} <= entry.keys()]
    points = [point for point in points if max(map(abs, point)) < MOST_DRAWN]
    return [epoch for epoch, _ in points], [value for _, value in points]


def read_log_history(run: Path) -> list[dict]:
    """`log_history` of a finished run, empty if the folder holds none (a model of the Hub)."""
    history = read_json(run / "trainer_state.json").get("log_history")
    return [entry for entry in history if isinstance(entry, dict)] if isinstance(history, list) else []


def write_model_card(folder: Path, model_id: str, path: Path | None = None) -> None:
    """
    Write the card of a model, metadata in the Hub's format included, from the files in its folder alone.

    Args:
        folder: a run's output directory, or a folder of a config without weights. Of its files `config.json` is needed;
            `run_arguments.json`, `all_results.json`, the weights and the picture of the learning curves are used where
            they are.
        model_id: what the reader loads the model by: an id of the Hub or a path.
        path: the card, `README.md` of the folder by default.

    Raises:
        UserError: the config is of no network, a file of the folder holds no JSON object, or the card cannot be written.
    """
    try:
        config = load_config(folder)
        cost = total(count_operations(config)) if config.model_type in CONFIG_CLASSES else None
    except LoadingError as error:
        raise UserError(f"config.json of {str(folder)!r} is of no network: {error}") from error
    documents = {name: read_json(folder / f"{name}.json") for name in ("all_results", "run_arguments", "train")}
    results, arguments, recipe = numbers(documents["all_results"]), documents["run_arguments"], documents["train"]
    teacher, dataset = text(arguments or recipe, "teacher_model_name_or_path"), image_source(arguments or recipe)
    metrics = {name: results[f"eval_{key}"] for key, name in METRIC_NAMES.items() if f"eval_{key}" in results}
    test_metrics = {name: results[f"test_{key}"] for key, name in METRIC_NAMES.items() if f"test_{key}" in results}
    teacher_metrics = {name: results.get(f"teacher_{key}") for key, name in METRIC_NAMES.items()}
    dataset = FASHION_MNIST_HUB_ID if dataset == FASHION_MNIST else dataset
    # A local path is no dataset of the Hub, and neither are scikit-learn's digits; the metadata must name one of the Hub.
    on_hub = dataset is not None and dataset != DIGITS and not os.path.exists(dataset)
    # The Hub's format wants a name, results and the dataset that they are of, and none without the others.
    measured = (test_metrics or metrics) if dataset else {}
    card_data = ModelCardData(
        license=text(arguments, "license") or DEFAULT_LICENSE,
        library_name="transformers",
        pipeline_tag="image-classification",
        tags=["image-classification", "binaryvit_hf", *(["1-bit"] if config.model_type == "binaryvit" else [])],
        datasets=[dataset] if on_hub else None,
        base_model=teacher if "teacher_revision" in documents["all_results"] or not arguments else None,
        model_name=Path(model_id).name if measured else None,
        eval_results=evaluation_results(measured, dataset, on_hub) or None,
    )
    card = ModelCard.from_template(
        card_data,
        template_path=str(shipped_folder("model_cards") / "template.md"),
        model_id=model_id,
        name=Path(model_id).name,
        config=config,
        binary=config.model_type == "binaryvit",
        trained=bool(arguments),
        weights=weight_bytes(folder) > 0,
        dataset=dataset,
        results=results,
        metrics=metrics,
        test_metrics=test_metrics,
        teacher=teacher,
        teacher_metrics={name: value for name, value in teacher_metrics.items() if value is not None},
        sizes=sizes_on_disk(folder, results),
        cost=cost,
        readable=readable,
        carries_code=(folder / "modeling_binaryvit.py").is_file(),
        learning_curves=(folder / "learning_curves.png").is_file(),
        recipe=recipe,
        arguments=arguments,
        chosen=chosen_arguments(arguments),
    )
    write_file(path or folder / "README.md", str(card))


def evaluation_results(metrics: dict[str, float], dataset: str, on_hub: bool) -> list[EvalResult]:
    return [
        EvalResult(
            task_type="image-classification",
            dataset_type=dataset if on_hub else "local",
            dataset_name=dataset,
            metric_type="accuracy",
            metric_name=name,
            metric_value=value,
        )
        for name, value in metrics.items()
    ]


def read_json(path: Path) -> dict:
    """
    The object in a JSON file, empty if there is no file.

    Raises:
        UserError: the file holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{str(path)!r} is no JSON: {first_sentence(error)}; mend it, or remove it.") from error
    if not isinstance(content, dict):
        raise UserError(f"{str(path)!r} is no JSON object, but {type(content).__name__}: mend it, or remove it.")
    return content


def numbers(content: dict) -> dict[str, float]:
    """The entries that are finite numbers."""
    return {
        name: value
        for name, value in content.items()
        if isinstance(value, (int, float)) and -sys.float_info.max <= value <= sys.float_info.max
    }


def text(content: dict, name: str) -> str | None:
    value = content.get(name)
    return value if isinstance(value, str) else None


def image_source(arguments: dict) -> str | None:
    return text(arguments, "dataset_name") or text(arguments, "train_dir") or text(arguments, "validation_dir")


def sizes_on_disk(folder: Path, results: dict) -> dict[str, int]:
    """Bytes of the weights: of the folder's own, of the latent ones beside them and of the teacher's."""
    packed = bool(read_json(folder / "config.json").get("quantization_config"))
    sizes = {
        "packed, a bit a weight" if packed else "float32": weight_bytes(folder),
        "latent, float32": weight_bytes(folder / LATENT),
        "its teacher": results.get("teacher_bytes", 0),
    }
    return {name: size for name, size in sizes.items() if size}


def weight_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def chosen_arguments(arguments: dict) -> dict:
    """Those that are not what they are by default."""
    if not arguments:
        return {}
    # Elsewhere than on the run's device the arguments would complain.
    training_arguments = DistillationTrainingArguments(
        text(arguments, "output_dir") or "output", use_cpu=arguments.get("use_cpu") is True
    )
    defaults = describe((ModelArguments(), DataArguments(), training_arguments))
    return {name: value for name, value in arguments.items() if value != defaults.get(name)}

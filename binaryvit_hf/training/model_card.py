"""The model card, written from the files in a model's folder."""

import os
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers.utils import IMAGE_PROCESSOR_NAME

from binaryvit_runtime.errors import LoadingError, UserError, counted
from binaryvit_runtime.pixels import read_background
from binaryvit_runtime.resources import shipped_folder
from binaryvit_runtime.writing import write_file

from ..card_text import NOTES, TAG, read_card, split_card
from ..data.arguments import DataArguments
from ..data.known_datasets import DIGITS, FASHION_MNIST, FASHION_MNIST_HUB_ID
from ..loading import load_config
from ..network.quantization_binaryvit import LATENT, QUANT_METHOD
from ..ops import CONFIG_CLASSES, count_operations, readable, total
from ..run_history import TEST, TRAINING, evaluation_images, finite_numbers, named_metrics, read_json, text_value
from .arguments import DEFAULT_LICENSE, DistillationTrainingArguments, ModelArguments, RunArguments
from .run_folder import PROCESSES, RUN_ARGUMENTS, arguments_to_json


# Defaults of earlier versions, which their runs recorded: nobody chose them.
EARLIER_DEFAULTS = [("logging_nan_inf_filter", True), ("ddp_find_unused_parameters", False)]


def write_model_card(folder: Path, model_id: str, path: Path | None = None) -> None:
    """
    Write the card of a model, with metadata in the Hub's format, from the files in its folder. The user's text in the card
    that it replaces (`split_card`) stays below the line `NOTES`; so does that in the folder's card if `path` has none.

    Args:
        folder: a run's output directory, or a folder of a config without weights. It must hold `config.json`. The card uses
            `run_arguments.json`, `all_results.json`, `preprocessor_config.json`, the weights and the picture of the learning curves if they are there.
        model_id: the id on the Hub or path that the card's code loads the model from.
        path: the card, by default `README.md` in the folder.

    Raises:
        UserError: the config describes no network, a file of the folder is damaged, or the card cannot be written.
    """
    try:
        config = load_config(folder)
        cost = total(count_operations(config)) if config.model_type in CONFIG_CLASSES else None
    except LoadingError as error:
        raise UserError(f"config.json of {str(folder)!r} describes no network: {error}") from error
    names = ("all_results.json", RUN_ARGUMENTS, "train.json")
    recorded, arguments, recipe = (read_json(folder / name) for name in names)
    results, processor = finite_numbers(recorded), folder / IMAGE_PROCESSOR_NAME
    try:
        background = read_background(read_json(processor))
    except UserError as error:
        raise UserError(f"{str(processor)!r} is damaged: {error}") from error
    given = arguments or recipe
    teacher = text_value(given, "teacher_model_name_or_path")
    named = text_value(given, "dataset_name")
    named = FASHION_MNIST_HUB_ID if named == FASHION_MNIST else named
    dataset = named or text_value(given, "train_dir") or text_value(given, "validation_dir")
    metrics = named_metrics(results, "eval")
    images, test_metrics = evaluation_images(folder), named_metrics(results, "test")
    if images == TEST and results.get("eval_samples") == results.get("test_samples"):
        test_metrics = {}
    published = test_metrics or ({} if images == TRAINING else metrics)
    name, binary = Path(model_id).name, config.model_type == QUANT_METHOD
    weight_bits = config.weight_bits if binary else 32
    base_model = teacher if "teacher_revision" in recorded or not arguments else None  # a teacher on the Hub
    license = text_value(arguments, "license") or DEFAULT_LICENSE
    card = ModelCard.from_template(
        card_metadata(name, weight_bits == 1, dataset, bool(named), license, base_model, published),
        template_path=str(shipped_folder("model_cards") / "template.md"),
        model_id=model_id,
        name=name,
        config=config,
        binary=binary,
        kind={1: "1-bit vision transformer", 32: "vision transformer"}.get(
            weight_bits, "quantised vision transformer"
        ),
        bits_per_weight=describe_bits(weight_bits),
        counted=counted,
        trained=bool(arguments),
        weights=weight_bytes(folder) > 0,
        dataset=dataset,
        background=background,
        results=results,
        metrics=metrics,
        evaluation_images=images,
        test_metrics=test_metrics,
        like_guessing=find_guessing(results, {"eval": images, **({"test": TEST} if test_metrics else {})}),
        teacher=teacher,
        teacher_metrics=named_metrics(results, "teacher"),
        sizes=sizes_on_disk(folder, results, weight_bits),
        cost=cost,
        readable=readable,
        carries_code=(folder / "modeling_binaryvit.py").is_file(),
        learning_curves=(folder / "learning_curves.png").is_file(),
        confusion_matrix=(folder / "confusion_matrix.png").is_file(),
        recipe=recipe,
        arguments=arguments,
        chosen=chosen_arguments(arguments),
    )
    path = path or folder / "README.md"
    content = f"{str(card).rstrip()}\n"
    notes = next(filter(None, (split_card(read_card(known))[1] for known in (path, folder / "README.md"))), "")
    if arguments or notes or weight_bytes(folder):
        content += f"\n{NOTES}\n" + (f"\n{notes}\n" if notes else "")
    write_file(path, content.encode(errors="surrogateescape"))


def card_metadata(
    name: str,
    one_bit: bool,
    dataset: str | None,
    is_named: bool,
    license: str,
    base_model: str | None,
    metrics: dict[str, float],
) -> ModelCardData:
    """
    The card's metadata in the Hub's format, which lists results only with a dataset and a model name.

    Args:
        is_named: whether `dataset` is a `--dataset_name`, not a folder, which another machine may lack.
    """
    # The metadata must name a dataset on the Hub: neither a local path nor scikit-learn's digits is one.
    on_hub = dataset is not None and is_named and dataset != DIGITS and not os.path.exists(dataset)
    metrics = metrics if dataset else {}
    results = [
        EvalResult(
            task_type="image-classification",
            dataset_type=dataset if on_hub else "local",
            dataset_name=dataset,
            metric_type="accuracy",
            metric_name=metric,
            metric_value=value,
        )
        for metric, value in metrics.items()
    ]
    return ModelCardData(
        license=license,
        library_name="transformers",
        pipeline_tag="image-classification",
        tags=["image-classification", TAG, *(["1-bit"] if one_bit else [])],
        datasets=[dataset] if on_hub else None,
        base_model=base_model,
        model_name=name if results else None,
        eval_results=results or None,
    )


def find_guessing(results: dict[str, float], kinds: dict[str, str]) -> dict[str, float]:
    """
    The accuracy of guessing by kind of images, for evaluations whose confidence interval is not above it.

    Args:
        kinds: of the images, by evaluation ("eval", "test").
    """
    guessing = {}
    for split, kind in kinds.items():
        low, share = results.get(f"{split}_accuracy_low"), results.get(f"{split}_guessing_accuracy")
        if low is not None and share is not None and low <= share:
            guessing[kind] = share
    return guessing


def describe_bits(weight_bits: int) -> str:
    return "one bit per weight" if weight_bits == 1 else f"{weight_bits} bits per weight"


def sizes_on_disk(folder: Path, results: dict, weight_bits: int) -> dict[str, int]:
    """Bytes of the model's weights, its latent weights and its teacher's weights, without zeros."""
    packed = bool(read_json(folder / "config.json").get("quantization_config"))
    sizes = {
        f"packed, {describe_bits(weight_bits)}" if packed else "float32": weight_bytes(folder),
        "latent, float32": weight_bytes(folder / LATENT),
        "its teacher": results.get("teacher_bytes", 0),
    }
    return {name: size for name, size in sizes.items() if size}


def weight_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def chosen_arguments(arguments: dict) -> dict:
    """The arguments of a run that differ from their defaults, and always its length, batch and learning rate."""
    if not arguments:
        return {}
    # The defaults depend on the device, so create them for the run's: this machine may have another.
    training_arguments = DistillationTrainingArguments(
        text_value(arguments, "output_dir") or "output", use_cpu=arguments.get("use_cpu") is True
    )
    defaults = arguments_to_json(RunArguments(ModelArguments(), DataArguments(), training_arguments))
    steps = arguments.get("max_steps")
    by_steps = isinstance(steps, int) and steps > 0
    length, unused = ("max_steps", "num_train_epochs") if by_steps else ("num_train_epochs", "max_steps")
    always = {length, "per_device_train_batch_size", "learning_rate"}
    return {
        name: value
        for name, value in arguments.items()
        if name in always
        or (value != defaults.get(name) and (name, value) not in EARLIER_DEFAULTS and name not in (unused, PROCESSES))
    }

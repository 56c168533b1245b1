"""Reads the records of a training run in its output directory: results, and metrics over the epochs."""

import json
import math
import os
import sys
from pathlib import Path
from typing import NamedTuple

from binaryvit_runtime.errors import UserError, first_sentence
from binaryvit_runtime.sources import RUN_ARGUMENTS


TRAINER_STATE = "trainer_state.json"  # transformers.trainer has the name too, but takes a second to import
ALL_RESULTS = "all_results.json"
TRAINING_IMAGES = "_training_images.json"  # of the run that RUN_ARGUMENTS is of; never uploaded
EVALUATION_IMAGES = "eval_images"  # the key of their kind in the results
HELD_OUT, TEST, TRAINING, UNKNOWN = EVALUATION_KINDS = ("held-out", "test", "training", "evaluation")
METRIC_NAMES = {"accuracy": "top-1 accuracy", "top5_accuracy": "top-5 accuracy"}
SAME_IMAGES = ("samples", "accuracy", "loss")  # a model has equal values of these on equal images


class TrainingHistory(NamedTuple):
    """
    Args:
        entries: the metrics that a run logged.
        is_distilled: whether it minimised the distillation loss instead of the label loss.
        evaluation_images: see `evaluation_images`.
        is_logged: whether there is more than the results at the end of the run.
    """

    entries: list[dict[str, float]]
    is_distilled: bool
    evaluation_images: str = UNKNOWN
    is_logged: bool = False


def read_training_history(output_dir: Path, checkpoint: Path | None = None) -> TrainingHistory:
    """
    The history of a run: what the Trainer logged, and the results at its end. Without entries if the folder holds none, for
    example the folder of a model from the Hub.

    Args:
        checkpoint: a folder `checkpoint-N` of the run; the history then ends with this checkpoint.
    """
    logged = read_json((checkpoint or output_dir) / TRAINER_STATE).get("log_history")
    entries = (
        [finite_numbers(entry) for entry in logged if isinstance(entry, dict)] if isinstance(logged, list) else []
    )
    is_logged = bool(entries)
    if checkpoint is None:
        results = finite_numbers(read_json(output_dir / ALL_RESULTS))
        # With --load_best_model_at_end the results are of the best epoch, but their `epoch` is the last one.
        logged_keys = {key for entry in entries if entry.get("epoch") == results.get("epoch") for key in entry}
        entries.append({key: value for key, value in results.items() if key == "epoch" or key not in logged_keys})
    is_distilled = bool(read_json(output_dir / RUN_ARGUMENTS).get("teacher_model_name_or_path"))
    return TrainingHistory(entries, is_distilled, evaluation_images(output_dir), is_logged)


def evaluation_images(output_dir: Path) -> str:
    """
    The kind of images that a run was evaluated on: `"held-out"`, `"test"`, `"training"`, or `"evaluation"` if the folder
    does not tell.
    """
    results = read_json(output_dir / ALL_RESULTS)
    recorded = results.get(EVALUATION_IMAGES)
    if recorded in EVALUATION_KINDS:
        return recorded
    return infer_evaluation_images(read_json(output_dir / RUN_ARGUMENTS), results)


def infer_evaluation_images(arguments: dict, results: dict) -> str:
    """`evaluation_images` of a run that did not record it, as those of 0.1.0."""
    train, validation = (text_value(arguments, f"{name}_dir") for name in ("train", "validation"))
    if train and validation and os.path.abspath(train) == os.path.abspath(validation):
        return TRAINING
    if train or arguments.get("train_val_split") is not None:
        return HELD_OUT
    train_split, split, test_split = (
        text_value(arguments, f"{name}_split_name") for name in ("train", "validation", "test")
    )
    if not split and test_split == "validation":
        split = "validation"  # it is the default of evaluation, too
    if split:
        return TRAINING if split == train_split else TEST if split == test_split else HELD_OUT
    evaluation, test = (
        finite_numbers({key: results.get(f"{prefix}_{key}") for key in SAME_IMAGES}) for prefix in ("eval", "test")
    )
    if arguments.get("max_eval_samples") is not None or not evaluation.keys() == test.keys() == set(SAME_IMAGES):
        return UNKNOWN
    is_same = all(math.isclose(evaluation[key], test[key], rel_tol=1e-5) for key in SAME_IMAGES)
    return TEST if is_same else HELD_OUT


def text_value(content: dict, name: str) -> str | None:
    value = content.get(name)
    return value if isinstance(value, str) else None


def find_values(history: TrainingHistory, key: str) -> list[tuple[float, float]]:
    """Epochs and values of one metric."""
    entries = [entry for entry in history.entries if {"epoch", key} <= entry.keys()]
    # No axis has ticks for larger numbers.
    return [(entry["epoch"], entry[key]) for entry in entries if max(abs(entry["epoch"]), abs(entry[key])) < 1e30]


def named_metrics(results: dict[str, float], prefix: str) -> dict[str, float]:
    """The accuracies of one evaluation ("eval", "test" or "teacher"), by their names in the card."""
    return {name: results[f"{prefix}_{key}"] for key, name in METRIC_NAMES.items() if f"{prefix}_{key}" in results}


def read_json(path: Path) -> dict:
    """The object in a JSON file, empty if there is no file; raises UserError if the file is damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{str(path)!r} is damaged: {first_sentence(error)}; repair or remove it.") from error
    if not isinstance(content, dict):
        raise UserError(f"{str(path)!r} holds a {type(content).__name__}, not a JSON object; repair or remove it.")
    return content


def finite_numbers(content: dict) -> dict[str, float]:
    """The entries that are finite numbers."""
    return {
        name: value
        for name, value in content.items()
        if isinstance(value, (int, float)) and -sys.float_info.max <= value <= sys.float_info.max
    }

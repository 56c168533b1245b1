"""Arguments that were given but do nothing beside the others."""

import logging
from dataclasses import MISSING, fields

from .arguments import Phase


logger = logging.getLogger(__name__)

NO_TEACHER = "there is no teacher"
NO_DATASET = "it is for a --dataset_name, and folders are read"
NO_HUB = "nothing is uploaded without --push_to_hub"


def warn_of_unused(phase: Phase) -> None:
    """Log a line for each."""
    for name, reason in find_unused(phase):
        logger.warning("--%s has no effect: %s.", name, reason)


def find_unused(phase: Phase) -> list[tuple[str, str]]:
    """Names of arguments that are not what they are by default and that nothing looks at, each with the reason."""
    given = {field.name for part in phase for field in fields(part) if differs(part, field)}
    return [(name, reason) for name, unused, reason in table(*phase) if unused and name in given]


def differs(part, field) -> bool:
    default = field.default if field.default is not MISSING else field.default_factory()
    return getattr(part, field.name) != default


def table(model, data, training) -> list[tuple[str, bool, str]]:
    """Name of an argument, whether it has no effect, and why."""
    taught = model.teacher_model_name_or_path is not None
    mixed = data.mixup_alpha > 0 or data.cutmix_alpha > 0
    weight = training.label_loss_weight
    labels_count = not taught or (mixed if weight is None else weight > 0)
    best = training.load_best_model_at_end or training.save_strategy == "best"
    best = best or training.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy")
    rows = [
        ("subfolder", not model.model_name_or_path, "it is of a --model_name_or_path, and there is none"),
        ("ignore_mismatched_sizes", not model.model_name_or_path, "--config_name begins a new head anyway"),
        ("crop_pct", bool(model.model_name_or_path), "the model's own image processor says how to crop"),
        ("shuffle_buffer_size", not data.streaming, "only --streaming reads through a buffer"),
        ("test_split_name", not training.do_predict, "only --do_predict tests"),
        *((name, not data.dataset_name, NO_DATASET) for name in OF_DATASETS),
        *((name, not training.push_to_hub, NO_HUB) for name in OF_UPLOADS),
    ]
    if training.do_train:
        rows += [
            (
                "label_smoothing_factor",
                not labels_count,
                "the labels have no share in the loss; give --label_loss_weight",
            ),
            ("label_loss_weight", not taught, NO_TEACHER),
            ("distillation_temperature", not taught, NO_TEACHER),
            ("mixup_prob", not mixed, "neither --mixup_alpha nor --cutmix_alpha is given"),
            ("mixup_switch_prob", not (data.mixup_alpha and data.cutmix_alpha), "it chooses between mixup and CutMix"),
            ("color_jitter", data.rand_augment is not None, "--rand_augment changes colours by itself"),
            ("num_train_epochs", training.max_steps > 0, "--max_steps says when training ends"),
            ("save_steps", training.save_strategy != "steps", f"--save_strategy is {training.save_strategy.value}"),
            ("eval_steps", training.eval_strategy != "steps", f"--eval_strategy is {training.eval_strategy.value}"),
            ("save_total_limit", training.save_strategy == "no", "--save_strategy is no"),
            ("metric_for_best_model", not best, "no best model is looked for; give --load_best_model_at_end"),
        ]
    return rows


OF_DATASETS = (
    "dataset_config_name",
    "train_split_name",
    "validation_split_name",
    "image_column_name",
    "label_column_name",
    "class_names",
)
OF_UPLOADS = ("hub_model_id", "hub_strategy", "hub_private_repo", "hub_always_push", "hub_revision")

"""Finds arguments that have no effect, because another argument makes them useless."""

from dataclasses import MISSING, fields

from .arguments import SCHEDULES_BY_METRICS, RunArguments


NO_TEACHER = "there is no teacher"
DATASET_ARGUMENTS = (
    *("dataset_config_name", "train_split_name", "validation_split_name"),
    *("image_column_name", "label_column_name", "class_names"),
)
UPLOAD_ARGUMENTS = ("hub_model_id", "hub_strategy", "hub_private_repo", "hub_always_push", "hub_revision")


def find_unused(arguments: RunArguments, uploads: bool = False) -> list[tuple[str, str]]:
    """
    The names of arguments that differ from their defaults and have no effect, each with the reason.

    Args:
        uploads: whether this run uploads its model, or, if it trains a teacher, its student's run does.
    """
    given = {field.name for part in arguments for field in fields(part) if differs_from_default(part, field)}
    return [
        (name, reason) for name, unused, reason in conditions_of_use(*arguments, uploads) if unused and name in given
    ]


def differs_from_default(part, field) -> bool:
    default = field.default if field.default is not MISSING else field.default_factory()
    return getattr(part, field.name) != default


def conditions_of_use(model, data, training, uploads) -> list[tuple[str, bool, str]]:
    """For each argument that may have no effect: its name, whether it has none, and the reason."""
    has_teacher = model.teacher_model_name_or_path is not None
    mixed = data.mixup_alpha > 0 or data.cutmix_alpha > 0
    weight = training.label_loss_weight
    labels_count = not has_teacher or (mixed if weight is None else weight > 0)
    needs_best = training.load_best_model_at_end or training.save_strategy == "best"
    needs_best = needs_best or training.lr_scheduler_type in SCHEDULES_BY_METRICS
    rows = [
        ("subfolder", not model.model_name_or_path, "it needs --model_name_or_path"),
        ("ignore_mismatched_sizes", not model.model_name_or_path, "--config_name starts a new head anyway"),
        ("crop_pct", bool(model.model_name_or_path), "the model's own image processor defines the crop"),
        ("shuffle_buffer_size", not data.streaming, "only --streaming uses a buffer"),
        ("test_split_name", not training.do_predict, "only --do_predict tests"),
    ]
    for name in DATASET_ARGUMENTS:
        rows.append((name, not data.dataset_name, "it needs --dataset_name, and the images come from folders"))
    for name in UPLOAD_ARGUMENTS:
        rows.append((name, not (uploads or training.push_to_hub), "nothing is uploaded without --push_to_hub"))
    if training.do_train:
        rows += [
            ("label_smoothing_factor", not labels_count, "labels have no share in the loss; set --label_loss_weight"),
            ("label_loss_weight", not has_teacher, NO_TEACHER),
            ("distillation_temperature", not has_teacher, NO_TEACHER),
            ("mixup_prob", not mixed, "neither --mixup_alpha nor --cutmix_alpha is given"),
            ("mixup_switch_prob", not (data.mixup_alpha and data.cutmix_alpha), "it chooses between mixup and CutMix"),
            ("color_jitter", data.rand_augment is not None, "--rand_augment already changes colours"),
            ("num_train_epochs", training.max_steps > 0, "--max_steps sets the end of training"),
            ("save_steps", training.save_strategy != "steps", f"--save_strategy is {training.save_strategy.value}"),
            ("eval_steps", training.eval_strategy != "steps", f"--eval_strategy is {training.eval_strategy.value}"),
            ("save_total_limit", training.save_strategy == "no", "--save_strategy is no"),
            ("metric_for_best_model", not needs_best, "no best model is chosen; set --load_best_model_at_end"),
        ]
    return rows

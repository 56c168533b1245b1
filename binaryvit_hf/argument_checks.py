"""Declares command-line arguments, and checks the type and range of each before anything is loaded."""

import dataclasses
import json
import math
from enum import Enum
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

from binaryvit_runtime.errors import UserError, did_you_mean, first_sentence, shorten


MAX_COUNT = 2**31 - 1
TYPES = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    list: "a list",
    dict: "an object",
}


class Range(NamedTuple):
    """The numbers from `low` to `high`. `without_low` and `without_high` exclude the bound itself."""

    low: float = -math.inf
    high: float = math.inf
    without_low: bool = False
    without_high: bool = False

    def __contains__(self, value: Any) -> bool:
        above = value > self.low if self.without_low else value >= self.low
        below = value < self.high if self.without_high else value <= self.high
        return above and below

    def __str__(self) -> str:
        low = f"above {self.low}" if self.without_low else f"{self.low} or more"
        high = f"below {self.high}" if self.without_high else f"at most {self.high}"
        bounds = [low] * (self.low > -math.inf) + [high] * (self.high < math.inf)
        return " and ".join(bounds)


NOT_NEGATIVE = Range(0)
POSITIVE = Range(0, without_low=True)
SHARE = Range(0, 1)
POSITIVE_SHARE = Range(0, 1, without_low=True)
SHARE_BELOW_ONE = Range(0, 1, without_high=True)
SHARE_INSIDE = Range(0, 1, without_low=True, without_high=True)
COUNT = Range(1, MAX_COUNT)
COUNT_OR_ZERO = Range(0, MAX_COUNT)
SEED = Range(0, 2**32 - 1)  # numpy's seeds

# By argument. Any finite number is valid for an argument that is not in this table.
RANGES = {
    # the network
    "drop_path_rate": SHARE_BELOW_ONE,
    # images
    "crop_pct": POSITIVE_SHARE,
    "shuffle_buffer_size": COUNT,
    "train_val_split": POSITIVE,
    "max_train_samples": COUNT,
    "max_eval_samples": COUNT,
    "random_resized_crop_min_scale": POSITIVE_SHARE,
    "horizontal_flip_prob": SHARE,
    "color_jitter": NOT_NEGATIVE,
    "random_erasing_prob": SHARE,
    "mixup_alpha": NOT_NEGATIVE,
    "cutmix_alpha": NOT_NEGATIVE,
    "mixup_prob": SHARE,
    "mixup_switch_prob": SHARE,
    # the loss and the options of training
    "label_loss_weight": SHARE,
    "distillation_temperature": POSITIVE,
    "learning_rate_batch_size": COUNT,
    "repeated_augmentations": COUNT,
    "ema_decay": SHARE_INSIDE,
    "weight_regularization": NOT_NEGATIVE,
    "batch_norm_reestimation_batches": COUNT_OR_ZERO,
    "oscillation_freezing_threshold": SHARE_INSIDE,
    # arguments that transformers does not check, or whose name is not in its message
    "per_device_train_batch_size": COUNT,
    "per_device_eval_batch_size": COUNT,
    "num_train_epochs": POSITIVE,
    "max_steps": Range(-1, MAX_COUNT),
    "learning_rate": NOT_NEGATIVE,
    "warmup_steps": NOT_NEGATIVE,
    "weight_decay": NOT_NEGATIVE,
    "adam_beta1": SHARE_BELOW_ONE,
    "adam_beta2": SHARE_BELOW_ONE,
    "adam_epsilon": NOT_NEGATIVE,
    "gradient_accumulation_steps": COUNT,
    "max_grad_norm": NOT_NEGATIVE,
    "label_smoothing_factor": SHARE,
    "neftune_noise_alpha": NOT_NEGATIVE,
    "torch_empty_cache_steps": COUNT,
    "logging_steps": NOT_NEGATIVE,
    "eval_steps": NOT_NEGATIVE,
    "save_steps": NOT_NEGATIVE,
    "eval_delay": NOT_NEGATIVE,
    "eval_accumulation_steps": COUNT,
    "save_total_limit": Range(-1, MAX_COUNT),  # 0 and -1 keep all checkpoints
    "seed": SEED,
    "data_seed": SEED,
    "dataloader_num_workers": COUNT_OR_ZERO,
    "dataloader_prefetch_factor": COUNT,
    "ddp_bucket_cap_mb": COUNT,
    "ddp_timeout": COUNT,
    "local_rank": Range(-1, MAX_COUNT),
}


def argument(default: Any, help: str, **argparse_options: Any) -> Any:
    """A dataclass field that becomes a command-line flag. `argparse_options` go to `ArgumentParser.add_argument`."""
    return dataclasses.field(default=default, metadata={"help": help, **argparse_options})


def check_ranges(arguments: Any) -> None:
    """
    Check all numbers among the fields of a dataclass.

    Raises:
        UserError: a number is not finite or not in its range.
    """
    for field in dataclasses.fields(arguments):
        value = getattr(arguments, field.name)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"--{field.name} must be a finite number, not {value}.")
        allowed = RANGES.get(field.name, Range())
        if value not in allowed:
            raise UserError(f"--{field.name} must be {allowed}, not {value}.")


def convert_argument(name: str, value: Any, annotation: Any, choices: Any = None, bare: Any = None) -> Any:
    """
    Convert a value from a file or command line to the type of its field.

    Args:
        annotation: type of the field.
        choices: the allowed values; `None` allows any.
        bare: the value of a flag that is given without one. `true` in a file means the same, and `false`, for a flag
            whose values are words, the word "false".

    Raises:
        UserError: the value has another type or is not a choice.
    """
    kinds = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    if value is True and bare is not None:
        return bare
    if value is False and bare is not None and annotation is str:
        return "false"
    if value is None and NoneType in kinds:
        return None
    shown = shorten(repr(value), 60)
    names = [member.value for kind in kinds if isinstance(kind, type) and issubclass(kind, Enum) for member in kind]
    choices = names or choices
    if choices is not None:
        if value in list(choices):
            return value
        raise UserError(
            f"--{name} must be one of {', '.join(map(str, choices))}, not {shown}{did_you_mean(str(value), choices)}"
        )
    if isinstance(value, str) and value.startswith("{") and any((get_origin(kind) or kind) is dict for kind in kinds):
        try:
            json.loads(value)
        except (ValueError, RecursionError) as error:
            raise UserError(f"--{name} {shown} is not JSON: {first_sentence(error)}.") from error
    for kind in kinds:
        converted = convert_value(kind, value)
        if converted is not None:
            return converted
    wanted = " or ".join(dict.fromkeys(describe_type(kind) for kind in kinds if kind is not NoneType))
    raise UserError(f"--{name} must be {wanted}, not {shown}.")


def convert_value(kind: Any, value: Any) -> Any:
    """The value converted to a type; `None` if that is impossible."""
    origin, whole = get_origin(kind) or kind, isinstance(value, int) and not isinstance(value, bool)
    if origin is bool:
        return bool(value) if value in (0, 1) and isinstance(value, int) else None
    if origin is int:
        whole = whole or (isinstance(value, float) and value.is_integer())
        return int(value) if whole else None
    if origin is float:
        try:
            return float(value) if whole or isinstance(value, float) else None
        except OverflowError:
            return math.inf
    if origin is Literal:
        return value if any(value is choice for choice in get_args(kind)) else None
    if origin is list:
        item = (get_args(kind) or (object,))[0]
        if not isinstance(value, list):
            return None
        known = [member.value for member in item] if issubclass(item, Enum) else value
        return value if all(isinstance(element, str) and element in known for element in value) else None
    return value if origin is not NoneType and isinstance(value, origin) else None


def describe_type(kind: Any) -> str:
    origin = get_origin(kind) or kind
    return TYPES.get(origin, getattr(origin, "__name__", str(origin)))

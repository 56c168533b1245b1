"""The help of a training run: this package's arguments by subject first, then those of transformers' Trainer."""

import shutil
import sys
import textwrap
from dataclasses import MISSING, Field, fields
from enum import Enum
from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple, get_args, get_type_hints

from binaryvit_runtime.errors import UserError, did_you_mean

from .arguments import UNSUPPORTED, RunArguments


ARGUMENT_CLASSES = tuple(RunArguments.__annotations__.values())
MAX_WIDTH = 110  # characters of a line
INDENT = " " * 8
FEW_CHOICES = 12
ALL = "all"
DESCRIPTION = """\
Train, distil and evaluate image classifiers, 1-bit and full precision."""
EXAMPLES = """\
Examples:
  {prog} configs/quickstart.json
      minutes on two cores, no download: a teacher for handwritten digits, then its 1-bit student
  {prog} configs/photos.json --train_dir photos
      your photos, in one sub-folder per class: photos/ant/1.jpg, photos/bee/2.jpg
  {prog} configs/photos.json --train_dir photos --teacher.num_train_epochs 20 --num_train_epochs 60
      the same, with other arguments for the teacher and the student
  {prog} --model_name_or_path outputs/photos --do_eval --validation_dir held-out
      evaluate a trained model
"""
USAGE = """\
How arguments are given:
  FILE.json, FILE.yaml   a file of arguments comes first. Flags after it override its values.
  --NAME VALUE           an argument. One that is on or off needs no value; `false` turns it off.
  --teacher.NAME VALUE   an argument of the teacher that the file trains first.
  --teacher null         leaves the file's teacher out, to learn from the labels.
  --help WORD            explains the arguments with WORD in their names, or else in their text. --help all: all of them.
The same command again resumes an interrupted run, and evaluates a finished one."""

GROUPS = {
    "The run": (
        *("output_dir", "do_train", "do_eval", "do_predict", "num_train_epochs", "max_steps", "seed"),
        *("resume_from_checkpoint", "save_packed", "license"),
    ),
    "The network": (
        *("config_name", "model_name_or_path", "init_from", "config_overrides", "ignore_mismatched_sizes"),
        *("drop_path_rate", "subfolder"),
    ),
    "The teacher and distillation": (
        *("teacher_model_name_or_path", "label_loss_weight", "distillation_temperature"),
    ),
    "The images, from folders": ("train_dir", "validation_dir"),
    "The images, from a dataset": (
        *("dataset_name", "dataset_config_name", "train_split_name", "validation_split_name", "test_split_name"),
        *("image_column_name", "label_column_name", "class_names", "train_files", "validation_files"),
        *("streaming", "shuffle_buffer_size"),
    ),
    "The images, from either": (
        *("train_val_split", "max_train_samples", "max_eval_samples", "skip_broken_images", "keep_images_in_memory"),
        *("crop_in_batches", "background", "crop_pct", "balance_classes"),
    ),
    "Augmentation of training images": (
        *("random_resized_crop_min_scale", "horizontal_flip_prob", "rand_augment", "color_jitter"),
        *("random_erasing_prob", "mixup_alpha", "cutmix_alpha", "mixup_prob", "mixup_switch_prob"),
        "repeated_augmentations",
    ),
    "The recipe": (
        *("per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate", "learning_rate_batch_size"),
        *("lr_scheduler_type", "lr_schedule_per_epoch", "warmup_steps", "weight_decay", "label_smoothing_factor"),
        "max_grad_norm",
    ),
    "Methods beyond the paper's recipe, for the student": (
        *("ema_decay", "batch_norm_reestimation_batches", "oscillation_freezing_threshold"),
        *("weight_regularization", "sign_gradient"),
    ),
    "Speed": (
        "cuda_graphs",
        "torch_compile",
        "bf16",
        "use_cpu",
        "dataloader_num_workers",
        "per_device_eval_batch_size",
    ),
    "Progress and checkpoints": (
        *("eval_strategy", "logging_strategy", "logging_steps", "save_strategy", "save_steps", "save_total_limit"),
        *("report_to", "disable_tqdm"),
    ),
    "The Hub": ("push_to_hub", "hub_model_id", "token", "hub_token", "cache_dir", "trust_remote_code"),
}
# What transformers' arguments do here, where its own text says less.
TEXTS = {
    "output_dir": "Folder for the model, its card, checkpoints and results.",
    "do_train": "Train. Without it nothing is trained.",
    "do_eval": "Evaluate at the end, on the validation images.",
    "do_predict": "Evaluate at the end on the test images too.",
    "num_train_epochs": "How often training goes through all training images.",
    "max_steps": "End training after this many steps, whatever --num_train_epochs. -1: at the end of the epochs.",
    "seed": "Seed of all random numbers.",
    "eval_strategy": "When to evaluate during training.",
    "logging_strategy": "When to log the training loss.",
    "logging_steps": "Steps from one logged loss to the next; below 1, a share of all steps.",
    "save_strategy": "When to save a checkpoint.",
    "save_steps": "Steps from one checkpoint to the next; below 1, a share of all steps.",
    "save_total_limit": "Keep at most this many checkpoints. Default: keep all.",
    "report_to": "Loggers, such as tensorboard or wandb, or 'all' that are installed.",
    "bf16": "Train in mixed precision, float32 and bfloat16, on a GPU that supports it.",
    "warmup_steps": "Steps in which the learning rate rises from 0; below 1, a share of all steps.",
    "weight_decay": "Weight decay of the optimiser, for the weights of linear layers and convolutions.",
    "learning_rate": "The highest learning rate of the schedule.",
    "lr_scheduler_type": "Course of the learning rate, such as linear, cosine, cosine_with_min_lr or constant.",
    "per_device_train_batch_size": "Images in a batch of each GPU or process.",
    "per_device_eval_batch_size": "Images in a batch of evaluation.",
    "gradient_accumulation_steps": "Batches whose gradients are added up for a step.",
    "label_smoothing_factor": "Share of the labels that is spread over all classes.",
    "use_cpu": "Train on the CPU, even if there is a GPU.",
    "dataloader_num_workers": "Processes that read images. 0: the main process reads them.",
    "disable_tqdm": "Show no bars. Default: on a terminal bars, in a log file lines.",
    "push_to_hub": "Upload the model during training, and at the end.",
    "hub_model_id": "Repository to upload to. Default: the name of --output_dir.",
}
DEFAULTS = {"output_dir": "trainer_output"}  # that transformers sets later
# The other arguments of the Trainer, by the beginnings of their names; the first match counts.
TRAINER_GROUPS = {
    "evaluation": (
        *(
            "eval",
            "prediction",
            "include_for",
            "metric_",
            "greater_",
            "load_best",
            "batch_eval",
            "bf16_full",
            "fp16_full",
        ),
    ),
    "optimiser and schedule": ("adam_", "optim", "lr_"),
    "checkpoints": ("save_", "enable_jit", "ignore_data", "restore_", "full_determinism", "data_seed"),
    "logging": ("log", "run_name", "project", "trackio", "include_num", "skip_memory", "debug"),
    "precision, speed and memory": ("fp16", "tf32", "gradient_", "activation_", "torch_", "auto_find", "use_"),
    "reading images": ("dataloader_", "remove_", "length_"),
    "several devices": ("ddp_", "fsdp", "deepspeed", "accelerator", "parallelism", "local_rank", "average_tokens"),
    "the Hub": ("hub_",),
    "other": ("",),
}


def print_help(words: list[str]) -> None:
    """
    Print the help, or the explanations of the arguments that `words` name.

    Raises:
        UserError: no argument has one of the words in its name or text.
    """
    text = full_help() if not words else search_help(words)
    try:
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()
    except BrokenPipeError:  # for example `| head`
        sys.stdout = None  # type: ignore[assignment] # Python flushes it again at exit


def full_help() -> str:
    arguments, prog = known_arguments(), program()
    sections = [f"usage: {prog} [FILE] [--NAME VALUE ...]", DESCRIPTION, EXAMPLES.format(prog=prog).rstrip(), USAGE]
    for title, names in GROUPS.items():
        sections.append("\n".join([f"{title}:", *(explain(arguments.pop(name)) for name in names)]))
    others = [
        "Other arguments of transformers' Trainer, with their defaults, if these are not none or off. --help NAME explains one:"
    ]
    while arguments:
        title, beginnings = next(
            (title, beginnings)
            for title, beginnings in TRAINER_GROUPS.items()
            if next(iter(arguments)).startswith(beginnings)
        )
        named = [arguments.pop(name) for name in list(arguments) if name.startswith(beginnings)]
        others.append(wrap(f"{title}: {', '.join(map(name_with_default, named))}", "  ", "    "))
    return "\n\n".join([*sections, "\n".join(others)])


def search_help(words: list[str]) -> str:
    arguments = known_arguments()
    found: dict[str, Argument] = {}
    for word in words:
        wanted = word.strip("-").replace("-", "_").lower()
        if wanted in UNSUPPORTED:
            raise UserError(f"--{wanted} is not supported: {UNSUPPORTED[wanted]}.")
        matches = {name: known for name, known in arguments.items() if wanted in name or wanted == ALL}
        matches = matches or {name: known for name, known in arguments.items() if wanted in known.text.lower()}
        if not matches:
            raise UserError(f"No argument has {word!r} in its name or text{did_you_mean(wanted, arguments)}")
        found |= matches
    return "\n".join(explain(argument, most_choices=len(argument.choices)) for argument in found.values())


def program() -> str:
    """How the user has started this program."""
    started = Path(sys.argv[0])
    return f"python {started.name}" if started.suffix == ".py" else sys.argv[0]


class Argument(NamedTuple):
    """
    Args:
        kind: the type of its values.
        choices: the values that it takes; empty if it takes others.
        default: as on the command line; `None` if there is none, or the text says it.
    """

    name: str
    text: str
    kind: Any
    choices: list[str]
    default: str | None


def known_arguments() -> dict[str, Argument]:
    found = {}
    for part in ARGUMENT_CLASSES:
        hints = get_type_hints(part)
        for field in fields(part):
            if field.name not in UNSUPPORTED:
                found[field.name] = read_field(field, hints[field.name])
    return found


def read_field(field: Field, hint: Any) -> Argument:
    kinds = [kind for kind in get_args(hint) or (hint,) if kind is not NoneType]
    enum = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Enum)), None)
    choices = [member.value for member in enum or ()] or list(field.metadata.get("choices") or ())
    text = " ".join(TEXTS.get(field.name, field.metadata.get("help") or "").replace("%%", "%").split())
    default = field.default if field.default is not MISSING else None
    default = DEFAULTS.get(field.name, default.value if isinstance(default, Enum) else default)
    return Argument(field.name, text, kinds[0], choices, describe_default(field.name, default, kinds[0], text))


def describe_default(name: str, default: Any, kind: Any, text: str) -> str | None:
    if "default:" in text.lower():
        return None
    if default is True:
        return f"on; --no_{name} turns it off"
    if default is False or (default is None and kind is bool):
        return "off"
    return "none" if default is None or default == "" else str(default)


def name_with_default(argument: Argument) -> str:
    default = "none" if argument.default is None else argument.default.split(";")[0]
    return f"--{argument.name}" if default in ("none", "off") else f"--{argument.name} ({default})"


def explain(argument: Argument, most_choices: int = FEW_CHOICES) -> str:
    """An argument with its value, text, default and, if they are not more than `most_choices`, choices, in lines."""
    values = {bool: "", int: " N", float: " X"}
    value = " FOLDER" if argument.name.endswith("_dir") else values.get(argument.kind, " VALUE")
    text = argument.text.rstrip(".") + "."
    if 0 < len(argument.choices) <= most_choices:
        text += f" One of {', '.join(map(str, argument.choices))}."
    if argument.default is not None:
        text += f" Default: {argument.default}."
    return f"  --{argument.name}{value}\n{wrap(text, INDENT, INDENT)}"


def wrap(text: str, first: str, later: str) -> str:
    width = min(shutil.get_terminal_size().columns - 1, MAX_WIDTH)
    return textwrap.fill(
        text, width, initial_indent=first, subsequent_indent=later, break_on_hyphens=False, break_long_words=False
    )

"""Command line and configuration files: who says what, and in which order."""

import difflib
import json
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser

from .data_arguments import DataArguments
from .errors import UserError
from .options import TrainingOptions
from .trainer import DistillationTrainingArguments


RUN_ARGUMENTS = "run_arguments.json"  # of a run's output directory
TEACHER_PREFIX = "teacher."
DEFAULT_LICENSE = "apache-2.0"
# What the student's command line says about the student alone.
STUDENT_ONLY = {
    "model_name_or_path",
    "subfolder",
    "config_name",
    "teacher_model_name_or_path",
    "output_dir",
    "resume_from_checkpoint",
    "push_to_hub",
    "hub_model_id",
    "label_loss_weight",
    "distillation_temperature",
    "init_from",
    "config_overrides",
    *(option.name for option in fields(TrainingOptions)),
}
# What may differ from one call to the next of the same run.
PASSING = {
    "token",
    "hub_token",
    "cache_dir",
    "resume_from_checkpoint",
    "push_to_hub",
    "logging_dir",
    "local_rank",
}


@dataclass
class ModelArguments:
    """Which network to train or evaluate, and who teaches it."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Trained model to go on from or to evaluate: a Hub id or a path."}
    )
    subfolder: str = field(
        default="",
        metadata={
            "help": "Folder of the model's repository to load it from: 'latent' holds the weights that training goes on "
            "from, where the repository's own are packed."
        },
    )
    config_name: str | None = field(
        default=None, metadata={"help": "Network to train from scratch: a row of configs/, a path or a Hub id."}
    )
    config_overrides: str | None = field(
        default=None,
        metadata={
            "help": "Fields of --config_name's network to change, such as weight_bits=32 for the first of two stages: binary "
            "activations, weights of full precision (ReActNet, Liu et al., ECCV 2020; Martinez et al., ICLR 2020)."
        },
    )
    init_from: str | None = field(
        default=None,
        metadata={
            "help": "Begin with the latent weights of this model, a Hub id or a path, instead of random ones: the first of "
            "two stages. Shapes must be those of --config_name; bits may differ."
        },
    )
    teacher_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Teacher to distil from: a Hub id or a path. Without it labels are learned."}
    )
    drop_path_rate: float | None = field(
        default=None,
        metadata={
            "help": "Stochastic depth: probability of the last layer's branches to be dropped, growing linearly from 0 with "
            "depth (Huang et al., ECCV 2016). Default: the config's."
        },
    )
    ignore_mismatched_sizes: bool = field(
        default=False, metadata={"help": "Begin with a new head where the model's is for other labels."}
    )
    cache_dir: str | None = field(default=None, metadata={"help": "Where downloads are kept."})
    token: str | None = field(default=None, metadata={"help": "Token of the Hub; default: that of the last login."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that a model on the Hub brings along."})
    license: str = field(
        default=DEFAULT_LICENSE, metadata={"help": "Licence of the trained weights, for the model card."}
    )

    def __post_init__(self):
        if self.drop_path_rate is not None and not 0 <= self.drop_path_rate < 1:
            raise ValueError(f"drop_path_rate is a probability below 1, not {self.drop_path_rate}.")


Phase = tuple[ModelArguments, DataArguments, DistillationTrainingArguments]


def parse_phases(arguments: list[str]) -> list[Phase]:
    """
    The runs that a command line asks for: the student's, preceded by the teacher's if the file describes one.

    `arguments` may begin with a JSON or YAML file of arguments; flags after it override it. An object `teacher` in the
    file holds what differs for the teacher; `--teacher.NAME VALUE` overrides that.

    Raises:
        UserError: an unknown or malformed argument, or a file that cannot be read.
    """
    values: dict[str, Any] = {}
    if arguments and arguments[0].lower().endswith((".json", ".yaml", ".yml")):
        values, arguments = read_argument_file(Path(arguments[0])), arguments[1:]
    teacher_values = values.pop("teacher", None)
    flags = group_flags(arguments)
    teacher_flags = [
        (name.removeprefix(TEACHER_PREFIX), rest) for name, rest in flags if name.startswith(TEACHER_PREFIX)
    ]
    flags = [(name, rest) for name, rest in flags if not name.startswith(TEACHER_PREFIX)]
    if teacher_values is None:
        if teacher_flags:
            raise UserError("--teacher.… flags need a file of arguments with a 'teacher' object.")
        return [parse(values, flags)]
    if not isinstance(teacher_values, dict):
        raise UserError("'teacher' in the file of arguments must be an object of arguments.")

    student = parse(values, flags)
    model_arguments, _, training_arguments = student
    if model_arguments.teacher_model_name_or_path:
        return [student]  # another teacher was named, so there is none to train
    shared = {name: value for name, value in values.items() if name not in STUDENT_ONLY}
    shared_flags = [(name, rest) for name, rest in flags if name not in STUDENT_ONLY and name not in teacher_values]
    teacher_dir = f"{training_arguments.output_dir}-teacher"
    teacher = parse({**shared, "output_dir": teacher_dir, **teacher_values}, shared_flags + teacher_flags)
    model_arguments.teacher_model_name_or_path = teacher[2].output_dir
    return [teacher, student]


def read_argument_file(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"There is no file of arguments {str(path)!r}.")
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text) if path.suffix.lower() == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(f"{str(path)!r} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UserError(f"{str(path)!r} must hold an object of arguments.")
    return values


def group_flags(arguments: list[str]) -> list[tuple[str, list[str]]]:
    """`--name value …` as `(name, [value, …])`; `--name=value` likewise."""
    groups: list[tuple[str, list[str]]] = []
    for argument in arguments:
        if argument.startswith("--"):
            name, equals, value = argument[2:].partition("=")
            groups.append((name.replace("-", "_"), [value] if equals else []))
        elif argument == "-h":
            groups.append(("help", []))
        elif groups:
            groups[-1][1].append(argument)
        else:
            raise UserError(
                f"Unknown argument {argument!r}: a file of arguments ends in .json or .yaml, a flag begins with --."
            )
    return groups


def parse(values: dict[str, Any], flags: list[tuple[str, list[str]]]) -> Phase:
    """One run: `values` of a file, overridden by `flags`."""
    # Abbreviations would let a typo pass for another argument.
    parser = HfArgumentParser(
        (ModelArguments, DataArguments, DistillationTrainingArguments), allow_abbrev=False, description=__doc__
    )
    parser.error = raise_user_error
    known = {action.dest for action in parser._actions}
    for name in [*values, *(name for name, _ in flags)]:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            raise UserError(f"Unknown argument {name!r}" + (f"; did you mean {close[0]!r}?" if close else "."))
    parser.set_defaults(**values)
    line = [part for name, rest in flags for part in (f"--{name}", *rest)]
    try:
        return parser.parse_args_into_dataclasses(line)
    except UserError:
        raise
    except (ValueError, TypeError, ImportError) as error:  # the dataclasses check themselves
        raise UserError(" ".join(str(error).split())) from error


def describe(phase: Phase) -> dict:
    """Every argument of a run that is the run's own, as JSON types; secrets are not."""
    model_arguments, data_arguments, training_arguments = phase
    described = {**vars(model_arguments), **vars(data_arguments), **training_arguments.to_dict()}
    described = {key: value for key, value in described.items() if key not in PASSING and not key.startswith("_")}
    return json.loads(json.dumps(described, default=str, sort_keys=True))


def compare_with_recorded(output_dir: Path, phase: Phase) -> None:
    """
    Raises:
        UserError: the output directory holds a run of other arguments.
    """
    recorded = output_dir / RUN_ARGUMENTS
    if not recorded.is_file():
        return
    theirs, ours = json.loads(recorded.read_text()), describe(phase)
    # An argument that was not there yet had no other value than what is now its default.
    defaults = {field.name: field.default for part in phase for field in fields(part) if field.default is not MISSING}
    theirs = {name: default for name, default in defaults.items() if name in ours} | theirs
    different = sorted(key for key in theirs.keys() | ours.keys() if theirs.get(key) != ours.get(key))
    if different:
        raise UserError(
            f"--output_dir {str(output_dir)!r} holds a run of other arguments ({different[0]} was "
            f"{theirs.get(different[0])}, not {ours.get(different[0])}); choose another --output_dir, or remove this one, "
            "or go on from it with --resume_from_checkpoint."
        )


def raise_user_error(message: str):
    raise UserError(message)

"""Command line and configuration files: who says what, and in which order."""

import difflib
import json
import os
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from transformers import HfArgumentParser

from ..argument_checks import check_ranges, convert
from ..data.arguments import DataArguments
from ..errors import UserError, first_sentence
from .techniques import TrainingOptions
from .trainer import DistillationTrainingArguments


RUN_ARGUMENTS = "run_arguments.json"  # of the weights in a run's output directory
UNFINISHED_RUN_ARGUMENTS = "_unfinished_run_arguments.json"  # of a run that goes on from a finished one; not uploaded
RESULTS = ("train_results.json", "eval_results.json", "test_results.json", "all_results.json")
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
# What may differ, too, but is recorded: none of them can change a weight.
NOT_TRAINED = {
    # A finished run is evaluated again with others.
    "do_eval",
    "do_predict",
    # Images are evaluated one by one, whatever the batch.
    "per_device_eval_batch_size",
    "eval_accumulation_steps",
    "eval_use_gather_object",
    # An image's random numbers are its own (`sampling.SampleKey`), whoever loads it.
    "dataloader_num_workers",
    "dataloader_prefetch_factor",
    "dataloader_persistent_workers",
    "dataloader_pin_memory",
    "dataloader_multiprocessing_context",
    # What is told of the run, to whom, and where it is uploaded.
    "logging_strategy",
    "logging_steps",
    "logging_first_step",
    "logging_nan_inf_filter",
    "log_level",
    "log_level_replica",
    "log_on_each_node",
    "disable_tqdm",
    "skip_memory_metrics",
    "report_to",
    "run_name",
    "project",
    "trackio_space_id",
    "trackio_bucket_id",
    "trackio_static_space_id",
    "hub_model_id",
    "hub_strategy",
    "hub_private_repo",
    "hub_always_push",
    "hub_revision",
    # The checkpoints that are kept; the best one always is.
    "save_total_limit",
    # How long processes wait for each other.
    "ddp_timeout",
}
PATHS = {
    "model_name_or_path",
    "config_name",
    "init_from",
    "teacher_model_name_or_path",
    "output_dir",
    "dataset_name",
    "train_dir",
    "validation_dir",
    "class_names",
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
        check_ranges(self)


PARTS = (ModelArguments, DataArguments, DistillationTrainingArguments)
Phase = tuple[ModelArguments, DataArguments, DistillationTrainingArguments]
Flags = list[tuple[str, list[str]]]


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
    own = STUDENT_ONLY | teacher_values.keys()
    shared_flags = [(name, rest) for name, rest in flags if name.removeprefix("no_") not in own and name not in own]
    teacher_dir = f"{training_arguments.output_dir}-teacher"
    try:
        teacher = parse({**shared, "output_dir": teacher_dir, **teacher_values}, shared_flags + teacher_flags)
    except UserError as error:
        raise UserError(f"teacher: {error}") from error
    model_arguments.teacher_model_name_or_path = teacher[2].output_dir
    return [teacher, student]


def read_argument_file(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"There is no file of arguments {str(path)!r}.")
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text, object_pairs_hook=unique) if path.suffix.lower() == ".json" else read_yaml(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{str(path)!r} cannot be read: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise UserError(f"{str(path)!r} cannot be read: its values are nested too deeply.") from error
    if not isinstance(values, dict):
        raise UserError(f"{str(path)!r} must hold an object of arguments.")
    return values


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of a JSON file, of which Python's own reader drops what stands there twice."""
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} stands there twice")
    return values


def read_yaml(text: str) -> Any:
    return yaml.load(text, UniqueKeyLoader)


class UniqueKeyLoader(yaml.SafeLoader):
    def construct_mapping(self, node, deep=False):
        unique([(key.value, None) for key, _ in node.value if isinstance(key.value, str)])
        return super().construct_mapping(node, deep)


def group_flags(arguments: list[str]) -> Flags:
    """`--name value …` as `(name, [value, …])`; `--name=value` likewise."""
    groups: Flags = []
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


def parse(values: dict[str, Any], flags: Flags) -> Phase:
    """One run: `values` of a file, overridden by `flags`."""
    # Abbreviations would let a typo pass for another argument.
    parser = HfArgumentParser(PARTS, allow_abbrev=False, description=__doc__)
    parser.error = raise_user_error
    actions = {option.removeprefix("--"): action for option, action in parser._option_string_actions.items()}
    fields_by_name = {action.dest: action for action in reversed(parser._actions)}
    for names, known in ((values, fields_by_name), ([name for name, _ in flags], actions)):
        for name in names:
            if name not in known:
                close = difflib.get_close_matches(str(name), known, n=1)
                raise UserError(f"Unknown argument {name!r}" + (f"; did you mean {close[0]!r}?" if close else "."))
    parser.set_defaults(**values)
    line = [part for name, rest in flags for part in (f"--{name}", *rest)]
    hints = {name: hint for part in PARTS for name, hint in get_type_hints(part).items()}
    try:
        parsed = vars(parser.parse_args(line))
        for name in {*values, *(actions[name].dest for name, _ in flags)}:
            action = fields_by_name[name]
            parsed[name] = convert(name, parsed[name], hints[name], action.choices, action.const)
        return parser.parse_dict(parsed)
    except UserError:
        raise
    except Exception as error:  # the dataclasses check themselves, and raise what they like
        raise UserError(" ".join(first_sentence(error).split())) from error


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
    unfinished = output_dir / UNFINISHED_RUN_ARGUMENTS
    recorded = unfinished if unfinished.is_file() else output_dir / RUN_ARGUMENTS
    if not recorded.is_file():
        return
    theirs, ours = read_recorded(recorded), describe(phase)
    # An argument that was not there yet had no other value than what is now its default.
    defaults = {field.name: field.default for part in phase for field in fields(part) if field.default is not MISSING}
    theirs = {name: default for name, default in defaults.items() if name in ours} | theirs
    names = sorted((theirs.keys() | ours.keys()) - NOT_TRAINED)
    different = [name for name in names if comparable(name, theirs.get(name)) != comparable(name, ours.get(name))]
    if different:
        raise UserError(
            f"--output_dir {str(output_dir)!r} holds a run of other arguments ({different[0]} was "
            f"{theirs.get(different[0])}, not {ours.get(different[0])}); choose another --output_dir, or remove this one, "
            "or go on from it with --resume_from_checkpoint."
        )


def read_recorded(path: Path) -> dict:
    try:
        recorded = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{str(path)!r} is damaged ({first_sentence(error)}); remove it or its folder.") from error
    if not isinstance(recorded, dict):
        raise UserError(f"{str(path)!r} is damaged: it holds no object; remove it or its folder.")
    return recorded


def comparable(name: str, value: Any) -> Any:
    """`photos`, `photos/` and `./photos` are one folder."""
    return os.path.abspath(value) if name in PATHS and isinstance(value, str) else value


def is_finished(output_dir: Path) -> bool:
    """Whether a run ended in this folder; `train_results.json` is the last that it writes of its training."""
    return (output_dir / RESULTS[0]).is_file() and not (output_dir / UNFINISHED_RUN_ARGUMENTS).is_file()


def record_beginning(output_dir: Path, phase: Phase) -> None:
    """Write the arguments of a run that begins. Those of finished weights that lie there stay with them for now."""
    going_on = any((output_dir / name).is_file() for name in (RESULTS[0], UNFINISHED_RUN_ARGUMENTS))
    name = UNFINISHED_RUN_ARGUMENTS if going_on else RUN_ARGUMENTS
    written = output_dir / f"{name}.writing"
    written.write_text(json.dumps(describe(phase), indent=2) + "\n", encoding="utf-8")
    written.replace(output_dir / name)


def record_end(output_dir: Path) -> None:
    """Before the weights are replaced: what is told of those that lie there goes, and the run's own arguments stay."""
    if not (output_dir / UNFINISHED_RUN_ARGUMENTS).is_file():
        return
    for name in RESULTS:
        (output_dir / name).unlink(missing_ok=True)
    (output_dir / UNFINISHED_RUN_ARGUMENTS).replace(output_dir / RUN_ARGUMENTS)


def raise_user_error(message: str):
    raise UserError(message)

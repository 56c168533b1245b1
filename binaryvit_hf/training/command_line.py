"""Parse the command line and configuration files into the arguments of one run, or of a teacher's and its student's."""

import contextlib
import json
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from transformers import HfArgumentParser

from binaryvit_runtime.errors import UserError, did_you_mean, first_sentence
from binaryvit_runtime.resources import find_config_path
from binaryvit_runtime.sources import did_you_mean_path

from ..argument_checks import convert_argument
from .arguments import UNSUPPORTED, RunArguments
from .help import ARGUMENT_CLASSES, print_help
from .optional_methods import OptionalMethodArguments
from .run_folder import teacher_folder


TEACHER_PREFIX = "teacher."
NO_TEACHER = (["null"], ["none"])  # values of --teacher
# Arguments that the teacher's run does not take over from the student's.
STUDENT_ONLY = {
    *("model_name_or_path", "subfolder", "ignore_mismatched_sizes", "config_name", "config_overrides", "init_from"),
    "teacher_model_name_or_path",
    *("output_dir", "resume_from_checkpoint", "push_to_hub", "hub_model_id", "hub_token"),
    *("label_loss_weight", "distillation_temperature"),
    *(field.name for field in fields(OptionalMethodArguments)),
}
# Two ways to name a network, each with the arguments that only it has. A flag of one replaces the file's other.
NETWORK_ARGUMENTS = (
    ("config_name", "config_overrides", "init_from"),
    ("model_name_or_path", "subfolder", "ignore_mismatched_sizes"),
)
ARGUMENT_FILES = (".json", ".yaml", ".yml")
Flags = list[tuple[str, list[str]]]


def parse_runs(arguments: list[str]) -> list[RunArguments]:
    """
    Parse a command line into one run, or into a teacher's run and its student's.

    Args:
        arguments: may begin with a JSON or YAML file of arguments, such as one of `configs/`, which come with the package;
            flags after it override the file. An object `teacher` in
            the file holds the teacher's own arguments, and `--teacher.NAME VALUE` overrides these. A flag
            `--model_name_or_path` replaces the file's `config_name`. `--teacher null` leaves the teacher out.

    Raises:
        UserError: an unknown or malformed argument, or a file that cannot be read.
        SystemExit: `--help` was given, and the help is printed.
    """
    values: dict[str, Any] = {}
    if arguments and arguments[0].lower().endswith(ARGUMENT_FILES):
        values, arguments = read_argument_file(Path(find_config_path(arguments[0]))), arguments[1:]
    teacher_values = values.pop("teacher", None)
    flags, teacher_flags = [], []
    for name, words in group_flags(arguments):
        if name in ("help", "h"):
            print_help(words)
            raise SystemExit(0)
        if name == "teacher":
            if [word.lower() for word in words] not in NO_TEACHER:
                raise UserError(
                    "--teacher takes null, to learn from the labels without the teacher of the file of arguments; name a "
                    "trained teacher with --teacher_model_name_or_path."
                )
            teacher_values = None
            continue
        of_teacher = name.startswith(TEACHER_PREFIX)
        (teacher_flags if of_teacher else flags).append((name.removeprefix(TEACHER_PREFIX), words))
    if teacher_flags and teacher_values is None:
        raise UserError("--teacher.… flags need a file of arguments with a 'teacher' object, and no --teacher null.")
    if not isinstance(teacher_values, (dict, type(None))):
        raise UserError("'teacher' in the file of arguments must be an object of arguments.")

    student = parse(values, flags)
    if teacher_values is None or student.model.teacher_model_name_or_path:  # a trained teacher, not the file's
        return [student]
    not_shared = STUDENT_ONLY | teacher_values.keys()
    shared_values = {name: value for name, value in values.items() if name not in STUDENT_ONLY}
    shared_flags = [(name, words) for name, words in flags if not {name, name.removeprefix("no_")} & not_shared]
    default_dir = {"output_dir": str(teacher_folder(student.training.output_dir))}
    try:
        teacher = parse(shared_values | default_dir | teacher_values, shared_flags + teacher_flags)
    except UserError as error:
        raise UserError(f"teacher: {error}") from error
    student.model.teacher_model_name_or_path = teacher.training.output_dir
    return [teacher, student]


def own_arguments(run: RunArguments, runs: list[RunArguments]) -> set[str]:
    """The arguments of a teacher's run that are not the student's: `--teacher.NAME` sets them. Empty for the student's run."""
    if run is runs[-1]:
        return set()
    values, of_student = (
        {field.name: getattr(part, field.name) for part in each for field in fields(part)} for each in (run, runs[-1])
    )
    return STUDENT_ONLY | {name for name, value in values.items() if value != of_student[name]}


def with_flags_of(run: RunArguments, runs: list[RunArguments], text: str) -> str:
    """A text about one of a command line's runs: a teacher's has `--teacher.NAME` for arguments of its own."""
    own = own_arguments(run, runs)
    return re.sub(rf"--({'|'.join(own)})(?![a-z_])", rf"--{TEACHER_PREFIX}\1", text) if own else text


@contextlib.contextmanager
def errors_with_flags_of(run: RunArguments, runs: list[RunArguments]) -> Iterator[None]:
    """Raise UserError with the text of `with_flags_of`."""
    try:
        yield
    except UserError as error:
        error.args = (with_flags_of(run, runs, str(error)),)
        raise


def read_argument_file(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"There is no file of arguments {str(path)!r}{did_you_mean_path(path, is_argument_file)}")
    try:
        text = path.read_text(encoding="utf-8-sig")  # Windows writes a byte-order mark
        if path.suffix.lower() == ".json":
            values = json.loads(text, object_pairs_hook=object_without_duplicates)
        else:
            values = yaml.load(text, UniqueKeyLoader)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{str(path)!r} cannot be read: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise UserError(f"{str(path)!r} cannot be read: its values are nested too deeply.") from error
    if not isinstance(values, dict):
        raise UserError(f"{str(path)!r} must hold an object of arguments.")
    return values


def is_argument_file(path: Path) -> bool:
    return path.name.lower().endswith(ARGUMENT_FILES) and path.is_file()


def object_without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a JSON object, and raise ValueError for a repeated name, which Python's reader accepts."""
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is given twice")
    return values


class UniqueKeyLoader(yaml.SafeLoader):
    """Raises ValueError for a repeated name, which PyYAML accepts."""

    def construct_mapping(self, node, deep=False):
        object_without_duplicates([(key.value, None) for key, _ in node.value if isinstance(key.value, str)])
        return super().construct_mapping(node, deep)


def group_flags(arguments: list[str]) -> Flags:
    """Group `--name value …` and `--name=value` into `(name, [value, …])`, in order."""
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


def parse(values: dict[str, Any], flags: Flags) -> RunArguments:
    """Parse one run: the `values` of a file, overridden by `flags`."""
    values = without_replaced_network(values, flags)
    # No abbreviations: a typing error could be the abbreviation of another argument.
    parser = HfArgumentParser(ARGUMENT_CLASSES, allow_abbrev=False)
    parser.error = raise_user_error
    actions = {option.removeprefix("--"): action for option, action in parser._option_string_actions.items()}
    fields_by_name = {action.dest: action for action in reversed(parser._actions)}
    for names, known in ((values, fields_by_name), ([name for name, _ in flags], actions)):
        for name in names:
            if name not in known:
                supported = [known_name for known_name in reversed(fields_by_name) if known_name not in UNSUPPORTED]
                raise UserError(f"Unknown argument {name!r}{did_you_mean(str(name), supported)}")
    hints = {name: hint for part in ARGUMENT_CLASSES for name, hint in get_type_hints(part).items()}
    for name, action in fields_by_name.items():
        if hints.get(name) == (bool | None):  # HfArgumentParser wants a value
            action.nargs, action.const = "?", True
    parser.set_defaults(**values)
    line = [word for name, words in flags for word in (f"--{name}", *words)]
    try:
        parsed = vars(parser.parse_args(line))
        for name in {*values, *(actions[name].dest for name, _ in flags)}:
            action = fields_by_name[name]
            parsed[name] = convert_argument(name, parsed[name], hints[name], action.choices, action.const)
        if parsed["push_to_hub"]:  # no other run needs it
            parsed["hub_token"] = parsed["hub_token"] or parsed["token"]
        return RunArguments(*parser.parse_dict(parsed))
    except UserError:
        raise
    except Exception as error:  # the checks of the dataclasses raise any kind of error
        if "bf16/gpu" in str(error):
            raise UserError(
                "bf16 needs a GPU that supports it: train in float32 (--bf16 false), or in bf16 on the CPU (--use_cpu)."
            ) from error
        raise UserError(" ".join(first_sentence(error).split())) from error


def without_replaced_network(values: dict[str, Any], flags: Flags) -> dict[str, Any]:
    """The file's values without the network that a flag replaces: `--model_name_or_path` the `config_name`, or the reverse."""
    given = {name for name, _ in flags}
    for one, other in (NETWORK_ARGUMENTS, NETWORK_ARGUMENTS[::-1]):
        if one[0] in given and other[0] not in given:
            values = {name: value for name, value in values.items() if name not in other}
    return values


def raise_user_error(message: str):
    raise UserError(message)

"""The table of an ablation: its rows, read from a JSON file and checked before any training."""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from binaryvit_runtime.errors import UserError, did_you_mean
from binaryvit_runtime.sources import did_you_mean_path, list_names

from ..arguments import RunArguments
from ..command_line import TEACHER_PREFIX, parse_runs, read_argument_file
from ..models import load_config
from ..preparation import check_arguments


DEFAULT_TABLE = "table.json"
TEACHER_RECIPE, STUDENT_RECIPE = "teacher.json", "student.json"
FIRST_STAGE = "-first-stage"
NAMES_OF_RESULTS = ("results", "ablation", "ablation_ms")  # of the results and pictures of DEFAULT_TABLE
# Arguments that the ablation gives to every run.
GIVEN_TO_RUNS = {
    *("output_dir", "seed", "config_name", "model_name_or_path", "teacher_model_name_or_path", "init_from", "teacher"),
    *("do_train", "do_eval", "do_predict", "resume_from_checkpoint"),
}
ROW_FIELDS = {
    "name": str,
    "config": str,
    "recipe": str,
    "arguments": dict,
    "first_stage": dict,
    "compared_with": str | None,
    "seeds": int,
}
TABLE_FIELDS = {
    "title": str,
    "description": str,
    "teacher": str,
    "rows": dict,
    "config": str,
    "arguments": dict,
    "compared_with": str,
}
KINDS = {str: "text", dict: "an object", int: "a whole number", str | None: "the key of a row, or null"}


@dataclass(frozen=True)
class Row:
    """
    A row of a table.

    Args:
        key: the row's key in the table. The folders of its runs begin with it.
        name: the row's name in `results.md`.
        config: the folder of its `config.json`, relative to the folder of the table.
        recipe: its file of arguments, in the folder of the table.
        arguments: arguments of the script that override the recipe.
        first_stage: arguments that override these in a run before, whose weights initialise the row's run; `None` for
            training in one stage.
        compared_with: key of the row that it is compared with, or `None`.
        seeds: it is trained with at most this many of the command's seeds; `None` for all.
    """

    key: str
    name: str
    config: str
    recipe: str
    arguments: dict[str, Any] = field(default_factory=dict)
    first_stage: dict[str, Any] | None = None
    compared_with: str | None = None
    seeds: int | None = None


@dataclass(frozen=True)
class Table:
    """
    A table of rows that are trained alike, each by one teacher.

    Args:
        file: the JSON file.
        teacher: the teacher's row. It need not be one of `rows`.
        rows: by key.
    """

    file: Path
    title: str
    description: str
    teacher: Row
    rows: dict[str, Row]

    @property
    def folder(self) -> Path:
        return self.file.parent

    @property
    def trained_rows(self) -> dict[str, Row]:
        """The teacher, then all rows."""
        return {self.teacher.key: self.teacher} | self.rows

    @property
    def has_one_network(self) -> bool:
        """Whether several rows have the same network, so that they differ in training alone."""
        networks = {(row.config, self.arguments_of(row).get("config_overrides")) for row in self.rows.values()}
        return len(self.rows) > 1 and len(networks) == 1

    def arguments_of(self, row: Row) -> dict[str, Any]:
        """The arguments of a row's recipe and its own."""
        return read_argument_file(self.folder / row.recipe) | row.arguments


def read_table(folder: Path, name: str = DEFAULT_TABLE) -> Table:
    """
    Read a table.

    Args:
        folder: holds the table, recipes of run_image_classification.py and a folder with a `config.json` for every network.
        name: of the table's file in this folder.

    Raises:
        UserError: the file is missing, or is not a table.
    """
    file = folder / name
    if not folder.is_dir():
        raise UserError(f"There is no folder {str(folder)!r}{did_you_mean_path(folder, Path.is_dir)}")
    if not file.is_file():
        tables = list_names(beside.name for beside in sorted(folder.glob("*.json")) if is_table(beside))
        found = f"it has {tables}" if tables else "it is not the folder of an ablation"
        raise UserError(f"{str(folder)!r} has no table {name!r}: {found}.")
    if file.stem in NAMES_OF_RESULTS:
        raise UserError(f"Results of {str(file)!r} would replace those of {DEFAULT_TABLE!r}: rename the table.")
    content = read_argument_file(file)
    check_fields(content, TABLE_FIELDS, str(file))
    for required in ("title", "teacher", "rows"):
        if not content.get(required):
            raise UserError(f"{str(file)!r} has no {required!r}: add it.")
    teacher, rows = content["teacher"], {}
    check_key(f"The teacher of {str(file)!r}", teacher)
    for key, row in content["rows"].items():
        above = next(reversed(rows), None)
        rows[key] = read_row(describe_row(file, key), key, row, key == teacher, above, content)
    for row in rows.values():
        check_comparison(describe_row(file, row.key), row, rows)
    other_teacher = Row(teacher, teacher, teacher, TEACHER_RECIPE, seeds=1)
    return Table(file, content["title"], content.get("description", ""), rows.get(teacher, other_teacher), rows)


def is_table(file: Path) -> bool:
    """Whether a file has rows: the folder of an ablation holds recipes too."""
    try:
        return "rows" in read_argument_file(file)
    except UserError:
        return False


def read_row(place: str, key: str, content: str | dict, is_teacher: bool, above: str | None, defaults: dict) -> Row:
    """
    Read a row: its name alone, or an object of `ROW_FIELDS`.

    Args:
        place: of the row, for messages.
        above: key of the row above, if there is one.
        defaults: `config` and `compared_with` of rows that have none, and `arguments` that those of a row override. The
            teacher takes none of them, and no row is compared with itself.
    """
    check_key(place, key)
    content = {"name": content} if isinstance(content, str) else content
    if not isinstance(content, dict):
        raise UserError(f"{place} must be its name, or an object with a 'name'.")
    check_fields(content, ROW_FIELDS, place)
    if not content.get("name"):
        raise UserError(f"{place} has no 'name': add it.")
    if content.get("seeds", 1) < 1:
        raise UserError(f"{place}: 'seeds' is a number of runs, 1 or more, not {content['seeds']}.")
    defaults = {} if is_teacher else defaults
    arguments = defaults.get("arguments", {}) | content.get("arguments", {})
    for name, value in [*arguments.items(), *content.get("first_stage", {}).items()]:
        if name in GIVEN_TO_RUNS or name.startswith(TEACHER_PREFIX):
            raise UserError(f"{place}: the ablation gives {name!r} to every run; remove it.")
        if value is None:
            raise UserError(f"{place}: the argument {name!r} is null; leave it out, or give the row a recipe.")
    other = defaults.get("compared_with", above)
    return Row(
        key,
        content["name"],
        content.get("config", defaults.get("config", key)),
        content.get("recipe", TEACHER_RECIPE if is_teacher else STUDENT_RECIPE),
        arguments,
        content.get("first_stage"),
        content.get("compared_with", None if other == key else other),
        content.get("seeds", 1 if is_teacher else None),
    )


def check_key(place: str, key: str) -> None:
    if not re.fullmatch(r"\w[\w.+-]*", key):
        raise UserError(
            f"{place}: its key names folders, so it may have letters, digits and the characters . _ + - alone."
        )


def check_fields(content: dict, known: dict[str, Any], place: str) -> None:
    """Raise UserError if a field is unknown or has another type than in `known`."""
    for name, value in content.items():
        if name not in known:
            raise UserError(f"{place} may not have the field {name!r}" + did_you_mean(name, known))
        if not isinstance(value, known[name]) or isinstance(value, bool):
            raise UserError(f"{place}: {name!r} must be {KINDS[known[name]]}, not {json.dumps(value)}.")


def check_comparison(place: str, row: Row, rows: dict[str, Row]) -> None:
    other = row.compared_with
    if other == row.key:
        raise UserError(f"{place} is compared with itself: name another row in 'compared_with', or null.")
    if other is not None and other not in rows:
        hint = did_you_mean(other, rows, ": name a row of the table, or null.")
        raise UserError(f"{place} is compared with {other!r}, which is no row of the table{hint}")


def describe_row(file: Path, key: str) -> str:
    return f"Row {key!r} of {str(file)!r}"


def check_run(table: Table, row: Row, line: list[str]) -> None:
    """
    Check the command line of a run as the script does, and that its network can be built.

    Raises:
        UserError: an argument or the network's config is wrong.
    """
    place = describe_row(table.file, row.key)
    if not (table.folder / row.config / "config.json").is_file():
        raise UserError(f"{place}: there is no network {str(table.folder / row.config / 'config.json')!r}.")
    try:
        arguments = parse_student(line)
        check_arguments(arguments)
        training = arguments.training
        if not (training.do_train and training.do_eval and training.do_predict):
            raise UserError(f"{row.recipe} must have do_train, do_eval and do_predict, all true.")
        training.check_network(load_config(arguments.model, do_train=True))
    except UserError as error:
        raise UserError(f"{place}: {error}") from error


def parse_student(line: list[str]) -> RunArguments:
    """The arguments of the run that a command line describes last."""
    return parse_runs(line)[-1]


def to_flags(arguments: dict[str, Any]) -> list[str]:
    """Arguments of a JSON object as words of a command line."""
    words: list[str] = []
    for name, value in arguments.items():
        words.append(f"--{name}")
        words += map(to_word, value) if isinstance(value, list) else [to_word(value)]
    return words


def to_word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)

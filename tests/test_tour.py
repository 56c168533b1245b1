"""docs/tour.ipynb. `.ci/run` executes it; here its commands are parsed."""

import json
import shlex

import pytest
from snippets import ROOT

from binaryvit_cli import create_command_parser
from binaryvit_hf.training.command_line import parse_runs
from binaryvit_hf.training.unused_arguments import find_unused


CELLS = json.loads((ROOT / "docs" / "tour.ipynb").read_text(encoding="utf-8"))["cells"]
CODE = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"]
NAMES = {"recipe": str(ROOT / "configs" / "quickstart.json"), "EPOCHS": "1", "2 * EPOCHS": "2"}
COMMANDS = [
    shlex.split(line[1:].replace("{", "'{").replace("}", "}'"))
    for code in CODE
    for line in code.splitlines()
    if line[:1] == "!"
]


def test_the_notebook_is_stored_without_output():
    of_code = [cell for cell in CELLS if cell["cell_type"] == "code"]
    assert [(cell["outputs"], cell["execution_count"]) for cell in of_code] == [([], None)] * len(of_code)


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: words[1])
def test_the_commands_of_the_notebook_exist(words):
    words = [NAMES[word[1:-1]] if word.startswith("{") else word for word in words]
    if words[0] == "binaryvit":
        assert create_command_parser().parse_args(words[1:]).run
        return
    assert words[:3] == ["python", "-m", "binaryvit_hf.training"]
    teacher, student = parse_runs([*words[3:], "--use_cpu"])
    assert (teacher.training.num_train_epochs, student.training.num_train_epochs) == (2, 1)
    assert find_unused(teacher) == find_unused(student) == []


def test_only_the_installation_is_not_executed():
    left_out = ["".join(cell["source"]) for cell in CELLS if "skip-execution" in cell["metadata"].get("tags", [])]
    assert len(left_out) == 1 and all(line.startswith("%pip install") for line in left_out[0].splitlines())

"""Modules and folders of the package import only from their own floor or a lower one (map: .github/CONTRIBUTING.md)."""

import ast
from pathlib import Path

import pytest

import binaryvit_hf


PACKAGE = Path(binaryvit_hf.__file__).parent
FLOORS = {
    "engine": 1,
    "errors": 1,
    "resources": 1,
    "host_memory": 1,
    "network": 2,
    "argument_checks": 3,
    "convert": 3,
    "doctor": 3,
    "hub": 3,
    "loading": 3,
    "onnx_export": 3,
    "ops": 3,
    "pixels": 3,
    "sources": 3,
    "writing": 3,
    "data": 4,
    "training": 5,
    "benchmarks": 5,
    "cli": 6,
}
FILES = sorted(PACKAGE.rglob("*.py"))


def room_of(file: Path) -> str:
    return file.relative_to(PACKAGE).with_suffix("").parts[0]


def imported_rooms(file: Path) -> set[str]:
    """Rooms of the package that a file imports from, also inside of functions."""
    parts = ("binaryvit_hf", *file.relative_to(PACKAGE).parent.parts)
    modules = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(parts[: len(parts) + 1 - node.level]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            # `from binaryvit_hf import engine` names a room, `from binaryvit_hf.data.schema import x` does not.
            modules |= {f"{module}.{alias.name}" for alias in node.names} if module == "binaryvit_hf" else {module}
    names = [module.split(".") for module in modules]
    return {name[1] for name in names if name[0] == "binaryvit_hf" and len(name) > 1} - {"__version__"}


def test_every_room_has_a_floor():
    assert {room_of(file) for file in FILES} - {"__init__"} == set(FLOORS)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(PACKAGE).as_posix())
def test_imports_point_down(file):
    room = room_of(file)
    if room == "__init__":
        return
    above = {other for other in imported_rooms(file) if other != room and FLOORS[other] > FLOORS[room]}
    assert above == set()


@pytest.mark.parametrize("file", sorted((PACKAGE / "network").glob("*.py")), ids=lambda file: file.name)
def test_a_file_that_travels_imports_only_its_siblings_and_the_engine(file):
    assert imported_rooms(file) <= ({"network", "engine"} if file.name == "engine_binaryvit.py" else {"network"})


def test_training_and_benchmarks_do_not_import_each_other():
    for room, other in (("training", "benchmarks"), ("benchmarks", "training")):
        for file in (PACKAGE / room).rglob("*.py"):
            assert other not in imported_rooms(file), file

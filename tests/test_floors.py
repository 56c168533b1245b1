"""Modules and folders of the package import only from their own floor or a lower one (map: .github/CONTRIBUTING.md)."""

import ast
import sys
from pathlib import Path

import pytest

import binaryvit_hf


PACKAGE = Path(binaryvit_hf.__file__).parent
FLOORS = {
    "runtime": 1,
    "host_memory": 1,
    "engine": 2,
    "row_kernels": 2,
    "network": 3,
    "argument_checks": 4,
    "card_text": 4,
    "compiled_layers": 4,
    "convert": 4,
    "cuda_graphs": 5,
    "loading": 4,
    "onnx_export": 4,
    "ops": 4,
    "pixels": 4,
    "run_history": 4,
    "small_networks": 4,
    "data": 5,
    "inspection": 5,
    "training": 6,
    "benchmarks": 6,
    "comparison": 7,
    "cli": 7,
}
# Folders that are installed as packages of their own, so that they need no PyTorch.
INSTALLED_AS = {"runtime": "binaryvit_runtime", "cli": "binaryvit_cli"}
RUNTIME_LIBRARIES = {"numpy", "PIL", "safetensors", "huggingface_hub"}
FILES = sorted(PACKAGE.rglob("*.py"))


def room_of(file: Path) -> str:
    return file.relative_to(PACKAGE).with_suffix("").parts[0]


def imported_modules(file: Path, at_the_top: bool = False) -> set[str]:
    """Full names of the modules that a file imports from, by default also inside of functions."""
    parts = ("binaryvit_hf", *file.relative_to(PACKAGE).parent.parts)
    tree = ast.parse(file.read_text())
    modules = set()
    for node in tree.body if at_the_top else ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(parts[: len(parts) + 1 - node.level]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            # `from binaryvit_hf import engine` names a room, `from binaryvit_hf.data.schema import x` does not.
            modules |= {f"{module}.{alias.name}" for alias in node.names} if module == "binaryvit_hf" else {module}
    return modules


def imported_rooms(file: Path, at_the_top: bool = False) -> set[str]:
    """Rooms of the package that a file imports from, by default also inside of functions."""
    names = [module.split(".") for module in imported_modules(file, at_the_top)]
    rooms = {name[1] for name in names if name[0] == "binaryvit_hf" and len(name) > 1} - {"__version__"}
    return rooms | {room for room, package in INSTALLED_AS.items() if any(name[0] == package for name in names)}


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
def test_a_file_that_travels_imports_only_its_siblings_and_compiled_code(file):
    of_the_package = {
        "engine_binaryvit.py": {"engine"},
        "functional_binaryvit.py": {"row_kernels"},
        "image_processing_binaryvit.py": {"runtime"},
    }
    assert imported_rooms(file) <= {"network"} | of_the_package.get(file.name, set())


def test_training_and_benchmarks_do_not_import_each_other():
    for room, other in (("training", "benchmarks"), ("benchmarks", "training")):
        for file in (PACKAGE / room).rglob("*.py"):
            assert other not in imported_rooms(file), file


@pytest.mark.parametrize(
    "file", sorted((PACKAGE / "runtime").rglob("*.py")), ids=lambda file: file.relative_to(PACKAGE).as_posix()
)
def test_the_runtime_needs_neither_pytorch_nor_transformers(file):
    own = {"binaryvit_hf"}  # relative imports within the runtime
    libraries = {module.split(".")[0] for module in imported_modules(file)} - set(sys.stdlib_module_names) - own
    assert libraries <= RUNTIME_LIBRARIES
    top = {module.split(".")[0] for module in imported_modules(file, at_the_top=True)}
    assert "huggingface_hub" not in top or file.name == "hub.py"


def test_arguments_are_parsed_without_pytorch_and_transformers():
    for file in sorted((PACKAGE / "cli").glob("*.py")):
        if file.stem not in ("models", "classification"):
            libraries = {module.split(".")[0] for module in imported_modules(file, at_the_top=True)}
            assert not libraries & {"torch", "transformers", "datasets"}, file
            assert imported_rooms(file, at_the_top=True) <= {"runtime", "cli"}, file

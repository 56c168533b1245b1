"""Helpers of several commands that need neither PyTorch nor transformers."""

import argparse
import contextlib
import importlib
import importlib.util
import shlex
from collections.abc import Iterator
from pathlib import Path

from binaryvit_runtime.errors import UserError, first_sentence, one_line
from binaryvit_runtime.progress import write_line
from binaryvit_runtime.resources import installation, shipped_models
from binaryvit_runtime.sources import describe_neighbours, describe_unfinished_run


def add_token_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--token", help="access token of the Hub (default: the token of the last login)")


def example_picture() -> str:
    """The picture that comes with the model binaryvit-digits, as a word of a command line."""
    picture = shipped_models().get("binaryvit-digits", Path()) / "example.png"
    with contextlib.suppress(ValueError, OSError):  # it is elsewhere, or there is no working folder
        picture = picture.relative_to(Path.cwd())
    return shlex.quote(str(picture))


def print_error(message: str) -> None:
    write_line(f"error: {one_line(message)}")


def check_model_folder(folder: Path) -> None:
    """
    Raises:
        UserError: the folder has no config.json, or cannot be read.
    """
    if folder.is_file():
        raise UserError(f"{str(folder)!r} is a file: name its folder, {str(folder.parent)!r}.")
    if not folder.exists():
        raise UserError(f"There is no folder {str(folder)!r}{describe_neighbours(str(folder)) or '.'}")
    try:
        unfinished = describe_unfinished_run(folder)
    except OSError as error:
        raise UserError(f"{str(folder)!r} cannot be read ({error.strerror}).") from error
    if unfinished:
        raise UserError(f"{str(folder)!r} has no model yet: {unfinished}")
    if not (folder / "config.json").is_file():
        raise UserError(f"{str(folder)!r} is not a model folder: it has no config.json.")


@contextlib.contextmanager
def needs_extra(extra: str, subject: str) -> Iterator[None]:
    """
    Imports inside of this context come from an optional dependency group (`extra`) of the package.

    Args:
        subject: plural, begins the error message: "Plots need 'matplotlib': ...".

    Raises:
        UserError: one of the imported packages is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise UserError(f"{subject} need {error.name!r}: {installation(extra)}.") from error


def needs_onnx_libraries(subject: str) -> None:
    """Import what networks in onnxruntime are exported and run with; raises UserError as `needs_extra` does."""
    from binaryvit_hf.benchmarks.inference import ONNX_LIBRARIES

    with needs_extra("benchmark", subject):
        for library in ONNX_LIBRARIES:
            importlib.import_module(library)


def has_pytorch() -> bool:
    """Whether both PyTorch and transformers are installed."""
    return all(importlib.util.find_spec(library) is not None for library in ("torch", "transformers"))


def import_problem() -> str | None:
    """The reason why PyTorch or transformers, which are installed, cannot be imported, or `None`."""
    try:
        for library in ("binaryvit_hf", "torch", "transformers"):  # the first one prepares the imports of the others
            importlib.import_module(library)
    except (
        Exception
    ) as error:  # ImportError of another version, OSError of a missing libcudart, and what else is broken
        return first_sentence(error)
    return None


def prepare_libraries(program: str) -> None:
    """
    Args:
        program: the command, for messages.

    Raises:
        UserError: PyTorch is not installed or cannot be imported, or BINARYVIT_ENGINE names kernels that this machine does not have.
    """
    if not has_pytorch():
        raise UserError(f"{program} needs PyTorch: {installation()}.")
    if problem := import_problem():
        raise UserError(
            f"{program} needs PyTorch, which cannot be used: {problem.rstrip('.')}. `binaryvit doctor` lists versions."
        )
    from transformers.utils.logging import disable_progress_bar

    from binaryvit_runtime.hub import prepare_hub_client
    from binaryvit_runtime.packed_model import check_engine_variable

    disable_progress_bar()
    prepare_hub_client()
    check_engine_variable()

"""Finds models by name: what is wrong with a name, as far as this machine knows, and what is wrong with a download."""

import difflib
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from .errors import LoadingError, NoModelError, UnsupportedModelError, UserError, first_sentence
from .resources import find_source, shipped_models


CHECKPOINT_PREFIX = "checkpoint-"
RUN_ARGUMENTS = "run_arguments.json"  # in the output directory of a run, from its start
NAMED_FOLDERS = 5


def fetch(load: Callable, name: str, shipped: Iterable[str] = (), cache_dir: str | None = None, subfolder: str = ""):
    """
    Return `load(source)`. If it fails, damaged files in the Hub's local cache are downloaded again, once.

    Args:
        load: takes a folder or an id of the Hub.
        name: a folder, the name of a shipped model, or an id of the Hub.
        shipped: more names to suggest for a misspelt one.
        cache_dir, subfolder: of the model.

    Raises:
        NoModelError: `name` is of no model, as far as this machine knows. The Hub was not asked.
        UnsupportedModelError: `load` raised it.
        LoadingError: `load` raised anything else.
    """
    source = find_source(name)
    if fault := describe_fault(source, subfolder, {*shipped_models(), *shipped}):
        raise NoModelError(fault)
    try:
        return load(source)
    except UnsupportedModelError:
        raise
    except Exception as error:
        if not (damaged := damaged_files(source, cache_dir)):
            raise LoadingError(explain_loading(error, source, cache_dir)) from error
    for blob in damaged:
        blob.unlink()
    try:
        return load(source)
    except UnsupportedModelError:
        raise
    except Exception as error:
        raise LoadingError(
            f"{str(damaged[0])!r} was damaged and could not be downloaded again: "
            f"{explain_loading(error, source, cache_dir)}"
        ) from error


def damaged_files(source: str, cache_dir: str | None) -> list[Path]:
    """Damaged files of a repository in the local cache that can be downloaded again."""
    try:
        from huggingface_hub import is_offline_mode

        from .hub import damaged_blobs
    except ModuleNotFoundError:  # then nothing was downloaded
        return []
    return [] if is_offline_mode() else damaged_blobs(source, cache_dir)


def explain_loading(error: Exception, source: str, cache_dir: str | None) -> str:
    sentence = str(error) if isinstance(error, UserError) else first_sentence(error)
    try:
        from .hub import cache_folder, explain_hub_error
    except ModuleNotFoundError:
        return sentence
    if cause := explain_hub_error(error):
        return f"{cause}{describe_neighbours(source) or ''}"
    cached = cache_folder(source, cache_dir)
    return sentence if cached is None else f"{sentence.rstrip('.')} (in {str(cached)!r})"


def describe_fault(source: str, subfolder: str = "", shipped: Iterable[str] = ()) -> str | None:
    """
    Why `source` names no model, and what to do; `None` if it is a folder or may be an id of the Hub.

    Args:
        subfolder: of the model in `source`.
        shipped: names of models that come with the package, to suggest one.
    """
    if os.path.exists(source):
        return describe_unfinished_run(Path(source, subfolder))
    # The Hub's names without an owner are older than its image classifiers.
    if "/" in source and is_repository_id(source):
        return None
    if close := difflib.get_close_matches(source, shipped, n=1):
        return f"there is no model of this name; did you mean {close[0]!r}?"
    reason = "there is no such folder"
    if not any(sign in source for sign in "/\\.~"):
        reason += f", and it is neither an id of the Hub (OWNER/NAME) nor one of {', '.join(sorted(shipped))}"
    return f"{reason}{describe_neighbours(source) or '.'}"


def describe_unfinished_run(folder: Path) -> str | None:
    """Why the output directory of a run has no model yet, and what to do; `None` for other folders."""
    if not folder.is_dir() or (folder / "config.json").is_file():
        return None
    checkpoints = {
        int(number): path
        for path in folder.glob(f"{CHECKPOINT_PREFIX}*")
        if (number := path.name.removeprefix(CHECKPOINT_PREFIX)).isdecimal()
        and (path / "config.json").is_file()
        and any(path.glob("model*.safetensors"))
    }
    if not checkpoints and not (folder / RUN_ARGUMENTS).is_file():
        return None
    resume = "its training is not finished: run the same training command again to resume it"
    if not checkpoints:
        return f"{resume}."
    return f"{resume}, or use its last checkpoint, {str(checkpoints[max(checkpoints)])!r}."


def describe_neighbours(source: str) -> str | None:
    """
    The end of a sentence about a missing folder: the model beside it whose name is closest, or all models beside it.
    `None` if there are none.
    """
    missing = Path(source)
    try:
        names = sorted(path.name for path in missing.parent.iterdir() if holds_model(path))
    except OSError:  # no such parent
        return None
    if close := difflib.get_close_matches(missing.name, names, n=1):
        return f"; did you mean {str(missing.parent / close[0])!r}?"
    if not names or missing.parent == Path():
        return None
    more = ", …" if len(names) > NAMED_FOLDERS else ""
    return f"; {str(missing.parent)!r} has {', '.join(map(repr, names[:NAMED_FOLDERS]))}{more}."


def holds_model(folder: Path) -> bool:
    """Whether a folder has a model, or will have one at the end of its training."""
    return (folder / "config.json").is_file() or describe_unfinished_run(folder) is not None


def is_repository_id(name: str) -> bool:
    try:
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id
    except ModuleNotFoundError:  # the loader says what to install
        return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not name.startswith(".")
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True

"""Finds models by name: what is wrong with a name, as far as this machine knows, and what is wrong with a download."""

import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from .errors import (
    LoadingError,
    NoModelError,
    UnsupportedModelError,
    UserError,
    close_names,
    first_sentence,
    suggest,
)
from .resources import find_source, shipped_configs, shipped_models


CHECKPOINT_PREFIX = "checkpoint-"
RUN_ARGUMENTS = "run_arguments.json"  # in the output directory of a run, from its start
OUTPUTS = "outputs"  # the folder of the recipes' output directories
NAMED_FOLDERS = 5


def fetch(
    load: Callable,
    name: str,
    shipped: Iterable[str] = (),
    cache_dir: str | None = None,
    subfolder: str = "",
    of_config: bool = False,
):
    """
    Return `load(source)`. If it fails, damaged files in the Hub's local cache are downloaded again, once.

    Args:
        load: takes a folder or an id of the Hub.
        name: a folder, the name of a shipped model, or an id of the Hub.
        shipped: more names to suggest for a misspelt one.
        cache_dir, subfolder: of the model.
        of_config: whether `load` takes the JSON file of a config, too.

    Raises:
        NoModelError: `name` is of no model, or the Hub does not give it. The Hub is asked only for ids.
        UnsupportedModelError: `load` raised it.
        LoadingError: `load` raised anything else.
    """
    source, known = find_source(name), sorted({*shipped_models(), *shipped})
    if fault := describe_fault(source, subfolder, known, of_config):
        raise NoModelError(fault)
    try:
        return load(source)
    except UnsupportedModelError:
        raise
    except Exception as error:
        if not (damaged := damaged_files(source, cache_dir)):
            raise explain_loading(error, source, known, cache_dir) from error
    try:
        for blob in damaged:
            blob.unlink(missing_ok=True)  # another process may have done it
    except OSError as error:
        raise LoadingError(
            f"{str(blob)!r} is damaged and cannot be replaced ({error.strerror}): delete it, or use another cache."
        ) from error
    try:
        return load(source)
    except UnsupportedModelError:
        raise
    except Exception as error:
        raise LoadingError(
            f"{str(damaged[0])!r} was damaged and could not be downloaded again: "
            f"{explain_loading(error, source, known, cache_dir)}"
        ) from error


def damaged_files(source: str, cache_dir: str | None) -> list[Path]:
    """Damaged files of a repository in the local cache that can be downloaded again."""
    try:
        from huggingface_hub import is_offline_mode

        from .hub import damaged_blobs
    except ImportError:  # without huggingface_hub, or with an old one, nothing was downloaded
        return []
    return [] if is_offline_mode() else damaged_blobs(source, cache_dir)


def explain_loading(error: Exception, source: str, shipped: Iterable[str], cache_dir: str | None) -> LoadingError:
    """The error to raise: what the Hub says about a name, after the models here that it may mean, or what is damaged."""
    sentence = str(error) if isinstance(error, UserError) else first_sentence(error)
    try:
        from .hub import cache_folder, cached_models, explain_hub_error, is_offline, is_offline_mode, list_causes
    except ImportError:
        return LoadingError(sentence)
    if cause := explain_hub_error(error):
        # The cache may have the model itself, in another revision.
        shipped = [*shipped, *(model for model in cached_models(cache_dir) if model != source)]
        if close := close_models(source, shipped):
            return NoModelError(f"did you mean {close}? {cause[0].upper()}{cause[1:]}.")
        no_folder = "" if os.path.exists(source) else "there is no such folder, and "
        if not is_offline(error):
            return NoModelError(f"{no_folder}{cause}{describe_neighbours(source) or '.'}")
        here = describe_folder(source) or f"this machine has {list_names([*neighbours(source), *shipped])}"
        return NoModelError(f"{here}; {cause}." if is_offline_mode() else f"{no_folder}{cause}; {here}.")
    cached = cache_folder(source, cache_dir)
    if cached is None:
        return LoadingError(sentence)
    sentence = f"{sentence.rstrip('.')} (in {str(cached)!r})"
    if is_offline_mode() and any(isinstance(cause, FileNotFoundError) for cause in list_causes(error)):
        return NoModelError(
            f"{sentence}. If its download is not complete, load it once online: you are offline, because HF_HUB_OFFLINE is "
            "set."
        )
    return LoadingError(sentence)


def describe_fault(
    source: str, subfolder: str = "", shipped: Iterable[str] = (), of_config: bool = False
) -> str | None:
    """
    Why `source` names no model, and what to do; `None` if it is a folder or may be an id of the Hub.

    Args:
        subfolder: of the model in `source`.
        shipped: names of models that come with the package, to suggest one.
        of_config: whether it may also be the JSON file of a config.
    """
    if os.path.isfile(source) and not (of_config and source.endswith(".json")):
        return f"it is a file: name its folder, {str(Path(source).parent)!r}."
    if os.path.exists(source):
        try:
            if not Path(source, subfolder).exists():
                return f"it has no folder {subfolder!r}."
            return describe_unfinished_run(Path(source, subfolder))
        except OSError as error:
            return f"it cannot be read ({error.strerror})."
    # The Hub's names without an owner are older than its image classifiers.
    if "/" in source and is_repository_id(source):
        return None
    if source in shipped_configs():
        return f"it is a network of configs/ without trained weights: train one with `--config_name {source}`."
    if close := close_models(source, shipped):
        return f"there is no model of this name; did you mean {close}?"
    reason = "there is no such folder"
    if not any(sign in source for sign in "/\\.~"):
        reason += f", and it is neither an id of the Hub (OWNER/NAME) nor one of {', '.join(sorted(shipped))}"
    return f"{reason}{describe_neighbours(source) or '.'}"


def checkpoint_step(folder: Path) -> int | None:
    """The step in the name of a folder `checkpoint-STEP`; `None` for other names."""
    number = folder.name.removeprefix(CHECKPOINT_PREFIX)
    return int(number) if number != folder.name and number.isdecimal() else None


def describe_unfinished_run(folder: Path) -> str | None:
    """Why the output directory of a run has no model yet, and what to do; `None` for other folders."""
    if not folder.is_dir() or (folder / "config.json").is_file():
        return None
    checkpoints = {
        step: path
        for path in folder.glob(f"{CHECKPOINT_PREFIX}*")
        if (step := checkpoint_step(path)) is not None
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
    if close := close_models(source):
        return f"; did you mean {close}?"
    return f"; {here}." if (here := describe_folder(source)) else None


def describe_folder(source: str) -> str | None:
    """The models beside a missing folder; `None` if there are none, or in the working folder."""
    parent = Path(source).parent
    beside = [Path(folder).name for folder in neighbours(source) if Path(folder).parent == parent]
    return f"{str(parent)!r} has {list_names(beside)}" if beside and parent != Path() else None


def close_models(source: str, known: Iterable[str] = ()) -> str | None:
    """The known names, or the folders beside a missing one, that `source` may mean: `'a' or 'b'`; `None` if there are none."""
    # By their names: the common path of two folders is no likeness.
    folders = {Path(folder).name: folder for folder in reversed(neighbours(source))}
    parent = Path(source).parent
    beside = [*reversed(folders), *(known if parent == Path() or not parent.is_dir() else ())]
    close = close_names(source, known) or close_names(Path(source).name, beside)
    return " or ".join(repr(folders.get(name, name)) for name in close) or None


def neighbours(source: str) -> list[str]:
    """
    The models in the parent of a missing folder, or else in the working folder, and in the folder of output directories
    there.
    """
    parent = Path(source).parent
    parent = parent if parent.is_dir() or parent.is_absolute() else Path()
    found: list[str] = []
    for folder in (parent, parent / OUTPUTS):
        try:
            found += sorted(str(path) for path in folder.iterdir() if holds_model(path))
        except OSError:  # no such folder, or it may not be read
            continue
    return found


def close_paths(path: str | Path, matches: Callable[[Path], bool] = Path.exists) -> list[str]:
    """What a missing file or folder may mean: the one of the closest name beside it, if it `matches`."""
    missing = Path(path)
    try:
        names = sorted(beside.name for beside in missing.parent.iterdir() if matches(beside))
    except (OSError, ValueError):  # no such parent, or no path at all
        return []
    return [str(missing.parent / name) for name in close_names(missing.name, names)]


def did_you_mean_path(
    path: str | Path, matches: Callable[[Path], bool] = Path.exists, known: Iterable[str] = (), otherwise: str = "."
) -> str:
    """The end of a sentence about a missing file or folder, as `did_you_mean`. `known` are other names."""
    return suggest(close_paths(path, matches) or close_names(str(path), known), otherwise)


def list_names(names: Iterable[str]) -> str:
    """The first names in quotes: `'a', 'b', …`."""
    names = list(names)
    return f"{', '.join(map(repr, names[:NAMED_FOLDERS]))}{', …' if len(names) > NAMED_FOLDERS else ''}"


def holds_model(folder: Path) -> bool:
    """Whether a folder has a model, or will have one at the end of its training."""
    return (folder / "config.json").is_file() or describe_unfinished_run(folder) is not None


def is_repository_id(name: str) -> bool:
    try:
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id
    except ImportError:  # the loader says what to install
        return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not name.startswith(".")
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True

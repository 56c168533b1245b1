"""What is wrong with the name of a model, as far as this machine knows. Imports neither PyTorch nor transformers."""

import difflib
import os
from collections.abc import Iterable
from pathlib import Path


CHECKPOINT_PREFIX = "checkpoint-"
RUN_ARGUMENTS = "run_arguments.json"  # in the output directory of a run, from its start
NAMED_FOLDERS = 5


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
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True

"""Finds the last whole checkpoint of a run, and writes a new one to the disk."""

import json
import logging
import math
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import CONFIG_NAME

from binaryvit_runtime.errors import first_sentence
from binaryvit_runtime.sources import checkpoint_step


STATE_TYPES: dict[str, Any] = {
    "epoch": (int, float),
    "global_step": int,
    "max_steps": int,
    "total_flos": (int, float),
    "log_history": list,
    "best_metric": (int, float, type(None)),
    "best_model_checkpoint": (str, type(None)),
    "stateful_callbacks": dict,
}

logger = logging.getLogger(__name__)


def last_whole_checkpoint(folder: Path, more_files: Mapping[str, str] = MappingProxyType({})) -> Path | None:
    """
    Find the newest whole checkpoint of a run, and log newer ones that training cannot resume from.

    Args:
        more_files: names of additional files that a checkpoint of this run must hold, and the argument of each.
    """
    for path in newest_first(folder):
        damage = describe_damage(path, more_files)
        if damage is None:
            return path
        if holds_weights_only(path) or lacking_argument(path, more_files):
            logger.warning("%s %s: training cannot resume from it.", path, damage)
        else:
            logger.warning("%s is damaged (%s): training resumes from an earlier one.", path, damage)
    return None


def holds_whole_checkpoint(folder: Path) -> bool:
    """Whether training can resume from a checkpoint in the output directory of a run."""
    return any(describe_damage(path) is None for path in newest_first(folder))


def newest_first(folder: Path) -> list[Path]:
    """The checkpoints of a run, whole or not."""
    numbered = {
        step: path for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if (step := checkpoint_step(path)) is not None
    }
    return [path for _, path in sorted(numbered.items(), reverse=True)]


def describe_damage(checkpoint: Path, more_files: Mapping[str, str] = MappingProxyType({})) -> str | None:
    """Why training cannot resume from a checkpoint, such as the first missing or unreadable file; `None` if it can."""
    if holds_weights_only(checkpoint):
        return "holds weights only (--save_only_model)"
    if argument := lacking_argument(checkpoint, more_files):
        return f"was saved without --{argument}"
    weights = [file.name for file in sorted(checkpoint.glob("model*.safetensors"))] or ["model.safetensors"]
    for name in (CONFIG_NAME, TRAINER_STATE_NAME, OPTIMIZER_NAME, SCHEDULER_NAME, *weights):
        if not (checkpoint / name).is_file():
            return f"{name} is missing"
    for file in sorted(checkpoint.iterdir()):
        try:
            if file.suffix == ".json":
                content = json.loads(file.read_text(encoding="utf-8"))
                if file.name == TRAINER_STATE_NAME:
                    check_state(content, checkpoint)
            elif file.suffix == ".safetensors":
                with safe_open(file, framework="pt"):  # opening compares the length with the header
                    pass
            elif file.suffix in (".pt", ".pth"):
                with zipfile.ZipFile(file) as archive:
                    if archive.testzip() is not None:
                        return f"{file.name} is broken"
        except (OSError, ValueError, RecursionError, SafetensorError, zipfile.BadZipFile) as error:
            return f"{file.name}: {first_sentence(error)}"
    return None


def check_state(state: Any, checkpoint: Path) -> None:
    """Raise ValueError if a field of `trainer_state.json` is missing, has a wrong type, or is of another checkpoint."""
    for name, types in STATE_TYPES.items():
        value = state.get(name, ()) if isinstance(state, dict) else ()
        if not isinstance(value, types) or (isinstance(value, float) and not math.isfinite(value)):
            raise ValueError(f"{name} is missing or has a wrong type")
    if checkpoint.name != f"{PREFIX_CHECKPOINT_DIR}-{state['global_step']}":
        raise ValueError(f"global_step is {state['global_step']}")


def lacking_argument(checkpoint: Path, more_files: Mapping[str, str]) -> str | None:
    """The first argument that the run of a checkpoint did not have: a checkpoint is written whole, so no file is lost."""
    return next((name for file, name in more_files.items() if not (checkpoint / file).is_file()), None)


def holds_weights_only(checkpoint: Path) -> bool:
    """Whether a checkpoint was saved with `--save_only_model`: without optimiser, schedule and random states."""
    saved = [(checkpoint / name).is_file() for name in (TRAINER_STATE_NAME, OPTIMIZER_NAME, SCHEDULER_NAME)]
    return saved == [True, False, False] and not any(checkpoint.glob("rng_state*.pth"))


def flush_to_disk(folder: Path) -> None:
    """Write a folder's files to the disk now. Otherwise a power failure can lose their content after a rename of the folder."""
    for path in [*folder.iterdir(), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

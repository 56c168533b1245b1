"""Checkpoints that are whole: written aside, looked at before they are gone on from, saved when a run is told to end."""

import json
import logging
import math
import os
import signal
import zipfile
from abc import abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import CONFIG_NAME

from ..errors import UserError, first_sentence
from ..network.functional_binaryvit import is_distributed


STATE_KINDS: dict[str, Any] = {
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


def last_whole_checkpoint(folder: Path, more_files: Iterable[str] = ()) -> Path | None:
    """
    The newest checkpoint of a run that is whole, with `more_files` beside those of every checkpoint; of damaged ones that
    are newer the log tells.
    """
    numbered = {
        int(number): path
        for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if (number := path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")).isdigit()
    }
    for _, path in sorted(numbered.items(), reverse=True):
        damage = describe_damage(path, more_files)
        if damage is None:
            return path
        if is_model_alone(path):
            logger.warning("%s %s, so training cannot go on from it.", path, damage)
        else:
            logger.warning("%s is damaged (%s), so the one before it is gone on from.", path, damage)
    return None


def describe_damage(checkpoint: Path, more_files: Iterable[str] = ()) -> str | None:
    """Why training cannot go on from a checkpoint: what it lacks or cannot be read of it; `None` where it is whole."""
    if is_model_alone(checkpoint):
        return "holds the weights alone (--save_only_model)"
    weights = sorted(checkpoint.glob("model*.safetensors"))
    names = (CONFIG_NAME, TRAINER_STATE_NAME, OPTIMIZER_NAME, SCHEDULER_NAME, *more_files)
    needed = [checkpoint / name for name in names]
    for file in [*needed, *(weights or [checkpoint / "model.safetensors"])]:
        if not file.is_file():
            return f"{file.name} is missing"
    for file in sorted(checkpoint.iterdir()):
        try:
            if file.suffix == ".json":
                content = json.loads(file.read_text(encoding="utf-8"))
                if file.name == TRAINER_STATE_NAME:
                    check_state(content, checkpoint)
            elif file.suffix == ".safetensors":
                with safe_open(file, framework="pt"):  # compares the length with the header
                    pass
            elif file.suffix in (".pt", ".pth"):
                with zipfile.ZipFile(file) as archive:
                    broken = archive.testzip()
                if broken is not None:
                    return f"{file.name} is broken"
        except (OSError, ValueError, RecursionError, SafetensorError, zipfile.BadZipFile) as error:
            return f"{file.name}: {first_sentence(error)}"
    return None


def check_state(state: Any, checkpoint: Path) -> None:
    """
    Raises:
        ValueError: it is not what the Trainer writes into this checkpoint.
    """
    for name, kinds in STATE_KINDS.items():
        value = state.get(name, ()) if isinstance(state, dict) else ()
        if not isinstance(value, kinds) or (isinstance(value, float) and not math.isfinite(value)):
            raise ValueError(f"{name} is missing or of another kind")
    if checkpoint.name != f"{PREFIX_CHECKPOINT_DIR}-{state['global_step']}":
        raise ValueError(f"global_step is {state['global_step']}")


def is_model_alone(checkpoint: Path) -> bool:
    """Whether a checkpoint was saved without all that training alone needs."""
    saved = [(checkpoint / name).is_file() for name in (TRAINER_STATE_NAME, OPTIMIZER_NAME, SCHEDULER_NAME)]
    return saved == [True, False, False] and not any(checkpoint.glob("rng_state*.pth"))


def flush(folder: Path) -> None:
    """Until what was written is on the disk, a rename may reach it before."""
    for path in [*folder.iterdir(), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


class CheckpointedCallback(TrainerCallback):
    """A callback with tensors of its own, which lie in a file of their own, `file`, in every checkpoint."""

    file: str
    checkpoint: Path | None = None  # that training goes on from

    @abstractmethod
    def begin(self, model) -> None:
        """Make the tensors for a training that begins with this model."""

    @abstractmethod
    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors by name; what is written into them is the callback's."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.begin(model)
        if self.checkpoint is not None:
            self.load(self.checkpoint)

    def save(self, folder: Path) -> None:
        save_file({name: tensor.contiguous() for name, tensor in self.tensors().items()}, folder / self.file)

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """
        Raises:
            UserError: the folder has no such file, or one of other tensors.
        """
        file, tensors = folder / self.file, self.tensors()
        saved = load_file(file) if file.is_file() else {}
        if {name: tensor.shape for name, tensor in saved.items()} != {name: t.shape for name, t in tensors.items()}:
            raise UserError(
                f"{str(file)!r} is missing or of another run, so this run cannot go on from its checkpoint."
            )
        for name, tensor in tensors.items():
            tensor.copy_(saved[name])


class SaveOnTermination(TrainerCallback):
    """On SIGTERM finish the step, save a checkpoint and end the training; `terminated` tells of it."""

    def __init__(self):
        self.requested = self.terminated = False
        self.handler_before = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.requested = self.terminated = False
        try:
            self.handler_before = signal.signal(signal.SIGTERM, self.request)
        except ValueError:  # not in the main thread, where alone Python takes signals
            self.handler_before = None

    def request(self, number, frame):
        self.requested = True

    def on_step_end(self, args, state, control, **kwargs):
        if self.requested_of_any(args.device):
            self.terminated = control.should_save = control.should_training_stop = True
            control.should_evaluate = False  # who sends a SIGTERM waits for seconds, not for an evaluation

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.terminated:
            control.should_evaluate = control.should_save = False  # it is saved

    def requested_of_any(self, device: torch.device) -> bool:
        """The processes get the signal at different steps, but must end at the same."""
        if not is_distributed():
            return self.requested
        requested = torch.tensor(int(self.requested), device=device)
        dist.all_reduce(requested, op=dist.ReduceOp.MAX)
        return bool(requested)

    def on_train_end(self, args, state, control, **kwargs):
        self.restore()

    def restore(self) -> None:
        if self.handler_before is not None:
            signal.signal(signal.SIGTERM, self.handler_before)
            self.handler_before = None

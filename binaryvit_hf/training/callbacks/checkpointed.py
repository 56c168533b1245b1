"""The base class of callbacks whose tensors belong in every checkpoint."""

from abc import abstractmethod
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from binaryvit_runtime.errors import UserError


class CheckpointedCallback(TrainerCallback):
    """A callback that saves its tensors in every checkpoint, in a file of its own."""

    file: str  # its name in the checkpoint
    checkpoint: Path | None = None  # folder that training resumes from

    @abstractmethod
    def begin(self, model) -> None:
        """Create the tensors when training of `model` begins."""

    @abstractmethod
    def tensors(self) -> dict[str, torch.Tensor]:
        """The callback's own tensors by name; `load` writes into them."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.begin(model)
        if self.checkpoint is not None:
            self.load(self.checkpoint)

    def save(self, folder: Path) -> None:
        save_file({name: tensor.contiguous() for name, tensor in self.tensors().items()}, folder / self.file)

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Raise UserError if the file is missing, or its tensors have other names or shapes."""
        file, tensors = folder / self.file, self.tensors()
        saved = load_file(file) if file.is_file() else {}
        if {name: tensor.shape for name, tensor in saved.items()} != {name: t.shape for name, t in tensors.items()}:
            raise UserError(f"{str(file)!r} is missing or of another run: training cannot resume from its checkpoint.")
        for name, tensor in tensors.items():
            tensor.copy_(saved[name])

"""Whether the training steps of a run are CUDA graphs, and which recording a step uses."""

import logging
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from binaryvit_runtime.errors import UserError, counted, first_sentence

from ..cuda_graphs import RecordedLoss


# Attributes of modules that a recording takes as constants, and that callbacks change: a frozen normalisation, a dropout rate.
CONSTANTS = ("training", "p", "drop_prob", "momentum", "sign_slope")
FEW_STEPS, MOST_CHANGES = 10, 5  # recordings that serve few steps, one after the other, take longer than they save

logger = logging.getLogger(__name__)


class StepGraph:
    """
    Computes the loss of full training batches by a CUDA graph.

    There is a recording for each kind of labels: mixing may leave some batches as they are. Recordings hold for one shape of
    images and while the network and the settings of the loss stay as they are; when one of them changes, new ones are made,
    unless that happens at nearly every step. A network with hooks, which a graph would not call, runs without.

    Args:
        model: the network, without wrappers.
        compute: takes the model with its wrappers, images and labels, and returns the loss, a scalar, and something else. See
            `RecordedLoss` for what it must not do.
        wanted: True, False, or "auto": if recording does not fail. Batches that are too large for it run without.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        compute: Callable[[nn.Module, torch.Tensor, torch.Tensor], tuple[torch.Tensor, Any]],
        wanted: bool | str,
    ):
        self.model, self.compute, self.wanted = model, compute, wanted
        self.recordings: dict[tuple, RecordedLoss | None] = {}  # by the kind of labels; `None`: too large
        self.key: tuple | None = None  # of what the recordings hold for
        self.steps = self.changes = 0  # since the last change; changes after few steps, one after the other
        self.told_of_hooks = False

    def forget(self) -> None:
        """Free the memory of the recordings."""
        self.recordings, self.key = {}, None

    def loss(
        self, model: nn.Module, images: torch.Tensor, labels: torch.Tensor, settings: Hashable = None
    ) -> torch.Tensor:
        """
        The loss of a full batch.

        Args:
            model: the network with its wrappers.
            images: `(batch, channels, height, width)`.
            labels: class indices `(batch,)`, or soft labels `(batch, labels)`.
            settings: all else that the loss depends on.

        Raises:
            UserError: recording failed, and `wanted` is True. With "auto", steps run without a graph from then on.
            torch.OutOfMemoryError: the batch is too large for a recording, and `wanted` is True.
        """
        recorded = self.recording(model, images, labels, settings) if self.wanted else None
        return recorded(images, labels) if recorded else self.compute(model, images, labels)[0]

    def recording(
        self, model: nn.Module, images: torch.Tensor, labels: torch.Tensor, settings: Hashable
    ) -> RecordedLoss | None:
        """The recording for a batch, a new one if necessary; `None` if there can be none."""
        constants = recorded_constants(self.model)
        key = None if constants is None else (model, settings, images.shape, images.dtype, constants)
        if key is None or key != self.key:
            self.changes = self.changes + 1 if self.key and self.steps < FEW_STEPS else 0
            self.forget()
            self.key, self.steps = key, 0
        self.steps += 1
        if self.changes == MOST_CHANGES:
            logger.warning(
                "Training steps run without CUDA graphs: the network, the loss or the shape of batches changes too often."
            )
            self.wanted = False
            return None
        if key is None:
            if not self.told_of_hooks:
                logger.warning(
                    "Training steps run without CUDA graphs while the network has hooks: a graph calls none."
                )
            self.told_of_hooks = True
            return None
        kind = labels.shape, labels.dtype
        if kind not in self.recordings:
            recorded = self.record(model, images, labels)
            if recorded is None:  # the others' random numbers may not go on after a failure
                self.recordings = {}
            self.recordings[kind] = recorded
        return self.recordings[kind]

    def record(self, model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> RecordedLoss | None:
        try:
            return RecordedLoss(self.model, lambda *batch: self.compute(model, *batch)[0], images, labels)
        except torch.OutOfMemoryError:
            if self.wanted != "auto":
                raise  # --auto_find_batch_size tries a smaller batch
            logger.info(
                "Training steps run without CUDA graphs: the memory does not hold another batch of %s beside the recorded one.",
                counted(len(images), "image"),
            )
            return None
        except Exception as error:  # CUDA fails with any kind of error
            if self.wanted != "auto":
                raise UserError(f"--cuda_graphs: recording failed: {first_sentence(error)}") from error
            self.wanted = False
            logger.info("Training steps run without CUDA graphs: recording failed: %s", first_sentence(error))
            return None


def recorded_constants(model: nn.Module) -> list | None:
    """
    What a recording of a network takes as constants: addresses of tensors, and some numbers. `None` if a module or a weight has
    hooks.
    """
    # Not model.modules(), which takes several times as long as the rest.
    modules, found, constants = [model], {model}, []
    for module in modules:
        own = vars(module)
        if own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]:
            return None
        constants += map(own.get, CONSTANTS)
        for weight in own["_parameters"].values():
            if weight is not None:
                if weight._backward_hooks:
                    return None
                constants += (weight.data_ptr(), weight.requires_grad)
        constants += (buffer.data_ptr() for buffer in own["_buffers"].values() if buffer is not None)
        children = [child for child in own["_modules"].values() if child is not None and child not in found]
        found.update(children)
        modules += children
    return constants

"""Whether the training steps of a run are CUDA graphs, and which recording a step uses."""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from binaryvit_runtime.errors import UserError, first_sentence

from ..compiled_layers import CompiledLayers
from ..cuda_graphs import RecordedLoss


logger = logging.getLogger(__name__)


class StepGraph:
    """
    Computes the loss of full training batches by a CUDA graph.

    A recording holds for one shape of batches, for the layers as they were compiled or not, and while every weight keeps its
    memory; when one of them changes, a new one is made.

    Args:
        model: the network, without wrappers.
        compute: takes the model with its wrappers, images and labels, and returns the loss, a scalar, and something else. See
            `RecordedLoss` for what it must not do.
        wanted: True, False, or "auto": if recording does not fail.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        compute: Callable[[nn.Module, torch.Tensor, torch.Tensor], tuple[torch.Tensor, Any]],
        wanted: bool | str,
    ):
        self.model, self.compute, self.wanted = model, compute, wanted
        self.recorded: RecordedLoss | None = None
        self.key: tuple | None = None  # of what the recording holds for

    def forget(self) -> None:
        """Free the memory of the recording."""
        self.recorded = self.key = None

    def loss(
        self, model: nn.Module, images: torch.Tensor, labels: torch.Tensor, layers: CompiledLayers | None
    ) -> torch.Tensor:
        """
        The loss of a full batch.

        Args:
            model: the network with its wrappers.
            images: `(batch, channels, height, width)`.
            labels: class indices `(batch,)`, or soft labels `(batch, labels)`.
            layers: those that run compiled now.

        Raises:
            UserError: recording failed, and `wanted` is True. With "auto", steps run without a graph from then on.
        """
        if self.wanted:
            addresses = tuple(weight.data_ptr() for weight in self.model.parameters() if weight.requires_grad)
            key = (model, layers, images.shape, images.dtype, labels.shape, labels.dtype, addresses)
            if key != self.key:
                self.forget()
                self.recorded, self.key = self.record(model, images, labels), key
        return self.recorded(images, labels) if self.recorded else self.compute(model, images, labels)[0]

    def record(self, model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> RecordedLoss | None:
        try:
            return RecordedLoss(self.model, lambda *batch: self.compute(model, *batch)[0], images, labels)
        except torch.OutOfMemoryError:  # --auto_find_batch_size tries a smaller batch
            raise
        except Exception as error:  # CUDA fails with any kind of error
            if self.wanted != "auto":
                raise UserError(f"--cuda_graphs: recording failed: {first_sentence(error)}") from error
            self.wanted = False
            logger.info("Training steps run without CUDA graphs: recording failed: %s", first_sentence(error))
            return None

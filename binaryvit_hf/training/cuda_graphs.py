"""Forward and backward passes of full training batches as one CUDA graph: one launch for a GPU instead of thousands."""

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from binaryvit_runtime.errors import UserError, first_sentence

from ..compiled_layers import CompiledLayers, fork_random
from ..network.modeling_binaryvit import frozen_statistics


WARM_UPS = 3  # passes before the recording, as PyTorch advises: libraries allocate at the first ones

logger = logging.getLogger(__name__)


class StepGraph:
    """
    Computes the loss of a training batch and its gradients by a recorded CUDA graph.

    A graph repeats the recorded kernels on the same memory. It holds for one shape of batches, for the layers as they were
    compiled or not, and while every weight keeps its memory; when one of them changes, it is recorded again.

    Args:
        model: the network, without wrappers.
        compute: takes model, images and labels, and returns the loss, a scalar, and something else. It depends on nothing
            that changes but tensors on the device, and waits for none of them.
        wanted: True, False, or "auto": if the device has graphs, and recording does not fail.
        device: of the training.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        compute: Callable[[nn.Module, torch.Tensor, torch.Tensor], tuple[torch.Tensor, Any]],
        wanted: bool | str,
        device: torch.device,
    ):
        self.model, self.compute, self.device = model, compute, device
        self.wanted = wanted if device.type == "cuda" else False
        self.recording: Recording | None = None
        self.key: tuple | None = None  # of what the recording holds for

    def forget(self) -> None:
        """Free the memory of the recording."""
        self.recording = self.key = None

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
        if not self.wanted:
            return self.compute(model, images, labels)[0]
        weights = [weight for weight in self.model.parameters() if weight.requires_grad]
        addresses = tuple(weight.data_ptr() for weight in weights)
        key = (model, layers, images.shape, images.dtype, labels.shape, labels.dtype, addresses)
        if key != self.key:
            self.forget()
            self.record(model, images, labels, weights)
            if self.recording is None:
                return self.compute(model, images, labels)[0]
            self.key = key
        return Replay.apply(self.recording, images, labels, *weights)

    def record(
        self, model: nn.Module, images: torch.Tensor, labels: torch.Tensor, weights: list[nn.Parameter]
    ) -> None:
        try:
            with fork_random(self.device), frozen_statistics(self.model), without_cast_weights():
                self.recording = Recording(functools.partial(self.compute, model), images, labels, weights)
        except torch.OutOfMemoryError:  # --auto_find_batch_size tries a smaller batch
            raise
        except Exception as error:  # CUDA fails with any kind of error
            if self.wanted != "auto":
                raise UserError(f"--cuda_graphs: recording failed: {first_sentence(error)}") from error
            self.wanted = False
            logger.info("Training steps run without CUDA graphs: recording failed: %s", first_sentence(error))


class Recording:
    """
    A recorded step: the loss and the gradients of a batch, in memory that the next step overwrites.

    Args:
        compute: takes images and labels, and returns the loss and something else.
        images, labels: of a batch like all later ones.
        weights: those that need gradients.
    """

    def __init__(self, compute: Callable, images: torch.Tensor, labels: torch.Tensor, weights: list[nn.Parameter]):
        self.compute, self.weights = compute, weights
        self.images, self.labels = images.clone(), labels.clone()
        self.steps = 0
        self.loss: torch.Tensor
        self.gradients: tuple[torch.Tensor | None, ...]
        self.replay = record(self.step)

    def step(self) -> None:
        with torch.enable_grad():
            loss, _ = self.compute(self.images, self.labels)
        self.loss, self.gradients = loss.detach(), torch.autograd.grad(loss, self.weights, allow_unused=True)

    def run(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The loss of a batch, a copy."""
        self.images.copy_(images)
        self.labels.copy_(labels)
        self.steps += 1
        self.replay()
        return self.loss.clone()


@contextlib.contextmanager
def without_cast_weights() -> Iterator[None]:
    """Let autocast keep no weight in half precision: a graph would go on with one from before its recording."""
    before = torch.is_autocast_cache_enabled()
    torch.clear_autocast_cache()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


def record(step: Callable[[], None]) -> Callable[[], None]:
    """Record the kernels of a step, and return the function that runs them again."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # Threads that load images go on while this one records.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        step()
    return graph.replay


class Replay(Function):
    """
    The loss of a batch by a recording, which computes the gradients with it.

    Forward: recording, images, labels and the recording's weights to the loss.
    Gradient: to the weights, before the recording runs again.
    """

    @staticmethod
    def forward(ctx, recording, images, labels, *weights):
        loss = recording.run(images, labels)
        ctx.recording, ctx.step = recording, recording.steps
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        recording = ctx.recording
        if ctx.step != recording.steps:
            raise RuntimeError("The graph has run again: its gradients are those of a later batch.")
        known = [gradient for gradient in recording.gradients if gradient is not None]
        scaled = iter(torch._foreach_mul(known, grad_output))
        return None, None, None, *(None if gradient is None else next(scaled) for gradient in recording.gradients)

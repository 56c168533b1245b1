"""The forward and backward passes of a network as one CUDA graph: one launch for a GPU instead of thousands."""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from .compiled_layers import fork_random
from .network.modeling_binaryvit import frozen_statistics


WARM_UPS = 3  # passes before the recording, as PyTorch advises: libraries allocate at the first ones


class RecordedLoss:
    """
    The loss of a batch, and its gradients to the weights, by a recorded CUDA graph.

    A graph repeats the recorded kernels on the same memory: for batches of the same shape, and while every weight keeps its
    memory. Recording changes no weight, gradient, statistic or random number.

    Args:
        model: the network.
        compute: takes images and labels, and returns the loss, a scalar. It depends on nothing that changes but tensors on the
            device, and waits for none of them.
        images, labels: of a batch like all later ones, on a GPU.

    Raises:
        RuntimeError: the loss cannot be recorded.
        torch.OutOfMemoryError: the memory does not hold the activations of a batch beside the recorded ones.
    """

    def __init__(self, model: nn.Module, compute: Callable, images: torch.Tensor, labels: torch.Tensor):
        self.compute = compute
        self.weights = [weight for weight in model.parameters() if weight.requires_grad]
        self.images, self.labels = images.clone(), labels.clone()
        self.runs = 0
        # Of the last batch, in memory that the next run overwrites.
        self.value: torch.Tensor
        self.gradients: tuple[torch.Tensor | None, ...]
        with fork_random(images.device), frozen_statistics(model):
            self.replay = record(self.pass_once)
            # A smaller last batch is computed beside the recording: better too little memory now than after an epoch.
            self.differentiate(images, labels)

    def __call__(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The loss of a batch. Its backward pass must come before the next call."""
        return Replay.apply(self, images, labels, *self.weights)

    def pass_once(self) -> None:
        self.value, self.gradients = self.differentiate(self.images, self.labels)

    def differentiate(self, images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, tuple]:
        """The loss and its gradients, without the recording."""
        with torch.enable_grad(), without_cast_weights():
            loss = self.compute(images, labels)
        return loss.detach(), torch.autograd.grad(loss, self.weights, allow_unused=True)

    def run(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        self.images.copy_(images)
        self.labels.copy_(labels)
        self.runs += 1
        self.replay()
        return self.value.clone()


class Replay(Function):
    """
    Forward: a `RecordedLoss`, images, labels and its weights to the loss, a scalar. The gradients are computed with it.
    Gradient: to the weights.
    """

    @staticmethod
    def forward(ctx, recorded, images, labels, *weights):
        loss = recorded.run(images, labels)
        ctx.recorded, ctx.run = recorded, recorded.runs
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        recorded = ctx.recorded
        if ctx.run != recorded.runs:
            raise RuntimeError(
                "The graph has run again, so its gradients are those of a later batch: train without --cuda_graphs."
            )
        # New tensors: the optimiser's gradients must outlive the next run.
        scaled = iter(torch._foreach_mul([grad for grad in recorded.gradients if grad is not None], grad_output))
        return None, None, None, *(None if grad is None else next(scaled) for grad in recorded.gradients)


@contextlib.contextmanager
def without_cast_weights() -> Iterator[None]:
    """Let autocast share no weight in half precision with other passes: a graph would go on with one from before its recording."""
    torch.clear_autocast_cache()
    try:
        yield
    finally:
        torch.clear_autocast_cache()


def record(function: Callable[[], None]) -> Callable[[], None]:
    """
    Record the kernels that a function launches, and return the function that launches them again.

    Raises:
        Exception: the error of the function, or that of the recording if the function has none.
    """
    launching, warming = torch.cuda.current_stream(), torch.cuda.Stream()
    warming.wait_stream(launching)
    with torch.cuda.stream(warming):
        for _ in range(WARM_UPS):
            function()
    launching.wait_stream(warming)
    graph = torch.cuda.CUDAGraph()
    first: list[Exception] = []  # not a variable: that would keep the tensors of the failed pass
    try:
        # Threads that load images go on while this one records.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            try:
                function()
            except Exception as error:
                first.append(error)
                raise
    except Exception as error:
        restore_after_failed_recording(launching)
        raise (first.pop() if first else error) from None
    return graph.replay


def restore_after_failed_recording(launching: torch.cuda.Stream) -> None:
    """
    Go on with the stream and the random generator of before. PyTorch leaves its own stream current, and older versions
    leave a generator that refuses every further number ("Offset increment outside graph capture").
    """
    torch.cuda.set_stream(launching)
    generator = torch.cuda.default_generators[launching.device.index]
    generator.graphsafe_set_state(generator.clone_state())

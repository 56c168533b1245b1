"""
Compiled layers of a network: torch.compile sees one layer at a time, and layers of equal shapes share their code.

They run compiled in full training batches only. A smaller last batch, evaluation and re-estimation run eagerly: as compiled
code they would need other shapes or modes, and every one of those would compile the whole network again.
"""

import contextlib
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from huggingface_hub.constants import HF_HOME
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from .network.modeling_binaryvit import frozen_statistics


CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
ROUNDING = 1e-6  # gradients below this share of the largest one may be rounding errors of zeros
FILLED_STD = 0.1
TRIES = 10  # to find gradients in compiled layers that drop some
MAX_VERSIONS = 64  # of one layer class; PyTorch's limit of 8 is below the kinds of layers that a pyramid can have


class CompiledLayers:
    """
    The layers of a network, compiled in place. They run compiled inside `active()` and eagerly everywhere else.

    Modules keep their classes and names, so copies, checkpoints and packing are those of an eager network. Compilation
    happens at the first call of each kind of layer; `warm_up` makes these calls.

    Args:
        model: the network, without wrappers.
        backend: of torch.compile.
        mode: of torch.compile.
    """

    def __init__(self, model: PreTrainedModel, backend: str = "inductor", mode: str | None = None):
        # The random numbers of eager steps: dropout is the same in a compiled step.
        options = {"fallback_random": True} if backend == "inductor" and mode is None else None
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it warns of CPUs without CUDA
        self.model = model
        self.calls: dict[nn.Module, Callable] = {
            module: of_contiguous(
                torch.compile(module._call_impl, backend=backend, mode=mode, options=options, dynamic=False)
            )
            for module in regions(model)
        }

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Run the layers compiled in this context, backward passes included."""
        for module, call in self.calls.items():
            module._compiled_call_impl = call  # as nn.Module.compile does; copies of the module do not keep it
        try:
            with torch._dynamo.config.patch(recompile_limit=MAX_VERSIONS):
                yield
        finally:
            for module in self.calls:
                module._compiled_call_impl = None

    def warm_up(self, images: torch.Tensor) -> float:
        """
        Compile all layers with a forward and a backward pass. No weight, gradient, statistic or random number changes.

        Args:
            images: `(batch, channels, height, width)`, of the shape, dtype and device of all later batches.

        Returns:
            The seconds it took.
        """
        start = time.perf_counter()
        with self.active():
            self.gradients(images)
        return time.perf_counter() - start

    def check(self, images: torch.Tensor) -> None:
        """
        Compare the gradients of compiled and eager layers: a compiler that loses some trains a useless network without a word.

        Raises:
            RuntimeError: a weight gets a gradient from the eager layers alone.
        """
        with nonzero_weights(self.model, images.device):
            self.compare_gradients(images)

    def compare_gradients(self, images: torch.Tensor) -> None:
        eager = self.gradients(images)
        largest = max((gradient.abs().max() for gradient in eager.values()), default=0)
        lost = [name for name, gradient in eager.items() if gradient.abs().max() > ROUNDING * largest]
        with self.active(), fork_random(images.device), frozen_statistics(self.model):
            # Several tries: in other modes than the default, compiled stochastic depth drops other layers than eager one.
            for _ in range(TRIES):
                compiled = self.draw_gradients(images)
                lost = [name for name in lost if not compiled[name].any()]
                if not lost:
                    return
        raise RuntimeError(
            f"the compiler of PyTorch {torch.__version__} loses the gradients of {len(lost)} of {len(eager)} weights, such as {lost[0]}"
        )

    def gradients(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """The gradient of some loss to each weight, by its name. No random number or statistic changes."""
        with fork_random(images.device), frozen_statistics(self.model):
            return self.draw_gradients(images)

    def draw_gradients(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        weights = {name: weight for name, weight in self.model.named_parameters() if weight.requires_grad}
        loss = self.model(pixel_values=images).logits.float().square().mean()
        # Not backward(): it would add to the weights' gradients.
        gradients = torch.autograd.grad(loss, list(weights.values()), allow_unused=True, materialize_grads=True)
        return dict(zip(weights, gradients))


@contextlib.contextmanager
def nonzero_weights(model: nn.Module, device: torch.device) -> Iterator[None]:
    """
    Fill weights of zeros with random numbers in this context. A new classifier, or the scale of a residual branch, is often zero,
    and no gradient gets through it. No random number of the run changes.
    """
    zeros = {weight: weight.detach().clone() for weight in model.parameters() if not weight.any()}
    with torch.no_grad(), fork_random(device):
        for weight in zeros:
            weight.normal_(std=FILLED_STD)
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, value in zeros.items():
                weight.copy_(value)


def fork_random(device: torch.device) -> contextlib.AbstractContextManager:
    """Restore the random generators of the CPU and of the device at the end of the context."""
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


def of_contiguous(call: Callable) -> Callable:
    """The call with contiguous tensors: for other strides the same layer would be compiled again."""

    def call_contiguous(*args, **kwargs):
        return call(*(arg.contiguous() if isinstance(arg, torch.Tensor) else arg for arg in args), **kwargs)

    return call_contiguous


def regions(model: PreTrainedModel) -> list[nn.Module]:
    """
    The modules to compile: those that the model class lists as blocks (`_no_split_modules`), the smaller ones of nested
    blocks.

    Under gradient checkpointing the parts of a layer, because a layer's checkpoint runs eagerly around them.
    """
    blocks = set(getattr(model, "_no_split_modules", None) or ())
    listed = [module for module in model.modules() if type(module).__name__ in blocks]
    found = [module for module in listed if not any(other in listed for other in list(module.modules())[1:])]
    parts: list[nn.Module] = []
    for module in found:
        is_checkpointed = isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing
        parts += module.children() if is_checkpointed else [module]
    return parts


def count_kinds(modules: list[nn.Module]) -> int:
    """Number of kinds of modules (`kind_of`), each of which is compiled once."""
    return len({kind_of(module) for module in modules})


def kind_of(module: nn.Module) -> tuple[type, tuple[torch.Size, ...], tuple[float, ...]]:
    """Class, shapes of the parameters and rates of stochastic depth. Modules that agree in them share compiled code."""
    rates = tuple(part.drop_prob for part in module.modules() if hasattr(part, "drop_prob"))
    return type(module), tuple(weight.shape for weight in module.parameters()), rates


def missing_compiler(device: torch.device) -> str | None:
    """The name of the compiler that torch.compile lacks on this machine for a device; `None` if it lacks none."""
    if device.type == "cpu":
        default = {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
        compiler = os.environ.get("CXX", default)
        return None if shutil.which(compiler) else f"a C++ compiler ({compiler})"
    from torch.utils._triton import has_triton

    return None if has_triton() else "Triton"


def keep_compiled_code() -> None:
    """
    Let torch.compile keep its code between runs, in the cache of Hugging Face (`HF_HOME`). PyTorch's own default is a
    folder for temporary files. The environment variable TORCHINDUCTOR_CACHE_DIR names another folder.
    """
    folder = Path(HF_HOME) / "binaryvit" / "compiled"
    with contextlib.suppress(OSError):  # a home that is read-only: PyTorch's default remains
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            os.environ.setdefault(CACHE_VARIABLE, str(folder))

"""
Compiled training steps, by regions: torch.compile sees one layer at a time, and layers of equal shapes share their code.

Only full training batches run compiled. A smaller last batch, evaluation and re-estimation run eagerly: as compiled code
they would need other shapes or modes, and every one of those would compile the whole network again.
"""

import contextlib
import json
import logging
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from huggingface_hub.constants import HF_HOME
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from binaryvit_runtime.errors import UserError, counted, first_sentence

from ..network.functional_binaryvit import is_distributed
from ..network.modeling_binaryvit import frozen_statistics
from ..network.packing_binaryvit import binary_layers
from .callbacks.progress import format_time


CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
SAVED_SHARE = 0.4  # of the time of a training step of a 1-bit network
# To compile a kind of layer for the first time, for each of its parameters: 0.35 on two cores, 0.3 on an H200.
SECONDS_PER_PARAMETER = 0.35
MARGIN = 1.5  # of the saving over the cost: both are estimates
TIMED_STEPS = 3
STATE = "compilation.json"  # in a checkpoint: whether its steps were compiled
MAX_VERSIONS = 64  # of one layer class; PyTorch's limit of 8 is below the kinds of layers that a pyramid can have

logger = logging.getLogger(__name__)


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
        weights = [weight for weight in self.model.parameters() if weight.requires_grad]
        generators = torch.random.fork_rng([images.device] if images.device.type == "cuda" else [])
        with generators, frozen_statistics(self.model), self.active():
            loss = self.model(pixel_values=images).logits.float().square().mean()
            # Not backward(): it would add to the weights' gradients.
            torch.autograd.grad(loss, weights, allow_unused=True)
        return time.perf_counter() - start


class StepCompiler:
    """
    Runs the training steps of one run compiled or eagerly.

    Args:
        model: the network, without wrappers.
        wanted: True, False, or "auto", which times a few eager steps and compiles if that saves more time than it takes.
        device: of the training.
        backend, mode: of torch.compile.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        wanted: bool | str,
        device: torch.device,
        backend: str = "inductor",
        mode: str | None = None,
    ):
        self.model, self.argument, self.wanted, self.device = model, wanted, wanted, device
        self.backend, self.mode = backend, mode
        self.layers: CompiledLayers | None = None
        self.eager_seconds = 0.0  # of a step, once it is known
        self.seconds: list[float] = []  # of the last steps of the present kind

    def begin(self, checkpoint: Path | None) -> None:
        """Begin a training. One that resumes goes on as its checkpoint's did, so that its weights are bit-identical."""
        self.wanted, self.layers, self.seconds, self.eager_seconds = self.argument, None, [], 0.0
        file = checkpoint / STATE if checkpoint else None
        if self.wanted == "auto" and file is not None and file.is_file():
            self.wanted = json.loads(file.read_text(encoding="utf-8"))["compiled"] is True

    def save(self, folder: Path) -> None:
        """Write whether steps are compiled to a checkpoint, unless that is still open."""
        if self.wanted != "auto":
            (folder / STATE).write_text(json.dumps({"compiled": self.wanted}), encoding="utf-8")

    def reason_against(self) -> str | None:
        """Why "auto" does not compile, whatever the length of the run."""
        if not any(layer.weight_bits == 1 for layer in binary_layers(self.model).values()):
            return "compiling saves little time for a network without 1-bit layers"
        if self.backend == "inductor" and (missing := missing_compiler(self.device)):
            return f"this machine has no {missing.removeprefix('a ')}"
        return None

    def stay_eager(self, reason: str) -> None:
        self.wanted, self.layers = False, None
        logger.info("Training steps are not compiled: %s.", reason.rstrip("."))

    @contextlib.contextmanager
    def step(self, images: torch.Tensor, is_full: bool, steps_left: int) -> Iterator[None]:
        """
        The context of one forward and backward pass.

        Args:
            images: of the batch, on the device of the training.
            is_full: whether the batch has as many images as most batches.
            steps_left: passes still to make, this one included.
        """
        if not is_full:
            yield
            return
        is_open = self.wanted == "auto" and self.layers is None and not self.seconds
        if is_open and (reason := self.reason_against()):
            self.stay_eager(reason)
        if self.layers is None and self.wanted is True:
            self.compile(images)
        times = self.wanted == "auto"
        start = self.now() if times else 0.0
        with self.layers.active() if self.layers else contextlib.nullcontext():
            yield
        if times:
            self.seconds.append(self.now() - start)
            if len(self.seconds) > TIMED_STEPS:  # the first one also fills caches and is not counted
                self.decide(images, statistics.median(self.seconds[1:]), steps_left - 1)

    def now(self) -> float:
        if self.device.type != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter()

    def decide(self, images: torch.Tensor, seconds: float, steps_left: int) -> None:
        """Decide, from the time of a step, whether to compile, or, once compiled, whether to go on so."""
        self.seconds = []
        if self.layers is not None:
            left = format_time(seconds * steps_left)
            if agreed(seconds < self.eager_seconds, self.device):
                self.wanted = True
                speeds = 1000 * seconds, 1000 * self.eager_seconds
                logger.info("A compiled step takes %.0f ms, an eager one %.0f ms; about %s left.", *speeds, left)
            else:
                self.stay_eager("a compiled step is not faster than an eager one")
            return
        cost = compilation_seconds(regions(self.model))
        saved = SAVED_SHARE * seconds * steps_left
        if agreed(saved > MARGIN * cost, self.device):
            self.eager_seconds = seconds
            self.compile(images)
        else:
            times = [format_time(value) for value in (cost, saved, seconds * steps_left)]
            self.stay_eager("it takes about {} and would save about {}; about {} left".format(*times))

    def compile(self, images: torch.Tensor) -> None:
        """
        Compile the layers for batches like `images`.

        Raises:
            UserError: compilation failed, and `wanted` is True. With "auto", training stays eager.
        """
        layers = CompiledLayers(self.model, self.backend, self.mode)
        modules = list(layers.calls)
        logger.info(
            "Compiling %s of layers: about %s, and less if this machine has compiled them before.",
            counted(count_kinds(modules), "kind"),
            format_time(compilation_seconds(modules)),
        )
        keep_compiled_code()
        if self.device.type == "cpu":  # PyTorch warns that it finds no CUDA
            logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
        try:
            seconds = layers.warm_up(images)
        except torch.OutOfMemoryError:  # --auto_find_batch_size tries a smaller batch
            raise
        except Exception as error:  # a compiler fails with any kind of error
            if self.wanted == "auto":
                self.stay_eager(f"compilation failed: {first_sentence(error)}")
                return
            raise UserError(f"--torch_compile: compilation failed: {first_sentence(error)}") from error
        logger.info("Compiled in %s.", format_time(seconds))
        self.layers = layers


def agreed(choice: bool, device: torch.device) -> bool:
    """The choice of the first process, in all processes: their times differ."""
    if not is_distributed():
        return choice
    shared = torch.tensor(int(choice), device=device)
    dist.broadcast(shared, 0)
    return bool(shared)


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


def compilation_seconds(modules: list[nn.Module]) -> float:
    """About how long the first compilation of modules takes."""
    return SECONDS_PER_PARAMETER * sum(len(shapes) for _, shapes, _ in {kind_of(module) for module in modules})


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

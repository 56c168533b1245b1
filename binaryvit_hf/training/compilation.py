"""Whether the training steps of a run are compiled, and when."""

import contextlib
import json
import logging
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel

from binaryvit_runtime.errors import UserError, counted, first_sentence
from binaryvit_runtime.progress import format_time

from ..compiled_layers import CompiledLayers, count_kinds, keep_compiled_code, kind_of, missing_compiler, regions
from ..network.functional_binaryvit import approx_sign_slope, is_distributed, row_kernels_obstacle
from ..network.packing_binaryvit import binary_layers


SAVED_SHARE = 0.4  # of the time of a training step of a 1-bit network
# To compile a kind of layer for the first time, for each of its parameters: 0.35 on two cores, 0.3 on an H200.
SECONDS_PER_PARAMETER = 0.35
MARGIN = 1.5  # of the saving over the cost: both are estimates
TIMED_STEPS = 3
STATE = "compilation.json"  # in a checkpoint: whether its steps were compiled

logger = logging.getLogger(__name__)


class StepCompiler:
    """
    Runs the training steps of one run compiled or eagerly.

    Args:
        model: the network, without wrappers.
        wanted: True, False, or "auto", which times a few eager steps and compiles if that saves more time than it takes.
        device: of the training.
        backend, mode: of torch.compile.
        is_float32: whether the training computes in float32, without autocast.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        wanted: bool | str,
        device: torch.device,
        backend: str = "inductor",
        mode: str | None = None,
        is_float32: bool = True,
    ):
        self.is_float32 = is_float32
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
        if self.runs_on_row_kernels():
            return "the row kernels of this package are as fast without a compilation"
        if self.backend == "inductor" and (missing := missing_compiler(self.device)):
            return f"this machine has no {missing.removeprefix('a ')}"
        return None

    def runs_on_row_kernels(self) -> bool:
        """Whether row kernels compute all layers of the network in training."""
        layers = binary_layers(self.model).values()
        return (
            self.device.type == "cpu"
            and self.is_float32
            and all((layer.weight_bits, layer.input_bits) == (1, 1) for layer in layers)
            and all(layer.sign_slope is approx_sign_slope for layer in layers)
            and row_kernels_obstacle() is None
        )

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
        try:
            seconds = layers.warm_up(images)
            layers.check(images)
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


def compilation_seconds(modules: list[nn.Module]) -> float:
    """About how long the first compilation of modules takes."""
    return SECONDS_PER_PARAMETER * sum(len(shapes) for _, shapes, _ in {kind_of(module) for module in modules})

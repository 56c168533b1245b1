"""Which models, and which calls of them, the compiled engine computes; PyTorch computes the rest."""

import operator
import os
import weakref
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import is_in_torch_dispatch_mode
from torch.utils.hooks import RemovableHandle
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import logging, output_capturing

from .packing_binaryvit import PackedLinear


try:  # code that came with a checkpoint uses the package where it is installed
    from binaryvit_hf import engine
except ImportError:
    engine = None

VARIABLE = "BINARYVIT_ENGINE"  # of the environment: forces kernels, or PyTorch
TORCH = "torch"
VERSION = operator.attrgetter("_version")  # of a tensor: how often it was changed in place

logger = logging.get_logger(__name__)


class EngineChoice(NamedTuple):
    """What computes a model: `avx512`, `avx2`, `neon` or `scalar` kernels of the engine, or `torch`; and why."""

    name: str
    reason: str

    def __str__(self):
        return f"{self.name} ({self.reason})"


class Folded:
    """An engine made of a backbone's tensors as they were; PyTorch counts what changes them in place."""

    def __init__(self, model: torch.nn.Module, kernels: str, wanted: str | None):
        tensors = model.state_dict(keep_vars=True)
        used = {name: tensor for name, tensor in tensors.items() if tensor.dtype in (torch.float32, torch.uint8)}
        self.wanted = wanted
        self.parameters = list(model.parameters())
        self.hooks = [
            hooks for module in model.modules() for hooks in (module._forward_hooks, module._forward_pre_hooks)
        ]
        self.counted = one_for_each_count([tensor.detach() for tensor in used.values() if not tensor.is_inference()])
        self.changes = self.count_changes()
        self.engine = engine.Engine(model.config, used, kernels)
        self.watched, self.last_hook = True, None

    def count_changes(self) -> int:
        return sum(map(VERSION, self.counted))

    def is_watched(self) -> bool:
        """Whether somebody's hook waits for a module to be called; transformers' own wait for nothing here."""
        # Thousands of modules, which are looked at again only if any hook came since, or one is there that may have gone.
        last_hook = RemovableHandle.next_id
        if self.watched or self.last_hook != last_hook:
            self.watched = any(self.hooks) and any(
                getattr(hook, "__module__", None) != output_capturing.__name__
                for hooks in self.hooks
                for hook in hooks.values()
            )
            self.last_hook = last_hook
        return self.watched


def one_for_each_count(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Tensors whose changes are all there are: of those that are counted together with the first (`count_together`), that one."""
    before = list(map(VERSION, tensors))
    if tensors:
        torch.autograd.graph.increment_version(tensors[0])
    return tensors[:1] + [tensor for tensor, count in zip(tensors[1:], before[1:]) if tensor._version == count]


def count_together(model: torch.nn.Module) -> None:
    """
    Make PyTorch count in-place changes of all tensors of a model together, so that one look tells whether there were any:
    thousands of counters lie all over the memory, and reading them takes as long as a tenth of a forward.
    """
    counter = torch.zeros(())
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None or tensor.device.type != "cpu" or tensor.is_inference():
                    continue
                alias = counter.detach()  # shares its count, and has it still when it has other data
                alias.data = tensor.data
                is_parameter = isinstance(tensor, torch.nn.Parameter)
                tensors[name] = torch.nn.Parameter(alias, tensor.requires_grad) if is_parameter else alias


FOLDED: weakref.WeakKeyDictionary[torch.nn.Module, Folded] = weakref.WeakKeyDictionary()


def choose_engine(model: torch.nn.Module) -> EngineChoice:
    """
    What computes this backbone in evaluation.

    Raises:
        ValueError: BINARYVIT_ENGINE names what this machine does not have.
    """
    wanted = wanted_kernels()
    reason = f"{VARIABLE} says so" if wanted == TORCH else describe_obstacle(model)
    if reason:
        return EngineChoice(TORCH, reason)
    if wanted:
        return EngineChoice(wanted, f"{VARIABLE} says so")
    return EngineChoice(engine.kernels_here()[0], "the fastest kernels for this CPU")


def wanted_kernels() -> str | None:
    """
    What the environment forces, if it does.

    Raises:
        ValueError: it is nothing that this machine has.
    """
    wanted = os.environ.get(VARIABLE) or None
    if wanted is None:
        return None
    here = [*(engine.kernels_here() if engine else []), TORCH]
    if wanted not in here:
        raise ValueError(f"{VARIABLE} is {wanted!r}, but this machine has {', '.join(here)}.")
    return wanted


def describe_obstacle(model: torch.nn.Module) -> str | None:
    """Why the engine does not compute a backbone; none where it does."""
    config = model.config
    if (config.weight_bits, config.input_bits) != (1, 1):
        return f"the engine multiplies single bits, not {config.weight_bits} by {config.input_bits}"
    if not is_packed(model):
        return "its weights are not packed"
    if model.training:
        return "it is in training mode"
    for tensor in model.state_dict().values():
        if tensor.device.type != "cpu":
            return f"it is on the device {tensor.device}"
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            return f"it computes in {str(tensor.dtype).removeprefix('torch.')}"
    if engine is None:
        return "binaryvit_hf is not installed"
    return engine.problem()


def is_packed(model: torch.nn.Module) -> bool:
    return isinstance(model.stages[0].layers[0].attention.query.linear, PackedLinear)


def compute(
    model: torch.nn.Module, images: torch.Tensor, output_hidden_states: bool, options: dict
) -> BaseModelOutputWithPooling | None:
    """
    A backbone's outputs for `images (batch, channels, height, width)`; none where PyTorch has to compute them.

    Args:
        options: further arguments of the call.
    """
    if options.get("output_attentions", getattr(model.config, "output_attentions", False)):
        return None
    folded = fold_for(model, images)
    if folded is None:
        return None
    last, pooled, hidden_states = folded.engine.forward(
        as_floats(images), torch.get_num_threads(), output_hidden_states
    )
    return BaseModelOutputWithPooling(
        last_hidden_state=last, pooler_output=pooled, hidden_states=tuple(hidden_states) or None
    )


def compute_logits(model: torch.nn.Module, classifier: torch.nn.Module, images: torch.Tensor) -> torch.Tensor | None:
    """
    `(batch, labels)` of a backbone and its classifier at once, where nothing else was asked for; none where modules have to be
    called. What lies around two calls, and PyTorch's reading of a classifier's weight for one image, take as long as a tenth
    of a forward on two threads.
    """
    if type(classifier) is not torch.nn.Linear or classifier._forward_hooks or classifier._forward_pre_hooks:
        return None
    weight, bias = classifier.weight, classifier.bias
    for tensor in (weight,) if bias is None else (weight, bias):
        if tensor.dtype != torch.float32 or not tensor.is_cpu or not tensor.is_contiguous():
            return None
        if tensor.requires_grad and torch.is_grad_enabled():
            return None
    folded = fold_for(model, images)
    if folded is None:
        return None
    return folded.engine.classify(as_floats(images), weight, bias, threads=torch.get_num_threads())


def as_floats(images: torch.Tensor) -> torch.Tensor:
    return images if images.dtype == torch.float32 else images.to(torch.float32)


def fold_for(model: torch.nn.Module, images: torch.Tensor) -> Folded | None:
    """The engine of a backbone, if it can compute these images."""
    if model.training or is_traced(images):
        return None
    folded = fold(model)
    if folded is None or folded.is_watched():
        return None
    if torch.is_grad_enabled() and (images.requires_grad or any(p.requires_grad for p in folded.parameters)):
        return None
    return folded


def is_traced(images: torch.Tensor) -> bool:
    """Whether somebody follows PyTorch's operations (torch.compile, torch.export, tracing), or there are no numbers."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or is_in_torch_dispatch_mode():
        return True
    try:
        return not images.is_cpu or (images.data_ptr() == 0 and images.numel() > 0)
    except RuntimeError:  # of vmap and its like
        return True


def fold(model: torch.nn.Module) -> Folded | None:
    folded = FOLDED.get(model)
    wanted = os.environ.get(VARIABLE)  # looked at more closely when it is another
    if folded is None or wanted != folded.wanted or folded.changes != folded.count_changes():
        choice = choose_engine(model)
        if choice.name == TORCH:
            FOLDED.pop(model, None)
            if engine is not None and choice.reason == engine.problem():
                logger.warning_once(f"Packed models run in PyTorch, slower than they could: {choice.reason}.")
            return None
        folded = FOLDED[model] = Folded(model, choice.name, wanted)
    return folded


def forget(model: torch.nn.Module) -> None:
    """To be called where tensors of a model are exchanged for others."""
    FOLDED.pop(model, None)

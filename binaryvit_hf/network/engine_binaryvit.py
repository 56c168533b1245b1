"""Which models, and which calls of them, the compiled engine computes; PyTorch computes the rest."""

import functools
import gc
import json
import operator
import os
from collections import defaultdict
from typing import NamedTuple

import torch
from torch.nn.modules import module as torch_module
from torch.utils._python_dispatch import is_in_torch_dispatch_mode
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import logging, output_capturing

from .quantization_binaryvit import config_fields, expect_packed_layers


try:  # code that came with a checkpoint uses the package where it is installed
    from binaryvit_hf import engine
except ImportError:
    engine = None  # type: ignore[assignment]

ENGINE_VARIABLE = "BINARYVIT_ENGINE"  # of the environment: forces kernels, or PyTorch
TORCH = "torch"
TENSOR_TYPES = (torch.Tensor, torch.nn.Parameter)  # exactly; subclasses may compute something else
# Attributes of a module that no evaluation depends on.
FOR_TRAINING = {"momentum", "p", "drop_prob", "init_value", "probability_clip_init", "gradient_checkpointing"}
get_version, get_training = operator.attrgetter("_version"), operator.itemgetter("training")

logger = logging.get_logger(__name__)


class EngineChoice(NamedTuple):
    """What computes a model: `avx512`, `avx2`, `neon` or `scalar` kernels of the engine, or `torch`; and why."""

    name: str
    reason: str

    def __str__(self):
        return f"{self.name} ({self.reason})"


class ModelState:
    """A model's modules and tensors, the addresses of their memory and their version counters, at one moment."""

    def __init__(self, model: torch.nn.Module):
        self.modules = list(model.modules())[1:]  # without the model itself, which holds this
        modules = [model, *self.modules]
        self.types = list(map(type, self.modules))
        self.attributes = [vars(module) for module in modules]
        self.numbers_of_attributes = list(map(len, self.attributes))
        self.hooks = [hooks for module in modules for hooks in (module._forward_hooks, module._forward_pre_hooks)]
        dictionaries = [vars(module)[kind] for module in modules for kind in ("_parameters", "_buffers", "_modules")]
        self.dictionaries = tuple(filter(None, dictionaries))
        self.members = gc.get_referents(*self.dictionaries)
        self.tensors = [
            member for member in self.members if isinstance(member, torch.Tensor) and member.dtype != torch.int64
        ]
        # Keeps the memory, or another tensor might come to lie where one of these was.
        self.memory = [tensor.detach() for tensor in self.tensors]
        self.counted = one_for_each_counter(self.tensors)
        self.addresses, self.versions = self.current_addresses(), self.current_versions()
        self.parameters = list(model.parameters())

    def current_addresses(self) -> list[int]:
        return list(map(torch.Tensor.data_ptr, self.tensors))

    def current_versions(self) -> list[int]:
        return list(map(get_version, self.counted))

    def is_current(self) -> bool:
        """Whether nothing was exchanged or changed since. A module in training mode is a change."""
        members = gc.get_referents(*self.dictionaries)  # the values of thousands of dictionaries, in one call
        return (
            len(members) == len(self.members)
            and all(map(operator.is_, members, self.members))
            and self.current_versions() == self.versions
            and self.current_addresses() == self.addresses
            and list(map(type, self.modules)) == self.types
            and list(map(len, self.attributes)) == self.numbers_of_attributes  # a forward of an instance's own
            and not any(map(get_training, self.attributes))
        )

    def has_hooks(self) -> bool:
        """Whether somebody's hook waits for a module to be called; transformers' own wait for nothing here."""
        if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
            return True
        return any(self.hooks) and any(
            getattr(hook, "__module__", None) != output_capturing.__name__
            for hooks in self.hooks
            for hook in hooks.values()
        )


def one_for_each_counter(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """One tensor for each version counter. The views of a buffer share one (`quantization_binaryvit.lay_in_one_buffer`)."""
    by_buffer = defaultdict(list)
    for tensor in tensors:
        by_buffer[tensor.untyped_storage().data_ptr()].append(tensor)
    counted = []
    for first, *others in by_buffer.values():
        before = list(map(get_version, others))
        if others:
            torch.autograd.graph.increment_version(first)
        counted += [first, *(other for other, version in zip(others, before) if other._version == version)]
    return counted


class FoldedModel(NamedTuple):
    """An engine, and the state of the backbone that it was made of."""

    engine: "engine.Engine"
    state: ModelState
    wanted: str | None  # BINARYVIT_ENGINE at that time


class EngineSlot:
    """Where a backbone keeps its engine. A copy of the model, or a pickle, has an empty one."""

    folded: FoldedModel | None = None

    def __deepcopy__(self, memo):
        return EngineSlot()

    def __reduce__(self):
        return EngineSlot, ()


def choose_engine(model: torch.nn.Module) -> EngineChoice:
    """
    What computes this backbone in evaluation.

    Raises:
        ValueError: BINARYVIT_ENGINE names what this machine does not have.
    """
    wanted = wanted_kernels()
    reason = f"{ENGINE_VARIABLE} says so" if wanted == TORCH else describe_obstacle(model)
    if reason:
        return EngineChoice(TORCH, reason)
    if wanted:
        return EngineChoice(wanted, f"{ENGINE_VARIABLE} says so")
    return EngineChoice(engine.kernels_here()[0], "the fastest kernels for this CPU")


def wanted_kernels() -> str | None:
    """
    What the environment forces, if it does.

    Raises:
        ValueError: it is nothing that this machine has.
    """
    wanted = os.environ.get(ENGINE_VARIABLE) or None
    if wanted is None:
        return None
    here = [*(engine.kernels_here() if engine else []), TORCH]
    if wanted not in here:
        raise ValueError(f"{ENGINE_VARIABLE} is {wanted!r}, but this machine has {', '.join(here)}.")
    return wanted


def describe_obstacle(model: torch.nn.Module) -> str | None:
    """Why the engine does not compute a backbone; none where it does."""
    config = model.config
    if (config.weight_bits, config.input_bits) != (1, 1):
        return f"the engine multiplies single bits, not {config.weight_bits} by {config.input_bits}"
    if not model.is_packed:
        return "its weights are not packed"
    if model.training:
        return "it is in training mode"
    if engine is None:
        return "binaryvit_hf is not installed"
    return engine.problem() or describe_difference(model)


def describe_difference(model: torch.nn.Module) -> str | None:
    """How a packed backbone differs from the network of its config with plain tensors on the CPU, or `None`."""
    try:
        expected = expected_network(model.backbone_class, json.dumps(config_fields(model.config)))
    except Exception as error:  # the checks of a config raise errors of several kinds
        return f"its config was edited and describes no network ({type(error).__name__})"
    modules, expected_modules = dict(model.named_modules()), dict(expected.named_modules())
    for name in modules | expected_modules:
        module, expected_module = modules.get(name), expected_modules.get(name)
        if type(module) is not type(expected_module):
            return f"its module {name or 'binaryvit'!r} is not that of its config"
        if "forward" in vars(module):
            return f"its module {name or 'binaryvit'!r} has a forward of its own"
        if module is model:
            continue  # where it was loaded from, and the like
        for attribute, value in plain_attributes(expected_module).items():
            if getattr(module, attribute, None) != value:
                return f"{attribute} of its module {name!r} is {getattr(module, attribute, None)}, not {value}"
    tensors, expected_tensors = model.state_dict(keep_vars=True), expected.state_dict()
    for name in tensors | expected_tensors:
        if name not in tensors or name not in expected_tensors:
            return f"its tensor {name!r} is not there, or not of its config"
        if reason := describe_tensor(tensors[name], expected_tensors[name]):
            return f"its tensor {name!r} {reason}"
    return None


def describe_tensor(tensor: torch.Tensor, expected: torch.Tensor) -> str | None:
    """Why the engine cannot read a tensor; none where it can."""
    if tensor.device.type != "cpu":
        return f"is on the device {tensor.device}"
    if type(tensor) not in TENSOR_TYPES or tensor.layout != torch.strided or not has_memory(tensor):
        return "is no plain tensor"
    if tensor.is_inference():
        return "was made in inference mode, where PyTorch does not count its changes"
    if tensor.shape != expected.shape:
        return f"has the shape {tuple(tensor.shape)}, not {tuple(expected.shape)}"
    dtype = torch.float32 if expected.is_floating_point() else expected.dtype
    return None if tensor.dtype == dtype else f"is {str(tensor.dtype).removeprefix('torch.')}"


def has_memory(tensor: torch.Tensor) -> bool:
    try:
        tensor.data_ptr()
    except RuntimeError:  # of vmap and its like
        return False
    return True


def plain_attributes(module: torch.nn.Module) -> dict:
    """Settings that decide what a module computes in evaluation, such as `eps` and `num_heads`."""
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_") and name not in FOR_TRAINING and isinstance(value, (int, float, str, tuple))
    }


@functools.lru_cache(maxsize=8)
def expected_network(model_class: type[PreTrainedModel], fields: str) -> torch.nn.Module:
    """The packed backbone of a config on the meta device. `fields`: JSON of `config_fields`."""
    with torch.device("meta"):
        model = model_class(model_class.config_class(**json.loads(fields)))
    expect_packed_layers(model)
    return model.eval()


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
    usable = usable_engine(model, images)
    if usable is None:
        return None
    last, pooled, hidden_states = usable.forward(as_floats(images), torch.get_num_threads(), output_hidden_states)
    return BaseModelOutputWithPooling(
        last_hidden_state=last, pooler_output=pooled, hidden_states=tuple(hidden_states) or None
    )


def compute_logits(model: torch.nn.Module, classifier: torch.nn.Module, images: torch.Tensor) -> torch.Tensor | None:
    """
    `(batch, labels)` of a backbone and its classifier at once, where nothing else was asked for; none where modules have to be
    called. What lies around two calls, and PyTorch's reading of a classifier's weight for one image, take as long as a tenth
    of a forward on two threads.
    """
    if type(classifier) is not torch.nn.Linear or "forward" in vars(classifier):
        return None
    if classifier._forward_hooks or classifier._forward_pre_hooks:
        return None
    weight, bias = classifier.weight, classifier.bias
    for tensor in (weight,) if bias is None else (weight, bias):
        if type(tensor) not in TENSOR_TYPES or tensor.dtype != torch.float32:
            return None
        if not tensor.is_cpu or not tensor.is_contiguous() or (tensor.requires_grad and torch.is_grad_enabled()):
            return None
    if weight.shape[1] != model.config.hidden_sizes[-1] or (bias is not None and len(bias) != len(weight)):
        return None
    usable = usable_engine(model, images)
    if usable is None:
        return None
    return usable.classify(as_floats(images), weight, bias, threads=torch.get_num_threads())


def as_floats(images: torch.Tensor) -> torch.Tensor:
    return images if images.dtype == torch.float32 else images.to(torch.float32)


def usable_engine(model: torch.nn.Module, images: torch.Tensor) -> "engine.Engine | None":
    """The engine of a backbone, if it can compute these images."""
    if model.training or is_traced(images):
        return None
    folded = current_engine(model)
    if folded is None or folded.state.has_hooks():
        return None
    if torch.is_grad_enabled() and (images.requires_grad or any(p.requires_grad for p in folded.state.parameters)):
        return None
    return folded.engine


def is_traced(images: torch.Tensor) -> bool:
    """Whether somebody follows PyTorch's operations (torch.compile, torch.export, tracing), or there are no numbers."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or is_in_torch_dispatch_mode():
        return True
    return not images.is_cpu or not has_memory(images) or (images.data_ptr() == 0 and images.numel() > 0)


def current_engine(model: torch.nn.Module) -> FoldedModel | None:
    """The engine of a backbone as it is now, folded anew where anything has changed."""
    slot, wanted = model.engine_slot, os.environ.get(ENGINE_VARIABLE)
    folded = slot.folded
    if folded is not None and folded.wanted == wanted and folded.state.is_current():
        return folded
    slot.folded = None
    choice = choose_engine(model)
    if choice.name == TORCH:
        if engine is not None and choice.reason == engine.problem():
            logger.warning_once(f"Packed models run in PyTorch, slower than they could: {choice.reason}.")
        return None
    state = ModelState(model)  # before its tensors are read: a change meanwhile is seen at the next call
    tensors = {name: tensor for name, tensor in model.state_dict().items() if tensor.dtype != torch.int64}
    slot.folded = FoldedModel(engine.Engine(model.config, tensors, choice.name), state, wanted)
    return slot.folded

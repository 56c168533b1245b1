# SPDX-License-Identifier: Apache-2.0
"""
The bridge between a model and the compiled engine: which calls the engine computes. PyTorch computes all others.

The engine copies a packed backbone once ("folds" it). So every call first checks that the model has not changed, and
folds it again if it has.
"""

import functools
import gc
import json
import operator
import os
import weakref
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch.nn.modules import module as torch_module
from torch.utils._python_dispatch import is_in_torch_dispatch_mode
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import logging, output_capturing

from .functional_binaryvit import ENGINE_VARIABLE, TORCH
from .packing_binaryvit import expect_packed_layers
from .quantization_binaryvit import config_fields, describe_other_modules


try:  # code that came with a checkpoint uses the package if it is installed
    from binaryvit_hf import engine
except ImportError:
    engine = None  # type: ignore[assignment]

RESIZED_ENGINES = 4  # engines that a model keeps for images of other sizes than the config's
TENSOR_TYPES = (torch.Tensor, torch.nn.Parameter)  # exactly these: a subclass may compute something else
in_place_changes = operator.attrgetter("_version")

logger = logging.get_logger(__name__)


# ---- Calls ----


def outputs_by_engine(
    model: torch.nn.Module,
    images: torch.Tensor,
    output_hidden_states: bool,
    interpolate_pos_encoding: bool | None = None,
) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...] | None] | None:
    """Last hidden state, pooled output and hidden states of `BinaryViTModel`, or None if PyTorch has to compute."""
    usable = usable_engine(model, images, interpolate_pos_encoding)
    if usable is None:
        return None
    last, pooled, hidden_states = usable.forward(images.float(), torch.get_num_threads(), output_hidden_states)
    return last, pooled, tuple(hidden_states) or None


def maps_by_engine(
    model: torch.nn.Module,
    images: torch.Tensor,
    wanted: list[bool],
    interpolate_pos_encoding: bool | None = None,
) -> list[torch.Tensor | None] | None:
    """
    Feature maps of `BinaryViTBackbone` as tokens `(batch, tokens, channels)`, or None if PyTorch has to compute.

    Args:
        wanted: whether to return the map, of the stem and of each stage. The other maps are None.
    """
    usable = usable_engine(model, images, interpolate_pos_encoding)
    return None if usable is None else usable.feature_maps(images.float(), torch.get_num_threads(), wanted)


def logits_by_engine(
    model: torch.nn.Module,
    classifier: torch.nn.Module,
    images: torch.Tensor,
    interpolate_pos_encoding: bool | None = None,
) -> torch.Tensor | None:
    """
    Logits `(batch, labels)` of a backbone and its classifier, or None if PyTorch has to call the modules.

    One call of the engine for both saves 10 % of a forward of one image on two threads.
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
    usable = usable_engine(model, images, interpolate_pos_encoding)
    if usable is None:
        return None
    return usable.classify(images.float(), weight, bias, threads=torch.get_num_threads())


def usable_engine(
    model: torch.nn.Module, images: torch.Tensor, interpolate_pos_encoding: bool | None = None
) -> "engine.Engine | None":
    """
    The engine of a backbone, or None if it cannot compute these images.

    Args:
        interpolate_pos_encoding: whether images may have another size than the config's.

    Raises:
        ValueError: the network cannot take images of this size.
    """
    if model.training or not isinstance(images, torch.Tensor) or is_traced(images):
        return None
    slot = model.engine_slot
    if slot.compares_values and torch.is_grad_enabled() and wants_gradients(model.parameters()):
        return None  # without an engine of weights that the next step of training changes
    folded = current_engine(model)
    if folded is None:
        return None
    if torch.is_grad_enabled():
        if wants_gradients(folded.state.parameters):
            slot.compare_values()
            return None
        if images.requires_grad:
            return None
    if folded.state.has_hooks():
        return None
    if images.shape[1:] == folded.own.image_shape:
        return folded.own
    if interpolate_pos_encoding and images.dim() == 4 and images.shape[1] == folded.own.image_shape[0]:
        return folded.engine_of_size(model, tuple(images.shape[2:]))
    return None  # PyTorch says what is wrong


def wants_gradients(parameters: Iterable[torch.Tensor]) -> bool:
    return any(parameter.requires_grad for parameter in parameters)


def is_traced(images: torch.Tensor) -> bool:
    """Whether PyTorch's operations are recorded (torch.compile, torch.export, tracing), or images hold no numbers."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or is_in_torch_dispatch_mode():
        return True
    return not images.is_cpu or not has_memory(images) or (images.data_ptr() == 0 and images.numel() > 0)


def has_memory(tensor: torch.Tensor) -> bool:
    try:
        tensor.data_ptr()
    except RuntimeError:  # tensors inside of torch.func.vmap have none
        return False
    return True


# ---- The engine of a model ----


class FoldedModel(NamedTuple):
    """The engines of a backbone, and the state of the backbone that they were read from."""

    own: "engine.Engine"  # for images of the config's size
    state: "ModelState"
    wanted: str | None  # value of BINARYVIT_ENGINE when the model was read
    kernels: str
    config: dict  # the config's fields when the model was read: it may be edited later
    resized: dict[tuple[int, int], "engine.Engine"]  # for other sizes of images; the last used is at the end

    def engine_of_size(self, model: torch.nn.Module, image_size: tuple[int, int]) -> "engine.Engine":
        """
        The engine for images of another size, with interpolated position embeddings.

        Raises:
            ValueError: the network cannot take images of this size.
        """
        # Several threads may run this. Each operation on the dictionary is atomic; two may read the model at once.
        resized = self.resized.pop(image_size, None)
        if resized is None:
            tensors = engine_tensors(model) | model.resized_position_embeddings(image_size)
            config = model.config_class(**(self.config | {"image_size": image_size}))
            resized = engine.Engine(config, tensors, self.kernels)
        self.resized[image_size] = resized
        for oldest in list(self.resized)[:-RESIZED_ENGINES]:
            self.resized.pop(oldest, None)
        return resized


class EngineSlot:
    """Where a backbone keeps its engine. A copy or a pickle of the model gets an empty slot."""

    folded: FoldedModel | None = None
    compares_values: bool = False  # whether each call compares the parameters with those of the engine

    def __init__(self) -> None:
        self.counted_together: dict[int, weakref.ref] = {}  # by their ids

    def set_counted_together(self, tensors: list[torch.Tensor]) -> None:
        """Tell the slot which tensors have one counter of changes (`count_changes_together`)."""
        self.counted_together = {id(tensor): weakref.ref(tensor) for tensor in tensors}

    def tensors_to_watch(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """The tensors whose counters reveal any change in place: one of those that are counted together, and all others."""
        together, others = [], []
        for tensor in tensors:
            reference = self.counted_together.get(id(tensor))
            # Another tensor may have the id of one that is gone.
            is_known = reference is not None and reference() is tensor
            (together if is_known else others).append(tensor)
        return together[:1] + others

    def compare_values(self) -> None:
        """
        Call it when parameters of the backbone train.

        PyTorch does not count the changes by fused optimisers, and by those that write through `.data`.
        """
        if not self.compares_values:
            self.folded, self.compares_values = None, True

    def forget_changed_model(self) -> None:
        """Drop the engine of a model that has changed, or is in training mode, as the next call would do."""
        if self.folded is not None and not self.folded.state.is_current():
            self.folded = None

    def __deepcopy__(self, memo):
        return EngineSlot()

    def __reduce__(self):
        return EngineSlot, ()


def current_engine(model: torch.nn.Module) -> FoldedModel | None:
    """The engine of a backbone, or None if PyTorch computes it. Folds the model again if it has changed."""
    slot, wanted = model.engine_slot, os.environ.get(ENGINE_VARIABLE)
    folded = slot.folded
    if folded is not None and folded.wanted == wanted and folded.state.is_current():
        return folded
    slot.folded = None
    choice = choose_engine(model)
    if choice.name == TORCH:
        if engine is not None and choice.reason == engine.problem():
            logger.warning_once(f"Packed models run in PyTorch, not on the faster engine: {choice.reason}.")
        return None
    state = ModelState(model)  # before the tensors are read: the next call sees a change made meanwhile
    folded_config = config_fields(model.config)
    own = engine.Engine(model.config, engine_tensors(model), choice.name)
    folded = slot.folded = FoldedModel(own, state, wanted, choice.name, folded_config, {})
    return folded


def engine_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The tensors that an engine reads, by name: all but `num_batches_tracked`."""
    return {name: tensor for name, tensor in model.state_dict().items() if tensor.dtype != torch.int64}


class ModelState:
    """
    A snapshot of a model: its modules and tensors, their addresses in memory and their version counters.

    `is_current` sees every change that PyTorch counts, and every change of a parameter if the slot of the model compares
    values. Otherwise it does not see writes through `.data` or `.numpy()`, or new
    values of plain attributes (`refresh_engine`).
    """

    def __init__(self, model: torch.nn.Module):
        self.modules = list(model.modules())[1:]  # without the model: its engine slot holds this object
        modules = [model, *self.modules]
        self.types = list(map(type, self.modules))
        self.attributes = [vars(module) for module in modules]
        self.numbers_of_attributes = list(map(len, self.attributes))
        self.hooks = [hooks for module in modules for hooks in (module._forward_hooks, module._forward_pre_hooks)]
        dictionaries = [vars(module)[kind] for module in modules for kind in ("_parameters", "_buffers", "_modules")]
        self.dictionaries = tuple(filter(None, dictionaries))
        self.members = self.current_members()
        # Evaluation does not read num_batches_tracked, the only int64 tensor.
        self.tensors = [
            member for member in self.members if isinstance(member, torch.Tensor) and member.dtype != torch.int64
        ]
        # Detached tensors keep the memory, so no other tensor can get the same address.
        self.memory = [tensor.detach() for tensor in self.tensors]
        compares_values = model.engine_slot.compares_values
        self.watched = model.engine_slot.tensors_to_watch(self.tensors)
        self.addresses, self.versions = self.current_addresses(), self.current_versions()
        self.parameters = list(model.parameters())
        self.values = [parameter.detach().clone() for parameter in self.parameters if compares_values]

    def current_members(self) -> list:
        """All parameters, buffers and modules."""
        # All values of 1,500 dictionaries in one call: 0.02 ms for BinaryViT-small. A loop takes 0.11 ms.
        return gc.get_referents(*self.dictionaries)

    def current_addresses(self) -> list[int]:
        return list(map(torch.Tensor.data_ptr, self.tensors))

    def current_versions(self) -> list[int]:
        return list(map(in_place_changes, self.watched))

    def is_current(self) -> bool:
        """Whether the model is unchanged and in evaluation mode. Takes 0.3 ms for BinaryViT-small."""
        members = self.current_members()
        return (
            len(members) == len(self.members)
            and all(map(operator.is_, members, self.members))
            and self.current_versions() == self.versions
            and self.current_addresses() == self.addresses  # tensor.data = other
            and list(map(type, self.modules)) == self.types  # a parametrisation changes the class of its module
            and list(map(len, self.attributes)) == self.numbers_of_attributes  # module.forward = function
            and not any(map(operator.itemgetter("training"), self.attributes))
            and (not self.values or all(map(torch.equal, self.values, self.parameters)))
        )

    def has_hooks(self) -> bool:
        """Whether a user has hooks on any module; only PyTorch calls them. Those of transformers do not count."""
        if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
            return True
        return any(self.hooks) and any(
            getattr(hook, "__module__", None) != output_capturing.__name__
            for hooks in self.hooks
            for hook in hooks.values()
        )


# ---- The choice between engine and PyTorch ----


class EngineChoice(NamedTuple):
    """Kernels that compute a model (`avx512`, `avx2`, `neon`, `scalar`, or `torch` for PyTorch), and why."""

    name: str
    reason: str

    def __str__(self):
        return f"{self.name} ({self.reason})"


def choose_engine(model: torch.nn.Module) -> EngineChoice:
    """
    The kernels that compute a backbone in evaluation.

    Raises:
        ValueError: BINARYVIT_ENGINE names kernels that this machine does not have.
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
    The kernels that BINARYVIT_ENGINE forces, or None.

    Raises:
        ValueError: BINARYVIT_ENGINE names kernels that this machine does not have.
    """
    wanted = os.environ.get(ENGINE_VARIABLE) or None
    if wanted is None:
        return None
    here = [*(engine.kernels_here() if engine else []), TORCH]
    if wanted not in here:
        raise ValueError(f"{ENGINE_VARIABLE} is {wanted!r}, but this machine has {', '.join(here)}.")
    return wanted


def describe_obstacle(model: torch.nn.Module) -> str | None:
    """Why the engine does not compute a backbone, or None if it does."""
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
    """How a packed backbone differs from the network of its config with plain tensors on the CPU, or None."""
    try:
        expected = expected_network(model.backbone_class, json.dumps(config_fields(model.config)))
    except Exception as error:  # the checks of a config raise errors of several kinds
        return f"its config was edited and describes no network ({type(error).__name__})"
    if difference := describe_other_modules(model, expected):
        return difference
    for name, module in model.named_modules():
        if module.training:
            return f"its module {name!r} is in training mode"
        if "forward" in vars(module):
            return f"its module {name or 'binaryvit'!r} has a forward of its own"
    tensors, expected_tensors = model.state_dict(keep_vars=True), expected.state_dict()
    for name in tensors | expected_tensors:
        if name not in tensors or name not in expected_tensors:
            return f"its tensor {name!r} is missing, or not in its config"
        if reason := describe_tensor(tensors[name], expected_tensors[name]):
            return f"its tensor {name!r} {reason}"
    return None


def describe_tensor(tensor: torch.Tensor, expected: torch.Tensor) -> str | None:
    """Why the engine cannot read a tensor, or None if it can."""
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


@functools.lru_cache(maxsize=8)
def expected_network(model_class: type[PreTrainedModel], fields: str) -> torch.nn.Module:
    """The packed backbone of a config on the meta device. `fields` is the JSON of `config_fields`."""
    with torch.device("meta"):
        model = model_class(model_class.config_class(**json.loads(fields)))
    expect_packed_layers(model)
    return model.eval()

"""After any edit of a model, the engine computes what PyTorch computes."""

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_config, tiny_images, tiny_model
from torch import nn
from torch.nn.utils import parametrize
from transformers import AutoModelForImageClassification

from binaryvit_hf import BinaryViTModel, BinaryViTQuantizationConfig, engine


pytestmark = pytest.mark.skipif(not engine.kernels_here(), reason=f"there is no engine: {engine.problem()}")

IMAGES = tiny_images(1)
SHIFT = "binaryvit.stages.0.layers.1.attention.query.linear.shift"
BITS = "binaryvit.stages.0.layers.0.mlp.fc1.linear.packed_weight"
POSITIONS = "binaryvit.embeddings.position_embeddings"
VARIANCE = "binaryvit.norm.batch_norm.running_var"


def packed_model(seed: int = 0):
    model = tiny_model(tiny_config()).eval()
    if seed:
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.pack_weights()
    return model.requires_grad_(False)


def owner(model, name: str) -> tuple[nn.Module, str]:
    path, _, attribute = name.rpartition(".")
    return model.get_submodule(path), attribute


def tensor_of(model, name: str) -> torch.Tensor:
    return model.state_dict(keep_vars=True)[name]


def other_value(tensor: torch.Tensor, amount: float) -> torch.Tensor:
    """A changed copy of a tensor: some bits flipped, or `amount` added to floats."""
    tensor = tensor.detach().clone()
    return tensor ^ (1 + int(100 * amount)) if tensor.dtype == torch.uint8 else tensor + amount


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x


class LowRankAdapter(nn.Module):
    """Replaces a layer, as LoRA of PEFT does."""

    def __init__(self, layer: nn.Module, amount: float):
        super().__init__()
        self.base_layer = layer
        self.down = nn.Parameter(torch.full((layer.in_features, 1), amount), requires_grad=False)
        self.up = nn.Parameter(torch.ones(1, layer.out_features), requires_grad=False)

    def forward(self, x):
        return self.base_layer(x) + x @ self.down @ self.up


def load(model, name, amount):
    model.load_state_dict(model.state_dict() | {name: other_value(tensor_of(model, name), amount)})


def load_and_assign(model, name, amount):
    model.load_state_dict({name: other_value(tensor_of(model, name), amount)}, strict=False, assign=True)


def set_attribute(model, name, amount):
    module, attribute = owner(model, name)
    value = other_value(getattr(module, attribute), amount)
    is_parameter = attribute in module._parameters
    setattr(module, attribute, nn.Parameter(value, requires_grad=False) if is_parameter else value)


def set_data(model, name, amount):
    tensor = tensor_of(model, name)
    tensor.data = other_value(tensor, amount)


def set_data_twice(model, name, amount):
    tensor = tensor_of(model, name)
    for step in (amount, 2 * amount):  # the second may get the first address again
        tensor.data = other_value(tensor, step)


def change_in_place(model, name, amount):
    with torch.no_grad():
        tensor = tensor_of(model, name)
        tensor.copy_(other_value(tensor, amount))


def change_in_inference_mode(model, name, amount):
    with torch.inference_mode():
        tensor = tensor_of(model, name)
        tensor.copy_(other_value(tensor, amount))


def change_a_view(model, name, amount):
    view = tensor_of(model, name).detach().view(-1)
    view.copy_(other_value(view, amount))


def write_into_the_dictionary(model, name, amount):
    module, attribute = owner(model, name)
    members = module._parameters if attribute in module._parameters else module._buffers
    members[attribute] = other_value(members[attribute], amount)


def swap(model, name, amount):
    tensor = tensor_of(model, name)
    value = other_value(tensor, amount)
    torch.utils.swap_tensors(tensor, nn.Parameter(value, False) if isinstance(tensor, nn.Parameter) else value)


def take_from_another(model, name, amount):
    owner(model, name)[0].load_state_dict(owner(packed_model(seed=7), name)[0].state_dict())


def exchange_module(model, name, amount):
    model.binaryvit.stages[0].layers[0] = packed_model(seed=3).binaryvit.stages[0].layers[1]


def exchange_order(model, name, amount):
    stage = model.binaryvit.stages[0]
    stage.layers = nn.ModuleList(reversed(stage.layers))


def leave_out_a_layer(model, name, amount):
    stage = model.binaryvit.stages[0]
    stage.layers = nn.ModuleList(list(stage.layers)[:1])


def leave_out_a_norm(model, name, amount):
    model.binaryvit.stages[1].layers[0].norm1 = nn.Identity()


def replace_dropout(model, name, amount):
    model.binaryvit.stages[0].layers[0].dropout = Doubled()


def wrap_the_backbone_norm(model, name, amount):
    model.binaryvit.norm = nn.Sequential(model.binaryvit.norm, Doubled())


def adapt(model, name, amount):
    model.binaryvit.stages[0].layers[0].attention.value.linear = LowRankAdapter(
        model.binaryvit.stages[0].layers[0].attention.value.linear, amount
    )


def parametrise(model, name, amount):
    module, attribute = owner(model, SHIFT)
    if not parametrize.is_parametrized(module):
        parametrize.register_parametrization(module, attribute, Doubled())


def give_an_instance_its_own_forward(model, name, amount):
    norm = model.binaryvit.norm
    norm.forward = lambda x: 2 * type(norm).forward(norm, x)


def switch_a_norm_to_training(model, name, amount):
    model.binaryvit.stages[0].layers[0].norm2.train()


def cast_to_half_and_back(model, name, amount):
    model.half().float()


def cast(model, name, amount):
    model.bfloat16()


def change_uncounted_and_refresh(model, name, amount):
    tensor = tensor_of(model, name)
    tensor.data.copy_(other_value(tensor, amount))
    model.refresh_engine()


def write_through_numpy_and_refresh(model, name, amount):
    array = tensor_of(model, name).detach().numpy()
    array[...] = other_value(torch.from_numpy(array), amount).numpy()
    model.refresh_engine()


def change_an_attribute_and_refresh(model, name, amount):
    model.binaryvit.norm.batch_norm.eps = 0.5 + amount
    model.refresh_engine()


EDITS_OF_TENSORS = [
    load,
    load_and_assign,
    set_attribute,
    set_data,
    set_data_twice,
    change_in_place,
    change_in_inference_mode,
    change_a_view,
    write_into_the_dictionary,
    swap,
    take_from_another,
    change_uncounted_and_refresh,
    write_through_numpy_and_refresh,
]
EDITS_OF_MODULES = [
    exchange_module,
    exchange_order,
    leave_out_a_layer,
    leave_out_a_norm,
    replace_dropout,
    wrap_the_backbone_norm,
    adapt,
    parametrise,
    give_an_instance_its_own_forward,
    switch_a_norm_to_training,
    cast_to_half_and_back,
    cast,
    change_an_attribute_and_refresh,
]


def logits_of(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IMAGES.to(model.dtype)).logits


def logits_by_pytorch(model, monkeypatch) -> torch.Tensor:
    with monkeypatch.context() as context:
        context.setenv("BINARYVIT_ENGINE", "torch")
        return logits_of(copy.deepcopy(model))


def assert_up_to_date(model, monkeypatch) -> None:
    torch.testing.assert_close(logits_of(model), logits_by_pytorch(model, monkeypatch), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", [SHIFT, BITS, POSITIONS, VARIANCE])
@pytest.mark.parametrize("edit", EDITS_OF_TENSORS, ids=lambda edit: edit.__name__)
def test_the_engine_follows_an_edit_of_a_tensor(edit, name, monkeypatch):
    model = packed_model()
    before = logits_of(model)
    edit(model, name, 0.7)
    assert not torch.equal(logits_of(model), before)
    assert_up_to_date(model, monkeypatch)
    assert model.engine.name != "torch"


@pytest.mark.parametrize("edit", EDITS_OF_MODULES, ids=lambda edit: edit.__name__)
def test_the_engine_follows_an_edit_of_a_module(edit, monkeypatch):
    model = packed_model()
    before = logits_of(model)
    edit(model, SHIFT, 0.7)
    if edit is not cast_to_half_and_back:
        assert not torch.equal(logits_of(model).float(), before)
    assert_up_to_date(model, monkeypatch)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(EDITS_OF_TENSORS * 3 + EDITS_OF_MODULES),
            st.sampled_from([SHIFT, BITS, POSITIONS, VARIANCE, "classifier.weight", "classifier.bias"]),
            st.floats(0.1, 1),
            st.booleans(),
        ),
        min_size=1,
        max_size=8,
    )
)
def test_the_engine_follows_any_sequence_of_edits(edits):
    model = packed_model()
    with pytest.MonkeyPatch.context() as monkeypatch:
        for edit, name, amount, computes in edits:
            try:
                edit(model, name, amount)
            except (AttributeError, KeyError, RuntimeError, IndexError):
                continue  # an earlier edit removed the module or tensor
            if computes:
                assert_up_to_date(model, monkeypatch)
        assert_up_to_date(model, monkeypatch)


def test_a_functional_call_computes_with_the_tensors_it_is_given(monkeypatch):
    model, other = packed_model(), packed_model(seed=5)
    before, expected = logits_of(model), logits_of(other)
    assert not torch.allclose(before, expected)
    with torch.no_grad():
        result = torch.func.functional_call(model, other.state_dict(), (IMAGES,)).logits
    torch.testing.assert_close(result, expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(logits_of(model), before)


def test_a_subclass_with_other_parts_runs_in_pytorch():
    class Own(BinaryViTModel):
        def __init__(self, config):
            super().__init__(config)
            self.norm = nn.Sequential(self.norm, Doubled())

    model = packed_model()
    own = Own(model.config).eval()
    own.pack_weights()
    assert own.engine.name == "torch"


@pytest.mark.parametrize(
    "field, value",
    [("num_attention_heads", [3, 4]), ("num_attention_heads", [4, 4]), ("avg_pool_kernel_sizes", [5, 7])],
    ids=str,
)
def test_an_edited_config_does_not_change_the_outputs(field, value):
    model = packed_model()
    expected = logits_of(model)
    setattr(model.config, field, value)
    model.refresh_engine()
    torch.testing.assert_close(logits_of(model), expected, rtol=1e-3, atol=1e-3)


def test_hooks_for_all_modules_are_called():
    model, calls = packed_model(), []
    logits_of(model)
    handle = nn.modules.module.register_module_forward_hook(lambda *_: calls.append(1))
    try:
        logits_of(model)
    finally:
        handle.remove()
    assert len(calls) > 50


def test_a_model_loaded_in_inference_mode_uses_the_engine(tmp_path):
    tiny_model().save_pretrained(tmp_path / "latent")
    with torch.inference_mode():
        packing = BinaryViTQuantizationConfig()
        model = AutoModelForImageClassification.from_pretrained(tmp_path / "latent", quantization_config=packing)
        model.save_pretrained(tmp_path / "packed")
        again = AutoModelForImageClassification.from_pretrained(tmp_path / "packed")
        for loaded in (model, again):
            assert loaded.engine.name != "torch"
            assert loaded(IMAGES).logits.isfinite().all()
    with torch.no_grad():
        again.binaryvit.norm.batch_norm.bias.add_(1)
    assert not torch.equal(logits_of(again), logits_of(model))


def test_a_model_made_in_inference_mode_runs_in_pytorch(monkeypatch):
    with torch.inference_mode():
        model = packed_model()
        assert "inference mode" in model.engine.reason
        assert model(IMAGES).logits.isfinite().all()


def test_a_model_with_an_engine_can_be_freed():
    model = packed_model()
    logits_of(model)
    gone = weakref.ref(model.binaryvit)
    del model
    gc.collect()
    assert gone() is None


@pytest.fixture
def loaded(tmp_path):
    """A packed model as `from_pretrained` makes it."""
    packed_model().save_pretrained(tmp_path / "packed")
    return AutoModelForImageClassification.from_pretrained(tmp_path / "packed").eval()


def test_threads_that_call_a_cold_model_at_once_do_not_fold_for_each_other(loaded, monkeypatch):
    folds, start, threads = [], engine.Engine.__init__, 4
    monkeypatch.setattr(engine.Engine, "__init__", lambda *args: (folds.append(1), start(*args))[1])
    all_there = threading.Barrier(threads)

    def work():
        all_there.wait()
        with torch.no_grad():
            for _ in range(30):
                loaded(IMAGES)

    workers = [threading.Thread(target=work) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert 1 <= len(folds) <= 2 * threads


def test_every_tensor_of_a_loaded_model_has_memory_of_its_own(loaded, tmp_path):
    tensors = loaded.state_dict()
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors.values()}) == len(tensors)
    content = pickle.dumps(loaded)
    size = sum(tensor.untyped_storage().nbytes() for tensor in tensors.values())
    latent = tiny_model(tiny_config())
    overhead = len(pickle.dumps(latent)) - sum(tensor.nbytes for tensor in latent.state_dict().values())
    assert len(content) < size + 2 * overhead
    copied = pickle.loads(content)
    with torch.no_grad():
        assert torch.equal(copied(IMAGES).logits, loaded(IMAGES).logits)


def test_accelerate_saves_and_loads_a_packed_model_whose_head_trains(loaded, tmp_path, monkeypatch):
    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.SGD(loaded.classifier.parameters(), lr=0.1)
    model, optimizer = accelerator.prepare(loaded, optimizer)
    model(IMAGES).logits.square().sum().backward()
    optimizer.step()
    saved = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    accelerator.save_state(str(tmp_path / "state"))
    optimizer.step()
    with torch.no_grad():
        tensor_of(model, SHIFT).add_(1)
    accelerator.load_state(str(tmp_path / "state"))
    assert all(torch.equal(tensor, saved[name]) for name, tensor in model.state_dict().items())
    assert_up_to_date(model, monkeypatch)


class EarlierEngine:
    """What the engines of all packages since version 0.1.0 have in common."""

    kind = engine.Engine

    def __init__(self, config, tensors, kernels):
        actual = self.kind(config, tensors, kernels)
        self.image_shape, self.forward, self.classify = actual.image_shape, actual.forward, actual.classify


def test_code_that_came_with_a_checkpoint_computes_on_the_engines_of_earlier_packages(monkeypatch):
    monkeypatch.setattr(engine, "Engine", EarlierEngine)
    model = packed_model()
    expected = model.binaryvit(IMAGES).pooler_output
    torch.testing.assert_close(model(IMAGES).logits, model.classifier(expected))
    assert isinstance(model.binaryvit.engine_slot.folded.own, EarlierEngine)


def test_the_engine_has_what_code_that_came_with_a_checkpoint_calls():
    model = packed_model()
    with torch.no_grad():
        expected = model.binaryvit(IMAGES)
    own = model.binaryvit.engine_slot.folded.own
    last, pooled, _ = own.forward(IMAGES, own.threads_for(IMAGES), False)
    assert torch.equal(last, expected.last_hidden_state) and torch.equal(pooled, expected.pooler_output)

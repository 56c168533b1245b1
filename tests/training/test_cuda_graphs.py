"""
Training steps as CUDA graphs: the same weights as without, whatever else the run does.

Without a GPU a recording runs its step again each time, on the same static images and labels.
"""

import contextlib
import itertools
import logging
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tiny import class_token_config, tiny_config, tiny_images, tiny_model
from tiny_training import EVERY_STEP, METHODS, tiny_teacher, tiny_trainer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import TrainerCallback

from binaryvit_hf import cuda_graphs
from binaryvit_hf.compiled_layers import CompiledLayers
from binaryvit_hf.data.model_inputs import ModelInput, adapt_input
from binaryvit_hf.training.arguments import DistillationTrainingArguments
from binaryvit_hf.training.callbacks.sign_gradient import SignGradient
from binaryvit_hf.training.step_graph import StepGraph
from binaryvit_hf.training.trainer import DistillationTrainer
from binaryvit_runtime.errors import UserError


@pytest.fixture
def recordings(monkeypatch):
    """Recordings that run on the CPU; a list of their steps."""
    made = []

    def record_on_cpu(step):
        made.append(step)
        for _ in range(cuda_graphs.WARM_UPS):
            step()
        return step

    monkeypatch.setattr(cuda_graphs, "record", record_on_cpu)
    return made


def train(folder, with_graphs, *callbacks, mix=None, **arguments):
    trainer = tiny_trainer(
        folder,
        tiny_model(tiny_config()),
        teacher=tiny_teacher(),
        **{"max_steps": 3, "learning_rate": 0.01} | arguments,
    )
    trainer.mix = mix
    for callback in callbacks:
        trainer.add_callback(callback)
    if with_graphs:
        trainer.graph.wanted = True
    trainer.train()
    return trainer


def assert_same_weights(one, other):
    for (name, tensor), same in zip(one.state_dict().items(), other.state_dict().values()):
        assert torch.equal(tensor, same), name


@pytest.mark.parametrize(
    "options",
    [
        *METHODS,
        {"bf16": True, "use_cpu": True},
    ],
    ids=lambda options: next(iter(options)),
)
def test_a_run_with_graphs_ends_with_the_weights_of_one_without(options, recordings, tmp_path):
    plain = train(tmp_path / "plain", False, **options)
    assert not recordings
    graphs = train(tmp_path / "graphs", True, **options)
    assert len(recordings) == 1
    assert_same_weights(plain.plain_model, graphs.plain_model)
    for one, other in zip(plain.checkpointed, graphs.checkpointed):
        assert all(torch.equal(tensor, other.tensors()[name]) for name, tensor in one.tensors().items())
    assert plain.state.log_history[-1]["train_loss"] == graphs.state.log_history[-1]["train_loss"]
    assert not graphs.graph.recordings  # their memory is free


def test_smaller_batches_run_without_the_graph(recordings, tmp_path):
    # 8 images in batches of 3: the last batch of each epoch has 2.
    options = {"max_steps": 6, "per_device_train_batch_size": 3, **EVERY_STEP}
    plain, graphs = train(tmp_path / "plain", False, **options), train(tmp_path / "graphs", True, **options)
    assert len(recordings) == 1
    assert_same_weights(plain.plain_model, graphs.plain_model)


def test_the_model_that_a_training_creates_is_the_one_that_is_recorded(recordings, tmp_path):
    trainers = []
    for with_graphs in (False, True):
        given = tiny_trainer(tmp_path / str(with_graphs), learning_rate=0.01)
        trainer = DistillationTrainer(model_init=tiny_model, args=given.args, train_dataset=given.train_dataset)
        trainer.graph.wanted = with_graphs
        before = trainer.plain_model
        trainer.train()
        assert trainer.plain_model is not before
        trainers.append(trainer)
    assert len(recordings) == 1
    assert_same_weights(*(trainer.plain_model for trainer in trainers))


def test_mixed_and_unmixed_batches_have_a_recording_each(recordings, tmp_path):
    def create_mix():
        kinds = itertools.cycle((True, False))

        def mix(images, labels):
            return (images, torch.nn.functional.one_hot(labels, 3).float()) if next(kinds) else (images, labels)

        return mix

    plain = train(tmp_path / "plain", False, mix=create_mix(), max_steps=5)
    graphs = train(tmp_path / "graphs", True, mix=create_mix(), max_steps=5)
    assert len(recordings) == 2
    assert_same_weights(plain.plain_model, graphs.plain_model)


class ChangeOfStepTwo(TrainerCallback):
    def __init__(self, change):
        self.change = change

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 1:
            self.change(args, model)


def faster_statistics(args, model):
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm1d):
            module.momentum = 0.9


def freeze_stem(args, model):
    model.binaryvit.embeddings.requires_grad_(False)


def drop_paths(args, model):
    for module in model.modules():
        if hasattr(module, "drop_prob"):
            module.drop_prob = 0.9


def replace_statistics(args, model):
    norm = next(module for module in model.modules() if isinstance(module, torch.nn.BatchNorm1d))
    norm.running_mean = norm.running_mean + 1


def add_label_loss(args, model):
    args.label_loss_weight = 0.5


@pytest.mark.parametrize(
    "change",
    [faster_statistics, freeze_stem, drop_paths, replace_statistics, add_label_loss],
    ids=lambda change: change.__name__,
)
def test_a_change_during_training_takes_effect(change, recordings, tmp_path):
    plain = train(tmp_path / "plain", False, ChangeOfStepTwo(change))
    graphs = train(tmp_path / "graphs", True, ChangeOfStepTwo(change))
    assert len(recordings) == 2
    assert_same_weights(plain.plain_model, graphs.plain_model)


def test_a_network_that_changes_at_every_step_is_not_recorded_for_ever(recordings, caplog):
    model = tiny_model().train()
    images, labels = tiny_images(), torch.tensor([0, 1])
    graph = step_graph(model)
    for step in range(40):  # often, but not at every step
        graph.loss(model, images, labels, step // 10)
    assert len(recordings) == 4 and graph.wanted
    for step in range(20):
        graph.loss(model, images, labels, step / 20)
    assert len(recordings) == 4 + 5 and not graph.wanted and not graph.recordings
    assert caplog.text.count("changes too often") == 1


@pytest.mark.parametrize("of", ["weight", "module"])
def test_a_network_with_hooks_runs_without_graphs(of, recordings, caplog):
    """A graph calls no hook of a module, and its gradients would go through the hook of a weight twice."""
    model = tiny_model().train()
    graph, calls = step_graph(model), []
    images, labels = tiny_images(), torch.tensor([0, 1])[: len(tiny_images())]
    graph.loss(model, images, labels)
    if of == "weight":
        model.classifier.bias.register_hook(lambda grad: calls.append("hook") or 2 * grad)
    else:
        model.classifier.register_forward_hook(lambda *_: calls.append("hook"))
    for _ in range(2):
        graph.loss(model, images, labels).backward()
    assert calls == ["hook", "hook"]
    assert len(recordings) == 1 and not graph.recordings
    assert caplog.text.count("without CUDA graphs while the network has hooks") == 1


def test_a_recording_takes_no_weight_that_autocast_has_kept(monkeypatch):
    network = torch.nn.Linear(4, 3)

    def record_with_other_weights(step):
        for _ in range(cuda_graphs.WARM_UPS):
            step()
        with torch.no_grad():
            network.weight.mul_(2)
        step()

    monkeypatch.setattr(cuda_graphs, "record", record_with_other_weights)
    forward = torch.autocast("cpu", torch.bfloat16)(network)  # as accelerate wraps it
    with torch.autocast("cpu", torch.bfloat16):
        recorded = cuda_graphs.RecordedLoss(
            network, lambda images, labels: forward(images).square().mean(), torch.ones(2, 4), torch.zeros(2)
        )
    assert recorded.value == forward(torch.ones(2, 4)).square().mean()


def test_compiled_layers_are_recorded_too(recordings, tmp_path):
    """Once eagerly, then compiled: the run begins with eager steps that it times."""
    trainer = tiny_trainer(tmp_path, tiny_model(class_token_config(depths=[1])), max_steps=2)
    trainer.graph.wanted = True
    layers = CompiledLayers(trainer.plain_model, "eager")
    images, labels = tiny_images(), torch.tensor([0, 1])[: len(tiny_images())]
    trainer.plain_model.train()
    losses = []
    for compiled in (None, layers):
        with compiled.active() if compiled else contextlib.nullcontext():
            losses.append(trainer.graph.loss(trainer.plain_model, images, labels, compiled))
    assert len(recordings) == 2
    torch.testing.assert_close(*losses)


def class_loss(model, images, labels):
    return torch.nn.functional.cross_entropy(model(images).logits, labels), None


def step_graph(model, wanted: bool | str = True):
    return StepGraph(model, class_loss, wanted)


def test_a_graph_is_recorded_again_for_other_batches_and_moved_weights(recordings):
    model = tiny_model().train()
    graph = step_graph(model)
    images, labels = tiny_images(), torch.tensor([0, 1])[: len(tiny_images())]
    for count in (1, 1):
        graph.loss(model, images, labels, None)
        assert len(recordings) == count
    graph.loss(model, torch.cat([images, images]), torch.cat([labels, labels]), None)
    assert len(recordings) == 2
    weight = next(model.parameters())
    weight.data = weight.data.clone() + 1
    model.zero_grad()
    graph.loss(model, images, labels, None).backward()
    assert len(recordings) == 3
    gradient = weight.grad
    model.zero_grad()
    class_loss(model, images, labels)[0].backward()
    assert torch.equal(gradient, weight.grad)


def test_the_gradients_of_a_batch_are_refused_once_the_graph_has_run_again(recordings):
    model = tiny_model().train()
    graph = step_graph(model)
    images, labels = tiny_images(), torch.tensor([0, 1])[: len(tiny_images())]
    first = graph.loss(model, images, labels, None)
    value = first.item()
    graph.loss(model, images + 1, labels, None)
    assert first.item() == value
    with pytest.raises(RuntimeError, match="has run again"):
        first.backward()


class TensorsOfTheCpu(TorchDispatchMode):
    """Collects the operations that take or return a tensor of the CPU."""

    def __init__(self):
        super().__init__()
        self.operations = set()

    def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):
        result = operation(*arguments, **(keywords or {}))
        tensors = [leaf for leaf in tree_leaves((arguments, keywords, result)) if isinstance(leaf, torch.Tensor)]
        if any(tensor.is_cpu for tensor in tensors):
            self.operations.add(str(operation))
        return result


@pytest.mark.parametrize("is_soft", [False, True])
def test_a_step_takes_no_tensor_of_the_cpu(is_soft, tmp_path):
    """A recording would take it as a constant. On the meta device."""
    numbers = {"weight_regularization": 0.1, "label_smoothing_factor": 0.1, "distillation_temperature": 2.0}
    teacher, normal = tiny_teacher(), ModelInput((16, 32), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), (0, 1, 2))
    adapt_input(teacher, given=normal, wanted=replace(normal, mean=(0.1, 0.5, 0.5), channels=(2, 1, 0)))
    trainer = tiny_trainer(tmp_path, tiny_model(tiny_config(drop_path_rate=0.5)), teacher=teacher, **numbers)
    SignGradient("tanh").on_train_begin(SimpleNamespace(device=torch.device("meta")), None, None, model=trainer.model)
    model, images = trainer.model.to("meta").train(), tiny_images().to("meta")
    teacher.to("meta")
    labels = torch.zeros((len(images), 3) if is_soft else len(images), dtype=None if is_soft else torch.long).to(
        "meta"
    )
    with TensorsOfTheCpu() as watched:
        loss, _ = trainer.batch_loss(model, images, labels)
        gradients = torch.autograd.grad(loss, [*model.parameters()])
    assert loss.is_meta and all(gradient.is_meta for gradient in gradients)
    assert watched.operations == set()


def test_a_failed_recording_is_a_clear_error_or_the_step_without_a_graph(monkeypatch):
    def fail(step):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(cuda_graphs, "record", fail)
    model = tiny_model().train()
    images, labels = tiny_images(), torch.tensor([0, 1])[: len(tiny_images())]
    with pytest.raises(UserError, match="--cuda_graphs: recording failed: operation not permitted"):
        step_graph(model).loss(model, images, labels, None)
    graph = step_graph(model, "auto")
    assert torch.equal(graph.loss(model, images, labels, None), class_loss(model, images, labels)[0])
    assert graph.wanted is False


def test_a_batch_that_is_too_large_for_a_recording_runs_without(recordings, caplog):
    """With "auto"; a smaller one is recorded. A smaller last batch would need the memory of the eager step, too."""
    model, images, labels = tiny_model().train(), tiny_images(4), torch.tensor([0, 1, 0, 1])
    passes: list[int] = []

    def loss_in_little_memory(model, images, labels):
        passes.append(0)
        if len(images) == 4 and len(passes) == cuda_graphs.WARM_UPS + 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return class_loss(model, images, labels)

    graph = StepGraph(model, loss_in_little_memory, "auto")
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            assert torch.equal(graph.loss(model, images, labels), class_loss(model, images, labels)[0])
    assert caplog.text.count("does not hold another batch of 4 images beside the recorded one") == 1
    assert len(recordings) == 1 and [*graph.recordings.values()] == [None]
    graph.loss(model, images[:2], labels[:2])
    assert len(recordings) == 2 and None not in graph.recordings.values()
    passes.clear()
    with pytest.raises(torch.OutOfMemoryError):
        StepGraph(model, loss_in_little_memory, True).loss(model, images, labels)


def test_a_failed_recording_leaves_the_stream_and_the_random_generator_usable(monkeypatch):
    """PyTorch's own end of a recording raises an error too, which says less, and skips its clean-up."""
    device = torch.device("cuda", 0)
    current = before = SimpleNamespace(device=device, wait_stream=lambda stream: None)

    def set_stream(stream):
        nonlocal current
        current = stream

    @contextlib.contextmanager
    def capture(graph, capture_error_mode):
        set_stream("capture")
        try:
            yield
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    generator = SimpleNamespace(state="capturing", clone_state=lambda: "clone")
    generator.graphsafe_set_state = lambda state: setattr(generator, "state", state)
    for name, value in {
        "current_stream": lambda: current,
        "Stream": lambda: before,
        "stream": lambda stream: contextlib.nullcontext(),
        "set_stream": set_stream,
        "CUDAGraph": object,
        "graph": capture,
        "default_generators": (generator,),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)

    def step():
        if current == "capture":
            raise torch.OutOfMemoryError("too large")

    with pytest.raises(torch.OutOfMemoryError, match="too large"):
        cuda_graphs.record(step)
    assert current is before
    assert generator.state == "clone"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize(
    "options", [{}, {"sign_gradient": "tanh"}, {"bf16": True}, {"gradient_accumulation_steps": 2}], ids=str
)
def test_recorded_steps_on_a_gpu_have_the_losses_of_launched_ones(options, tmp_path):
    plain, graphs = (train(tmp_path / str(on), on, max_steps=4, **options) for on in (False, True))
    losses = [trainer.state.log_history[-1]["train_loss"] for trainer in (plain, graphs)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_random_numbers_go_on_after_a_recording_on_a_gpu_has_failed():
    weight, images = torch.ones(2, device="cuda", requires_grad=True), torch.ones(2, device="cuda")
    module = torch.nn.Module()
    module.weight = torch.nn.Parameter(weight.detach())
    reads = []

    def waits_when_recorded(images, labels):
        reads.append(0)
        loss = (module.weight * images * torch.rand_like(images)).sum()
        return loss if len(reads) <= cuda_graphs.WARM_UPS else loss * loss.item()

    with pytest.raises(RuntimeError):
        cuda_graphs.RecordedLoss(module, waits_when_recorded, images, images)
    assert torch.rand(2, device="cuda").isfinite().all()
    recorded = cuda_graphs.RecordedLoss(module, lambda images, labels: (module.weight * images).sum(), images, images)
    assert recorded(images + 1, images).item() == 4


def test_graphs_need_a_gpu_and_auto_does_without(tmp_path):
    arguments = DistillationTrainingArguments(output_dir=str(tmp_path), cuda_graphs="auto", use_cpu=True)
    arguments.check_supported()
    assert arguments.wants_graphs() is False
    with pytest.raises(UserError, match="--cuda_graphs needs an NVIDIA GPU; leave it out"):
        DistillationTrainingArguments(output_dir=str(tmp_path), cuda_graphs="true", use_cpu=True).check_supported()
    with pytest.raises(UserError, match="--cuda_graphs must be true, false or auto, not 'maybe'"):
        DistillationTrainingArguments(output_dir=str(tmp_path), cuda_graphs="maybe")


@pytest.mark.parametrize(
    "options", [{"torch_compile_mode": "reduce-overhead"}, {"torch_compile_backend": "cudagraphs"}]
)
def test_compiled_code_that_makes_graphs_itself_is_not_recorded(options, tmp_path, monkeypatch):
    arguments = DistillationTrainingArguments(output_dir=str(tmp_path), cuda_graphs="auto", use_cpu=True, **options)
    monkeypatch.setattr(DistillationTrainingArguments, "device", torch.device("cuda", 0))
    assert arguments.wants_graphs() is False
    arguments.torch_compile_mode, arguments.torch_compile_backend = "max-autotune-no-cudagraphs", "inductor"
    assert arguments.wants_graphs() == "auto"

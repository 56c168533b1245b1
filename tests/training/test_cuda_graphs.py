"""
Training steps as CUDA graphs: the same weights as without, whatever else the run does.

Without a GPU a recording runs its step again each time, on the same static images and labels.
"""

import contextlib

import pytest
import torch
from tiny import class_token_config, tiny_config, tiny_images, tiny_model
from tiny_training import EVERY_STEP, tiny_teacher, tiny_trainer

from binaryvit_hf import cuda_graphs
from binaryvit_hf.compiled_layers import CompiledLayers
from binaryvit_hf.training.arguments import DistillationTrainingArguments
from binaryvit_hf.training.step_graph import StepGraph
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


def train(folder, with_graphs, wanted=True, **arguments):
    trainer = tiny_trainer(
        folder,
        tiny_model(tiny_config()),
        teacher=tiny_teacher(),
        **{"max_steps": 3, "learning_rate": 0.01} | arguments,
    )
    if with_graphs:
        trainer.graph.wanted = wanted
    trainer.train()
    return trainer


@pytest.mark.parametrize(
    "options",
    [
        {"ema_decay": 0.5, "oscillation_freezing_threshold": 0.01},
        {"sign_gradient": "tanh"},
        {"batch_norm_reestimation_batches": 2, "eval_strategy": "steps", "eval_steps": 1},
        {"weight_regularization": 0.1, "max_grad_norm": 1.0, "gradient_accumulation_steps": 2},
        {"bf16": True, "use_cpu": True},
    ],
    ids=lambda options: next(iter(options)),
)
def test_a_run_with_graphs_ends_with_the_weights_of_one_without(options, recordings, tmp_path):
    plain = train(tmp_path / "plain", False, **options)
    assert not recordings
    graphs = train(tmp_path / "graphs", True, **options)
    assert len(recordings) == 1
    for (name, one), other in zip(plain.plain_model.state_dict().items(), graphs.plain_model.state_dict().values()):
        assert torch.equal(one, other), name
    for one, other in zip(plain.checkpointed, graphs.checkpointed):
        assert all(torch.equal(tensor, other.tensors()[name]) for name, tensor in one.tensors().items())
    assert plain.state.log_history[-1]["train_loss"] == graphs.state.log_history[-1]["train_loss"]
    assert graphs.graph.recorded is None  # its memory is free


def test_smaller_batches_run_without_the_graph(recordings, tmp_path):
    # 8 images in batches of 3: the last batch of each epoch has 2.
    options = {"max_steps": 6, "per_device_train_batch_size": 3, **EVERY_STEP}
    plain, graphs = train(tmp_path / "plain", False, **options), train(tmp_path / "graphs", True, **options)
    assert len(recordings) == 1
    for one, other in zip(plain.plain_model.state_dict().values(), graphs.plain_model.state_dict().values()):
        assert torch.equal(one, other)


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


def test_graphs_need_a_gpu_and_auto_does_without(tmp_path):
    arguments = DistillationTrainingArguments(output_dir=str(tmp_path), cuda_graphs="auto", use_cpu=True)
    arguments.check_supported()
    assert arguments.wants_graphs() is False
    with pytest.raises(UserError, match="--cuda_graphs needs an NVIDIA GPU; leave it out"):
        DistillationTrainingArguments(output_dir=str(tmp_path), cuda_graphs="true", use_cpu=True).check_supported()
    with pytest.raises(UserError, match="--cuda_graphs must be true, false or auto, not 'maybe'"):
        DistillationTrainingArguments(output_dir=str(tmp_path), cuda_graphs="maybe")

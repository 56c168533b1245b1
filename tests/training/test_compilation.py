"""Compiled training steps compute what eager ones do, whatever else the run does, and are chosen if they pay."""

import contextlib
import copy
import json
import logging

import pytest
import torch
from safetensors.torch import load_file
from tiny import one_layer_config, tiny_config, tiny_images, tiny_model
from tiny_training import EVERY_STEP, METHODS, tiny_teacher, tiny_trainer
from torch._dynamo.utils import counters

from binaryvit_hf import compiled_layers, row_kernels
from binaryvit_hf.compiled_layers import CompiledLayers, count_kinds
from binaryvit_hf.network import functional_binaryvit
from binaryvit_hf.training.arguments import DistillationTrainingArguments
from binaryvit_hf.training.callbacks.sign_gradient import TanhSlope, binary_activation_modules
from binaryvit_hf.training.compilation import StepCompiler
from binaryvit_runtime.errors import UserError


COMPILED = {"torch_compile": True, "torch_compile_backend": "eager"}
# Adam would turn the rounding of a gradient that is 0 in theory into a whole step.
PLAIN = {"optim": "sgd", "learning_rate": 0.02, "max_steps": 3}


def small_config(**changes):
    """One kind of layer, twice."""
    return one_layer_config(**({"depths": [2], "use_stem_norm": False} | changes))


def trained(folder, config=None, **arguments):
    trainer = tiny_trainer(folder, tiny_model(config or small_config()), teacher=tiny_teacher(), **PLAIN | arguments)
    trainer.train()
    return trainer


def forget_compiled_graphs() -> None:
    torch.compiler.reset()
    counters.clear()


def compiled_graphs() -> int:
    return counters["stats"]["unique_graphs"]


def assert_same_states(one, other):
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    "options",
    [
        *METHODS,
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    ],
    ids=lambda options: next(iter(options)),
)
def test_a_compiled_run_ends_with_the_weights_of_an_eager_one(options, tmp_path):
    eager = trained(tmp_path / "eager", **options)
    compiled = trained(tmp_path / "compiled", **options, **COMPILED)
    assert compiled.compiler.layers is not None
    assert eager.compiler.layers is None
    assert_same_states(eager.plain_model.state_dict(), compiled.plain_model.state_dict())
    for one, other in zip(eager.checkpointed, compiled.checkpointed):
        assert_same_states(one.tensors(), other.tensors())


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_gradients_and_statistics_of_all_kinds_of_layers_are_those_of_an_eager_step(dtype):
    # Autocast would draw the random numbers of dropout in half precision in one of both.
    eager = tiny_model(small_config() if dtype else tiny_config(attention_probs_dropout_prob=0.1)).train()
    compiled = copy.deepcopy(eager)
    layers = CompiledLayers(compiled, "aot_eager" if dtype else "eager")  # AOTAutograd takes seconds for each kind
    # The stem, layers, and in a pyramid the patch embeddings and the layers of the second stage.
    assert count_kinds(list(layers.calls)) == (2 if dtype else 4)
    for model in (eager, compiled):
        torch.manual_seed(0)
        with layers.active(), torch.autocast("cpu", dtype, enabled=dtype is not None):
            model(tiny_images()).logits.float().square().sum().backward()
    for (name, one), other in zip(eager.named_parameters(), compiled.parameters()):
        torch.testing.assert_close(other.grad, one.grad, rtol=1e-3, atol=1e-5, msg=name)
    assert_same_states(dict(eager.named_buffers()), dict(compiled.named_buffers()))


def test_inductor_computes_the_gradients_of_an_eager_step(monkeypatch):
    if missing := compiled_layers.missing_compiler(torch.device("cpu")):
        pytest.skip(f"needs {missing}")
    eager = tiny_model(small_config(depths=[1])).train()
    compiled = copy.deepcopy(eager)
    # A whole layer takes half a minute.
    monkeypatch.setattr(compiled_layers, "regions", lambda model: [model.binaryvit.stages[0].layers[0].mlp])
    layers = CompiledLayers(compiled)
    before = copy.deepcopy(compiled.state_dict())
    layers.warm_up(tiny_images())
    assert all(torch.equal(tensor, before[name]) for name, tensor in compiled.state_dict().items())
    assert all(weight.grad is None for weight in compiled.parameters())
    eager(tiny_images()).logits.square().sum().backward()
    with layers.active():
        compiled(tiny_images()).logits.square().sum().backward()
    for (name, one), other in zip(eager.named_parameters(), compiled.parameters()):
        torch.testing.assert_close(other.grad, one.grad, rtol=1e-3, atol=1e-4, msg=name)
    assert_same_states(dict(eager.named_buffers()), dict(compiled.named_buffers()))


def test_smaller_batches_and_evaluation_run_eagerly_and_nothing_is_compiled_again(tmp_path):
    forget_compiled_graphs()
    # 8 images in batches of 3: the last batch of each of three epochs has 2.
    trainer = trained(
        tmp_path,
        max_steps=9,
        per_device_train_batch_size=3,
        batch_norm_reestimation_batches=1,
        **EVERY_STEP,
        **COMPILED,
    )
    assert trainer.compiler.layers is not None
    assert compiled_graphs() == 2  # the stem's and the layers'
    trainer.evaluate()
    assert compiled_graphs() == 2
    assert not counters["graph_break"]


def test_layers_of_a_network_are_compiled_once_for_each_kind():
    forget_compiled_graphs()
    model = tiny_model(small_config(depths=[4])).train()
    layers = CompiledLayers(model, "eager")
    assert (len(layers.calls), count_kinds(list(layers.calls))) == (5, 2)
    layers.warm_up(tiny_images())
    assert compiled_graphs() == 2


def test_a_compiled_run_resumes_with_bit_identical_weights(tmp_path):
    whole = trained(tmp_path / "whole", max_steps=4, save_strategy="steps", save_steps=2, **COMPILED)
    resumed = tiny_trainer(
        tmp_path / "resumed",
        tiny_model(small_config()),
        teacher=tiny_teacher(),
        **PLAIN | {"max_steps": 4},
        **COMPILED,
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for name, tensor in whole.plain_model.state_dict().items():
        assert torch.equal(resumed.plain_model.state_dict()[name], tensor), name


def test_a_compiled_network_is_saved_packed_under_the_names_of_an_eager_one(tmp_path):
    trainer = trained(tmp_path, **COMPILED)
    trainer.save_model(_internal_call=True)
    latent = load_file(tmp_path / "latent" / "model.safetensors")
    assert latent.keys() == tiny_model(small_config()).state_dict().keys()
    assert any(tensor.dtype == torch.uint8 for tensor in load_file(tmp_path / "model.safetensors").values())


class Clock:
    """Time that passes as the steps are told to take."""

    def __init__(self, monkeypatch, eager: float, compiled: float):
        self.time, self.eager, self.compiled = 0.0, eager, compiled
        monkeypatch.setattr(StepCompiler, "now", lambda compiler: self.time)

    def train(self, compiler: StepCompiler, steps: int) -> None:
        for step in range(steps):
            with compiler.step(tiny_images(), True, steps - step):
                self.time += self.eager if compiler.layers is None else self.compiled


@pytest.mark.parametrize(
    "steps, compiled, message, layers",
    [
        (1000, 0.1, "A compiled step takes 100 ms, an eager one 1000 ms; about 2 minutes left.", True),
        (
            50,
            0.1,
            "Training steps are not compiled: it takes about 23 seconds and would save about 18 seconds; about 46 seconds left.",
            False,
        ),
        (1000, 2.0, "Training steps are not compiled: a compiled step is not faster than an eager one.", False),
    ],
)
def test_auto_compiles_when_that_saves_more_time_than_it_takes(steps, compiled, message, layers, monkeypatch, caplog):
    monkeypatch.setenv("BINARYVIT_ENGINE", "torch")
    clock = Clock(monkeypatch, eager=1.0, compiled=compiled)
    monkeypatch.setattr(CompiledLayers, "warm_up", lambda *arguments: 1.0)
    monkeypatch.setattr(CompiledLayers, "check", lambda *arguments: None)
    compiler = StepCompiler(tiny_model(small_config()), "auto", torch.device("cpu"))
    compiler.begin(None)
    with caplog.at_level(logging.INFO):
        clock.train(compiler, steps)
    assert message in caplog.messages
    assert (compiler.layers is not None) is layers
    compiler.begin(None)
    assert (compiler.wanted, compiler.layers) == ("auto", None)  # another training decides for itself


@pytest.mark.parametrize(
    "model, reason",
    [
        (
            lambda: tiny_model(small_config(weight_bits=32)),
            "compiling saves little time for a network without 1-bit layers",
        ),
        (tiny_teacher, "compiling saves little time for a network without 1-bit layers"),
        (lambda: tiny_model(small_config()), "this machine has no C++ compiler (no-such-compiler)"),
    ],
)
def test_auto_stays_eager_and_says_why(model, reason, monkeypatch, caplog):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("BINARYVIT_ENGINE", "torch")
    compiler = StepCompiler(model(), "auto", torch.device("cpu"))
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            compiler.begin(None)  # as a run that resumes does
        Clock(monkeypatch, eager=1.0, compiled=0.1).train(compiler, 9)
    assert caplog.messages == [f"Training steps are not compiled: {reason}."]
    assert compiler.wanted is False


def test_auto_does_not_compile_what_row_kernels_compute(monkeypatch):
    monkeypatch.delenv("BINARYVIT_ENGINE", raising=False)
    if row_kernels.problem():
        pytest.skip("the row kernels are not built")

    def runs_on_kernels(device="cpu", is_float32=True, slope=None, **changes) -> bool:
        model = tiny_model(small_config(**changes))
        for module in binary_activation_modules(model) if slope else ():
            module.sign_slope = slope
        compiler = StepCompiler(model, "auto", torch.device(device), "aot_eager", is_float32=is_float32)
        return "row kernels" in str(compiler.reason_against())

    assert runs_on_kernels()
    assert not runs_on_kernels(device="cuda")
    assert not runs_on_kernels(is_float32=False)
    assert not runs_on_kernels(slope=TanhSlope())
    assert not runs_on_kernels(input_bits=4)


def test_a_resumed_run_repeats_the_choice_of_its_checkpoint(tmp_path):
    for compiled in (True, False):
        (tmp_path / "compilation.json").write_text(json.dumps({"compiled": compiled}))
        compiler = StepCompiler(tiny_model(small_config()), "auto", torch.device("cpu"))
        compiler.begin(tmp_path)
        assert compiler.wanted is compiled


def test_a_failed_compilation_leaves_auto_eager_and_ends_a_run_that_asked_for_it(monkeypatch, caplog):
    monkeypatch.setenv("BINARYVIT_ENGINE", "torch")

    def fail(*arguments):
        raise RuntimeError("There is no header.\nMore.")

    monkeypatch.setattr(CompiledLayers, "warm_up", fail)
    compiler = StepCompiler(tiny_model(small_config()), "auto", torch.device("cpu"))
    with caplog.at_level(logging.INFO):
        Clock(monkeypatch, eager=1.0, compiled=0.1).train(compiler, 1000)
    assert compiler.layers is None
    assert "Training steps are not compiled: compilation failed: There is no header." in caplog.messages
    compiler = StepCompiler(tiny_model(small_config()), True, torch.device("cpu"))
    with pytest.raises(UserError, match=r"^--torch_compile: compilation failed: There is no header\.$"):
        Clock(monkeypatch, eager=1.0, compiled=0.1).train(compiler, 1)


def test_no_operation_in_place_has_written_the_result_of_a_function_under_a_compiler(monkeypatch):
    # PyTorch 2.11 would give such a result no gradient.
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    seen = set()

    def watch(function, forward):
        def watched(ctx, *arguments):
            results = forward(ctx, *arguments)
            seen.add(function.__name__)
            assert all(result._version == 0 for result in (results if isinstance(results, tuple) else (results,)))
            return results

        monkeypatch.setattr(function, "forward", staticmethod(watched))

    functions = [value for value in vars(functional_binaryvit).values() if is_function(value)]
    for function in functions:
        watch(function, function.forward)
    for config in (tiny_config(), small_config(input_bits=2), small_config(weight_bits=4)):
        for output_attentions in (False, True):
            tiny_model(config).train()(tiny_images(), output_attentions=output_attentions)
    assert seen == {function.__name__ for function in functions} - {"SyncedBatchNorm"}  # of several processes


def is_function(value) -> bool:
    return (
        isinstance(value, type) and issubclass(value, torch.autograd.Function) and value is not torch.autograd.Function
    )


def test_a_compiler_that_loses_gradients_is_found_before_training():
    layers = CompiledLayers(tiny_model(small_config()).train(), "eager")
    layers.check(tiny_images())
    last = list(layers.calls)[-1]
    layers.calls[last] = lambda *arguments, **kwargs: type(last).forward(last, *arguments, **kwargs).detach()
    with pytest.raises(RuntimeError, match=r"loses the gradients of \d+ of \d+ weights, such as binaryvit\."):
        layers.check(tiny_images())


def test_a_compiler_that_loses_gradients_is_found_although_weights_are_zero():
    model = tiny_model(small_config()).train()
    with torch.no_grad():
        for weight in (model.classifier.weight, model.classifier.bias, model.binaryvit.norm.batch_norm.weight):
            weight.zero_()
    layers = CompiledLayers(model, "eager")
    before, random_state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    assert not any(gradient.any() for name, gradient in layers.gradients(tiny_images()).items() if "layer" in name)
    layers.check(tiny_images())
    last = list(layers.calls)[-1]
    layers.calls[last] = lambda *arguments, **kwargs: type(last).forward(last, *arguments, **kwargs).detach()
    with pytest.raises(RuntimeError, match=r"loses the gradients of \d+ of \d+ weights, such as binaryvit\."):
        layers.check(tiny_images())
    assert_same_states(before, model.state_dict())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(weight.grad is None for weight in model.parameters())


@pytest.mark.parametrize("share, is_lost", [(0.4, False), (0.0, True)])
def test_gradients_of_layers_that_compiled_code_drops_at_random_are_not_lost(share, is_lost, monkeypatch):
    layers = CompiledLayers(tiny_model(small_config()), "eager")
    monkeypatch.setattr(layers, "gradients", lambda images: {"a": torch.ones(2), "b": torch.ones(2)})
    drawn = []

    def draw(images):
        drawn.append(torch.rand(()) < share)
        return {"a": torch.ones(2), "b": drawn[-1] * torch.ones(2)}

    monkeypatch.setattr(layers, "draw_gradients", draw)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="1 of 2 weights, such as b") if is_lost else contextlib.nullcontext():
        layers.check(tiny_images())
    assert drawn == [False] * 10 if is_lost else drawn == [False, False, True]
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("size, is_lost", [(1e-8, False), (1e-3, True)])
def test_rounding_errors_of_zeros_are_not_gradients(size, is_lost, monkeypatch):
    layers = CompiledLayers(tiny_model(small_config()), "eager")
    gradients = {"a": torch.ones(2), "b": size * torch.ones(2)}
    monkeypatch.setattr(layers, "gradients", lambda images: gradients)
    monkeypatch.setattr(layers, "draw_gradients", lambda images: gradients | {"b": torch.zeros(2)})
    with pytest.raises(RuntimeError, match="1 of 2 weights, such as b") if is_lost else contextlib.nullcontext():
        layers.check(tiny_images())


@pytest.mark.parametrize(
    "value, choice", [("true", True), ("True", True), (True, True), ("false", False), (False, False), ("auto", "auto")]
)
def test_torch_compile_is_true_false_or_auto(value, choice, tmp_path):
    assert DistillationTrainingArguments(str(tmp_path), report_to="none", torch_compile=value).torch_compile == choice


def test_another_value_of_torch_compile_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"--torch_compile must be true, false or auto, not 'sometimes'\."):
        DistillationTrainingArguments(str(tmp_path), report_to="none", torch_compile="sometimes")


def test_a_missing_compiler_is_named_before_training(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    arguments = DistillationTrainingArguments(str(tmp_path), report_to="none", use_cpu=True, torch_compile=True)
    with pytest.raises(UserError, match=r"--torch_compile needs a C\+\+ compiler \(no-such-compiler\)"):
        arguments.check_supported()


def test_every_rate_of_stochastic_depth_is_a_kind_of_layers():
    forget_compiled_graphs()
    layers = CompiledLayers(tiny_model(small_config(depths=[2], drop_path_rate=0.3)).train(), "eager")
    layers.warm_up(tiny_images())
    assert compiled_graphs() == count_kinds(list(layers.calls)) == 3


def test_a_compiled_step_needs_no_value_and_no_tensor_of_another_device():
    # On the meta device, where such an operation fails as it would wait or fail on a GPU.
    model, slope = tiny_model(small_config()).to("meta").train(), TanhSlope()
    for module in binary_activation_modules(model):
        module.sign_slope = slope
    layers = CompiledLayers(model, "eager")
    layers.warm_up(tiny_images().to("meta"))
    with layers.active():
        model(tiny_images().to("meta")).logits.sum().backward()
    assert all(weight.grad.is_meta for weight in model.parameters())

"""Gradients of the sign: their closed forms, and every sign of a network gets the chosen one."""

import math
from types import SimpleNamespace

import pytest
import torch
from tiny import tiny_config, tiny_images, tiny_model
from tiny_training import tiny_trainer
from torch._dynamo.testing import CompileCounterWithBackend

from binaryvit_hf.network.functional_binaryvit import ApproxSign, SignLinear, approx_sign_slope
from binaryvit_hf.training.callbacks.sign_gradient import (
    SignGradient,
    TanhSlope,
    binary_activation_modules,
    clip_slope,
)
from binaryvit_runtime.errors import UserError


BESIDE_ONE = math.nextafter(1.0, 2.0)
STEPS_OF_CLIP = [(-BESIDE_ONE, 0.0), (-1.0, 1.0), (0.0, 1.0), (0.5, 1.0), (1.0, 1.0), (BESIDE_ONE, 0.0)]


@pytest.mark.parametrize("value, slope", STEPS_OF_CLIP)
def test_clip_is_one_up_to_its_edge(value, slope):
    x = torch.tensor([value], dtype=torch.float64, requires_grad=True)
    y = ApproxSign.apply(x, torch.zeros(1, dtype=torch.float64), clip_slope)
    y.backward()
    assert y.item() == (1.0 if value >= 0 else -1.0)
    assert x.grad.item() == slope


@pytest.mark.parametrize("progress, t, k", [(0.0, 0.1, 10.0), (0.5, 1.0, 1.0), (1.0, 10.0, 1.0)])
def test_tanh_is_the_slope_of_a_tanh_that_sharpens(progress, t, k):
    slope = TanhSlope()
    slope.set_progress(progress)
    x = torch.tensor([-2.0, -0.1, 0.0, 0.3, 1.5], dtype=torch.float64, requires_grad=True)
    (k * torch.tanh(t * x)).sum().backward()
    torch.testing.assert_close(slope(x.detach()), x.grad)
    assert slope(torch.zeros(1)).item() == pytest.approx(k * t)


@pytest.mark.parametrize("slope", [clip_slope, TanhSlope()])
def test_product_takes_the_same_gradient_and_leaves_its_input_alone(slope):
    generator = torch.Generator().manual_seed(0)
    x, shift, weight = (
        torch.randn(shape, dtype=torch.float64, generator=generator) for shape in ((7, 4), (4,), (3, 4))
    )
    inputs = [tensor.requires_grad_() for tensor in (x, shift, weight)]
    before = x.detach().clone()
    fused = torch.autograd.grad(SignLinear.apply(*inputs, 32, slope).square().sum(), inputs)
    composed = torch.autograd.grad((ApproxSign.apply(x, shift, slope) @ weight.T).square().sum(), inputs)
    torch.testing.assert_close(fused, composed)
    assert torch.equal(x, before)


def test_tanh_computes_on_the_device_of_the_training():
    callback = SignGradient("tanh")
    callback.on_train_begin(SimpleNamespace(device=torch.device("meta")), None, None, model=tiny_model())
    assert callback.slope.steepness.device.type == callback.slope.height.device.type == "meta"


def test_every_sign_of_a_network_gets_the_gradient_that_training_chose(tmp_path):
    trainer = tiny_trainer(tmp_path, sign_gradient="tanh", max_steps=4)
    trainer.train()
    takers = binary_activation_modules(trainer.model)
    # three layers: query, key, value, output, fc1, fc2 and the attention's own; two reductions; one patch embedding
    assert len(takers) == 3 * 7 + 2 + 1
    assert all(taker.sign_slope is takers[0].sign_slope for taker in takers)
    assert takers[0].sign_slope.steepness.item() == 0.1 * 100**0.75  # set when the last step begins
    assert "sign_gradient" not in trainer.model.config.to_dict()


def test_no_sign_of_a_network_keeps_the_default_gradient(monkeypatch):
    """With a slope of zero no gradient reaches query, key and value."""
    model = tiny_model().train()
    for taker in binary_activation_modules(model):
        taker.sign_slope = torch.zeros_like
    model(tiny_images()).logits.sum().backward()
    shifts = [p.grad for name, p in model.named_parameters() if name.endswith(("linear.shift", "projection.shift"))]
    shifts += [
        p.grad for name, p in model.named_parameters() if name.endswith(("query_shift", "key_shift", "value_shift"))
    ]
    assert len(shifts) == 3 * 9 + 2 + 1
    assert not any(grad.any() for grad in shifts)


def test_the_next_training_begins_with_the_gradient_that_it_chose(tmp_path):
    model = tiny_model()
    tiny_trainer(tmp_path, model=model, sign_gradient="clip", max_steps=1).train()
    assert {taker.sign_slope for taker in binary_activation_modules(model)} == {clip_slope}
    tiny_trainer(tmp_path, model=model, max_steps=1).train()
    assert {taker.sign_slope for taker in binary_activation_modules(model)} == {approx_sign_slope}


def test_a_network_without_binary_activations_is_refused(tmp_path):
    with pytest.raises(UserError, match="--sign_gradient clip is for networks of 1-bit activations"):
        tiny_trainer(tmp_path, model=tiny_model(tiny_config(input_bits=32)), sign_gradient="clip").train()


@pytest.mark.parametrize("slope", [clip_slope, TanhSlope()])
def test_the_gradient_is_not_compiled_again_as_it_sharpens(slope):
    shift, weight = torch.zeros(4), torch.randn(3, 4)
    x = torch.randn(5, 4, requires_grad=True)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda x: SignLinear.apply(x, shift, weight, 32, slope), backend=counter, fullgraph=True)
    counts = set()
    for progress in (0.25, 0.5, 0.75):
        if isinstance(slope, TanhSlope):
            slope.set_progress(progress)
        torch.testing.assert_close(
            torch.autograd.grad(compiled(x).square().sum(), x),
            torch.autograd.grad(SignLinear.apply(x, shift, weight, 32, slope).square().sum(), x),
        )
        counts.add(counter.frame_count)
    assert len(counts) == 1

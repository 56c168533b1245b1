"""Quantizers and their gradients against closed forms, on and beside every kink."""

import pytest
import torch

from binaryvit_hf.network.functional_binaryvit import (
    ApproxSign,
    BinarizeWeight,
    QuantizeMultiBit,
    QuantizeProbability,
    binary_sign,
    quantize_input,
    quantize_weight,
)


KINKS = [(-2.0, 0.0), (-1.0, 0.0), (-0.5, 1.0), (0.0, 2.0), (0.25, 1.5), (0.5, 1.0), (1.0, 0.0), (2.0, 0.0)]


@pytest.mark.parametrize("value, slope", KINKS)
def test_approx_sign_value_and_gradient_match_the_closed_form(value, slope):
    x = torch.tensor([[value]], requires_grad=True)
    y = ApproxSign.apply(x, torch.zeros(1))
    y.backward(torch.ones_like(y))
    assert y.item() == (1.0 if value >= 0 else -1.0)  # a bit has no third state
    assert x.grad.item() == slope


def test_approx_sign_shift_moves_the_threshold_and_gathers_the_gradient():
    x = torch.tensor([[-0.25], [0.5]])
    shift = torch.tensor([0.25], requires_grad=True)
    y = ApproxSign.apply(x, shift)
    y.sum().backward()
    assert y.flatten().tolist() == [1.0, 1.0]
    assert shift.grad.item() == 2.0 + 0.5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_binary_sign_of_either_zero_is_plus_one_in_every_dtype(dtype):
    signs = binary_sign(torch.tensor([0.0, -0.0, 1e-4, -1e-4], dtype=dtype))
    assert signs.dtype == dtype
    assert signs.tolist() == [1, 1, 1, -1]


def test_binary_weight_is_the_sign_of_the_centred_row_times_the_mean_of_the_uncentred_one():
    weight = torch.tensor([[3.0, 1.0], [-0.5, 0.25]])
    assert BinarizeWeight.apply(weight, True).tolist() == [[2.0, -2.0], [-0.375, 0.375]]
    assert BinarizeWeight.apply(weight, False).tolist() == [[2.0, 2.0], [-0.375, 0.375]]


@pytest.mark.parametrize("weight", [[[-1.5, -1.0, 0.0, 1.0, 1.0]], [[0.3, -0.4, 2.5, 0.9, 1.7]]], ids=str)
@pytest.mark.parametrize("center", [True, False])
def test_a_binary_weight_has_the_gradient_of_the_clamped_centred_weight(weight, center):
    weight = torch.tensor(weight, dtype=torch.float64, requires_grad=True)
    upstream = torch.arange(1.0, 6.0, dtype=torch.float64)[None]
    BinarizeWeight.apply(weight, center).backward(upstream)

    centred = weight - weight.mean(1, keepdim=True) if center else weight
    passed = upstream * (centred.abs() <= 1)
    torch.testing.assert_close(weight.grad, passed - passed.mean(1, keepdim=True) if center else passed)


@pytest.mark.parametrize(
    "probability, value, slope, step_slope",
    [(0.0, 0, 1, 0.0), (0.1, 0, 1, -0.2), (0.3, 0.5, 1, 0.4), (0.5, 0.5, 1, 0.0), (0.75, 0.5, 0, 1.0)],
)
def test_binary_probability_matches_the_closed_form(probability, value, slope, step_slope):
    p = torch.tensor([probability], requires_grad=True)
    step = torch.tensor(0.5, requires_grad=True)
    quantized = QuantizeProbability.apply(p, step, 1)
    quantized.sum().backward()
    assert quantized.item() == value
    assert p.grad.item() == slope
    assert step.grad.item() == pytest.approx(step_slope)


def test_two_bit_weight_is_ternary_with_the_threshold_of_twn():
    weight = torch.tensor([[1.0, -0.1], [0.2, -0.7]])  # mean |w| 0.5, threshold 0.35, scale (1 + 0.7) / 2
    torch.testing.assert_close(quantize_weight(weight, 2, 2.5, True), torch.tensor([[0.85, 0.0], [0.0, -0.85]]))


@pytest.mark.parametrize("bits", range(3, 9))
def test_uniform_weight_has_symmetric_levels_that_end_at_the_largest(bits):
    weight = torch.linspace(-2, 2, 1001)[None]
    quantized = quantize_weight(weight, bits, 2.5, True)
    step = 2 / (2 ** (bits - 1) - 1)
    torch.testing.assert_close(quantized, (weight / step).round() * step)
    assert len(quantized.unique()) == 2**bits - 1


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("value, slope", [(-2.6, 0), (-2.5, 1), (0.0, 1), (2.5, 1), (2.6, 0)])
def test_multi_bit_gradient_passes_inside_the_clip_range(bits, value, slope):
    x = torch.tensor([[value, 1.0]], requires_grad=True)
    QuantizeMultiBit.apply(x, bits, 2.5, (-1,)).sum().backward()
    assert x.grad[0, 0].item() == slope


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_multi_bit_of_all_zeros_is_zero(bits):
    assert quantize_weight(torch.zeros(2, 2), bits, 2.5, True).eq(0).all()


@pytest.mark.parametrize("bits", [2, 8])
def test_multi_bit_inputs_of_images_are_independent(bits):
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    together = quantize_input(x, torch.zeros(8), bits, 2.5)
    assert torch.equal(together[:1], quantize_input(x[:1], torch.zeros(8), bits, 2.5))


def test_thirty_two_bits_leave_weight_and_input_untouched():
    x = torch.randn(3, 4)
    assert quantize_weight(x, 32, 2.5, True) is x
    assert torch.equal(quantize_input(x, torch.ones(4), 32, 2.5), x + 1)

"""Row kernels against the PyTorch functions whose twins they are, on every instruction set of this CPU."""

import copy

import pytest
import torch
from tiny import tiny_config, tiny_images, tiny_model
from torch import nn

from binaryvit_hf import row_kernels
from binaryvit_hf.network import functional_binaryvit, layers_binaryvit, modeling_binaryvit
from binaryvit_hf.network.functional_binaryvit import (
    AddAvgPools,
    BinarizeWeight,
    BinaryAttentionProducts,
    BinaryMLPProducts,
    NormShortcutRPReLU,
    SignLinear,
    SyncedBatchNorm,
    approx_sign_slope,
    batch_statistics,
    binary_sign,
    fastest,
    scale_and_shift,
)
from binaryvit_hf.network.layers_binaryvit import BinaryProjection
from binaryvit_hf.row_kernels import TWINS, functions, library


pytestmark = pytest.mark.skipif(row_kernels.problem() is not None, reason="the row kernels are not built")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(params=[*row_kernels.instruction_sets(), "2 threads"])
def kernels(request, monkeypatch):
    """Each instruction set on one thread, and the best one on two."""
    before, sets = torch.get_num_threads(), row_kernels.instruction_sets()
    torch.set_num_threads(1 if request.param in sets else 2)
    chosen = library.load_kernels(request.param if request.param in sets else sets[0])
    monkeypatch.setattr(functions, "load_kernels", lambda: chosen)
    yield
    torch.set_num_threads(before)


def outputs_and_gradients(function, *inputs):
    """Both of a function of tensors, of which the differentiable ones are leaves."""
    leaves = [x for x in inputs if isinstance(x, torch.Tensor) and x.requires_grad]
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(7)
    weights = [torch.randn(output.shape, generator=generator) for output in outputs]
    return outputs, torch.autograd.grad(outputs, leaves, weights)


def assert_twins(function, *inputs):
    """That a function and its twin agree, to the rounding of sums over all rows."""
    expected, expected_grads = outputs_and_gradients(function.apply, *inputs)
    found, grads = outputs_and_gradients(TWINS[function.__name__].apply, *inputs)
    assert_close_outputs(found, expected)
    assert_close_gradients(grads, expected_grads)


def assert_close_outputs(outputs, expected_outputs):
    for output, expected in zip(outputs, expected_outputs, strict=True):
        # Without an instruction for products of bytes PyTorch rounds the sums of a layer's products.
        atol = 1e-6 * max(10, expected.nan_to_num().abs().max().item())
        torch.testing.assert_close(output, expected, rtol=1.3e-6, atol=atol, equal_nan=True)


def assert_close_gradients(grads, expected_grads):
    for grad, expected_grad in zip(grads, expected_grads):
        atol = 1e-5 * max(1, expected_grad.abs().max().item())
        torch.testing.assert_close(grad, expected_grad, rtol=1e-4, atol=atol, equal_nan=True)


def leaf(*shape: int) -> torch.Tensor:
    return torch.randn(shape, requires_grad=True)


def binarized(outputs: int, inputs: int) -> torch.Tensor:
    weight = binary_sign(torch.randn(outputs, inputs)) * (torch.rand(outputs, 1) + 0.1)
    return weight.requires_grad_()


def norm_parameters(channels: int) -> list[torch.Tensor]:
    """Weight, bias, shift_in, slope, shift_out."""
    return [leaf(channels) for _ in range(5)]


def statistics_of(norm: nn.BatchNorm1d):
    """`TokenBatchNorm.statistics` of a norm."""
    module = layers_binaryvit.TokenBatchNorm(tiny_config(), norm.num_features)
    module.batch_norm = norm
    return module.statistics


EPS = 0.1  # channels without variance would magnify the rounding of their statistics
# 700 x 48 elements are divided between threads.
SIZES = [(2, 1, 1), (7, 3, 5), (65, 16, 33), (700, 48, 96)]


@pytest.mark.parametrize("rows, inputs, outputs", SIZES)
def test_sign_linear(kernels, rows, inputs, outputs):
    assert_twins(SignLinear, leaf(rows, inputs), leaf(inputs), binarized(outputs, inputs), 1)


def test_a_cpu_without_byte_products(monkeypatch):
    monkeypatch.setattr(functions, "HAS_BYTE_PRODUCTS", False)
    assert_twins(SignLinear, leaf(65, 16), leaf(16), binarized(33, 16), 1)


@pytest.mark.parametrize("batch_rows", [0, "batch"])
@pytest.mark.parametrize("rows, channels", [(2, 1), (7, 3), (65, 24), (700, 48)])
@pytest.mark.parametrize("ratio", [1 / 3, 1, 2, 8, 12])
def test_norm_shortcut_and_rprelu(kernels, rows, channels, ratio, batch_rows):
    if channels * ratio != int(channels * ratio):
        pytest.skip("the shortcut does not fit")
    x, shortcut = leaf(rows, channels), leaf(rows, int(channels * ratio))
    mean, variance = x.detach().mean(0), x.detach().var(0, unbiased=False)
    statistics = mean, variance, rows if batch_rows else 0
    assert_twins(NormShortcutRPReLU, x, shortcut, *statistics, EPS, *norm_parameters(channels))


@pytest.mark.parametrize("rows, channels", [(2, 1), (7, 3), (700, 48)])
def test_statistics(kernels, rows, channels):
    x = 3 * torch.randn(rows, channels) + 20  # the variance must not suffer from a large mean
    norms = [nn.BatchNorm1d(channels, momentum=0.3) for _ in range(2)]
    version = norms[1].running_mean._version
    expected = batch_statistics([x], norms[0])
    found = TWINS["batch_statistics"]([x], norms[1])
    torch.testing.assert_close(found, expected, equal_nan=True)
    torch.testing.assert_close(norms[1].state_dict(), norms[0].state_dict())
    assert norms[1].running_mean._version > version  # the inference engine reads the model again
    with pytest.raises(ValueError, match="more than 1 value"):
        TWINS["batch_statistics"]([x[:1]], norms[1])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("rows, channels", [(2, 1), (9, 3), (20, 600), (700, 48)])
def test_a_projection(kernels, monkeypatch, rows, channels, training):
    monkeypatch.setattr(functions, "BLOCK_ELEMENTS", 64 * channels)
    layer = BinaryProjection(tiny_config(batch_norm_eps=EPS), channels, channels)
    for weight in layer.parameters():
        weight.data = torch.randn(weight.shape)
    layer.norm_activation.norm.train(training)
    layers, results = [layer, copy.deepcopy(layer)], []
    x = leaf(1, rows, channels)
    for engine, copied in zip(("torch", ""), layers):
        monkeypatch.setenv("BINARYVIT_ENGINE", engine)
        output = copied(x)
        weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(7))
        results.append((output, torch.autograd.grad(output, [x, *copied.parameters()], weights)))
    (expected, expected_grads), (found, grads) = results
    assert "BinaryProjection" in str(found.grad_fn.next_functions) and found.shape == x.shape
    assert_close_outputs([found], [expected])
    assert_close_gradients(grads, expected_grads)
    torch.testing.assert_close(layers[1].state_dict(), layers[0].state_dict())


def test_a_projection_calls_hooks_and_wrappers_of_its_parts():
    layer, called = BinaryProjection(tiny_config(), 4, 4), []
    for module in (layer.linear, layer.norm_activation):
        module.register_forward_hook(lambda *arguments: called.append("hook"))
    layer(leaf(1, 5, 4))
    layer = BinaryProjection(tiny_config(), 4, 4)
    layer.linear = nn.Sequential(layer.linear)
    layer.linear[0].register_forward_pre_hook(lambda *arguments: called.append("wrapper"))
    layer(leaf(1, 5, 4))
    assert called == ["hook", "hook", "wrapper"]


# 600 inputs need two bytes for a count.
@pytest.mark.parametrize("rows, width, inner", [(2, 1, 1), (9, 3, 9), (70, 16, 128), (20, 600, 600), (700, 24, 48)])
@pytest.mark.parametrize("training", [True, False])
def test_mlp_products(kernels, monkeypatch, rows, width, inner, training):
    monkeypatch.setattr(functions, "BLOCK_ELEMENTS", 64 * inner)
    norms = [nn.BatchNorm1d(inner).train(training) for _ in range(2)]
    inputs = [leaf(rows, width), leaf(width), binarized(inner, width), leaf(inner), binarized(width, inner)]
    parameters = norm_parameters(inner)
    results = []
    for function, norm in zip((BinaryMLPProducts, TWINS["BinaryMLPProducts"]), norms):
        leaves = [*inputs, 2 * (approx_sign_slope,), statistics_of(norm), EPS, *parameters]
        results.append(outputs_and_gradients(function.apply, *leaves))
    (expected, expected_grads), (found, grads) = results
    assert_close_outputs(found, expected)
    assert_close_gradients(grads, expected_grads)
    torch.testing.assert_close(norms[1].state_dict(), norms[0].state_dict())


@pytest.mark.parametrize("batch_rows", [0, "batch"])
@pytest.mark.parametrize("rows, channels", [(3, 1), (7, 3), (700, 48)])
def test_batch_norm(kernels, rows, channels, batch_rows):
    x = leaf(rows, channels)
    statistics = x.detach().mean(0), x.detach().var(0, unbiased=False), rows if batch_rows else 0
    assert_twins(SyncedBatchNorm, x, *statistics, EPS, leaf(channels), leaf(channels))


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (300, 130), (6, 4, 2, 2)])
def test_binarised_weights(kernels, shape, center):
    assert_twins(BinarizeWeight, leaf(*shape), center)


@pytest.mark.parametrize("rows, channels", [(2, 1), (7, 3), (700, 48)])
def test_scale_and_shift(kernels, rows, channels):
    inputs = leaf(1, rows, channels), leaf(channels), leaf(channels)
    expected, expected_grads = outputs_and_gradients(scale_and_shift, *inputs)
    found, grads = outputs_and_gradients(TWINS["scale_and_shift"], *inputs)
    torch.testing.assert_close(found, expected)
    assert_close_gradients(grads, expected_grads)


@pytest.mark.parametrize(
    "grid_size, channels, kernel_sizes",
    [((1, 1), 1, [(3, 3)]), ((2, 5), 3, [(3, 1), (1, 3), (5, 1), (1, 5)]), ((20, 19), 48, [(3, 1), (1, 3), (7, 5)])],
)
def test_pooling_branches(kernels, grid_size, channels, kernel_sizes):
    shape, scales = (3, grid_size[0] * grid_size[1], channels), [leaf(channels) for _ in kernel_sizes]
    assert_twins(AddAvgPools, leaf(*shape), leaf(*shape), leaf(channels), grid_size, kernel_sizes, *scales)


@pytest.mark.parametrize("used", ["context", "probabilities", "both"])
@pytest.mark.parametrize(
    "batch, queries, keys, heads, head_dim", [(1, 1, 1, 1, 1), (2, 5, 3, 3, 2), (2, 100, 49, 2, 32)]
)
@pytest.mark.parametrize("step", [0.02, 0.3, -0.1])
def test_attention_products(kernels, batch, queries, keys, heads, head_dim, step, used):
    query, key, value = (leaf(batch, tokens, heads * head_dim) for tokens in (queries, keys, keys))
    shifts, step = [leaf(heads * head_dim) for _ in range(3)], torch.tensor(step, requires_grad=True)
    results = []
    for function in (BinaryAttentionProducts, TWINS["BinaryAttentionProducts"]):

        def used_outputs(*tensors, function=function):
            outputs = function.apply(*tensors, heads, approx_sign_slope)
            return outputs if used == "both" else outputs[used == "probabilities"]

        results.append(outputs_and_gradients(used_outputs, query, key, value, *shifts, step))
    (expected, expected_grads), (found, grads) = results
    torch.testing.assert_close(found, expected)
    assert_close_gradients(grads, expected_grads)


def test_signs_of_zeros_and_nan(kernels):
    x = torch.tensor([[0.0, -0.0, float("nan"), -1.0]])
    assert functions.sign_bytes(x, torch.zeros(4)).tolist() == [[1, 1, -1, -1]]


def test_nan_stays_visible(kernels):
    x, shortcut = leaf(40, 3), leaf(40, 3)
    x.data[5, 1] = float("nan")
    statistics = TWINS["batch_statistics"]([x.detach()], nn.BatchNorm1d(3))
    assert_twins(NormShortcutRPReLU, x, shortcut, *statistics, EPS, *norm_parameters(3))
    output = TWINS["NormShortcutRPReLU"].apply(x, shortcut, *statistics, EPS, *norm_parameters(3))
    assert output[:, 1].isnan().all() and not output[:, 0].isnan().any()


def test_threads_do_not_change_results_from_run_to_run():
    inputs = leaf(2000, 32), leaf(32), binarized(32, 32), 1, approx_sign_slope
    first = outputs_and_gradients(TWINS["SignLinear"].apply, *inputs)
    for _ in range(5):
        torch.testing.assert_close(outputs_and_gradients(TWINS["SignLinear"].apply, *inputs), first, rtol=0, atol=0)


# ---- The choice ----


def test_kernels_compute_gradients_of_float32_on_the_cpu_in_one_process(monkeypatch):
    x, shift, weight = leaf(4, 3), leaf(3), binarized(2, 3)
    tensors, twin = [x, shift, weight], TWINS["SignLinear"]
    assert fastest(SignLinear, tensors) is twin
    assert fastest(SignLinear, tensors, has_twin=False) is SignLinear
    for other in (x.double(), x.to("meta"), x.T.contiguous().T, x[:0], x.bfloat16()):
        assert fastest(SignLinear, [other, shift, weight]) is SignLinear
    assert fastest(SignLinear, [tensor.detach() for tensor in tensors]) is SignLinear
    with torch.no_grad():
        assert fastest(SignLinear, tensors) is SignLinear
    with torch.autocast("cpu", torch.bfloat16):
        assert fastest(SignLinear, tensors) is SignLinear
    for name, value in (("row_kernels", None), ("is_distributed", lambda: True)):
        with monkeypatch.context() as patch:
            patch.setattr(functional_binaryvit, name, value)
            assert fastest(SignLinear, tensors) is SignLinear
    monkeypatch.setenv("BINARYVIT_ENGINE", "torch")
    assert fastest(SignLinear, tensors) is SignLinear


def test_kernels_compute_training_of_1_bit_by_the_default_gradient_only(monkeypatch):
    used = set()

    def note(function, tensors, has_twin=True):
        used.update([function.__name__] if has_twin else [])
        return function

    monkeypatch.setattr(layers_binaryvit, "fastest", note)
    monkeypatch.setattr(modeling_binaryvit, "fastest", note)
    monkeypatch.setattr(functional_binaryvit, "fastest", note)
    monkeypatch.setattr(layers_binaryvit, "on_row_kernels", lambda tensors: False)

    def twins_of(train: bool = True, slope=approx_sign_slope, **changes) -> set[str]:
        used.clear()
        model = tiny_model(tiny_config(**changes)).train(train)
        for module in model.modules():
            if hasattr(module, "sign_slope"):
                module.sign_slope = slope
        model(tiny_images())
        return set(used)

    of_signs = {"SignLinear", "BinaryMLPProducts", "BinaryAttentionProducts"}
    assert twins_of() == set(TWINS)
    assert not twins_of(train=False)
    assert twins_of(slope=torch.abs) == set(TWINS) - of_signs
    assert twins_of(weight_bits=2) == set(TWINS) - of_signs - {"BinarizeWeight"} | {"BinaryAttentionProducts"}


def test_compiled_code_has_no_kernels(monkeypatch):
    shift, weight = leaf(4), binarized(3, 4)
    product = torch.compile(
        lambda x: fastest(SignLinear, [x, shift, weight]).apply(x, shift, weight, 1), backend="eager", fullgraph=True
    )
    monkeypatch.setattr(functions, "load_kernels", None)
    product(leaf(5, 4)).sum().backward()


@pytest.mark.parametrize("changes", [{}, {"sequence_reduction_ratios": [1, 1]}, {"intermediate_sizes": [8, 16]}])
def test_a_training_step(monkeypatch, changes):
    results = []
    for engine in ("torch", ""):
        monkeypatch.setenv("BINARYVIT_ENGINE", engine)
        model = tiny_model(tiny_config(**changes)).train()
        loss = nn.functional.cross_entropy(model(tiny_images(6)).logits, torch.arange(6) % 3)
        loss.backward()
        results.append((loss, {name: weight.grad for name, weight in model.named_parameters()}, model.state_dict()))
    (expected_loss, expected_grads, expected_state), (loss, grads, state) = results
    torch.testing.assert_close(loss, expected_loss)
    torch.testing.assert_close(state, expected_state)
    largest = max(grad.abs().max().item() for grad in expected_grads.values())
    torch.testing.assert_close(grads, expected_grads, rtol=1e-3, atol=1e-5 * largest)


# ---- Autograd ----


@pytest.fixture
def product():
    """A leaf and its product by the kernels."""
    x = leaf(6, 4)
    return x, TWINS["SignLinear"].apply(x, leaf(4), binarized(3, 4), 1)


def test_gradients_can_be_computed_twice_but_not_differentiated(product):
    x, output = product
    first = torch.autograd.grad(output.sum(), x, retain_graph=True)
    assert torch.equal(*first, *torch.autograd.grad(output.sum(), x, retain_graph=True))
    (grad,) = torch.autograd.grad(output.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_outputs_can_be_changed_in_place(product):
    x, output = product
    output.mul_(2)
    torch.autograd.grad(output.sum(), x)
    heads = TWINS["BinaryAttentionProducts"].apply(
        *(leaf(2, 3, 4) for _ in range(3)), *(leaf(4) for _ in range(3)), torch.tensor(0.1), 1, approx_sign_slope
    )
    for output in heads:
        output.mul_(2)


def test_a_saved_tensor_changed_in_place_is_an_error(product):
    x, output = product
    x.data.add_(0)
    with torch.no_grad():
        x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()

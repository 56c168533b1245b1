"""Each fused function and layer against its formula, composed of PyTorch's own operations."""

import pytest
import torch
from tiny import tiny_config, tiny_images, tiny_model
from torch import nn

from binaryvit_hf.network import functional_binaryvit
from binaryvit_hf.network.functional_binaryvit import (
    ApproxSign,
    BinarizedWeight,
    BinarizeWeight,
    PackedCounts,
    SignLinear,
    binary_sign,
    map_rows,
    quantize_weight,
)
from binaryvit_hf.network.layers_binaryvit import (
    AvgPoolBranch,
    AvgPoolBranches,
    BinaryPatchConv,
    BinaryProjection,
    DropPath,
    NormActivation,
    binary_mlp_products,
    gather_patches,
    pool_tokens,
    upsample_tokens,
)
from binaryvit_hf.network.modeling_binaryvit import BinaryViTAttention


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(params=[8, 2**17], ids=["many blocks", "one block"])
def block_elements(request, monkeypatch):
    monkeypatch.setattr(functional_binaryvit, "BLOCK_ELEMENTS", request.param)


def randomized(module: nn.Module) -> nn.Module:
    for tensor in [*module.parameters(), *module.buffers()]:
        if tensor.is_floating_point():
            tensor.data = torch.randn(tensor.shape, dtype=torch.float64).abs() + 0.1
    return module


def gradients(output: torch.Tensor, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    weights = torch.randn(output.shape, dtype=output.dtype, generator=torch.Generator().manual_seed(7))
    return torch.autograd.grad(output, inputs, weights)


def reference_shortcut(x: torch.Tensor, channels: int) -> torch.Tensor:
    if channels < x.shape[-1]:
        return x.unflatten(-1, (channels, -1)).mean(-1)
    return x.repeat(1, 1, channels // x.shape[-1])


# float32 uses byte products if the CPU has them.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("weight_bits", [1, 32])
def test_sign_linear_equals_the_composed_sign_and_product(block_elements, dtype, weight_bits):
    x = torch.randn(7, 4, dtype=dtype, requires_grad=True)
    shift = torch.randn(4, dtype=dtype, requires_grad=True)
    weight = quantize_weight(torch.randn(3, 4, dtype=dtype), weight_bits, 1, center=True).requires_grad_()
    fused, composed = SignLinear.apply(x, shift, weight, weight_bits), ApproxSign.apply(x, shift) @ weight.T
    torch.testing.assert_close(fused, composed)
    torch.testing.assert_close(gradients(fused, x, shift, weight), gradients(composed, x, shift, weight))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shortcut_channels", [2, 4, 8])
def test_norm_activation_equals_batch_norm_shortcut_and_rprelu(block_elements, training, shortcut_channels):
    module = randomized(NormActivation(tiny_config(), 4)).double().train(training)
    norm, activation = module.norm.batch_norm, module.activation
    x = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)
    shortcut = torch.randn(2, 5, shortcut_channels, dtype=torch.float64, requires_grad=True)
    wanted = [x, shortcut, norm.weight, norm.bias, activation.shift_in, activation.slope, activation.shift_out]
    before = [norm.running_mean.clone(), norm.running_var.clone()]

    fused = module(x, shortcut)
    fused_gradients = gradients(fused, *wanted)
    after = [norm.running_mean.clone(), norm.running_var.clone()]
    norm.running_mean, norm.running_var = before
    summed = module.norm(x) + reference_shortcut(shortcut, 4) - activation.shift_in
    composed = nn.functional.prelu(summed.flatten(0, 1), activation.slope).view(2, 5, 4) + activation.shift_out

    torch.testing.assert_close(fused, composed)
    torch.testing.assert_close(fused_gradients, gradients(composed, *wanted))
    torch.testing.assert_close(after, [norm.running_mean, norm.running_var])


@pytest.mark.parametrize("channels", [1, 3, 64, 254, 256, 511])
def test_counts_are_packed_without_loss_up_to_the_extremes(channels):
    weight = BinarizeWeight.apply(torch.randn(5, channels), False)
    counts = PackedCounts(weight)
    signs = torch.cat((weight.sign(), -weight.sign(), binary_sign(torch.randn(20, channels))))
    products = BinarizedWeight(torch.zeros(channels), weight).count(signs)
    assert torch.equal(products.float(), signs @ weight.sign().T)
    packed = counts.pack(products)
    assert packed.element_size() == (2 if channels in (256, 511) else 1)
    torch.testing.assert_close(counts.unpack(packed), products * weight.abs()[:, 0], rtol=1e-6, atol=0)


@pytest.mark.parametrize("inner", [4, 12])
def test_binary_mlp_equals_its_two_projections(block_elements, inner):
    fc1 = randomized(BinaryProjection(tiny_config(), 4, inner)).double()
    fc2 = randomized(BinaryProjection(tiny_config(), inner, 4)).double()
    fc1.linear.sign_slope, fc2.linear.sign_slope = torch.abs, torch.exp  # each sign has its own
    x = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)
    wanted = [x, *fc1.parameters(), *fc2.parameters()]
    norm = fc1.norm_activation.norm.batch_norm
    before = [norm.running_mean.clone(), norm.running_var.clone()]

    fused = fc2.norm_activation(*binary_mlp_products(fc1, fc2.linear, x))
    fused_gradients = gradients(fused, *wanted)
    after = [norm.running_mean.clone(), norm.running_var.clone()]
    norm.running_mean, norm.running_var = before
    composed = fc2(fc1(x))

    torch.testing.assert_close(fused, composed)
    torch.testing.assert_close(fused_gradients, gradients(composed, *wanted))
    torch.testing.assert_close(after, [norm.running_mean, norm.running_var])


@pytest.mark.parametrize("used", [(0,), (1,), (0, 1)], ids=["context", "probabilities", "both"])
@pytest.mark.parametrize("sign_slope", [None, torch.exp])
def test_binary_attention_equals_its_steps(used, sign_slope):
    attention = randomized(BinaryViTAttention(tiny_config(attention_clip_init_value=0.3), 0)).double()
    if sign_slope is not None:
        attention.sign_slope = sign_slope
    inputs = [torch.randn(2, tokens, 8, dtype=torch.float64, requires_grad=True) for tokens in (6, 3, 3)]
    shifts = attention.query_shift, attention.key_shift, attention.value_shift
    wanted = [*inputs, *shifts, attention.probability_clip]
    outcomes = []
    for training in (True, False):  # evaluation is composed of single steps
        results = attention.train(training).attend(*inputs)
        grads = torch.autograd.grad(sum(results[index].exp().sum() for index in used), wanted, allow_unused=True)
        outcomes.append((results, [torch.zeros(()) if grad is None or not grad.any() else grad for grad in grads]))
    torch.testing.assert_close(*outcomes)


def test_map_rows_keeps_the_order_of_the_rows(block_elements):
    x = torch.arange(60.0).view(20, 3)
    assert torch.equal(map_rows(lambda x: x + 1, x), x + 1)


@pytest.mark.parametrize("out_features", [2, 4, 12])
def test_binary_projection_is_the_formula_of_the_paper(out_features):
    projection = randomized(BinaryProjection(tiny_config(), 4, out_features)).double().eval()
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    linear, norm_activation = projection.linear, projection.norm_activation
    weight = linear.weight - linear.weight.mean(1, keepdim=True)
    weight = linear.weight.abs().mean(1, keepdim=True) * binary_sign(weight)
    y = norm_activation.norm(binary_sign(x + linear.shift) @ weight.T) + reference_shortcut(x, out_features)
    activation = norm_activation.activation
    y = y - activation.shift_in
    y = torch.where(y > 0, y, activation.slope * y) + activation.shift_out
    torch.testing.assert_close(projection(x), y)


def test_patch_convolution_is_a_convolution_of_signs():
    conv = randomized(BinaryPatchConv(tiny_config(), 3, 6)).double()
    tokens = torch.randn(2, 4 * 6, 3, dtype=torch.float64)
    token_map = tokens.transpose(1, 2).unflatten(2, (4, 6))
    weight = BinarizeWeight.apply(conv.weight, False)
    expected = nn.functional.conv2d(binary_sign(token_map + conv.shift.view(-1, 1, 1)), weight, stride=2)
    actual = conv(gather_patches(tokens, (4, 6)).flatten(2))
    torch.testing.assert_close(actual, expected.flatten(2).transpose(1, 2))


@pytest.mark.parametrize("kernel_size", [(3, 1), (1, 3), (5, 1), (1, 5)], ids=str)
def test_pooling_branches_are_zero_padded_means_over_the_whole_kernel(block_elements, kernel_size):
    branches = AvgPoolBranches(randomized(AvgPoolBranch(3, size)).double() for size in ((1, 1), kernel_size))
    hidden_states, tokens = (torch.randn(2, 4 * 6, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    height, width = kernel_size
    token_map = tokens.transpose(1, 2).unflatten(2, (4, 6))
    kernel = torch.full((3, 1, height, width), 1 / (height * width), dtype=torch.float64)
    mean = nn.functional.conv2d(token_map, kernel, padding=(height // 2, width // 2), groups=3)
    scaled = branches[0].layer_scale(tokens) + branches[1].layer_scale(mean.flatten(2).transpose(1, 2))
    expected = hidden_states + scaled
    actual = branches(hidden_states, tokens, (4, 6))
    torch.testing.assert_close(actual, expected)
    wanted = (hidden_states, tokens, *branches.parameters())
    torch.testing.assert_close(gradients(actual, *wanted), gradients(expected, *wanted))


def test_an_empty_list_of_pooling_branches_returns_its_input():
    tokens = torch.randn(2, 4 * 6, 3)
    assert AvgPoolBranches()(tokens, tokens, (4, 6)) is tokens


def test_pooling_and_upsampling_of_tokens_equal_pytorchs_of_images():
    tokens = torch.randn(2, 4 * 6, 3)
    token_map = tokens.transpose(1, 2).unflatten(2, (4, 6))
    pooled = pool_tokens(tokens, (4, 6), 2)
    torch.testing.assert_close(pooled, nn.functional.avg_pool2d(token_map, 2).flatten(2).transpose(1, 2))
    upsampled = nn.functional.interpolate(nn.functional.avg_pool2d(token_map, 2), scale_factor=2)
    torch.testing.assert_close(upsample_tokens(pooled, (4, 6), 2), upsampled.flatten(2).transpose(1, 2))


def test_drop_path_drops_whole_images_and_keeps_the_mean():
    drop_path = DropPath(0.25).train()
    values = drop_path(torch.ones(4000, 2, 3))
    kept = values[:, 0, 0]
    assert torch.equal(values, kept[:, None, None].expand_as(values))
    torch.testing.assert_close(kept.unique(), torch.tensor([0.0, 4 / 3]))
    assert kept.mean().item() == pytest.approx(1, abs=0.05)
    assert torch.equal(drop_path.eval()(values), values)


def test_a_projection_keeps_two_activations_for_the_backward_pass():
    """They are its input and its product. Composed of PyTorch's own operations, it keeps seven."""
    projection = BinaryProjection(tiny_config(), 64, 64).train()
    x = torch.randn(2, 100, 64, requires_grad=True)
    kept = {}

    def note(tensor):
        if tensor.numel() >= x.numel():
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        projection(x)
    assert len(kept) == 2


def test_a_layer_is_the_block_of_the_paper():
    model = tiny_model().double().eval()
    layer, grid_size = model.binaryvit.stages[1].layers[0], (2, 4)
    x = torch.randn(2, 8, 16, dtype=torch.float64)
    attention = layer.attention
    u = layer.norm1(x)
    q, k, v = attention.query(u), attention.key(u), attention.value(u)
    heads = [
        binary_sign(t + s).unflatten(-1, (4, 4)).transpose(1, 2)
        for t, s in ((q, attention.query_shift), (k, attention.key_shift), (v, attention.value_shift))
    ]
    p = (heads[0] @ heads[1].transpose(-1, -2) / 2).softmax(-1)
    p = (p / attention.probability_clip).round().clamp(0, 1) * attention.probability_clip
    z = (p @ heads[2]).transpose(1, 2).flatten(2)
    z = attention.norm_activation.norm(z) + q + k + v - attention.norm_activation.activation.shift_in
    activation = attention.norm_activation.activation
    z = torch.where(z > 0, z, activation.slope * z) + activation.shift_out
    x1 = x + layer.layer_scale1(attention.output(z))
    u = layer.norm2(x1)
    expected = x1 + layer.layer_scale2(layer.mlp.fc2(layer.mlp.fc1(u)))
    expected = layer.avg_pool_branches(expected, u, grid_size)
    torch.testing.assert_close(layer(x, grid_size), expected)


def test_the_drop_path_rate_grows_linearly_with_depth():
    model = tiny_model(tiny_config(drop_path_rate=0.2))
    rates = [layer.drop_path.drop_prob for stage in model.binaryvit.stages for layer in stage.layers]
    assert rates == pytest.approx([0.0, 0.1, 0.2])
    assert model.train()(tiny_images()).logits.isfinite().all()

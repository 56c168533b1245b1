"""Operations and bytes against the paper's rows, counts by hand, PyTorch's own counter, and saved checkpoints."""

import pytest
import torch
from golden_data import CONFIGS
from safetensors.torch import load_file
from tiny import class_token_config, tiny_config, tiny_images, tiny_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForImageClassification, ResNetConfig, ViTConfig

from binaryvit_hf import BinaryViTForImageClassification, BinaryViTQuantizationConfig
from binaryvit_hf.ops import LayerCost, count_operations, format_table, readable, total
from binaryvit_runtime.errors import UserError


# BOPs, FLOPs and OPs, derived from the shapes of the paper's networks and of ours
ROWS = {
    "deit-small-patch16-224": (0, 4.60e9, 4.60e9),
    "reactdeit-small-patch16-224": (4.54e9, 58.2e6, 129e6),
    "reactdeit-small-patch16-224-avg-pool": (4.52e9, 58.2e6, 129e6),
    "reactdeit-small-patch16-224-avg-pool-multi-branch": (4.52e9, 58.2e6, 129e6),
    "reactdeit-small-patch16-224-avg-pool-multi-branch-ls": (4.52e9, 58.2e6, 129e6),
    "binaryvit-small-patch4-224": (3.82e9, 10.1e6, 70e6),
    "binaryvit-small-patch4-224-some-fp": (3.75e9, 87.2e6, 146e6),
    "binaryvit-tiny-patch8-224": (2.00e9, 19.8e6, 51.1e6),
}
TINY_VIT = ViTConfig(
    image_size=(16, 32),
    patch_size=4,
    hidden_size=8,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=16,
    num_labels=3,
)
NETWORKS = {
    "pyramid": tiny_config(),
    "some full precision": tiny_config(binarize_patch_embeddings=False),
    "class token": class_token_config(),
    "2 by 32 bits": tiny_config(weight_bits=2, input_bits=32),
    "ViT": TINY_VIT,
}
REST = "norms, activations, scales, positions"


def costs_by_kind(config) -> dict[str, LayerCost]:
    return {cost.kind: cost for cost in count_operations(config)}


def one_stage(**changes):
    """One stage with every kind of layer, of 12 channels (not a multiple of 8 bits), on 4 x 8 tokens."""
    fields = {
        "hidden_sizes": [12],
        "depths": [1],
        "num_attention_heads": [3],
        "intermediate_sizes": [36],
        "sequence_reduction_ratios": [1],
        "avg_pool_kernel_sizes": [3],
    }
    return tiny_config(**(fields | changes))


@pytest.mark.parametrize("row, expected", ROWS.items(), ids=ROWS)
def test_operations_of_a_row_follow_from_its_shapes(row, expected):
    cost = total(count_operations(AutoConfig.from_pretrained(CONFIGS / row)))
    assert (cost.bops, cost.flops, cost.ops) == pytest.approx(expected, rel=0.01)


def test_operations_of_a_pyramid_equal_a_count_by_hand():
    # 32 tokens of 8 channels with 8 keys, twice; then 8 tokens of 16 channels.
    costs = costs_by_kind(tiny_config())
    assert {kind: cost.bops for kind, cost in costs.items() if cost.bops} == {
        "patch embeddings between stages": 8 * 16 * (8 * 4),
        "sequence reduction": 2 * (8 * 8 * 8),
        "query, key, value": 2 * (32 + 8 + 8) * 8 * 8 + 3 * 8 * 16 * 16,
        "attention products": 2 * (2 * 32 * 8 * 8) + 2 * 8 * 8 * 16,
        "attention output": 2 * 32 * 8 * 8 + 8 * 16 * 16,
        "MLP": 2 * (2 * 32 * 8 * 16) + 2 * 8 * 16 * 64,
    }
    assert {kind: cost.flops for kind, cost in costs.items() if cost.flops} == {
        "patch embedding (stem)": 32 * 8 * (3 * 4 * 4),
        "classifier": 16 * 3,
    }


def test_a_class_token_is_counted_among_queries_and_keys():
    assert costs_by_kind(class_token_config())["attention products"].bops == 2 * (2 * 33 * 33 * 8)


@pytest.mark.parametrize("config", NETWORKS.values(), ids=NETWORKS)
def test_every_product_that_pytorch_computes_is_counted(config):
    cost = total(count_operations(config))
    model = AutoModelForImageClassification.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        assert 2 * (cost.bops + cost.flops) == flops(model)  # PyTorch counts multiplication and addition


@pytest.mark.parametrize("make_config", [tiny_config, class_token_config])
def test_pytorch_counts_a_packed_model_and_a_forward_in_training_like_evaluation(make_config, tmp_path):
    model = tiny_model(make_config())
    model.save_pretrained(tmp_path)
    packed = BinaryViTForImageClassification.from_pretrained(
        tmp_path, quantization_config=BinaryViTQuantizationConfig()
    )
    with torch.no_grad():
        assert flops(model.train()) == flops(packed) == flops(model.eval())


def flops(model) -> int:
    with FlopCounterMode(display=False) as counter:
        model(tiny_images(1))
    return counter.get_total_flops()


@pytest.mark.parametrize("config", NETWORKS.values(), ids=NETWORKS)
def test_every_tensor_is_counted_once(config):
    cost = total(count_operations(config))
    model = AutoModelForImageClassification.from_config(config)
    assert cost.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert cost.float_bytes == sum(tensor.nbytes for tensor in model.state_dict().values())


@pytest.mark.parametrize("config", NETWORKS.values(), ids=NETWORKS)
def test_every_product_is_of_a_named_kind(config):
    assert costs_by_kind(config)[REST].ops == 0


@pytest.mark.parametrize("weight_bits, input_bits", [(1, 2), (2, 1), (4, 4), (8, 8)])
def test_a_product_of_m_by_n_bits_is_m_times_n_bit_operations(weight_bits, input_bits):
    binary, wide = costs_by_kind(one_stage()), costs_by_kind(one_stage(weight_bits=weight_bits, input_bits=input_bits))
    assert wide["MLP"].bops == weight_bits * input_bits * binary["MLP"].bops
    assert wide["attention products"].bops == input_bits**2 * binary["attention products"].bops


@pytest.mark.parametrize("weight_bits, input_bits", [(1, 32), (32, 1), (32, 32)])
def test_full_precision_on_either_side_is_a_flop(weight_bits, input_bits):
    binary, wide = costs_by_kind(one_stage()), costs_by_kind(one_stage(weight_bits=weight_bits, input_bits=input_bits))
    assert (wide["MLP"].bops, wide["MLP"].flops) == (0, binary["MLP"].bops)


def test_attention_products_are_binary_with_any_weights():
    binary, wide = costs_by_kind(one_stage()), costs_by_kind(one_stage(weight_bits=32))
    assert wide["attention products"].bops == binary["attention products"].bops


def test_packed_bytes_equal_a_count_by_hand():
    # 12 bits fill 2 bytes and 36 bits 5; every row has a scale and every input channel a shift of 4 bytes.
    square = 12 * (2 + 4) + 12 * 4
    norm, wide_norm = 4 * 12 * 4 + 8, 4 * 36 * 4 + 8
    activation, wide_activation = 3 * 12 * 4, 3 * 36 * 4
    layer_scale, positions = 2 * 12 * 4, 32 * 12 * 4
    assert {kind: cost.packed_bytes for kind, cost in costs_by_kind(one_stage()).items()} == {
        "patch embedding (stem)": (12 * 48 + 12) * 4,
        "query, key, value": 3 * square,
        "attention products": (3 * 12 + 1) * 4,
        "attention output": square,
        "MLP": 36 * (2 + 4) + 12 * 4 + 12 * (5 + 4) + 36 * 4,
        "classifier": (3 * 12 + 3) * 4,
        REST: 10 * norm + wide_norm + 6 * activation + wide_activation + 4 * layer_scale + positions,
    }


@pytest.mark.parametrize("bits, row_bytes", [(2, 3), (3, 6), (4, 6), (5, 12), (8, 12)])
def test_wider_weights_have_one_scale_for_the_tensor(bits, row_bytes):
    output = costs_by_kind(one_stage(weight_bits=bits))["attention output"]
    assert output.packed_bytes == 12 * row_bytes + 4 + 12 * 4


@pytest.mark.parametrize("weight_bits", [1, 2, 3, 8])
@pytest.mark.parametrize("make_config", [tiny_config, one_stage])
def test_packed_bytes_equal_those_of_a_saved_packed_checkpoint(make_config, weight_bits, tmp_path):
    config = make_config(weight_bits=weight_bits)
    BinaryViTForImageClassification(config).save_pretrained(tmp_path / "latent")
    packed = BinaryViTForImageClassification.from_pretrained(
        tmp_path / "latent", quantization_config=BinaryViTQuantizationConfig()
    )
    packed.save_pretrained(tmp_path / "packed")
    stored = load_file(tmp_path / "packed" / "model.safetensors")
    assert total(count_operations(config)).packed_bytes == sum(tensor.nbytes for tensor in stored.values())


@pytest.mark.parametrize("config", [tiny_config(weight_bits=32), TINY_VIT], ids=["32 bits", "ViT"])
def test_a_network_of_full_precision_weights_keeps_its_bytes(config):
    cost = total(count_operations(config))
    assert cost.packed_bytes == cost.float_bytes


def test_a_config_of_packed_weights_is_counted_and_not_changed():
    config = tiny_config(quantization_config=BinaryViTQuantizationConfig(half=True).to_dict())
    assert count_operations(config) == count_operations(tiny_config())
    assert config.quantization_config["half"] is True


def test_bytes_do_not_depend_on_the_dtype_of_the_config():
    assert count_operations(tiny_config(dtype="float16")) == count_operations(tiny_config())


def test_other_model_types_are_refused():
    with pytest.raises(UserError, match="model types binaryvit and vit, not for 'resnet'"):
        count_operations(ResNetConfig())


def test_table_has_a_line_for_each_kind_and_the_totals_last():
    costs = [
        LayerCost("MLP", 38, 2_670_000_000, 0, 13_900_000, 1_940_000, 55_420_000),
        LayerCost("classifier", 1, 0, 512_000, 513_000, 2_050_000, 2_050_000),
    ]
    assert format_table(costs).splitlines() == [
        "kind of layer  layers    BOPs  FLOPs     OPs  parameters  bytes packed  bytes float32",
        "MLP                38  2.67 G      0  41.7 M      13.9 M       1.94 MB        55.4 MB",
        "classifier          1       0  512 k   512 k       513 k       2.05 MB        2.05 MB",
        "in all             39  2.67 G  512 k  42.2 M      14.4 M       3.99 MB        57.5 MB",
    ]


@pytest.mark.parametrize("row", ROWS)
def test_table_of_a_row_fits_the_terminal(row):
    lines = format_table(count_operations(AutoConfig.from_pretrained(CONFIGS / row))).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert len(lines[0]) <= 110


@pytest.mark.parametrize(
    "number, expected",
    [
        (0, "0"),
        (42, "42"),
        (999, "999"),
        (999.6, "1.00 k"),
        (58_186_752, "58.2 M"),
        (4.6e9, "4.60 G"),
        (999.9e6, "1.00 G"),
    ],
)
def test_numbers_have_three_digits(number, expected):
    assert readable(number) == expected

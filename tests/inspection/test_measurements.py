"""What a report measures, against counts that are made in another way."""

import math

import pytest
import torch
from packed_model import save_packed
from pictures import write_pictures
from PIL import Image
from tiny import class_token_config, tiny_config, tiny_model

from binaryvit_hf.inspection.measurements import measure, measure_on_pictures
from binaryvit_hf.inspection.parts import Place, part_of, parts_in_order, quantizable_layers
from binaryvit_hf.inspection.pictures import Pictures, choose_evenly, choose_given
from binaryvit_hf.inspection.signs import measure_latent_weights
from binaryvit_hf.loading import load_classifier, load_image_processor
from binaryvit_hf.network.functional_binaryvit import binary_sign
from binaryvit_hf.network.layers_binaryvit import BinaryLinear, BinaryPatchConv, BinaryProjection
from binaryvit_hf.network.packing_binaryvit import PackedLinear
from binaryvit_hf.ops import count_operations, total
from binaryvit_runtime.errors import UserError
from binaryvit_runtime.image_files import ImageFile, list_images


CONFIGS = {
    "pyramid": tiny_config(),
    "full-precision patch embeddings": tiny_config(binarize_patch_embeddings=False),
    "class token": class_token_config(),
    "2 bits": tiny_config(weight_bits=2),
    "32 bits": tiny_config(weight_bits=32),
}


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A packed model, with its latent weights in the folder beside it."""
    return save_packed(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = write_pictures(tmp_path_factory.mktemp("pictures") / "photos", ("ant", "bee"), 9)  # more than one batch
    return Pictures(list_images([str(folder)])[0], 18, "picture")


def measured(folder, **arguments):
    return measure(load_classifier(folder), folder, **arguments)


def header_bytes(folder) -> int:
    """The part of the checkpoint's files that holds no tensors."""
    return sum(8 + int.from_bytes(file.read_bytes()[:8], "little") for file in folder.glob("*.safetensors"))


@pytest.mark.parametrize("name", CONFIGS)
def test_costs_of_the_parts_add_up_to_those_of_ops(name, tmp_path):
    config = CONFIGS[name]
    parts, in_all = measure(tiny_model(config), tmp_path).parts, total(count_operations(config))
    assert [part.part for part in parts] == parts_in_order(config.depths)
    assert sum(part.bops for part in parts) == in_all.bops
    assert sum(part.flops for part in parts) == in_all.flops
    assert sum(part.ops for part in parts) == pytest.approx(in_all.ops)
    assert sum(part.parameters for part in parts) == in_all.parameters
    assert sum(part.stored_bytes for part in parts) == in_all.float_bytes


@pytest.mark.parametrize("half", [False, True])
def test_bytes_of_the_parts_and_the_header_add_up_to_the_packed_file(half, tmp_path):
    folder = save_packed(tmp_path, half=half)
    found = measured(folder)
    assert found.is_packed
    assert found.file_bytes == (folder / "model.safetensors").stat().st_size
    assert sum(part.stored_bytes for part in found.parts) + header_bytes(folder) == found.file_bytes


def test_bytes_of_a_latent_checkpoint_in_several_files_and_in_bfloat16_add_up(tmp_path):
    tiny_model().to(torch.bfloat16).save_pretrained(tmp_path, max_shard_size=5_000)
    found = measured(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert not found.is_packed
    assert sum(part.stored_bytes for part in found.parts) + header_bytes(tmp_path) == found.file_bytes


def test_other_tensors_of_a_checkpoint_are_no_weights(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    for name in ("average.safetensors", "oscillation.safetensors", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes(b"1234")
    assert measured(tmp_path).file_bytes == (tmp_path / "model.safetensors").stat().st_size


def test_bits_of_a_part_are_those_of_its_packed_weights(packed):
    parts = {part.part: part for part in measured(packed).parts}
    channels, inner = 16, 64
    assert parts["2.1"].quantized_weights == 4 * channels**2 + 2 * channels * inner
    assert parts["2.1"].bit_bytes == parts["2.1"].quantized_weights // 8
    assert parts["to 2"].quantized_weights == 8 * 4 * 16
    assert parts["stem"].bit_bytes == parts["head"].bit_bytes == 0


def test_every_module_belongs_to_a_part():
    names = [name for name, module in tiny_model().named_modules() if not list(module.children())]
    assert {part_of(name) for name in names} == {"stem", "1.1", "1.2", "to 2", "2.1", "head"}


def test_packed_and_latent_weights_have_the_same_signs_as_by_hand(packed):
    latent = load_classifier(packed.parent / "latent")
    found = measured(packed).weights
    assert found == measured(packed.parent / "latent").weights
    weight = latent.get_submodule("binaryvit.stages.0.layers.1.mlp.fc2.linear").weight
    positive = sum(value >= row.mean() for row in weight for value in row)
    assert (found[Place("1.2", "fc2")].positive, found[Place("1.2", "fc2")].total) == (positive, weight.numel())
    patches = latent.get_submodule("binaryvit.stages.1.patch_embeddings.projection").weight
    assert found[Place("to 2", "patches")].share == (patches >= 0).float().mean()
    assert len(found) == len(quantizable_layers(latent))


def test_weights_of_two_bits_have_zeros_and_those_of_32_have_no_levels(tmp_path):
    weights = measure(tiny_model(CONFIGS["2 bits"]), tmp_path).weights
    assert all(0 < signs.zero < signs.total - signs.positive for signs in weights.values())
    assert measure(tiny_model(CONFIGS["32 bits"]), tmp_path).weights == {}


@torch.no_grad()
def test_activations_and_attention_are_counted_as_by_hand(packed, pictures):
    model = load_classifier(packed)
    processor = load_image_processor(packed, model.config)
    found = measure_on_pictures(model, processor, pictures)
    images = [Image.open(file.name).convert("RGB") for file in pictures.pictures]
    pixel_values = processor(images=images, return_tensors="pt")["pixel_values"]

    taken, queries = {}, {}
    for name, layer in quantizable_layers(model).items():
        layer.register_forward_pre_hook(lambda layer, inputs, name=name: taken.update({name: inputs[0]}))
    attention = model.binaryvit.stages[0].layers[0].attention
    attention.query.register_forward_hook(lambda module, inputs, output: queries.update({"1.1": output}))
    probabilities = model(pixel_values, output_attentions=True).attentions

    assert found.pictures == 18
    assert found.faults == []
    for part, of_layer in zip(("1.1", "1.2", "2.1"), probabilities):
        sparsity = found.attention[part]
        assert sparsity.shares == pytest.approx((of_layer == 0).float().mean((0, 2, 3)).tolist())
        assert sparsity.empty_shares == pytest.approx((of_layer.sum(-1) == 0).float().mean((0, 2)).tolist())
        assert (sparsity.queries, sparsity.keys) == (18 * of_layer.shape[2], of_layer.shape[3])
    shares = [share for sparsity in found.attention.values() for share in sparsity.shares]
    assert 0 < max(shares) < 1

    prefix = "binaryvit.stages"
    for place, name in {
        Place("1.2", "fc2"): f"{prefix}.0.layers.1.mlp.fc2.linear",
        Place("to 2", "patches"): f"{prefix}.1.patch_embeddings.projection",
    }.items():
        layer, signs = model.get_submodule(name), found.inputs[place]
        shift = layer.shift.repeat_interleave(taken[name].shape[-1] // len(layer.shift))
        plus = binary_sign(taken[name] + shift) == 1
        assert signs.share == pytest.approx(plus.float().mean().item())
        by_channel = plus.unflatten(-1, (len(layer.shift), -1)).float().mean((0, 1, 3))
        assert (signs.constant, signs.channels) == (
            int(((by_channel == 0) | (by_channel == 1)).sum()),
            len(by_channel),
        )
    plus = queries["1.1"] + attention.query_shift >= 0
    assert found.operands[Place("1.1", "query")].share == pytest.approx(plus.float().mean().item())
    assert len(found.operands) == 3 * 3


def test_a_channel_whose_shift_is_large_never_changes_its_sign(packed, pictures):
    model = load_classifier(packed)
    processor = load_image_processor(packed, model.config)
    before = measure_on_pictures(model, processor, pictures).inputs[Place("to 2", "patches")]
    with torch.no_grad():
        model.get_submodule("binaryvit.stages.1.patch_embeddings.projection").shift[3:5] = 1e6
    after = measure_on_pictures(model, processor, pictures).inputs[Place("to 2", "patches")]
    assert after.constant == before.constant + 2
    assert after.share > before.share


def test_measuring_leaves_no_hook(packed, pictures):
    model = load_classifier(packed)
    measure_on_pictures(model, load_image_processor(packed, model.config), pictures)
    watched = (BinaryProjection, PackedLinear)
    assert not any(module._forward_hooks for module in model.modules() if isinstance(module, watched))


def test_pictures_that_cannot_be_read_are_left_out_and_named(packed, pictures, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    model = load_classifier(packed)
    processor = load_image_processor(packed, model.config)
    broken = list_images([str(tmp_path / "broken.png")])[0]
    found = measure_on_pictures(model, processor, Pictures([*broken, *pictures.pictures], 19, "picture"))
    assert found.pictures == 18
    assert len(found.faults) == 1
    assert "broken.png" in found.faults[0]
    with pytest.raises(UserError, match=r"None of the pictures can be read: .*broken\.png"):
        measure_on_pictures(model, processor, Pictures(broken, 1, "picture"))


def test_every_name_without_a_file_is_kept_beside_the_chosen_pictures():
    files = [ImageFile(str(number), "does not exist" if number % 100 == 1 else None) for number in range(1000)]
    chosen = choose_given(files)
    assert sum(file.fault is not None for file in chosen.pictures) == 10
    assert len(chosen.pictures) == 256 + 10
    assert chosen.found == 1000


def test_many_pictures_are_chosen_evenly():
    assert choose_evenly(range(5), 10) == [0, 1, 2, 3, 4]
    assert choose_evenly(range(1000), 4) == [0, 250, 500, 750]


@pytest.mark.parametrize("kind, mean", [(BinaryLinear, 0.7), (BinaryPatchConv, 0.0)])
def test_distances_of_latent_weights_are_from_where_the_sign_changes(kind, mean):
    layer = kind(tiny_config(), 8, 1)
    signed = torch.tensor([0.001, -0.001, 0.09, -0.09, 0.8, -0.8, 2.0, -2.0])  # mean magnitude 0.72275
    weight = signed if kind is BinaryLinear else signed.repeat_interleave(4)
    layer.weight.data = (weight + mean).view_as(layer.weight)
    found = measure_latent_weights(layer, learning_rates=[0.01, 0.5])
    times = len(weight) // 8
    assert found.total == 8 * times
    assert found.near == (2 * times, 2 * times)  # nearer than 0.0072 and 0.072
    assert found.within_step == (2 * times, 4 * times)
    assert found.without_gradient == 2 * times
    assert sum(found.histogram) == found.total
    assert found.histogram[29:31] == (times, times)
    bin_of_two = math.floor((2 / 0.72275 + 3) / 0.1)
    assert found.histogram[bin_of_two] == times


def test_a_row_of_equal_weights_has_distance_zero():
    layer = BinaryLinear(tiny_config(), 8, 2)
    layer.weight.data.fill_(0.5)
    found = measure_latent_weights(layer)
    assert found.near == (16, 16)
    assert sum(found.histogram) == 16

"""Packed weights: the format, bit-identical outputs, and every way that a file may be wrong."""

import copy
import json
import logging
import shutil
import warnings

import pytest
import torch
from golden_data import CONFIGS as CONFIG_FILES
from huggingface_hub.errors import StrictDataclassError
from old_layout import write_old_layout
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import class_token_config, tiny_config, tiny_images, tiny_model
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification
from transformers.utils import logging as transformers_logging

from binaryvit_hf import (
    BinaryViTBackbone,
    BinaryViTForImageClassification,
    BinaryViTModel,
    BinaryViTQuantizationConfig,
)
from binaryvit_hf.network.layers_binaryvit import BinaryLinear, BinaryPatchConv
from binaryvit_hf.network.packing_binaryvit import (
    PackedLinear,
    latent_weight,
    pack_levels,
    packed_layers,
    unpack_levels,
)
from binaryvit_hf.network.quantization_binaryvit import fits_half


CONFIGS = {
    "pyramid": tiny_config(),
    "some full precision": tiny_config(binarize_patch_embeddings=False),
    "class token": class_token_config(),
    # 12 and 36 inputs do not fill their last byte.
    "odd channels": tiny_config(hidden_sizes=[12, 36], intermediate_sizes=[12, 36], num_attention_heads=[3, 2]),
    **{f"{bits} bits": tiny_config(weight_bits=bits) for bits in range(2, 9)},
    "only weights binary": tiny_config(input_bits=32),
}


@pytest.fixture(autouse=True)
def computed_by_pytorch(monkeypatch):
    """Compute in PyTorch, whose outputs are bit-identical. The engine rounds differently; tests/engine tests it."""
    monkeypatch.setenv("BINARYVIT_ENGINE", "torch")


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(tiny_images()).logits


class FailOnLog(logging.Handler):
    def emit(self, record):
        raise AssertionError(record.getMessage())


def load(folder, kind=AutoModelForImageClassification, **kwargs):
    """Loading must not warn, neither by Python's warnings nor in transformers' log."""
    logger, handler = logging.getLogger("transformers"), FailOnLog(logging.WARNING)
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            return kind.from_pretrained(folder, **kwargs)
    finally:
        logger.removeHandler(handler)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folders `latent` and `packed`. Tests change copies of them."""
    folder = tmp_path_factory.mktemp("saved")
    tiny_model().save_pretrained(folder / "latent")
    load(folder / "latent", quantization_config=BinaryViTQuantizationConfig()).save_pretrained(folder / "packed")
    return folder


@pytest.fixture
def latent(saved, tmp_path):
    return shutil.copytree(saved / "latent", tmp_path / "latent")


@pytest.fixture
def packed(saved, tmp_path):
    return shutil.copytree(saved / "packed", tmp_path / "packed")


def read_metadata(folder) -> dict[str, str]:
    with safe_open(folder / "model.safetensors", framework="pt") as stored:
        return stored.metadata()


def edit_tensors(folder, change, metadata=()) -> None:
    """Save the weights again after `change`, with the metadata they had and `metadata`."""
    file, kept = folder / "model.safetensors", read_metadata(folder) | dict(metadata)
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata=kept)


def assert_same_checkpoint(folder, other) -> None:
    """The same tensors, metadata and config. Bytes differ, because safetensors writes metadata in random order."""
    ours, theirs = (load_file(path / "model.safetensors") for path in (folder, other))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype for name in ours)
    assert read_metadata(folder) == read_metadata(other)
    assert (folder / "config.json").read_bytes() == (other / "config.json").read_bytes()


def edit_config(folder, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    for key, value in changes.items():
        config.pop(key) if value is None else config.update({key: value})
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("width", [1, 2, 4, 8])
@pytest.mark.parametrize("columns", [1, 7, 8, 9, 64])
def test_levels_come_back_from_their_bytes_and_zeros_fill_the_last_byte(width, columns):
    top = 1 if width == 1 else 2 ** (width - 1) - 1
    levels = torch.randint(-top, top + 1, (5, columns), generator=torch.Generator().manual_seed(0))
    if width == 1:
        levels = 2 * (levels > 0).long() - 1
    packed = pack_levels(levels, width)
    assert packed.dtype == torch.uint8
    assert packed.shape == (5, -(-columns * width // 8))
    assert torch.equal(unpack_levels(packed, width, columns).long(), levels)
    used = columns * width % 8
    if used:
        assert (packed[:, -1] >> used == 0).all()


def test_the_first_channel_is_in_the_lowest_bits():
    assert pack_levels(torch.tensor([[1, -1, -1, -1, -1, -1, -1, 1, 1]]), 1).tolist() == [[0b10000001, 1]]
    assert pack_levels(torch.tensor([[1, 0, -1, 0, 1]]), 2).tolist() == [[0b01_00_01_10, 0b10]]


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_packed_outputs_are_bit_identical_before_and_after_saving(config, tmp_path):
    model = tiny_model(config)
    model.save_pretrained(tmp_path / "latent")
    expected = logits(model.eval())
    packed = load(tmp_path / "latent", quantization_config=BinaryViTQuantizationConfig())
    assert torch.equal(logits(packed), expected)
    packed.save_pretrained(tmp_path / "packed")
    names = load_file(tmp_path / "packed" / "model.safetensors").keys()
    assert {name.rpartition(".")[2] for name in names if name.startswith("binaryvit.")} == {"bytes", "floats"}
    again = load(tmp_path / "packed")
    assert torch.equal(logits(again), expected)
    assert again.config.quantization_config.quant_method == "binaryvit"


def test_saving_a_loaded_packed_model_gives_the_same_checkpoint(packed, tmp_path):
    load(packed).save_pretrained(tmp_path / "again")
    assert_same_checkpoint(packed, tmp_path / "again")


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_dequantized_weights_are_levels_times_scale_and_outputs_stay_close(config, tmp_path):
    model = tiny_model(config).eval()
    model.save_pretrained(tmp_path / "latent")
    packed = load(tmp_path / "latent", quantization_config=BinaryViTQuantizationConfig())
    plain = packed.dequantize()
    weight = plain.binaryvit.stages[0].layers[0].attention.query.linear.weight
    if config.weight_bits == 1:
        assert torch.equal(weight.abs(), weight.abs()[:, :1].expand_as(weight))
    assert not plain.is_packed
    # Not bit-identical: products of full-precision weights are sums of floats, products of binary ones are counts.
    torch.testing.assert_close(logits(plain), logits(model))
    plain.save_pretrained(tmp_path / "plain")
    again = load(tmp_path / "plain")
    assert torch.equal(logits(again), logits(plain))
    again.train()(tiny_images(), labels=torch.tensor([0, 1])).loss.backward()  # it trains, in full precision


def bits_of(model) -> dict[str, torch.Tensor]:
    return {name: layer.packed_weight for name, layer in packed_layers(model).items()}


def assert_same_bits(model, expected: dict[str, torch.Tensor]) -> None:
    found = bits_of(model)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], bits) for name, bits in expected.items())


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_latent_weights_of_packed_ones_give_the_same_outputs_and_bits_and_train(config, tmp_path):
    tiny_model(config).save_pretrained(tmp_path / "latent")
    packed = load(tmp_path / "latent", quantization_config=BinaryViTQuantizationConfig())
    expected, bits = logits(packed), bits_of(packed)
    model = packed.dequantize(latent=True)
    assert not model.is_packed
    assert model.config.weight_bits == config.weight_bits
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    model.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again")
    assert torch.equal(logits(again), logits(model))
    again.train()(tiny_images(), labels=torch.tensor([0, 1])).loss.backward()
    assert all(parameter.grad is not None for parameter in again.parameters())
    packed_again = load(tmp_path / "again", quantization_config=BinaryViTQuantizationConfig())
    assert_same_bits(packed_again, bits)


def one_sided(weight: torch.Tensor) -> torch.Tensor:
    """A weight whose first rows are all positive, all negative and all zero."""
    weight[0], weight[1], weight[2] = 0.1, -0.1, 0
    return weight


LATENT_WEIGHTS = {
    "random": lambda weight: weight,
    "large": lambda weight: 3 * weight,
    "huge": lambda weight: 1e5 * weight,
    "beyond float32's precision": lambda weight: 1e12 * weight,
    "tiny": lambda weight: 1e-42 * weight,
    "one positive weight a row": lambda weight: -weight.abs() - 5 + 20 * torch.eye(*weight.shape),
    "constant rows": one_sided,
}


@pytest.mark.parametrize("change", LATENT_WEIGHTS.values(), ids=LATENT_WEIGHTS)
@pytest.mark.parametrize("weight_bits", [1, 2, 3, 8])
@pytest.mark.parametrize(
    "kind, shape", [(BinaryLinear, (8, 96)), (BinaryPatchConv, (8, 24, 2, 2))], ids=["linear", "conv"]
)
def test_latent_weights_pack_to_the_bits_they_were_made_from_and_have_gradients(kind, shape, weight_bits, change):
    torch.manual_seed(0)
    layer = kind(tiny_config(weight_bits=weight_bits), shape[1], shape[0])
    with torch.no_grad():
        layer.weight.copy_(change(torch.randn(8, 96)).view(shape))
    packed, again = PackedLinear(layer), PackedLinear(layer)
    packed.pack(layer, "layer")
    latent = latent_weight(packed, torch.float32, "layer")
    layer.weight = torch.nn.Parameter(latent.view(shape))
    again.pack(layer, "layer")
    assert torch.equal(again.packed_weight, packed.packed_weight)
    torch.testing.assert_close(again.weight_scale, packed.weight_scale, rtol=1e-5, atol=1e-29)
    if packed.weight_scale.max() < 1e6:
        quantized = layer.quantized_weight()
        (quantized * torch.randn_like(quantized)).sum().backward()
        learning = (layer.weight.grad != 0).flatten(1).sum(1)
        assert (learning >= 95).all()  # all, or all but the one that holds the scale


def test_bits_that_no_weight_packs_to_are_named_and_the_model_stays_packed(packed):
    model = load(packed)
    model.binaryvit.stages[0].layers[0].attention.query.linear.weight_scale.fill_(-1.0)
    expected = logits(model)
    with pytest.raises(ValueError, match=r"query\.linear\.packed_weight'.*was edited"):
        model.dequantize(latent=True)
    assert model.is_packed
    assert torch.equal(logits(model), expected)


def test_a_dequantized_network_that_is_packed_is_sent_to_latent_weights(packed, tmp_path):
    plain = load(packed).dequantize()
    with pytest.raises(ValueError, match=r"dequantize\(latent=True\)"):
        plain.pack_weights()
    plain.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"dequantize\(latent=True\)"):
        load(tmp_path, quantization_config=BinaryViTQuantizationConfig())
    with pytest.raises(ValueError, match="is not packed"):
        plain.dequantize(latent=True)


@pytest.mark.parametrize("trainable_bits", [True, False])
def test_a_model_is_dequantized_in_inference_mode_and_trains(packed, trainable_bits):
    model = load(packed)
    with torch.inference_mode():
        model.dequantize(latent=trainable_bits)
    model.train()(tiny_images(), labels=torch.tensor([0, 2])).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("trainable_bits", [True, False])
def test_tensors_of_a_dequantized_model_change_one_by_one(packed, trainable_bits):
    model = load(packed).dequantize(latent=trainable_bits)
    tensors = model.state_dict(keep_vars=True)
    before = {name: tensor._version for name, tensor in tensors.items()}
    changed = next(name for name in tensors if name.endswith("running_mean"))
    torch.autograd.graph.increment_version(tensors[changed])
    assert [name for name, tensor in tensors.items() if tensor._version != before[name]] == [changed]
    images = tiny_images(32)
    model.train()(images, labels=torch.arange(32) % 3).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("trainable_bits", [True, False])
def test_a_dtype_that_is_not_one_of_floats_is_refused_and_the_model_stays_packed(packed, trainable_bits):
    model = load(packed)
    for dtype in ("float23", torch.int8):
        with pytest.raises(ValueError, match="dtype must be float32, bfloat16, float16 or float64"):
            model.dequantize(dtype, latent=trainable_bits)
    assert model.is_packed


def test_a_packed_model_gets_a_new_head_for_other_labels_and_keeps_its_bits(packed):
    expected = bits_of(load(packed))
    labels = {"num_labels": 5, "ignore_mismatched_sizes": True}
    model = AutoModelForImageClassification.from_pretrained(packed, **labels)
    assert model.is_packed
    assert logits(model).shape == (2, 5)
    assert_same_bits(model, expected)
    model.dequantize(latent=True).train()(tiny_images(), labels=torch.tensor([0, 4])).loss.backward()
    with pytest.raises(ValueError, match="'classifier"):
        AutoModelForImageClassification.from_pretrained(packed, num_labels=5)


@pytest.mark.parametrize("kind", [AutoModel, AutoModelForImageClassification, BinaryViTForImageClassification])
def test_the_quantization_config_may_be_a_dictionary(latent, tmp_path, kind):
    model = load(latent, kind=kind, quantization_config={"quant_method": "binaryvit", "half": True})
    assert model.is_packed
    model.save_pretrained(tmp_path / "half")
    assert load(tmp_path / "half", kind=kind).config.quantization_config.half
    with pytest.raises(ValueError, match=r"quant_method must be 'binaryvit' for BinaryViT, not 'bitsandbytes'"):
        kind.from_pretrained(latent, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_packed_models_count_the_parameters_of_the_latent_model_and_their_own_bytes(config):
    model = tiny_model(config)
    expected = model.num_parameters(), model.num_parameters(exclude_embeddings=True)
    model.pack_weights()
    assert (model.num_parameters(), model.num_parameters(exclude_embeddings=True)) == expected
    assert model.num_parameters(only_trainable=True) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    tensors = (*model.parameters(), *model.buffers())
    assert model.get_memory_footprint() == sum(tensor.untyped_storage().nbytes() for tensor in tensors)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, "auto"])
def test_bits_are_intact_in_every_dtype_whether_packed_before_or_while_loading(latent, packed, dtype):
    expected = load(packed).state_dict()
    for model in (
        load(packed, dtype=dtype),
        load(latent, dtype=dtype, quantization_config=BinaryViTQuantizationConfig()),
    ):
        tensors = model.state_dict()
        bits = [name for name in tensors if name.endswith("packed_weight")]
        assert bits
        assert all(torch.equal(tensors[name], expected[name]) for name in bits)
        assert model.dtype == (torch.float32 if dtype == "auto" else dtype)
        assert model.classifier.weight.dtype == model.dtype
        assert logits(model).isfinite().all()


def test_bits_are_intact_with_a_device_map_and_in_shards(packed, tmp_path):
    expected = logits(load(packed))
    assert torch.equal(logits(load(packed, device_map="auto")), expected)
    load(packed).save_pretrained(tmp_path / "shards", max_shard_size="5KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 1
    assert torch.equal(logits(load(tmp_path / "shards")), expected)


def test_a_model_with_offloaded_weights_is_not_saved(packed, tmp_path):
    on_disk = {"binaryvit.embeddings": "cpu", "binaryvit.stages": "disk", "binaryvit.norm": "cpu", "classifier": "cpu"}
    model = load(packed, device_map=on_disk, offload_folder=tmp_path / "offload")
    with pytest.raises(ValueError, match="is offloaded"):
        model.save_pretrained(tmp_path / "saved")


def test_the_backbone_of_a_packed_classifier_loads_without_a_warning(packed):
    classifier, backbone = load(packed), load(packed, kind=AutoModel)
    assert isinstance(backbone, BinaryViTModel)
    with torch.no_grad():
        expected = classifier.binaryvit(tiny_images()).last_hidden_state
        assert torch.equal(backbone(tiny_images()).last_hidden_state, expected)


def test_half_precision_halves_the_floats_and_keeps_those_out_of_its_range(latent, tmp_path):
    model = load(latent)
    with torch.no_grad():
        model.classifier.bias[0] = 1e5
        model.binaryvit.norm.batch_norm.running_var[0] = 1e-6
    model.save_pretrained(latent)
    half = load(latent, quantization_config=BinaryViTQuantizationConfig(half=True))
    half.save_pretrained(tmp_path / "half")
    tensors = load_file(tmp_path / "half" / "model.safetensors")
    wide = {name for name, tensor in tensors.items() if tensor.dtype == torch.float32}
    assert wide == {"classifier.bias", "binaryvit.norm.batch_norm.running_var"}
    assert {tensors[name].dtype for name in tensors if name.endswith("floats")} == {torch.float16}
    again = load(tmp_path / "half")
    assert again.dtype == torch.float32
    assert again.classifier.weight.dtype == torch.float32
    assert torch.equal(again.classifier.weight, model.classifier.weight.half().float())
    again.save_pretrained(tmp_path / "again")
    assert_same_checkpoint(tmp_path / "half", tmp_path / "again")


def test_binaryvit_small_takes_8_6_megabytes_and_5_6_in_half_precision(tmp_path):
    config = AutoConfig.from_pretrained(CONFIG_FILES / "binaryvit-small-patch4-224")
    AutoModelForImageClassification.from_config(config).save_pretrained(tmp_path)
    model = load(tmp_path, quantization_config=BinaryViTQuantizationConfig())
    for half, megabytes in ((False, 8.6), (True, 5.6)):
        model.config.quantization_config.half = half
        model.save_pretrained(tmp_path)
        assert (tmp_path / "model.safetensors").stat().st_size <= megabytes * 1e6


@pytest.mark.parametrize(
    "name, values, fits",
    [
        ("bias", [65504.0, 1.0], True),
        ("bias", [65505.0, 1.0], False),
        ("bias", [1e-7, 1.0], True),
        ("bias", [1e-7, -1e-6], False),
        ("bias", [0.0, 0.0], True),
        ("bias", [float("nan"), 1.0], False),
        ("running_var", [1e-7, 1.0], False),
    ],
    ids=str,
)
def test_a_tensor_fits_half_precision_by_its_largest_value_and_a_variance_by_its_smallest(name, values, fits):
    assert fits_half(name, torch.tensor(values)) == fits


def test_a_weight_that_is_not_finite_is_named_and_the_model_stays_as_it_was():
    model = tiny_model()
    with torch.no_grad():
        model.binaryvit.stages[1].layers[0].mlp.fc2.linear.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"stages\.1\.layers\.0\.mlp\.fc2\.linear\.weight"):
        model.pack_weights()
    assert not model.is_packed


def test_there_is_nothing_to_pack_in_full_precision(tmp_path):
    tiny_model(tiny_config(weight_bits=32)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="nothing to pack"):
        load(tmp_path, quantization_config=BinaryViTQuantizationConfig())


DISAGREEING_CONFIGS = {  # by message
    "'binaryvyt'": {"quantization_config": {"quant_method": "binaryvyt"}},
    "'halb'": {"quantization_config": {"quant_method": "binaryvit", "halb": True}},
    "half": {"quantization_config": {"quant_method": "binaryvit", "half": "yes"}},
    r"stages\.1\.patch_embeddings\.bytes' is packed, but config.json": {"quantization_config": None},
    "depths": {"depths": [1, 1]},
    "hidden_sizes": {"hidden_sizes": [8, 32], "intermediate_sizes": [16, 64]},
    "weight_bits": {"weight_bits": 2},
    "batch_norm_eps=0.001": {"batch_norm_eps": 1e-3},
    "num_attention_heads": {"num_attention_heads": [1, 4]},
    r"'classifier\.(weight|bias)'": {"id2label": {"0": "a", "1": "b"}},
}


@pytest.mark.parametrize("message, changes", DISAGREEING_CONFIGS.items(), ids=DISAGREEING_CONFIGS)
def test_a_config_that_disagrees_with_the_tensors_is_refused(packed, message, changes):
    edit_config(packed, **changes)
    with pytest.raises(ValueError, match=message):
        AutoModelForImageClassification.from_pretrained(packed)


LAYER = "binaryvit.stages.0.layers.0"
WEIGHT = f"{LAYER}.mlp.fc1.linear.packed_weight"
CHANGES = {
    "missing": (lambda tensor: None, "lacks the tensor"),
    "shape": (lambda tensor: tensor[:-1].clone(), "shape"),
    "dtype": (lambda tensor: tensor.view(torch.int8), "dtype"),
    "content": (lambda tensor: tensor ^ 1, "checksum"),
    "float": (lambda tensor: tensor.float(), "dtype"),
}


@pytest.mark.parametrize("change, message", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("file_format, name", [("1", WEIGHT), ("2", f"{LAYER}.bytes")])
@pytest.mark.parametrize("kwargs", [{}, {"ignore_mismatched_sizes": True}], ids=["default", "ignore_mismatched_sizes"])
def test_a_tensor_that_is_not_what_was_saved_is_named(packed, change, message, file_format, name, kwargs):
    if file_format == "1":
        write_old_layout(packed)

    def apply(tensors) -> None:
        tensor = change(tensors.pop(name))
        if tensor is not None:
            tensors[name] = tensor

    edit_tensors(packed, apply)
    with pytest.raises(ValueError, match=message) as caught:
        AutoModelForImageClassification.from_pretrained(packed, **kwargs)
    assert (LAYER if message == "lacks the tensor" else name) in str(caught.value)


def test_a_shape_that_only_padding_hides_is_refused_in_format_1(packed):
    shapes = {WEIGHT: [16, 7]}
    edit_tensors(write_old_layout(packed), lambda tensors: None, {"binaryvit_shapes": json.dumps(shapes)})
    with pytest.raises(ValueError, match="packed from the shape"):
        AutoModelForImageClassification.from_pretrained(packed)


@pytest.mark.parametrize("name", ["pyramid", "class token", "4 bits"])
@pytest.mark.parametrize("kind", [BinaryViTForImageClassification, BinaryViTModel])
def test_a_file_holds_the_tensors_of_each_module_in_the_order_of_their_names(name, kind, tmp_path):
    model = tiny_model(copy.deepcopy(CONFIGS[name]))
    model = model if kind is BinaryViTForImageClassification else model.binaryvit
    for number, buffer in enumerate(tensor for key, tensor in model.named_buffers() if key.endswith("tracked")):
        buffer.fill_(2**40 + number)
    model.pack_weights()
    model.save_pretrained(tmp_path)
    stored, state = load_file(tmp_path / "model.safetensors"), model.state_dict()
    prefix = "" if kind is BinaryViTModel else "binaryvit."
    modules = ["embeddings", "norm"]
    for stage, depth in enumerate(model.config.depths):
        modules += [f"stages.{stage}.patch_embeddings"] if stage else []
        modules += [f"stages.{stage}.layers.{layer}" for layer in range(depth)]
    expected = {name: state[name] for name in state if name.startswith("classifier.")}
    for module in modules:
        names = sorted(key for key in state if key.startswith(f"{prefix}{module}."))
        floats = [key for key in names if state[key].is_floating_point()]
        content = b"".join(state[key].numpy().tobytes() for key in names if key not in floats)
        expected[f"{prefix}{module}.floats"] = torch.cat([state[key].flatten() for key in floats])
        if content:  # a stem without norm has floats alone
            expected[f"{prefix}{module}.bytes"] = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    assert stored.keys() == expected.keys()
    assert all(torch.equal(stored[key], tensor) for key, tensor in expected.items())
    assert_same_state(load(tmp_path, kind=kind), model)


def assert_same_state(model, expected) -> None:
    ours, theirs = model.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], tensor) and ours[name].dtype == tensor.dtype for name, tensor in theirs.items())


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("config", [CONFIGS["pyramid"], CONFIGS["4 bits"]], ids=["1 bit", "4 bits"])
def test_a_file_of_format_1_loads_bit_identical_and_is_saved_in_format_2(config, half, tmp_path):
    tiny_model(config).save_pretrained(tmp_path / "latent")
    packing = BinaryViTQuantizationConfig(half=half)
    load(tmp_path / "latent", quantization_config=packing).save_pretrained(tmp_path / "new")
    write_old_layout(shutil.copytree(tmp_path / "new", tmp_path / "old"), half)
    assert (tmp_path / "old" / "model.safetensors").stat().st_size > (
        tmp_path / "new" / "model.safetensors"
    ).stat().st_size
    for kind in (AutoModelForImageClassification, AutoModel, BinaryViTBackbone):
        assert_same_state(load(tmp_path / "old", kind=kind), load(tmp_path / "new", kind=kind))
    load(tmp_path / "old").save_pretrained(tmp_path / "again")
    assert_same_checkpoint(tmp_path / "again", tmp_path / "new")


def test_the_header_of_a_shipped_model_takes_a_hundredth_of_its_file():
    for file in (CONFIG_FILES.parent / "model_cards").glob("*/model.safetensors"):
        content = file.read_bytes()
        assert int.from_bytes(content[:8], "little") < len(content) / 100


def test_the_tensors_of_a_file_are_loaded_into_a_packed_model(packed):
    expected, model = load(packed), load(packed)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.zero_()
    tensors = load_file(packed / "model.safetensors")
    names = list(tensors)
    model.load_state_dict(tensors)  # strict: no key is missing or unexpected
    assert list(tensors) == names
    assert_same_state(model, expected)
    backbone = load(packed, kind=AutoModel)
    backbone.load_state_dict({name.removeprefix("binaryvit."): tensors[name] for name in names if name[0] == "b"})
    assert_same_state(backbone, expected.binaryvit)
    with pytest.raises(RuntimeError, match=r"Tensor 'binaryvit\.norm\.floats' has the shape \(3,\)"):
        model.load_state_dict(tensors | {"binaryvit.norm.floats": torch.zeros(3)}, strict=False)
    given = BinaryViTForImageClassification.from_pretrained(None, config=expected.config, state_dict=tensors)
    assert_same_state(given, expected)


def test_tensors_that_are_not_of_the_network_have_an_entry_of_their_own(packed, tmp_path):
    expected, model = logits(load(packed)), load(packed)
    model.binaryvit.stages[0].layers[1].register_buffer("counter", torch.tensor(7))
    model.binaryvit.norm.register_parameter("probe", torch.nn.Parameter(torch.ones(3)))
    model.save_pretrained(tmp_path / "more")
    stored = load_file(tmp_path / "more" / "model.safetensors")
    assert torch.equal(stored["binaryvit.norm.probe"], torch.ones(3))
    assert stored.keys() - load_file(packed / "model.safetensors").keys() == {
        "binaryvit.norm.probe",
        "binaryvit.stages.0.layers.1.counter",
    }
    assert torch.equal(logits(AutoModelForImageClassification.from_pretrained(tmp_path / "more")), expected)
    model.load_state_dict(stored)


def test_a_module_of_mixed_dtypes_is_saved_without_loss(packed, tmp_path):
    model = load(packed)
    model.binaryvit.stages[0].layers[0].mlp.double()
    model.binaryvit.norm.bfloat16()
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    state = {
        name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in model.state_dict().items()
    }
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.state_dict().items())


def test_a_truncated_file_is_named_with_the_tensor_that_is_cut(packed):
    file = packed / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors' is cut off before the end of tensor 'binaryvit"):
        AutoModelForImageClassification.from_pretrained(packed)


def test_a_packed_config_builds_no_network_of_random_weights(packed):
    config = AutoConfig.from_pretrained(packed)
    with pytest.raises(ValueError, match="packed weights, which a new network does not have"):
        AutoModelForImageClassification.from_config(config)


def test_a_packed_folder_loads_with_the_config_of_a_loaded_model(packed):
    model = AutoModelForImageClassification.from_pretrained(packed)
    expected = copy.deepcopy(model.config.to_dict())
    for kind in (AutoModelForImageClassification, BinaryViTForImageClassification):
        again = kind.from_pretrained(packed, config=model.config)
        assert torch.equal(logits(again), logits(model))
    assert model.config.to_dict() == expected
    with pytest.raises(ValueError, match="new network does not have"):
        BinaryViTForImageClassification(model.config)


def test_a_model_that_is_packed_in_place_is_saved_with_what_loading_needs(tmp_path):
    model = tiny_model().eval()
    model.pack_weights()
    model.save_pretrained(tmp_path / "packed")
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "packed")
    assert torch.equal(logits(loaded), logits(model))
    loaded.binaryvit.save_pretrained(tmp_path / "backbone")
    backbone = AutoModel.from_pretrained(tmp_path / "backbone")
    assert torch.equal(backbone(tiny_images())[0], loaded.binaryvit(tiny_images())[0])


@pytest.mark.parametrize("whole", [True, False])
def test_a_model_whose_layers_are_unpacked_and_packed_again_is_saved_as_it_is(packed, tmp_path, whole):
    model = AutoModelForImageClassification.from_pretrained(packed)
    expected = logits(model)
    unpacked = model if whole else model.base_model
    unpacked.dequantize(latent=True)
    unpacked.save_pretrained(tmp_path / "part")
    assert not type(unpacked).from_pretrained(tmp_path / "part").is_packed
    model.save_pretrained(tmp_path / "latent")
    assert not AutoModelForImageClassification.from_pretrained(tmp_path / "latent").is_packed
    unpacked.pack_weights()
    model.save_pretrained(tmp_path / "packed")
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "packed")
    assert again.is_packed
    torch.testing.assert_close(logits(again), expected)


def test_a_packed_backbone_is_not_loaded_as_a_classifier(packed, tmp_path):
    AutoModel.from_pretrained(packed).save_pretrained(tmp_path / "backbone")
    message = (
        r"lacks the tensor 'classifier\.\S+ load it with the class that saved it, or .* ignore_mismatched_sizes=True\."
    )
    with pytest.raises(ValueError, match=message):
        AutoModelForImageClassification.from_pretrained(tmp_path / "backbone")
    BinaryViTBackbone.from_pretrained(packed).save_pretrained(tmp_path / "maps")
    for auto_class in (AutoModel, AutoModelForImageClassification):
        with pytest.raises(ValueError, match=r"lacks the tensor \S*norm\.\S+ load it with the class that saved it\."):
            auto_class.from_pretrained(tmp_path / "maps")


def test_a_packed_backbone_gets_a_new_classifier_if_that_is_asked_for(packed, tmp_path):
    load(packed, kind=AutoModel).save_pretrained(tmp_path / "backbone")
    model = AutoModelForImageClassification.from_pretrained(
        tmp_path / "backbone", num_labels=5, ignore_mismatched_sizes=True
    )
    assert logits(model).shape == (2, 5)
    assert logits(model).isfinite().all()
    assert_same_bits(model, bits_of(load(packed)))
    edit_tensors(packed, lambda tensors: tensors.pop("classifier.bias"))
    with pytest.raises(ValueError, match=r"lacks the tensor 'classifier\.bias': download it again\."):
        AutoModelForImageClassification.from_pretrained(packed, ignore_mismatched_sizes=True)


def test_the_state_dict_that_is_given_is_saved(packed, tmp_path):
    model = load(packed)
    average = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    average["classifier.bias"] += 5
    average["binaryvit.norm.batch_norm.bias"] += 1
    model.save_pretrained(tmp_path / "average", state_dict=average)
    saved = load(tmp_path / "average").state_dict()
    assert all(torch.equal(saved[name], tensor) for name, tensor in average.items())
    model.save_pretrained(tmp_path / "own")
    assert_same_checkpoint(tmp_path / "own", packed)


UNUSABLE = {
    "names of torch.compile": lambda model: torch.compile(model).state_dict(),
    "the classifier alone": lambda model: model.classifier.state_dict(prefix="classifier."),
    "latent weights": lambda model: copy.deepcopy(model).dequantize(latent=True).state_dict(),
}


@pytest.mark.parametrize("tensors", UNUSABLE.values(), ids=UNUSABLE)
def test_a_state_dict_that_lacks_tensors_of_a_packed_model_is_not_saved(packed, tmp_path, tensors):
    model = load(packed)
    with pytest.raises(ValueError, match=r"state_dict lacks the tensor 'binaryvit\.\S+' of this packed model"):
        model.save_pretrained(tmp_path / "saved", state_dict=tensors(model))
    assert not any((tmp_path / "saved").iterdir())


def test_a_rank_that_writes_no_file_saves_an_empty_state_dict(packed, tmp_path):
    load(packed).save_pretrained(tmp_path / "rank", is_main_process=False, state_dict={})
    assert not any((tmp_path / "rank").iterdir())


EDITS = {
    "heads": {"num_attention_heads": [1, 4]},
    "layers": {"depths": [1, 1]},
    "stages": {"depths": [2, 1, 1]},
    "LayerScale": {"use_layer_scale": False},
    "eps": {"batch_norm_eps": 1e-3},
    "bits": {"weight_bits": 32},
    "size": {"image_size": 32},
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_a_model_whose_edited_config_is_of_another_network_is_not_saved(packed, tmp_path, edit):
    model = load(packed)
    for name, value in edit.items():
        setattr(model.config, name, value)
    with pytest.raises(
        ValueError, match=r"config was edited and does not describe this network \(.*\): undo the edit\."
    ):
        model.save_pretrained(tmp_path / "edited")
    assert not (tmp_path / "edited" / "model.safetensors").exists()


def test_a_model_is_saved_if_its_config_is_edited_as_its_modules_or_with_a_warning_its_modules_alone(
    packed, tmp_path, caplog
):
    model = load(packed)
    del model.binaryvit.stages[0].layers[1]
    model.config.depths, model.config.drop_path_rate = [1, 1], 0.1
    model.save_pretrained(tmp_path / "shorter")
    assert torch.equal(logits(load(tmp_path / "shorter")), logits(model))
    assert "edit" not in caplog.text
    model = load(packed)
    model.classifier = torch.nn.Sequential(model.classifier)
    model.save_pretrained(tmp_path / "replaced")
    assert "its classifier is not the one of its config): the saved model will not have this edit" in caplog.text
    caplog.clear()
    model = load(packed)
    model.binaryvit.norm.batch_norm.eps = 1e-3
    model.save_pretrained(tmp_path / "eps")
    assert "the saved model will not have this edit" in caplog.text


UNLOADABLE = {
    "a norm is gone": lambda network: setattr(network, "norm", torch.nn.Identity()),
    "a layer is gone": lambda network: network.stages[0].layers.__delitem__(1),
    "another stem": lambda network: setattr(
        network.embeddings, "projection", torch.nn.Conv2d(1, network.embeddings.projection.out_channels, 4, 4)
    ),
}


@pytest.mark.parametrize("edit", UNLOADABLE.values(), ids=UNLOADABLE)
def test_an_edited_model_that_nobody_could_load_is_not_saved(packed, tmp_path, edit):
    model = load(packed)
    edit(model.binaryvit)
    with pytest.raises(ValueError, match=r"nobody could load what it saves: its tensor 'binaryvit\.\S+' "):
        model.save_pretrained(tmp_path / "edited")
    assert not (tmp_path / "edited" / "model.safetensors").exists()


def test_a_subclass_and_batch_norms_of_several_gpus_are_no_edit(packed, tmp_path, caplog):
    class Ours(BinaryViTModel):
        pass

    Ours.from_pretrained(packed).save_pretrained(tmp_path / "subclass")
    several = torch.nn.SyncBatchNorm.convert_sync_batchnorm(load(packed))
    several.save_pretrained(tmp_path / "several")
    assert "edit" not in caplog.text
    assert torch.equal(logits(load(tmp_path / "several")), logits(load(packed)))


def test_another_number_of_labels_names_the_ways_to_keep_and_to_replace_the_classifier(packed):
    message = r"'classifier\..*: num_labels=\d+ keeps the classifier, ignore_mismatched_sizes=True makes a new one\.$"
    with pytest.raises(ValueError, match=message):
        AutoModelForImageClassification.from_pretrained(packed, num_labels=5)


def test_weights_of_torch_save_are_not_called_damaged(packed):
    torch.save(load(packed).state_dict(), packed / "pytorch_model.bin")
    (packed / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"'pytorch_model\.bin' is no file of safetensors"):
        AutoModelForImageClassification.from_pretrained(packed)


def test_a_loaded_model_changes_its_precision_by_any_method_of_pytorch(packed):
    model, expected = load(packed), logits(load(packed))
    assert model.half().classifier.weight.dtype == torch.float16
    assert torch.allclose(logits(model.float()), expected, atol=0.05)
    assert model.double().float().classifier.weight.dtype == torch.float32


def test_latent_weights_of_low_precision_are_packed_with_a_warning(caplog):
    transformers_logging.warning_once.cache_clear()
    tiny_model().pack_weights()
    assert "keep them in float32" not in caplog.text
    tiny_model().bfloat16().pack_weights()
    assert "keep them in float32" in caplog.text


@pytest.mark.parametrize("name", ["classifier.bias", "binaryvit.norm.bytes", f"{LAYER}.floats"])
def test_a_checkpoint_that_lacks_a_tensor_is_downloaded_again(packed, name):
    edit_tensors(packed, lambda tensors: tensors.pop(name))
    with pytest.raises(ValueError, match=r"lacks the tensor \S+ download it again\."):
        AutoModelForImageClassification.from_pretrained(packed)


def test_a_trained_model_with_a_flipped_bit_loads_bit_identical_or_raises_one_clear_error(tmp_path):
    packed = shutil.copytree(CONFIG_FILES.parent / "model_cards" / "binaryvit-digits", tmp_path / "digits")
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = load(packed)(images).logits
    file, generator = packed / "model.safetensors", torch.Generator().manual_seed(0)
    good = file.read_bytes()
    header = 8 + int.from_bytes(good[:8], "little")
    # Half of the damage is in the header. It is a small part of the file, but it can be damaged in more ways.
    offsets = torch.cat([torch.randint(end, (50,), generator=generator) for end in (header, len(good))]).tolist()
    refused = 0
    for offset in [*range(8), *offsets]:
        damaged = bytearray(good)
        damaged[offset] ^= 1 << int(torch.randint(8, (), generator=generator))
        file.write_bytes(damaged)
        try:
            model = AutoModelForImageClassification.from_pretrained(packed)
        except ValueError as error:
            assert len(str(error).splitlines()) == 1
            refused += 1
            continue
        with torch.no_grad():
            assert torch.equal(model(images).logits, expected), offset
    assert refused > 95


def test_a_flipped_bit_in_the_config_never_changes_an_output(packed):
    expected = logits(load(packed))
    file, generator = packed / "config.json", torch.Generator().manual_seed(0)
    good = file.read_bytes()
    for offset in torch.randint(len(good), (50,), generator=generator).tolist():
        damaged = bytearray(good)
        damaged[offset] ^= 1 << int(torch.randint(8, (), generator=generator))
        file.write_bytes(damaged)
        try:
            model = BinaryViTForImageClassification.from_pretrained(packed)
        except (ValueError, OSError, AttributeError, StrictDataclassError):  # AttributeError: an unknown dtype
            continue
        assert torch.equal(logits(model), expected), offset

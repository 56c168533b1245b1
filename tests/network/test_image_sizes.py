"""Images of other sizes than the config's: interpolated position embeddings at a call, and resized ones in a model."""

import copy
import threading

import pytest
import torch
from tiny import class_token_config, tiny_config, tiny_images, tiny_model
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, ViTConfig
from transformers.models.vit.modeling_vit import ViTEmbeddings

from binaryvit_hf import BinaryViTBackbone, BinaryViTForImageClassification, BinaryViTQuantizationConfig, engine
from binaryvit_hf.network.engine_binaryvit import RESIZED_ENGINES
from binaryvit_hf.network.layers_binaryvit import resize_positions


CONFIGS = {
    "pyramid": tiny_config,
    "some full precision": lambda: tiny_config(binarize_patch_embeddings=False),
    "class token": class_token_config,
}
SIZES = [(32, 64), (8, 8), (24, 40), (56, 16), (32, 16)]
needs_engine = pytest.mark.skipif(not engine.kernels_here(), reason=f"there is no engine: {engine.problem()}")


@pytest.fixture(params=CONFIGS)
def model(request):
    return tiny_model(CONFIGS[request.param]()).eval()


def images_of(size: tuple[int, int], batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1))


def resized(model, image_size) -> nn.Module:
    other = copy.deepcopy(model)
    other.resize_position_embeddings(image_size)
    return other


def positions_of(model) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if name.endswith("position_embeddings")}


def assert_same_tensors(model, expected) -> None:
    ours, theirs = model.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=0, msg=name)


# ---- A call with interpolate_pos_encoding ----


@pytest.mark.parametrize("grid_size", [(12, 12), (3, 9), (4, 7)], ids=str)
def test_positions_are_interpolated_as_in_vit_and_the_class_token_keeps_its_own(grid_size):
    vit = ViTEmbeddings(ViTConfig(image_size=28, patch_size=4, hidden_size=8, num_attention_heads=2))
    expected = vit.interpolate_pos_encoding(
        torch.zeros(1, 1 + grid_size[0] * grid_size[1], 8), *(4 * side for side in grid_size)
    )
    actual = resize_positions(vit.position_embeddings, (7, 7), grid_size)
    torch.testing.assert_close(actual, expected)
    assert torch.equal(actual[:, 0], vit.position_embeddings[:, 0])


def test_positions_of_an_oblong_map_are_interpolated_along_their_own_sides():
    rows = torch.arange(4.0).view(1, 4, 1, 1).expand(1, 4, 6, 1).flatten(1, 2)
    doubled = resize_positions(rows, (4, 6), (8, 3)).unflatten(1, (8, 3))
    assert torch.equal(doubled, doubled[:, :, :1].expand_as(doubled))  # columns stay equal
    assert (doubled[0, 1:, 0, 0] > doubled[0, :-1, 0, 0]).all()


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_call_with_another_size_equals_a_model_of_that_size(model, size):
    config = model.config.to_dict()
    outputs = model(images_of(size), interpolate_pos_encoding=True, output_hidden_states=True, output_attentions=True)
    expected = resized(model, size)(images_of(size), output_hidden_states=True, output_attentions=True)
    assert torch.equal(outputs.logits, expected.logits)
    for ours, theirs in zip(outputs.hidden_states + outputs.attentions, expected.hidden_states + expected.attentions):
        assert torch.equal(ours, theirs)
    assert model.config.to_dict() == config
    for ours, theirs in zip(outputs.reshaped_hidden_states, expected.reshaped_hidden_states):
        assert torch.equal(ours, theirs)
    backbone = model.binaryvit(images_of(size), interpolate_pos_encoding=True)
    assert torch.equal(model.classifier(backbone.pooler_output), outputs.logits)


@pytest.mark.parametrize("packed", [False, True])
def test_feature_maps_of_another_size_equal_those_of_a_backbone_of_that_size(packed):
    model = BinaryViTBackbone(tiny_config(out_features=["stem", "stage1", "stage2"])).eval()
    model.load_state_dict(tiny_model().binaryvit.state_dict(), strict=False)
    if packed:
        model.pack_weights()
    model.requires_grad_(False)
    maps = model(images_of((32, 24)), interpolate_pos_encoding=True).feature_maps
    expected = resized(model, (32, 24))(images_of((32, 24))).feature_maps
    assert [tuple(token_map.shape[1:]) for token_map in maps] == [(8, 8, 6), (8, 8, 6), (16, 4, 3)]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(maps, expected))


def test_the_models_own_size_needs_no_interpolation(model):
    assert torch.equal(model(tiny_images(), interpolate_pos_encoding=True).logits, model(tiny_images()).logits)


def test_without_the_flag_another_size_is_refused_by_a_sentence_that_names_it(model):
    for call in (model, model.binaryvit):
        with pytest.raises(ValueError, match=r"\(3, 16, 32\), not \(3, 32, 32\); .* interpolate_pos_encoding=True\.$"):
            call(images_of((32, 32)))


@pytest.mark.parametrize("flag", [False, True])
def test_images_without_a_batch_or_of_other_channels_are_told_from_those_of_another_size(model, flag):
    for shape in ((3, 16, 32), (1, 1, 3, 16, 32)):
        with pytest.raises(ValueError, match=r"must be a tensor \(batch, channels, height, width\), not \("):
            model(torch.zeros(shape), interpolate_pos_encoding=flag)
    with pytest.raises(ValueError, match=r"not \(1, 16, 32\); an image processor gives them these channels\.$"):
        model(torch.zeros(2, 1, 16, 32), interpolate_pos_encoding=flag)


@pytest.mark.parametrize(
    "shape, message",
    [
        (
            (3, 30, 32),
            r"image_size=\(30, 32\) is not a multiple of patch_size=4: the nearest size that fits is \(32, 32\)",
        ),
        ((3, 16, 36), r"cannot be halved|does not divide the 9 tokens.*the nearest size that fits is \(16, 32\)"),
        ((3, 2, 16), r"the nearest size that fits is \(8, 16\)"),
        ((3, 0, 16), r"image_size must be from 1 to 16384"),
        ((1, 32, 32), r"takes images of .* \(3, 16, 32\), not \(1, 32, 32\)"),
        ((3, 8192, 8192), r"Stage 0 has 4194304 tokens an image, too many"),
    ],
    ids=str,
)
@pytest.mark.parametrize("packed", [False, True])
def test_a_size_that_does_not_fit_is_refused_with_one_that_does(shape, message, packed):
    model = packed_model() if packed else tiny_model().eval()
    images = torch.zeros(1, *([1] * len(shape))).expand(1, *shape) if 0 not in shape else torch.zeros(1, *shape)
    with pytest.raises(ValueError, match=message):
        model(images, interpolate_pos_encoding=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_another_size_is_computed_in_every_precision(model, dtype):
    logits = model.to(dtype)(images_of((32, 64)).to(dtype), interpolate_pos_encoding=True).logits
    assert logits.dtype == dtype
    assert logits.isfinite().all()


def test_every_stage_learns_its_positions_through_the_interpolation():
    images, labels = images_of((32, 48)).double(), torch.tensor([0, 1])
    plain, checkpointed = tiny_model().double().train(), tiny_model().double().train()
    checkpointed.gradient_checkpointing_enable()
    for model in (plain, checkpointed):
        model(images, labels=labels, interpolate_pos_encoding=True).loss.backward()
    for (name, ours), theirs in zip(checkpointed.named_parameters(), plain.parameters()):
        torch.testing.assert_close(ours.grad, theirs.grad, msg=name)
    assert all(module.position_embeddings.grad.any() for module in plain.binaryvit.positioned_embeddings().values())


def test_another_size_compiles_as_one_graph():
    model = tiny_model(tiny_config(depths=[1, 1], avg_pool_kernel_sizes=[])).eval()
    compiled, images = torch.compile(model, fullgraph=True, backend="eager"), images_of((32, 24))
    with torch.no_grad():
        expected = model(images, interpolate_pos_encoding=True).logits
        torch.testing.assert_close(compiled(images, interpolate_pos_encoding=True).logits, expected)


def test_another_size_has_gradients_on_the_meta_device():
    model, images = tiny_model().to("meta").eval(), images_of((32, 64)).to("meta")
    model(images, interpolate_pos_encoding=True).logits.sum().backward()
    assert all(parameter.grad.is_meta for parameter in model.parameters())
    model.resize_position_embeddings((32, 64))
    assert model(images).logits.shape == (2, 3)


# ---- On the engine ----


def packed_model(config=None) -> nn.Module:
    model = tiny_model(config).eval()
    model.pack_weights()
    return model.requires_grad_(False)


def kept_sizes(model) -> list[tuple[int, int]]:
    return list(model.binaryvit.engine_slot.folded.resized)


@needs_engine
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_engine_computes_interleaved_sizes_as_pytorch_does(config, monkeypatch):
    model = packed_model(config())
    sizes = [*SIZES, (16, 32), SIZES[0], SIZES[3], (16, 32), SIZES[0]]
    ours = [model(images_of(size), interpolate_pos_encoding=True, output_hidden_states=True) for size in sizes]
    logits = [model(images_of(size), interpolate_pos_encoding=True).logits for size in sizes]
    monkeypatch.setenv("BINARYVIT_ENGINE", "torch")
    for size, actual, alone in zip(sizes, ours, logits):
        expected = model(images_of(size), interpolate_pos_encoding=True, output_hidden_states=True)
        torch.testing.assert_close(actual.logits, expected.logits)
        torch.testing.assert_close(alone, expected.logits)
        assert len(actual.hidden_states) == len(expected.hidden_states)
        for state, other in zip(actual.hidden_states, expected.hidden_states):
            torch.testing.assert_close(state, other)


@needs_engine
def test_the_engine_keeps_the_last_sizes_and_leaves_out_the_one_used_least_recently():
    model = packed_model()
    sizes = [(8 * side, 8) for side in range(1, RESIZED_ENGINES + 1)]
    for size in [*sizes, sizes[0], (8, 64)]:
        model(images_of(size), interpolate_pos_encoding=True)
    assert kept_sizes(model) == [*sizes[2:], sizes[0], (8, 64)]
    model(tiny_images())
    assert len(kept_sizes(model)) == RESIZED_ENGINES


@needs_engine
@pytest.mark.parametrize(
    "name", ["embeddings.position_embeddings", "stages.1.patch_embeddings.position_embeddings", "norm.batch_norm.bias"]
)
def test_an_edit_of_the_model_drops_all_folded_sizes(name, monkeypatch):
    model = packed_model()
    before = [model(images_of(size), interpolate_pos_encoding=True).logits for size in SIZES[:3]]
    with torch.no_grad():
        model.binaryvit.state_dict()[name].add_(torch.randn(model.binaryvit.state_dict()[name].shape[-1]))
    after = [model(images_of(size), interpolate_pos_encoding=True).logits for size in SIZES[:3]]
    monkeypatch.setenv("BINARYVIT_ENGINE", "torch")
    for size, old, new in zip(SIZES, before, after):
        assert not torch.allclose(old, new)
        torch.testing.assert_close(new, model(images_of(size), interpolate_pos_encoding=True).logits)


@needs_engine
def test_a_resized_model_runs_on_the_engine_and_keeps_nothing_of_its_old_size(monkeypatch):
    model = packed_model()
    expected = model(images_of((32, 64)), interpolate_pos_encoding=True).logits
    model.resize_position_embeddings((32, 64))
    assert torch.equal(model(images_of((32, 64))).logits, expected)
    assert model.engine.name != "torch"
    assert kept_sizes(model) == []


@needs_engine
def test_an_edit_of_the_config_does_not_change_a_size_that_is_folded_later():
    model, other = packed_model(), packed_model()
    expected = other(images_of((32, 64)), interpolate_pos_encoding=True).logits
    model(tiny_images())
    model.config.num_attention_heads = [1, 1]
    model.config.image_size = 64
    assert torch.equal(model(images_of((32, 64)), interpolate_pos_encoding=True).logits, expected)


@needs_engine
def test_threads_with_images_of_many_sizes_share_a_model():
    model = packed_model()
    sizes = [(8 * height, 8 * width) for height in (1, 2, 3) for width in (1, 2)]
    expected = {size: model(images_of(size), interpolate_pos_encoding=True).logits for size in sizes}
    wrong = []

    def work(shift: int):
        try:
            for turn in range(30):
                size = sizes[(turn + shift) % len(sizes)]
                if not torch.equal(model(images_of(size), interpolate_pos_encoding=True).logits, expected[size]):
                    wrong.append(size)
        except Exception as error:
            wrong.append(error)

    workers = [threading.Thread(target=work, args=(shift,)) for shift in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong
    assert len(kept_sizes(model)) <= RESIZED_ENGINES


# ---- In a model, for good ----


def test_one_size_may_be_written_in_two_ways(tmp_path):
    config = tiny_config(image_size=32)
    model = tiny_model(config).eval()
    model.pack_weights()
    model.save_pretrained(tmp_path)
    for sizes in ({"image_size": [32, 32]}, {"image_size": (32, 32), "patch_size": [4, 4]}, {"patch_size": (4, 4)}):
        loaded = AutoModelForImageClassification.from_pretrained(tmp_path, **sizes)
        torch.testing.assert_close(loaded(images_of((32, 32))).logits, model(images_of((32, 32))).logits)


def test_resizing_keeps_all_other_tensors_and_the_order_of_parameters(model):
    other = resized(model, (24, 40))
    assert list(other.state_dict()) == list(model.state_dict())
    assert other.config.image_size == (24, 40)
    for name, tensor in model.state_dict().items():
        assert name.endswith("position_embeddings") or torch.equal(other.state_dict()[name], tensor)
    assert all(parameter.requires_grad for parameter in other.parameters())
    assert not any(parameter.requires_grad for parameter in resized(model.requires_grad_(False), 24).parameters())


def test_a_size_that_does_not_fit_leaves_the_model_as_it_was(model):
    expected = copy.deepcopy(model)
    for size in (30, (16, 0), "32", 32.0, [32.0, 32], True, None, [16, 16, 16], 2**14):
        with pytest.raises(ValueError, match=r"image_size|too many"):
            model.resize_position_embeddings(size)
    assert_same_tensors(model, expected)
    assert model.config.to_dict() == expected.config.to_dict()
    assert torch.equal(model(tiny_images()).logits, expected(tiny_images()).logits)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Folders `latent` and `packed` of one model, also as subfolders."""
    root = tmp_path_factory.mktemp("checkpoints")
    tiny_model().save_pretrained(root / "latent")
    packing = BinaryViTQuantizationConfig()
    packed = BinaryViTForImageClassification.from_pretrained(root / "latent", quantization_config=packing)
    packed.save_pretrained(root / "packed")
    return root


@pytest.mark.parametrize(
    "folder, kind, image_size",
    [
        ("latent", AutoModelForImageClassification, (32, 64)),
        ("latent", AutoModel, (32, 16)),
        ("packed", BinaryViTForImageClassification, (32, 16)),
        ("packed", AutoModel, 64),
        ("packed", BinaryViTBackbone, (24, 40)),
    ],
)
def test_a_checkpoint_loads_at_another_size_with_its_positions_resized(
    checkpoints, folder, kind, image_size, tmp_path
):
    original = kind.from_pretrained(checkpoints / folder)
    expected = resized(original, image_size)
    config = AutoConfig.from_pretrained(checkpoints / folder)
    config.image_size = image_size
    for source, arguments in (
        (checkpoints / folder, {"image_size": image_size}),
        (checkpoints / folder, {"config": config}),
        (checkpoints, {"image_size": image_size, "subfolder": folder}),
    ):
        loaded, info = kind.from_pretrained(source, output_loading_info=True, **arguments)
        assert_same_tensors(loaded, expected)
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
        assert loaded.config.image_size == image_size
        assert loaded.is_packed == (folder == "packed")
    assert config.image_size == image_size
    loaded.save_pretrained(tmp_path)
    again = kind.from_pretrained(tmp_path)
    assert_same_tensors(again, expected)
    assert again.engine.name == original.engine.name


def test_a_latent_checkpoint_is_packed_and_resized_in_one_call(checkpoints):
    packing = BinaryViTQuantizationConfig()
    loaded = AutoModelForImageClassification.from_pretrained(
        checkpoints / "latent", image_size=64, quantization_config=packing
    )
    assert_same_tensors(loaded, AutoModelForImageClassification.from_pretrained(checkpoints / "packed", image_size=64))


def test_a_new_head_does_not_make_positions_random(checkpoints):
    original = BinaryViTForImageClassification.from_pretrained(checkpoints / "latent")
    expected = positions_of(resized(original, 64))
    options = {"num_labels": 7, "ignore_mismatched_sizes": True, "image_size": 64}
    for kind in (AutoModelForImageClassification, BinaryViTForImageClassification):
        loaded = kind.from_pretrained(checkpoints / "latent", **options)
        assert loaded(images_of((64, 64))).logits.shape == (2, 7)
        for name, tensor in positions_of(loaded).items():
            assert torch.equal(tensor, expected[name])


def test_a_config_in_another_folder_gives_the_size(checkpoints, tmp_path):
    tiny_config(image_size=64).save_pretrained(tmp_path)
    loaded = BinaryViTForImageClassification.from_pretrained(checkpoints / "latent", config=tmp_path)
    assert loaded.config.image_size == 64
    assert loaded(images_of((64, 64))).logits.shape == (2, 3)


@pytest.mark.parametrize("kind", [AutoModelForImageClassification, BinaryViTForImageClassification])
@pytest.mark.parametrize("folder", ["latent", "packed"])
def test_loading_at_a_size_that_does_not_fit_is_refused_with_one_that_does(checkpoints, folder, kind):
    with pytest.raises(ValueError, match=r"not a multiple of patch_size=4: the nearest size that fits is 32\."):
        kind.from_pretrained(checkpoints / folder, image_size=33)


@pytest.mark.parametrize("folder", ["latent", "packed"])
def test_patches_of_another_size_are_refused_as_before(checkpoints, folder):
    with pytest.raises((RuntimeError, ValueError), match=r"image_size=64|mismatched"):
        BinaryViTForImageClassification.from_pretrained(checkpoints / folder, patch_size=8, image_size=64)


def test_damage_is_found_at_another_size_too(checkpoints, tmp_path):
    for file in (checkpoints / "packed").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    content = bytearray((tmp_path / "model.safetensors").read_bytes())
    content[-5] ^= 1
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="was changed after saving"):
        AutoModelForImageClassification.from_pretrained(tmp_path, image_size=64)


def test_offloaded_positions_are_not_resized(checkpoints, tmp_path):
    on_disk = {"binaryvit.embeddings": "disk", "binaryvit.stages": "cpu", "binaryvit.norm": "cpu", "classifier": "cpu"}
    with pytest.raises(ValueError, match="position embeddings are offloaded: load the model without a device_map"):
        BinaryViTForImageClassification.from_pretrained(
            checkpoints / "latent", image_size=64, device_map=on_disk, offload_folder=tmp_path
        )

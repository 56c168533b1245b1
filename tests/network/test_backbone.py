"""The backbone: feature maps of every stage, packed and latent, alone and under heads of transformers."""

import json

import pytest
import torch
from tiny import class_token_config, tiny_config, tiny_images, tiny_model
from transformers import (
    AutoBackbone,
    AutoModel,
    ConditionalDetrConfig,
    ConditionalDetrForObjectDetection,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)

from binaryvit_hf import BinaryViTBackbone, BinaryViTConfig, BinaryViTQuantizationConfig, engine


CONFIG_KINDS = {
    "pyramid": tiny_config,
    "some full precision": lambda: tiny_config(binarize_patch_embeddings=False),
    "class token": class_token_config,
}


@pytest.fixture(scope="module", params=CONFIG_KINDS)
def classifier(request):
    return tiny_model(CONFIG_KINDS[request.param]()).eval()


@pytest.fixture(scope="module")
def folders(classifier, tmp_path_factory):
    """Folders of a latent classifier and of the same packed."""
    root = tmp_path_factory.mktemp("classifier")
    classifier.save_pretrained(root / "latent")
    packed = type(classifier).from_pretrained(root / "latent", quantization_config=BinaryViTQuantizationConfig())
    packed.save_pretrained(root / "packed")
    return root


def load_all_maps(folder) -> BinaryViTBackbone:
    names = BinaryViTConfig.from_pretrained(folder).stage_names
    return BinaryViTBackbone.from_pretrained(folder, out_features=names)


@pytest.mark.parametrize("kind", ["latent", "packed"])
def test_the_maps_are_the_residual_stream_of_a_classifier_and_no_tensor_is_missing(classifier, folders, kind):
    backbone, info = BinaryViTBackbone.from_pretrained(
        folders / kind, out_features=classifier.config.stage_names, output_loading_info=True
    )
    assert not any(info.values())
    stages = classifier.binaryvit.stages
    outputs = []
    handles = [
        module.register_forward_hook(lambda _, inputs, output: outputs.append(output))
        for module in (classifier.binaryvit.embeddings, *(stage.layers[-1] for stage in stages))
    ]
    with torch.no_grad():
        classifier(tiny_images())
        maps = backbone(tiny_images()).feature_maps
    for handle in handles:
        handle.remove()
    grids = [classifier.config.grid_sizes[0], *classifier.config.grid_sizes]
    channels = [classifier.config.hidden_sizes[0], *classifier.config.hidden_sizes]
    assert len(maps) == len(outputs) == len(classifier.config.stage_names)
    for feature_map, tokens, (height, width), depth in zip(maps, outputs, grids, channels):
        assert feature_map.shape == (2, depth, height, width)
        tokens = tokens[:, classifier.config.use_class_token :]
        torch.testing.assert_close(feature_map.flatten(2), tokens.transpose(1, 2))
    assert backbone.channels == channels


@pytest.mark.skipif(not engine.kernels_here(), reason="there is no engine")
@pytest.mark.parametrize("kernels", engine.kernels_here())
def test_the_engine_gives_the_maps_of_pytorch_for_any_choice_batch_and_threads(folders, kernels, monkeypatch):
    backbone = load_all_maps(folders / "packed")
    names, images = backbone.stage_names, tiny_images(5)
    monkeypatch.setenv("BINARYVIT_ENGINE", "torch")
    expected = dict(zip(names, backbone(images).feature_maps))
    monkeypatch.setenv("BINARYVIT_ENGINE", kernels)
    assert backbone.engine.name == kernels
    alone = dict(zip(names, backbone(images).feature_maps))
    for chosen in (names, names[:1], names[-1:], names[1:2]):
        backbone.out_features = chosen
        for name, feature_map in zip(chosen, backbone(images).feature_maps):
            torch.testing.assert_close(feature_map, expected[name])
            assert torch.equal(feature_map, alone[name])
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    backbone.out_features = names
    for batch in (0, 1, 2, 5):
        for name, feature_map in zip(names, backbone(images[:batch]).feature_maps):
            assert torch.equal(feature_map, alone[name][:batch])


def test_hidden_states_are_all_maps_and_attentions_are_those_of_the_model(folders):
    backbone, model = (
        BinaryViTBackbone.from_pretrained(folders / "packed"),
        AutoModel.from_pretrained(folders / "packed"),
    )
    outputs = backbone(tiny_images(), output_hidden_states=True, output_attentions=True)
    assert list(outputs) == ["feature_maps", "hidden_states", "attentions"]
    assert len(outputs.feature_maps) == 1
    assert [len(outputs.hidden_states), len(outputs.attentions)] == [
        len(backbone.stage_names),
        backbone.config.num_hidden_layers,
    ]
    assert torch.equal(outputs.hidden_states[-1], outputs.feature_maps[0])
    for ours, theirs in zip(outputs.attentions, model(tiny_images(), output_attentions=True).attentions):
        assert torch.equal(ours, theirs)
    assert list(backbone(tiny_images())) == ["feature_maps"]
    (maps,) = backbone(tiny_images(), return_dict=False)
    assert torch.equal(maps[0], backbone(tiny_images()).feature_maps[0])


@pytest.mark.parametrize("kind", ["latent", "packed"])
def test_a_backbone_is_saved_with_its_choice_and_loads_bit_identical(folders, tmp_path, kind):
    backbone = load_all_maps(folders / kind)
    backbone.save_pretrained(tmp_path)
    again, info = BinaryViTBackbone.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert again.out_features == backbone.stage_names
    for ours, theirs in zip(again(tiny_images()).feature_maps, backbone(tiny_images()).feature_maps, strict=True):
        assert torch.equal(ours, theirs)


def test_every_parameter_of_a_backbone_gets_a_gradient(classifier):
    backbone = BinaryViTBackbone(classifier.config).train()
    assert type(AutoBackbone.from_config(classifier.config)) is BinaryViTBackbone
    backbone(tiny_images()).feature_maps[0].square().mean().backward()
    unused = [name for name, parameter in backbone.named_parameters() if parameter.grad is None]
    assert not unused  # DDP stops at one


@pytest.mark.parametrize("chosen, last", [(["stem"], 0), (["stage1"], 1), (["stem", "stage2"], 2)])
def test_stages_after_the_last_map_are_computed_for_attentions_only(chosen, last):
    backbone = BinaryViTBackbone(tiny_config(out_features=chosen)).train()
    computed = []
    for number, stage in enumerate(backbone.stages, 1):
        stage.register_forward_hook(lambda *_, number=number: computed.append(number))
    assert len(backbone(tiny_images()).feature_maps) == len(chosen)
    assert computed == [1, 2][:last]
    for name, output in (("output_attentions", 3), ("output_hidden_states", 3)):
        computed.clear()
        assert len(backbone(tiny_images(), **{name: True})[name.removeprefix("output_")]) == output
        assert computed == [1, 2]


def test_out_features_are_the_last_stage_until_chosen_and_only_a_choice_is_saved(tmp_path):
    config = tiny_config()
    assert (config.out_features, config.out_indices) == (["stage2"], [2])
    config.save_pretrained(tmp_path)
    assert not [name for name in json.loads((tmp_path / "config.json").read_text()) if name.startswith("out_")]
    shorter = BinaryViTConfig.from_pretrained(
        tmp_path,
        **{name: value[:1] for name, value in config.to_dict().items() if isinstance(value, list) and len(value) == 2}
        | {"image_size": [16, 32], "avg_pool_kernel_sizes": [3]},
    )
    assert shorter.out_features == ["stage1"]
    chosen = BinaryViTConfig.from_pretrained(tmp_path, out_indices=(0, 2))
    chosen.save_pretrained(tmp_path)
    assert BinaryViTConfig.from_pretrained(tmp_path).out_features == ["stem", "stage2"]


@pytest.mark.parametrize("choice", [{"out_features": ["stage3"]}, {"out_indices": [3]}, {"out_features": "stage2"}])
def test_maps_that_do_not_exist_are_refused(choice):
    with pytest.raises(ValueError, match=r"out_(features|indices) must be"):
        tiny_config(**choice)


def pyramid_config(**changes) -> BinaryViTConfig:
    return tiny_config(out_features=["stage1", "stage2"], **changes)


def segmentation_model(config=None) -> UperNetForSemanticSegmentation:
    torch.manual_seed(0)
    config = UperNetConfig(
        backbone_config=config or pyramid_config(),
        hidden_size=8,
        pool_scales=[1, 2],
        use_auxiliary_head=False,
        num_labels=3,
    )
    return UperNetForSemanticSegmentation(config)


def segmentation_losses(model, steps: int = 8) -> list[float]:
    """Losses of training steps on one batch: the class of a pixel is the half of the picture that it is in."""
    labels = torch.arange(32).ge(16).long().expand(2, 16, 32)
    optimizer, losses = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02), []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(pixel_values=tiny_images(), labels=labels).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_a_segmentation_head_trains_a_latent_backbone_saves_and_loads_it(tmp_path):
    model = segmentation_model().train()
    before = {name: tensor.clone() for name, tensor in model.backbone.named_parameters()}
    losses = segmentation_losses(model)
    assert losses[-1] < losses[0] - 0.05
    assert all(not torch.equal(before[name], tensor) for name, tensor in model.backbone.named_parameters())
    model.eval().save_pretrained(tmp_path)
    loaded, info = UperNetForSemanticSegmentation.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    with torch.no_grad():
        assert torch.equal(loaded(tiny_images()).logits, model(tiny_images()).logits)


def test_a_segmentation_head_trains_on_a_frozen_packed_backbone(tmp_path):
    tiny_model(pyramid_config()).save_pretrained(tmp_path)
    model = segmentation_model()
    model.backbone = BinaryViTBackbone.from_pretrained(tmp_path, quantization_config=BinaryViTQuantizationConfig())
    assert not model.train().backbone.training
    before = {name: tensor.clone() for name, tensor in model.backbone.state_dict().items()}
    losses = segmentation_losses(model)
    assert losses[-1] < losses[0] - 0.05
    assert model.backbone.engine.name == (engine.kernels_here() or ["torch"])[0]
    assert all(torch.equal(before[name], tensor) for name, tensor in model.backbone.state_dict().items())
    assert model.eval()(tiny_images()).logits.shape == (2, 3, 16, 32)


@pytest.fixture(scope="module")
def packed_backbone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pyramid")
    tiny_model(pyramid_config()).save_pretrained(folder)
    return BinaryViTBackbone.from_pretrained(folder, quantization_config=BinaryViTQuantizationConfig())


def test_a_head_saves_its_packed_backbone_and_loads_it_frozen_and_on_the_engine(packed_backbone, tmp_path):
    model = segmentation_model(config=packed_backbone.config).eval()
    assert model.backbone(tiny_images()).feature_maps[-1].isnan().all()  # built, but not loaded
    model.backbone = packed_backbone
    model.save_pretrained(tmp_path / "head")
    loaded, info = UperNetForSemanticSegmentation.from_pretrained(tmp_path / "head", output_loading_info=True)
    assert not any(info.values())
    assert_same_network(loaded.train().backbone, packed_backbone)
    assert not any(parameter.requires_grad for parameter in loaded.backbone.parameters())
    with torch.no_grad():
        # The head's convolutions round as the alignment of their weights in memory has it, on CPUs without AVX-512.
        torch.testing.assert_close(loaded.eval()(tiny_images()).logits, model(tiny_images()).logits)
    loaded.backbone.save_pretrained(tmp_path / "backbone")
    assert_same_network(BinaryViTBackbone.from_pretrained(tmp_path / "backbone"), packed_backbone)
    options = {"num_labels": 5, "ignore_mismatched_sizes": True}
    new_head = UperNetForSemanticSegmentation.from_pretrained(tmp_path / "head", **options)
    assert_same_network(new_head.backbone, packed_backbone)


def assert_same_network(backbone, expected) -> None:
    assert backbone.is_packed
    assert backbone.engine == expected.engine
    for ours, theirs in zip(backbone(tiny_images()).feature_maps, expected(tiny_images()).feature_maps, strict=True):
        assert torch.equal(ours, theirs)


def test_a_head_whose_backbone_is_packed_and_unpacked_in_place_is_saved_as_it_is(tmp_path):
    model = segmentation_model().train()
    model.backbone.pack_weights()
    assert not model.backbone.training
    model.eval()
    with torch.no_grad():
        expected = model(tiny_images()).logits
    for is_packed in (True, False):
        model.save_pretrained(tmp_path)
        model = UperNetForSemanticSegmentation.from_pretrained(tmp_path)
        assert model.backbone.is_packed == is_packed
        with torch.no_grad():
            torch.testing.assert_close(model(tiny_images()).logits, expected)
        if is_packed:
            model.backbone.dequantize(latent=True)


def test_a_head_with_the_config_of_a_latent_backbone_does_not_load_packed_weights(packed_backbone, tmp_path):
    model = segmentation_model()
    model.backbone = packed_backbone
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"packed_weight' is packed, .* own config as its backbone_config\.$"):
        UperNetForSemanticSegmentation.from_pretrained(tmp_path)


def test_packed_weights_that_a_head_lacks_give_nan(packed_backbone, tmp_path):
    model = segmentation_model(config=packed_backbone.config)
    model.backbone = packed_backbone
    tensors = {name: tensor for name, tensor in model.state_dict().items() if ".stages.0.layers.0." not in name}
    model.save_pretrained(tmp_path, state_dict=tensors)
    loaded = UperNetForSemanticSegmentation.from_pretrained(tmp_path)
    assert loaded(tiny_images()).logits.isnan().all()


def test_a_detection_head_trains_a_latent_backbone():
    torch.manual_seed(0)
    sizes = dict.fromkeys(["encoder_layers", "decoder_layers"], 1)
    sizes |= dict.fromkeys(["encoder_attention_heads", "decoder_attention_heads"], 2)
    sizes |= dict.fromkeys(["d_model", "encoder_ffn_dim", "decoder_ffn_dim"], 16)
    config = ConditionalDetrConfig(
        backbone_config=tiny_config(), use_timm_backbone=False, backbone=None, num_queries=4, num_labels=3, **sizes
    )
    model = ConditionalDetrForObjectDetection(config).train()
    boxes = torch.tensor([[0.3, 0.3, 0.2, 0.2], [0.6, 0.6, 0.2, 0.4]])
    labels = [{"class_labels": torch.tensor([0, 1]), "boxes": boxes}] * 2
    optimizer, losses = torch.optim.Adam(model.parameters(), lr=0.01), []
    for _ in range(4):
        optimizer.zero_grad()
        loss = model(pixel_values=tiny_images(), labels=labels).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    assert all(p.grad is not None for p in model.model.backbone.parameters())


def test_a_head_takes_pictures_of_other_sizes():
    model = segmentation_model().eval()
    with torch.no_grad():
        assert model(torch.randn(1, 3, 24, 40)).logits.shape == (1, 3, 24, 40)
        with pytest.raises(ValueError, match="the nearest size that fits"):
            model(torch.randn(1, 3, 20, 32))

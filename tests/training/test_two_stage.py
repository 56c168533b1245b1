"""Two stages: config overrides, and a network that starts from the weights of the first stage."""

import json
import logging

import pytest
import torch
from command_line import refusal
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import class_token_config, tiny_config, tiny_model
from transformers import AutoImageProcessor

from binaryvit_hf import BinaryViTConfig, BinaryViTForImageClassification
from binaryvit_hf.network.quantization_binaryvit import ShippedModel
from binaryvit_hf.training import run as script
from binaryvit_hf.training.two_stage import (
    first_stage_weights,
    load_first_stage,
    override_config,
    resize_first_stage,
)
from binaryvit_runtime.errors import UserError


def test_overrides_are_names_and_values_lists_included():
    config = override_config(tiny_config(), "weight_bits=32, depths=[1, 2],use_layer_scale=False,drop_path_rate=0.5")
    changed = tiny_config(weight_bits=32, depths=[1, 2], use_layer_scale=False, drop_path_rate=0.5)
    assert config.to_dict() == changed.to_dict()
    assert isinstance(config, BinaryViTConfig)


@pytest.mark.parametrize(
    "overrides, message",
    [
        ("weight_bit=32", "the config has no field 'weight_bit'; did you mean 'weight_bits'?"),
        ("weight_bits", "'weight_bits' is not of this form"),
        ("weight_bits=", "weight_bits= must be a number"),
        ("weight_bits=9", "weight_bits must be from 1 to 8, or 32"),
        ("depths=[1]", "must have one value per stage"),
        ("weight_bits=[1]", "weight_bits"),
    ],
)
def test_a_bad_override_is_one_sentence(overrides, message):
    with pytest.raises(UserError) as refused:
        override_config(tiny_config(), overrides)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_every_tensor_of_the_first_stage_is_taken_over_and_the_others_are_logged(caplog):
    """The first stage has full-precision weights and inputs, so it clips no probability."""
    first, network = tiny_model(tiny_config(weight_bits=32, input_bits=32)), tiny_model()
    with caplog.at_level(logging.INFO):
        weights = first_stage_weights(first, network, "first")
    own = {name for name in network.state_dict() if name not in weights}
    assert own == {name for name in network.state_dict() if name.endswith("probability_clip")}
    assert len(own) == 3
    assert f"Initialised {len(weights)} tensors from first; new: {', '.join(sorted(own))}; unused: none" in caplog.text
    network.load_state_dict(weights, strict=False)
    assert all(torch.equal(tensor, first.state_dict()[name]) for name, tensor in weights.items())


def test_another_row_is_taken_over_except_for_the_parts_that_it_lacks():
    row = tiny_config(avg_pool_kernel_sizes=[], use_layer_scale=False, binarize_patch_embeddings=False)
    weights = first_stage_weights(tiny_model(row), tiny_model(), "first")
    own = {name for name in tiny_model().state_dict() if name not in weights}
    lacking = ("avg_pool_branches", "layer_scale", "patch_embeddings")
    assert {part for part in lacking if any(part in name for name in own)} == set(lacking)
    assert all(any(part in name for part in lacking) for name in own)
    back = first_stage_weights(tiny_model(), tiny_model(row), "first")
    assert {name for name in tiny_model(row).state_dict() if name not in back} == {
        name for name in tiny_model(row).state_dict() if ".patch_embeddings.norm2." in name
    }


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"hidden_sizes": [16, 32]}, r"tensor '.*' is \(.*16.*\) there and \(.*8.*\) in the new network"),
        ({"depths": [1, 1]}, r"the new network has \d+ tensors that it lacks, such as '.*layers.1.*'"),
        ({"depths": [2, 2]}, r"it has \d+ tensors that the new network lacks, such as '.*layers.1.*'"),
        (
            {"use_stem_norm": False},
            r"the new network has \d+ tensors that it lacks, such as '.*embeddings.norm.*'",
        ),
        ({"num_labels": 4}, r"tensor 'classifier.*' is \(4"),
    ],
)
def test_a_network_of_another_shape_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        first_stage_weights(tiny_model(tiny_config(**changes)), tiny_model(), "first")


def test_the_latent_weights_beside_packed_ones_are_taken(tmp_path):
    model = tiny_model()
    ShippedModel(model).save_pretrained(tmp_path / "run")
    loaded = load_first_stage(str(tmp_path / "run"))
    assert not loaded.is_packed
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in loaded.state_dict().items())
    for file in (tmp_path / "run" / "latent").iterdir():
        file.unlink()
    (tmp_path / "run" / "latent").rmdir()
    made = load_first_stage(str(tmp_path / "run"))  # from the bits
    made.pack_weights()
    model.pack_weights()
    bits = {name: tensor for name, tensor in model.state_dict().items() if name.endswith("packed_weight")}
    assert all(torch.equal(made.state_dict()[name], tensor) for name, tensor in bits.items())


def test_a_first_stage_that_lacks_a_tensor_is_refused(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["classifier.bias"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"cannot be loaded: the checkpoint lacks the tensor 'classifier.bias'"):
        load_first_stage(str(tmp_path))


def test_the_script_trains_the_second_stage_from_the_first(photos, tmp_path):
    for index in range(1, 8):
        for name in ("ant", "bee"):
            Image.new("RGB", (8, 8), (30 * index, 0, 255 * (name == "bee"))).save(photos / name / f"{index}.png")
    tiny_config(num_labels=2).save_pretrained(tmp_path / "tiny")
    common = [
        *["--config_name", str(tmp_path / "tiny"), "--train_dir", str(photos), "--do_train", "--max_steps=1"],
        *[
            "--per_device_train_batch_size=4",
            "--use_cpu",
            "--report_to=none",
            "--learning_rate=0",
            "--disable_tqdm=True",
        ],
    ]
    first, second = tmp_path / "first", tmp_path / "second"
    assert script.main([*common, "--output_dir", str(first), "--config_overrides", "weight_bits=32"]) == 0
    assert json.loads((first / "config.json").read_text())["weight_bits"] == 32
    assert script.main([*common, "--output_dir", str(second), "--init_from", str(first), "--seed=7"]) == 0
    ours, theirs = (BinaryViTForImageClassification.from_pretrained(folder) for folder in (second / "latent", first))
    assert (ours.config.weight_bits, theirs.config.weight_bits) == (1, 32)
    assert all(torch.equal(parameter, theirs.get_parameter(name)) for name, parameter in ours.named_parameters())


def test_a_model_is_fine_tuned_at_a_higher_resolution(tmp_path, caplog):
    """From the folder of a finished run, whose weights are packed, and without a word about its config."""
    photos = tmp_path / "pictures"
    for name, color in {"ant": "red", "bee": "blue"}.items():
        (photos / name).mkdir(parents=True)
        for index in range(8):
            picture = Image.new("RGB", (64, 32), color)
            picture.paste("green", (20 + 3 * index, 0, 64, 16))
            picture.save(photos / name / f"{index}.png")
    tiny_config(num_labels=2).save_pretrained(tmp_path / "tiny")
    common = [
        *["--train_dir", str(photos), "--validation_dir", str(photos), "--do_train", "--do_eval", "--crop_pct=1"],
        *["--per_device_train_batch_size=8", "--use_cpu", "--report_to=none", "--save_strategy=no"],
        *["--learning_rate=0.003", "--lr_scheduler_type=constant", "--logging_steps=1", "--disable_tqdm=True"],
    ]
    first, second = tmp_path / "first", tmp_path / "second"
    arguments = ["--config_name", str(tmp_path / "tiny"), "--max_steps=4", "--output_dir", str(first)]
    assert script.main([*common, *arguments]) == 0
    arguments = ["--init_from", str(first), "--config_overrides=image_size=[32, 64]", "--max_steps=12"]
    with caplog.at_level(logging.INFO):
        assert script.main([*common, *arguments, "--output_dir", str(second)]) == 0
    assert f"Resized the position embeddings of {first} from images of 16 x 32 to 32 x 64." in caplog.text
    history = json.loads((second / "trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert sum(losses[-4:]) < 0.7 * sum(losses[:4])
    before, after = (json.loads((folder / "all_results.json").read_text()) for folder in (first, second))
    assert after["eval_accuracy"] >= before["eval_accuracy"]
    for folder in (second, second / "latent"):
        model = BinaryViTForImageClassification.from_pretrained(folder)
        assert tuple(model.config.image_size) == (32, 64)
        assert model.binaryvit.embeddings.position_embeddings.shape[1] == 8 * 16
    processor = AutoImageProcessor.from_pretrained(second)
    assert (processor.crop_size["height"], processor.crop_size["width"]) == (32, 64)


def test_a_first_stage_of_another_size_is_interpolated_as_the_model_interpolates():
    first, expected = tiny_model(), tiny_model()
    expected.resize_position_embeddings((32, 16))
    config = tiny_config(image_size=(32, 16))
    resize_first_stage(first, config, "first")
    weights = first_stage_weights(first, BinaryViTForImageClassification(config), "first")
    assert all(torch.equal(tensor, expected.state_dict()[name]) for name, tensor in weights.items())
    odd = class_token_config()
    odd.image_size = 12
    with pytest.raises(UserError, match=r"--init_from 'first': sequence_reduction_ratios=2 does not divide"):
        resize_first_stage(first, odd, "first")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--config_overrides=image_size=30", "--init_from", "LATENT"], "the nearest size that fits is 32."),
        (["--init_from", "no-such"], "--init_from 'no-such' cannot be loaded"),
        (["--config_overrides", "weight_bit=32"], "did you mean 'weight_bits'?"),
        (["--config_overrides=weight_bits=32", "--weight_regularization=1"], "is for networks of 1-bit weights"),
        (["--init_from", "OTHER"], "must have the same shapes. For its network, give --config_name "),
        (["--init_from", "STRANGE"], "calls label 1 'bat', the images call it 'bee'"),
    ],
)
def test_a_bad_first_stage_is_one_sentence(capsys, photos, tmp_path, arguments, message):
    wide = tiny_config(hidden_sizes=[16, 32], num_labels=2)
    BinaryViTForImageClassification(wide).save_pretrained(tmp_path / "OTHER")
    strange = tiny_config(num_labels=2, id2label={0: "ant", 1: "bat"})
    BinaryViTForImageClassification(strange).save_pretrained(tmp_path / "STRANGE")
    tiny_config().save_pretrained(tmp_path / "tiny")
    arguments = [str(tmp_path / word) if word.isupper() else word for word in arguments]
    common = [
        "--do_train",
        "--config_name",
        tmp_path / "tiny",
        "--train_dir",
        photos,
        "--output_dir",
        tmp_path / "out",
    ]
    assert message in refusal(capsys, *common, *arguments)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flag", ["--config_overrides=weight_bits=32", "--init_from=first"])
def test_two_stages_need_a_new_network(capsys, photos, tmp_path, flag):
    arguments = ["--do_train", "--model_name_or_path", "x", "--train_dir", photos, "--output_dir", tmp_path / "out"]
    message = refusal(capsys, *arguments, flag)
    assert "is for new networks" in message
    assert "replace --model_name_or_path by --init_from" in message

"""Student, teacher and first stage each get images as their own image processors make them."""

import json
import logging
import random

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny import tiny_config, tiny_model
from torch import nn
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    BitImageProcessor,
    ConvNextImageProcessor,
    DeiTImageProcessor,
    EfficientNetImageProcessor,
    MobileViTImageProcessor,
    ResNetConfig,
    ResNetForImageClassification,
    SiglipImageProcessor,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)
from transformers.image_processing_utils import BatchFeature
from transformers.models.timm_wrapper.image_processing_timm_wrapper import TimmWrapperImageProcessor

from binaryvit_cli import main as binaryvit
from binaryvit_hf.data.arguments import DataArguments
from binaryvit_hf.data.model_inputs import (
    InputAdapter,
    ModelInput,
    adapt_input,
    check_forward,
    create_image_processor,
    describe_input,
    describe_teacher_input,
    teacher_normalization,
)
from binaryvit_hf.data.transforms import describe_sizes
from binaryvit_hf.training import models
from binaryvit_hf.training import run as script
from binaryvit_hf.training.arguments import ModelArguments
from binaryvit_hf.training.losses import distillation_loss
from binaryvit_hf.training.two_stage import load_first_stage
from binaryvit_runtime.errors import UserError


HALF, ZERO, ONE = (0.5,) * 3, (0.0,) * 3, (1.0,) * 3
SIZE = {"height": 16, "width": 32}
MEAN, STD = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
NUMBERS = {"image_mean": MEAN, "image_std": STD}
TIMM = {"input_size": (3, 16, 32), "mean": (0.7, 0.6, 0.5), "std": (0.2, 0.3, 0.4), "crop_pct": 1.0}
LABELS = {0: "ant", 1: "bee"}
COLORS = {"ant": [(250, 30, 10), (200, 60, 30)], "bee": [(20, 80, 240), (0, 130, 190)]}
VIT = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "patch_size": 8}


def bgr_processor() -> MobileViTImageProcessor:
    return MobileViTImageProcessor(size=SIZE, do_center_crop=False)


@pytest.mark.parametrize(
    "processor, expected",
    [
        (ViTImageProcessor(), ModelInput((224, 224), HALF, HALF)),
        (ViTImageProcessor(size=SIZE, **NUMBERS), ModelInput((16, 32), MEAN, STD)),
        (ViTImageProcessor(size=24, do_normalize=False), ModelInput((24, 24), ZERO, ONE)),
        (ViTImageProcessor(size=24, do_rescale=False, do_normalize=False), ModelInput((24, 24), ZERO, (1 / 255,) * 3)),
        (DeiTImageProcessor(crop_size=SIZE), ModelInput((16, 32), HALF, HALF)),
        (ConvNextImageProcessor(size={"shortest_edge": 32}), ModelInput((32, 32), HALF, HALF)),
        (BitImageProcessor(size={"shortest_edge": 40}, crop_size=32, **NUMBERS), ModelInput((32, 32), MEAN, STD)),
        (
            EfficientNetImageProcessor(size=SIZE),
            ModelInput((16, 32), HALF, (0.25,) * 3),
        ),  # include_top normalises a second time
        (
            EfficientNetImageProcessor(
                size=SIZE, rescale_factor=1 / 127.5, rescale_offset=True, do_normalize=False, include_top=False
            ),
            ModelInput((16, 32), HALF, (0.5,) * 3),
        ),
        (bgr_processor(), ModelInput((16, 32), ZERO, ONE, (2, 1, 0))),
        (TimmWrapperImageProcessor(TIMM), ModelInput((16, 32), TIMM["mean"], TIMM["std"])),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_input_of_a_model_is_what_its_image_processor_makes(processor, expected):
    measured = describe_input(processor, "it")
    assert measured.equals(expected)
    if isinstance(processor, (ViTImageProcessor, BitImageProcessor, DeiTImageProcessor)) and processor.do_normalize:
        assert measured == expected  # the stated numbers, without float32 rounding


def test_a_teachers_image_processor_that_keeps_the_shape_gets_the_students_crop():
    keeps_shape = ViTImageProcessor(size={"shortest_edge": 32})
    assert describe_input(keeps_shape, "it", image_size=(16, 32)).size == (32, 64)


class OddProcessor:
    """Returns `change(pixels)`; the pixels are `(3, height, width)`, from 0 to 1."""

    def __init__(self, change):
        self.change = change

    def __call__(self, images, return_tensors):
        pixels = torch.from_numpy(np.array(images.resize((32, 16)))).permute(2, 0, 1) / 255
        return BatchFeature({"pixel_values": self.change(pixels)[None]})


@pytest.mark.parametrize(
    "processor, reason",
    [
        (ViTImageProcessor(size={"shortest_edge": 32}), "images of different sizes"),
        (ViTImageProcessor(do_resize=False), "images of different sizes"),
        (MobileViTImageProcessor(size={"shortest_edge": 24}, crop_size=32), "pads images"),
        (ViTImageProcessor(rescale_factor=1e-45), "scales them to nothing"),
        (ViTImageProcessor(image_std=[0.5, 0.5]), "fails on an image of 512 x 768"),
        (OddProcessor(lambda pixels: pixels.mean(0, keepdim=True).expand(3, -1, -1)), "mixes channels"),
        (OddProcessor(lambda pixels: pixels[[0, 0, 2]]), "mixes channels"),
        (OddProcessor(lambda pixels: pixels**2.2), "more than a factor and a shift"),
        (OddProcessor(lambda pixels: pixels - pixels.mean()), "scales them to nothing"),
        (OddProcessor(lambda pixels: pixels[:1]), r"returns \(1, 1, 16, 32\) for one image"),
        (OddProcessor(lambda pixels: pixels[None]), r"returns \(1, 1, 3, 16, 32\) for one image"),
    ],
)
def test_an_image_processor_that_does_more_is_refused_with_the_reason(processor, reason):
    with pytest.raises(UserError, match=f"^its name: .*{type(processor).__name__}.*{reason}") as refused:
        describe_input(processor, "its name")
    assert "\n" not in str(refused.value)


def random_processor(rng: random.Random):
    kind = rng.choice(("vit", "bgr", "timm", "siglip", "efficientnet"))
    numbers = {
        "image_mean": [rng.uniform(-1, 1) for _ in range(3)],
        "image_std": [rng.uniform(0.1, 2) for _ in range(3)],
    }
    steps = {"do_rescale": rng.random() < 0.8, "do_normalize": rng.random() < 0.8}
    if kind == "bgr":
        return bgr_processor()
    if kind == "timm":
        return TimmWrapperImageProcessor(TIMM | {"mean": numbers["image_mean"], "std": numbers["image_std"]})
    if kind == "efficientnet":
        steps["do_rescale"] = True  # transformers' own processors normalise only floats
        return EfficientNetImageProcessor(size=SIZE, rescale_factor=1 / 127.5, rescale_offset=True, **numbers, **steps)
    return {"vit": ViTImageProcessor, "siglip": SiglipImageProcessor}[kind](size=SIZE, **numbers, **steps)


def test_an_adapted_batch_is_what_the_other_processor_makes():
    rng, noise = random.Random(0), np.random.default_rng(0)
    image = Image.fromarray(noise.integers(0, 256, (16, 32, 3)).astype("uint8"))
    for _ in range(60):
        given, wanted = random_processor(rng), random_processor(rng)
        adapter = InputAdapter(*(describe_input(processor, "it") for processor in (given, wanted)))
        made, expected = (
            processor(images=image, return_tensors="pt")["pixel_values"] for processor in (given, wanted)
        )
        largest = expected.abs().max().item()
        torch.testing.assert_close(adapter(made), expected, rtol=1e-5, atol=1e-5 * largest)


def test_a_batch_is_resized_and_a_mixed_one_stays_mixed():
    given, wanted = ModelInput((16, 32), MEAN, STD), ModelInput((40, 48), HALF, HALF, (2, 1, 0))
    adapter = InputAdapter(given, wanted)
    one, other = torch.randn(2, 2, 3, 16, 32, generator=torch.Generator().manual_seed(0))
    assert adapter(one).shape == (2, 3, 40, 48)
    torch.testing.assert_close(adapter(0.3 * one + 0.7 * other), 0.3 * adapter(one) + 0.7 * adapter(other))
    plain = nn.functional.interpolate(one, (40, 48), mode="bicubic", antialias=True)
    rgb = plain * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
    torch.testing.assert_close(adapter(one), (rgb.flip(1) - 0.5) / 0.5)
    assert adapter.state_dict() == {}


class Recorder(nn.Module):
    def forward(self, pixel_values):
        return pixel_values


def test_a_model_of_the_same_input_gets_the_same_tensor():
    model, images = Recorder(), torch.randn(2, 3, 16, 32)
    same = describe_input(ViTImageProcessor(size=SIZE, **NUMBERS), "one")
    adapt_input(model, same, describe_input(TimmWrapperImageProcessor(TIMM | {"mean": MEAN, "std": STD}), "other"))
    assert model(pixel_values=images) is images


def test_an_adapted_model_compiles_and_moves_with_its_adapter():
    model, images = Recorder(), torch.randn(2, 3, 16, 32)
    given, wanted = ModelInput((16, 32), MEAN, STD), ModelInput((24, 24), HALF, HALF, (2, 1, 0))
    adapt_input(model, given, wanted)
    expected = InputAdapter(given, wanted)(images)
    assert torch.equal(model(pixel_values=images), expected)
    torch.testing.assert_close(torch.compile(model, backend="eager")(pixel_values=images), expected)
    assert model.to("meta")(pixel_values=images.to("meta")).shape == expected.shape


def test_a_teacher_without_image_processor_takes_what_the_student_takes_in_its_own_size(caplog):
    student = ModelInput((16, 16), MEAN, STD)
    cases = [
        (ViTConfig(image_size=[16, 16], **VIT), (16, 16)),
        (ViTConfig(image_size=24, **VIT), (24, 24)),
        (ResNetConfig(), (16, 16)),
    ]
    with caplog.at_level(logging.INFO):
        for config, size in cases:
            teacher = nn.Module()
            teacher.config = config
            assert describe_teacher_input(teacher, None, student, "it") == ModelInput(size, MEAN, STD)
    assert "it has no image processor" in caplog.text


@pytest.mark.parametrize(
    "processor, shared",
    [
        (ViTImageProcessor(size=SIZE, **NUMBERS), (MEAN, STD)),
        (TimmWrapperImageProcessor(TIMM | {"mean": MEAN, "std": STD}), (MEAN, STD)),
        (ViTImageProcessor(size=SIZE, do_normalize=False), (ZERO, ONE)),
        (ViTImageProcessor(size=SIZE, do_rescale=False), None),
        (bgr_processor(), None),
        (None, None),
    ],
)
def test_a_new_student_shares_the_mean_of_a_teacher_of_ordinary_images(processor, shared):
    config = tiny_config()
    made = create_image_processor(config, 1.0, like=teacher_normalization(processor, config))
    expected = shared or ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert np.allclose((made.image_mean, made.image_std), expected, atol=1e-7)


def test_an_image_processor_that_cannot_be_loaded_is_an_error(tmp_path):
    ViTConfig(**VIT).save_pretrained(tmp_path)
    assert models.load_image_processor(str(tmp_path), ModelArguments()) is None
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(UserError, match=r"^The image processor of '.*' cannot be loaded"):
        models.load_image_processor(str(tmp_path), ModelArguments())


class NeedsMore(ViTForImageClassification):
    def forward(self, pixel_values, boxes):
        raise NotImplementedError


@pytest.mark.parametrize("model_class, reason", [(ViTForImageClassification, "16"), (NeedsMore, "'boxes'")])
def test_a_model_that_does_not_take_its_input_is_refused_with_the_reason(model_class, reason):
    model = model_class(ViTConfig(image_size=16, **VIT)).eval()
    with pytest.raises(UserError, match=f"^it cannot classify images of 24 x 24 pixels.*{reason}"):
        check_forward(model, ModelInput((24, 24), HALF, HALF), "it")


def test_weights_of_half_precision_are_trained_in_float32(tmp_path):
    model = tiny_model().to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    arguments = ModelArguments(model_name_or_path=str(tmp_path))
    loaded = (
        models.load_model(arguments, model.config, None),
        models.load_model(ModelArguments(config_name=str(tmp_path)), model.config, None),
        load_first_stage(str(tmp_path)),
    )
    for one in loaded:
        assert {tensor.dtype for tensor in one.state_dict().values() if tensor.is_floating_point()} == {torch.float32}


# Runs


@pytest.fixture
def photos(tmp_path):
    """Images of one colour, which no crop and no resize changes."""
    for name, colors in COLORS.items():
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number, color in enumerate(colors):
            Image.new("RGB", (32, 16), color).save(tmp_path / "photos" / name / f"{number}.png")
    return tmp_path / "photos"


def vit(folder, processor, image_size=(16, 32), dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    config = ViTConfig(image_size=image_size, id2label=LABELS, initializer_range=0.5, **VIT)
    ViTForImageClassification(config).to(dtype).save_pretrained(folder)
    if processor is not None:
        processor.save_pretrained(folder)


def resnet(folder, processor, dtype=torch.float32):
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic", id2label=LABELS)
    model = ResNetForImageClassification(config)
    with torch.no_grad():
        model.classifier[1].weight.normal_()
    model.to(dtype).save_pretrained(folder)
    if processor is not None:
        processor.save_pretrained(folder)


def timm_model(folder):
    torch.manual_seed(0)
    shape = {"img_size": [16, 32], "patch_size": 8, "embed_dim": 8, "depth": 1, "num_heads": 2}
    config = TimmWrapperConfig(
        architecture="vit_tiny_patch16_224", model_args=shape, pretrained_cfg=TIMM, id2label=LABELS
    )
    model = TimmWrapperForImageClassification(config)
    with torch.no_grad():
        model.timm_model.head.weight.normal_()
    model.save_pretrained(folder)


def run(*arguments) -> None:
    common = ["--use_cpu", "--report_to=none", "--disable_tqdm=True", "--save_strategy=no", "--do_eval"]
    assert script.main([str(argument) for argument in (*common, *arguments)]) == 0


def examples(processor) -> tuple[torch.Tensor, torch.Tensor]:
    """The photos, processed by transformers itself, and their labels."""
    images = [Image.new("RGB", (32, 16), color) for colors in COLORS.values() for color in colors]
    return processor(images=images, return_tensors="pt")["pixel_values"], torch.tensor([0, 0, 1, 1])


@torch.no_grad()
def logits_of(folder, processor=None) -> torch.Tensor:
    model = AutoModelForImageClassification.from_pretrained(folder, dtype=torch.float32).eval()
    return model(pixel_values=examples(processor or AutoImageProcessor.from_pretrained(folder))[0]).logits


TEACHERS = {
    "another mean": lambda folder: vit(folder, ViTImageProcessor(size=SIZE, **NUMBERS)),
    "no mean": lambda folder: vit(folder, ViTImageProcessor(size=SIZE, do_normalize=False)),
    "BGR": lambda folder: vit(folder, bgr_processor()),
    "timm": timm_model,
    "another size": lambda folder: vit(folder, ViTImageProcessor(size=40), image_size=40),
    "no image_size": lambda folder: resnet(folder, ViTImageProcessor(size=24)),
    "float16": lambda folder: resnet(folder, ViTImageProcessor(size=24), torch.float16),
}


@pytest.mark.parametrize("teacher", TEACHERS)
def test_a_teacher_sees_its_own_input_in_the_loss_and_in_its_evaluation(photos, tmp_path, teacher):
    TEACHERS[teacher](tmp_path / "teacher")
    vit(tmp_path / "student", ViTImageProcessor(size=SIZE), seed=1)
    run(
        *["--model_name_or_path", tmp_path / "student", "--teacher_model_name_or_path", tmp_path / "teacher"],
        *["--train_dir", photos, "--validation_dir", photos, "--output_dir", tmp_path / "out"],
        *["--do_train", "--max_steps=1", "--learning_rate=0", "--per_device_train_batch_size=4"],
    )
    results = json.loads((tmp_path / "out" / "all_results.json").read_text())
    labels = examples(ViTImageProcessor())[1]
    taught = logits_of(tmp_path / "teacher")
    assert results["teacher_loss"] == pytest.approx(nn.functional.cross_entropy(taught, labels).item(), abs=1e-4)
    learned = logits_of(tmp_path / "student")
    assert results["eval_loss"] == pytest.approx(nn.functional.cross_entropy(learned, labels).item(), abs=1e-4)
    assert results["train_loss"] == pytest.approx(distillation_loss(learned, taught, labels).item(), abs=1e-4)


def bgr_student(folder):
    vit(folder, bgr_processor())


@pytest.mark.parametrize(
    "student", [lambda folder: vit(folder, ViTImageProcessor(size=SIZE)), timm_model, bgr_student]
)
def test_a_model_without_centre_crop_trains_and_evaluates_on_its_own_input(photos, tmp_path, student):
    student(tmp_path / "student")
    run(
        *["--model_name_or_path", tmp_path / "student", "--train_dir", photos, "--validation_dir", photos],
        *["--output_dir", tmp_path / "out", "--do_train", "--max_steps=1", "--learning_rate=0"],
        *["--per_device_train_batch_size=4"],
    )
    results = json.loads((tmp_path / "out" / "all_results.json").read_text())
    expected = nn.functional.cross_entropy(logits_of(tmp_path / "student"), examples(ViTImageProcessor())[1]).item()
    assert (results["train_loss"], results["eval_loss"]) == pytest.approx((expected, expected), abs=1e-4)
    assert torch.allclose(logits_of(tmp_path / "out"), logits_of(tmp_path / "student"), atol=1e-6)


def test_a_second_stage_takes_the_normalisation_of_the_first(photos, tmp_path):
    vit(tmp_path / "first", ViTImageProcessor(size=SIZE, do_normalize=False))
    vit(tmp_path / "teacher", ViTImageProcessor(size=SIZE, **NUMBERS))
    run(
        *["--config_name", tmp_path / "first", "--init_from", tmp_path / "first", "--do_train", "--max_steps=1"],
        *["--teacher_model_name_or_path", tmp_path / "teacher", "--learning_rate=0", "--crop_pct=1"],
        *["--train_dir", photos, "--validation_dir", photos, "--output_dir", tmp_path / "out"],
        *["--per_device_train_batch_size=4"],
    )
    first, second = (logits_of(tmp_path / name) for name in ("first", "out"))
    torch.testing.assert_close(first, second)


def test_a_bfloat16_checkpoint_learns_with_small_steps(photos, tmp_path):
    vit(tmp_path / "student", ViTImageProcessor(size=SIZE), dtype=torch.bfloat16)
    run(
        *["--model_name_or_path", tmp_path / "student", "--train_dir", photos, "--validation_dir", photos],
        *["--output_dir", tmp_path / "out", "--do_train", "--max_steps=1", "--learning_rate=1e-6"],
        *["--per_device_train_batch_size=4"],
    )
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("student", "out"))
    assert all(tensor.dtype == torch.float32 for tensor in after.values())
    assert not torch.equal(before["classifier.weight"].float(), after["classifier.weight"])


@pytest.mark.parametrize("who", ["--model_name_or_path", "--teacher_model_name_or_path"])
def test_a_model_whose_image_processor_is_of_another_size_is_refused(capsys, photos, tmp_path, who):
    vit(tmp_path / "good", ViTImageProcessor(size=SIZE))
    vit(tmp_path / "bad", ViTImageProcessor(size=24))
    models = {"--model_name_or_path": "good"} | {who: "bad"}
    arguments = [word for flag, name in models.items() for word in (flag, str(tmp_path / name))]
    folders = ["--validation_dir", str(photos), "--output_dir", str(tmp_path / "out")]
    assert script.main([*arguments, *folders, "--do_eval", "--use_cpu", "--report_to=none"]) == 2
    assert f"error: {who} '{tmp_path / 'bad'}' cannot classify images of 24 x 24 pixels" in capsys.readouterr().err


def test_classify_finds_the_image_processor_that_timm_keeps_in_the_config(tmp_path, capsys):
    timm_model(tmp_path / "timm")
    Image.new("RGB", (40, 30), COLORS["ant"][0]).save(tmp_path / "ant.png")
    assert binaryvit(["classify", str(tmp_path / "timm"), str(tmp_path / "ant.png")]) == 0
    assert "%" in capsys.readouterr().out


@pytest.mark.parametrize(
    "processor, training, text",
    [
        (
            create_image_processor(tiny_config(image_size=64), crop_pct=0.875),
            True,
            "Image size: 64 x 64 pixels; for training a random crop of 35 to 100 % of the image, resized (bicubic); for "
            "evaluation the shorter side resized to 73 (bicubic), then a centre crop.",
        ),
        (
            create_image_processor(tiny_config(), crop_pct=0.5),
            False,
            "Image size: 32 x 16 pixels; for evaluation resized to 64 x 32 (bicubic), then a centre crop.",
        ),
        (
            ViTImageProcessor(size={"height": 24, "width": 20}, resample=2),
            False,
            "Image size: 20 x 24 pixels; for evaluation resized to 20 x 24 (bilinear).",
        ),
    ],
)
def test_the_size_of_the_images_is_one_sentence(processor, training, text):
    arguments = DataArguments(random_resized_crop_min_scale=0.35)
    assert describe_sizes(processor, arguments, training) == text

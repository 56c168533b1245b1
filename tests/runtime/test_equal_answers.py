"""The runtime's answers equal those of transformers: labels, order and scores, bit for bit."""

import contextlib
import gzip
import io
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from packed_model import edit_json, save_packed
from PIL import Image
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from tiny import class_token_config, tiny_config
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline

from binaryvit_hf.data.known_datasets import FASHION_MNIST_FOLDER
from binaryvit_hf.pixels import open_picture, to_rgb
from binaryvit_runtime import Classifier
from binaryvit_runtime.engine import kernels_here
from binaryvit_runtime.errors import UnsupportedModelError
from binaryvit_runtime.resources import shipped_models


pytestmark = pytest.mark.skipif(not kernels_here(), reason="the engine was not built")


def load_pipeline(folder):
    # `pipeline(folder)` would ask whether to run the code in a packed folder.
    model = AutoModelForImageClassification.from_pretrained(folder)
    return pipeline("image-classification", model=model, image_processor=AutoImageProcessor.from_pretrained(folder))


def assert_equal_answers(folder, pictures, *top_ks: int) -> None:
    """The answers to RGB pictures equal those of transformers' pipeline, and the logits those of the model."""
    classify, classifier = load_pipeline(folder), Classifier.from_pretrained(folder, threads=1)
    for top_k in top_ks or [5]:
        assert classifier(pictures, top_k) == classify(pictures, top_k=top_k)
    pixels = classify.image_processor(pictures, return_tensors="pt")["pixel_values"]
    assert all(np.array_equal(classifier.preprocessor(one), two.numpy()) for one, two in zip(pictures, pixels))
    with torch.no_grad():
        expected = classify.model(pixels).logits.numpy()
    actual = classifier.network.classify(np.ascontiguousarray(pixels), *classifier.head, threads=1)
    np.testing.assert_array_equal(actual, expected)


def random_pictures(number: int) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    sizes = [(16, 32), (64, 64), (1, 1), (3, 400), (90, 20), (375, 500)]
    return [
        Image.fromarray(rng.integers(0, 256, (*sizes[index % len(sizes)], 3), np.uint8)) for index in range(number)
    ]


def digits(number: int) -> list[Image.Image]:
    images = (load_digits().images[:number] * (255 / 16)).astype(np.uint8)
    return [Image.fromarray(image).convert("RGB") for image in images]


def clothes(number: int) -> list[Image.Image]:
    file = FASHION_MNIST_FOLDER / "t10k-images-idx3-ubyte.gz"
    if not file.is_file():
        return []
    with gzip.open(file) as stream:
        content = stream.read(16 + 28 * 28 * number)
    return [
        Image.fromarray(row.reshape(28, 28)).convert("RGB")
        for row in np.frombuffer(content, np.uint8)[16:].reshape(number, -1)
    ]


@pytest.mark.parametrize("name", ["binaryvit-digits", "binaryvit-fashion-mnist"])
def test_shipped_models_give_the_answers_of_transformers(name):
    assert_equal_answers(shipped_models()[name], digits(200) + clothes(200) + random_pictures(30), 10)


NETWORKS = {
    "a pyramid": tiny_config(),
    "a class token": class_token_config(),
    "layer scale and a class token": class_token_config(use_layer_scale=True, use_stem_norm=True),
    "float patch embeddings": tiny_config(binarize_patch_embeddings=False),
    "no layer scale and no pooling": tiny_config(use_layer_scale=False, avg_pool_kernel_sizes=[]),
    "three stages": tiny_config(
        hidden_sizes=[8, 8, 24],
        depths=[1, 1, 1],
        num_attention_heads=[1, 2, 3],
        intermediate_sizes=[8, 16, 24],
        sequence_reduction_ratios=[4, 2, 1],
        avg_pool_kernel_sizes=[7],
        num_labels=12,
    ),
    "patches that are not square": tiny_config(image_size=(16, 32), patch_size=(2, 4), batch_norm_eps=1e-3),
}


@pytest.mark.parametrize("config", NETWORKS.values(), ids=NETWORKS)
def test_all_architectures_give_the_answers_of_transformers(config, tmp_path):
    assert_equal_answers(save_packed(tmp_path, config), random_pictures(12), 3)


PROBLEMS = {
    "classes": {},
    "one of several labels": {"problem_type": "single_label_classification"},
    "several labels": {"problem_type": "multi_label_classification"},
    "regression": {"problem_type": "regression"},
    "one label": {"num_labels": 1},
    "one number": {"num_labels": 1, "problem_type": "regression"},
    "labels with one name": {"id2label": {0: "ant", 1: "ant", 2: ""}},
    "two labels": {"num_labels": 2},
}


@pytest.mark.parametrize("changes", PROBLEMS.values(), ids=PROBLEMS)
def test_scores_are_those_of_the_pipeline_for_every_problem(changes, tmp_path):
    folder = save_packed(tmp_path, tiny_config(**changes))
    assert_equal_answers(folder, random_pictures(6), 1, 2, 5)


def test_equal_scores_keep_the_order_of_the_labels(tmp_path):
    folder = save_packed(tmp_path, tiny_config(num_labels=7))
    model = AutoModelForImageClassification.from_pretrained(folder)
    with torch.no_grad():
        model.classifier.weight.zero_()
        model.classifier.bias.copy_(torch.tensor([0.0, 1, 0, 1, 0, -200, 1]))
    model.save_pretrained(folder)
    assert_equal_answers(folder, random_pictures(1), 7)
    assert [answer["label"] for answer in Classifier.from_pretrained(folder)(random_pictures(1), 3)[0]] == [
        "LABEL_1",
        "LABEL_3",
        "LABEL_6",
    ]


def test_half_precision_and_shards_give_the_answers_of_transformers(tmp_path):
    folder = save_packed(tmp_path, half=True, max_shard_size=3_000)
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    assert any(
        tensor.dtype == torch.float16 for file in folder.glob("*.safetensors") for tensor in load_file(file).values()
    )
    assert_equal_answers(folder, random_pictures(6))


@pytest.mark.parametrize(
    "changes",
    [
        {"resample": 2},
        {"do_resize": False, "do_center_crop": True},
        {"do_rescale": False, "image_mean": 120.0, "image_std": [60, 70, 80.5]},
        {"do_normalize": False, "rescale_factor": 1},
        {"size": {"shortest_edge": 20}, "do_convert_rgb": None},
        {"image_mean": None},
        {"image_processor_type": "ViTImageProcessorFast", "processor_class": "Other", "note": [1]},
        {"data_format": "channels_last"},
        {
            "return_tensors": "np",
            "disable_grouping": True,
            "image_seq_length": 5,
            "input_data_format": "channels_last",
        },
    ],
    ids=str,
)
def test_image_processors_give_the_answers_of_transformers_or_are_refused_alike(changes, tmp_path, packed):
    folder = shutil.copytree(packed, tmp_path / "copy")
    edit_json(folder / "preprocessor_config.json", **changes)
    pictures = random_pictures(4)[::3]
    try:
        expected = [load_pipeline(folder)(picture) for picture in pictures]
    except Exception:
        with pytest.raises(ValueError):
            Classifier.from_pretrained(folder)(pictures)
        return
    with contextlib.suppress(UnsupportedModelError):
        assert Classifier.from_pretrained(folder)(pictures) == expected


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    return save_packed(tmp_path_factory.mktemp("model"))


def picture_files(folder) -> list:
    """Files of all modes, some with transparency, some turned by EXIF."""
    rng = np.random.default_rng(1)
    colours = Image.fromarray(rng.integers(0, 256, (40, 50, 3), np.uint8))
    grey, alpha = colours.convert("L"), Image.fromarray(rng.integers(0, 256, (40, 50), np.uint8))
    transparent = colours.copy()
    transparent.putalpha(alpha)
    grey_with_alpha = Image.merge("LA", (grey, alpha))
    wide = Image.fromarray(rng.integers(0, 2**16, (40, 50)).astype(np.uint16))
    palette = colours.quantize(16)
    pictures = {
        "rgb.png": colours, "grey.png": grey, "bits.png": colours.convert("1"), "rgba.png": transparent,
        "la.png": grey_with_alpha, "palette.png": palette, "grey16.png": wide, "cmyk.jpg": colours.convert("CMYK"),
        "grey.jpg": grey, "float.tiff": Image.fromarray(rng.random((40, 50), np.float32)), "lab.tiff": colours.convert("LAB"),
        "palette.gif": palette, "rgb.webp": colours, "rgba.webp": transparent, "rgb.bmp": colours,
        "one.png": colours.crop((0, 0, 1, 1)), "long.png": colours.resize((999, 1)), "tall.png": colours.resize((1, 700)),
    }  # fmt: skip
    for name, picture in pictures.items():
        picture.save(folder / name)
    palette.save(folder / "transparent.png", transparency=3)
    palette.save(folder / "transparent.gif", transparency=3)
    grey.save(folder / "transparent_grey.png", transparency=7)
    colours.save(folder / "two.mpo", save_all=True, append_images=[colours.rotate(180)])
    colours.resize((2500, 2000)).save(folder / "in_two_blocks.jpg")  # Pillow stores more than 16 MB in blocks
    colours.save(folder / "progressive.jpg", progressive=True)
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        colours.save(folder / f"turned{orientation}.jpg", exif=exif)
        colours.save(folder / f"turned{orientation}.tiff", exif=exif)
    return sorted(folder.iterdir())


@pytest.mark.parametrize("background", [None, "white", "#0a64c8"])
def test_pictures_of_all_modes_are_seen_as_the_model_sees_them(background, packed, tmp_path):
    files = picture_files(tmp_path)
    classify, classifier = load_pipeline(packed), Classifier.from_pretrained(packed)
    with_colours = []
    for file in files:
        with open_picture(file) as picture:
            with_colours.append(to_rgb(picture, background))
    expected = classify(with_colours)
    assert classifier([str(file) for file in files], background=background) == expected
    assert classifier([io.BytesIO(file.read_bytes()) for file in files], background=background) == expected
    opened = [Image.open(file) for file in files]
    assert classifier(opened, background=background) == expected
    assert classifier(opened, background=background) == expected  # a second time


@pytest.mark.parametrize("turned", [False, True])
def test_files_are_read_as_transformers_reads_them_but_for_those_with_a_transparent_colour_or_more_than_8_bits(
    turned, packed, tmp_path
):
    others = ("transparent.", "transparent_grey", "grey16", "float")
    files = [str(file) for file in picture_files(tmp_path) if not file.name.startswith(others)]
    files = [file for file in files if ("turned" in file) == turned]
    assert Classifier.from_pretrained(packed)(files) == load_pipeline(packed)(files)


def test_the_model_s_background_is_put_behind_transparent_pixels(packed, tmp_path):
    folder = shutil.copytree(packed, tmp_path / "copy")
    edit_json(folder / "preprocessor_config.json", background="#00ff00")
    picture = Image.new("RGBA", (20, 20), (255, 0, 0, 100))
    classifier = Classifier.from_pretrained(folder)
    assert classifier(picture) == load_pipeline(folder)(to_rgb(picture, "#00ff00"))
    assert classifier(picture, background=None) == load_pipeline(folder)(to_rgb(picture))


def test_arrays_are_pictures(packed):
    classifier, rng = Classifier.from_pretrained(packed), np.random.default_rng(0)
    array = rng.integers(0, 256, (40, 60, 4), np.uint8)
    views = [array, array[:, :, :3], array[:, :, 0], array[::-1, ::2], array[:, :, 2::-1], np.asfortranarray(array)]
    before = [view.copy() for view in views]
    assert classifier(views) == classifier([Image.fromarray(np.ascontiguousarray(view)) for view in views])
    assert all(np.array_equal(one, two) for one, two in zip(views, before))


def test_a_file_without_a_dtype_is_left_to_transformers(tmp_path):
    """transformers would compute in float16, because the file's first tensor is."""
    folder = save_packed(tmp_path, half=True)
    edit_json(folder / "config.json", dtype=None)
    with pytest.raises(UnsupportedModelError, match="dtype is None"):
        Classifier.from_pretrained(folder)


@pytest.mark.parametrize("name", ["adapter_config.json", "processor_config.json"])
def test_files_that_change_what_transformers_computes_are_refused_by_name(name, packed, tmp_path):
    folder = shutil.copytree(packed, tmp_path / "copy")
    (folder / name).write_text("{}")
    with pytest.raises(UnsupportedModelError, match=name):
        Classifier.from_pretrained(folder)


@pytest.mark.parametrize("kernels", kernels_here())
def test_kernels_that_the_variable_forces_give_the_answers_of_transformers(kernels, packed, monkeypatch):
    monkeypatch.setenv("BINARYVIT_ENGINE", kernels)
    assert_equal_answers(packed, random_pictures(4))


def test_a_repository_of_version_0_1_0_gives_the_answers_of_transformers(packed, tmp_path):
    with tarfile.open(Path(__file__).parents[1] / "network" / "repository_0.1.0.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    shutil.copy(packed / "preprocessor_config.json", tmp_path)
    assert_equal_answers(tmp_path, random_pictures(4))

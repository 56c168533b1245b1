"""The engine's preprocessing of pictures, compared with torchvision and with transformers' image processors."""

import ctypes
import gc
import io
import json
import math
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as torchvision
from transformers import AutoImageProcessor, ViTImageProcessor

from binaryvit_hf import engine
from binaryvit_runtime.engine import preprocessing
from binaryvit_runtime.engine.preprocessing import Preprocessor


pytestmark = pytest.mark.skipif(not engine.kernels_here(), reason=f"there is no engine: {engine.problem()}")

MODEL_CARDS = Path(__file__).parents[2] / "model_cards"
BILINEAR, BICUBIC = 2, 3
INTERPOLATIONS = {BILINEAR: InterpolationMode.BILINEAR, BICUBIC: InterpolationMode.BICUBIC}
# Without AVX2, torchvision resizes bilinearly in float32 on x86, and to a width of one pixel wrongly.
AVX2 = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
RESAMPLES = st.sampled_from([BICUBIC, BILINEAR] if AVX2 else [BICUBIC])
SIDES = st.one_of(st.integers(1, 40), st.integers(1, 600))
SMALL_SIDES = st.integers(1, 90) if AVX2 else st.integers(30, 90)
PHOTOS = {  # the image processor of binaryvit-small
    "image_processor_type": "ViTImageProcessor",
    "size": {"shortest_edge": 256},
    "resample": BICUBIC,
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "do_convert_rgb": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}
EIGHT_BITS = {"image_processor_type": "ViTImageProcessor", "rescale_factor": 1, "do_normalize": False}


def random_picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Random colours; for some seeds only black and white, which makes a bicubic filter overshoot, or one colour."""
    rng = np.random.default_rng(seed)
    if seed % 3 == 0:
        return rng.integers(0, 256, (height, width, 3), np.uint8)
    if seed % 3 == 1:
        return rng.integers(0, 2, (height, width, 3), np.uint8) * np.uint8(255)
    return np.broadcast_to(rng.integers(0, 256, 3, np.uint8), (height, width, 3)).copy()


def by_transformers(processor: ViTImageProcessor, picture: np.ndarray | Image.Image) -> np.ndarray:
    return processor(picture, input_data_format="channels_last", return_tensors="np")["pixel_values"][0]


@settings(max_examples=300, deadline=None, derandomize=True)
@given(height=SIDES, width=SIDES, new_height=SIDES, new_width=SIDES, resample=RESAMPLES, seed=st.integers(0, 99))
@example(height=1, width=1, new_height=600, new_width=1, resample=BICUBIC, seed=0)
@example(height=600, width=2, new_height=1, new_width=600, resample=BICUBIC, seed=1)
@example(height=37, width=300, new_height=37, new_width=100, resample=BICUBIC, seed=1)  # torchvision skips a pass
@example(height=300, width=37, new_height=100, new_width=37, resample=BICUBIC, seed=1)
@example(height=50, width=60, new_height=50, new_width=60, resample=BICUBIC, seed=0)
@example(height=7, width=8000, new_height=3, new_width=5, resample=BICUBIC, seed=0)  # weights of 22 bits
def test_resized_pixels_equal_torchvisions(height, width, new_height, new_width, resample, seed):
    # PyTorch's AVX2 code cannot resize to a single pixel.
    assume((new_height, new_width) != (1, 1) if AVX2 else new_width > 1)
    picture = random_picture(height, width, seed)
    fields = EIGHT_BITS | {"size": {"height": new_height, "width": new_width}, "resample": resample}
    expected = torchvision.resize(
        torch.from_numpy(picture).permute(2, 0, 1).contiguous(), [new_height, new_width], INTERPOLATIONS[resample]
    )
    np.testing.assert_array_equal(Preprocessor(fields)(picture), expected.numpy())


def sizes():
    """Every way to give the size after resizing."""
    edges = SMALL_SIDES
    return st.one_of(
        st.builds(lambda edge: {"shortest_edge": edge}, edges),
        st.builds(lambda shortest, longest: {"shortest_edge": shortest, "longest_edge": longest}, edges, edges),
        st.builds(lambda height, width: {"max_height": height, "max_width": width}, edges, edges),
        st.builds(lambda height, width: {"height": height, "width": width}, edges, edges),
        edges,
        st.tuples(edges, edges).map(list),
    )


@st.composite
def configs(draw) -> dict:
    """Fields of a preprocessor_config.json, with each step on or off."""
    number = st.floats(0.01, 1)
    do_rescale = draw(st.booleans())
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": draw(st.booleans()),
        "size": draw(sizes()),
        "default_to_square": draw(st.booleans()),
        "resample": draw(RESAMPLES),
        "do_center_crop": draw(st.booleans()),
        "crop_size": draw(st.one_of(SMALL_SIDES, st.lists(SMALL_SIDES, min_size=2, max_size=2))),
        "do_rescale": do_rescale,
        "rescale_factor": draw(st.one_of(st.just(1 / 255), number)),
        "do_normalize": draw(st.booleans()) if do_rescale else True,
        "image_mean": draw(st.lists(number, min_size=3, max_size=3)),
        "image_std": draw(st.lists(number, min_size=3, max_size=3)),
    }


@settings(max_examples=300, deadline=None, derandomize=True)
@given(config=configs(), height=SMALL_SIDES, width=SMALL_SIDES, seed=st.integers(0, 99))
@example(  # 24 rows are near enough to 24.3, so that the 80 columns do not become 81
    config=EIGHT_BITS | {"size": {"shortest_edge": 40, "longest_edge": 81}, "resample": BICUBIC},
    height=24,
    width=80,
    seed=0,
)
def test_pixel_values_equal_transformers(config, height, width, seed):
    picture = random_picture(height, width, seed)
    processor, preprocessor = ViTImageProcessor.from_dict(config), Preprocessor(config)
    try:
        expected = by_transformers(processor, picture)
    except RuntimeError as error:  # a side without pixels
        assume("INTERNAL ASSERT" not in str(error))  # PyTorch's AVX2 code cannot resize to a single pixel
        with pytest.raises(ValueError, match="cannot be resized"):
            preprocessor(picture)
        return
    assert preprocessor.output_size(height, width) == expected.shape[1:]
    np.testing.assert_array_equal(preprocessor(picture), expected)


@pytest.mark.parametrize("height, width", [(375, 500), (500, 333), (224, 224), (256, 300), (40, 900), (1200, 1600)])
def test_photos_equal_transformers(height, width):
    picture = random_picture(height, width)
    np.testing.assert_array_equal(
        Preprocessor(PHOTOS)(picture), by_transformers(ViTImageProcessor.from_dict(PHOTOS), picture)
    )


@pytest.mark.parametrize("model, side", [("binaryvit-digits", 8), ("binaryvit-fashion-mnist", 28)])
def test_pictures_of_the_shipped_models_equal_their_image_processors(model, side):
    folder = MODEL_CARDS / model
    fields = json.loads((folder / "preprocessor_config.json").read_text())
    processor, preprocessor = AutoImageProcessor.from_pretrained(folder), Preprocessor(fields)
    grey = [Image.fromarray(random_picture(side, side, seed)[:, :, 0]) for seed in range(20)]
    for picture in [Image.open(folder / "example.png"), *grey]:
        expected = processor(picture, return_tensors="np")["pixel_values"][0]
        np.testing.assert_array_equal(preprocessor(picture.convert("RGB")), expected)


@pytest.mark.parametrize(
    "changes",
    [
        {"image_processor_type": "ViTImageProcessorFast"},
        {"image_processor_type": "ViTImageProcessorPil"},  # AutoImageProcessor prefers torchvision all the same
        {"size": None, "do_resize": None},
        {"image_mean": 0.4, "image_std": [0.3]},
        {"do_pad": False, "input_data_format": "channels_first", "antialias": False, "do_flip_channel_order": True},
    ],
)
def test_a_file_has_the_meaning_that_transformers_gives_it(tmp_path, changes):
    fields = PHOTOS | changes
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(fields))
    picture = Image.fromarray(random_picture(50, 60))
    expected = AutoImageProcessor.from_pretrained(tmp_path)(picture, return_tensors="np")["pixel_values"][0]
    np.testing.assert_array_equal(Preprocessor(fields)(picture), expected)


@pytest.mark.parametrize("absent", ["size", "resample", "image_mean", "image_std", "do_center_crop"])
def test_an_absent_field_has_the_default_of_transformers(absent):
    fields = {name: value for name, value in PHOTOS.items() if name != absent}
    if not AVX2 and absent == "resample":
        pytest.skip("torchvision resizes bilinearly in float32 on this CPU")
    picture = random_picture(50, 60)
    expected = by_transformers(ViTImageProcessor.from_dict(fields), picture)
    np.testing.assert_array_equal(Preprocessor(fields)(picture), expected)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"image_processor_type": "BitImageProcessor"}, "image_processor_type is 'BitImageProcessor'"),
        ({"image_processor_type": None}, "image_processor_type is None"),
        ({"resample": 0}, "resample is 0"),
        ({"resample": 1}, "resample is 1"),
        ({"resample": True}, "resample is True"),
        ({"resample": None}, "resample is None"),
        ({"size": {"longest_edge": 224}}, "size is"),
        ({"size": {"min_pixels": 4, "max_pixels": 9}}, "size is"),
        ({"size": {"shortest_edge": 0}}, "from 1 to"),
        ({"size": {"shortest_edge": 2**40}}, "from 1 to"),
        ({"size": {"shortest_edge": 24.5}}, "from 1 to"),
        ({"size": "224"}, "size is '224'"),
        ({"size": None}, "size is None"),
        ({"crop_size": {"shortest_edge": 224}}, "crop_size is"),
        ({"crop_size": None}, "crop_size is None"),
        ({"do_pad": True}, "do_pad is True"),
        ({"do_resize": "false"}, "do_resize is 'false'"),
        ({"device": "cuda"}, "device is 'cuda'"),
        ({"auto_map": {"AutoImageProcessor": "module.Class"}}, "auto_map is"),
        ({"do_rescale": False, "do_normalize": False}, "do_rescale and do_normalize are both false"),
        ({"rescale_factor": 0}, "rescale_factor is 0"),
        ({"rescale_factor": None}, "rescale_factor is None"),
        ({"image_mean": [0.5, 0.5]}, "image_mean is"),
        ({"image_mean": [math.nan] * 3}, "image_mean is nan"),
        ({"image_std": [0.5, 0, 0.5]}, "image_std is 0"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        Preprocessor(PHOTOS | changes)


def test_loops_for_other_cpus_equal_those_for_this_one(tmp_path):
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    source, built = Path(preprocessing.__file__).with_name("preprocess.cpp"), tmp_path / "preprocess.so"
    subprocess.run([compiler, "-std=c++17", "-O1", "-U__SSE2__", "-fPIC", "-shared", source, "-o", built], check=True)
    preprocessor, portable = Preprocessor(PHOTOS), Preprocessor(PHOTOS)
    portable.preprocess = ctypes.CDLL(str(built)).binaryvit_pixel_values
    portable.preprocess.argtypes = preprocessor.preprocess.argtypes
    for seed, (height, width) in enumerate([(375, 500), (500, 333), (40, 30), (256, 256), (900, 1000)]):
        picture = random_picture(height, width, seed)
        np.testing.assert_array_equal(portable(picture), preprocessor(picture))


def test_rows_may_be_apart_and_pictures_mirrored():
    preprocessor, picture = Preprocessor(PHOTOS), random_picture(300, 400)
    for view in (picture[10:290, 30:350], picture[::-1], picture[:, ::-1], picture[::2, ::3], picture[:, :, ::-1]):
        np.testing.assert_array_equal(preprocessor(view), preprocessor(view.copy()))
    column, row = picture[:, :1].transpose(1, 0, 2).copy().transpose(1, 0, 2), picture[:1, :1]
    for view in (column, row, picture[:, ::400], picture[::300], np.broadcast_to(picture[0, 0], (4, 5, 3))):
        np.testing.assert_array_equal(preprocessor(view), preprocessor(np.array(view.tolist(), np.uint8)))
    four_bytes = np.concatenate([picture, picture[:, :, :1]], 2)[:, :, :3]
    np.testing.assert_array_equal(preprocessor(four_bytes), preprocessor(picture))


def open_jpeg(height: int, width: int, mode: str = "RGB", **options) -> Image.Image:
    buffer = io.BytesIO()
    Image.fromarray(random_picture(height, width)).convert(mode).save(buffer, "JPEG", **options)
    return Image.open(buffer)


@pytest.mark.parametrize("height, width", [(300, 400), (1, 1), (2100, 2100)])  # the last one has two blocks of memory
def test_a_jpeg_has_the_numbers_of_its_pixels(height, width):
    preprocessor, picture = Preprocessor(PHOTOS), open_jpeg(height, width)
    np.testing.assert_array_equal(preprocessor(picture), preprocessor(np.asarray(picture)))


@pytest.mark.skipif(not hasattr(Image.Image, "__arrow_c_array__"), reason="Pillow 11.2 and newer share their memory")
def test_the_memory_of_a_jpeg_is_not_copied_and_lives_as_long_as_its_view():
    picture = open_jpeg(30, 40)
    view, expected = preprocessing.view_pixels(picture), np.array(picture)
    np.testing.assert_array_equal(view, expected)
    picture.putpixel((2, 1), (1, 2, 3))
    assert view[1, 2].tolist() == [1, 2, 3]
    picture.close()
    del picture
    gc.collect()
    [Image.new("RGB", (40, 30), "red") for _ in range(100)]  # would take the memory if it were free
    expected[1, 2] = 1, 2, 3
    np.testing.assert_array_equal(view, expected)


def test_pictures_that_pillow_may_not_share_are_copied():
    """Pillow 12 crashes where it shares an image of another library, or one without pixels."""
    preprocessor, picture = Preprocessor(PHOTOS), random_picture(30, 40)
    image = Image.fromarray(picture)
    pictures = [image, open_jpeg(30, 40).transpose(Image.Transpose.ROTATE_90), open_jpeg(30, 40, "L")]
    if hasattr(Image, "fromarrow"):
        pictures.append(Image.fromarrow(image, "RGB", image.size))
        np.testing.assert_array_equal(preprocessor(pictures[-1]), preprocessor(picture))
    assert [preprocessing.view_pixels(other) for other in pictures] == [None] * len(pictures)


def test_pictures_are_written_into_a_batch():
    preprocessor, pictures = Preprocessor(PHOTOS), [random_picture(60, 50, seed) for seed in range(3)]
    batch = np.full((3, 3, 224, 224), np.nan, np.float32)
    for picture, pixel_values in zip(pictures, batch):
        assert preprocessor(picture, pixel_values) is pixel_values
    np.testing.assert_array_equal(batch, np.stack([preprocessor(picture) for picture in pictures]))


@pytest.mark.parametrize(
    "output",
    [
        np.empty((3, 224, 223), np.float32),
        np.empty((3, 224, 224)),
        np.empty((224, 224, 3), np.float32).transpose(2, 0, 1),
        np.frombuffer(bytes(4 * 3 * 224 * 224), np.float32).reshape(3, 224, 224),  # read-only
    ],
)
def test_an_output_that_does_not_fit_is_refused(output):
    with pytest.raises(ValueError, match="The output must be contiguous float32"):
        Preprocessor(PHOTOS)(random_picture(20, 20), output)


@pytest.mark.parametrize("shape, dtype", [((8, 8), "u1"), ((8, 8, 4), "u1"), ((3, 8, 8), "u1"), ((8, 8, 3), "f4")])
def test_what_is_no_rgb_picture_is_refused(shape, dtype):
    with pytest.raises(ValueError, match="A picture must be uint8"):
        Preprocessor(PHOTOS)(np.zeros(shape, dtype))


@pytest.mark.parametrize("height, width", [(0, 8), (8, 0), (0, 0)])
def test_empty_pictures_are_refused(height, width):
    picture = np.zeros((height, width, 3), np.uint8)
    with pytest.raises(ValueError, match="cannot be resized"):
        Preprocessor(PHOTOS)(picture)
    with pytest.raises(ValueError, match="cannot be resized"):
        Preprocessor(PHOTOS)(Image.new("RGB", (width, height)))


def test_threads_share_a_preprocessor():
    preprocessor, pictures = Preprocessor(PHOTOS), [random_picture(90, 70, 3 * seed) for seed in range(16)]
    expected = [preprocessor(picture) for picture in pictures]
    with ThreadPoolExecutor(4) as pool:
        for actual, alone in zip(pool.map(preprocessor, pictures), expected):
            np.testing.assert_array_equal(actual, alone)

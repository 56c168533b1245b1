"""Pictures are decoded upright, to RGB and 8 bits, alike in training, evaluation and transformers' pipelines."""

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import set_seed
from transformers.image_utils import load_image

from binaryvit_hf import pixels
from binaryvit_hf.data.arguments import DataArguments
from binaryvit_hf.data.decoding import CroppingDecoder, decode_image
from binaryvit_runtime.errors import UserError
from binaryvit_runtime.pixels import (
    choose_background,
    find_orientation,
    is_transparent,
    normalize_colour,
    open_picture,
    read_background,
    to_rgb,
)


COLOURS = np.random.default_rng(0).integers(0, 256, (24, 40, 3)).astype("uint8").repeat(8, 0).repeat(8, 1)
VALUES = np.array([[0, 1, 256], [4000, 40000, 65535]])


def encode(image: Image.Image, kind: str, **options) -> io.BytesIO:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    buffer.seek(0)
    return buffer


def exif(orientation) -> Image.Exif:
    written = Image.Exif()
    written[0x0112] = orientation
    return written


def read(buffer: io.BytesIO, background: str | None = None) -> np.ndarray:
    return np.asarray(to_rgb(open_picture(io.BytesIO(buffer.getvalue())), background))


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_a_picture_is_upright_as_in_transformers(orientation, kind):
    file = encode(Image.fromarray(COLOURS), kind, exif=exif(orientation))
    image = to_rgb(open_picture(file))
    assert np.array_equal(image, load_image(Image.open(io.BytesIO(file.getvalue()))))
    assert find_orientation(image) == 1
    assert to_rgb(image).tobytes() == image.tobytes()  # not turned twice


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_every_mode_is_converted_as_transformers_does(mode, orientation):
    kind = "TIFF" if mode == "CMYK" else "PNG"
    file = encode(Image.fromarray(COLOURS).convert(mode), kind, exif=exif(orientation))
    assert np.array_equal(read(file), load_image(Image.open(file)))


@pytest.mark.parametrize(
    "damaged", [b"", b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*" + bytes(range(40))]
)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_damaged_exif_is_ignored(damaged, kind):
    file = encode(Image.fromarray(COLOURS), kind, exif=damaged)
    assert np.array_equal(read(file), Image.open(file).convert("RGB"))
    assert CroppingDecoder((16, 16), 0.08)({"bytes": file.getvalue()}).shape == (3, 16, 16)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [(320, 192), (315, 189)], ids=["of whole blocks", "of other sizes"])
@pytest.mark.parametrize("crop", [(96, 160), (12, 20)], ids=["decoded whole", "decoded smaller"])
def test_crops_are_those_of_the_upright_picture(orientation, size, crop):
    smooth = Image.fromarray(COLOURS).resize((20, 12)).resize(size, Image.Resampling.BICUBIC)
    turned = encode(smooth, "JPEG", quality=95, exif=exif(orientation)).getvalue()
    upright = encode(decode_image({"bytes": turned}), "PNG").getvalue()
    decoder = CroppingDecoder(crop, 0.5)
    for seed in range(3):
        set_seed(seed)
        ours = decoder({"bytes": turned}).int()
        set_seed(seed)
        assert (ours - decoder({"bytes": upright}).int()).abs().double().mean() < (0.1 if crop[0] > 90 else 3)


def test_a_turned_jpeg_is_also_decoded_at_reduced_size(monkeypatch):
    file = encode(Image.fromarray(COLOURS), "JPEG", exif=exif(6))
    sizes = []
    monkeypatch.setattr(
        "binaryvit_hf.data.decoding.to_rgb", lambda image, _: sizes.append(image.size) or to_rgb(image)
    )
    CroppingDecoder((40, 24), 1.0).decode(Image.open(file), 0, 0, 320, 192)
    assert sizes == [(40, 24)]


def tiff_of_16_bits(order: str) -> io.BytesIO:
    file = encode(Image.fromarray(VALUES.astype("<u2")), "TIFF")
    if order == "<":
        return file
    return encode(Image.frombytes("I;16B", (3, 2), VALUES.astype(">u2").tobytes()), "TIFF")


def pgm(values: np.ndarray) -> io.BytesIO:
    return io.BytesIO(b"P5 3 2 65535\n" + values.astype(">u2").tobytes())


@pytest.mark.parametrize(
    "file",
    [encode(Image.fromarray(VALUES.astype("uint16")), "PNG"), tiff_of_16_bits("<"), tiff_of_16_bits(">"), pgm(VALUES)],
    ids=["PNG", "TIFF", "TIFF of big-endian", "PGM"],
)
def test_values_of_16_bits_are_divided_by_257(file):
    expected = np.rint(VALUES / 257)
    assert expected.tolist() == [[0, 0, 1], [16, 156, 255]]
    assert np.array_equal(read(file), np.stack(3 * [expected], -1))
    whole = CroppingDecoder((2, 3), 1.0).decode(open_picture(io.BytesIO(file.getvalue())), 0, 0, 2, 3)
    assert np.array_equal(whole[0], expected)


def test_a_dark_picture_of_16_bits_stays_dark():
    dark = np.minimum(VALUES, 200)
    for file in (encode(Image.fromarray(dark.astype("uint16")), "PNG"), pgm(dark)):
        assert read(file).max() == 1


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize(
    "values, expected",
    [
        (np.array([[0, 7], [100, 255]], "int32"), [[0, 7], [100, 255]]),
        (np.array([[0, 256], [257, 65535]], "int32"), [[0, 1], [1, 255]]),
        (np.array([[0, 0.5], [0.1, 1]], "float32"), [[0, 128], [26, 255]]),
        (np.array([[0, 7], [100.4, 255]], "float32"), [[0, 7], [100, 255]]),
        (np.array([[0, 256], [257, 65535]], "float32"), [[0, 1], [1, 255]]),
    ],
)
def test_values_of_32_bits_are_scaled_by_their_range(values, expected, orientation):
    file = encode(Image.fromarray(values), "TIFF", tiffinfo={0x0112: orientation})
    expected = np.rot90(expected, -1) if orientation == 6 else np.array(expected)
    assert np.array_equal(read(file)[..., 1], expected)


@pytest.mark.parametrize(
    "values", [[-1, 5], [0, 65536], [0.0, float("nan")], [0.0, float("inf")], [-0.1, 1.0], [0.0, 1e6]], ids=str
)
def test_values_of_no_known_range_are_refused(values):
    kind = "float32" if isinstance(values[1], float) else "int32"
    file = encode(Image.fromarray(np.array([values], kind)), "TIFF")
    with pytest.raises(ValueError, match="no known range; save it with 8 or 16 bits"):
        read(file)


def transparent_image(mode: str) -> Image.Image:
    """Black pixels: transparent, half transparent (if the mode allows it) and opaque."""
    image = Image.new("RGBA", (3, 1))
    image.putdata([(0, 0, 0, 0), (0, 0, 0, 0 if mode == "P" else 128), (0, 0, 0, 255)])
    return image if mode == "RGBA" else image.convert(mode)


@pytest.mark.parametrize(
    "file, left, middle",
    [
        (encode(transparent_image("RGBA"), "PNG"), 0, 128),
        (encode(transparent_image("LA"), "PNG"), 0, 128),
        (encode(transparent_image("RGBA"), "WEBP", lossless=True, exact=True), 0, 128),
        (encode(Image.fromarray(np.array([[5, 5, 0]], "uint8")), "PNG", transparency=5), 5, 255),
        (encode(Image.fromarray(np.array([[5, 5, 0]], "uint16")), "PNG", transparency=5), 0, 255),
        (encode(transparent_image("P"), "GIF", transparency=transparent_image("P").getpixel((0, 0))), None, None),
    ],
    ids=["RGBA", "LA", "WebP", "grey", "grey of 16 bits", "GIF"],
)
def test_transparency_is_dropped_or_put_on_the_background(file, left, middle):
    assert is_transparent(open_picture(io.BytesIO(file.getvalue())))
    assert read(file, "#ff0000")[0, 0].tolist() == [255, 0, 0]
    if left is not None:
        assert read(file)[0].tolist() == [[left] * 3, [left] * 3, [0] * 3]
        assert read(file, "#ff0000")[0].tolist()[2] == [0, 0, 0]
        assert abs(int(read(file, "#ff0000")[0, 1, 0]) - (127 if middle == 128 else 255)) <= 1


def test_palettes_of_partly_transparent_colours_are_put_on_the_background():
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    file = encode(image, "PNG", transparency=b"\x00\xff")
    assert is_transparent(open_picture(io.BytesIO(file.getvalue())))
    assert read(file)[0].tolist() == [[10, 20, 30], [40, 50, 60]]
    assert read(file, "white")[0].tolist() == [[255, 255, 255], [40, 50, 60]]


def test_opaque_pixels_in_a_mode_with_transparency_are_opaque():
    assert not is_transparent(open_picture(encode(Image.new("RGBA", (2, 2), "red"), "PNG")))
    assert not is_transparent(open_picture(encode(Image.fromarray(COLOURS), "PNG")))


def test_training_puts_transparent_pixels_on_the_background():
    file = {"bytes": encode(Image.new("RGBA", (8, 8)), "PNG").getvalue()}
    assert CroppingDecoder((4, 4), 0.5)(file).max() == 0
    assert CroppingDecoder((4, 4), 0.5, "white")(file).min() == 255


@pytest.mark.parametrize("colour", ["whit", "", "#ffcc0080", "#12", 5, ["white"]])
def test_a_background_that_is_no_opaque_colour_is_refused(colour):
    with pytest.raises(ValueError, match="--background must be 'none' or an opaque colour such as white"):
        DataArguments(background=colour)


@pytest.mark.parametrize("colour", [None, "white", "#FC0", "#ffcc00", "rgb(1, 2, 3)", "hsl(30, 50%, 50%)"])
def test_colours_that_pillow_knows_are_backgrounds(colour):
    background = choose_background(colour, None)
    expected = Image.new("RGB", (1, 1), colour or "black")
    assert to_rgb(Image.new("RGBA", (1, 1)), background).tobytes() == expected.tobytes()


@pytest.mark.parametrize(
    "colour, normal",
    [
        ("White", "#ffffff"),
        ("#FC0", "#ffcc00"),
        ("rgb(1, 2, 3)", "#010203"),
        ("rgb(999, 0, 0)", "#ff0000"),
        ("hsl(0, 200%, 50%)", "#ff0000"),
    ],
)
def test_colours_have_one_normal_form(colour, normal):
    assert normalize_colour(colour) == normal == normalize_colour(normal)


@pytest.mark.parametrize("colour", ["whit", "", "none", "#ffcc0080", 5, ["white"], {}, True])
def test_a_damaged_background_of_a_model_is_refused(colour):
    with pytest.raises(UserError, match=r"^background must be an opaque colour such as white or '#ffcc00', not "):
        read_background({"background": colour})


def test_a_background_that_is_given_goes_before_the_models():
    assert choose_background(None, "#010203") == "#010203"
    assert choose_background("white", "#010203") == "#ffffff"
    assert choose_background("none", "#010203") is None


def test_a_picture_above_pillows_limit_says_its_size_and_the_limit(tmp_path, monkeypatch):
    Image.new("1", (14000, 14000)).save(tmp_path / "large.png")
    limit = Image.MAX_IMAGE_PIXELS
    with pytest.raises(
        Image.DecompressionBombError, match=r"14000 x 14000 pixels, more than 134217728; make it smaller"
    ):
        open_picture(tmp_path / "large.png")
    assert limit == Image.MAX_IMAGE_PIXELS
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # as another thread may have it for a moment
    with pytest.raises(Image.DecompressionBombError, match="14000 x 14000"):
        open_picture(tmp_path / "large.png")


def test_a_picture_is_at_most_a_thousand_times_as_long_as_wide(tmp_path):
    """Resized until its shorter side is 256, a picture of 1 x 60,000 pixels takes 12 GB."""
    for size in ((1, 1000), (1000, 1), (2, 2000)):
        Image.new("1", size).save(tmp_path / "long.png")
        assert open_picture(tmp_path / "long.png").size == size
    for size in ((1, 1001), (2001, 2)):
        Image.new("1", size).save(tmp_path / "long.png")
        with pytest.raises(
            Image.DecompressionBombError, match=f"it has {size[0]} x {size[1]} pixels, one side more than 1000 times"
        ):
            open_picture(tmp_path / "long.png")


def test_pillows_warnings_of_single_pictures_stay_off_the_terminal(tmp_path):
    Image.new("1", (10000, 9000)).save(tmp_path / "large.png")
    code = (
        "import sys, types; sys.modules['p'] = package = types.ModuleType('p'); package.__path__ = [sys.argv[1]];"
        "from p.pixels import open_picture\nwith open_picture(sys.argv[2]) as picture: print(picture.size)"
    )
    command = [
        sys.executable,
        "-W",
        "always",
        "-c",
        code,
        str(Path(pixels.__file__).parent),
        str(tmp_path / "large.png"),
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (result.stdout, result.stderr) == ("(10000, 9000)\n", "")


def test_a_crop_of_a_grey_jpeg_is_rgb():
    file = encode(Image.fromarray(COLOURS).convert("L"), "JPEG")
    crop = CroppingDecoder((16, 16), 0.08)({"bytes": file.getvalue()})
    assert torch.equal(crop[0], crop[2])

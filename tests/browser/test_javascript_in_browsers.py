"""binaryvit.js in browsers: it decodes pictures to the pixels of Pillow, and loads models by URL."""

import base64
import io
import json
import mimetypes
import re
import struct
import zlib

import numpy as np
import pytest
from node import BROWSER, WASM
from PIL import Image, ImageCms
from snippets import IN_NODE, snippets_in

from binaryvit_runtime import Classifier
from binaryvit_runtime.engine import kernels_here
from binaryvit_runtime.pixels import to_rgb
from binaryvit_runtime.resources import shipped_models


pytest.importorskip("playwright")

from browsers import BROWSERS, is_firefox, start_browser


HEIGHT, WIDTH = 37, 53
RNG = np.random.default_rng(0)
RGBA = Image.fromarray(RNG.integers(0, 256, (HEIGHT, WIDTH, 4), np.uint8))
RGB, GREY = RGBA.convert("RGB"), RGBA.convert("L")
PALETTE = RGB.quantize(50)
PHOTO = Image.fromarray(RNG.integers(0, 256, (10, 14, 3), np.uint8)).resize((300, 200), Image.Resampling.BICUBIC)
GREY_TYPE, RGB_TYPE, RGBA_TYPE = 0, 2, 6  # of a PNG


def encoded(picture: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_of_16_bits(colour_type: int, channels: int) -> bytes:
    values = np.random.default_rng(colour_type).integers(0, 2**16, (HEIGHT, WIDTH * channels)).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    header = struct.pack(">IIBBBBB", WIDTH, HEIGHT, 16, colour_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def add_chunk(png: bytes, kind: bytes, content: bytes) -> bytes:
    return png[:33] + chunk(kind, content) + png[33:]  # after the header


def profile_with_red_and_green_exchanged() -> bytes:
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    for tag in range(struct.unpack(">I", profile[128:132])[0]):
        name = slice(132 + 12 * tag, 136 + 12 * tag)
        profile[name] = {b"rXYZ": b"gXYZ", b"gXYZ": b"rXYZ"}.get(bytes(profile[name]), bytes(profile[name]))
    return bytes(profile)


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x112] = orientation
    return exif


OTHER_COLOURS = profile_with_red_and_green_exchanged()
FILES = {
    "RGB": encoded(RGB, "PNG"),
    "RGBA": encoded(RGBA, "PNG"),
    "grey": encoded(GREY, "PNG"),
    "grey with alpha": encoded(RGBA.convert("LA"), "PNG"),
    "one bit": encoded(GREY.convert("1"), "PNG"),
    "palette": encoded(PALETTE, "PNG"),
    "palette with a transparent colour": encoded(PALETTE, "PNG", transparency=3),
    "palette with alpha": encoded(PALETTE, "PNG", transparency=bytes(range(0, 250, 5))),
    "RGB with a transparent colour": encoded(RGB, "PNG", transparency=RGB.getpixel((0, 0))),
    "RGB of 16 bits": png_of_16_bits(RGB_TYPE, 3),
    "RGBA of 16 bits": png_of_16_bits(RGBA_TYPE, 4),
    "gamma": add_chunk(encoded(RGB, "PNG"), b"gAMA", struct.pack(">I", 100_000)),
    "PNG with a profile": encoded(RGB, "PNG", icc_profile=OTHER_COLOURS),
    "RGBA with a profile": encoded(RGBA, "PNG", icc_profile=OTHER_COLOURS),
    "JPEG with a profile": encoded(PHOTO, "JPEG", icc_profile=OTHER_COLOURS),
    **{f"JPEG {name}": encoded(PHOTO, "JPEG", subsampling=name, quality=85) for name in ("4:4:4", "4:2:2", "4:2:0")},
    "progressive JPEG": encoded(PHOTO, "JPEG", progressive=True),
    "JPEG of noise": encoded(RGB, "JPEG"),
    "grey JPEG": encoded(GREY, "JPEG"),
    "CMYK JPEG": encoded(PHOTO.convert("CMYK"), "JPEG"),
    **{f"JPEG turned {turn}": encoded(PHOTO, "JPEG", exif=turned(turn)) for turn in range(1, 9)},
    **{f"PNG turned {turn}": encoded(RGB, "PNG", exif=turned(turn)) for turn in (3, 6)},
    "WebP": encoded(PHOTO, "WEBP"),
    "WebP with alpha": encoded(RGBA, "WEBP", lossless=True, exact=True),
    "GIF": encoded(PALETTE, "GIF"),
    "BMP": encoded(RGB, "BMP"),
}
FILES |= {
    "PNG without its last byte": FILES["RGB"][:-1],
    "GIF without its last byte": FILES["GIF"][:-1],
    **{
        f"{name} with bytes after it": FILES[name] + b"\xff\0more"
        for name in ("RGB", "progressive JPEG", "GIF", "BMP")
    },
}
NEAR = {"grey of 16 bits": png_of_16_bits(GREY_TYPE, 1)}
HALVED = (
    "RGB",
    "RGBA",
    "palette",
    "JPEG 4:2:0",
    "progressive JPEG",
    "CMYK JPEG",
    "WebP",
    "WebP with alpha",
    "GIF",
    "BMP",
)
DECODE = """
async (files) => {
  const { decodePicture } = await import("/binaryvit.js");
  const encode = (bytes) => {
    let text = "";
    for (let start = 0; start < bytes.length; start += 8192)
      text += String.fromCharCode(...bytes.subarray(start, start + 8192));
    return btoa(text);
  };
  const show = (picture) => ({ ...picture, data: encode(picture.data) });
  const found = [];
  for (const file of files) {
    const blob = new Blob([Uint8Array.from(atob(file), (character) => character.charCodeAt(0))]);
    const image = new Image();
    image.src = URL.createObjectURL(blob);
    await image.decode();
    found.push([show(await decodePicture(blob)), show(await decodePicture(image))]);
  }
  return found;
}
"""
TOOLS = """
const { load, decodePicture } = await import("/binaryvit.js");
const message = async (work) => {
  try { await work(); return "no error"; } catch (error) { return `${error.name}: ${error.message}`; }
};
"""


@pytest.fixture(scope="module", params=BROWSERS)
def page(request):
    """An empty page of a server that has the module, the engine, and the shipped models."""

    def answer(route) -> None:
        name = route.request.url.removeprefix("http://module.test/")
        model, _, file = name.partition("/")
        places = [BROWSER / name, WASM] if not file else [shipped_models()[model] / file]
        found = next((place for place in places if place.is_file() and place.name == name.split("/")[-1]), None)
        if not name:
            route.fulfill(body="<!doctype html><title>module</title>", content_type="text/html")
        elif found is None:
            route.fulfill(status=404)
        else:
            route.fulfill(body=found.read_bytes(), content_type=mimetypes.guess_type(name)[0] or "application/wasm")

    with start_browser(request.param) as browser:
        page = browser.new_page()
        page.route("**/*", answer)
        page.goto("http://module.test/")
        yield page


@pytest.fixture(scope="module")
def decoded(page) -> dict[str, list[np.ndarray]]:
    """By name of the file: its pixels, from the file and from an `<img>`."""
    files = FILES | NEAR
    found = page.evaluate(DECODE, [base64.b64encode(content).decode() for content in files.values()])
    return {name: [pixels_of(picture) for picture in pictures] for name, pictures in zip(files, found)}


def pixels_of(picture: dict) -> np.ndarray:
    data = np.frombuffer(base64.b64decode(picture["data"]), np.uint8)
    return data.reshape(picture["height"], picture["width"], 4)


@pytest.mark.parametrize("name", FILES)
def test_pixels_are_those_of_pillow(name, decoded, page):
    expected = np.asarray(to_rgb(Image.open(io.BytesIO(FILES[name]))))
    from_file, from_element = decoded[name]
    # Pillow drops the lower byte of 16 bits. Firefox rounds them, Chromium those of an element.
    rounds_files = "16 bits" in name and is_firefox(page)
    assert np.abs(from_file[:, :, :3].astype(int) - expected).max() <= rounds_files
    assert np.abs(from_element[:, :, :3].astype(int) - expected).max() <= ("16 bits" in name)


@pytest.mark.parametrize("name", [name for name in FILES if "16 bits" not in name and "turned" not in name])
def test_alpha_is_that_of_pillow(name, decoded):
    expected = np.asarray(Image.open(io.BytesIO(FILES[name])).convert("RGBA"))[:, :, 3]
    for pixels in decoded[name]:
        np.testing.assert_array_equal(pixels[:, :, 3], expected)


@pytest.mark.parametrize("name", NEAR)
def test_grey_of_16_bits_is_near_that_of_pillow(name, decoded):
    expected = np.asarray(to_rgb(Image.open(io.BytesIO(NEAR[name]))))
    for pixels in decoded[name]:
        assert np.abs(pixels[:, :, :3].astype(int) - expected).max() <= 1  # Chromium drops the lower byte


@pytest.mark.skipif(not kernels_here(), reason="the engine was not built")
@pytest.mark.parametrize("name", shipped_models())
def test_a_shipped_model_classifies_a_file_as_python_does(name, page, monkeypatch):
    monkeypatch.setenv("BINARYVIT_ENGINE", "scalar")  # which rounds as WebAssembly
    classify = f"""async (files) => {{
      {TOOLS}
      const model = await load("/{name}");
      const pictures = files.map((file) => new Blob([Uint8Array.from(atob(file), (c) => c.charCodeAt(0))]));
      const answers = await Promise.all(pictures.map((picture) => model.classify(picture)));
      return [...answers, await model.classify(pictures[1], {{ background: "white" }})];
    }}"""
    example = (shipped_models()[name] / "example.png").read_bytes()
    pictures = [example, FILES["RGBA"], FILES["JPEG turned 6"]]
    actual = page.evaluate(classify, [base64.b64encode(picture).decode() for picture in pictures])
    classifier = Classifier.from_pretrained(name, threads=1)
    expected = [classifier(io.BytesIO(picture)) for picture in pictures]
    for labels, right in zip(
        actual, [*expected, classifier(io.BytesIO(pictures[1]), background="white")], strict=True
    ):
        assert [each["label"] for each in labels] == [each["label"] for each in right]
        assert [each["score"] for each in labels] == pytest.approx([each["score"] for each in right], 1e-5, 1e-7)


@pytest.mark.parametrize("snippet", [each for each in snippets_in("js") if IN_NODE not in each.text], ids=str)
def test_a_snippet_for_browsers_runs(snippet, page):
    assert 'load("model")' in snippet.text
    program = snippet.text.replace('"model"', '"/binaryvit-digits"').replace("./binaryvit.js", "/binaryvit.js")
    imports, body = program.split("\n\n", 1)
    body = body.replace("console.log", "printed.push")
    imports = re.sub(r"import (.*) from (.*);", r"const \1 = await import(\2);", imports)
    printed = page.evaluate(f"""async () => {{
      const printed = [];
      const file = await (await fetch("/binaryvit-digits/example.png")).blob();
      {imports} {body}
      return printed;
    }}""")
    assert "label" in str(printed)


def test_elements_and_bitmaps_are_pictures_too(page):
    """All of them show one opaque picture."""
    answers = page.evaluate(f"""async () => {{
      {TOOLS}
      const model = await load("/binaryvit-digits");
      const file = await (await fetch("/binaryvit-digits/example.png")).blob();
      const image = new Image();
      image.src = URL.createObjectURL(file);
      await image.decode();
      const canvas = document.createElement("canvas");
      const offscreen = new OffscreenCanvas(image.width, image.height);
      [canvas.width, canvas.height] = [image.width, image.height];
      for (const each of [canvas, offscreen]) each.getContext("2d").drawImage(image, 0, 0);
      const pixels = canvas.getContext("2d").getImageData(0, 0, image.width, image.height);
      const kinds = [file, image, canvas, offscreen, pixels, await createImageBitmap(file), await decodePicture(file)];
      return Promise.all(kinds.map((kind) => model.classify(kind)));
    }}""")
    assert answers == [answers[0]] * 7
    assert answers[0][0]["score"] > 0.5


def test_pictures_that_cannot_be_read_are_refused_in_one_sentence(page):
    tall, png = Image.new("L", (1, 1001)), FILES["RGB"]
    # A canvas has at most 65 535 pixels in a row in Chromium, and a picture 65 535 in Firefox.
    wide = Image.new("L", (70_000, 100), 200)
    exif = b"Exif\0\0" + FILES["JPEG of noise"]  # as a preview, which has an end too
    files = {
        "empty": b"",
        "text": b"hello",
        "PNG without its end": png[:-14],
        "changed PNG": png[:1000] + bytes([png[1000] ^ 1]) + png[1001:],
        "JPEG without its end": FILES["JPEG 4:2:0"][:-1],
        "cut off JPEG with a preview": encoded(PHOTO, "JPEG", exif=exif)[:-1000],
        **{f"half of {name}": FILES[name][: len(FILES[name]) // 2] for name in HALVED},
        "tall": encoded(tall, "PNG"),
        "wide": encoded(wide, "PNG"),
    }
    texts = [base64.b64encode(content).decode() for content in files.values()]
    script = f"""async (files) => {{
      {TOOLS}
      const model = await load("/binaryvit-digits");
      const pictures = files.map((file) => new Blob([Uint8Array.from(atob(file), (c) => c.charCodeAt(0))]));
      return Promise.all([...pictures, "digit.png", null].map((picture) => message(() => model.classify(picture))));
    }}"""
    *unreadable, tall_message, wide_message, text, null = page.evaluate(script, texts)
    for name, actual in zip([*[*files][:-2], "text", "null"], [*unreadable, text, null], strict=True):
        assert actual.startswith("BinaryViTError: The picture cannot be read as an image ("), (name, actual)
        assert len(actual.splitlines()) == 1 and actual.endswith(").")
    assert tall_message == (
        "BinaryViTError: The picture is too large: it has 1 x 1001 pixels, one side more than 1000 times the other; cut it."
    )
    assert wide_message == (
        "BinaryViTError: The picture cannot be read as an image (The image could not be decoded)."
        if is_firefox(page)
        else "BinaryViTError: The picture is too large for this browser: it has 70000 x 100 pixels; make it smaller."
    )


def test_a_model_that_is_disposed_while_a_picture_is_decoded_says_so(page):
    found = page.evaluate(f"""async () => {{
      {TOOLS}
      const [model, other] = await Promise.all([load("/binaryvit-digits"), load("/binaryvit-digits")]);
      const file = await (await fetch("/binaryvit-digits/example.png")).blob();
      const waiting = [message(() => model.classify(file)), other.classify(file)];
      model.dispose();
      return Promise.all(waiting);
    }}""")
    assert found[0] == "BinaryViTError: The model is disposed: load it again."
    assert len(found[1]) == 5


def test_files_are_decoded_one_at_a_time(page):
    picture = base64.b64encode(encoded(Image.new("RGB", (40, 30), "red"), "png")).decode()
    most, labels = page.evaluate(
        """async (encoded) => {
          const { load } = await import("/binaryvit.js");
          const model = await load("/binaryvit-digits");
          const decode = window.createImageBitmap;
          let [open, most] = [0, 0];
          window.createImageBitmap = async (...given) => {
            const bitmap = await decode(...given);
            most = Math.max(most, ++open);
            const close = bitmap.close.bind(bitmap);
            bitmap.close = () => (open--, close());
            return bitmap;
          };
          const bytes = Uint8Array.from(atob(encoded), (character) => character.charCodeAt(0));
          const files = Array.from({ length: 8 }, (_, place) => new Blob([place === 3 ? "text" : bytes]));
          const found = await Promise.allSettled(files.map((file) => model.classify(file)));
          window.createImageBitmap = decode;
          return [most, found.map(({ value }) => value?.[0].label ?? null)];
        }""",
        picture,
    )
    assert most == 1
    assert labels == 3 * [labels[0]] + [None] + 4 * [labels[0]]


def test_a_missing_model_is_named(page):
    address = "http://module.test/binaryvit-digits/none"
    found = page.evaluate(f"async () => {{ {TOOLS} return message(() => load(new URL({json.dumps(address)}))); }}")
    assert found == f"BinaryViTError: The model '{address}' cannot be loaded: it has no config.json."

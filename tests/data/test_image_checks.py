"""Checks of images before training: broken, too large, transparent, of one colour."""

import io
import json
import logging
import time

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image
from tiny import tiny_config

from binaryvit_cli import main as binaryvit
from binaryvit_hf.data import image_checks
from binaryvit_hf.data.arguments import DataArguments
from binaryvit_hf.data.image_checks import check_images, evenly_spaced, iterate_inspected
from binaryvit_hf.data.loading import load_images
from binaryvit_hf.data.streaming import ImageStream
from binaryvit_hf.training.run import main
from binaryvit_runtime.errors import UserError


PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 32, 3)).astype("uint8"))
# Black shapes on a transparent background. The background's hidden colour is black, too.
SHAPE = Image.merge(
    "RGBA", (*3 * [Image.new("L", (32, 16))], PHOTO.getchannel("R").point(lambda value: 255 * (value > 99)))
)


@pytest.fixture
def photos(tmp_path):
    """Two classes of five pictures that cause no warning."""
    for name in ("ant", "bee"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(5):
            PHOTO.save(tmp_path / "photos" / name / f"{number}.{'jpg' if number % 2 else 'png'}")
    return tmp_path / "photos"


def check(photos, skip_broken=False, background=None):
    folder = str(photos)
    images = load_images(DataArguments(train_dir=folder, validation_dir=folder), 0, None, None)
    return check_images(images, skip_broken, background)


def embedded(*pictures: Image.Image | bytes, names: bool = False) -> dict[str, Dataset]:
    def encode(picture):
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        return buffer.getvalue()

    contents = [picture if isinstance(picture, bytes) else encode(picture) for picture in pictures]
    rows = {
        "image": [
            {"bytes": content, "path": f"{number}.png" if names else None} for number, content in enumerate(contents)
        ],
        "label": [0] * len(contents),
    }
    features = Features({"image": ImageFeature(decode=False), "label": ClassLabel(names=["ant"])})
    return {"train": Dataset.from_dict(rows, features=features)}


def test_ordinary_pictures_cause_no_warning(photos, caplog):
    PHOTO.convert("RGBA").save(photos / "ant" / "opaque.png")
    images, broken = check(photos)
    assert (len(images["train"]), broken, caplog.text) == (11, [], "")


def test_transparent_pictures_are_counted_and_named_before_training_and_in_evaluation(photos, caplog):
    for name in ("ant/x.png", "bee/x.png"):
        SHAPE.save(photos / name)
    check(photos)
    said = [record.message for record in caplog.records]
    for message, split in zip((said[0], said[-1]), ("train", "validation")):
        assert message.startswith(f"Transparent in places: 2 of 12 {split} images, '{photos}/ant/x.png' first.")
        assert "--background white" in message
    caplog.clear()
    check(photos, background="white")
    assert caplog.text == ""


def test_training_pictures_of_one_colour_are_counted_and_named(photos, caplog):
    SHAPE.save(photos / "ant" / "x.png")
    Image.new("RGB", (16, 16), "red").save(photos / "bee" / "y.jpg")
    Image.new("L", (16, 16)).save(photos / "bee" / "z.png")
    check(photos)
    plain = [record.message for record in caplog.records if "one colour" in record.message]
    assert plain == [f"Of one colour: 3 of 13 decoded training images, '{photos}/ant/x.png' first."]
    caplog.clear()
    check(photos, background="white")
    assert caplog.messages == [f"Of one colour: 2 of 13 decoded training images, '{photos}/bee/y.jpg' first."]


def test_pictures_inside_a_dataset_are_checked_too(caplog):
    check_images(embedded(PHOTO, PHOTO, SHAPE), skip_broken=False)
    assert "Transparent in places: 1 of 3 train images, 'image 2' first." in caplog.text
    assert "Of one colour: 1 of 3 decoded training images" in caplog.text
    with pytest.raises(
        UserError,
        match=r"^'1.png' cannot be read as an image \(it has no format that Pillow knows\): remove it, or .*--skip_broken_images",
    ):
        check_images(embedded(PHOTO, b"no image", PHOTO, names=True), skip_broken=False)
    kept, broken = check_images(embedded(PHOTO, b"no image", SHAPE, names=True), skip_broken=True)
    assert (len(kept["train"]), broken) == (2, ["1.png"])
    assert "Transparent in places: 1 of 2 train images, '2.png' first." in caplog.text


def test_the_first_evaluation_pictures_of_a_stream_are_checked(caplog, monkeypatch):
    monkeypatch.setattr(image_checks, "MAX_STREAMED_IMAGES", 3)
    pictures = embedded(PHOTO, SHAPE, PHOTO, SHAPE, b"no image")["train"].to_iterable_dataset()
    streams = {"train": ImageStream(pictures, None), "validation": ImageStream(pictures, None)}
    check_images(streams, skip_broken=False)
    (message,) = caplog.messages
    assert message.startswith("Transparent in places: 1 of the first 3 validation images, 'image 1' first.")
    caplog.clear()
    check_images(streams, skip_broken=False, background="white")
    assert caplog.text == ""
    monkeypatch.setattr(image_checks, "MAX_STREAMED_IMAGES", 5)
    with pytest.raises(UserError, match=r"^'image 4' cannot be decoded \(it has no format .*\): remove it\.$"):
        check_images(streams, skip_broken=False)


def test_a_limited_number_of_pictures_is_decoded_evenly_spaced(photos, monkeypatch, caplog):
    assert evenly_spaced(range(10), 4) == [0, 2, 5, 7]
    assert list(evenly_spaced(range(3), 4)) == [0, 1, 2]
    monkeypatch.setattr(image_checks, "MAX_DECODED_IMAGES", 2)
    SHAPE.save(photos / "ant" / "x.png")
    for path in photos.rglob("[0-9].png"):
        Image.new("RGB", (16, 16)).save(path)
    check(photos)
    assert "Of one colour: 3 of 3 decoded training images" in caplog.text
    monkeypatch.setattr(image_checks, "MAX_EMBEDDED_HEADERS", 2)
    kept, _ = check_images(embedded(PHOTO, PHOTO, b"no image"), skip_broken=False)
    assert len(kept["train"]) == 3


def test_a_truncated_picture_is_named_before_training_if_it_is_checked(photos):
    path = photos / "ant" / "0.png"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(
        UserError, match=rf"^'{path}' cannot be decoded \(.*\): remove it, or leave it out with --skip_b"
    ):
        check(photos)
    images, broken = check(photos, skip_broken=True)
    assert broken == [str(path)] * 2
    assert len(images["train"]) == 9


def test_a_picture_above_pillows_limit_is_named_and_left_out_on_request(photos, caplog):
    path = photos / "ant" / "large.png"
    Image.new("1", (14000, 14000)).save(path)
    with pytest.raises(UserError, match=r"is too large: it has 14000 x 14000 .* make it smaller, or remove it\.$"):
        check(photos)
    images, left_out = check(photos, skip_broken=True)
    assert left_out == [str(path)] * 2
    assert len(images["train"]) == 10
    assert f"Left out {path}: it has 14000 x 14000 pixels, more than 134217728" in caplog.text


def test_float_pictures_of_no_known_range_are_refused_by_name(photos):
    Image.fromarray(np.full((4, 4), -1, "float32")).save(photos / "ant" / "x.tiff")
    with pytest.raises(UserError, match=r"x.tiff' cannot be decoded \(its values, -1 to -1, have no known range"):
        check(photos)


def test_the_script_and_classify_agree_on_turned_transparent_and_16_bit_pictures(tmp_path, capsys, caplog):
    """After one step of training, the accuracy of the script equals the accuracy of the answers of `classify`."""
    caplog.set_level(logging.INFO)
    rng = np.random.default_rng(0)
    turned = Image.Exif()
    turned[0x0112] = 6
    for index, name in enumerate(("ant", "bee", "cat")):
        folder = tmp_path / "photos" / name
        folder.mkdir(parents=True)
        for number in range(6):
            pixels = rng.integers(0, 100, (16, 32, 3)).astype("uint8")
            pixels[: 8 if index else 16, : 16 if index == 1 else 32] += 120
            image = Image.fromarray(pixels)
            if number < 2:
                image.save(folder / f"{number}.jpg", exif=turned)
            elif number < 4:
                image.putalpha(Image.fromarray(pixels[..., 0]))
                image.save(folder / f"{number}.png")
            else:
                Image.fromarray(257 * pixels[..., 0].astype("uint16")).save(folder / f"{number}.png")
    tiny_config().save_pretrained(tmp_path / "tiny")
    common = [
        "--train_dir",
        tmp_path / "photos",
        "--validation_dir",
        tmp_path / "photos",
        "--use_cpu",
        "--report_to=none",
    ]
    train = ["--config_name", tmp_path / "tiny", "--do_train", "--do_eval", "--max_steps=2", "--crop_pct=1.0"]
    train += ["--learning_rate=0.01", "--background=white", "--output_dir", tmp_path / "out"]
    assert main([str(argument) for argument in (*common, *train)]) == 0
    assert json.loads((tmp_path / "out" / "run_arguments.json").read_text())["background"] == "white"
    assert "| background | white |" in (tmp_path / "out" / "README.md").read_text()
    accuracy = json.loads((tmp_path / "out" / "all_results.json").read_text())["eval_accuracy"]
    assert "transparent" not in caplog.text
    capsys.readouterr()
    command = ["classify", str(tmp_path / "out"), str(tmp_path / "photos"), "--json"]
    assert binaryvit(command) == 0
    answers = json.loads(capsys.readouterr().out)
    right = [answer["labels"][0]["label"] in answer["image"].split("/") for answer in answers]
    assert sum(right) / len(right) == pytest.approx(accuracy)
    evaluate = ["--model_name_or_path", tmp_path / "out", "--do_eval", "--output_dir", tmp_path / "again"]
    assert main([str(argument) for argument in (*common, *evaluate, "--background=none")]) == 0
    assert "Transparent in places: 6 of 18 validation images" in caplog.text


def test_a_reader_that_stops_early_does_not_wait_for_all_images():
    dataset = Dataset.from_dict({"image": range(5000)})
    seen = []
    results = iterate_inspected(dataset, range(5000), lambda image: time.sleep(0.001) or seen.append(image), "Reading")
    next(results)
    results.close()
    assert len(seen) < 2500

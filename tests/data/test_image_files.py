"""Image files in folders and on the command line: which files count as images, and the messages about the others."""

import glob
import json
import os
import shutil
import socket
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import tiny_config, tiny_model
from transformers import ResNetConfig, ResNetForImageClassification, ViTImageProcessor, pipeline

from binaryvit_cli import classification, main
from binaryvit_hf.data.arguments import DataArguments
from binaryvit_hf.data.decoding import decode_image
from binaryvit_hf.data.loading import load_images
from binaryvit_hf.data.model_inputs import create_image_processor
from binaryvit_runtime.errors import UserError
from binaryvit_runtime.image_files import find_images, find_matches, is_image_name


NOT_UTF8 = os.fsdecode(b"gr\xfcn.png")
IMAGES = ["a.JPG", "b.png", "c.mpo", "d.tiff", "more/deep/e.webp", "more/x.jpg/f.png", NOT_UTF8]
LEFT_OUT = ["Thumbs.db", "desktop.ini", "g", "h.pdf", "i.h5", "j.mpg", "k.eps", "l.txt", ".hidden.png", "more/._b.png"]


@pytest.fixture
def wild(tmp_path) -> Path:
    """A folder with images, other files, hidden files, links and special files."""
    folder = tmp_path / "wild"
    for name in (*IMAGES, *LEFT_OUT, ".git/m.png", "more/.ipynb_checkpoints/n.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3)).astype("uint8")).save(
            folder / name, "PNG"
        )
    os.mkfifo(folder / "fifo.png")
    (folder / "none.png").symlink_to("nowhere.png")
    (folder / "loop").symlink_to("..")
    (folder / "linked.png").symlink_to("b.png")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(os.path.relpath(folder / "socket.png"))
    return folder


@pytest.fixture
def model(tmp_path) -> Path:
    model = tiny_model(tiny_config())
    model.save_pretrained(tmp_path / "model")
    create_image_processor(model.config, crop_pct=1.0).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def classify(capsys, *arguments) -> tuple[int, str, str]:
    code = main(["classify", *map(str, arguments)])
    return code, *capsys.readouterr()


def save(path: Path, image: Image.Image | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    (image or Image.linear_gradient("L").resize((8, 8))).save(path)
    return path


def cannot_be_read(monkeypatch, folder: Path) -> None:
    """Make a folder unreadable like `chmod 000`, for root too."""

    def refuse(read):
        def refused(path):
            if Path(path) == folder:
                raise PermissionError(13, "Permission denied", str(path))
            return read(path)

        return refused

    for name in ("scandir", "listdir"):
        monkeypatch.setattr(os, name, refuse(getattr(os, name)))
    # The pathlib of Python 3.10 holds an `os.listdir` of its own.
    monkeypatch.setattr(Path, "iterdir", lambda path: (path / name for name in os.listdir(path)))


def test_images_of_a_folder_are_regular_files_with_an_images_extension(wild):
    found = find_images(wild)
    assert found.images == sorted(wild / name for name in [*IMAGES, "linked.png"])
    others = [*LEFT_OUT, ".git", "more/.ipynb_checkpoints", "fifo.png", "socket.png", "none.png", "loop"]
    assert sorted(found.left_out) == sorted(wild / name for name in others)
    assert found.unreadable == []


@pytest.mark.parametrize("extension", ["jpg", "jpeg", "png", "ppm", "bmp", "pgm", "tif", "tiff", "webp", "gif", "JPG"])
def test_the_extensions_of_torchvision_and_other_common_ones_are_images(extension):
    assert is_image_name(f"a.{extension}")


def test_a_link_to_a_folder_is_followed_if_it_is_the_named_folder(wild):
    (wild.parent / "link").symlink_to("wild")
    assert len(find_images(wild.parent / "link").images) == len(find_images(wild).images)


def test_training_and_classify_see_the_same_files(wild, model, tmp_path, capsys, caplog):
    save(tmp_path / "photos" / "bee" / "a.png")
    wild.rename(tmp_path / "photos" / "ant")
    save(tmp_path / "photos" / ".git" / "a.png")
    folder = str(tmp_path / "photos")
    images = load_images(DataArguments(train_dir=folder, validation_dir=folder), 0, None, None)["train"]
    assert images.features["label"].names == ["ant", "bee"]
    expected = [*sorted(Path(folder, "ant", name) for name in [*IMAGES, "linked.png"]), Path(folder, "bee", "a.png")]
    assert len(images) == len(expected)
    assert all(decode_image(image).size == (8, 8) for image in images["image"])
    reasons = "4 hidden, 8 without an image's extension, 4 links or special files; the first is"
    assert f"Left out 16 files in {folder!r}: {reasons} " in caplog.text
    code, out, err = classify(capsys, model, folder, "--json")
    assert code == 0
    assert [Path(answer["image"]) for answer in json.loads(out)] == expected
    assert err.startswith(f"Left out 17 files in {folder!r}: 5 hidden, 8 without an image's extension, 4 links or ")


def test_a_name_that_is_not_utf8_is_printed_unchanged(model, tmp_path, monkeypatch):
    save(tmp_path / NOT_UTF8)
    for encoding, written in (("utf-8", b"gr\xfcn.png"), ("ascii", rb"gr\udcfcn.png")):
        with open(tmp_path / "out", "w", encoding=encoding) as file:
            monkeypatch.setattr(sys, "stdout", file)
            assert main(["classify", str(model), str(tmp_path / NOT_UTF8)]) == 0
        assert (tmp_path / "out").read_bytes().splitlines()[0] == os.fsencode(tmp_path) + b"/" + written


def test_a_class_whose_name_is_not_utf8_is_refused(tmp_path):
    save(tmp_path / "ant" / "a.png")
    save(tmp_path / os.fsdecode(b"b\xe4r") / "a.png")
    with pytest.raises(UserError, match=r"--train_dir: the name of the class folder '.*b\\udce4r' is not UTF-8"):
        load_images(DataArguments(train_dir=str(tmp_path)), 0, None, None)


def test_a_class_folder_without_image_files_is_refused(tmp_path):
    save(tmp_path / "ant" / "a.png")
    (tmp_path / "bee").mkdir()
    (tmp_path / "bee" / "0001").write_bytes((tmp_path / "ant" / "a.png").read_bytes())
    with pytest.raises(UserError, match=r"the class folder '.*bee' has no file with an image's extension"):
        load_images(DataArguments(train_dir=str(tmp_path)), 0, None, None)


def test_the_same_class_in_two_spellings_of_unicode_is_one(tmp_path):
    for split, name in (("train", "caf\u00e9"), ("validation", "cafe\u0301")):
        save(tmp_path / split / name / "a.png")
        save(tmp_path / split / "bar" / "a.png")
    folders = {f"{split}_dir": str(tmp_path / split) for split in ("train", "validation")}
    images = load_images(DataArguments(**folders), 0, None, None)
    assert images["validation"].features["label"].names == ["bar", "caf\u00e9"]
    assert [Path(image["path"]).is_file() for image in images["validation"]["image"]] == [True, True]


@pytest.mark.parametrize("name", ["@eaDir", "__MACOSX"])
def test_folders_that_systems_add_are_no_classes_and_have_no_images(name, tmp_path):
    for folder in ("ant", "bee", name, f"ant/{name}/a.png"):
        save(tmp_path / folder / "a.png")
    images = load_images(DataArguments(train_dir=str(tmp_path), validation_dir=str(tmp_path)), 0, None, None)["train"]
    assert (len(images), images.features["label"].names) == (2, ["ant", "bee"])


@pytest.mark.parametrize("below", ["", "bee", "bee/more"])
def test_a_folder_that_cannot_be_read_stops_training(tmp_path, monkeypatch, below):
    for name in ("ant", "bee", "bee/more"):
        save(tmp_path / name / "a.png")
    cannot_be_read(monkeypatch, tmp_path / below)
    with pytest.raises(UserError, match=rf"--train_dir: '{tmp_path / below}' cannot be read \(Permission denied\)"):
        load_images(DataArguments(train_dir=str(tmp_path)), 0, None, None)


def test_a_folder_that_cannot_be_entered_stops_training(tmp_path, monkeypatch):
    """Names in the folder can be listed but files cannot be read, as after `chmod 400`."""
    for name in ("ant", "bee"):
        save(tmp_path / name / "a.png")

    def is_file(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_file", is_file)
    with pytest.raises(UserError, match=r"'.*ant/a.png' cannot be read \(Permission denied\)"):
        load_images(DataArguments(train_dir=str(tmp_path)), 0, None, None)


def test_an_unreadable_folder_does_not_stop_the_classification_of_others(model, tmp_path, capsys, monkeypatch):
    save(tmp_path / "photos" / "a.png")
    save(tmp_path / "photos" / "more" / "b.png")
    cannot_be_read(monkeypatch, tmp_path / "photos" / "more")
    code, out, err = classify(capsys, model, tmp_path / "photos")
    assert (code, err) == (1, f"error: '{tmp_path / 'photos' / 'more'}' cannot be read (Permission denied).\n")
    assert out.startswith(f"{tmp_path / 'photos' / 'a.png'}\n")


def test_classify_answers_the_other_files_beside_a_bad_one(wild, model, capsys):
    bad = [
        "h.pdf",
        "none.png",
        "fifo.png",
        "socket.png",
        "more/deep.png",
        "nothing.png",
        "*.nothing",
        "cut.png",
        "l.json",
    ]
    (wild / "h.pdf").write_bytes(b"%PDF-1.4")
    (wild / "l.json").write_text("{}")
    (wild / "cut.png").write_bytes((wild / "b.png").read_bytes()[:-30])
    names = [wild / "b.png", *(wild / name for name in bad), wild / "a.JPG"]
    code, out, err = classify(capsys, model, *names, "--json")
    assert code == 1
    answers = json.loads(out)
    assert [answer["image"] for answer in answers] == [str(name) for name in names]
    assert answers[0]["labels"] == answers[-1]["labels"]
    assert err == "".join(f"error: {answer['error']}\n" for answer in answers[1:-1])
    for name, line in zip(bad, err.splitlines(), strict=True):
        assert line.startswith(f"error: '{wild / name}' ")
    code, out, again = classify(capsys, model, *names)
    assert (code, again) == (1, err)
    assert out.splitlines()[::4] == [str(wild / "b.png"), str(wild / "a.JPG")]


def test_a_folder_without_images_exits_with_1_among_others_and_with_2_alone(model, tmp_path, capsys):
    save(tmp_path / "a.png")
    (tmp_path / "empty.png").mkdir()
    said = f"error: '{tmp_path / 'empty.png'}' has no files with an image's extension, such as .jpg.\n"
    code, out, err = classify(capsys, model, tmp_path / "empty.png", tmp_path / "a.png")
    assert (code, err) == (1, said)
    assert out.startswith(str(tmp_path / "a.png"))
    code, out, err = classify(capsys, model, tmp_path / "empty.png")
    assert (code, out, err) == (2, "", said)


def test_patterns_find_what_glob_finds(wild, monkeypatch):
    (wild / "more" / "[x]" / "deep").mkdir(parents=True)
    save(wild / "more" / "[x]" / "deep" / "c.png")
    monkeypatch.chdir(wild)
    (wild / "loop").unlink()
    for pattern in ("**", "**/*", "**/*.png", "more/**", "m*/**/deep/*", "**/deep/**", "*.png", ".hidden/**", "**/.*"):
        for top in ("", f"{wild}/"):
            expected = {Path(name) for name in glob.glob(top + pattern, recursive=True) if os.path.isfile(name)}
            assert {Path(name) for name in find_matches(top + pattern) if os.path.isfile(name)} == expected, pattern


def test_a_pattern_does_not_follow_circular_links(model, tmp_path, capsys):
    save(tmp_path / "photos" / "more" / "a.png")
    for name in ("again", "once_more"):
        (tmp_path / "photos" / "more" / name).symlink_to(tmp_path / "photos")
    code, out, _ = classify(capsys, model, f"{tmp_path}/photos/**", "--json")
    assert code == 0
    assert [answer["image"] for answer in json.loads(out)] == [str(tmp_path / "photos" / "more" / "a.png")]


def test_a_network_that_fails_is_named_with_each_image(model, tmp_path, capsys):
    settings = json.loads((model / "config.json").read_text())
    broken = shutil.copytree(model, tmp_path / "broken")
    (broken / "config.json").write_text(json.dumps({**settings, "return_dict": False}))
    names = [tmp_path / "a.png", tmp_path / "none.png", tmp_path / "b.png"]
    save(names[0])
    save(names[2])
    code, out, err = classify(capsys, broken, *names, "--json")
    assert code == 1
    assert [list(answer) for answer in json.loads(out)] == [["image", "error"]] * 3
    for name, line in zip(names[::2], err.splitlines()[::2], strict=True):
        assert line.startswith(f"error: {str(name)!r} cannot be classified: the network fails (")


def test_answers_are_those_of_transformers_pipeline(model, tmp_path, capsys):
    for number in range(19):
        save(tmp_path / "photos" / f"{number:02d}.png", Image.new("RGB", (40, 30), (7 * number, 99, 0)))
    files = sorted(map(str, (tmp_path / "photos").iterdir()))
    _, out, _ = classify(capsys, model, tmp_path / "photos", "--json")
    expected = pipeline("image-classification", str(model))(files, batch_size=16)
    assert json.loads(out) == [{"image": file, "labels": labels} for file, labels in zip(files, expected)]


def test_errors_and_answers_of_many_files_keep_their_order(model, tmp_path, capsys):
    for number in range(37):
        save(tmp_path / "photos" / f"{number:02d}.png", Image.new("RGB", (8, 8), (7 * number, 99, 0)))
    for number in (0, 15, 16, 35):
        (tmp_path / "photos" / f"{number:02d}.png").write_text("no image")
    code, out, _ = classify(capsys, model, tmp_path / "photos", "--json")
    answers = json.loads(out)
    assert code == 1
    assert [Path(answer["image"]).stem for answer in answers] == [f"{number:02d}" for number in range(37)]
    assert [number for number, answer in enumerate(answers) if "error" in answer] == [0, 15, 16, 35]
    for number in (1, 14, 17, 36):
        code, out, _ = classify(capsys, model, tmp_path / "photos" / f"{number:02d}.png", "--json")
        (alone,) = json.loads(out)
        assert [label["label"] for label in alone["labels"]] == [label["label"] for label in answers[number]["labels"]]
        assert alone["labels"][0]["score"] == pytest.approx(answers[number]["labels"][0]["score"], rel=1e-5)


def test_a_closed_pipe_ends_a_command_quietly(model, tmp_path, monkeypatch, capsys):
    save(tmp_path / "a.png")
    for command in (["classify", str(model), str(tmp_path / "a.png")], ["ops", str(model)], ["--version"]):
        reading, writing = os.pipe()
        os.close(reading)
        with monkeypatch.context() as patch, os.fdopen(writing, "w") as closed:
            patch.setattr(sys, "stdout", closed)
            assert main(command) == 141
    assert capsys.readouterr().err == ""


def test_answers_are_printed_although_nobody_reads_the_errors(model, tmp_path):
    save(tmp_path / "a.png")
    (tmp_path / "0.png").write_text("no image")
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "binaryvit_cli", "classify", str(model), str(tmp_path)]
    with os.fdopen(writing, "w") as closed:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=closed, text=True, check=False)
    assert done.returncode == 1 and str(tmp_path / "a.png") in done.stdout


def test_images_of_different_sizes_are_classified_if_the_processor_does_not_resize(tmp_path, capsys):
    config = ResNetConfig(embedding_size=4, hidden_sizes=[4], depths=[1], num_labels=3)
    ResNetForImageClassification(config).save_pretrained(tmp_path / "resnet")
    ViTImageProcessor(do_resize=False).save_pretrained(tmp_path / "resnet")
    for number, size in enumerate([(40, 40), (40, 40), (48, 40)]):
        save(tmp_path / "photos" / f"{number}.png", Image.new("L", size, 9))
    code, out, _ = classify(capsys, tmp_path / "resnet", tmp_path / "photos", "--json")
    assert code == 0
    assert len(json.loads(out)) == 3


def test_at_most_one_picture_is_decoded_at_a_time(model, tmp_path, capsys, monkeypatch):
    for number in range(20):
        save(tmp_path / "photos" / f"{number:02d}.png")
    seen, alive = [], []
    to_rgb = classification.to_rgb

    def watched(picture, background):
        rgb = to_rgb(picture, background)
        seen.append(weakref.ref(rgb))
        alive.append(sum(picture() is not None for picture in seen))
        return rgb

    monkeypatch.setattr(classification, "to_rgb", watched)
    assert classify(capsys, model, tmp_path / "photos")[0] == 0
    assert alive == [1] * 20


def test_classify_warns_of_transparent_pictures_and_puts_them_on_a_background(model, tmp_path, capsys):
    shape = Image.new("RGBA", (32, 16))
    shape.paste("black", (8, 4, 24, 12))
    save(tmp_path / "photos" / "a.png", Image.new("RGB", (32, 16)))
    save(tmp_path / "photos" / "b.png", shape)
    white = Image.new("RGB", (32, 16), "white")
    white.paste("black", (8, 4, 24, 12))
    save(tmp_path / "white.png", white)
    code, out, err = classify(capsys, model, tmp_path / "photos", "--json")
    assert code == 0
    assert err.startswith(f"Transparent in places: 1 of 2 images, '{tmp_path / 'photos' / 'b.png'}' first.")
    assert "dropped as in training" in err
    assert "--background white" in err
    black, dropped = (answer["labels"] for answer in json.loads(out))
    assert black == dropped
    code, out, err = classify(
        capsys, model, tmp_path / "photos" / "b.png", tmp_path / "white.png", "--background=white", "--json"
    )
    assert (code, err) == (0, "")
    ours, theirs = (answer["labels"] for answer in json.loads(out))
    assert ours == theirs != black
    code, _, err = classify(capsys, model, tmp_path / "photos" / "b.png", "--background=none")
    assert code == 0
    assert "Transparency is dropped, which shows" in err, "nobody knows whether training did the same"
    code, _, err = classify(capsys, model, tmp_path / "white.png", "--background=whit")
    message = "error: --background must be 'none' or an opaque colour such as white or '#ffcc00', not 'whit'.\n"
    assert (code, err) == (2, message)


def test_classify_says_how_large_a_picture_is_too_large(model, tmp_path, capsys):
    save(tmp_path / "a.png")
    Image.new("1", (14000, 14000)).save(tmp_path / "large.png")
    code, out, err = classify(capsys, model, tmp_path / "large.png", tmp_path / "a.png")
    assert code == 1
    assert out.startswith(str(tmp_path / "a.png"))
    assert err == (
        f"error: '{tmp_path / 'large.png'}' is too large: it has 14000 x 14000 pixels, more than 134217728; make it "
        "smaller, or remove it.\n"
    )

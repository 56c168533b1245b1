"""`binaryvit classify` prints the same on the runtime and in PyTorch."""

import json

import pytest
from packed_model import edit_json, save_packed
from PIL import Image
from test_equal_answers import picture_files
from tiny import tiny_config

from binaryvit_cli import main
from binaryvit_runtime import Classifier, UnsupportedModelError
from binaryvit_runtime.engine import kernels_here


pytestmark = pytest.mark.skipif(not kernels_here(), reason="the engine was not built")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Pictures of all modes, among them broken ones and other files."""
    folder = tmp_path_factory.mktemp("photos")
    picture_files(folder)
    content = (folder / "rgb.png").read_bytes()
    for name, broken in {
        "cut.png": content[:900],
        "empty.png": b"",
        "text.jpg": b"no image",
        "notes.txt": b"",
    }.items():
        (folder / name).write_bytes(broken)
    Image.new("1", (2000, 1)).save(folder / "too_long.png")
    (folder / "more.png").mkdir()
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = save_packed(tmp_path_factory.mktemp("model"), tiny_config(id2label={0: "ant", 1: "größe", 2: "a\nb"}))
    edit_json(folder / "preprocessor_config.json", background="#00ff00")
    return folder


def unsupported(*arguments, **options):
    raise UnsupportedModelError("The test needs PyTorch.")


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--json"],
        ["--top-k", "1"],
        ["--top-k", "99", "--json"],
        ["--background", "none"],
        ["--background", "white"],
    ],
    ids=str,
)
def test_the_runtime_prints_what_pytorch_prints(options, photos, model, capsys, monkeypatch):
    arguments = ["classify", str(model), str(photos), str(photos / "r*.png"), str(photos / "none*.png"), *options]
    by_runtime = main(arguments), capsys.readouterr()
    monkeypatch.setattr(Classifier, "from_pretrained", unsupported)
    by_pytorch = main(arguments), capsys.readouterr()
    assert by_runtime == by_pytorch
    assert by_runtime[0] == 1
    assert "cut.png" in by_runtime[1].err


@pytest.mark.parametrize("by", ["runtime", "PyTorch"])
def test_scores_of_a_regression_are_printed_as_numbers(by, model, tmp_path, capsys, monkeypatch):
    folder = save_packed(tmp_path, tiny_config(problem_type="regression"))
    picture = tmp_path / "rgb.png"
    Image.new("RGB", (32, 16), "red").save(picture)
    if by == "PyTorch":
        monkeypatch.setattr(Classifier, "from_pretrained", unsupported)
    assert main(["classify", str(folder), str(picture), "--json"]) == 0
    best = json.loads(capsys.readouterr().out)[0]["labels"][0]
    assert main(["classify", str(folder), str(picture)]) == 0
    out = capsys.readouterr().out
    assert f"{best['score']:9.4f}  {best['label']}" in out
    assert "%" not in out

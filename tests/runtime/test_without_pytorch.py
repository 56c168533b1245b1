"""`binaryvit classify` and `Classifier` on a machine that has neither PyTorch, transformers nor huggingface_hub."""

import json
import subprocess
import sys

import pytest
from command_line import run
from packed_model import edit_json, save_packed
from PIL import Image
from tiny import tiny_config

from binaryvit_cli import COMMANDS
from binaryvit_runtime import Classifier
from binaryvit_runtime.engine import kernels_here
from binaryvit_runtime.resources import shipped_models


pytestmark = pytest.mark.skipif(not kernels_here(), reason="the engine was not built")

PROGRAM = """
import contextlib, io, json, sys
sys.modules.update(dict.fromkeys(["torch", "transformers", "torchvision", "huggingface_hub", "datasets", "accelerate"]))
from binaryvit_cli import main
for arguments in json.load(sys.stdin):
    printed = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(printed[0]), contextlib.redirect_stderr(printed[1]):
        try:
            code = main(arguments)
        except SystemExit as exit:
            code = exit.code
    print(json.dumps([code, *(text.getvalue() for text in printed)]))
from binaryvit_runtime import Classifier
print(json.dumps(Classifier.from_pretrained(sys.argv[1])(sys.argv[2])))
assert "binaryvit_hf" not in sys.modules
"""
DIGIT = str(shipped_models()["binaryvit-digits"] / "example.png")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders `latent` and `packed` of a model, and `half`, whose config asks for float16."""
    root = tmp_path_factory.mktemp("root") / "models"
    edit_json(save_packed(root, tiny_config()).rename(root / "half") / "config.json", dtype="float16")
    save_packed(root, tiny_config())
    return root


def commands(models) -> dict[str, list[str]]:
    return {
        "help": ["--help"],
        "version": ["--version"],
        "digit": ["classify", "binaryvit-digits", DIGIT],
        "json": ["classify", "binaryvit-digits", DIGIT, "--json", "--top-k", "3"],
        "a picture that is none": ["classify", "binaryvit-digits", DIGIT, str(models / "packed" / "config.json")],
        "latent": ["classify", str(models / "latent"), DIGIT],
        "half": ["classify", str(models / "half"), DIGIT],
        "of the Hub": ["classify", "owner/name", DIGIT],
        "misspelt and relative": ["classify", "models/paked", DIGIT],
        "misspelt": ["classify", str(models / "paked"), DIGIT],
        "a misspelt name": ["classify", "binaryvit-digit", DIGIT],
        "background": ["classify", "binaryvit-digits", DIGIT, "--background", "whiteish"],
        **{f"{name} --help": [name, "--help"] for name in COMMANDS},
        **{f"{name} --what": [name, "--what"] for name in COMMANDS},
    }


@pytest.fixture(scope="module")
def results(models):
    """Exit code, output and errors of each command, and the answer of `Classifier` to the digit."""
    asked = commands(models)
    command = [sys.executable, "-c", PROGRAM, "binaryvit-digits", DIGIT]
    ended = subprocess.run(
        command, input=json.dumps(list(asked.values())), capture_output=True, text=True, check=False, cwd=models.parent
    )
    assert ended.returncode == 0, ended.stderr
    *outcomes, answer = map(json.loads, ended.stdout.splitlines())
    return dict(zip(asked, outcomes)) | {"answer": answer}


def test_a_shipped_model_classifies_as_beside_pytorch(results, capsys):
    assert results["digit"] == [0, run(capsys, "classify", "binaryvit-digits", DIGIT), ""]
    assert results["json"] == [0, run(capsys, "classify", "binaryvit-digits", DIGIT, "--json", "--top-k", 3), ""]
    assert results["answer"] == Classifier.from_pretrained("binaryvit-digits")(Image.open(DIGIT))


def test_a_broken_picture_does_not_stop_the_others(results):
    code, out, err = results["a picture that is none"]
    assert code == 1
    assert out == results["digit"][1]
    assert "config.json' cannot be read as an image" in err


@pytest.mark.parametrize(
    "name, words",
    [
        (
            "latent",
            ["latent' needs PyTorch: its weights are not packed", "To install it, run `pip install .` in a clone"],
        ),
        ("half", ["half' needs PyTorch: its dtype is 'float16'", "To install it, run `pip install .` in a clone"]),
        ("of the Hub", ["no folder 'owner/name'", "pip install 'huggingface_hub>=1.31'"]),
        ("misspelt", ["did you mean", "packed'"]),
        ("misspelt and relative", ["did you mean 'models/packed'?", "pip install 'huggingface_hub>=1.31'"]),
        ("a misspelt name", ["did you mean 'binaryvit-digits'"]),
        ("background", ["--background must be"]),
    ],
)
def test_wrong_input_ends_in_one_sentence_that_says_what_to_do(name, words, results):
    code, out, err = results[name]
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert all(word in err for word in words), err


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_and_refuses_wrong_arguments(command, results):
    code, out, err = results[f"{command} --help"]
    assert (code, err) == (0, "")
    assert f"binaryvit {command}" in out
    code, out, err = results[f"{command} --what"]
    assert (code, out) == (2, "")
    assert "error: " in err.splitlines()[-1]


def test_the_program_has_help_and_a_version(results):
    assert results["help"][::2] == [0, ""]
    assert results["version"][::2] == [0, ""]
    assert results["version"][1].startswith("binaryvit ")

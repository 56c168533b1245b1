"""
The code in README.md and in the pages of `docs` runs, from top to bottom of each page.

- Python and `binaryvit` run in a folder with `photos` and `outputs/photos`. What names `me/photos` runs beside a Hub on
  loopback.
- Commands of training are parsed, and every argument must have an effect.
- `compare`, `demo` and `export` run with small networks. `ablation` checks all runs and trains none. `benchmark` prints the
  recorded measurements, or counts: `tests/benchmarks` measures.
- `tests/browser` runs the JavaScript, `tests/runtime/test_served.py` the servers.
"""

import _thread
import argparse
import functools
import inspect
import json
import logging
import pydoc
import re
import runpy
import shlex
import shutil
import threading
import webbrowser
from collections.abc import Callable
from configparser import ConfigParser
from pathlib import Path
from urllib.request import urlopen

import numpy as np
import pytest
from hub_server import ALICE
from old_layout import write_old_layout
from packed_model import save_packed
from pictures import write_pictures
from PIL import Image
from snippets import OF_THE_HUB, ROOT, SNIPPETS, Snippet, code_in_sentences, snippet_with, split_commands
from tiny import class_token_config, tiny_config, tiny_model
from transformers import AutoConfig, AutoModelForImageClassification
from warm_python import WITHOUT_PACKAGE
from workers import InThisProcess

from binaryvit_cli import COMMANDS, create_command_parser
from binaryvit_cli import main as binaryvit
from binaryvit_hf import comparison
from binaryvit_hf.benchmarks import browser, inference, loader, pipeline
from binaryvit_hf.data.model_inputs import create_image_processor
from binaryvit_hf.network.packing_binaryvit import packed_layers
from binaryvit_hf.network.quantization_binaryvit import ShippedModel
from binaryvit_hf.training import run as training
from binaryvit_hf.training.ablation import runs as ablation_runs
from binaryvit_hf.training.command_line import parse_runs
from binaryvit_hf.training.help import known_arguments
from binaryvit_hf.training.unused_arguments import find_unused
from binaryvit_runtime.engine import kernels_here
from binaryvit_runtime.resources import shipped_models


LANGUAGES = {"bash", "bibtex", "js", "math", "mermaid", "python", "text"}
ABOUT_PHOTOS = "docs/pages/guides/photos.md"
SCRIPT, TRAINING_MODULE = "run_image_classification.py", "binaryvit_hf.training"
SHIPPED = "binaryvit-fashion-mnist"
MEASUREMENTS = ROOT / "docs" / "measurements"
# Functions that measure, and the names of their records.
RECORDED = [
    (inference, "benchmark_inference", "forwards"),
    (pipeline, "benchmark_pipeline", "pipeline"),
    (browser, "benchmark_browser", "browser"),
]
# In sentences: placeholders, and an argument of gunicorn.
OTHER_ARGUMENTS = {"--NAME", "--teacher", "--help", "--preload"}
SHORT_RUN = ["--max_steps=1", "--per_device_train_batch_size=2", "--use_cpu", "--disable_tqdm=True"]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """What the pages speak of: `photos`, the run `outputs/photos` of a tiny network, and folders of the repository."""
    root = tmp_path_factory.mktemp("pages")
    for picture in ("photos/ant/1.jpg", "photos/bee/2.jpg", "shirt.png"):
        (root / picture).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (80, 70), "green").save(root / picture)
    labels = {"id2label": {0: "ant", 1: "bee"}, "num_labels": 2}
    config = tiny_config(image_size=64, sequence_reduction_ratios=[8, 4], **labels)
    run, small = root / "outputs" / "photos", root / "outputs" / "one-layer"
    ShippedModel(tiny_model(config)).save_pretrained(run)
    one_layer = class_token_config(image_size=16, depths=[1], **labels)
    ShippedModel(tiny_model(one_layer)).save_pretrained(small)
    for folder, network in ((run, config), (run / "latent", config), (small, one_layer)):
        create_image_processor(network, crop_pct=0.875).save_pretrained(folder)
    (root / "outputs" / "resnet").symlink_to(shipped_models()["binaryvit-digits"])
    for name in ("configs", "model_cards", SCRIPT):
        (root / name).symlink_to(ROOT / name)
    return root


@pytest.fixture
def world(made, tmp_path, monkeypatch) -> Path:
    """A copy of `made`, which is the current folder."""
    monkeypatch.chdir(shutil.copytree(made, tmp_path / "world", symlinks=True))
    return tmp_path / "world"


# ---- Running a page ----


def execute(snippet: Snippet) -> dict:
    """Run Python in this process. Returns its names."""
    names: dict = {"__name__": "__main__"}
    source = "\n" * (snippet.line - 1) + snippet.text  # a traceback names the line of the page
    exec(compile(source, snippet.page, "exec"), names)
    return names


def python_with(words: str) -> dict:
    return execute(Snippet("a page", 1, "python", snippet_with(words)))


def run_beside_hub(world: Path, request, *arguments: str) -> None:
    """Run Python as a user of the Hub, with a home of its own."""
    server, client = (request.getfixturevalue(name) for name in ("server", "client"))
    assert server is not None
    as_alice = [argument.replace("me/photos", "alice/photos") for argument in arguments]
    done = client.run(*as_alice, folder=world, variables=client.variables | {"HF_TOKEN": ALICE})
    assert done.returncode == 0, done.stderr


def run_binaryvit(words: list[str]) -> None:
    assert binaryvit(words) == 0, words


def run_ablation(words: list[str]) -> None:
    """Check all runs of the table, but train none: an ablation takes hours."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ablation_runs, "train", lambda *_: None)
        run_binaryvit(["ablation", *words])
    assert list(Path(words[1]).glob("*.md"))


def run_benchmark(words: list[str]) -> None:
    """Load four pictures, or print what `docs/measurements` has. Workers of `--train` take 5 s each to start: it is parsed."""
    options = create_command_parser().parse_args(["benchmark", *words])
    with pytest.MonkeyPatch.context() as patch:
        few = functools.partial(loader.benchmark_loader, num_images=4, batch_size=2, rounds=2)
        patch.setattr(loader, "benchmark_loader", few)
        for module, function, name in RECORDED:
            measured = json.loads((MEASUREMENTS / f"{name}.json").read_text(encoding="utf-8"))
            patch.setattr(module, function, lambda *_, measured=measured: measured)
        if not options.train:
            run_binaryvit(["benchmark", *words])


def run_compare(words: list[str]) -> None:
    """Compare networks of scikit-learn's digits, in this process. `outputs/resnet` of `made` is one of them."""
    digits = ["binaryvit-digits" if word == SHIPPED else word for word in words]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logging.root.manager, "disable", logging.root.manager.disable)  # workers change it
        patch.setattr(comparison, "Worker", InThisProcess)
        if kernels_here():  # packed networks are compared on the engine
            run_binaryvit(["compare", *digits, "--steps=2"])


def run_demo(words: list[str]) -> None:
    """Ask for the page once in place of a browser, then end the command as Ctrl-C does."""
    answers = []

    def visit(address: str) -> None:
        try:
            with urlopen(address) as answer:
                answers.append(answer.read())
        finally:
            _thread.interrupt_main()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(webbrowser, "open", lambda address: threading.Thread(target=visit, args=[address]).start())
        run_binaryvit(["demo", *words, "--port=0"])
    assert [b"<title>" in answer for answer in answers] == [True]


def run_export(words: list[str]) -> None:
    """Export a network of one layer: tracing takes a second for each."""
    run_binaryvit(["export", *("outputs/one-layer" if word == SHIPPED else word for word in words)])


def parse_training(arguments: list[str]) -> None:
    """Parse a training run, whose every argument must have an effect."""
    for run in parse_runs([*arguments, "--use_cpu"]):
        assert find_unused(run) == []


def parse_script(words: list[str]) -> None:
    script, *arguments = words
    assert (ROOT / script).is_file(), script
    if script == SCRIPT:
        parse_training(arguments)


def parse_torchrun(words: list[str]) -> None:
    from torch.distributed.run import get_args_parser

    options = get_args_parser().parse_args(words)
    parse_script([options.training_script, *options.training_script_args])


def parse_pip(words: list[str]) -> None:
    """Extras and files must exist."""
    assert words[0] == "install"
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    for word in words[1:]:
        if word.startswith("."):
            extras = word.removeprefix(".").strip("[]").split(",") if word != "." else []
            assert all(setup.has_option("options.extras_require", extra) for extra in extras), word


def parse_pytest(words: list[str]) -> None:
    assert all((ROOT / word).exists() for word in words if word.startswith("tests"))


def parse_mkdocs(words: list[str]) -> None:
    assert words[:2] == ["serve", "--config-file"] and (ROOT / words[2]).is_file()


def parse_gunicorn(words: list[str]) -> None:
    from gunicorn.config import Config

    assert Config().parser().parse_args(words).args == ["served:application"]


def parse_uvicorn(words: list[str]) -> None:
    from uvicorn.main import main

    assert main.make_context("uvicorn", list(words)).params["app"] == "served:app"


def parse_curl(words: list[str]) -> None:
    [picture] = [word.partition("@")[2] for word in words if "@" in word]
    assert Path(picture).is_file() and words[-1].startswith("http://127.0.0.1:")


def of_a_shell(words: list[str]) -> None:
    """A command that changes the shell, or needs a service that tests must not use."""


# By the words that a command begins with; the first entry that fits counts.
PROGRAMS: dict[tuple[str, ...], Callable[[list[str]], None]] = {
    ("binaryvit", "ablation"): run_ablation,
    ("binaryvit", "benchmark"): run_benchmark,
    ("binaryvit", "compare"): run_compare,
    ("binaryvit", "demo"): run_demo,
    ("binaryvit", "export"): run_export,
    ("binaryvit",): run_binaryvit,
    ("python", "-m", TRAINING_MODULE): parse_training,
    ("python3", "-m", "venv"): of_a_shell,
    ("python",): parse_script,
    ("torchrun",): parse_torchrun,
    ("pip",): parse_pip,
    ("pytest",): parse_pytest,
    ("mkdocs",): parse_mkdocs,
    ("gunicorn",): parse_gunicorn,
    ("uvicorn",): parse_uvicorn,
    ("curl",): parse_curl,
    **dict.fromkeys([("cd",), ("git", "clone"), ("hf", "auth", "login"), ("npm", "install"), ("source",)], of_a_shell),
}


def run_command(words: list[str], world: Path, request) -> None:
    if any(OF_THE_HUB in word for word in words):
        assert words[0] == "binaryvit"
        return run_beside_hub(world, request, "-m", "binaryvit_cli", *words[1:])
    program = next((begin for begin in PROGRAMS if tuple(words[: len(begin)]) == begin), None)
    assert program is not None, f"no test knows how to run {' '.join(words)!r}: add its program to PROGRAMS"
    return PROGRAMS[program](words[len(program) :])


def run_snippet(snippet: Snippet, world: Path, request) -> None:
    if snippet.language == "bash":
        for words in split_commands(snippet.text):
            run_command(words, world, request)
    elif snippet.language == "python" and OF_THE_HUB in snippet.text:
        run_beside_hub(world, request, "-c", WITHOUT_PACKAGE + snippet.text)
    elif snippet.language == "python" and can_run(snippet):
        execute(snippet)


def can_run(snippet: Snippet) -> bool:
    """The runtime needs the engine."""
    return "binaryvit_runtime" not in snippet.text or bool(kernels_here())


@pytest.mark.parametrize("page", [page for page, snippets in SNIPPETS.items() if snippets], ids=lambda page: page.stem)
def test_the_code_of_a_page_runs_from_top_to_bottom(page, world, request, capsys):
    printed = ""
    for snippet in SNIPPETS[page]:
        try:
            if snippet.is_output:
                check_output(snippet.text, printed)
            run_snippet(snippet, world, request)
        except BaseException as error:  # a command of the page may also exit
            raise AssertionError(f"{snippet} does not run") from error
        printed = capsys.readouterr().out


def check_output(expected: str, printed: str) -> None:
    """Numbers may differ by rounding, which differs from CPU to CPU."""
    expected_words, words = expected.split(), printed.split()
    assert len(words) == len(expected_words), printed
    for word, expected_word in zip(words, expected_words):
        if "." in word and word.replace(".", "").isdigit():
            assert float(word) == pytest.approx(float(expected_word), abs=0.5), printed
        else:
            assert word == expected_word, printed


def test_every_block_of_code_has_a_language_that_tests_run():
    unknown = [str(each) for snippets in SNIPPETS.values() for each in snippets if each.language not in LANGUAGES]
    assert unknown == []


def test_a_command_that_no_test_runs_is_found(world, request):
    with pytest.raises(AssertionError, match="no test knows how to run 'make all'"):
        run_snippet(Snippet("a page", 1, "bash", "make all"), world, request)
    with pytest.raises(AssertionError):  # an argument without effect
        run_snippet(Snippet("a page", 1, "bash", f"python {SCRIPT} --do_train --test_split_name x"), world, request)


def test_an_output_that_a_command_does_not_print_is_found():
    check_output("98.97 %  0\n", " 98.90 %  0\n")
    for printed in ("90.00 %  0", "98.97 %  1", "", "98.97 %  0\n 0.76 %  8"):
        with pytest.raises(AssertionError):
            check_output("98.97 %  0\n", printed)


# ---- Code in sentences ----


@pytest.fixture(scope="module")
def commands() -> dict[str, argparse.ArgumentParser]:
    """The parser of each command of `binaryvit`."""
    actions = create_command_parser()._actions
    [found] = [action for action in actions if isinstance(action, argparse._SubParsersAction)]
    return dict(found.choices)


@pytest.mark.parametrize("page", SNIPPETS, ids=lambda page: page.stem)
def test_commands_in_sentences_have_arguments_that_exist(page, commands):
    for code in code_in_sentences(page):
        program, *words = code.split()
        if program == "binaryvit" and words and words[0] not in ("COMMAND", "--help"):
            name, *arguments = words
            options = [word for word in arguments if word.startswith("--")]
            assert name in commands, code
            assert commands[name]._option_string_actions.keys() >= set(options), code
            if len(options) < len(arguments) and options[:1] != arguments[:1]:
                commands[name].parse_args(shlex.split(code)[2:])


@pytest.mark.parametrize("page", SNIPPETS, ids=lambda page: page.stem)
def test_arguments_in_sentences_exist(page, commands):
    known = {f"--{name}" for name in known_arguments()} | OTHER_ARGUMENTS
    known |= {option for command in commands.values() for option in command._option_string_actions}
    for code in code_in_sentences(page):
        name = code.split()[0].replace("--teacher.", "--")
        assert not name.startswith("--") or name in known, code


# ---- What single pages say ----


def test_model_and_image_processor_are_loaded_at_the_same_size(world):
    names = python_with("image_size=128")
    assert names["pixel_values"].shape == (1, 3, 128, 128)
    of_training = create_image_processor(tiny_config(image_size=128), 0.875)
    assert names["processor"].size["shortest_edge"] == of_training.size["shortest_edge"]


def test_the_detector_keeps_the_packed_backbone(world, tmp_path):
    names = python_with("backbone_config")
    names["detector"].save_pretrained(tmp_path)
    loaded = type(names["detector"]).from_pretrained(tmp_path).model.backbone.model
    assert loaded.is_packed
    assert loaded.engine == names["backbone"].engine


PACKED = {
    "format 2": lambda folder: save_packed(folder),
    "format 1": lambda folder: write_old_layout(save_packed(folder)),
    "half precision": lambda folder: save_packed(folder, half=True),
    "class token, no branches": lambda folder: save_packed(folder, class_token_config()),
    "some full precision": lambda folder: save_packed(folder, tiny_config(binarize_patch_embeddings=False)),
    "a shipped model": lambda folder: shipped_models()["binaryvit-digits"],
}


@pytest.mark.parametrize("kind", PACKED)
def test_the_reader_of_the_page_on_packed_files_reads_what_the_package_reads(kind, world, tmp_path):
    """The page's reader knows no code of this project."""
    folder = PACKED[kind](tmp_path)
    model = AutoModelForImageClassification.from_pretrained(folder)
    tensors, config = python_with("def read_packed")["read_packed"](folder / "model.safetensors")
    weights = {f"{name}.weight": layer.unpack() for name, layer in packed_layers(model).items()}
    expected = {name: tensor.numpy() for name, tensor in (model.state_dict() | weights).items()}
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert tensors[name].shape == tensor.shape, name
        np.testing.assert_array_equal(tensors[name], tensor, err_msg=name)
    assert config["hidden_sizes"] == list(model.config.hidden_sizes)


@pytest.fixture(scope="module")
def hooks() -> dict:
    """The functions of `docs/hooks.py`, which MkDocs calls."""
    return runpy.run_path(str(ROOT / "docs" / "hooks.py"))


def test_the_command_reference_has_the_help_of_every_command(hooks, monkeypatch):
    monkeypatch.setenv("COLUMNS", hooks["HELP_WIDTH"])
    reference = hooks["command_reference"]()
    parser = create_command_parser()
    for name in COMMANDS:
        assert f"### {name}\n" in reference
        assert f"usage: {parser.prog} {name} " in reference
    assert "--do_train" in hooks["training_reference"]()


def test_every_entry_of_the_references_is_defined_where_the_page_says():
    """mkdocstrings leaves out what a module only imports, without a warning."""
    pages = "\n".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs/pages/reference").glob("*.md"))
    entries = re.findall(r"^::: (\S+)\n((?:    .*\n)*)", pages + "\n", re.MULTILINE)
    assert len(entries) > 10
    for name, options in entries:
        found, members = pydoc.locate(name), re.search(r"members: \[(.*)\]", options)
        assert found is not None, name
        for member in members[1].split(", ") if members else []:
            assert hasattr(found, member), (name, member)
            assert not inspect.ismodule(found) or getattr(found, member).__module__ == name, (name, member)
        assert members or not inspect.ismodule(found), f"{name}: list its members"


def test_pages_of_results_have_the_command_that_made_them(hooks, commands):
    pages = hooks["result_pages"]()
    assert {"results/fashion-mnist/results.md", "results/binaryvit-digits/card.md"} <= pages.keys()
    folder = ROOT / "configs" / "fashion-mnist"
    for name, arguments in {"results.md": [], "recipes.md": ["--table", "recipes.json"]}.items():
        arguments += hooks["seeds_of"](folder / name).split()
        command = re.search(r"^binaryvit ablation (.*)$", hooks["how_to_repeat"](folder / name), re.MULTILINE)[1]
        assert command.split()[2:] == arguments
        commands["ablation"].parse_args(command.split())
    assert hooks["how_to_repeat"](folder / "other.md") == ""
    repeat = hooks["how_to_repeat"](ROOT / "configs" / "digits" / "results.md")
    assert "\nbinaryvit ablation configs/digits outputs/digits --seeds 1 2 3 4 5\n" in repeat


def test_formulas_become_mathml_outside_of_code(hooks):
    pytest.importorskip("latex2mathml")
    page = "`$HOME` and $x^2$\n\n```math\na + b\n```\n\n```bash\necho $HOME $PATH\n```\n"
    made = hooks["replace_formulas"](page)
    assert "`$HOME` and <span><math" in made
    assert made.count("<math") == 2
    assert "echo $HOME $PATH" in made


# ---- Training ----


def commands_for_photos() -> list[list[str]]:
    """The words of the commands of the guide that train or classify."""
    [page] = [page for page in SNIPPETS if page.as_posix().endswith(ABOUT_PHOTOS)]
    words = [each for snippet in SNIPPETS[page] if snippet.language == "bash" for each in split_commands(snippet.text)]
    return [command for command in words if command[:2] == ["python", SCRIPT] or command[0] == "binaryvit"]


@pytest.mark.slow
def test_the_commands_for_photos_run_one_after_the_other(tmp_path, monkeypatch):
    """One step each, on two classes of four small pictures. The teacher of the Hub is not available here."""
    write_pictures(tmp_path / "photos", ("ant", "bee"), 4)
    monkeypatch.chdir(tmp_path)
    for program, *arguments in commands_for_photos():
        if program == "binaryvit":
            files = ["photos" if "*" in word else word for word in arguments]  # these pictures are no JPEG
            assert binaryvit(files) == 0
        elif "google/vit-base-patch16-224" not in arguments:
            assert training.main([str(ROOT / arguments[1]), *arguments[2:], *SHORT_RUN]) == 0
    sizes = [AutoConfig.from_pretrained(Path("outputs") / name).image_size for name in ("photos", "tuned", "larger")]
    assert sizes == [64, 24, 128]

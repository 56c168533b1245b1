"""The commands, called through `main`, and their error messages for wrong input."""

import argparse
import importlib
import importlib.metadata
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys

import pytest
import torch
from command_line import assert_refused, run
from full_disk import files_up_to
from golden_data import CONFIGS, golden_expectations, original_state_dict
from PIL import Image
from safetensors.torch import load_file
from tiny import tiny_config, tiny_images, tiny_model
from transformers import AutoImageProcessor, AutoModelForImageClassification, ViTConfig, ViTForImageClassification

import binaryvit_hf
from binaryvit_cli import COMMANDS, create_command_parser, main
from binaryvit_cli.push import name_repository
from binaryvit_hf import engine, onnx_export
from binaryvit_hf.card_text import NOTES, TAG
from binaryvit_hf.data.model_inputs import create_image_processor
from binaryvit_hf.onnx_export import ExportedFile
from binaryvit_runtime import hub
from binaryvit_runtime.errors import UserError
from binaryvit_runtime.resources import check_torchvision


@pytest.fixture
def latent(tmp_path):
    model = tiny_model(tiny_config(id2label={0: "ant", 1: "bee", 2: "cat"}))
    model.save_pretrained(tmp_path / "latent")
    create_image_processor(model.config, crop_pct=1.0).save_pretrained(tmp_path / "latent")
    return tmp_path / "latent"


@pytest.fixture
def photos(tmp_path):
    (tmp_path / "photos" / "more").mkdir(parents=True)
    for name, mode in (("a.png", "RGBA"), ("b.jpg", "L"), ("more/c.gif", "P")):
        Image.new(mode, (40, 30), 99).save(tmp_path / "photos" / name)
    (tmp_path / "photos" / "notes.txt").write_text("no image")
    return tmp_path / "photos"


@pytest.fixture
def without_pytorch(monkeypatch):
    """`import torch` and `import transformers` fail, as if they were not installed."""
    for library in ("torch", "transformers"):
        monkeypatch.setitem(sys.modules, library, None)


def logits(folder) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForImageClassification.from_pretrained(folder)(tiny_images()).logits


def test_the_command_is_installed():
    (command,) = importlib.metadata.entry_points(group="console_scripts", name="binaryvit")
    assert command.load() is main


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command, capsys):
    with pytest.raises(SystemExit) as exit:
        main([command, "--help"])
    assert exit.value.code == 0
    assert re.search(rf"\nexamples?:\n  binaryvit {command}\b", capsys.readouterr().out)


def test_the_help_lists_every_command_with_its_first_sentence_and_so_does_binaryvit_alone(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = capsys.readouterr().out
    for command in COMMANDS:
        assert re.search(rf"^  {command} +[A-Z]", shown, re.MULTILINE), command
    assert main([]) == 2
    assert capsys.readouterr().err == shown


@pytest.mark.parametrize("command", COMMANDS)
def test_options_come_in_groups_of_at_most_six_each_with_its_explanation(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    *_, positionals_and_options = capsys.readouterr().out.partition("\n\n")
    for section in re.split(r"\n\n(?=\S)", positionals_and_options):
        options = re.findall(r"^  --[\w-]+(.*)", section, re.MULTILINE)
        assert len(options) <= 6, section


@pytest.mark.parametrize("command", COMMANDS)
def test_the_example_is_a_command_line_of_the_command(command):
    """It is parsed alone: a benchmark takes minutes. `test_examples_work_as_they_stand` runs the quick ones."""
    for line in importlib.import_module(f"binaryvit_cli.{command}").EXAMPLE.splitlines():
        program, *words = shlex.split(line)
        assert create_command_parser().parse_args(words).program == f"{program} {command}"


@pytest.mark.parametrize("command", ["classify", "pack", "doctor", "page"])
def test_examples_work_as_they_stand(command, tmp_path, monkeypatch, capsys):
    example = importlib.import_module(f"binaryvit_cli.{command}").EXAMPLE
    words = [os.path.abspath(word) if word.endswith("example.png") else word for word in shlex.split(example)[1:]]
    monkeypatch.chdir(tmp_path)
    assert run(capsys, *words)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["clasify", "a"], "There is no command 'clasify'; did you mean 'classify'? See `binaryvit --help`."),
        (["train"], "There is no command 'train'. Training is a program of its own: `python -m binaryvit_hf.training"),
        (
            ["classify", "a", "b", "--topk", "3"],
            "There is no argument '--topk'; did you mean '--top-k'? See `binaryvit cl",
        ),
        (
            ["classify", "a", "b.png", "--json", "c.png"],
            "There is no argument 'c.png': names stand together, before or after the options. See",
        ),
        (["doctor", "foo"], "There is no argument 'foo'. See `binaryvit doctor --help`."),
        (["page", "binaryvit-digits", ""], "Argument OUT: its name is empty. See `binaryvit page --help`."),
        (["pack", "a"], "The following arguments are required: OUT. See `binaryvit pack --help`."),
        (["demo", "a", "--port", "x"], "Argument --port: invalid int value: 'x'. See `binaryvit demo --help`."),
    ],
)
def test_a_wrong_argument_is_one_sentence_with_a_suggestion(arguments, message, capsys):
    assert_refused(capsys, arguments, f"error: {message}")


def test_the_help_fits_a_terminal_of_two_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "2")
    with pytest.raises(SystemExit) as ended:
        main(["classify", "--help"])
    assert ended.value.code == 0 and "--top-k" in capsys.readouterr().out


def test_a_card_on_stdout_is_the_card_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("binaryvit_cli.card.write_card", lambda *arguments: None)
    monkeypatch.setattr("binaryvit_cli.card.is_stream", lambda out: True)
    assert run(capsys, "card", CONFIGS / "binaryvit-small-patch4-224", "--out", tmp_path / "out") == ""


def test_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["--version"])
    assert exit.value.code == 0
    assert capsys.readouterr().out == f"binaryvit {binaryvit_hf.__version__}\n"
    assert binaryvit_hf.__version__ == importlib.metadata.version("binaryvit_hf")


def test_a_command_runs_without_stdout_and_without_stderr(capsys, monkeypatch):
    """As after `>&-` in a shell, or in a program without a console. Errors must not appear among the results."""
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", None)
        assert main(["doctor"]) == 0
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", None)
        assert main(["classify", "binaryvit-digits", "none.png"]) == 2
    assert capsys.readouterr() == ("", "")


def test_help_and_wrong_arguments_import_neither_pytorch_nor_transformers():
    program = """
import contextlib, sys, types
package = types.ModuleType("binaryvit_hf")  # without its __init__, which imports both
package.__path__, package.__version__ = [sys.argv[1]], "0"
sys.modules["binaryvit_hf"] = package
from binaryvit_cli import COMMANDS, create_command_parser, main
from binaryvit_cli.push import name_repository
for arguments in [[], ["pack"], ["pak"], ["pack", "--hlaf"]]:
    assert main(arguments) == 2
for arguments in [["--help"], ["--version"], *([name, "--help"] for name in COMMANDS)]:
    with contextlib.suppress(SystemExit):
        main(arguments)
        raise AssertionError(arguments)
assert {"torch", "transformers"}.isdisjoint(sys.modules)
"""
    command = [sys.executable, "-c", program, os.path.dirname(binaryvit_hf.__file__)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_doctor_names_the_kernels_that_run_packed_models_here(capsys, monkeypatch):
    monkeypatch.delenv("BINARYVIT_ENGINE", raising=False)
    rows = dict(line.split("  ", 1) for line in run(capsys, "doctor").splitlines())
    rows = {name.strip(): value.strip() for name, value in rows.items()}
    assert torch.__version__.startswith(rows["torch"].split("+")[0])
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=CONFIGS, capture_output=True, text=True, check=False)
    if commit.returncode == 0:
        assert commit.stdout.startswith(rows["commit"].removesuffix("-dirty"))
    assert rows["kernels this CPU runs"] == (", ".join(engine.kernels_here()) or "none")
    assert rows["on threads of"] == ("PyTorch's OpenMP runtime" if engine.openmp_of_torch() else "their own")
    assert rows["packed models run on"].startswith(engine.kernels_here()[0] if engine.kernels_here() else "torch")
    monkeypatch.setenv("BINARYVIT_ENGINE", "torch")
    report = run(capsys, "doctor")
    assert report.count("torch (BINARYVIT_ENGINE says so)") == 2  # packed models, and training on the CPU


def test_doctor_needs_no_pytorch(capsys, monkeypatch, without_pytorch):
    monkeypatch.delenv("BINARYVIT_ENGINE", raising=False)
    report = run(capsys, "doctor")
    assert re.search("packed models run on +" + (engine.kernels_here() or ["nothing: There is no engine"])[0], report)
    line = "classify, demo, page, push --space, doctor; the others need PyTorch: run `pip install .` in a clone of the repository"
    assert re.search(f"^commands +{re.escape(line)}$", report, re.MULTILINE)
    monkeypatch.setenv("BINARYVIT_ENGINE", "torch")
    assert "nothing: BINARYVIT_ENGINE is 'torch', which needs PyTorch." in run(capsys, "doctor")
    monkeypatch.setenv("BINARYVIT_ENGINE", "abacus")
    assert_refused(capsys, ["doctor"], "'abacus'")


@pytest.mark.parametrize(
    "command",
    [
        "pack a b",
        "convert a b",
        "export a b.onnx",
        "ops a",
        "push a b",
        "card a",
        "benchmark",
        "ablation a b",
        "inspect a",
    ],
)
def test_a_command_that_needs_pytorch_says_so(command, capsys, without_pytorch):
    needs = f"error: binaryvit {command.split()[0]} needs PyTorch: run `pip install .` in a clone of the repository.\n"
    assert main(command.split()) == 2
    assert capsys.readouterr().err == needs


@pytest.mark.parametrize(
    "library, fault",
    [
        ("torch", "OSError('libcudart.so.12: cannot open')"),
        ("transformers", "ImportError('another libcudart.so.12 is needed')"),
    ],
)
def test_a_pytorch_that_cannot_be_imported_is_one_sentence_and_a_row_of_doctor(
    library, fault, capsys, monkeypatch, tmp_path
):
    (tmp_path / f"{library}.py").write_text(f"raise {fault}")
    monkeypatch.delitem(sys.modules, library)
    monkeypatch.syspath_prepend(tmp_path)
    assert_refused(capsys, ["ops", "a"], "binaryvit ops needs PyTorch, which cannot be used: ", "libcudart.so.12")
    assert re.search("^PyTorch +cannot be used: .*libcudart.so.12", run(capsys, "doctor"), re.MULTILINE)


def test_a_torchvision_of_another_pytorch_is_named_with_what_to_install(monkeypatch, tmp_path):
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        UserError, match=r"does not fit PyTorch .*nms does not exist.*pip install --force-reinstall torch"
    ):
        check_torchvision()


def test_kernels_that_this_machine_lacks_are_refused_before_anything_else(capsys, monkeypatch):
    monkeypatch.setenv("BINARYVIT_ENGINE", "abacus")
    assert_refused(capsys, ["ops", "binaryvit-small-patch4-224"], "'abacus'", "torch")


def test_pack_writes_a_complete_packed_model(latent, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("BINARYVIT_ENGINE", "torch")  # bit-identical to the latent model
    printed = run(capsys, "pack", latent, tmp_path / "packed")
    assert str(tmp_path / "packed") in printed
    assert torch.equal(logits(tmp_path / "packed"), logits(latent))
    assert AutoImageProcessor.from_pretrained(tmp_path / "packed").crop_size == {"height": 16, "width": 32}
    assert (tmp_path / "packed" / "README.md").is_file()
    assert json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"] == {
        "half": False,
        "quant_method": "binaryvit",
    }
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (latent, tmp_path / "packed")]
    assert sizes[1] < sizes[0]


def test_pack_stores_packed_weights_in_half_precision_and_lists_tensors_that_stay_in_float32(latent, tmp_path, capsys):
    model = AutoModelForImageClassification.from_pretrained(latent)
    with torch.no_grad():
        model.classifier.bias[0] = 1e5
    model.save_pretrained(latent)
    run(capsys, "pack", latent, tmp_path / "packed")
    printed = run(capsys, "pack", tmp_path / "packed", tmp_path / "half", "--half")
    assert "1 of " in printed
    assert "classifier.bias" in printed
    sizes = [(tmp_path / folder / "model.safetensors").stat().st_size for folder in ("packed", "half")]
    assert sizes[1] < sizes[0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_pack_says_what_half_precision_does_to_other_floats(dtype, latent, tmp_path, capsys):
    AutoModelForImageClassification.from_pretrained(latent, dtype=dtype).save_pretrained(latent)
    printed = run(capsys, "pack", latent, tmp_path / "half", "--half")
    tensors = load_file(tmp_path / "half" / "model.safetensors").values()
    stored = {tensor.dtype for tensor in tensors if tensor.is_floating_point()}
    if dtype == torch.bfloat16:
        assert stored == {torch.bfloat16}
        assert "stay in bfloat16" in printed
    else:
        assert stored == {torch.float16}
        assert "so in float64: 0 of " in printed
        assert AutoModelForImageClassification.from_pretrained(tmp_path / "half").dtype == torch.float64


def test_pack_finds_the_records_of_a_run_from_inside_of_its_latent_folder_and_through_links(
    latent, tmp_path, capsys, monkeypatch
):
    (tmp_path / "all_results.json").write_text("{}")
    (tmp_path / "link").symlink_to(latent)
    monkeypatch.chdir(latent)
    for number, name in enumerate([".", tmp_path / "link", latent]):
        run(capsys, "pack", name, tmp_path / f"packed-{number}")
        assert (tmp_path / f"packed-{number}" / "all_results.json").is_file()
    latent.rename(tmp_path / "other disk")
    latent.symlink_to(tmp_path / "other disk")
    run(capsys, "pack", latent, tmp_path / "packed")
    assert (tmp_path / "packed" / "all_results.json").is_file()


def test_pack_refuses_models_that_it_cannot_pack_and_leaves_nothing_behind(latent, tmp_path, capsys):
    config = ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, image_size=16)
    ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    capsys.readouterr()  # transformers' progress bar
    before = sorted(path.name for path in tmp_path.iterdir())
    assert_refused(capsys, ["pack", tmp_path / "vit", tmp_path / "out"], "'vit'", "binary")
    tensors = tmp_path / "latent" / "model.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-10])
    assert_refused(capsys, ["pack", latent, tmp_path / "out"], "cannot be loaded")
    assert_refused(capsys, ["pack", latent, tmp_path / "vit"], "already exists")
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize("row", ["binaryvit-small-patch4-224", "deit-small-patch16-224"])
def test_convert_reads_checkpoints_of_the_public_code_and_prints_every_tensor(row, tmp_path, capsys):
    state_dict = {
        name: tensor.float() if tensor.is_floating_point() else tensor
        for name, tensor in original_state_dict(row, golden_expectations(row)).items()
    }
    run_arguments = argparse.Namespace(lr=5e-4, output_dir=pathlib.Path("runs"))
    file = {"model": state_dict, "optimizer": {"state": {}}, "epoch": 299, "args": run_arguments}
    torch.save(file, tmp_path / "checkpoint.pth")
    which = ["--teacher"] if row.startswith("deit") else ["--config", row]
    printed = run(capsys, "convert", tmp_path / "checkpoint.pth", tmp_path / "out", *which).splitlines()
    assert [line.split(" -> ")[0] for line in printed[:-1]] == list(state_dict)
    ours = AutoModelForImageClassification.from_pretrained(tmp_path / "out").state_dict()
    mapped = dict(line.rpartition(" [")[0].split(" -> ") for line in printed[:-1])
    assert set(mapped.values()) == set(ours)
    assert all(torch.equal(state_dict[theirs].flatten(), ours[name].flatten()) for theirs, name in mapped.items())
    assert AutoImageProcessor.from_pretrained(tmp_path / "out").size == {"shortest_edge": 256}


def test_convert_refuses_two_networks(tmp_path, capsys):
    which = ["--teacher", "--config", "binaryvit-small-patch4-224"]
    assert_refused(capsys, ["convert", tmp_path / "checkpoint.pth", tmp_path / "out", *which], "not both")


class RunsCode:
    def __reduce__(self):
        return os.mkdir, ("it-was-run",)


@pytest.mark.parametrize(
    "content, words",
    [
        ({"model": {"a": torch.zeros(1)}, "args": RunsCode()}, ("mkdir", "could run code")),
        ({"optimizer": {}}, ("holds no network",)),
        ([1, 2], ("holds no network",)),
        ({"model": {"vit.unknown": torch.zeros(1)}}, ("does not fit", "'vit.unknown'")),
    ],
    ids=["code", "no model", "list", "unknown tensor"],
)
def test_convert_refuses_other_files_and_runs_no_code(content, words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(content, "file.pth")
    arguments = ["convert", "file.pth", "out", "--config", "binaryvit-small-patch4-224"]
    assert_refused(capsys, arguments, "file.pth", *words)
    assert [path.name for path in tmp_path.iterdir()] == ["file.pth"]


def test_convert_refuses_damaged_and_missing_files(tmp_path, capsys):
    (tmp_path / "file.pth").write_bytes(b"PK" + bytes(100))
    options = [tmp_path / "out", "--config", "binaryvit-small-patch4-224"]
    assert_refused(capsys, ["convert", tmp_path / "file.pth", *options], "damaged")
    assert_refused(capsys, ["convert", tmp_path / "none.pth", *options], "no file")
    assert_refused(capsys, ["convert", tmp_path / "file.pth", tmp_path / "out"], "--config", "--teacher")


def test_ops_prints_a_table_and_json(capsys):
    table = run(capsys, "ops", "binaryvit-small-patch4-224").splitlines()
    assert table[-1].split()[:2] == ["in", "all"]
    assert "69.9 M" in table[-1]
    counted = json.loads(run(capsys, "ops", CONFIGS / "binaryvit-small-patch4-224", "--json"))
    assert counted["total"]["ops"] == pytest.approx(70e6, rel=0.01)
    assert sum(layer["bops"] for layer in counted["layers"]) == counted["total"]["bops"]


def test_ops_counts_a_packed_checkpoint_like_its_latent_network(latent, tmp_path, capsys):
    run(capsys, "pack", latent, tmp_path / "packed")
    assert run(capsys, "ops", tmp_path / "packed") == run(capsys, "ops", latent)


def test_classify_takes_files_folders_and_patterns(latent, photos, capsys):
    answers = json.loads(run(capsys, "classify", latent, photos, photos / "*.png", photos / "b.jpg", "--json"))
    names = [pathlib.Path(answer["image"]).name for answer in answers]
    assert names == ["a.png", "b.jpg", "c.gif", "a.png", "b.jpg"]
    for answer in answers:
        assert {label["label"] for label in answer["labels"]} == {"ant", "bee", "cat"}
        scores = [label["score"] for label in answer["labels"]]
        assert scores == sorted(scores, reverse=True)
        assert sum(scores) == pytest.approx(1)
    lines = run(capsys, "classify", latent, photos / "a.png", "--top-k", 1).splitlines()
    assert lines == [
        str(photos / "a.png"),
        f"  {100 * answers[0]['labels'][0]['score']:6.2f} %  {answers[0]['labels'][0]['label']}",
    ]


def test_classify_refuses_wrong_files_models_and_arguments(latent, photos, capsys):
    assert_refused(capsys, ["classify", latent, photos / "none.png"], "none.png' does not exist")
    assert_refused(capsys, ["classify", latent, photos / "*.bmp"], "*.bmp' matches no file")
    assert_refused(capsys, ["classify", latent, photos / "notes.txt"], "notes.txt", "cannot be read", code=1)
    assert_refused(capsys, ["classify", latent, photos, "--top-k", 0], "--top-k")
    assert_refused(capsys, ["classify", photos, photos], "cannot be loaded (it has no config.json)")
    assert_refused(capsys, ["ops", photos], "it has no config.json")
    assert_refused(capsys, ["classify", "no/model", photos], "The model 'no/model' cannot be loaded")
    assert_refused(
        capsys, ["classify", "./none", photos], "The model './none' cannot be loaded: there is no such folder."
    )
    (latent / "preprocessor_config.json").unlink()
    assert_refused(capsys, ["classify", latent, photos], "no image processor")


@pytest.mark.parametrize("folder", ["outputs/photos", "photos", "/data/outputs/photos"])
def test_the_examples_of_an_uploaded_card_name_the_repository_however_the_folder_is_called(folder):
    card = f"""---
tags:
- {TAG}
---
classify = pipeline("image-classification", model="outputs/photos", trust_remote_code=True)
`AutoModelForImageClassification.from_pretrained("outputs/photos", subfolder="latent")`"""
    renamed = card.replace("outputs/photos", "alice/ants")
    assert name_repository(card, pathlib.Path(folder), "alice/ants") == renamed
    notes = f'\n{NOTES}\npipeline("image-classification", model="google/vit-base-patch16-224")'
    assert name_repository(card + notes, pathlib.Path(folder), "alice/ants") == renamed + notes
    assert name_repository(notes[-60:], pathlib.Path(folder), "alice/ants") == notes[-60:]  # a card that is not ours


@pytest.fixture
def uploads(monkeypatch) -> dict[str, dict[str, bytes]]:
    """The files of each repository that is created, by their names."""
    repositories = {}

    def create_repository(repository, *_):
        repositories[repository] = {}
        return repository

    def upload_folder(folder, repository, *_):
        repositories[repository] = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
        return f"https://huggingface.co/{repository}"

    monkeypatch.setattr(hub, "create_repository", create_repository)
    monkeypatch.setattr(hub, "upload_folder", upload_folder)
    return repositories


def test_push_creates_no_repository_for_a_folder_that_cannot_be_copied(latent, capsys, uploads):
    (latent / "best").symlink_to(latent / "removed")
    assert_refused(capsys, ["push", latent, "me/x"], "best", "No such file or directory")
    (latent / "best").unlink()
    (latent / "pictures.zip").write_bytes(bytes(2_000_000))
    with files_up_to(1_000_000):
        assert_refused(capsys, ["push", latent, "me/x"], "pictures.zip", "File too large")
    for file in (latent / "pictures.zip", *latent.glob("*.py")):
        file.unlink()
    with files_up_to(10_000):
        assert_refused(capsys, ["push", latent, "me/x"], "cannot be written", "File too large")
    assert not uploads


def test_push_keeps_a_card_that_is_not_utf_8(latent, capsys, uploads):
    card = f'pipeline("image-classification", model="{latent}")\n{NOTES}\nMade by Andr'.encode() + b"\xe9"
    (latent / "README.md").write_bytes(card)
    run(capsys, "push", latent, "me/x")
    assert uploads["me/x"]["README.md"] == card.replace(str(latent).encode(), b"me/x")


def test_push_refuses_folders_without_a_model_that_loads(latent, tmp_path, capsys):
    assert_refused(capsys, ["push", tmp_path, "me/x"], "no config.json")
    (latent / "model.safetensors").unlink()
    assert_refused(capsys, ["push", latent, "me/x"], "cannot be loaded")


def test_export_prints_the_sizes_of_the_file(latent, tmp_path, capsys, monkeypatch):
    def export_onnx(model, processor, file):
        assert model.dtype == torch.float32
        assert (processor is None) == (not (latent / "preprocessor_config.json").exists())
        return ExportedFile(1000, 3000)

    monkeypatch.setattr(onnx_export, "export_onnx", export_onnx)
    file = tmp_path / "model.onnx"
    AutoModelForImageClassification.from_pretrained(latent).bfloat16().save_pretrained(latent)
    printed = f"{file}: 1.00 kB (3.00 kB in float32), opset 18\n"
    assert run(capsys, "export", latent, file) == printed
    (latent / "preprocessor_config.json").unlink()
    assert main(["export", str(latent), str(file)]) == 0
    out, err = capsys.readouterr()
    assert out == printed
    assert "no image processor" in err


@pytest.mark.parametrize(
    "out, words", [("model.bin", ["end in .onnx"]), ("missing/model.onnx", ["there is no folder", "missing"])]
)
def test_export_refuses_a_wrong_file_first(out, words, tmp_path, capsys):
    assert_refused(capsys, ["export", "no-such-model", tmp_path / out], *words)


def test_export_refuses_other_networks(tmp_path, capsys):
    config = ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, num_labels=2)
    ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    assert_refused(capsys, ["export", tmp_path / "vit", tmp_path / "model.onnx"], "'vit'", "only binary networks")
    assert not (tmp_path / "model.onnx").exists()


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_export_names_the_package_that_is_missing(package, tmp_path, capsys, monkeypatch):
    monkeypatch.delitem(sys.modules, "binaryvit_hf.onnx_export", raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    arguments = ["export", "binaryvit-digits", tmp_path / "model.onnx"]
    assert_refused(capsys, arguments, f"'{package}'", "run `pip install '.[export]'` in a clone")

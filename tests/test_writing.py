"""Commands write a whole result or nothing, and check first that they can write."""

import contextlib
import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from full_disk import files_up_to
from PIL import Image
from safetensors import SafetensorError
from tiny import tiny_config, tiny_model
from tiny_training import tiny_trainer

import binaryvit_hf
from binaryvit_cli import main
from binaryvit_hf.training import run as training_run
from binaryvit_runtime.errors import UserError
from binaryvit_runtime.writing import (
    check_writable,
    check_writable_file,
    describe_write_failure,
    new_folder,
    write_file,
)


@pytest.fixture(scope="module")
def latent(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shelf") / "model"
    tiny_model(tiny_config()).save_pretrained(folder)
    return folder


def assert_refused(capsys, arguments, *words: str) -> None:
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    for word in words:
        assert word in error


IMPOSSIBLE = {
    "below a file": ("file/out", "is a file"),
    "name too long": (f"{'x' * 300}", "File name too long"),
    "of the kernel": ("/proc/out", "cannot be written"),
    "a loop": ("loop/out", "cannot be written"),
    "a file": ("file", "choose another name, or remove"),
}


@pytest.mark.parametrize("out, words", IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_an_output_that_cannot_be_written_is_refused_first(out, words, latent, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    before = sorted(tmp_path.iterdir())
    assert_refused(capsys, ["pack", "no/model", out], words)
    assert_refused(capsys, ["convert", "none.pth", out, "--teacher"], words)
    if out != "file":
        assert_refused(capsys, ["card", latent, "--out", f"{out}/card.md"], "cannot be written")
        assert_refused(capsys, ["benchmark", "--plot", f"{out}/plot.png"], "cannot be written")
    with pytest.raises(UserError, match=words):
        check_writable(tmp_path / out)
    assert sorted(tmp_path.iterdir()) == before


def test_a_write_protected_folder_is_refused_first(tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    tmp_path.chmod(0o500)
    for check in (check_writable, check_writable_file):
        with pytest.raises(UserError, match="Permission denied"):
            check(tmp_path / "out")


def test_checking_a_folder_leaves_nothing_in_it(tmp_path):
    check_writable(tmp_path / "new" / "out")
    check_writable(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(params=["busy", "mounted", "write-protected above"])
def fixed(request, tmp_path, monkeypatch):
    """An empty folder that no other can replace, such as a mounted one of a container."""
    folder, replace, access = tmp_path / "out", Path.replace, os.access
    folder.mkdir()

    def refuse(path, target):
        if folder in (path, target):
            raise OSError(errno.EBUSY, "Device or resource busy")
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", refuse)
    if request.param == "mounted":
        monkeypatch.setattr(os.path, "ismount", lambda path: path == folder)
    elif request.param == "write-protected above":
        monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path and access(path, mode))
    return folder


def files_of(folder: Path) -> dict[str, str]:
    return {str(file.relative_to(folder)): file.read_text() for file in folder.rglob("*") if file.is_file()}


def write_two(out: Path, text: str) -> None:
    with new_folder(out, may_replace=lambda folder: True) as folder:
        (folder / "a").write_text(text)
        (folder / "b").mkdir()
        (folder / "b" / "c").write_text(text)


def test_a_folder_that_cannot_be_replaced_gets_the_files(fixed, monkeypatch):
    write_two(fixed, "old")
    write_two(fixed, "new")
    assert files_of(fixed) == {"a": "new", "b/c": "new"}
    assert list(fixed.parent.iterdir()) == [fixed]
    with pytest.raises(UserError, match="already exists"), new_folder(fixed):
        pass
    move, moves = shutil.move, []

    def fail_later(path, target):
        moves.append(path)
        if len(moves) == 4:  # two old ones are out of the way, and one new one is there
            raise OSError(errno.ENOSPC, "No space left on device")
        return move(path, target)

    monkeypatch.setattr(shutil, "move", fail_later)
    with pytest.raises(UserError, match="No space left on device"):
        write_two(fixed, "third")
    assert files_of(fixed) == {"a": "new", "b/c": "new"}
    assert list(fixed.parent.iterdir()) == [fixed]


@pytest.mark.parametrize("size", [0, 1000, 30_000])
def test_a_full_disk_leaves_nothing_behind(size, latent, tmp_path, capsys):
    with files_up_to(size):
        assert_refused(capsys, ["pack", latent, tmp_path / "new" / "out"], "cannot be written", "File too large")
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_written_whole_or_the_old_one_stays(latent, tmp_path, capsys):
    (tmp_path / "card.md").write_text("old")
    with files_up_to(100):
        assert_refused(capsys, ["card", latent, "--out", tmp_path / "card.md"], "cannot be written", "File too large")
    assert (tmp_path / "card.md").read_text() == "old"
    write_file(tmp_path / "card.md", "größer")
    assert (tmp_path / "card.md").read_text(encoding="utf-8") == "größer"
    assert [path.name for path in tmp_path.iterdir()] == ["card.md"]


@pytest.fixture(params=[0o002, 0o022, 0o077], ids=oct)
def mode(request):
    """The mode of a new file under a umask."""
    before = os.umask(request.param)
    yield 0o666 & ~request.param
    os.umask(before)


def modes(folder) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mode & 0o777 for path in folder.rglob("*") if path.is_file()}


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such modes")
def test_all_files_of_a_run_have_the_mode_that_the_umask_asks_for(mode, tmp_path):
    trainer = tiny_trainer(tmp_path / "run", save_strategy="steps", save_steps=1, ema_decay=0.5)
    trainer.train()
    trainer.save_model()
    found = modes(tmp_path / "run")
    weights = {name for name in found if name.endswith(".safetensors")}
    assert {"model.safetensors", "latent/model.safetensors", "checkpoint-1/model.safetensors"} < weights
    assert {name: found[name] for name in found if found[name] != mode} == {}


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such modes")
def test_all_files_of_commands_have_the_mode_that_the_umask_asks_for(mode, latent, tmp_path, capsys):
    assert main(["pack", str(latent), str(tmp_path / "packed")]) == 0
    with new_folder(tmp_path / "nested") as folder:
        tiny_model().save_pretrained(folder / "inner")
    write_file(tmp_path / "file.onnx", b"1")
    found = modes(tmp_path)
    assert {"packed/model.safetensors", "nested/inner/model.safetensors", "file.onnx"} < found.keys()
    assert {name: found[name] for name in found if found[name] != mode} == {}


@pytest.mark.parametrize("size", [5000, 60_000], ids=["at the start", "at the checkpoint"])
def test_training_on_a_full_disk_ends_with_one_sentence(size, latent, tmp_path, capsys):
    arguments = ["--config_name", latent, "--train_dir", tmp_path / "images", "--output_dir", tmp_path / "run"]
    arguments += ["--train_val_split", "0.5", "--do_train", "--max_steps", "1", "--use_cpu", "--report_to", "none"]
    for label in ("ant", "bee", "cat"):
        (tmp_path / "images" / label).mkdir(parents=True)
        for number in range(4):
            Image.new("RGB", (32, 16), (9 * number, 99, 30)).save(tmp_path / "images" / label / f"{number}.png")
    with files_up_to(size):
        assert training_run.main([str(argument) for argument in arguments]) == 1
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert error.startswith("error: The run can write no more to its output directory: File too large")


WAIT = """
import sys, time, types
from pathlib import Path

# The package without its __init__, whose imports take seconds.
sys.modules["binaryvit_hf"] = types.ModuleType("binaryvit_hf")
sys.modules["binaryvit_hf"].__path__ = [sys.argv[2]]
from binaryvit_runtime.writing import new_folder

with new_folder(Path(sys.argv[1])) as folder:
    (folder / "weights").touch()
    print("ready", flush=True)
    time.sleep(60)
"""

PACKAGE = os.path.dirname(binaryvit_hf.__file__)


@contextlib.contextmanager
def waiting(out):
    """A process that is writing `out`."""
    with subprocess.Popen(
        [sys.executable, "-c", WAIT, str(out), PACKAGE], stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()


def test_leftovers_are_removed_at_sigterm_or_when_the_folder_is_written_again(tmp_path):
    mine = tmp_path / ".out.unfinished-notes"  # a file, so not one of our folders
    mine.touch()
    with waiting(tmp_path / "out") as killed, waiting(tmp_path / "out") as alive:
        killed.kill()
        killed.wait()
        assert len(list(tmp_path.iterdir())) == 3
        with new_folder(tmp_path / "out") as folder:
            (folder / "weights").touch()
        # The staging folder of the living process stays.
        assert len(list(tmp_path.glob(".out.unfinished-*/out"))) == 1
        alive.send_signal(signal.SIGTERM)
        assert alive.wait() == 128 + signal.SIGTERM
    assert sorted(path.name for path in tmp_path.iterdir()) == [mine.name, "out"]


def test_leftovers_of_a_killed_process_are_removed_when_the_file_is_written_again(tmp_path):
    (tmp_path / ".README.md.unfinished-abc").mkdir()
    (tmp_path / ".README.md.unfinished-abc" / "README.md").write_text("half of")
    write_file(tmp_path / "README.md", "whole")
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]
    assert (tmp_path / "README.md").read_text() == "whole"


@pytest.mark.parametrize(
    "error, described",
    [
        (OSError(28, "No space left on device"), "No space left on device"),
        (OSError(28, "No space left on device", "a"), "No space left on device ('a')"),
        (SafetensorError("I/O error: File too large (os error 27)"), "File too large"),
        (
            RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed."),
            "PytorchStreamWriter failed",
        ),
        (RuntimeError("basic_ios::clear: iostream error"), "basic_ios::clear: iostream error"),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), None),
        (OSError("no number"), None),
    ],
)
def test_errors_of_the_file_system_are_distinguished_from_others(error, described):
    failure = describe_write_failure(error)
    assert failure is None if described is None else failure.startswith(described)

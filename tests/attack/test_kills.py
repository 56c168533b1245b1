"""Commands killed at random times: their output is complete or absent, and the same command succeeds afterwards."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

from harness import Said, Wrong, few_or_many, run
from safetensors.torch import load_file
from shelf import assert_whole, classify, read_scores, training_arguments, write_pth

from binaryvit_cli import main
from binaryvit_hf.card_text import NOTES
from binaryvit_hf.training.run import main as train


def kill(rng: Random, command: Callable[[], Said], longest: float) -> None:
    """Run the command in a fork and kill it after at most `longest` seconds."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = command().code
        except SystemExit as end:
            code = end.code
        finally:
            os._exit(code)
    time.sleep(rng.uniform(0, longest))
    os.kill(child, rng.choice([signal.SIGKILL, signal.SIGTERM]))
    os.waitpid(child, 0)


def succeed(command: Callable[[], Said]) -> None:
    """
    Raises:
        Wrong: the command fails.
    """
    said = command()
    if said.code != 0:
        raise Wrong(f"again it fails: {said}")


def check_names(folder: Path, *names: str) -> None:
    """
    Raises:
        Wrong: the folder holds other names.
    """
    found = sorted(path.name for path in folder.iterdir())
    if found != sorted(names):
        raise Wrong(f"the folder holds {found}")


def kill_until_whole(rng: Random, command, folder: Path, shelf: Path, seconds: float, times: int = 1) -> str:
    """Kill a command that writes `folder/out`, then let it finish. `out` is complete whenever it exists."""
    for _ in range(times):
        kill(rng, command, seconds)
        if (folder / "out").exists():
            assert_whole(folder / "out", shelf)
            return "answered"
    succeed(command)
    assert_whole(folder / "out", shelf)
    check_names(folder, "out")
    return "answered"


@few_or_many(2, 200)
def test_kills_of_pack(cases, assert_withstood, shelf):
    def attack(rng: Random, folder: Path) -> str:
        def command() -> Said:
            return run(main, "pack", shelf / "latent", folder / "out")

        return kill_until_whole(rng, command, folder, shelf, 0.2, times=rng.choice([1, 3]))

    assert_withstood(attack, cases, "kills of pack")


@few_or_many(1, 100)
def test_kills_of_convert(cases, assert_withstood, shelf, tmp_path):
    write_pth(tmp_path)

    def attack(rng: Random, folder: Path) -> str:
        def command() -> Said:
            return run(main, "convert", tmp_path / "whole.pth", folder / "out", "--config", tmp_path / "vit")

        return kill_until_whole(rng, command, folder, shelf, 0.15)

    assert_withstood(attack, cases, "kills of convert")


@few_or_many(2, 200)
def test_kills_of_card(cases, assert_withstood, shelf, tmp_path):
    assert run(main, "card", shelf / "latent", "--out", tmp_path / "README.md").code == 0
    whole, before = (tmp_path / "README.md").read_text(), f"the card before\n\n{NOTES}\n"

    def attack(rng: Random, folder: Path) -> str:
        def command() -> Said:
            return run(main, "card", shelf / "latent", "--out", folder / "README.md")

        (folder / "README.md").write_text(before)
        kill(rng, command, 0.1)
        if (folder / "README.md").read_text() not in (before, whole):
            raise Wrong("the card is neither that of before nor the new one")
        succeed(command)
        if (folder / "README.md").read_text() != whole:
            raise Wrong("the card is another one")
        check_names(folder, "README.md")
        return "answered"

    assert_withstood(attack, cases, "kills of card")


@few_or_many(1, 60)
def test_kills_of_classify(cases, assert_withstood, shelf):
    expected = read_scores(classify(shelf / "packed", shelf / "photos"))

    def attack(rng: Random, folder: Path) -> str:
        def command() -> Said:
            return classify(shelf / "packed", shelf / "photos")

        before = {path: path.stat().st_mtime_ns for path in shelf.rglob("*")}
        kill(rng, command, 0.2)
        if read_scores(command()) != expected:
            raise Wrong("other scores")
        if {path: path.stat().st_mtime_ns for path in shelf.rglob("*")} != before:
            raise Wrong("something was written")
        return "answered"

    assert_withstood(attack, cases, "kills of classify")


@few_or_many(1, 60)
def test_kills_of_training(cases, assert_withstood, shelf, trained):
    expected = load_file(trained / "latent" / "model.safetensors")
    names = {path.name for path in trained.iterdir()}

    def attack(rng: Random, folder: Path) -> str:
        def command() -> Said:
            return run(train, *training_arguments(shelf, folder / "out"))

        for _ in range(rng.choice([1, 1, 3])):
            kill(rng, command, 2.0)
        succeed(command)
        assert_whole(folder / "out", shelf)
        check_names(folder, "out")
        # SIGTERM makes a run save a checkpoint of its current step.
        check_names(folder / "out", *names, *(path.name for path in (folder / "out").glob("checkpoint-[13]")))
        weights = load_file(folder / "out" / "latent" / "model.safetensors")
        if any(not weights[name].equal(tensor) for name, tensor in expected.items()):
            raise Wrong("other weights than those of a run that was not killed")
        return "answered"

    assert_withstood(attack, cases, "kills of training", apart=True)

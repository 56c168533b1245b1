"""Full disks: commands fail with one sentence, leave no half-written file, and succeed when there is space."""

import contextlib
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import pytest
from full_disk import files_up_to
from harness import Said, Wrong, few_or_many, judge, run
from shelf import assert_whole, training_arguments, write_pth

from binaryvit_cli import main
from binaryvit_hf.training.run import main as train


@contextlib.contextmanager
def disk_of(folder: Path, size: int) -> Iterator[None]:
    """Mount a disk of `size` bytes, which needs root."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], check=True)
    try:
        yield
        subprocess.run(["mount", "-o", "remount,size=64m", folder], check=True)
    except BaseException:
        subprocess.run(["umount", "-l", folder], check=True)
        raise


@pytest.fixture(scope="module")
def mounts(tmp_path_factory) -> bool:
    """Whether this user may mount disks."""
    folder = tmp_path_factory.mktemp("disk")
    try:
        with disk_of(folder, 4096):
            pass
        return subprocess.run(["umount", folder], check=False).returncode == 0
    except (OSError, subprocess.CalledProcessError):
        return False


def fill(rng: Random, folder: Path, mounts: bool, largest: int, command: Callable[[], Said]) -> Said:
    """Run a command on a disk, or with files, of up to `largest` bytes."""
    size = int(2 ** rng.uniform(0, largest.bit_length()))
    with disk_of(folder, max(4096, 2 * size)) if mounts and rng.random() < 0.5 else files_up_to(size):
        return command()


@few_or_many(2, 150)
@pytest.mark.parametrize("what", ["pack", "convert", "card"])
def test_full_disks(cases, what, assert_withstood, shelf, tmp_path, mounts):
    write_pth(tmp_path)
    arguments = {
        "pack": ["pack", shelf / "latent"],
        "convert": ["convert", tmp_path / "whole.pth", "--config", tmp_path / "vit"],
        "card": ["card", shelf / "latent", "--out"],
    }

    def attack(rng: Random, folder: Path) -> str:
        disk = folder / "disk"
        disk.mkdir()
        out = disk / "out"

        def command() -> Said:
            return run(main, *arguments[what], out)

        try:
            said = fill(rng, disk, mounts, 100_000, command)
            if said.code != 0 and list(disk.iterdir()):
                raise Wrong(f"something is left behind: {list(disk.iterdir())}")
            if said.code != 0:
                again = command()
                if again.code != 0:
                    raise Wrong(f"with room it fails: {again}")
            if what != "card":
                assert_whole(out, shelf)
            return judge(said)
        finally:
            if disk.is_mount():
                subprocess.run(["umount", "-l", disk], check=True)

    assert_withstood(attack, cases, f"full disk of {what}")


@few_or_many(1, 40)
def test_full_disks_of_training(cases, assert_withstood, shelf, mounts):
    def attack(rng: Random, folder: Path) -> str:
        disk = folder / "disk"
        disk.mkdir()

        def command() -> Said:
            return run(train, *training_arguments(shelf, disk / "out"))

        try:
            said = fill(rng, disk, mounts, 400_000, command)
            again = command()
            if again.code != 0:
                raise Wrong(f"with room it fails: {again}")
            assert_whole(disk / "out", shelf)
            return judge(said)
        finally:
            if disk.is_mount():
                subprocess.run(["umount", "-l", disk], check=True)

    assert_withstood(attack, cases, "full disk of training", apart=True)

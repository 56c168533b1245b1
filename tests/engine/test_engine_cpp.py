"""The engine's C++ without Python, under sanitisers and on emulated CPUs: `engine_check.cpp`."""

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest


HERE = Path(__file__).parent
SOURCES = [HERE / "engine_check.cpp", *sorted((HERE.parents[1] / "binaryvit_hf" / "runtime" / "engine").glob("*.cpp"))]
FLAGS = ["-std=c++17", "-g1", "-ffp-contract=fast", "-pthread", "-Wno-psabi", "-Wno-maybe-uninitialized"]
SANITIZERS = {
    "addresses and undefined behaviour": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "threads": ["-fsanitize=thread"],
}
COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")


def build(compiler: str, program: Path, *flags: str) -> None:
    subprocess.run([compiler, *FLAGS, *flags, *SOURCES, "-o", program], check=True)


def check(*command) -> str:
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.endswith(": all equal\n")
    return result.stdout


@pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler")
@pytest.mark.parametrize("rounds", [1, pytest.param(100, marks=pytest.mark.slow)])
@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_sanitizers_find_nothing(sanitizer, rounds, tmp_path):
    build(COMPILER, tmp_path / "check", "-Og", *SANITIZERS[sanitizer])  # compiles in half the time of -O1
    check(tmp_path / "check", rounds)


@pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler")
def test_no_compiler_warns(tmp_path):
    shadows = [] if "clang" in Path(COMPILER).name else ["-Wshadow=local"]  # Clang's -Wshadow has no such kind
    warnings = ["-Wall", "-Wextra", *shadows, "-Werror", "-fsyntax-only"]
    for source in SOURCES:
        subprocess.run([COMPILER, *FLAGS, *warnings, source], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("cpu, kernels", [("Nehalem", "scalar"), ("Haswell", "avx2 scalar")])
def test_an_emulated_x86_runs_only_kernels_that_it_has_the_instructions_for(cpu, kernels, tmp_path):
    emulator = shutil.which("qemu-x86_64")
    if not (COMPILER and emulator and platform.machine() == "x86_64"):
        pytest.skip("needs an x86, a C++ compiler and Debian's qemu-user")
    build(COMPILER, tmp_path / "check", "-O3", "-static")
    assert check(emulator, "-cpu", cpu, tmp_path / "check", 1) == f"{kernels}: all equal\n"


@pytest.mark.slow
def test_neon_kernels_compile_and_are_exact_on_an_emulated_arm(tmp_path):
    compiler, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
    if not (compiler and emulator):
        pytest.skip("needs Debian's g++-aarch64-linux-gnu and qemu-user")
    build(compiler, tmp_path / "check", "-O2", "-static")
    check(emulator, tmp_path / "check", 1)

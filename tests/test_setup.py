"""setup.py, in a copy of the repository whose compiler writes only how it was called."""

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
COMPILER = """\
#!/bin/sh
for word; do
    [ "$before" = -o ] && out=$word
    before=$word
done
echo "$@" > "$out"
for word; do
    case "$word" in "$out") ;; *.o) cat "$word" >> "$out" ;; esac
done
"""

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="nothing is compiled there")


@pytest.fixture
def clone(tmp_path):
    pytest.importorskip("setuptools")
    for name in ("setup.py", "setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("binaryvit_hf", "configs"):
        leave = shutil.ignore_patterns("__pycache__", "*.so")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=leave)
    (tmp_path / "model_cards").mkdir()
    compiler = tmp_path / "compiler"
    compiler.write_text(COMPILER)
    compiler.chmod(compiler.stat().st_mode | stat.S_IXUSR)
    return tmp_path


def build(clone: Path, *command: str) -> None:
    compilers = dict.fromkeys(["CC", "CXX", "LDSHARED", "LDCXXSHARED"], str(clone / "compiler"))
    subprocess.run([sys.executable, "setup.py", "-q", *command], cwd=clone, env=os.environ | compilers, check=True)


def test_a_second_build_has_no_module_that_was_removed(clone):
    build(clone, "build")
    (clone / "binaryvit_hf" / "ops.py").unlink()
    build(clone, "build")
    (installed,) = clone.glob("build/lib*/binaryvit_hf")
    assert (installed / "convert.py").is_file() and not (installed / "ops.py").exists()


def test_a_library_is_compiled_again_after_a_change_of_what_it_is_made_of(clone):
    build(clone, "build_ext", "--inplace")
    libraries = list((clone / "binaryvit_hf").rglob("*.so"))
    assert len(libraries) == 2
    for change, compiled in [
        ("binaryvit_hf/ops.py", set()),
        ("binaryvit_hf/row_kernels/rows.inc", {"rows"}),
        ("binaryvit_hf/runtime/engine/tiles.inc", {"kernels"}),
        ("binaryvit_hf/runtime/engine/team.h", {"kernels", "rows"}),
        ("setup.py", {"kernels", "rows"}),
    ]:
        for file in clone.rglob("*"):
            os.utime(file, (0, 0))
        os.utime(clone / change, (1, 1))
        build(clone, "build_ext", "--inplace")
        assert {file.name.split(".")[0] for file in libraries if file.stat().st_mtime} == compiled, change

    header = clone / "binaryvit_hf" / "runtime" / "engine" / "engine.h"
    header.write_text(header.read_text() + "/* another interface */\n")
    os.utime(header, (0, 0))  # as a copy that keeps dates
    (engine,) = (file for file in libraries if file.name.startswith("kernels"))
    before = engine.read_text()
    build(clone, "build_ext", "--inplace")
    assert engine.read_text() != before

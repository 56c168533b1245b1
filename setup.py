"""What setup.cfg cannot say: the compiled libraries, and folders that are installed under another name."""

import os
import runpy
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext


ENGINE = Path("binaryvit_hf", "runtime", "engine")
ROW_KERNELS = Path("binaryvit_hf", "row_kernels")
# Each source says itself what its CPU has. Products and sums may become one operation, also in strict C++.
# GCC 12 finds variables that may be uninitialized in its own headers.
FLAGS = "-std=c++17 -O3 -g0 -ffp-contract=fast -pthread -Wno-psabi -Wno-maybe-uninitialized"
# Importing it would import the package and numpy, which a build has not.
fingerprint = runpy.run_path(str(ENGINE / "fingerprint.py"))["fingerprint"]

# Packages whose folders have other names (`package_dir` of setup.cfg).
RENAMED = [
    *("binaryvit_hf.configs", "binaryvit_hf.model_cards"),
    *("binaryvit_runtime", "binaryvit_runtime.browser", "binaryvit_runtime.engine", "binaryvit_cli"),
]
RENAMED_FOLDERS = ["binaryvit_hf.runtime*", "binaryvit_hf.cli*"]


def library(name: str, folder: Path, shared: tuple[Path, ...] = (), flags: str = "") -> Extension:
    """A plain C++ library of all sources of a folder, and of some shared with another, whose headers lie beside them."""
    headers = [path for kind in ("*.h", "*.inc") for path in folder.glob(kind)]
    headers += [header for path in shared for header in path.parent.glob("*.h")]
    return Extension(
        name,
        sources=sorted(path.as_posix() for path in [*folder.glob("*.cpp"), *shared]),
        depends=sorted(path.as_posix() for path in [*headers, Path("setup.py")]),  # with the flags
        define_macros=[("BINARYVIT_SOURCES", f'"{fingerprint(folder, shared)}"')],
        language="c++",
        extra_compile_args=[*FLAGS.split(), *flags.split()],
        extra_link_args=["-pthread"],
        optional=True,  # without a C++ compiler models run and train in PyTorch
    )


class CleanBuild(build):
    """Builds without the modules of an earlier build, which may no longer exist: setuptools would install them."""

    def run(self) -> None:
        if Path(self.build_base) in Path(self.build_lib).parents:  # not a folder that somebody named
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class ParallelBuild(build_ext):
    """Compiles the sources of a library at once, where setuptools compiles one after the other."""

    def build_extension(self, ext: Extension) -> None:
        built = Path(self.get_ext_fullpath(ext.name))
        sources = dict(ext.define_macros)["BINARYVIT_SOURCES"].strip('"').encode()
        if built.is_file() and sources not in built.read_bytes():
            self.force = True  # also if the sources are older than it: they may have been copied with their dates
        super().build_extension(ext)

    def build_extensions(self) -> None:
        compile_in_turn = self.compiler.compile

        def compile_at_once(sources: list[str], **options) -> list[str]:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                objects = pool.map(lambda source: compile_in_turn([source], **options), sources)
                return [path for paths in objects for path in paths]

        self.compiler.compile = compile_at_once
        super().build_extensions()


libraries = [
    library("binaryvit_runtime.engine.kernels", ENGINE),
    # Without these flags compilers do not vectorise comparisons and square roots.
    library(
        "binaryvit_hf.row_kernels.rows", ROW_KERNELS, (ENGINE / "team.cpp",), "-fno-math-errno -fno-trapping-math"
    ),
]
setup(
    packages=[*find_packages(include=["binaryvit_hf", "binaryvit_hf.*"], exclude=RENAMED_FOLDERS), *RENAMED],
    cmdclass={"build": CleanBuild, "build_ext": ParallelBuild},
    # The sources use vector types of GCC and Clang, which Microsoft's compiler does not have.
    ext_modules=[] if sys.platform == "win32" else libraries,
)

"""What setup.cfg cannot say: the compiled engine, and folders that are installed under another name."""

import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup


ENGINE = Path("binaryvit_hf", "runtime", "engine")


# Packages whose folders have other names (`package_dir` of setup.cfg).
RENAMED = [
    *("binaryvit_hf.configs", "binaryvit_hf.model_cards"),
    *("binaryvit_runtime", "binaryvit_runtime.browser", "binaryvit_runtime.engine", "binaryvit_cli"),
]
RENAMED_FOLDERS = ["binaryvit_hf.runtime*", "binaryvit_hf.cli*"]

engine = Extension(
    "binaryvit_runtime.engine.kernels",
    sources=sorted(path.as_posix() for path in ENGINE.glob("*.cpp")),
    depends=sorted(path.as_posix() for kind in ("*.h", "*.inc") for path in ENGINE.glob(kind)),
    language="c++",
    # Each source says itself what its CPU has. Products and sums may become one operation, also in strict C++.
    extra_compile_args=["-std=c++17", "-O3", "-g0", "-ffp-contract=fast", "-pthread", "-Wno-psabi"],
    extra_link_args=["-pthread"],
    optional=True,  # without a C++ compiler models run in PyTorch
)
setup(
    packages=[*find_packages(include=["binaryvit_hf", "binaryvit_hf.*"], exclude=RENAMED_FOLDERS), *RENAMED],
    # The sources use vector types of GCC and Clang, which Microsoft's compiler does not have.
    ext_modules=[] if sys.platform == "win32" else [engine],
)

"""The compiled part of the package, binaryvit_hf/engine; everything else is in setup.cfg."""

from pathlib import Path

from setuptools import Extension, setup


ENGINE = Path("binaryvit_hf", "engine")

setup(
    ext_modules=[
        Extension(
            "binaryvit_hf.engine.kernels",
            sources=sorted(path.as_posix() for path in ENGINE.glob("*.cpp")),
            depends=sorted(path.as_posix() for kind in ("*.h", "*.inc") for path in ENGINE.glob(kind)),
            language="c++",
            # Each source says itself what its CPU has. Products and sums may become one operation, also in strict C++.
            extra_compile_args=["-std=c++17", "-O3", "-g0", "-ffp-contract=fast", "-pthread", "-Wno-psabi"],
            extra_link_args=["-pthread"],
            optional=True,  # without a C++ compiler models run in PyTorch
        )
    ]
)

"""
Builds `binaryvit.wasm`, the engine for browsers, from the C++ in `binaryvit_hf/runtime/engine`:

    python .ci/build_wasm.py            # after each change of the C++
    python .ci/build_wasm.py --check    # fails unless the file in the repository is what the sources give

The compiler is the package ziglang, which the script installs in a temporary environment if it is not here. The same
sources give the same bytes. The first build takes a minute: it also compiles the C++ library.
"""

import argparse
import hashlib
import importlib.metadata
import os
import re
import signal
import subprocess
import sys
import tempfile
import venv
from pathlib import Path


ENGINE = Path(__file__).parents[1] / "binaryvit_hf" / "runtime" / "engine"
MODULE = ENGINE / "binaryvit.wasm"
ZIGLANG = "0.17.1"
NOT_EXPORTED = {"binaryvit_share_threads", "binaryvit_limit_team"}
STACK_BYTES = 2**20
FLAGS = [
    *("-target", "wasm32-wasi", "-mexec-model=reactor", "-msimd128"),
    *("-std=c++17", "-O3", "-DNDEBUG", "-s", "-ffp-contract=fast", "-fno-rtti", "-fignore-exceptions"),
    # Loop strength reduction computes addresses whose constant offsets V8 adds for nothing: 5 % of a forward.
    *("-mllvm", "-disable-lsr"),
    *("-Wall", "-Wextra", "-Werror", f"-Wl,-z,stack-size={STACK_BYTES}"),
]
SECTION = b"binaryvit.sources"  # a custom section of the module, with the fingerprint of its sources


def list_sources() -> list[str]:
    natives = {"team.cpp", *(path.name for path in ENGINE.glob("kernels_*.cpp"))} - {"kernels_wasm.cpp"}
    return sorted({path.name for path in ENGINE.glob("*.cpp")} - natives)


def list_exports() -> list[str]:
    declared = set(re.findall(r"\b(binaryvit_\w+)\(", (ENGINE / "engine.h").read_text()))
    return ["malloc", "free", *sorted(declared - NOT_EXPORTED)]


def fingerprint() -> str:
    """Changes with the sources, the flags and the compiler."""
    digest = hashlib.sha256(repr((ZIGLANG, FLAGS, list_exports())).encode())
    included = [path.name for kind in ("*.h", "*.inc") for path in ENGINE.glob(kind)]
    for name in sorted([*list_sources(), *included]):
        content = (ENGINE / name).read_bytes().replace(b"\r\n", b"\n")
        digest.update(name.encode() + b"\0" + hashlib.sha256(content).digest())
    return digest.hexdigest()


def custom_section(content: bytes) -> bytes:
    body = bytes([len(SECTION)]) + SECTION + content
    assert len(body) < 2**7  # its length is one byte
    return bytes([0, len(body)]) + body


def has_compiler() -> bool:
    try:
        return importlib.metadata.version("ziglang") == ZIGLANG
    except importlib.metadata.PackageNotFoundError:
        return False


def build() -> bytes:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        python = sys.executable
        if not has_compiler():
            venv.create(folder / "environment", with_pip=True)
            python = str(folder / "environment" / ("Scripts" if os.name == "nt" else "bin") / "python")
            subprocess.run([python, "-m", "pip", "install", "-q", f"ziglang=={ZIGLANG}"], check=True)
        exports = [f"-Wl,--export={name}" for name in list_exports()]
        output = folder / MODULE.name
        command = [python, "-m", "ziglang", "c++", *FLAGS, *exports, *list_sources(), "-o", str(output)]
        subprocess.run(command, cwd=ENGINE, check=True)
        return output.read_bytes() + custom_section(fingerprint().encode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the file of the repository; write nothing")
    check = parser.parse_args().check
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the compiler, and removes its folder
    built = build()
    if not check:
        MODULE.write_bytes(built)
        sys.stdout.write(f"{MODULE}: {len(built)} bytes\n")
    elif not MODULE.is_file() or MODULE.read_bytes() != built:
        sys.exit(f"{MODULE.name} is not what its sources give. Run `python .ci/build_wasm.py` and commit the file.")


if __name__ == "__main__":
    main()

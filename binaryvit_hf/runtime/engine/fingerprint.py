"""Tells whether a compiled library was built from the sources beside it. setup.py runs this file, which must import nothing of the package."""

import ctypes
import hashlib
from pathlib import Path


SOURCES = ("*.h", "*.inc", "*.cpp")


def fingerprint(folder: Path) -> str:
    """Changes with the C++ sources in a folder. setup.py compiles it into their library."""
    digest = hashlib.sha256()
    for path in sorted(path for pattern in SOURCES for path in folder.glob(pattern)):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def describe_other_sources(library: ctypes.CDLL, folder: Path) -> str | None:
    """The reason why the library in a folder does not fit the sources there, or `None`: also in a wheel, which has no sources."""
    if not (folder / "interface.cpp").is_file():
        return None
    try:
        built_with = library.binaryvit_sources
    except AttributeError:  # it is from before this function
        fits = False
    else:
        built_with.restype = ctypes.c_char_p
        fits = built_with().decode() == fingerprint(folder)
    return None if fits else "built from other sources: run `pip install --no-deps -e .`"

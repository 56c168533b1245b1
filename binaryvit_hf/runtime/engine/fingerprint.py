"""Tells whether a compiled library was built from the sources beside it. setup.py runs this file, which must import nothing of the package."""

import ctypes
import hashlib
from collections.abc import Iterable
from pathlib import Path


SOURCES = ("*.h", "*.inc", "*.cpp")


def fingerprint(folder: Path, shared: Iterable[Path] = ()) -> str:
    """
    Changes with the C++ sources in a folder, and with those that its library shares with another one. setup.py compiles it
    into the library.

    Args:
        shared: `.cpp` files, each beside a header of the same name.
    """
    digest = hashlib.sha256()
    own = sorted(path for pattern in SOURCES for path in folder.glob(pattern))
    for path in [*own, *(path.with_suffix(kind) for path in shared for kind in (".h", ".cpp"))]:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def describe_other_sources(library: ctypes.CDLL, folder: Path, shared: Iterable[Path] = ()) -> str | None:
    """The reason why the library in a folder does not fit the sources there, or `None`: also in a wheel, which has no sources."""
    if not (folder / "interface.cpp").is_file():
        return None
    try:
        built_with = library.binaryvit_sources
    except AttributeError:  # it is from before this function
        fits = False
    else:
        built_with.restype = ctypes.c_char_p
        fits = built_with().decode() == fingerprint(folder, shared)
    return None if fits else "built from other sources: run `pip install --no-deps -e .`"

"""Finds image files in folders, and by names and patterns on a command line."""

import functools
import glob
import os
import re
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from .errors import UserError, counted
from .sources import close_paths


# Pillow opens these formats, but decodes them not at all or only with other programs.
UNDECODED_FORMATS = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}

SYSTEM_FOLDERS = {"@eaDir", "__MACOSX"}  # thumbnails of Synology's disks, and the metadata in macOS's archives


class FolderFiles(NamedTuple):
    """Sorted image files of a folder and its sub-folders, other files and links, and errors."""

    images: list[Path]
    left_out: list[Path]
    unreadable: list[OSError]


def find_images(folder: Path) -> FolderFiles:
    """
    Find the images in a folder and its sub-folders: regular files with an image's extension.

    Left out are

    - hidden files and folders,
    - other files, FIFOs, sockets, devices and broken links,
    - links to folders, because they can form a circle. `folder` itself may be a link.
    """
    found = FolderFiles([], [], [])
    for parent, folders, files in os.walk(folder, onerror=found.unreadable.append):
        for name in sorted(folders):
            path = Path(parent, name)
            if is_hidden(name) or os.path.islink(path):
                found.left_out.append(path)
                folders.remove(name)
        for name in files:
            path = Path(parent, name)
            try:
                (found.images if is_image_name(name) and path.is_file() else found.left_out).append(path)
            except OSError as error:
                found.unreadable.append(error)
    found.images.sort()
    return found


def is_image_name(name: str) -> bool:
    return Path(name).suffix.lower() in image_extensions() and not is_hidden(name)


def is_hidden(name: str) -> bool:
    return name.startswith(".") or name in SYSTEM_FOLDERS


@functools.cache
def image_extensions() -> set[str]:
    formats = Image.registered_extensions()  # loads the plugins that fill `Image.OPEN`
    decoded = {*Image.OPEN, "MPO"} - UNDECODED_FORMATS  # Pillow opens an MPO as a JPEG
    return {extension for extension, format in formats.items() if format in decoded}


def describe_left_out(paths: list[Path], folder: str | Path) -> str:
    """One sentence about the files that `find_images` left out: how many, why, and the first."""
    hidden = sum(is_hidden(path.name) for path in paths)
    others = sum(not is_hidden(path.name) and not is_image_name(path.name) and path.is_file() for path in paths)
    counts = [
        (hidden, "hidden"),
        (others, "without an image's extension"),
        (len(paths) - hidden - others, "links or special files"),
    ]
    reasons = ", ".join(f"{count} {reason}" for count, reason in counts if count)
    return f"Left out {counted(len(paths), 'file')} in {str(folder)!r}: {reasons}; the first is {str(paths[0])!r}."


class ImageFile(NamedTuple):
    """A file, or the fault that leaves a name without a file."""

    name: str
    fault: str | None = None


def list_images(names: list[str]) -> tuple[list[ImageFile], list[str]]:
    """
    Find the files for names on a command line. A name is a file, a folder (all images in it and its sub-folders) or a
    pattern with `*`, `?` and `[]`.

    Returns:
        The files in the order of the names, and sentences about the files left out of folders.

    Raises:
        UserError: no name matches a file.
    """
    files, notes = [], []
    for name in names:
        fault = "matches no file" if glob.has_magic(name) else "does not exist"
        if os.path.isdir(name):
            fault = "has no files with an image's extension, such as .jpg"
            found = find_images(Path(name))
            listed = [ImageFile(str(path)) for path in found.images]
            listed += [
                ImageFile(str(error.filename), f"cannot be read ({error.strerror})") for error in found.unreadable
            ]
            if found.left_out:
                notes.append(describe_left_out(found.left_out, name))
        elif os.path.lexists(name):
            listed = [ImageFile(str(Path(name)))]
        else:
            matches = sorted(map(Path, find_matches(name)))
            listed = [ImageFile(str(match)) for match in matches if os.path.isfile(match)]
            if not listed and name.startswith(("http://", "https://")):
                fault = "is a URL: download the picture first"
            elif not listed and not glob.has_magic(name) and (close := close_paths(name)):
                fault += f" (did you mean {close[0]!r}?)"
        files += listed or [ImageFile(name, fault)]
    if all(listed.fault for listed in files):
        raise UserError(f"{files[0].name!r} {files[0].fault}.")
    return files, notes


def find_matches(pattern: str) -> set[str]:
    """The matches of `glob`, but `**` does not follow links to folders, because they can form a circle."""
    stars = re.search(rf"(^|[/{re.escape(os.sep)}])\*\*([/{re.escape(os.sep)}]|$)", pattern)
    if stars is None:
        return set(glob.glob(pattern))
    found = set()
    for top in glob.glob(pattern[: stars.end(1)]) if stars.end(1) else [os.curdir]:
        for parent, folders, _ in os.walk(top):
            folders[:] = [name for name in folders if not name.startswith(".")]
            found |= find_matches(os.path.join(glob.escape(parent), pattern[stars.end() :] or "*"))
    return found

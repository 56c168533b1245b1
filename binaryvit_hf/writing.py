"""Where commands write: folders and files that are whole or not there, and what is wrong with a place, before any work."""

import contextlib
import errno
import os
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from .errors import UserError, first_sentence


try:
    import fcntl
except ImportError:  # Windows, where nothing is known of other processes and their folders stay
    fcntl = None  # type: ignore[assignment]

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
UNFINISHED = ".unfinished-"


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """
    A folder to fill, beside `out`, whose name it takes when all has gone well. Otherwise nothing stays; of a process that was
    killed, what stays is removed when `out` is written again.

    Raises:
        UserError: there is something in the way, or nothing can be written there.
    """
    with told_what_cannot_be_written(out):
        target = out.resolve()
        if target.exists() and not (target.is_dir() and not any(target.iterdir())):
            raise UserError(f"{str(out)!r} is there already: choose another name, or remove it.")
        with parents_of(target), room_beside(target) as room:
            folder = room / target.name
            folder.mkdir()
            yield folder
            folder.replace(target)


def check_writable(folder: Path) -> None:
    """
    Raises:
        UserError: no file can be written to the folder, which need not be there.
    """
    with told_what_cannot_be_written(folder):
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{str(folder)!r} is a file, not a folder: choose another name, or remove it.")
        with contextlib.suppress(Tried), parents_of(folder / "file"):
            try_to_write(folder)
            raise Tried


def check_writable_file(file: Path) -> None:
    """
    Raises:
        UserError: the file cannot be written, or replaced.
    """
    with told_what_cannot_be_written(file):
        if file.is_dir():
            raise UserError(f"{str(file)!r} is a folder, not a file: choose another name.")
        if not file.parent.is_dir():
            raise UserError(f"{str(file)!r} cannot be written: there is no folder {str(file.parent)!r}.")
        if file.exists() and not os.access(file, os.W_OK):
            raise PermissionError(0, "it is write-protected")
        if not is_stream(file):
            try_to_write(file.parent)


def write_file(file: Path, text: str) -> None:
    """
    Write a text file, whole or not at all.

    Raises:
        UserError: it cannot be written.
    """
    with told_what_cannot_be_written(file):
        if is_stream(file):
            file.write_text(text, encoding="utf-8")
            return
        target = file.resolve()
        with room_beside(target) as room:
            (room / target.name).write_text(text, encoding="utf-8")
            (room / target.name).replace(target)


def is_stream(file: Path) -> bool:
    """As /dev/stdout is, which nothing takes the place of."""
    return file.exists() and not file.is_file()


class Tried(Exception):
    """Ends an attempt, of which nothing is to stay."""


def try_to_write(folder: Path) -> None:
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(bytes(4096))


@contextlib.contextmanager
def parents_of(path: Path) -> Iterator[None]:
    """The folders above a path are there; those that were made stay only if all goes well."""
    missing = [folder for folder in path.parents if not folder.exists()]
    above = path.parents[len(missing)]
    if not above.is_dir():
        raise UserError(f"{str(path)!r} cannot be written: {str(above)!r} is a file.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            for folder in missing:
                folder.rmdir()
        raise


@contextlib.contextmanager
def told_what_cannot_be_written(path: Path) -> Iterator[None]:
    """
    Raises:
        UserError: writing failed inside of this.
    """
    try:
        yield
    except Exception as error:
        failure = describe_write_failure(error)
        if failure is None:
            raise
        raise UserError(f"{str(path)!r} cannot be written: {failure}.") from error


def describe_write_failure(error: Exception) -> str | None:
    """What the file system says, "No space left on device"; `None` of an error that is not of it."""
    if isinstance(error, OSError) and error.strerror:
        ours = error.filename is None or UNFINISHED in str(error.filename)  # a name that says nothing to the user
        return error.strerror + ("" if ours else f" ({str(error.filename)!r})")
    message = str(error)
    if isinstance(error, SafetensorError) and (code := re.search(r"\(os error (\d+)\)", message)):
        return os.strerror(int(code[1]))
    if isinstance(error, RuntimeError) and re.search(
        "PytorchStreamWriter|inline_container|iostream error|Symlink loop", message
    ):
        return first_sentence(error).rstrip(".")
    return None


def describe_full_disk(error: Exception) -> str | None:
    """The same of errors that only a disk raises to which a run has written before; not of missing files, say."""
    if isinstance(error, OSError) and error.errno not in FULL:
        return None
    return describe_write_failure(error)


@contextlib.contextmanager
def room_beside(target: Path) -> Iterator[Path]:
    """A folder beside `target` for what is unfinished, removed in the end; so is that of a process that was killed."""
    prefix = f".{target.name[:100]}{UNFINISHED}"
    with ended_by_signal():
        remove_leftovers(target.parent, prefix)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=prefix) as room, locked(Path(room)):
            yield Path(room)


@contextlib.contextmanager
def ended_by_signal() -> Iterator[None]:
    """A SIGTERM inside of this ends the process as an exception does, so that what is unfinished is removed."""
    handler = None
    with contextlib.suppress(ValueError):  # not in the main thread, where alone Python takes signals
        if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
            handler = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        if handler is not None:
            signal.signal(signal.SIGTERM, handler)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """As long as this process lives, others see that the folder is in use."""
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def remove_leftovers(parent: Path, prefix: str) -> None:
    """Remove what processes left unfinished that are no more."""
    for folder in parent.iterdir() if fcntl else ():
        if folder.name.startswith(prefix) and folder.is_dir() and not folder.is_symlink():
            with contextlib.suppress(OSError):  # another process has it, or removes it
                descriptor = os.open(folder, os.O_RDONLY)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(folder)
                finally:
                    os.close(descriptor)

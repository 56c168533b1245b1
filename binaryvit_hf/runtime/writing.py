"""
Write folders and files whole or not at all, and check before any work that a place can be written to.

Unfinished output lies in a hidden folder beside its final place and is renamed when it is complete.
"""

import contextlib
import errno
import os
import re
import shutil
import signal
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

from safetensors import SafetensorError

from .errors import UserError, first_sentence


try:
    import fcntl
except ImportError:  # Windows: without locks, leftovers of killed processes are not removed
    fcntl = None  # type: ignore[assignment]

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
UNFINISHED = ".unfinished-"


@contextlib.contextmanager
def new_folder(out: Path, may_replace: Callable[[Path], bool] = lambda folder: False) -> Iterator[Path]:
    """
    Yield an empty folder, which is renamed to `out` at the end of the context.

    After an exception nothing is left. Leftovers of a killed process are removed when `out` is written again. An existing
    folder that cannot be replaced, such as a mounted one of a container, gets the files one after the other at the end.

    Args:
        may_replace: whether an existing folder may be replaced that is not empty.

    Raises:
        UserError: `out` is a file or a folder that is not empty, or cannot be written.
    """
    with reported_write_errors(out):
        target = out.resolve()
        inside = target.is_dir() and (os.path.ismount(target) or not os.access(target.parent, os.W_OK))
        if inside:
            remove_leftovers(target, staging_prefix(target))
        if target.exists() and not (target.is_dir() and (is_empty(target) or may_replace(target))):
            raise UserError(f"{str(out)!r} already exists: choose another name, or remove it.")
        with parent_folders(target), staging_folder(target, target if inside else target.parent) as staging:
            folder = staging / target.name
            folder.mkdir()
            yield folder
            give_usual_mode(folder, *(path for path in folder.rglob("*") if path.is_dir()))
            if inside:
                exchange_content(folder, target, staging)
                return
            try:
                if target.exists() and not is_empty(target):
                    target.replace(staging / "replaced")  # a rename does not replace a folder that has files
                folder.replace(target)
            except OSError as error:
                if error.errno not in (errno.EBUSY, errno.EXDEV) or not target.is_dir():
                    raise
                exchange_content(folder, target, staging)


def exchange_content(folder: Path, target: Path, staging: Path) -> None:
    """Move the content of `folder` to the folder `target`, and what was there to `staging`. After an exception it is back."""
    before, moved = staging / "replaced", []
    before.mkdir()
    old = [path for path in target.iterdir() if path != staging]
    try:
        for path in old:
            shutil.move(path, before / path.name)
        for path in folder.iterdir():
            moved.append(target / path.name)
            shutil.move(path, moved[-1])
    except BaseException:
        for path in moved:
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        for path in list(before.iterdir()):
            shutil.move(path, target / path.name)
        raise


def is_empty(folder: Path) -> bool:
    return not any(folder.iterdir())


def check_writable(folder: Path) -> None:
    """
    Raises:
        UserError: no file can be written to the folder. It need not exist.
    """
    with reported_write_errors(folder):
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{str(folder)!r} is a file, not a folder: choose another name, or remove it.")
        with parent_folders(folder / "file", keep=False):
            try_to_write(folder)


def check_writable_file(file: Path) -> None:
    """
    Raises:
        UserError: the file cannot be written or replaced.
    """
    with reported_write_errors(file):
        if file.is_dir():
            raise UserError(f"{str(file)!r} is a folder, not a file: choose another name.")
        if not file.parent.is_dir():
            raise UserError(f"{str(file)!r} cannot be written: there is no folder {str(file.parent)!r}.")
        if file.exists() and not os.access(file, os.W_OK):
            raise PermissionError(0, "it is write-protected")
        if not is_stream(file):
            try_to_write(file.parent)


def write_file(file: Path, content: str | bytes) -> None:
    """
    Write a file, whole or not at all. Text is written in UTF-8.

    Raises:
        UserError: it cannot be written.
    """
    content = content.encode() if isinstance(content, str) else content
    with reported_write_errors(file):
        if is_stream(file):
            file.write_bytes(content)
            return
        target = file.resolve()
        with staging_folder(target) as staging:
            (staging / target.name).write_bytes(content)
            (staging / target.name).replace(target)


def give_usual_mode(*folders: Path) -> None:
    """
    Give weights the mode of the config.json beside them, which follows the umask. safetensors writes files that only their
    owner can read, so nobody else could use a model in a shared folder.
    """
    for folder in folders:
        for file in folder.glob("*.safetensors"):
            config = folder / "config.json"
            if config.is_file():
                with contextlib.suppress(OSError):  # the file of another user, or a file system without modes
                    file.chmod(stat.S_IMODE(config.stat().st_mode))


def is_stream(file: Path) -> bool:
    """Whether a path is a device or pipe such as /dev/stdout, which must not be replaced by a file."""
    return file.exists() and not file.is_file()


def try_to_write(folder: Path) -> None:
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(bytes(4096))


@contextlib.contextmanager
def parent_folders(path: Path, keep: bool = True) -> Iterator[None]:
    """Create the missing folders above a path. Remove them after an exception, and always if not `keep`."""
    missing = [folder for folder in path.parents if not folder.exists()]
    above = path.parents[len(missing)]
    if not above.is_dir():
        raise UserError(f"{str(path)!r} cannot be written: {str(above)!r} is a file.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        keep = False
        raise
    finally:
        if not keep:
            with contextlib.suppress(OSError):
                for folder in missing:
                    folder.rmdir()


@contextlib.contextmanager
def reported_write_errors(path: Path) -> Iterator[None]:
    """
    Report a failure to write inside of this context.

    Raises:
        UserError: the file system refused to write; the message names `path`.
    """
    try:
        yield
    except Exception as error:
        failure = describe_write_failure(error)
        if failure is None:
            raise
        raise UserError(f"{str(path)!r} cannot be written: {failure}.") from error


def describe_write_failure(error: Exception) -> str | None:
    """The file system's message, such as "No space left on device". `None` for errors of another kind."""
    if isinstance(error, OSError) and error.strerror:
        hidden = error.filename is None or UNFINISHED in str(error.filename)  # users do not know our hidden folders
        return error.strerror + ("" if hidden else f" ({str(error.filename)!r})")
    message = str(error)
    if isinstance(error, SafetensorError) and (code := re.search(r"\(os error (\d+)\)", message)):
        return os.strerror(int(code[1]))
    if isinstance(error, RuntimeError) and re.search(
        "PytorchStreamWriter|inline_container|iostream error|Symlink loop", message
    ):
        return first_sentence(error).rstrip(".")
    return None


def describe_full_disk(error: Exception) -> str | None:
    """
    The file system's message if a disk that could be written before is now full, read-only or broken.

    `None` for other errors, such as missing files.
    """
    if isinstance(error, OSError) and error.errno not in DISK_ERRORS:
        return None
    return describe_write_failure(error)


def discard_output(stream: TextIO) -> None:
    """Discard what is still written to stdout or stderr: the reader has gone, and Python flushes both again at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def staging_prefix(target: Path) -> str:
    return f".{target.name[:100]}{UNFINISHED}"


@contextlib.contextmanager
def staging_folder(target: Path, place: Path | None = None) -> Iterator[Path]:
    """
    Yield a hidden folder in `place`, by default beside `target`, and remove it at the end. Also remove those that killed
    processes left.
    """
    place, prefix = place or target.parent, staging_prefix(target)
    with sigterm_as_exit(), contextlib.ExitStack() as stack:
        remove_leftovers(place, prefix)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=place, prefix=prefix)))
        with contextlib.suppress(OSError):  # some file systems have no locks
            stack.enter_context(lock(folder))
        yield folder


def remove_leftovers(parent: Path, prefix: str) -> None:
    """Remove staging folders whose process has ended."""
    for folder in parent.iterdir():
        if folder.name.startswith(prefix) and folder.is_dir() and not folder.is_symlink():
            with contextlib.suppress(OSError), lock(folder):
                shutil.rmtree(folder)


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[int]:
    """
    Hold a lock, which tells other processes that a folder is in use. It ends with this process at the latest, and with those
    that inherit the file descriptor, which is yielded.

    Raises:
        OSError: another process holds the lock, or the system has no locks.
    """
    if fcntl is None:
        raise OSError("no locks on this system")
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield descriptor
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def sigterm_as_exit() -> Iterator[None]:
    """Turn a SIGTERM inside of this context into `SystemExit`, so that context managers clean up."""
    handler = None
    with contextlib.suppress(ValueError):  # only the main thread may set signal handlers
        if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
            handler = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        if handler is not None:
            signal.signal(signal.SIGTERM, handler)

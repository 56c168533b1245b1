"""A disk that is full, without root."""

import contextlib
from collections.abc import Iterator

import pytest


resource = pytest.importorskip("resource")  # Unix only


@contextlib.contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """Limit the files of this process to `size` bytes. Writing more raises EFBIG, because Python ignores SIGXFSZ."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)

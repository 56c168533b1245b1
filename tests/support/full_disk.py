"""A disk that is full, without root."""

import contextlib
from collections.abc import Iterator

import pytest


resource = pytest.importorskip("resource")  # of Unix


@contextlib.contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """Every file of this process ends at `size` bytes: writing beyond raises EFBIG, as Python ignores the signal."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)

"""An OpenMP runtime that records the teams of the engine."""

import contextlib
import ctypes
import threading
from collections.abc import Iterator

from binaryvit_hf.engine import share_threads_of_torch
from binaryvit_runtime.engine.library import load_library


Work = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


@contextlib.contextmanager
def recorded_teams() -> Iterator[list[int]]:
    """The sizes of the teams that the engine asks for, in their order."""
    sizes, own = [], threading.local()

    @ctypes.CFUNCTYPE(None, Work, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    def parallel(work, data, size, flags):
        def join(member: int) -> None:
            own.size, own.member = size, member
            work(data)

        sizes.append(size)
        members = [threading.Thread(target=join, args=(member,)) for member in range(size)]
        for member in members:
            member.start()
        for member in members:
            member.join()

    Number = ctypes.CFUNCTYPE(ctypes.c_int)
    runtime = (parallel, Number(lambda: own.size), Number(lambda: own.member))
    load_library().binaryvit_share_threads(*runtime)
    try:
        yield sizes
    finally:
        load_library().binaryvit_share_threads(None, None, None)
        share_threads_of_torch()

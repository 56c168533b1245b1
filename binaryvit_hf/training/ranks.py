"""What the processes of one training tell of each other: an error is shown once, and ends them all with its exit code."""

import os
import sys
import time

import torch.distributed as dist

from ..errors import one_line


ERROR = "binaryvit_hf/error"
FIRST_RANK_SPEAKS_FIRST = 3.0  # seconds, as most errors meet all ranks at about the same time


def rank() -> int:
    return int(os.environ.get("RANK", "0"))  # of torchrun and accelerate


def is_one_of_many() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def claim_error(code: int) -> bool:
    """Whether this process is to show an error: rank 0, or another one whose error no other has shown."""
    if not is_one_of_many():
        return True
    if rank() != 0:
        end = time.monotonic() + FIRST_RANK_SPEAKS_FIRST
        while time.monotonic() < end:
            if shown_error_code() is not None:
                return False
            time.sleep(0.1)
    store = shared_store()
    if store is None:
        return True
    mine = f"{rank()}:{code}"
    try:
        return store.compare_set(ERROR, "", mine).decode() == mine
    except RuntimeError:  # it went with the process that held it
        return True


def shown_error_code() -> int | None:
    """The exit code of an error that a process has shown already."""
    store = shared_store()
    try:
        told = store.get(ERROR).decode() if store is not None and store.check([ERROR]) else None
    except RuntimeError:  # it went with the process that held it
        return None
    return None if told is None else int(told.partition(":")[2])


def shared_store() -> dist.Store | None:
    """What the processes write to and read from without waiting for each other; `None` before they have met."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    return dist.distributed_c10d._get_default_store()


def show_error(message: str, code: int) -> int:
    """Print an error, prefixed with its rank where that is not 0, unless another process has; returns `code`."""
    if claim_error(code):
        where = f"rank {rank()}: " if rank() else ""
        print(f"\nerror: {where}{one_line(message)}", file=sys.stderr)  # a progress bar may stand on the line
    return code


def leave(code: int) -> int:
    """Ends one of many processes at once: the interpreter's own end waits for peers that may be gone, or aborts."""
    if is_one_of_many() and dist.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code

"""Errors of a training in several processes: one process shows the error, and its exit code ends all of them."""

import contextlib
import os
import sys
import time

import torch.distributed as dist

from binaryvit_runtime.errors import one_line


ERROR_KEY = "binaryvit_hf/error"
FIRST_RANK_HEAD_START = 3.0  # seconds; most errors reach all ranks at about the same time


def rank() -> int:
    return int(os.environ.get("RANK", "0"))  # torchrun and accelerate set it


def has_peers() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def show_error(message: str, code: int) -> int:
    """Print an error with its rank, unless another process has shown one; returns `code`."""
    if claim_error(code):
        where = f"rank {rank()}: " if rank() else ""
        with contextlib.suppress(OSError):  # the terminal, or the reader of a pipe, may have ended by the same signal
            print(f"\nerror: {where}{one_line(message)}", file=sys.stderr)  # the line may hold a progress bar
    return code


def claim_error(code: int) -> bool:
    """Whether this process shows its error: the first to claim it does, and rank 0 has a head start."""
    if not has_peers():
        return True
    if rank() != 0:
        end = time.monotonic() + FIRST_RANK_HEAD_START
        while time.monotonic() < end:
            if shown_error_code() is not None:
                return False
            time.sleep(0.1)
    store = shared_store()
    if store is None:
        return True
    claim = f"{rank()}:{code}"
    try:
        return store.compare_set(ERROR_KEY, "", claim).decode() == claim
    except RuntimeError:  # the store ended with the process that held it
        return True


def shown_error_code() -> int | None:
    """The exit code of the error that a process has shown, if any."""
    store = shared_store()
    try:
        claim = store.get(ERROR_KEY).decode() if store is not None and store.check([ERROR_KEY]) else None
    except RuntimeError:  # the store ended with the process that held it
        return None
    return None if claim is None else int(claim.partition(":")[2])


def shared_store() -> dist.Store | None:
    """PyTorch's key-value store, which needs no waiting for other processes; `None` before the processes have connected."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    return dist.distributed_c10d._get_default_store()


def leave(code: int) -> int:
    """Exit now if there are other processes: the interpreter's own exit would wait for them, or abort."""
    if has_peers() and dist.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code

"""The processes of a `DataLoader` that load images: only the process that trains ends them, so that it can save first."""

import atexit
import contextlib
import functools
import multiprocessing.context
import multiprocessing.queues
import multiprocessing.util
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable

from torch.utils.data import DataLoader


STOPPING_SIGNALS = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
]  # Windows has no SIGHUP
NO_SHARED_MEMORY = 75  # exit code of a worker
DEATH = re.compile(r"DataLoader worker \(pid.*?\) ((?:is killed by|exited)[^.\n]*)")


class Worker(multiprocessing.process.BaseProcess):
    """A process that ignores `STOPPING_SIGNALS`."""

    def start(self) -> None:
        """Start with the signals blocked: `begin_worker` comes after the imports, which can take seconds."""
        with contextlib.ExitStack() as stack:
            if sys.platform != "win32":
                before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING_SIGNALS)
                stack.callback(signal.pthread_sigmask, signal.SIG_SETMASK, before)
            super().start()

    def terminate(self) -> None:
        """The parent's own SIGTERM, to a worker that does not end: it would be ignored, too."""
        self.kill()


class SpawnedWorker(Worker, multiprocessing.context.SpawnProcess):
    pass


class SpawnContext(multiprocessing.context.SpawnContext):
    Process = SpawnedWorker


CONTEXTS: dict[str, multiprocessing.context.BaseContext] = {"spawn": SpawnContext()}
if sys.platform != "win32":

    class ForkedWorker(Worker, multiprocessing.context.ForkProcess):
        pass

    class ForkContext(multiprocessing.context.ForkContext):
        Process = ForkedWorker

    class ServedWorker(Worker, multiprocessing.context.ForkServerProcess):
        pass

    class ForkServerContext(multiprocessing.context.ForkServerContext):
        Process = ServedWorker

    CONTEXTS |= {"fork": ForkContext(), "forkserver": ForkServerContext()}


def shield_workers(loader: DataLoader) -> DataLoader:
    """
    Let the workers of a loader ignore the signals that ask a program to stop.

    `timeout`, SLURM, systemd, torchrun and a terminal send them to every process. A worker that ended would end training
    before it has saved a checkpoint. Workers end when the main process has no more work for them, or has ended.

    Args:
        loader: of PyTorch, or accelerate's wrapper of one. It is changed.
    """
    plain = getattr(loader, "base_dataloader", loader)
    if plain.num_workers:
        plain.multiprocessing_context = CONTEXTS[(plain.multiprocessing_context or multiprocessing).get_start_method()]
        plain.worker_init_fn = functools.partial(begin_worker, plain.worker_init_fn)
    return loader


def begin_worker(then: Callable[[int], None] | None, worker: int) -> None:
    for number in STOPPING_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(end_worker)  # type: ignore[attr-defined]
    if then is not None:
        then(worker)


def end_worker(error: Exception, batch: object) -> None:
    """End this worker, which cannot send a batch. By default the batch is dropped, and the main process waits for ever."""
    if "shared memory" in str(error):
        os._exit(NO_SHARED_MEMORY)
    traceback.print_exception(error)
    sys.stderr.flush()
    os._exit(1)


@atexit.register  # after the import of multiprocessing.util, so that it runs before the end that this registers
def kill_workers() -> None:
    """End workers that are left at exit. `multiprocessing` would send a SIGTERM, which they ignore, and wait for their end."""
    workers = [process for process in multiprocessing.active_children() if isinstance(process, Worker)]
    if workers and hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler raises an error for a killed worker
    for process in workers:
        process.kill()


def describe_dead_worker(error: BaseException) -> str | None:
    """Why a worker ended, and what to do; `None` if the error is another one."""
    texts, cause = [], error
    while cause is not None:
        texts.append(str(cause))
        cause = cause.__cause__
    found = DEATH.search("\n".join(reversed(texts)))  # the first error knows the most
    if found is None:
        return None
    how = found[1]
    if "Killed" in how:
        return (
            "A process that reads images was killed, as Linux does when memory runs out: give --dataloader_num_workers a "
            "smaller number, or 0"
        )
    if "Bus error" in how or how.endswith(f"exit code {NO_SHARED_MEMORY}"):
        return (
            "The processes that read images ran out of shared memory: enlarge it (Docker: --shm-size=8g), or give "
            "--dataloader_num_workers 0"
        )
    return f"A process that reads images {how}: --dataloader_num_workers 0 reads them without other processes"

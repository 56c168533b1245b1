"""
Interleaved timing: every competitor is a process of its own, and the processes run one at a time, in turns.

A load from elsewhere on the machine then slows all competitors alike.
"""

import contextlib
import multiprocessing
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any

from binaryvit_runtime.errors import UserError, first_sentence


MAX_IDLE_WAIT = 2.0  # seconds
MAX_END_WAIT = 5.0  # seconds


class Worker:
    """
    A process that answers requests, one after the other.

    Args:
        name: the worker's name in error messages.
        create: a top-level function. The process calls `create(*arguments)` once; the result answers each request.
    """

    def __init__(self, name: str, create: Callable, *arguments):
        context = multiprocessing.get_context("spawn")
        self.name = name
        self.pipe, other_end = context.Pipe()
        self.process = context.Process(target=serve, args=(other_end, create, arguments), daemon=True)
        with ignore_interrupts():
            self.process.start()
        other_end.close()

    def request(self, message: Any) -> Any:
        """
        Send a message and wait for the answer.

        Raises:
            UserError: the worker raised an exception, or its process ended.
        """
        with contextlib.suppress(ConnectionError):  # the worker has ended; its error may be in the pipe
            self.pipe.send(message)
        try:
            answer = self.pipe.recv()
        except (EOFError, ConnectionError) as error:  # the process ended without an exception
            raise UserError(f"{self.name} failed: {self.describe_end()}") from error
        if isinstance(answer, UserError):
            raise UserError(f"{self.name} failed: {answer}")
        return answer

    def describe_end(self) -> str:
        """How the process of this worker ended: by a signal or with an exit code."""
        self.process.join(MAX_END_WAIT)
        code = self.process.exitcode
        if code is None or code >= 0:
            return "its process " + ("closed its pipe." if code is None else f"ended with exit code {code}.")
        name = next((number.name for number in signal.Signals if number == -code), f"signal {-code}")
        if name == "SIGKILL":
            return "its process was killed (SIGKILL), as Linux does when memory runs out; free memory or measure less at once."
        return f"its process was ended by {name}."

    def stop(self) -> None:
        self.pipe.close()
        self.process.join()


@contextlib.contextmanager
def ignore_interrupts() -> Iterator[None]:
    """
    Processes that start in this context ignore Ctrl-C, which a terminal sends to all processes of a command. The command
    itself ends in one sentence, and its workers with it.
    """
    if threading.current_thread() is not threading.main_thread():  # no other thread may change how signals are handled
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def serve(pipe: Connection, create: Callable, arguments: tuple) -> None:
    """Answer the requests of a pipe until its other end is closed. Runs in the worker's process."""
    try:
        respond = create(*arguments)
        while True:
            try:
                message = pipe.recv()
            except EOFError:
                return
            answer = respond(message)
            wait_for_idle_threads()
            pipe.send(answer)
    except Exception as error:
        pipe.send(UserError(first_sentence(error)))  # the exception itself may not pickle


def wait_for_idle_threads() -> None:
    """
    Wait until the threads of this process sleep.

    Threads of OpenMP and of onnxruntime spin for a while after their work, often for longer than a forward takes. They
    would take the cores from the next competitor.
    """
    end = time.perf_counter() + MAX_IDLE_WAIT
    while time.perf_counter() < end:
        before = time.process_time()
        time.sleep(0.01)
        if time.process_time() - before < 0.001:
            return


def describe_ratio(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}"


def describe_seconds(seconds: Sequence[float], batch_size: int) -> dict:
    """Median, first and last decile of the seconds of batches, two or more, and the images per second."""
    deciles, median = statistics.quantiles(seconds, n=10, method="inclusive"), statistics.median(seconds)
    return {"seconds": median, "seconds_10_90": [deciles[0], deciles[-1]], "images_per_second": batch_size / median}

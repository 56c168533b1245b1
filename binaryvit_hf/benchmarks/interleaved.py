"""
Contestants of a benchmark: each lives in a process of its own, and they take turns, so that a busy machine is busy for all of
them.
"""

import contextlib
import multiprocessing
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from ..errors import UserError, first_sentence


REST_SECONDS = 2.0  # at most


class Failure(NamedTuple):
    """What a contestant raised, in one sentence."""

    sentence: str


class Contestant:
    """
    A process that waits to be asked.

    Args:
        name: what messages call it.
        create: a module's function, called in the process with `arguments`; returns what answers a question.
    """

    def __init__(self, name: str, create: Callable, *arguments):
        context = multiprocessing.get_context("spawn")
        self.name = name
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=answer, args=(theirs, create, arguments), daemon=True)
        self.process.start()
        theirs.close()

    def ask(self, question: Any) -> Any:
        """
        Raises:
            UserError: it failed, which it tells in a sentence, or ran out of memory.
        """
        with contextlib.suppress(ConnectionError):  # it is gone, and may have said why
            self.pipe.send(question)
        try:
            answered = self.pipe.recv()
        except (EOFError, ConnectionError) as error:  # without a word, which only memory does
            raise UserError(f"{self.name} ran out of memory; try a smaller --batch-size.") from error
        if isinstance(answered, Failure):
            raise UserError(f"{self.name} failed: {answered.sentence}")
        return answered

    def stop(self) -> None:
        self.pipe.close()
        self.process.join()


def answer(pipe: Connection, create: Callable, arguments: tuple) -> None:
    try:
        respond = create(*arguments)
        while True:
            try:
                question = pipe.recv()
            except EOFError:  # nobody will ask any more
                return
            answered = respond(question)
            come_to_rest()
            pipe.send(answered)
    except Exception as error:
        pipe.send(Failure(first_sentence(error)))


def come_to_rest() -> None:
    """
    Waits until this process's threads sleep. Those of OpenMP and of onnxruntime spin when they have nothing left to do, for
    longer than many a forward takes, on the cores that whose turn it is next needs.
    """
    end = time.perf_counter() + REST_SECONDS
    while time.perf_counter() < end:
        before = time.process_time()
        time.sleep(0.01)
        if time.process_time() - before < 0.001:
            return


def describe_seconds(seconds: list[float]) -> dict:
    """Their median and their first and last decile; of two numbers or more."""
    deciles = statistics.quantiles(seconds, n=10, method="inclusive")
    return {"seconds": statistics.median(seconds), "seconds_10_90": [deciles[0], deciles[-1]]}

"""Workers of benchmarks: a process that ends without an answer is named with what is known of its end."""

import multiprocessing
import os
import signal

import pytest

from binaryvit_hf.benchmarks.interleaved import Worker
from binaryvit_runtime.errors import UserError


@pytest.fixture
def forked(monkeypatch):
    """Workers fork: spawning one takes seconds."""
    if "fork" not in multiprocessing.get_all_start_methods():
        pytest.skip("This system has no fork.")
    fork = multiprocessing.get_context("fork")
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: fork)


def end_by(number: int):
    os.kill(os.getpid(), number)


def leave(code: int):
    os._exit(code)


def refuse(_: int):
    raise ValueError("the network is damaged")


def ignores_interrupts(_: int):
    return lambda message: signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_an_interrupt_ends_the_command_alone(forked):
    before = signal.getsignal(signal.SIGINT)
    worker = Worker("resnet on engine", ignores_interrupts, 0)
    assert worker.request("ready")
    assert signal.getsignal(signal.SIGINT) is before
    worker.process.kill()  # a forked worker holds both ends of its pipe, so it would not see the end


@pytest.mark.parametrize(
    "create, argument, reason",
    [
        (end_by, signal.SIGKILL, "its process was killed (SIGKILL), as Linux does when memory runs out; "),
        (end_by, signal.SIGABRT, "its process was ended by SIGABRT."),
        (leave, 3, "its process ended with exit code 3."),
        (refuse, 0, "the network is damaged"),
    ],
)
def test_the_end_of_a_worker_is_told_as_far_as_it_is_known(create, argument, reason, forked):
    worker = Worker("resnet on engine", create, argument)
    with pytest.raises(UserError) as error:
        worker.request("ready")
    assert str(error.value).startswith(f"resnet on engine failed: {reason}")
    assert ("memory" in str(error.value)) is (argument == signal.SIGKILL)
    worker.stop()

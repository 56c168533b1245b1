"""Tells what a program does and how long it will take, where it would be silent for long."""

import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from .errors import counted
from .writing import discard_output


FIRST_LINE = 5.0  # seconds
NEXT_LINES = 20.0  # seconds from line to line

Item = TypeVar("Item")


def write_line(line: str) -> None:
    """Write a line to stderr, if it has a reader. Without one the answers on stdout are still wanted."""
    if sys.stderr is not None:
        try:
            sys.stderr.write(f"{line}\n")
            sys.stderr.flush()
        except BrokenPipeError:
            discard_output(sys.stderr)


class Progress:
    """
    A context that writes lines while it lasts, the first after `FIRST_LINE` seconds. Work that ends sooner writes nothing.

    ```python
    with Progress("Checking images", total=5000) as progress:
        ...
        progress.update(16)  # Checking images: 1,200 of 5,000, about 40 seconds left
    ```

    Args:
        text: what the program does.
        total: the number of steps. `None`: the lines tell the time so far.
        write: takes a line. Default: it is written to stderr.
    """

    def __init__(self, text: str, total: int | None = None, write: Callable[[str], None] = write_line):
        self.text, self.total, self.write = text, total, write
        self.done, self.start = 0, 0.0
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self.write_lines, daemon=True)

    def __enter__(self) -> "Progress":
        self.start = time.monotonic()
        self.thread.start()
        return self

    def __exit__(self, *error) -> None:
        self.ended.set()
        self.thread.join()

    def update(self, steps: int = 1) -> None:
        self.done += steps

    def write_lines(self) -> None:
        pause = FIRST_LINE
        while not self.ended.wait(pause):
            self.write(self.describe())
            pause = NEXT_LINES

    def describe(self) -> str:
        """The line of now."""
        seconds = time.monotonic() - self.start
        if self.total is None:
            return f"{self.text} ({format_time(seconds)} so far)"
        line = f"{self.text}: {self.done:,} of {self.total:,}"
        return f"{line}{describe_time_left(seconds, self.done, self.total - self.done)}"


def with_progress(
    items: Iterable[Item], text: str, total: int, write: Callable[[str], None] = write_line
) -> Iterator[Item]:
    """The items, with lines about how many are done."""
    with Progress(text, total, write) as progress:
        for item in items:
            yield item
            progress.update()


def describe_time_left(seconds: float, done: float, to_do: float) -> str:
    """`, about 12 minutes left`, if `done` of the steps took `seconds`; nothing before the first and after the last one."""
    return f", about {format_time(seconds / done * to_do)} left" if done > 0 and to_do > 0 else ""


def format_time(seconds: float) -> str:
    """`1 second`, `40 seconds`, `12 minutes`, `3.5 hours`."""
    if seconds < 90:
        return counted(max(1, round(seconds)), "second")
    return f"{round(seconds / 60)} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"

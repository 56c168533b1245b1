"""
Sweeps of seeded cases. Each case runs in a fork with limits of time and memory and ends in one of `ENDINGS`.

An attack is a function of a random generator and an empty folder. It returns "refused" or "answered", and raises
`Wrong` if an answer is wrong. Any other exception counts as "thrown". Equal seeds make equal cases.
"""

import contextlib
import io
import multiprocessing
import os
import random
import signal
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from binaryvit_runtime.errors import LINE_LENGTH


SECONDS, BYTES = 20.0, 2 * 2**30  # CPU time and memory of a case; CPU time does not depend on other processes
HANGS = 120.0  # seconds of wall time for a case
ENDINGS = ("refused", "answered", "thrown", "wrong", "too slow", "too big")
BAD = ENDINGS[2:]
POLL = 0.05  # seconds between two checks of the memory of a process

Attack = Callable[[random.Random, Path], str]


def few_or_many(few: int, many: int):
    """Parametrize the number of `cases`: `few` by default, `many` with `-m slow`."""
    return pytest.mark.parametrize(
        "cases", [pytest.param(few, id="share"), pytest.param(many, id="all", marks=pytest.mark.slow)]
    )


def choose_seeds(cases: int) -> list[int]:
    """`cases` seeds. `ATTACK_SEED` selects a single seed, `ATTACK_CASES` another number."""
    if "ATTACK_SEED" in os.environ:
        return [int(os.environ["ATTACK_SEED"])]
    return list(range(int(os.environ.get("ATTACK_CASES", cases))))


class Wrong(AssertionError):
    """A wrong answer, or a file that must not be left behind."""


@dataclass
class Ended:
    seed: int
    ending: str
    detail: str = ""


@dataclass
class Said:
    """The output of a command and its exit code."""

    code: int
    out: str
    err: str

    def errors(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.startswith("error: ")]


def run(main: Callable[[list[str]], int], *arguments: object) -> Said:
    """Call the `main` of a command in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(argument) for argument in arguments])
    return Said(code, out.getvalue(), err.getvalue())


def judge(said: Said) -> str:
    """
    "answered" for exit code 0, "refused" for an error of one sentence.

    Raises:
        AssertionError: the error is not one short sentence, or the exit code is another one.
    """
    if said.code == 0:
        return "answered"
    assert said.code in (1, 2), said
    assert len(said.errors()) == 1, said
    assert len(said.errors()[0]) <= 2 * LINE_LENGTH, f"a line of {len(said.errors()[0])} characters"
    assert "Traceback" not in said.err, said
    return "refused"


def sweep(attack: Attack, seeds: Iterable[int], root: Path, apart: bool = False) -> list[Ended]:
    """
    Args:
        root: the folders of the cases are made here and removed.
        apart: each case has its own process. Attacks that change the state of the process need it.
    """
    waiting, ended = list(seeds), []
    while waiting:
        some = run_forked(attack, waiting[:1] if apart else waiting, root)
        ended += some
        waiting = waiting[len(some) :]
    return ended


def run_forked(attack: Attack, seeds: list[int], root: Path) -> list[Ended]:
    """Run cases in one fork until all are done, or one must be killed or kills the fork."""
    reader, writer = multiprocessing.Pipe(duplex=False)
    child = os.fork()
    if child == 0:
        work(attack, seeds, root, writer)
    writer.close()
    ended: list[Ended] = []
    began, base = time.monotonic(), resident(child)
    try:
        while len(ended) < len(seeds):
            if reader.poll(POLL):
                ended.append(reader.recv())
                began = time.monotonic()
                base = min(base, resident(child))
            elif time.monotonic() - began > HANGS:
                ended.append(Ended(seeds[len(ended)], "too slow", f"more than {HANGS} s"))
                break
            elif resident(child) - base > BYTES:
                ended.append(Ended(seeds[len(ended)], "too big", f"more than {BYTES / 2**30} GB"))
                break
    except EOFError:
        ended.append(Ended(seeds[len(ended)], "thrown", "the process died"))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        reader.close()
    return ended


def work(attack: Attack, seeds: list[int], root: Path, writer: Connection) -> None:
    try:
        silence()
        for seed in seeds:
            writer.send(attempt(attack, seed, root))
    finally:
        os._exit(0)  # only the parent returns to pytest


def silence() -> None:
    """Redirect at the level of file descriptors: loggers keep the stream that they were created with."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nowhere, descriptor)


def attempt(attack: Attack, seed: int, root: Path) -> Ended:
    reset_peak()
    before, began = peak(), cpu_seconds()
    ending, detail = "thrown", ""
    try:
        with tempfile.TemporaryDirectory(dir=root, ignore_cleanup_errors=True) as folder:
            ending = attack(random.Random(seed), Path(folder))
        assert ending in ("refused", "answered")
    except Wrong as wrong:
        ending, detail = "wrong", str(wrong)
    except BaseException as error:
        ending, detail = "thrown", describe(error)
    if cpu_seconds() - began > SECONDS:
        ending, detail = "too slow", f"{cpu_seconds() - began:.1f} s"
    if peak() - before > BYTES:
        ending, detail = "too big", f"{(peak() - before) / 2**30:.1f} GB"
    return Ended(seed, ending, detail)


def cpu_seconds() -> float:
    """CPU time of this process and of the children that it waited for."""
    return sum(os.times()[:4])


def describe(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    where = " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in reversed(frames[-4:]))
    return f"{type(error).__name__}: {str(error)[:800]} ({where})"


def resident(process: int) -> int:
    """Resident memory of a process in bytes, 0 if it has ended."""
    try:
        return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
    except (OSError, IndexError):
        return 0


def reset_peak() -> None:
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak() -> int:
    """Largest resident memory of this process in bytes since `reset_peak`."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


def count(ended: list[Ended]) -> dict[str, int]:
    counted = Counter(one.ending for one in ended)
    return {"cases": len(ended), **{ending: counted[ending] for ending in ENDINGS}}


def format_table(rows: dict[str, dict[str, int]]) -> list[str]:
    """A header and a line for each sweep."""
    width = max(map(len, rows))
    titles = ("cases", *ENDINGS)
    lines = [" ".join([f"{'sweep':<{width}}", *(f"{title:>9}" for title in titles)])]
    for name, counted in rows.items():
        lines.append(" ".join([f"{name:<{width}}", *(f"{counted[title]:>9}" for title in titles)]))
    return lines

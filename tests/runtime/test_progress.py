"""Lines about work that takes long."""

import time

import pytest

from binaryvit_runtime import progress
from binaryvit_runtime.progress import Progress, describe_time_left, with_progress


@pytest.fixture
def lines(monkeypatch):
    monkeypatch.setattr(progress, "FIRST_LINE", 0.05)
    monkeypatch.setattr(progress, "NEXT_LINES", 0.01)
    return []


def wait_for(lines: list[str], number: int) -> None:
    end = time.monotonic() + 30
    while len(lines) < number and time.monotonic() < end:
        time.sleep(0.005)


def test_work_that_ends_soon_is_silent(capsys):
    with Progress("Packing"):
        pass
    assert list(with_progress("abc", "Counting", total=3)) == ["a", "b", "c"]
    assert capsys.readouterr() == ("", "")


def test_long_work_tells_how_long_it_has_taken_until_it_ends(lines):
    with Progress("Packing the weights", write=lines.append):
        wait_for(lines, 2)
    number = len(lines)
    assert lines[0] == lines[1] == "Packing the weights (1 second so far)"
    time.sleep(0.05)
    assert len(lines) == number


def test_counted_work_tells_the_time_left(lines):
    with Progress("Checking images", total=5000, write=lines.append) as shown:
        wait_for(lines, 1)
        shown.update(1200)
        wait_for(lines, 3)
    assert lines[0] == "Checking images: 0 of 5,000"
    assert lines[-1].startswith("Checking images: 1,200 of 5,000, about ")


def test_the_lines_end_when_the_work_fails(lines):
    shown = Progress("Packing", write=lines.append)
    with pytest.raises(ValueError), shown:
        raise ValueError
    assert not shown.thread.is_alive()


@pytest.mark.parametrize("done, to_do, text", [(0, 5, ""), (5, 0, ""), (5, 10, ", about 20 seconds left")])
def test_time_left(done, to_do, text):
    assert describe_time_left(10.0, done, to_do) == text

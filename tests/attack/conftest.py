"""
`pytest -m slow tests/attack` runs all of the sweeps and prints one table; `pytest` runs a small share of each.

`ATTACK_SEED=N` runs the case of that seed alone, `ATTACK_CASES=N` so many cases of each sweep.
"""

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import BAD, Attack, count, format_table, judge, run, sweep
from shelf import create_look, fill_shelf, training_arguments

from run_image_classification import main as train


COUNTED = "attack"  # the property of a test's report that holds its line of the table


def pytest_collection_modifyitems(items):
    linux = pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(linux)


@pytest.fixture
def assert_withstood(request, tmp_path_factory):
    """Run a sweep and put it into the table. It fails on what was thrown, wrong, too slow or too big, and names the seeds."""

    def run(attack: Attack, cases: int, what: str, apart: bool = False) -> None:
        seeds = range(int(os.environ.get("ATTACK_CASES", cases)))
        if "ATTACK_SEED" in os.environ:
            seeds = [int(os.environ["ATTACK_SEED"])]
        ended = sweep(attack, seeds, tmp_path_factory.mktemp("sweep"), apart)
        request.node.user_properties.append((COUNTED, [what, count(ended)]))
        bad = [one for one in ended if one.ending in BAD]
        path = request.node.path.relative_to(request.config.rootpath)
        report = [f"{one.ending}: ATTACK_SEED={one.seed} {one.detail}" for one in bad]
        again = f"repeat one: ATTACK_SEED={bad[0].seed if bad else 0} pytest -n 0 -m '' '{path}::{request.node.name}'"
        assert not bad, "\n".join([f"{len(bad)} of {len(ended)} cases of {what!r}", *report, again])

    return run


def pytest_terminal_summary(terminalreporter):
    reports = [report for kind in ("passed", "failed") for report in terminalreporter.stats.get(kind, [])]
    rows = {
        what: counted
        for report in reports
        if report.when == "call"
        for name, (what, counted) in report.user_properties
        if name == COUNTED
    }
    if rows:
        terminalreporter.section("attack")
        for line in format_table(rows):
            terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def shelf(tmp_path_factory) -> Path:
    return fill_shelf(tmp_path_factory.mktemp("shelf"))


@pytest.fixture(scope="session")
def look_at(shelf) -> Callable[[Path], str]:
    """Read a picture as training, image checks and classify do, which must agree."""
    return create_look(shelf / "packed")


@pytest.fixture(scope="session")
def interrupted(shelf, tmp_path_factory) -> Path:
    """The folder of a run that was killed after its second checkpoint."""
    out = tmp_path_factory.mktemp("interrupted") / "out"

    def attack(rng, folder):
        return judge(run(train, *training_arguments(shelf, out)))

    (ended,) = sweep(attack, [0], tmp_path_factory.mktemp("training"))
    assert ended.ending == "answered", ended
    for path in out.iterdir():
        if path.name != "run_arguments.json" and not path.name.startswith("checkpoint-"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.rmtree(out / "checkpoint-4")
    return out

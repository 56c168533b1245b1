"""
`pytest -m slow tests/attack` runs all sweeps and prints a table. `pytest` runs a few cases of each sweep.

`ATTACK_SEED=N` runs only the case with this seed, `ATTACK_CASES=N` runs N cases of each sweep.
"""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import BAD, Attack, Ended, choose_seeds, count, format_table, judge, run, sweep
from shelf import create_look, fill_shelf, training_arguments

from binaryvit_hf.training.run import main as train


COUNTED = "attack"  # the property of a test report that holds its row of the table


def pytest_collection_modifyitems(items):
    linux = pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(linux)


@pytest.fixture
def assert_all_well(request):
    """Add a sweep to the table. Fail if a case ended in one of `BAD`, and name the seeds."""

    def check(ended: list[Ended], what: str) -> None:
        request.node.user_properties.append((COUNTED, [what, count(ended)]))
        bad = [one for one in ended if one.ending in BAD]
        if bad:
            lines = [f"{one.ending}: ATTACK_SEED={one.seed} {one.detail}" for one in bad]
            test = f"{request.node.path.relative_to(request.config.rootpath)}::{request.node.name}"
            again = f"repeat one: ATTACK_SEED={bad[0].seed} pytest -n 0 -m '' '{test}'"
            pytest.fail("\n".join([f"{len(bad)} of {len(ended)} cases of {what!r}", *lines, again]), pytrace=False)

    return check


@pytest.fixture
def assert_withstood(assert_all_well, tmp_path_factory):
    """Run a sweep of `cases` cases. With `apart` each case has its own process."""

    def run(attack: Attack, cases: int, what: str, apart: bool = False) -> None:
        ended = sweep(attack, choose_seeds(cases), tmp_path_factory.mktemp("sweep"), apart)
        assert_all_well(ended, what)

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
    """Read a picture as training, image checks and `classify` do. All three must agree."""
    return create_look(shelf / "packed")


@pytest.fixture(scope="session")
def trained(shelf, tmp_path_factory) -> Path:
    """The folder of a finished run."""
    out = tmp_path_factory.mktemp("trained") / "out"

    def attack(rng, folder):
        return judge(run(train, *training_arguments(shelf, out)))

    (ended,) = sweep(attack, [0], tmp_path_factory.mktemp("training"))
    assert ended.ending == "answered", ended
    return out


@pytest.fixture(scope="session")
def interrupted(trained, tmp_path_factory) -> Path:
    """The folder of a run that was killed after its first checkpoint."""
    out = tmp_path_factory.mktemp("interrupted") / "out"
    shutil.copytree(trained / "checkpoint-2", out / "checkpoint-2")
    record = (trained / "run_arguments.json").read_text()
    (out / "run_arguments.json").write_text(record.replace(str(trained), str(out)))
    return out

"""README.md. `test_docs.py` runs its code, with that of all other pages."""

import runpy

from snippets import README, ROOT


SCRIPT = ROOT / ".ci" / "update_readme.py"


def test_the_results_and_the_picture_are_those_of_the_measurements():
    assert not runpy.run_path(str(SCRIPT))["find_stale"](), f"run `python {SCRIPT.relative_to(ROOT)}`"


def test_continuous_integration_runs_the_tests_as_the_readme_says():
    [line] = [line for line in (ROOT / ".ci" / "run").read_text().splitlines() if line.startswith("command=")]
    command = line.partition("'")[2].partition("'")[0]
    assert README.read_text(encoding="utf-8").splitlines().count(command) == 1

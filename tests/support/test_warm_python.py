"""Runs of `WarmPython` behave as new interpreters."""

import signal
import subprocess
import sys

import pytest


CODE = """
import json, os, sys
print(json.dumps([sys.argv, os.getcwd(), dict(os.environ), __name__, hasattr(json, "seen")]))
json.seen = True
print("to stderr", file=sys.stderr)
sys.exit(7)
"""


def test_a_run_has_its_own_arguments_folder_variables_output_and_exit_code(warm_python, tmp_path):
    variables = {"PATH": "/bin", "LC_ALL": "C.UTF-8", "A": "b"}
    runs = [warm_python.run("-c", CODE, "x", 1, folder=tmp_path, variables=variables) for _ in range(2)]
    alone = subprocess.run(
        [sys.executable, "-c", CODE, "x", "1"], cwd=tmp_path, env=variables, capture_output=True, text=True
    )
    for run in runs:
        assert (run.returncode, run.stdout, run.stderr) == (alone.returncode, alone.stdout, alone.stderr)


def test_an_exception_ends_a_run_with_code_one_and_its_traceback(warm_python, tmp_path):
    run = warm_python.run("-c", "1 / 0", folder=tmp_path)
    assert run.returncode == 1
    assert run.stderr.splitlines()[-1] == "ZeroDivisionError: division by zero"


def test_a_script_imports_the_modules_beside_it(warm_python, tmp_path):
    (tmp_path / "neighbour.py").write_text("VALUE = 5")
    (tmp_path / "script.py").write_text("import sys, neighbour; print(neighbour.VALUE, sys.argv[1:])")
    run = warm_python.run(tmp_path / "script.py", "x", folder=tmp_path)
    assert run.stdout == "5 ['x']\n", run.stderr


def test_a_run_that_was_started_gets_signals(warm_python, tmp_path):
    run = warm_python.start("-c", "import time; time.sleep(60)", folder=tmp_path)
    assert not run.has_ended()
    run.send_signal(signal.SIGTERM)
    assert run.wait(timeout=10).returncode == -signal.SIGTERM


@pytest.mark.skipif(sys.platform != "linux", reason="there each run is a new interpreter")
def test_a_run_that_hangs_is_killed_and_the_next_one_works(warm_python, tmp_path):
    with pytest.raises(subprocess.TimeoutExpired):
        warm_python.run("-c", "import time; time.sleep(60)", folder=tmp_path, timeout=0.1)
    assert warm_python.run("-c", "print(1)", folder=tmp_path).stdout == "1\n"

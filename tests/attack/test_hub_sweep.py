"""Random faults of the Hub. The default tests cover fixed faults in `tests/test_hub_faults.py`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from harness import Ended, choose_seeds
from hub_server import HubServer, client_environment


@pytest.mark.slow
def test_faults_of_the_hub(assert_all_well, shelf, tmp_path):
    with HubServer(users={}) as server:  # only for the names of its variables
        environment = client_environment(server, tmp_path / "home")
    (tmp_path / "cases").mkdir()
    script = Path(__file__).with_name("hub_sweep.py")
    command = [sys.executable, script, shelf, tmp_path / "cases", *choose_seeds(150)]
    result = subprocess.run(
        list(map(str, command)), env=environment, capture_output=True, text=True, timeout=1200, check=False
    )
    assert result.returncode == 0, result.stderr
    assert_all_well([Ended(**json.loads(line)) for line in result.stdout.splitlines()], "faults of the Hub")

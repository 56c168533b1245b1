"""Processes as bare as another machine: no variable of ours, a home of their own, and, if asked, no binaryvit_hf."""

import os
import subprocess
import sys
from pathlib import Path


WITHOUT_PACKAGE = "import sys; sys.modules['binaryvit_hf'] = None\n"


def run_python(code: str, home: Path, *arguments, **environment: str) -> subprocess.CompletedProcess:
    """Run `code` in a new process, in the folder `home`, offline unless `environment` says otherwise."""
    home.mkdir(exist_ok=True)
    bare = {"PATH": os.environ["PATH"], "HOME": str(home), "HF_HOME": str(home / "hf"), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=home,
        env=bare | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )

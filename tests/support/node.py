"""Runs JavaScript in the node that comes with the PyPI package playwright."""

import importlib.util
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from binaryvit_runtime import browser, engine


BROWSER = Path(browser.__file__).parent
WASM = Path(engine.__file__).with_name("binaryvit.wasm")


def find_node() -> Path:
    """Skips the test where there is no node."""
    found = importlib.util.find_spec("playwright")
    node = Path(found.origin).parent / "driver" / "node" if found and found.origin else None
    if node is None or not node.is_file():
        pytest.skip("there is no node: pip install playwright")
    return node


def run_node(script: str, given: Any = None) -> Any:
    """
    What a script prints as JSON.

    Args:
        script: an ES module. Before it are `load` and the other names of binaryvit.js as `binaryvit`, `wasm`, the path of
            the engine, and `given`.
        given: anything that JSON holds.
    """
    head = (
        f"import * as binaryvit from {json.dumps(BROWSER.joinpath('binaryvit.js').as_uri())};\n"
        'import { readFileSync } from "node:fs";\n'
        f"const wasm = {json.dumps(str(WASM))};\n"
        'const given = JSON.parse(readFileSync(0, "utf-8"));\n'
    )
    done = subprocess.run(
        [find_node(), "--input-type=module", "--eval", head + script],
        input=json.dumps(given),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)

"""Workers of benchmarks that start fast."""

import multiprocessing

import pytest
from warm_python import LIBRARIES


@pytest.fixture
def forked_contestants(monkeypatch):
    """Contestants fork from a process that has imported the libraries. Spawning one costs 5 s more."""
    if "forkserver" in multiprocessing.get_all_start_methods():
        multiprocessing.set_forkserver_preload(["binaryvit_hf.benchmarks.pipeline", "onnxruntime", *LIBRARIES])
        from multiprocessing.forkserver import ensure_running

        ensure_running()  # now: contestants inherit the environment variables of this moment
        forkserver = multiprocessing.get_context("forkserver")
        monkeypatch.setattr(multiprocessing, "get_context", lambda method: forkserver)

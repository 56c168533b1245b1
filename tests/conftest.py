import gc
import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import ALICE, BOB, HubServer, client_environment
from warm_python import WarmPython


# Set before Hugging Face libraries are imported: the tests must not use the network, or the caches and settings of the user.
if "PYTEST_XDIST_WORKER" not in os.environ:  # the workers inherit what the first process sets
    CACHES = tempfile.TemporaryDirectory(prefix="binaryvit-tests-", ignore_cleanup_errors=True)
    for name in [name for name in os.environ if name.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))]:
        del os.environ[name]
    os.environ["HF_HOME"] = os.path.join(CACHES.name, "hf")
    os.environ["MPLCONFIGDIR"] = os.path.join(CACHES.name, "matplotlib")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
# Two tests run at once, on as few as two cores. Threads that spin while they wait would slow both.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# In the background of a shell script SIGINT is ignored, also by the programs that tests interrupt: they would wait for ever.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module", autouse=True)
def only_new_objects_are_collected() -> None:
    """The Trainer collects garbage at every start and end: a pass over all libraries' objects would take a second each."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def warm_python() -> Iterator[WarmPython]:
    """Runs Python commands without a network. Their Hugging Face cache is `hf` in the folder of the run."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    python = WarmPython(variables | {"HF_HOME": "hf", "HF_HUB_OFFLINE": "1"})
    yield python
    python.close()


@pytest.fixture(scope="session")
def hub_and_client() -> Iterator[tuple[HubServer, WarmPython]]:
    with HubServer(users={ALICE: "alice", BOB: "bob"}) as server:
        client = WarmPython(client_environment(server, Path("hf")))
        yield server, client
        client.close()


@pytest.fixture
def server(hub_and_client) -> HubServer:
    """An empty Hub with the users alice and bob."""
    hub_and_client[0].clear()
    return hub_and_client[0]


@pytest.fixture
def client(hub_and_client, server) -> WarmPython:
    """Runs Python commands for which `server` is the Hub. Their cache is `hf` in the folder of the run."""
    return hub_and_client[1]

"""
Python processes that start with the heavy libraries imported.

Importing torch, transformers and the other libraries of training takes 5 s of CPU time. `WarmPython` imports them
once, in another process, and forks that process for every run. A run is still a process with its own arguments, folder,
variables, output and exit code, and it shares no state with earlier runs.
"""

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from pathlib import Path


LIBRARIES = [
    *["accelerate", "datasets", "evaluate", "matplotlib.backends.backend_agg", "matplotlib.figure", "PIL.Image"],
    *["safetensors.torch", "timm.data", "torch", "torchvision.transforms.v2", "transformers.hf_argparser"],
    *["transformers.models.auto.image_processing_auto", "transformers.models.auto.modeling_auto"],
    *["transformers.models.vit.image_processing_vit", "transformers.models.vit.modeling_vit"],
    *["transformers.pipelines", "transformers.trainer"],
]
# Code that begins with this line cannot import binaryvit_hf.
WITHOUT_PACKAGE = "import sys; sys.modules['binaryvit_hf'] = None\n"
FORKING = """
import gc, importlib, json, os, runpy, sys

for library in sys.argv[1:]:
    importlib.import_module(library)
gc.collect()
gc.freeze()  # the garbage collector of a fork would copy their pages
for line in sys.stdin:
    if line == "\\n":
        os._exit(0)
    run = json.loads(line)
    child = os.fork()
    if child == 0:
        break
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
else:
    os._exit(0)
os.chdir(run["folder"])
os.environ.clear()
os.environ.update(run["variables"])
for descriptor, file in enumerate((os.devnull, *run["output"])):
    os.dup2(os.open(file, os.O_RDWR), descriptor)
importlib.import_module("numpy").random.seed()  # otherwise all forks would draw the same numbers
first, *rest = run["arguments"]
if first == "-c":
    sys.argv = ["-c", *rest[1:]]
    exec(compile(rest[0], "<string>", "exec"))
elif first == "-m":
    sys.argv = ["-m", *rest[1:]]
    runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
else:
    sys.argv = [first, *rest]
    sys.path[0] = os.path.dirname(first)
    runpy.run_path(first, run_name="__main__")
"""


class WarmPython:
    """
    Runs Python commands in forks of a process that has imported `LIBRARIES`.

    Libraries read some variables when they are imported: HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE, OMP_NUM_THREADS.
    `variables` must hold the values that the runs need. A relative HF_HOME gives each run a cache in its own folder.

    Such forks are not safe on systems other than Linux. There every run is a new interpreter.
    """

    def __init__(self, variables: dict[str, str]):
        self.variables = variables
        self.forking: subprocess.Popen | None = None

    def run(
        self, *arguments: object, folder: Path, variables: dict[str, str] | None = None, timeout: float = 300
    ) -> subprocess.CompletedProcess:
        """Run `python *arguments` to its end. See `start`."""
        return self.start(*arguments, folder=folder, variables=variables).wait(timeout)

    def start(self, *arguments: object, folder: Path, variables: dict[str, str] | None = None) -> "WarmRun | ColdRun":
        """
        Start `python *arguments` in `folder`, which is created. Wait for its end before you start another.

        Args:
            arguments: a script, `-m` and a module, or `-c` and code; then its own arguments.
            variables: the whole environment of the run; by default that of the libraries.
        """
        folder.mkdir(exist_ok=True)
        variables = self.variables if variables is None else variables
        kind = WarmRun if sys.platform == "linux" else ColdRun
        return kind(self, list(map(str, arguments)), folder, variables)

    def run_bare(self, code: str, home: Path, *arguments: object, **variables: str) -> subprocess.CompletedProcess:
        """Run `code` offline as another user, whose home is `home` and who has set `variables`."""
        bare = {"PATH": os.environ["PATH"], "HOME": str(home), "HF_HOME": "hf", "HF_HUB_OFFLINE": "1"}
        return self.run("-c", code, *arguments, folder=home, variables=bare | variables)

    def fork(self, request: dict) -> int:
        """The process id of a fork that does what `request` says. Its exit code is the next line of `forking`."""
        if self.forking is None:
            self.forking = subprocess.Popen(
                [sys.executable, "-c", FORKING, *LIBRARIES],
                env=self.variables,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                bufsize=0,  # `select` does not see lines that lie in a buffer
            )
        self.forking.stdin.write(json.dumps(request).encode() + b"\n")
        return int(self.forking.stdout.readline())

    def close(self) -> None:
        if self.forking is not None:
            # The end of its input would not tell it: workers of a data loader that are still there have that open, too.
            with self.forking:
                self.forking.stdin.write(b"\n")


class WarmRun:
    """A run in a fork of the process that has imported the libraries."""

    def __init__(self, python: WarmPython, arguments: list[str], folder: Path, variables: dict[str, str]):
        self.arguments = arguments
        self.output = [tempfile.NamedTemporaryFile("r+") for _ in range(2)]  # noqa: SIM115, `wait` closes them
        request = {"arguments": arguments, "folder": str(folder), "variables": variables}
        self.process = python.fork(request | {"output": [file.name for file in self.output]})
        self.answers = python.forking.stdout

    def has_ended(self, timeout: float = 0) -> bool:
        return bool(select.select([self.answers], [], [], timeout)[0])

    def send_signal(self, number: int) -> None:
        os.kill(self.process, number)

    def wait(self, timeout: float = 300) -> subprocess.CompletedProcess:
        """
        Raises:
            subprocess.TimeoutExpired: the run takes longer; it is killed.
        """
        ended = self.has_ended(timeout)
        if not ended:
            self.send_signal(signal.SIGKILL)
        code = int(self.answers.readline())
        stdout, stderr = (file.read() for file in self.output)
        for file in self.output:
            file.close()
        if not ended:
            raise subprocess.TimeoutExpired(self.arguments, timeout)
        return subprocess.CompletedProcess(self.arguments, code, stdout, stderr)


class ColdRun:
    """A run in a new interpreter, with the methods of `WarmRun`."""

    def __init__(self, python: WarmPython, arguments: list[str], folder: Path, variables: dict[str, str]):
        self.process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=folder,
            env=variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def has_ended(self) -> bool:
        return self.process.poll() is not None

    def send_signal(self, number: int) -> None:
        self.process.send_signal(number)

    def wait(self, timeout: float = 300) -> subprocess.CompletedProcess:
        stdout, stderr = self.process.communicate(timeout=timeout)
        return subprocess.CompletedProcess(self.process.args, self.process.returncode, stdout, stderr)

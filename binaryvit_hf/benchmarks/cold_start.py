"""CPU time and peak memory of whole processes: what one answer costs from the start of Python to its end."""

import os
import statistics
import subprocess
import sys
from pathlib import Path

from binaryvit_runtime.errors import UserError
from binaryvit_runtime.progress import with_progress
from binaryvit_runtime.resources import shipped_models

from ..ops import align_columns, readable
from .interleaved import describe_seconds


MODEL = "binaryvit-digits"
OURS, PEER = "import binaryvit_hf", "from transformers import ViTForImageClassification"
TABLE_HEAD = ("process", "CPU s, median", "10-90 %", "peak memory")

# Linux counts the process that starts another into the other's peak memory, so a small one starts it.
LAUNCHER = """
import os, sys
silence = (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)
process = os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ, file_actions=[silence])
_, status, usage = os.wait4(process, 0)
print(os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime, usage.ru_maxrss)
"""
CLASSIFY_IN_ONNXRUNTIME = """
import sys
import numpy as np
import onnxruntime
from PIL import Image
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
picture = Image.open(sys.argv[2]).convert("RGB").resize((224, 224), Image.Resampling.BICUBIC)
pixels = (np.asarray(picture, np.float32) / 127.5 - 1).transpose(2, 0, 1)[None]
(logits,) = session.run(None, {session.get_inputs()[0].name: pixels})
print(np.argsort(-logits[0])[:5])
"""


def benchmark_processes(onnx_file: Path | None, turns: int) -> list[dict]:
    """
    Measure processes in turns: `binaryvit classify` of one picture beside onnxruntime, `--help`, and imports.

    Args:
        onnx_file: the network that onnxruntime computes. `None` leaves it out.
        turns: timed turns of each process, 2 or more. One more comes first and does not count: it fills the caches.

    Returns:
        A list in the order of the table: `process`, `cpu_seconds` (all threads, with the system's share),
        `cpu_seconds_10_90`, `peak_bytes`; empty on Windows, which does not tell them.

    Raises:
        UserError: a process fails.
    """
    if not hasattr(os, "wait4"):
        return []
    commands = list_commands(onnx_file)
    rounds = [
        [run_process(name, command) for name, command in commands.items()]
        for _ in with_progress(range(1 + turns), "whole processes, turns", 1 + turns)
    ]
    processes = []
    for name, usages in zip(commands, zip(*rounds[1:])):
        seconds, peaks = zip(*usages)
        described = describe_seconds(seconds, 1)
        processes.append(
            {
                "process": name,
                "cpu_seconds": described["seconds"],
                "cpu_seconds_10_90": described["seconds_10_90"],
                "peak_bytes": round(statistics.median(peaks)),
            }
        )
    return processes


def list_commands(onnx_file: Path | None) -> dict[str, list[str]]:
    """The command line of each process, by its name in the table."""
    picture = str(shipped_models()[MODEL] / "example.png")
    binaryvit, python = [sys.executable, "-m", "binaryvit_cli"], [sys.executable, "-c"]
    commands = {f"binaryvit classify {MODEL} example.png": [*binaryvit, "classify", MODEL, picture]}
    if onnx_file is not None:
        name = f"{onnx_file.name.split('.')[0]} int8 in onnxruntime, with Pillow"
        commands[name] = [*python, CLASSIFY_IN_ONNXRUNTIME, str(onnx_file), picture]
    return {**commands, "binaryvit --help": [*binaryvit, "--help"], PEER: [*python, PEER], OURS: [*python, OURS]}


def run_process(name: str, command: list[str]) -> tuple[float, int]:
    """
    Returns:
        Seconds of CPU and peak memory in bytes.

    Raises:
        UserError: the process fails.
    """
    launched = subprocess.run(
        [sys.executable, "-I", "-S", "-c", LAUNCHER, *command], capture_output=True, text=True, check=True
    )
    code, seconds, peak = launched.stdout.split()
    if code != "0":
        reason = (launched.stderr.splitlines() or [f"exit code {code}"])[-1]
        raise UserError(f"The process {name!r} failed: {reason.rstrip('.')}.")
    return float(seconds), int(peak) * (1 if sys.platform == "darwin" else 1024)


def format_processes(processes: list[dict]) -> str:
    """The measurements of `benchmark_processes` as a table for the terminal."""
    if not processes:
        return "This system does not tell the CPU time and the memory of processes."
    rows = [
        (
            process["process"],
            f"{process['cpu_seconds']:.2f}",
            "-".join(f"{seconds:.2f}" for seconds in process["cpu_seconds_10_90"]),
            readable(process["peak_bytes"], "B"),
        )
        for process in processes
    ]
    seconds = {process["process"]: process["cpu_seconds"] for process in processes}
    return "\n".join(
        [
            "Whole processes, from the start of Python to its end",
            align_columns([TABLE_HEAD, *rows]),
            "",
            f"CPU of `{OURS}` minus that of `{PEER}`: {seconds[OURS] - seconds[PEER]:+.2f} s",
        ]
    )

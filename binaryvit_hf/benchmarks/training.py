"""
Time and peak memory of training steps of a network, eager, compiled and as CUDA graphs, beside a full-precision DeiT and
the plain simulation.

The competitors take turns, step by step. Each is a process of its own, so its peak of memory is its own.
"""

import contextlib
import json
import logging
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModelForImageClassification

from binaryvit_runtime.errors import counted
from binaryvit_runtime.progress import with_progress
from binaryvit_runtime.resources import shipped_configs

from ..compiled_layers import CACHE_VARIABLE, CompiledLayers, missing_compiler
from ..cuda_graphs import RecordedLoss
from ..host_memory import forget_peak, keep_freed_memory, peak_of_process
from ..loading import load_config
from ..network.configuration_binaryvit import as_pair
from ..ops import align_columns, readable
from .inference import check_binary_row, has_images_of
from .interleaved import Worker, describe_ratio, describe_seconds
from .simulation import simulate


PEER = "deit-small-patch16-224"
EAGER, COMPILED, GRAPH, COMPILED_GRAPH = MODES = ("eager", "compiled", "CUDA graph", "compiled, CUDA graph")
WARM_UP_TURNS = 1  # after the first step: the allocator grows
TABLE_HEAD = ("network", "first step, s", "ms a step, median", "10-90 %", "images/s", "peak memory", "steps of DeiT")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Competitor:
    """A row of configs/ and how it is trained: one of `MODES`, or "simulated"."""

    network: str
    mode: str = EAGER

    def __str__(self) -> str:
        return self.network if self.mode == EAGER else f"{self.network}, {self.mode}"


def benchmark_training(network: str, batch_size: int | None, steps: int) -> dict:
    """
    Time training steps of a binary row of configs/, of its simulation and of DeiT: forward, cross-entropy, backward, AdamW.

    The CPU trains in float32, a GPU under autocast to bfloat16. The row and DeiT also run compiled, as `--torch_compile`
    does, with no code from earlier runs, and as CUDA graphs (`--cuda_graphs`); not where there is no compiler or NVIDIA GPU.
    Compiled CUDA graphs record the code that the compiled competitor before them has made.

    Args:
        network: name of the row.
        batch_size: images in a step; by default 8 on the CPU and 128 on a GPU.
        steps: timed steps of each competitor, 2 or more.

    Returns:
        A dictionary of `device`, `threads`, `batch_size` and `results`, a list in the order of the table:
        `contestant`, `first_seconds` of the first step with its compilation, `seconds` of a later step,
        `seconds_10_90`, `images_per_second`, `peak_bytes` after the first step, and `ratio`, the time divided by the time
        of the eager DeiT (`None` if that has images of another size).

    Raises:
        UserError: there is no such binary row, or not enough memory.
    """
    check_binary_row(network)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    batch_size = batch_size or (128 if device == "cuda" else 8)
    missing = missing_compiler(torch.device(device))
    if missing:
        logger.info("left out: compiled steps, because this machine lacks %s.", missing)
    modes = [mode for mode in MODES if not (missing and mode in (COMPILED, COMPILED_GRAPH))]
    if device != "cuda":
        modes = [mode for mode in modes if mode not in (GRAPH, COMPILED_GRAPH)]
    peer = peer_of(network)
    competitors = [Competitor(name, mode) for name in (peer, network) for mode in modes]
    competitors.append(Competitor(network, "simulated"))
    first_seconds, seconds, peaks = take_turns(competitors, batch_size, steps, device)
    peer_seconds = statistics.median(seconds[0])
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "batch_size": batch_size,
        "results": [
            {
                "contestant": str(competitor),
                "first_seconds": first,
                **describe_seconds(times, batch_size),
                "peak_bytes": peak,
                "ratio": statistics.median(times) / peer_seconds if has_images_of(competitor.network, peer) else None,
            }
            for competitor, first, times, peak in zip(competitors, first_seconds, seconds, peaks)
        ],
    }


def peer_of(network: str) -> str:
    """The DeiT to compare with: the teacher of the ablation that the row belongs to, else DeiT-S."""
    table = shipped_configs()[network].parent / "table.json"
    if not table.is_file():
        return PEER
    return f"{table.parent.name}/{json.loads(table.read_text(encoding='utf-8'))['teacher']}"


def format_steps(measured: dict) -> str:
    """The measurements of `benchmark_training` as a table for the terminal."""
    rows = [
        (
            result["contestant"],
            f"{result['first_seconds']:.1f}",
            f"{1000 * result['seconds']:.0f}",
            "-".join(f"{1000 * seconds:.0f}" for seconds in result["seconds_10_90"]),
            f"{result['images_per_second']:.1f}",
            readable(result["peak_bytes"], "B"),
            describe_ratio(result["ratio"]),
        )
        for result in measured["results"]
    ]
    head = f"{measured['device']}, {counted(measured['threads'], 'thread')}, batches of {measured['batch_size']}"
    return f"{head}\n{align_columns([TABLE_HEAD, *rows])}"


def take_turns(
    competitors: list[Competitor], batch_size: int, steps: int, device: str
) -> tuple[list[float], list[tuple[float, ...]], list[int]]:
    """
    Train all competitors in turns.

    Returns:
        For each competitor the seconds of the first step, those of each timed step, and the peak memory in bytes (of the
        GPU, else of the process).
    """
    with tempfile.TemporaryDirectory() as compiled_code:
        arguments = (batch_size, device, torch.get_num_threads(), compiled_code)
        workers = [Worker(str(competitor), create_responder, competitor, *arguments) for competitor in competitors]
        first_seconds = [
            worker.request("first") for worker in with_progress(workers, "first steps, with compilation", len(workers))
        ]
    turns = WARM_UP_TURNS + steps
    rounds = [
        [worker.request("step") for worker in workers]
        for _ in with_progress(range(turns), "turns of the contestants", turns)
    ]
    return first_seconds, list(zip(*rounds[WARM_UP_TURNS:])), [worker.request("peak") for worker in workers]


def create_responder(
    competitor: Competitor, batch_size: int, device: str, threads: int, compiled_code: str
) -> Callable:
    """
    Prepare training in the competitor's worker process.

    Args:
        compiled_code: folder of the code that torch.compile makes at the first step.

    Returns:
        The function that answers "first" with the seconds of the first training step, "step" with those of a later one,
        and "peak" with the peak memory in bytes since the first step.
    """
    os.environ[CACHE_VARIABLE] = compiled_code
    keep_freed_memory()  # as training does
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    config = load_config(shipped_configs()[competitor.network])
    model = AutoModelForImageClassification.from_config(config)
    model = (simulate(model) if competitor.mode == "simulated" else model).to(device).train()
    layers = CompiledLayers(model) if competitor.mode in (COMPILED, COMPILED_GRAPH) else None
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)  # the Trainer's own
    images = torch.randn(batch_size, config.num_channels, *as_pair(config.image_size), device=device)
    labels = torch.randint(config.num_labels, (batch_size,), device=device)

    def loss_of(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            return nn.functional.cross_entropy(model(images).logits, labels)

    recorded: RecordedLoss | None = None

    def timed_step() -> float:
        nonlocal recorded
        start = time.perf_counter()
        with layers.active() if layers else contextlib.nullcontext():
            if recorded is None and competitor.mode in (GRAPH, COMPILED_GRAPH):
                recorded = RecordedLoss(model, loss_of, images, labels)
            (recorded or loss_of)(images, labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def respond(message: str) -> float:
        if message == "peak":
            return torch.cuda.max_memory_allocated() if device == "cuda" else peak_of_process()
        if message == "first":
            seconds = timed_step()
            forget_peak()
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            return seconds
        timed_step()  # it refills the caches after the other competitors' turns
        return timed_step()

    return respond

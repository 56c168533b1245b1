"""
Time and peak memory of training steps of a network, of the full-precision DeiT-S and of the plain simulation.

The competitors take turns, step by step. Each is a process of its own, so its peak of memory is its own.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageClassification

from binaryvit_runtime.errors import UserError, counted
from binaryvit_runtime.resources import shipped_configs

from ..host_memory import keep_freed_memory, peak_of_process
from ..network.configuration_binaryvit import as_pair
from ..ops import align_columns, readable
from .interleaved import Worker, describe_seconds
from .simulation import simulate


PEER = "deit-small-patch16-224"
CHANGES = {"eager": lambda model: model, "simulated": simulate, "compiled": torch.compile}  # of a model, by mode
WARM_UP_TURNS = 1  # the allocator grows and torch.compile compiles
TABLE_HEAD = ("network", "ms a step, median", "10-90 %", "images/s", "peak memory", "steps of DeiT-S")


@dataclass(frozen=True)
class Competitor:
    """A row of configs/ and how it is trained: a mode of `CHANGES`."""

    network: str
    mode: str = "eager"

    def __str__(self) -> str:
        return self.network if self.mode == "eager" else f"{self.network}, {self.mode}"


def benchmark_training(network: str, batch_size: int | None, steps: int) -> dict:
    """
    Time training steps of a row of configs/, of its simulation and of DeiT-S: forward, cross-entropy, backward, AdamW.

    The CPU trains in float32. A GPU trains under autocast to bfloat16, and also the compiled networks.

    Args:
        network: name of the row.
        batch_size: images in a step; by default 8 on the CPU and 128 on a GPU.
        steps: timed steps of each competitor, 2 or more.

    Returns:
        A dictionary of `device`, `threads`, `batch_size` and `results`, a list in the order of the table:
        `contestant`, `seconds` of a step, `seconds_10_90`, `images_per_second`, `peak_bytes`, and `ratio`, the time
        divided by the time of DeiT-S.

    Raises:
        UserError: there is no such row, or not enough memory.
    """
    if network not in shipped_configs():
        raise UserError(f"There is no row {network!r} in configs/; there are {', '.join(sorted(shipped_configs()))}.")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    batch_size = batch_size or (128 if device == "cuda" else 8)
    modes = ("eager", "compiled") if device == "cuda" else ("eager",)
    competitors = [Competitor(name, mode) for name in (PEER, network) for mode in modes]
    competitors.append(Competitor(network, "simulated"))
    seconds, peaks = take_turns(competitors, batch_size, steps, device)
    peer_seconds = statistics.median(seconds[0])
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "batch_size": batch_size,
        "results": [
            {
                "contestant": str(competitor),
                **describe_seconds(times, batch_size),
                "peak_bytes": peak,
                "ratio": statistics.median(times) / peer_seconds,
            }
            for competitor, times, peak in zip(competitors, seconds, peaks)
        ],
    }


def format_steps(measured: dict) -> str:
    """The measurements of `benchmark_training` as a table for the terminal."""
    rows = [
        (
            result["contestant"],
            f"{1000 * result['seconds']:.0f}",
            "-".join(f"{1000 * seconds:.0f}" for seconds in result["seconds_10_90"]),
            f"{result['images_per_second']:.1f}",
            readable(result["peak_bytes"], "B"),
            f"{result['ratio']:.2f}",
        )
        for result in measured["results"]
    ]
    head = f"{measured['device']}, {counted(measured['threads'], 'thread')}, batches of {measured['batch_size']}"
    return f"{head}\n{align_columns([TABLE_HEAD, *rows])}"


def take_turns(
    competitors: list[Competitor], batch_size: int, steps: int, device: str
) -> tuple[list[tuple[float, ...]], list[int]]:
    """
    Train all competitors in turns.

    Returns:
        The seconds of each step and the peak memory in bytes (of the GPU, else of the process), for each competitor.
    """
    arguments = (batch_size, device, torch.get_num_threads())
    workers = [Worker(str(competitor), create_responder, competitor, *arguments) for competitor in competitors]
    rounds = [[worker.request("step") for worker in workers] for _ in range(WARM_UP_TURNS + steps)]
    return list(zip(*rounds[WARM_UP_TURNS:])), [worker.request("peak") for worker in workers]


def create_responder(competitor: Competitor, batch_size: int, device: str, threads: int) -> Callable:
    """
    Prepare training in the competitor's worker process.

    Returns:
        The function that answers "step" with the seconds of a training step, and "peak" with the peak memory in bytes.
    """
    keep_freed_memory()  # as training does
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(shipped_configs()[competitor.network])
    change = CHANGES[competitor.mode]
    model = change(AutoModelForImageClassification.from_config(config)).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    images = torch.randn(batch_size, config.num_channels, *as_pair(config.image_size), device=device)
    labels = torch.randint(config.num_labels, (batch_size,), device=device)

    def respond(message: str) -> float:
        if message == "peak":
            return torch.cuda.max_memory_allocated() if device == "cuda" else peak_of_process()
        for _ in range(
            2
        ):  # the first step refills the caches after the other competitors' turns; only the second counts
            start = time.perf_counter()
            with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                loss = nn.functional.cross_entropy(model(images).logits, labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if device == "cuda":
                torch.cuda.synchronize()
            seconds = time.perf_counter() - start
        return seconds

    return respond

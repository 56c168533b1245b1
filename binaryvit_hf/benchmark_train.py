"""
How long a training step takes and how much memory, beside the full-precision network and the plain simulation.

Every contestant lives in a process of its own, so that its peak of memory is its own, and they take turns step by step, so
that a busy machine is busy for all of them.
"""

import multiprocessing
import resource
import statistics
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedConfig

from .configuration_binaryvit import as_pair
from .errors import UserError
from .host_memory import keep_freed_memory
from .ops import align, readable
from .resources import shipped_configs
from .simulation import simulate


PEER = "deit-small-patch16-224"
WARM_UP_TURNS = 1  # turns, in which the allocator learns and a compiler compiles
TABLE_HEAD = ("network", "ms a step, median", "10-90 %", "images/s", "peak memory", "steps of DeiT-S")


@dataclass(frozen=True)
class Contestant:
    """A network in one of the ways to train it: `eager`, `simulated` (`simulation.simulate`) or `compiled`."""

    network: str
    way: str = "eager"

    def __str__(self) -> str:
        return self.network if self.way == "eager" else f"{self.network}, {self.way}"


@dataclass(frozen=True)
class Measurement:
    """Of one contestant: seconds of each step, and the peak of its memory in bytes: of the process, or of the GPU."""

    contestant: Contestant
    seconds: list[float]
    peak_bytes: int


def benchmark_training(network: str, batch_size: int | None, steps: int) -> dict:
    """
    Training steps (forward, cross-entropy, backward, AdamW) of a row of configs/, of DeiT-S and of the simulation; in
    float32 on the CPU, on a GPU under autocast to bfloat16, there compiled, too.

    Args:
        network: name of the row.
        batch_size: images a step; by default 8 on the CPU and 128 on a GPU.
        steps: that are timed, of each contestant.

    Returns:
        `device`, `threads`, `batch_size` and, in the order of the table, `results`.

    Raises:
        UserError: there is no such row, or the memory does not suffice.
    """
    if network not in shipped_configs():
        raise UserError(f"There is no row {network!r} in configs/; there are {', '.join(sorted(shipped_configs()))}.")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    batch_size = batch_size or (128 if device == "cuda" else 8)
    ways = ("eager", "compiled") if device == "cuda" else ("eager",)
    contestants = [Contestant(name, way) for name in (PEER, network) for way in ways]
    contestants.append(Contestant(network, "simulated"))
    measurements = take_turns(contestants, batch_size, steps, device)
    peer = statistics.median(measurements[0].seconds)
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "batch_size": batch_size,
        "results": [describe(measurement, batch_size, peer) for measurement in measurements],
    }


def format_steps(measured: dict) -> str:
    """What `benchmark_training` measured, as a table for the terminal."""
    rows = [TABLE_HEAD]
    for result in measured["results"]:
        deciles = "-".join(f"{1000 * seconds:.0f}" for seconds in result["seconds_10_90"])
        rows.append(
            (
                result["contestant"],
                f"{1000 * result['seconds']:.0f}",
                deciles,
                f"{result['images_per_second']:.1f}",
                readable(result["peak_bytes"], "B"),
                f"{result['ratio']:.2f}",
            )
        )
    head = f"{measured['device']}, {measured['threads']} threads, batches of {measured['batch_size']}"
    return f"{head}\n{align(rows)}"


def describe(measurement: Measurement, batch_size: int, peer_seconds: float) -> dict:
    median = statistics.median(measurement.seconds)
    deciles = statistics.quantiles(measurement.seconds, n=10)
    return {
        "contestant": str(measurement.contestant),
        "seconds": median,
        "seconds_10_90": [deciles[0], deciles[-1]],
        "images_per_second": batch_size / median,
        "peak_bytes": measurement.peak_bytes,
        "ratio": median / peer_seconds,
    }


def take_turns(contestants: list[Contestant], batch_size: int, steps: int, device: str) -> list[Measurement]:
    context = multiprocessing.get_context("spawn")
    pipes = []
    for contestant in contestants:
        ours, theirs = context.Pipe()
        arguments = (theirs, contestant, batch_size, device, torch.get_num_threads())
        process = context.Process(target=train_when_told, args=arguments, daemon=True)
        process.start()
        theirs.close()
        pipes.append(ours)
    seconds = [[] for _ in contestants]
    for step in range(WARM_UP_TURNS + steps):
        for pipe, contestant, times in zip(pipes, contestants, seconds):
            duration = ask(pipe, contestant, "step")
            if step >= WARM_UP_TURNS:
                times.append(duration)
    peaks = [ask(pipe, contestant, "peak") for pipe, contestant in zip(pipes, contestants)]
    return [Measurement(*parts) for parts in zip(contestants, seconds, peaks)]


def ask(pipe: Connection, contestant: Contestant, question: str):
    try:
        pipe.send(question)
        return pipe.recv()
    except (EOFError, ConnectionError) as error:  # it is gone, and only memory makes it go
        raise UserError(f"{contestant} ran out of memory; try a smaller --batch-size.") from error


def train_when_told(pipe: Connection, contestant: Contestant, batch_size: int, device: str, threads: int) -> None:
    """A contestant's process: for every "step" it trains and sends a step's seconds back, for "peak" its memory."""
    keep_freed_memory()  # as the script does
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(shipped_configs()[contestant.network])
    model = create_model(contestant, config).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    images = torch.randn(batch_size, config.num_channels, *as_pair(config.image_size), device=device)
    labels = torch.randint(config.num_labels, (batch_size,), device=device)
    while True:
        try:
            question = pipe.recv()
        except EOFError:  # the others are done
            return
        if question == "peak":
            peak = torch.cuda.max_memory_allocated() if device == "cuda" else peak_of_process()
            pipe.send(peak)
            continue
        for _ in range(2):  # the first brings back what the others' turns took from the caches, and is not counted
            start = time.perf_counter()
            with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                loss = nn.functional.cross_entropy(model(images).logits, labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if device == "cuda":
                torch.cuda.synchronize()
            seconds = time.perf_counter() - start
        pipe.send(seconds)


def create_model(contestant: Contestant, config: PreTrainedConfig) -> nn.Module:
    model = AutoModelForImageClassification.from_config(config)
    if contestant.way == "simulated":
        return simulate(model)
    return torch.compile(model) if contestant.way == "compiled" else model


def peak_of_process() -> int:
    status = Path("/proc/self/status")
    if status.is_file():  # of Linux, where the other figure counts what the process was started from, too
        (peak,) = (line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(peak) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in bytes on macOS

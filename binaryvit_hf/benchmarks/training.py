"""
How long a training step takes and how much memory, beside the full-precision network and the plain simulation.

The contestants take turns, step by step, each in a process of its own, so that its peak of memory is its own.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedConfig

from ..errors import UserError
from ..host_memory import keep_freed_memory, peak_of_process
from ..network.configuration_binaryvit import as_pair
from ..ops import align, readable
from ..resources import shipped_configs
from .interleaved import Contestant, describe_seconds
from .simulation import simulate


PEER = "deit-small-patch16-224"
WARM_UP_TURNS = 1  # turns, in which the allocator learns and a compiler compiles
TABLE_HEAD = ("network", "ms a step, median", "10-90 %", "images/s", "peak memory", "steps of DeiT-S")


@dataclass(frozen=True)
class Trainee:
    """A network in one of the ways to train it: `eager`, `simulated` (`simulation.simulate`) or `compiled`."""

    network: str
    way: str = "eager"

    def __str__(self) -> str:
        return self.network if self.way == "eager" else f"{self.network}, {self.way}"


@dataclass(frozen=True)
class Measurement:
    """Of one trainee: seconds of each step, and the peak of its memory in bytes: of the process, or of the GPU."""

    trainee: Trainee
    seconds: list[float]
    peak_bytes: int


def benchmark_training(network: str, batch_size: int | None, steps: int) -> dict:
    """
    Training steps (forward, cross-entropy, backward, AdamW) of a row of configs/, of DeiT-S and of the simulation; in
    float32 on the CPU, on a GPU under autocast to bfloat16, there compiled, too.

    Args:
        network: name of the row.
        batch_size: images a step; by default 8 on the CPU and 128 on a GPU.
        steps: that are timed, of each trainee.

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
    trainees = [Trainee(name, way) for name in (PEER, network) for way in ways]
    trainees.append(Trainee(network, "simulated"))
    measurements = take_turns(trainees, batch_size, steps, device)
    peer = statistics.median(measurements[0].seconds)
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "batch_size": batch_size,
        "results": [describe(measurement, batch_size, peer) for measurement in measurements],
    }


def format_steps(measured: dict) -> str:
    """What `benchmark_training` measured, as a table for the terminal."""
    rows: list[tuple[str, ...]] = [TABLE_HEAD]
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
    return {
        "contestant": str(measurement.trainee),
        **describe_seconds(measurement.seconds),
        "images_per_second": batch_size / median,
        "peak_bytes": measurement.peak_bytes,
        "ratio": median / peer_seconds,
    }


def take_turns(trainees: list[Trainee], batch_size: int, steps: int, device: str) -> list[Measurement]:
    arguments = (batch_size, device, torch.get_num_threads())
    contestants = [Contestant(str(trainee), start_training, trainee, *arguments) for trainee in trainees]
    seconds = [[] for _ in contestants]
    for step in range(WARM_UP_TURNS + steps):
        for contestant, times in zip(contestants, seconds):
            duration = contestant.ask("step")
            if step >= WARM_UP_TURNS:
                times.append(duration)
    peaks = [contestant.ask("peak") for contestant in contestants]
    return [Measurement(*parts) for parts in zip(trainees, seconds, peaks)]


def start_training(trainee: Trainee, batch_size: int, device: str, threads: int) -> Callable:
    """In the process of a trainee: for every "step" it trains and answers a step's seconds, for "peak" its memory in bytes."""
    keep_freed_memory()  # as the script does
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(shipped_configs()[trainee.network])
    model = create_model(trainee, config).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    images = torch.randn(batch_size, config.num_channels, *as_pair(config.image_size), device=device)
    labels = torch.randint(config.num_labels, (batch_size,), device=device)

    def respond(question: str) -> float:
        if question == "peak":
            return torch.cuda.max_memory_allocated() if device == "cuda" else peak_of_process()
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
        return seconds

    return respond


def create_model(trainee: Trainee, config: PreTrainedConfig) -> nn.Module:
    model = AutoModelForImageClassification.from_config(config)
    if trainee.way == "simulated":
        return simulate(model)
    return torch.compile(model) if trainee.way == "compiled" else model

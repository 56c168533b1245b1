"""
How long a forward takes: packed models on the engine's kernels beside their simulation, DeiT-S, and what else runs on a CPU.

The contestants, each in its best ordinary setting, take turns in processes of their own (`turns`). Nothing is downloaded:
weights are random, which changes no operation of any of them.
"""

import functools
import importlib.util
import itertools
import logging
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_NAME
from transformers.utils.logging import disable_progress_bar

from .. import engine
from ..errors import UserError
from ..host_memory import measure_growth
from ..network.configuration_binaryvit import as_pair
from ..network.engine_binaryvit import ENGINE_VARIABLE
from ..network.quantization_binaryvit import QUANT_METHOD, BinaryViTQuantizationConfig
from ..ops import align, readable
from ..resources import shipped_configs
from .interleaved import Contestant, describe_seconds
from .simulation import simulate


PEER, PEER_ENGINE = "deit-small-patch16-224", "PyTorch float32"
TURN_SECONDS = 0.1  # that a contestant's turn takes at least
TABLE_HEAD = ("model", "engine", "threads", "batch", "ms, median", "10-90 %", "images/s", "x DeiT-S", "file")

logger = logging.getLogger(__name__)

Forward = Callable[[int], object]  # computes a batch of so many images


@dataclass(frozen=True)
class Competitor:
    """
    A model and what runs it.

    Args:
        file: of its weights; a model's of transformers in a folder with all that it is loaded from.
        load: `load(file, threads)` gives its forward.
    """

    model: str
    engine: str
    file: Path
    load: Callable[[Path, int], Forward]

    def __str__(self) -> str:
        return f"{self.model} on {self.engine}"


def benchmark_inference(network: str, batch_sizes: list[int], threads: list[int] | None, turns: int) -> dict:
    """
    Forwards of a row of configs/ and of its peers, on the CPU, for every number of threads and images in a batch.

    Args:
        network: name of the row, of a binary network.
        threads: by default 1 and as many as PyTorch takes.
        turns: of each contestant that are timed, 2 or more.

    Returns:
        `results`, in the order of the table: `model`, `engine`, `threads`, `batch_size`, `seconds` and `seconds_10_90` of a
        batch, `images_per_second`, `ratio` (how many times as fast as DeiT-S in PyTorch and float32 with as many threads and
        images), `file_bytes`; and `starts`, of each contestant and number of threads: `seconds` of its first forward after
        loading, of one image, and `bytes` by which its memory grows meanwhile (none where the system does not tell).

    Raises:
        UserError: there is no such row, or the memory does not suffice.
    """
    configs = shipped_configs()
    if network not in configs or AutoConfig.from_pretrained(configs[network]).model_type != QUANT_METHOD:
        rows = (row for row in sorted(configs) if AutoConfig.from_pretrained(configs[row]).model_type == QUANT_METHOD)
        raise UserError(f"There is no binary row {network!r} in configs/; there are {', '.join(rows)}.")
    with tempfile.TemporaryDirectory() as folder:
        competitors = prepare(network, Path(folder))
        results, starts = [], []
        for number in threads or sorted({1, torch.get_num_threads()}):
            of_number, started = compete(competitors, batch_sizes, number, turns)
            results += of_number
            starts += started
    return {"results": results, "starts": starts}


def prepare(network: str, folder: Path) -> list[Competitor]:
    """Writes all files and says who competes."""
    logger.info("preparing the models")
    configs = shipped_configs()

    def save(model: PreTrainedModel, name: str) -> Path:
        model.save_pretrained(folder / name)
        return folder / name / SAFE_WEIGHTS_NAME

    model = AutoModelForImageClassification.from_config(AutoConfig.from_pretrained(configs[network]))
    latent = save(model, "latent")
    packing = BinaryViTQuantizationConfig()
    packed = save(
        AutoModelForImageClassification.from_pretrained(latent.parent, quantization_config=packing), "packed"
    )
    model = AutoModelForImageClassification.from_config(AutoConfig.from_pretrained(configs[PEER]))
    peer, half = save(model, "peer"), save(model.to(torch.bfloat16), "half")
    competitors = [
        Competitor(network, kernels, packed, functools.partial(load_packed, kernels=kernels))
        for kernels in engine.kernels_here()
    ]
    competitors += [
        Competitor(network, "PyTorch, simulated", latent, functools.partial(load_in_pytorch, change=simulate)),
        Competitor(PEER, PEER_ENGINE, peer, load_in_pytorch),
        Competitor(PEER, "PyTorch bfloat16", half, functools.partial(load_in_pytorch, dtype=torch.bfloat16)),
        Competitor(PEER, "torch.compile", peer, functools.partial(load_in_pytorch, change=compile_for_each_batch)),
    ]
    if importlib.util.find_spec("onnxruntime"):
        from .onnx_peers import load_onnx, write_onnx

        competitors += [Competitor(*written, load_onnx) for written in write_onnx(folder)]
    else:
        logger.info(
            "DeiT-S, MobileNetV2 and ResNet-18 in onnxruntime are left out: pip install 'binaryvit_hf[benchmark]'"
        )
    return competitors


def compete(
    competitors: list[Competitor], batch_sizes: list[int], threads: int, turns: int
) -> tuple[list[dict], list[dict]]:
    """All with one number of threads: `results` and `starts` of `benchmark_inference`."""
    contestants = {competitor: Contestant(str(competitor), start, competitor, threads) for competitor in competitors}
    ask_all(contestants, "ready")  # before the first is measured: loading takes the CPU
    starts = [
        {"model": competitor.model, "engine": competitor.engine, "threads": threads, **first}
        for competitor, first in ask_all(contestants, "first").items()
    ]
    results = []
    for batch_size in batch_sizes:
        logger.info("%s, batches of %d", count_threads(threads), batch_size)
        ask_all(contestants, batch_size)  # a compiler compiles
        rounds = [ask_all(contestants, batch_size) for _ in range(turns)]
        seconds = {
            competitor: list(itertools.chain(*(round[competitor] for round in rounds))) for competitor in contestants
        }
        peer = next(
            competitor for competitor in contestants if (competitor.model, competitor.engine) == (PEER, PEER_ENGINE)
        )
        for competitor, times in seconds.items():
            median = statistics.median(times)
            results.append(
                {
                    "model": competitor.model,
                    "engine": competitor.engine,
                    "threads": threads,
                    "batch_size": batch_size,
                    **describe_seconds(times),
                    "images_per_second": batch_size / median,
                    "ratio": statistics.median(seconds[peer]) / median,
                    "file_bytes": competitor.file.stat().st_size,
                }
            )
    for contestant in contestants.values():
        contestant.stop()
    return results, starts


def ask_all(contestants: dict[Competitor, Contestant], question: str | int) -> dict:
    """Their answers; who cannot run at all is left out, and taken out."""
    answers = {}
    for competitor, contestant in list(contestants.items()):
        try:
            answers[competitor] = contestant.ask(question)
        except UserError as error:
            if not isinstance(question, str) or competitor.engine == PEER_ENGINE:
                raise
            logger.info("left out: %s", error)
            del contestants[competitor]
    return answers


def start(competitor: Competitor, threads: int) -> Callable:
    """In the process of a contestant: what answers "ready", "first" and, with a turn's seconds, the size of a batch."""
    disable_progress_bar()
    logging.disable(logging.WARNING)
    forward = competitor.load(competitor.file, threads)

    def respond(question: str | int) -> dict | list[float] | None:
        if isinstance(question, int):
            return take_turn(forward, question)
        if question == "ready":
            return None
        seconds = []
        growth = measure_growth(lambda: seconds.append(measure(forward, 1)))
        return {"seconds": seconds[0], "bytes": growth}

    return respond


def take_turn(forward: Forward, batch_size: int) -> list[float]:
    warming = measure(forward, batch_size)
    if warming > TURN_SECONDS:
        return [warming]
    seconds = []  # the first brought back what the others' turns took from the caches, and is not counted
    end = time.perf_counter() + TURN_SECONDS
    while time.perf_counter() < end:
        seconds.append(measure(forward, batch_size))
    return seconds


def measure(forward: Forward, batch_size: int) -> float:
    start = time.perf_counter()
    forward(batch_size)
    return time.perf_counter() - start


def load_packed(file: Path, threads: int, kernels: str) -> Forward:
    os.environ[ENGINE_VARIABLE] = kernels
    return load_in_pytorch(file, threads)


def load_in_pytorch(
    file: Path, threads: int, dtype: torch.dtype = torch.float32, change: Callable | None = None
) -> Forward:
    torch.set_num_threads(threads)
    model = AutoModelForImageClassification.from_pretrained(file.parent, dtype=dtype).eval()
    shape = (model.config.num_channels, *as_pair(model.config.image_size))
    create_images = functools.cache(lambda batch_size: torch.randn(batch_size, *shape, dtype=dtype))
    forward = change(model) if change else model

    def compute(batch_size: int) -> torch.Tensor:
        with torch.inference_mode():
            return forward(create_images(batch_size)).logits

    return compute


def compile_for_each_batch(model: torch.nn.Module) -> torch.nn.Module:
    return torch.compile(model, dynamic=False)


def count_threads(threads: int) -> str:
    return "1 thread" if threads == 1 else f"{threads} threads"


def format_forwards(measured: dict) -> str:
    """What `benchmark_inference` measured, for the terminal."""
    rows: list[tuple[str, ...]] = [TABLE_HEAD]
    for result in measured["results"]:
        rows.append(
            (
                result["model"],
                result["engine"],
                str(result["threads"]),
                str(result["batch_size"]),
                f"{1000 * result['seconds']:.1f}",
                "-".join(f"{1000 * seconds:.1f}" for seconds in result["seconds_10_90"]),
                f"{result['images_per_second']:.1f}",
                f"{result['ratio']:.2f}",
                readable(result["file_bytes"], "B"),
            )
        )
    lines = [align(rows), ""]
    for start in measured["starts"]:
        if start["engine"] in engine.kernels_here():
            memory = "" if start["bytes"] is None else f", {readable(start['bytes'], 'B')} of memory"
            lines.append(
                f"{start['model']} on {start['engine']}, {count_threads(start['threads'])}: its first image after loading takes "
                f"{1000 * start['seconds']:.0f} ms{memory}."
            )
    return "\n".join(lines)


def plot_latency(measured: dict, path: Path) -> None:
    """Milliseconds an image of every contestant, on a logarithmic axis, for every number of threads and size of batches."""
    from matplotlib.figure import Figure

    results = measured["results"]
    batch_sizes = list(dict.fromkeys(result["batch_size"] for result in results))
    figure = Figure(figsize=(5 + 5 * len(batch_sizes), 6), layout="constrained")
    for axes, batch_size in zip(figure.subplots(1, len(batch_sizes), sharey=True, squeeze=False)[0], batch_sizes):
        for threads in dict.fromkeys(result["threads"] for result in results):
            shown = [
                result for result in results if (result["threads"], result["batch_size"]) == (threads, batch_size)
            ]
            medians, spread = ([1000 * result["seconds"] / batch_size for result in shown], [])
            for result, median in zip(shown, medians):
                low, high = (1000 * seconds / batch_size for seconds in result["seconds_10_90"])
                spread.append((median - low, high - median))
            names = [f"{result['model']}\n{result['engine']}" for result in shown]
            axes.errorbar(medians, names, xerr=list(zip(*spread)), fmt="o", capsize=3, label=count_threads(threads))
        images = "one image at a time" if batch_size == 1 else f"batches of {batch_size}"
        axes.set(title=images, xlabel="ms an image, median and 10-90 %", xscale="log")
        axes.grid(alpha=0.3, which="both")
    axes.invert_yaxis()
    axes.legend(loc="best")
    figure.savefig(path, dpi=120)

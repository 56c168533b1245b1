"""
Times of forwards on the CPU: packed models on the engine's kernels, their simulation in PyTorch, and full-precision and
int8 networks in PyTorch and onnxruntime. Each network has its best ordinary setting.

Weights are random: the time of a forward does not depend on them.
"""

import functools
import importlib.util
import logging
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedModel
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.logging import disable_progress_bar

from binaryvit_runtime.classifier import Classifier
from binaryvit_runtime.errors import UserError, counted, did_you_mean
from binaryvit_runtime.progress import Progress
from binaryvit_runtime.resources import installation, shipped_configs

from .. import engine
from ..data.model_inputs import create_image_processor
from ..host_memory import measure_growth
from ..loading import load_classifier
from ..network.configuration_binaryvit import as_pair
from ..network.engine_binaryvit import ENGINE_VARIABLE
from ..network.quantization_binaryvit import QUANT_METHOD, BinaryViTQuantizationConfig
from ..ops import align_columns, readable
from ..run_history import read_json
from .interleaved import Worker, describe_ratio, describe_seconds
from .simulation import simulate


PEER, PEER_ENGINE = "deit-small-patch16-224", "PyTorch float32"
CROP_PCT = 0.875  # of the image processors
RUNTIME = "runtime"
ONNX_LIBRARIES = ("onnxruntime", "timm", "onnx", "onnxscript")  # of `onnx_peers` and its exports
TURN_SECONDS = 0.1  # a turn lasts at least this long
TABLE_HEAD = ("model", "engine", "threads", "batch", "ms, median", "10-90 %", "images/s", "x DeiT-S", "file")

logger = logging.getLogger(__name__)

Forward = Callable[[int], object]  # its argument is the number of images in the batch


@dataclass(frozen=True)
class Competitor:
    """
    A model on an engine.

    Args:
        file: the weights. A model of transformers also has its config in this folder.
        load: `load(file, threads)` returns the forward.
    """

    model: str
    engine: str
    file: Path
    load: Callable[[Path, int], Forward]

    def __str__(self) -> str:
        return f"{self.model} on {self.engine}"


def benchmark_inference(network: str, batch_sizes: list[int], threads: list[int] | None, turns: int) -> dict:
    """
    Time forwards of a binary row of configs/ and of its peers on the CPU, for every number of threads and batch size.

    Args:
        network: name of the row.
        threads: by default 1 and PyTorch's own number.
        turns: timed turns of each competitor, 2 or more.

    Returns:
        A dictionary of two lists:

        - `results`, in the order of the table: `model`, `engine`, `threads`, `batch_size`, `seconds` of a batch,
          `seconds_10_90`, `images_per_second`, `file_bytes`, and `ratio`, the speed divided by the speed of DeiT-S in
          float32 in PyTorch with the same threads and batch size (`None` if DeiT-S has images of another size).
        - `starts`, for each competitor and number of threads: `model`, `engine`, `threads`, `seconds` of the first
          forward after loading, of one image, and `bytes`, the growth of memory during it (`None` except on Linux).

    Raises:
        UserError: there is no such row, or not enough memory.
    """
    check_binary_row(network)
    with tempfile.TemporaryDirectory() as folder:
        competitors = create_competitors(network, Path(folder))
        results, starts = [], []
        for number in threads or sorted({1, torch.get_num_threads()}):
            new_results, new_starts = compete(competitors, batch_sizes, number, turns)
            results += new_results
            starts += new_starts
    return {"results": results, "starts": starts}


def check_binary_row(network: str) -> None:
    """
    Raises:
        UserError: configs/ has no binary row of this name.
    """
    configs = shipped_configs()
    # Not AutoConfig: it cannot read the rows of timm where timm is not installed.
    rows = [row for row in sorted(configs) if read_json(configs[row] / CONFIG_NAME)["model_type"] == QUANT_METHOD]
    if network not in rows:
        others = f"; there are {', '.join(rows)}."
        raise UserError(f"There is no binary row {network!r} in configs/{did_you_mean(network, rows, others)}")


def has_images_of(network: str, peer: str) -> bool:
    """
    Whether a network has images of the peer's size. If not, a ratio of their times says little about them.

    Args:
        network: a row of configs/, or a network of timm, which has the size of DeiT-S.
    """
    configs = shipped_configs()
    if network not in configs:
        return True
    ours, theirs = (as_pair(read_json(configs[row] / CONFIG_NAME)["image_size"]) for row in (network, peer))
    return ours == theirs


def create_competitors(network: str, folder: Path) -> list[Competitor]:
    """The competitors in the order of the table. Their files are written to `folder`."""
    logger.info("preparing the models")
    with Progress("preparing the models"):
        save_row(network, folder / "packed", packed=True)
    half_model = AutoModelForImageClassification.from_pretrained(save_row(PEER, folder / "peer"), dtype=torch.bfloat16)
    half_model.save_pretrained(folder / "half")
    latent, packed, peer, half = (folder / name / SAFE_WEIGHTS_NAME for name in ("latent", "packed", "peer", "half"))
    in_pytorch: list[tuple[str, str, Path, dict]] = [
        *((network, kernels, packed, {"kernels": kernels}) for kernels in engine.kernels_here()),
        (network, "PyTorch, simulated", latent, {"change": simulate}),
        (PEER, PEER_ENGINE, peer, {}),
        (PEER, "PyTorch bfloat16", half, {"dtype": torch.bfloat16}),
        (PEER, "torch.compile", peer, {"change": functools.partial(torch.compile, dynamic=False)}),
    ]
    competitors = [
        Competitor(model_name, engine_name, file, functools.partial(load_in_pytorch, **options))
        for model_name, engine_name, file, options in in_pytorch
    ]
    competitors.insert(0, Competitor(network, RUNTIME, packed, load_in_runtime))
    if has_onnx_peers():
        from .onnx_peers import export_networks, export_packed, load_onnx

        competitors.append(Competitor(network, "onnxruntime, exported", export_packed(packed.parent), load_onnx))
        competitors += [Competitor(*exported, load_onnx) for exported in export_networks(folder)]
    return competitors


def has_onnx_peers() -> bool:
    """Whether networks in onnxruntime can be exported and measured. If not, logs how to install what they need."""
    if all(map(importlib.util.find_spec, ONNX_LIBRARIES)):
        return True
    logger.info("All networks in onnxruntime are left out; to measure them, %s.", installation("benchmark"))
    return False


def save_row(row: str, folder: Path, packed: bool = False) -> Path:
    """Save a row of configs/ with random weights, and its image processor. Returns the folder. Packed, it has `latent` beside it."""
    config = AutoConfig.from_pretrained(shipped_configs()[row])
    model = AutoModelForImageClassification.from_config(config)
    if packed:
        model.save_pretrained(folder.with_name("latent"))
        model = pack(folder.with_name("latent"))
    model.save_pretrained(folder)
    create_image_processor(config, CROP_PCT).save_pretrained(folder)
    return folder


def pack(folder: Path) -> PreTrainedModel:
    """The packed model of a folder with a latent one."""
    return AutoModelForImageClassification.from_pretrained(folder, quantization_config=BinaryViTQuantizationConfig())


def compete(
    competitors: list[Competitor], batch_sizes: list[int], threads: int, turns: int
) -> tuple[list[dict], list[dict]]:
    """Time all competitors with one number of threads. Returns `results` and `starts` of `benchmark_inference`."""
    workers = {
        competitor: Worker(str(competitor), create_responder, competitor, threads) for competitor in competitors
    }
    with Progress("loading the contestants", len(workers)) as progress:
        # Loading takes the CPU, so all of it comes before the first measurement.
        request_all(workers, "ready", progress)
    starts = [
        {"model": competitor.model, "engine": competitor.engine, "threads": threads, **first}
        for competitor, first in request_all(workers, "first").items()
    ]
    results = []
    for batch_size in batch_sizes:
        logger.info("%s, batches of %d", counted(threads, "thread"), batch_size)
        seconds = time_rounds(workers, batch_size, turns)
        peer_seconds = next(times for competitor, times in seconds.items() if is_peer(competitor))
        results += [
            {
                "model": competitor.model,
                "engine": competitor.engine,
                "threads": threads,
                "batch_size": batch_size,
                **describe_seconds(times, batch_size),
                "ratio": statistics.median(peer_seconds) / statistics.median(times)
                if has_images_of(competitor.model, PEER)
                else None,
                "file_bytes": competitor.file.stat().st_size,
            }
            for competitor, times in seconds.items()
        ]
    for worker in workers.values():
        worker.stop()
    return results, starts


def time_rounds(workers: dict[Competitor, Worker], batch_size: int, turns: int) -> dict[Competitor, list[float]]:
    """The seconds of each forward of competitors that take turns, after one turn each that does not count."""
    # The first turn warms up: torch.compile compiles for every batch size.
    with Progress("turns of the contestants", (1 + turns) * len(workers)) as progress:
        _, *rounds = [request_all(workers, batch_size, progress) for _ in range(1 + turns)]
    return {competitor: [second for times in rounds for second in times[competitor]] for competitor in workers}


def is_peer(competitor: Competitor) -> bool:
    """Whether this is the competitor that all ratios are to."""
    return (competitor.model, competitor.engine) == (PEER, PEER_ENGINE)


def request_all(workers: dict[Competitor, Worker], message: str | int, progress: Progress | None = None) -> dict:
    """
    The answers of all workers. A worker that cannot load its model is removed from `workers`.

    Raises:
        UserError: the peer cannot load its model, or a forward fails.
    """
    answers = {}
    for competitor, worker in list(workers.items()):
        try:
            answers[competitor] = worker.request(message)
        except UserError as error:
            if isinstance(message, int) or is_peer(competitor):
                raise
            logger.info("left out: %s", error)
            del workers[competitor]
        if progress:
            progress.update()
    return answers


def create_responder(competitor: Competitor, threads: int) -> Callable:
    """
    Load the competitor's model in its worker process.

    Returns:
        The function that answers requests:

        - "ready": nothing, once the model is loaded,
        - "first": seconds and growth of memory of the first forward,
        - a batch size: seconds of each forward of one turn.
    """
    disable_progress_bar()
    logging.disable(logging.WARNING)
    forward = competitor.load(competitor.file, threads)

    def respond(message: str | int) -> dict | list[float] | None:
        if isinstance(message, int):
            return take_turn(forward, message)
        if message == "ready":
            return None
        seconds = []
        growth = measure_growth(lambda: seconds.append(measure(forward, 1)))
        return {"seconds": seconds[0], "bytes": growth}

    return respond


def take_turn(forward: Forward, batch_size: int) -> list[float]:
    """Seconds of each forward in a turn. The first refills the caches and does not count, unless it fills the turn."""
    first = measure(forward, batch_size)
    if first > TURN_SECONDS:
        return [first]
    seconds = []
    end = time.perf_counter() + TURN_SECONDS
    while time.perf_counter() < end:
        seconds.append(measure(forward, batch_size))
    return seconds


def measure(forward: Forward, batch_size: int) -> float:
    start = time.perf_counter()
    forward(batch_size)
    return time.perf_counter() - start


def load_in_pytorch(
    file: Path,
    threads: int,
    dtype: torch.dtype = torch.float32,
    change: Callable | None = None,
    kernels: str | None = None,
) -> Forward:
    """The forward of `change(model)`, or of the model itself. A packed model runs on the engine's `kernels`."""
    if kernels:
        os.environ[ENGINE_VARIABLE] = kernels
    torch.set_num_threads(threads)
    model = load_classifier(file.parent, dtype=dtype).eval()
    shape = (model.config.num_channels, *as_pair(model.config.image_size))
    create_images = functools.cache(lambda batch_size: torch.randn(batch_size, *shape, dtype=dtype))
    forward = change(model) if change else model

    def compute(batch_size: int) -> torch.Tensor:
        with torch.inference_mode():
            return forward(create_images(batch_size)).logits

    return compute


def load_in_runtime(file: Path, threads: int) -> Forward:
    """The forward of the runtime, which needs no PyTorch."""
    classifier = Classifier.from_pretrained(file.parent, threads=threads)
    network, head = classifier.network, classifier.head
    create_images = functools.cache(
        lambda batch_size: np.random.default_rng(0).standard_normal((batch_size, *network.image_shape), np.float32)
    )
    return lambda batch_size: network.classify(create_images(batch_size), *head, threads=threads)


def format_forwards(measured: dict) -> str:
    """The measurements of `benchmark_inference` as text for the terminal."""
    rows = [
        (
            result["model"],
            result["engine"],
            str(result["threads"]),
            str(result["batch_size"]),
            f"{1000 * result['seconds']:.1f}",
            "-".join(f"{1000 * seconds:.1f}" for seconds in result["seconds_10_90"]),
            f"{result['images_per_second']:.1f}",
            describe_ratio(result["ratio"]),
            readable(result["file_bytes"], "B"),
        )
        for result in measured["results"]
    ]
    lines = [align_columns([TABLE_HEAD, *rows]), ""]
    for start in measured["starts"]:
        if start["engine"] in (RUNTIME, *engine.kernels_here()):
            memory = "" if start["bytes"] is None else f", {readable(start['bytes'], 'B')} of memory"
            lines.append(
                f"{start['model']} on {start['engine']}, {counted(start['threads'], 'thread')}: its first image after "
                f"loading takes {1000 * start['seconds']:.0f} ms{memory}."
            )
    return "\n".join(lines)


def plot_latency(measured: dict, path: Path) -> None:
    """Plot milliseconds per image, on a logarithmic axis. A panel is a batch size, a colour is a number of threads."""
    from matplotlib.figure import Figure

    results = measured["results"]
    batch_sizes = list(dict.fromkeys(result["batch_size"] for result in results))
    figure = Figure(figsize=(5 + 5 * len(batch_sizes), 6), layout="constrained")
    for axes, batch_size in zip(figure.subplots(1, len(batch_sizes), sharey=True, squeeze=False)[0], batch_sizes):
        for threads in dict.fromkeys(result["threads"] for result in results):
            shown = [
                result for result in results if (result["threads"], result["batch_size"]) == (threads, batch_size)
            ]
            seconds = np.array([(result["seconds"], *result["seconds_10_90"]) for result in shown])
            median, low, high = 1000 / batch_size * seconds.T
            names = [f"{result['model']}\n{result['engine']}" for result in shown]
            axes.errorbar(
                median, names, xerr=(median - low, high - median), fmt="o", capsize=3, label=counted(threads, "thread")
            )
        images = "one image at a time" if batch_size == 1 else f"batches of {batch_size}"
        axes.set(title=images, xlabel="ms an image, median and 10-90 %", xscale="log")
        axes.grid(alpha=0.3, which="both")
    axes.invert_yaxis()
    axes.legend(loc="best")
    figure.savefig(path, dpi=120)

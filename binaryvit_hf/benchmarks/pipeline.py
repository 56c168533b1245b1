"""
Times from JPEG files to labels on the CPU: our runtime, transformers' pipeline, and int8 networks in onnxruntime with
Pillow.

Weights are random, and pictures are noise: the times depend on neither.
"""

import logging
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import pipeline
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from transformers.utils.logging import disable_progress_bar

from binaryvit_runtime.classifier import Classifier
from binaryvit_runtime.cpus import available_cpus
from binaryvit_runtime.errors import counted
from binaryvit_runtime.progress import with_progress

from ..ops import align_columns, readable
from .cold_start import benchmark_processes, format_processes
from .inference import CROP_PCT, check_binary_row, has_images_of, has_onnx_peers, save_row
from .interleaved import Worker, describe_ratio, describe_seconds
from .photographs import HEIGHT, WIDTH, write_photographs


PEER = "deit-small-patch16-224"
PIPELINE, RUNTIME = "transformers' pipeline", "binaryvit_runtime"
ONE_A_THREAD, THREADS_IN_BATCH = "onnxruntime int8, a picture a thread", "onnxruntime int8, threads in a batch"
PICTURES = 200
WARM_UP_PICTURES = 32
QUALITY = 75  # Pillow's default
BATCH_SIZES = (1, 16)  # of transformers' pipeline
ONNX_BATCH_SIZE = 8
TOP_K = 5
CROP = 224
MEAN, STD = (255 * np.array(values, np.float32) for values in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
TABLE_HEAD = (
    *("model", "by", "threads", "batch", "ms a picture, median", "10-90 %"),
    *("x DeiT-S by pipeline", "x ours by pipeline"),
)

logger = logging.getLogger(__name__)

Classify = Callable[[list[str], int], list]  # files and batch size to one answer for each file


@dataclass(frozen=True)
class Contestant:
    """
    A model and the library that runs it.

    Args:
        file: the model's folder or ONNX file.
        load: `load(file, threads)` returns the function that classifies files.
    """

    model: str
    library: str
    file: Path
    load: Callable[[Path, int], Classify]
    batch_sizes: tuple[int, ...] = (1,)

    def __str__(self) -> str:
        return f"{self.model} by {self.library}"


def benchmark_pipeline(network: str, batch_sizes: list[int] | None, threads: list[int] | None, turns: int) -> dict:
    """
    Time a packed binary row of configs/ and its peers from files to labels, and whole processes from their start.

    Args:
        network: name of the row.
        batch_sizes: of transformers' pipeline, by default 1 and 16.
        threads: by default the CPUs of this process.
        turns: timed turns of each contestant, 2 or more. A turn classifies all pictures.

    Returns:
        A dictionary of

        - `pictures`, their number, `picture_bytes`, the size of the median file,
        - `results`, in the order of the table: `model`, `library`, `threads`, `batch_size`, `seconds` of a picture,
          `seconds_10_90`, `images_per_second`, and the speed divided by that of the fastest setting of DeiT-S
          (`ratio_to_peer`) and of the binary network (`ratio_to_pipeline`) in transformers' pipeline with the same threads
          (`None` between images of different sizes),
        - `processes`: see `benchmark_processes`.

    Raises:
        UserError: there is no such row, not enough memory, or a contestant fails.
    """
    check_binary_row(network)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        logger.info("preparing the models and %d pictures of %d x %d", PICTURES, WIDTH, HEIGHT)
        files = [folder / "pictures" / f"{index}.jpg" for index in range(PICTURES)]
        write_photographs(files, QUALITY)
        contestants = create_contestants(network, folder, tuple(batch_sizes or BATCH_SIZES))
        results = []
        for number in threads or [available_cpus()]:
            logger.info("from files to labels, %s", counted(number, "thread"))
            results += compete(contestants, list(map(str, files)), number, turns)
        in_onnx = [contestant.file for contestant in contestants if contestant.library == ONE_A_THREAD]
        return {
            "pictures": len(files),
            "picture_bytes": round(statistics.median(file.stat().st_size for file in files)),
            "results": results,
            "processes": benchmark_processes(in_onnx[0] if in_onnx else None, turns),
        }


def create_contestants(network: str, folder: Path, batch_sizes: tuple[int, ...]) -> list[Contestant]:
    """The contestants in the order of the table. Their files are written to `folder`."""
    ours, peer = save_row(network, folder / "packed", packed=True), save_row(PEER, folder / "peer")
    contestants = [
        Contestant(network, RUNTIME, ours, load_runtime),
        Contestant(network, PIPELINE, ours, load_pipeline, batch_sizes),
        Contestant(PEER, PIPELINE, peer, load_pipeline, batch_sizes),
    ]
    if not has_onnx_peers():
        return contestants
    from .onnx_peers import export_networks

    for name, _, file in export_networks(folder, only_int8=True):
        contestants += [
            Contestant(name, ONE_A_THREAD, file, load_one_a_thread),
            Contestant(name, THREADS_IN_BATCH, file, load_threads_in_batch, (ONNX_BATCH_SIZE,)),
        ]
    return contestants


def compete(contestants: list[Contestant], files: list[str], threads: int, turns: int) -> list[dict]:
    """Time all contestants with one number of threads. Returns `results` of `benchmark_pipeline`."""
    workers = [Worker(str(contestant), create_responder, contestant, files, threads) for contestant in contestants]
    settings = [
        (contestant, worker, batch_size)
        for contestant, worker in zip(contestants, workers)
        for batch_size in contestant.batch_sizes
    ]
    for _, worker, batch_size in with_progress(settings, "loading the contestants", len(settings)):
        worker.request((min(len(files), WARM_UP_PICTURES), batch_size))
    rounds = [
        [worker.request((len(files), size)) / len(files) for _, worker, size in settings]
        for _ in with_progress(range(turns), "turns of the contestants", turns)
    ]
    for worker in workers:
        worker.stop()
    results = [
        {
            "model": contestant.model,
            "library": contestant.library,
            "threads": threads,
            "batch_size": batch_size,
            **describe_seconds(times, 1),
        }
        for (contestant, _, batch_size), times in zip(settings, zip(*rounds))
    ]
    ours = contestants[0].model
    for result in results:
        for name, model in (("ratio_to_peer", PEER), ("ratio_to_pipeline", ours)):
            seconds = fastest_by_pipeline(results, model)
            result[name] = seconds / result["seconds"] if has_images_of(result["model"], model) else None
    return results


def fastest_by_pipeline(results: list[dict], model: str) -> float:
    """Seconds of a picture in the fastest setting of a model in transformers' pipeline."""
    return min(result["seconds"] for result in results if (result["model"], result["library"]) == (model, PIPELINE))


def create_responder(contestant: Contestant, files: list[str], threads: int) -> Callable[[tuple[int, int]], float]:
    """
    Load the contestant's model in its worker process.

    Returns:
        The function that classifies the first files, given their number and the batch size, and returns the seconds.
    """
    disable_progress_bar()
    logging.disable(logging.WARNING)
    classify = contestant.load(contestant.file, threads)

    def respond(message: tuple[int, int]) -> float:
        number, batch_size = message
        start = time.perf_counter()
        answers = classify(files[:number], batch_size)
        seconds = time.perf_counter() - start
        if len(answers) != number:
            raise ValueError(f"{number} files have {len(answers)} answers")
        return seconds

    return respond


def load_runtime(folder: Path, threads: int) -> Classify:
    classifier = Classifier.from_pretrained(folder, threads=threads)
    return lambda files, batch_size: classifier(files, top_k=TOP_K)


def load_pipeline(folder: Path, threads: int) -> Classify:
    torch.set_num_threads(threads)
    classifier = pipeline("image-classification", model=str(folder), device="cpu")
    return lambda files, batch_size: classifier(files, batch_size=batch_size, top_k=TOP_K)


def load_one_a_thread(file: Path, threads: int) -> Classify:
    """Each thread takes a picture from its file to its labels."""
    classify, pool = create_classifier(file, threads=1), ThreadPoolExecutor(threads)
    return lambda files, batch_size: list(pool.map(lambda name: classify(read_pixels(name)[None])[0], files))


def load_threads_in_batch(file: Path, threads: int) -> Classify:
    """All threads compute a batch, and others read the next pictures meanwhile."""
    classify, pool = create_classifier(file, threads), ThreadPoolExecutor(threads)

    def classify_files(files: list[str], batch_size: int) -> list:
        pixels, answers = pool.map(read_pixels, files), []
        while batch := list(islice(pixels, batch_size)):
            answers += classify(np.stack(batch))
        return answers

    return classify_files


def create_classifier(file: Path, threads: int) -> Callable[[np.ndarray], list]:
    """The function from `pixel_values` to the best classes of each picture and their scores, in onnxruntime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Threads that wait would take the cores from those that read pictures.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    (images,) = session.get_inputs()

    def classify(pixel_values: np.ndarray) -> list:
        (logits,) = session.run(None, {images.name: pixel_values})
        exponentials = np.exp(logits - logits.max(1, keepdims=True))
        scores = exponentials / exponentials.sum(1, keepdims=True)
        best = np.argsort(-scores, 1)[:, :TOP_K]
        return list(zip(best.tolist(), np.take_along_axis(scores, best, 1).tolist()))

    return classify


def read_pixels(name: str) -> np.ndarray:
    """`pixel_values` of a file with Pillow and numpy, `(3, CROP, CROP)`: the shorter side is resized, the centre cropped."""
    with Image.open(name) as opened:
        picture = opened.convert("RGB")
    scale = CROP / CROP_PCT / min(picture.size)
    width, height = (round(scale * side) for side in picture.size)
    left, top = (width - CROP) // 2, (height - CROP) // 2
    resized = picture.resize((width, height), Image.Resampling.BICUBIC)
    cropped = resized.crop((left, top, left + CROP, top + CROP))
    return np.ascontiguousarray(((np.asarray(cropped) - MEAN) / STD).transpose(2, 0, 1))


def format_pipeline(measured: dict) -> str:
    """The measurements of `benchmark_pipeline` as two tables for the terminal."""
    rows = [
        (
            result["model"],
            result["library"],
            str(result["threads"]),
            str(result["batch_size"]),
            f"{1000 * result['seconds']:.2f}",
            "-".join(f"{1000 * seconds:.2f}" for seconds in result["seconds_10_90"]),
            describe_ratio(result["ratio_to_peer"]),
            describe_ratio(result["ratio_to_pipeline"]),
        )
        for result in measured["results"]
    ]
    head = (
        f"From files to labels: {measured['pictures']} JPEGs of {WIDTH} x {HEIGHT}, "
        f"{readable(measured['picture_bytes'], 'B')} each"
    )
    return "\n".join([head, align_columns([TABLE_HEAD, *rows]), "", format_processes(measured["processes"])])

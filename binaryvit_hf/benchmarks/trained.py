"""Times of forwards of trained models on the CPU: packed ones on the engine, others in PyTorch."""

import logging
import statistics
from pathlib import Path

from transformers.utils import SAFE_WEIGHTS_NAME

from binaryvit_runtime.errors import counted

from ..loading import load_config
from .inference import (
    PEER_ENGINE,
    RUNTIME,
    Competitor,
    create_responder,
    load_in_pytorch,
    load_in_runtime,
    request_all,
    time_rounds,
)
from .interleaved import Worker


logger = logging.getLogger(__name__)


def time_trained(folders: dict[str, Path], turns: int = 15) -> dict[str, float]:
    """
    Time forwards of one image on one thread, the models in turns.

    Args:
        folders: of models, by name. A packed model runs in the runtime, another one in PyTorch in float32.
        turns: timed turns of each model, 1 or more.

    Returns:
        The median in seconds of each model, by name. Models that cannot be loaded are left out.
    """
    logger.info("timing forwards of %s, %s each", counted(len(folders), "model"), counted(turns, "turn"))
    competitors = [
        Competitor(name, RUNTIME, folder / SAFE_WEIGHTS_NAME, load_in_runtime)
        if hasattr(load_config(folder), "quantization_config")
        else Competitor(name, PEER_ENGINE, folder / SAFE_WEIGHTS_NAME, load_in_pytorch)
        for name, folder in folders.items()
    ]
    workers = {competitor: Worker(str(competitor), create_responder, competitor, 1) for competitor in competitors}
    request_all(workers, "ready")  # loading takes the CPU, so all of it comes before the first measurement
    seconds = time_rounds(workers, 1, turns)
    for worker in workers.values():
        worker.stop()
    return {competitor.model: statistics.median(times) for competitor, times in seconds.items()}

"""Loads a packed model from its folder: config.json, preprocessor_config.json and weights, with all checks."""

import contextlib
import importlib.util
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from . import engine
from .architecture import Architecture, count_multiplications, read_architecture, read_labels
from .checkpoint import PREFIX, checkpoint_files, load_tensors
from .cpus import largest_team
from .engine.library import pair
from .engine.preprocessing import CHANNELS, Preprocessor
from .errors import LoadingError, UnsupportedModelError, UserError, first_sentence
from .pixels import read_background
from .resources import HUB_CLIENT
from .sources import describe_neighbours


CONFIG, PROCESSOR = "config.json", "preprocessor_config.json"
NESTED_PROCESSOR = "processor_config.json"  # transformers prefers an image processor in it
ADAPTER = "adapter_config.json"  # of PEFT, which changes what transformers computes
ENGINE_VARIABLE, TORCH = "BINARYVIT_ENGINE", "torch"
MAX_VALUE, MIN_CONTRAST = 1e4, 1e-3  # of a normalised picture; without normalisation, values go up to 255
MAX_RESIZED = 2**14  # pixels of a side before the crop


@dataclass
class PackedModel:
    """
    What classifies a picture.

    Args:
        architecture: of the network.
        network: computes the backbone.
        head: weight `(num_labels, channels)` and bias `(num_labels,)` of the classifier.
        labels: the label of each logit.
        to_scores: turns logits into scores.
        preprocessor: turns pictures into `pixel_values`.
        background: the colour to put behind transparent pixels, `None` to drop transparency.
    """

    architecture: Architecture
    network: engine.Engine
    head: tuple[np.ndarray, np.ndarray]
    labels: list[str]
    to_scores: Callable[[np.ndarray], np.ndarray]
    preprocessor: Preprocessor
    background: str | None


def load_packed_model(folder: Path, name: str, kernels: str) -> PackedModel:
    """
    Args:
        name: the user's name for the model, for messages.
        kernels: of the engine.

    Raises:
        FileNotFoundError: the folder has no config.json.
        LoadingError: the model is damaged. The message has its name.
        UnsupportedModelError: only PyTorch computes this model.
    """
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"it has no {CONFIG}")
    with named_errors(f"The config of {name!r} cannot be loaded", name):
        if (folder / ADAPTER).exists():
            raise UnsupportedModelError(f"it has an adapter ({ADAPTER})")
        config = read_json(folder / CONFIG)
        architecture, labels = read_architecture(config), read_labels(config)
        to_scores = score_function(config, len(labels))
    with named_errors(f"The image processor of {name!r} ({PROCESSOR}) cannot be used", name):
        if (folder / NESTED_PROCESSOR).is_file():
            raise UnsupportedModelError(f"its image processor is in {NESTED_PROCESSOR}, not in {PROCESSOR}")
        fields = read_json(folder / PROCESSOR)
        preprocessor, background = read_preprocessor(fields, architecture), read_background(fields)
    with named_errors(f"The weights of {name!r} cannot be loaded", name):
        tensors = load_tensors(checkpoint_files(folder), architecture, len(labels))
        backbone = {
            tensor_name.removeprefix(PREFIX): tensor
            for tensor_name, tensor in tensors.items()
            if tensor_name.startswith(PREFIX) and tensor.dtype != np.int64
        }
        network = engine.Engine(architecture, backbone, kernels)
        network.limit_team(largest_team(count_multiplications(architecture)))
    head = (np.ascontiguousarray(tensors["classifier.weight"]), np.ascontiguousarray(tensors["classifier.bias"]))
    return PackedModel(architecture, network, head, labels, to_scores, preprocessor, background)


@contextlib.contextmanager
def named_errors(subject: str, name: str) -> Iterator[None]:
    """
    Raises:
        LoadingError: `subject: message` of an error in this context.
        UnsupportedModelError: with the name of the model.
    """
    try:
        yield
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"The model {name!r} needs PyTorch: {error}.") from error
    except (UserError, FileNotFoundError, ValueError, MemoryError) as error:
        raise LoadingError(f"{subject}: {error}") from error


def read_json(file: Path) -> Any:
    """
    Raises:
        LoadingError: there is no such file, or it is damaged.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise LoadingError("there is no such file.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise LoadingError(f"{file.name} is damaged: {first_sentence(error)}") from error


def read_preprocessor(fields: Any, architecture: Architecture) -> Preprocessor:
    """
    The preprocessing of a preprocessor_config.json, tried on an oblong picture that is half black, half white.

    Raises:
        UnsupportedModelError: it asks for a step that only transformers has.
        LoadingError: its picture does not have the network's size, or black and white do not become different numbers.
    """
    if not isinstance(fields, dict):
        raise LoadingError("it is not a JSON object.")
    # `check_sizes` of the model loader for PyTorch checks these fields, also if a switch such as do_resize is false.
    for field in ("size", "crop_size", "pad_size"):
        value = fields.get(field)
        numbers = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
        if any(isinstance(number, (int, float)) and not 1 <= number <= MAX_RESIZED for number in numbers):
            raise LoadingError(f"{field} must be from 1 to {MAX_RESIZED}, not {value}.")
        if not all(number is None or isinstance(number, int) for number in numbers):
            raise UnsupportedModelError(f"its image processor has {field}={value!r}")
    for field in ("pad_size", "backend"):
        if fields.get(field) is not None:
            raise UnsupportedModelError(f"its image processor has {field}={fields[field]!r}")
    if fields.get("auto_map", {}) is None:
        raise LoadingError("auto_map must be an object, not null.")
    try:
        preprocessor = Preprocessor(fields)
    except ValueError as error:
        raise UnsupportedModelError(str(error).rstrip(".")) from error
    except RuntimeError as error:
        raise UnsupportedModelError(first_sentence(error).rstrip(".")) from error
    picture = np.zeros((64, 96, CHANNELS), np.uint8)
    picture[:, 48:] = 255
    expected = (architecture.num_channels, *pair(architecture.image_size))
    check_image_shape((CHANNELS, *preprocessor.output_size(*picture.shape[:2])), expected)
    check_pixel_values(preprocessor(picture), None)
    return preprocessor


def check_image_shape(shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """
    Raises:
        LoadingError: the images of a processor do not have the shape `(channels, height, width)` of the network's.
    """
    if shape != expected:
        raise LoadingError(f"it makes images of (channels, height, width) {shape}, the network takes {expected}.")


def check_pixel_values(pixels: np.ndarray, expected: tuple[int, ...] | None) -> None:
    """
    Check the `pixel_values` `(channels, height, width)` of a picture that is half black, half white.

    Args:
        expected: shape of the network's images, or `None` for any.

    Raises:
        LoadingError: they have another shape, or black and white do not become different finite numbers.
    """
    if expected is not None:
        check_image_shape(pixels.shape, expected)
    least, most = pixels.min((1, 2)), pixels.max((1, 2))
    # `not` also refuses NaN, because its comparisons are false.
    if not ((least >= -MAX_VALUE) & (most <= MAX_VALUE) & (most - least >= MIN_CONTRAST)).all():
        raise LoadingError(
            f"it turns black and white into numbers from {least.min():g} to {most.max():g}: check its rescale_factor, "
            "image_mean and image_std."
        )


def score_function(config: dict, labels: int) -> Callable[[np.ndarray], np.ndarray]:
    """Logits to scores, as the pipeline of transformers chooses."""
    if config.get("problem_type") == "regression":
        return as_they_are
    return sigmoid if config.get("problem_type") == "multi_label_classification" or labels == 1 else softmax


def as_they_are(logits: np.ndarray) -> np.ndarray:
    return logits


def sigmoid(logits: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # the score of a large negative logit is 0
        return 1.0 / (1.0 + np.exp(-logits))


def softmax(logits: np.ndarray) -> np.ndarray:
    exponentials = np.exp(logits - logits.max())
    return exponentials / exponentials.sum()


def choose_kernels() -> str:
    """
    The engine's kernels for this CPU, or those that BINARYVIT_ENGINE forces.

    Raises:
        UnsupportedModelError: the engine cannot be used, or BINARYVIT_ENGINE forces PyTorch.
        UserError: BINARYVIT_ENGINE names kernels that this machine does not have.
    """
    wanted, here = os.environ.get(ENGINE_VARIABLE) or None, engine.kernels_here()
    if wanted == TORCH:
        raise UnsupportedModelError(f"{ENGINE_VARIABLE} is {TORCH!r}, which needs PyTorch.")
    if wanted is not None and wanted not in here:
        names = [*here, *([TORCH] if importlib.util.find_spec(TORCH) else [])]
        raise UserError(f"{ENGINE_VARIABLE} is {wanted!r}, but this machine has {', '.join(names) or 'no engine'}.")
    if not here:
        raise UnsupportedModelError(f"There is no engine: {engine.problem()}.")
    return wanted or here[0]


def check_engine_variable() -> None:
    """
    Raises:
        UserError: BINARYVIT_ENGINE names kernels that this machine does not have.
    """
    with contextlib.suppress(UnsupportedModelError):  # PyTorch computes instead
        choose_kernels()


def local_folder(source: str, token: str | None, revision: str | None, cache_dir: str | None) -> Path:
    """The folder of a model on this machine. A model of the Hub is downloaded into the local cache first."""
    if os.path.exists(source):
        return Path(source)
    try:
        from huggingface_hub import snapshot_download

        from . import hub  # noqa: F401 -- what explains errors of the Hub, and an old version of its client lacks
    except ImportError as error:
        raise LoadingError(
            f"There is no folder {source!r}{describe_neighbours(source) or '.'} Models of the Hub need "
            f"{HUB_CLIENT}: pip install {HUB_CLIENT}."
        ) from error
    patterns = [CONFIG, PROCESSOR, NESTED_PROCESSOR, ADAPTER, "model*.safetensors", "model.safetensors.index.json"]
    return Path(
        snapshot_download(source, token=token, revision=revision, cache_dir=cache_dir, allow_patterns=patterns)
    )

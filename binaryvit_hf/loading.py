"""
Load configs, models and image processors from folders and the Hub, and check them.

Every failure is a `LoadingError` of one sentence. Sizes are checked before memory is allocated. Weights must be finite.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    BaseImageProcessor,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import (
    CONFIG_NAME,
    IMAGE_PROCESSOR_NAME,
    PROCESSOR_NAME,
    SAFE_WEIGHTS_NAME,
    cached_file,
    logging,
)

from binaryvit_runtime import sources
from binaryvit_runtime.errors import LoadingError, first_sentence
from binaryvit_runtime.packed_model import MAX_RESIZED, check_pixel_values
from binaryvit_runtime.pixels import read_background
from binaryvit_runtime.resources import find_source
from binaryvit_runtime.sources import describe_fault

from .network.configuration_binaryvit import MAX_LABELS, MAX_PARAMETERS, as_pair, check_labels
from .network.quantization_binaryvit import at_stored_image_size


# Bounds for configs of other model types, by the field names of transformers. BinaryViTConfig has its own bounds.
MAX_FIELDS = {
    "num_hidden_layers": 1000,
    "depths": 1000,
    "hidden_size": 2**16,
    "hidden_sizes": 2**16,
    "intermediate_size": 2**18,
    "num_attention_heads": 2**10,
    "num_channels": 2**10,
    "image_size": 2**14,
    "patch_size": 2**14,
    "encoder_stride": 2**14,
    "pooler_output_size": 2**16,
    "num_classes": MAX_LABELS,
}


def load_config(source: str | Path, shipped: Iterable[str] = (), **arguments) -> PreTrainedConfig:
    """
    Load a config and check the bounds of its sizes (`AutoConfig.from_pretrained`).

    Args:
        source: as of a model, or the config's JSON file.
        shipped: names that the user could have given beside those of the shipped models, to suggest one.

    Raises:
        LoadingError: there is no config, or it describes no network.
    """

    def load(source, trust_remote_code, **arguments):
        subfolder = arguments.get("subfolder", "")
        fields = PreTrainedConfig.get_config_dict(source, **arguments)[0]
        is_file = Path(source).is_file() or Path(source, subfolder, "config.json").exists()
        if not fields and not is_file:  # what transformers returns if a folder or a repository lacks the file
            raise LoadingError(f"it has no config.json{f' in {subfolder!r}' if subfolder else ''}")
        check_fields(fields)  # before AutoConfig creates a label for each of `num_labels`
        return read_config(source, trust_remote_code, **arguments)

    return fetch(load, source, shipped, of_config=True, **arguments)


def read_config(source: str | Path, trust_remote_code: bool, **arguments) -> PreTrainedConfig:
    """
    `AutoConfig.from_pretrained`, after which timm can build the networks of `small_networks`.

    Raises:
        LoadingError: timm is needed and not installed.
    """
    config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code, **arguments)
    if config.model_type == "timm_wrapper":
        try:
            from . import small_networks  # noqa: F401 -- registers them
        except ModuleNotFoundError as error:
            raise LoadingError(f"it is a network of {error.name!r}: pip install {error.name}.") from error
    return config


def build_classifier(config: PreTrainedConfig, **arguments) -> PreTrainedModel:
    """
    Create a network with random weights (`AutoModelForImageClassification.from_config`).

    Raises:
        LoadingError: the config describes no network.
    """
    try:
        return AutoModelForImageClassification.from_config(config, **arguments)
    except Exception as error:  # layers may raise anything
        raise LoadingError(f"no network can be built from the config: {first_sentence(error)}") from error


def load_classifier(source: str | Path, **arguments) -> PreTrainedModel:
    """
    Load a model (`AutoModelForImageClassification.from_pretrained`). Its checkpoint must hold every tensor.

    Raises:
        LoadingError: there is no such model, it is damaged or incomplete, or a tensor is not finite.
    """
    return load_complete(fetch_classifier, source, **arguments)


def load_complete(fetch_model: Callable, source: str | Path, **arguments) -> PreTrainedModel:
    """
    Call `fetch_model(source, **arguments)`, which returns a model and its `loading_info`, and return the model.

    Raises:
        LoadingError: a tensor is missing in the checkpoint, or one in a checkpoint of ours is not in the network.
    """
    with without_load_report():
        model, info = fetch_model(source, **arguments)
    if info["missing_keys"]:
        raise LoadingError(f"the checkpoint lacks the tensor {min(info['missing_keys'])!r}.")
    if info["unexpected_keys"] and model.config.model_type == "binaryvit":
        raise LoadingError(f"the network of the config has no tensor {min(info['unexpected_keys'])!r}.")
    return model


@contextlib.contextmanager
def without_load_report() -> Iterator[None]:
    """Hide the table of tensors that do not fit, which transformers prints. `loading_info` has the same."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def fetch_classifier(source: str | Path, **arguments) -> tuple[PreTrainedModel, dict]:
    """
    Load a model whose checkpoint may be incomplete: missing tensors get random values.

    Returns:
        The model, and transformers' `loading_info` with the names of missing and unexpected tensors.

    Raises:
        LoadingError: there is no such model, or it is damaged.
    """

    def load(source, **arguments):
        where = {name: arguments[name] for name in ("cache_dir", "token", "subfolder") if name in arguments}
        config = arguments.get("config") or read_config(source, arguments["trust_remote_code"], **where)
        if not arguments.get("ignore_mismatched_sizes"):
            check_shapes(source, config, **where)
        model, info = AutoModelForImageClassification.from_pretrained(source, output_loading_info=True, **arguments)
        check_finite(model)
        return model, info

    return fetch(load, source, **arguments)


def load_image_processor(
    source: str | Path, config: PreTrainedConfig | None = None, **arguments
) -> BaseImageProcessor | None:
    """
    Load an image processor and check the bounds of its sizes and its background. `None` if there is no image processor.

    Args:
        config: of the network that takes the images. If given, the processor is tried on a picture.

    Raises:
        LoadingError: it is damaged, or its images do not fit the network.
    """

    def load(source, trust_remote_code, **arguments):
        try:
            processor = AutoImageProcessor.from_pretrained(source, trust_remote_code=trust_remote_code, **arguments)
        except Exception:  # missing or damaged
            if any(has_file(source, name, arguments) for name in (IMAGE_PROCESSOR_NAME, PROCESSOR_NAME)):
                raise
            return None
        check_sizes(processor)
        read_background(processor)  # raises its error now
        if config is not None:
            check_image_processor(processor, config)
        return processor

    if describe_fault(find_source(str(source))):
        return None
    return fetch(load, source, **arguments)


def has_config(source: str | Path, **arguments) -> bool:
    """Whether a folder or repository has a config.json. Arguments as for `load_config`."""
    arguments.pop("trust_remote_code", None)
    return has_file(find_source(str(source)), CONFIG_NAME, arguments)


def has_file(source: str, name: str, arguments: dict) -> bool:
    """Whether a folder or repository has a file. `True` if this is unknown, for example without a connection."""
    try:
        return cached_file(source, name, _raise_exceptions_for_missing_entries=False, **arguments) is not None
    except OSError:
        return True


def fetch(load: Callable, source: str | Path, shipped: Iterable[str] = (), of_config: bool = False, **arguments):
    """
    Call `load(source, **arguments)`. `source` may be the name of a shipped model. See `binaryvit_runtime.sources.fetch`.

    Raises:
        NoModelError: `source` is no model, as far as this machine knows. The Hub was not asked.
        LoadingError: `load` raised anything.
    """
    arguments = {"trust_remote_code": False} | arguments  # with None, transformers asks the user on the terminal
    return sources.fetch(
        lambda found: load(found, **arguments),
        str(source),
        shipped,
        arguments.get("cache_dir"),
        arguments.get("subfolder", ""),
        of_config,
    )


def check_fields(fields: dict) -> None:
    """
    Raises:
        LoadingError: a config.json has no model type, or a field above its bound.
    """
    if not isinstance(fields, dict) or not isinstance(fields.get("model_type"), str):
        raise LoadingError("config.json is not a JSON object with the name of a model type ('model_type').")
    check_labels(fields.get("id2label"), fields.get("num_labels"))
    if fields["model_type"] == "binaryvit":
        return
    for name, most in MAX_FIELDS.items():
        value = fields.get(name)
        numbers = value if isinstance(value, list) else [value]
        if len(numbers) > 1000 or any(isinstance(number, (int, float)) and not number <= most for number in numbers):
            raise LoadingError(f"{name} of config.json has values above {most}.")
    sizes: list[Any] = [fields.get(name) for name in ("num_hidden_layers", "hidden_size", "intermediate_size")]
    if all(isinstance(number, int) for number in sizes):
        layers, width, inner = sizes
        parameters = layers * width * (4 * width + 2 * inner)
        if parameters > MAX_PARAMETERS:
            raise LoadingError(f"the network has {parameters:.1e} weights; {MAX_PARAMETERS:.0e} are the most.")


def check_shapes(source: str, config: PreTrainedConfig, **where) -> None:
    """
    Compare the shapes in a latent checkpoint of ours with the config, before the network takes memory.

    Args:
        where: `cache_dir`, `token` and `subfolder` of `from_pretrained`.

    Raises:
        LoadingError: a tensor has another shape than in the network of the config.
    """
    if config.model_type != "binaryvit" or getattr(config, "quantization_config", None):
        return  # the quantizer checks packed weights
    file = cached_file(source, SAFE_WEIGHTS_NAME, _raise_exceptions_for_missing_entries=False, **where)
    if file is None:  # a sharded checkpoint or another format
        return
    # from_pretrained resizes the position embeddings of another image size.
    config = at_stored_image_size(type(config), source, {"config": config} | where)[0]["config"]
    with torch.device("meta"):
        expected = build_classifier(config).state_dict()
    try:
        with safe_open(file, framework="pt") as stored:
            # A file handle cannot be iterated.
            shapes = {name: stored.get_slice(name).get_shape() for name in stored.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise LoadingError(f"{SAFE_WEIGHTS_NAME} is damaged: {first_sentence(error)}") from error
    for name, shape in shapes.items():
        if name in expected and shape != list(expected[name].shape):
            raise LoadingError(
                f"tensor {name!r} has the shape {shape}, the network of the config has {list(expected[name].shape)}."
            )


def check_finite(model: PreTrainedModel) -> None:
    """
    Raises:
        LoadingError: a tensor has values that are not finite.
    """
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise LoadingError(
                f"tensor {name!r} has values that are not finite: it is damaged, or its training diverged."
            )


def check_sizes(processor: BaseImageProcessor) -> None:
    """
    Raises:
        LoadingError: a size is not from 1 to `MAX_RESIZED`.
    """
    for name in ("size", "crop_size", "pad_size"):
        value = processor.to_dict().get(name)
        numbers = value.values() if isinstance(value, dict) else [value]
        if not all(number is None or (isinstance(number, int) and 1 <= number <= MAX_RESIZED) for number in numbers):
            raise LoadingError(f"{name} must be from 1 to {MAX_RESIZED}, not {value}.")


def check_image_processor(processor: BaseImageProcessor, config: PreTrainedConfig) -> None:
    """
    Try a processor on an oblong picture that is half black, half white.

    Raises:
        LoadingError: it fails, its image does not have the network's size, or black and white do not become different
            finite numbers.
    """
    picture = Image.new("RGB", (96, 64))
    picture.paste((255, 255, 255), (48, 0, 96, 64))
    try:
        images = processor(picture, return_tensors="pt")["pixel_values"]
    except Exception as error:  # unusual settings may raise anything
        raise LoadingError(f"it fails: {first_sentence(error)}") from error
    expected = None
    if config.model_type in ("binaryvit", "vit"):
        size = getattr(config, "image_size", None) or images.shape[-2:]
        expected = (getattr(config, "num_channels", 3), *as_pair(size))
    check_pixel_values(images[0].cpu().numpy(), expected)

"""Find and load the models that users name. Imports transformers: commands import this inside of `run`."""

import os
from pathlib import Path

from transformers import BaseImageProcessor, PreTrainedConfig, PreTrainedModel

from binaryvit_hf.loading import load_classifier, load_config, load_image_processor
from binaryvit_runtime.errors import LoadingError, NoModelError, UserError
from binaryvit_runtime.progress import Progress


def find_model(name: str, token: str | None, shipped: dict[str, Path]) -> tuple[str, PreTrainedConfig]:
    """
    Resolve a name to a folder, to a shipped config or model, or to an id of the Hub, in this order.

    Args:
        shipped: folders that come with the package, by name.

    Returns:
        The source to load from (a path or an id of the Hub), and its config.

    Raises:
        UserError: there is no such model, or its config is damaged.
    """
    source = name if os.path.exists(name) else str(shipped.get(name, name))
    try:
        with Progress(f"Looking for {name!r}"):
            return source, load_config(source, shipped, token=token)
    except NoModelError as error:
        raise UserError(f"The model {name!r} cannot be loaded: {error}") from error
    except LoadingError as error:
        if os.path.isfile(os.path.join(source, "config.json")):
            raise UserError(f"The config of {name!r} cannot be loaded: {error}") from error
        raise UserError(
            f"The model {name!r} cannot be loaded ({str(error).rstrip('.')}); a model is a folder with a config.json, "
            f"an id of the Hub, or one of {', '.join(sorted(shipped))}."
        ) from error


def load_model(
    name: str, source: str, token: str | None, **kwargs
) -> tuple[PreTrainedModel, BaseImageProcessor | None]:
    """
    Load the image classifier in `source` and its image processor, which is `None` if there is none.

    Args:
        name: the user's name for the model, for messages.
        kwargs: of `from_pretrained` of the model.

    Raises:
        UserError: weights are missing or damaged, or the image processor is damaged or does not fit the network.
    """
    try:
        with Progress(f"Loading the weights of {name!r}"):
            model = load_classifier(source, token=token, **kwargs)
    except LoadingError as error:
        raise UserError(f"The weights of {name!r} cannot be loaded: {error}") from error
    try:
        return model, load_image_processor(source, model.config, token=token)
    except LoadingError as error:
        raise UserError(
            f"The image processor of {name!r} (preprocessor_config.json) cannot be used: {error}"
        ) from error

"""Load a model to train. Packed weights become latent ones: those in the folder `latent`, or new ones from the bits."""

import copy
import logging
from pathlib import Path

from transformers import PreTrainedConfig, PreTrainedModel

from binaryvit_runtime.errors import LoadingError

from .. import loading
from ..network.quantization_binaryvit import LATENT


logger = logging.getLogger(__name__)


def load_trainable(source: str | Path, **arguments) -> PreTrainedModel:
    """`fetch_trainable` of a checkpoint that holds every tensor; raises LoadingError if it does not."""
    return loading.load_complete(fetch_trainable, source, **arguments)


def fetch_trainable(
    source: str | Path, config: PreTrainedConfig | None = None, subfolder: str = "", **arguments
) -> tuple[PreTrainedModel, dict]:
    """
    Load a classifier to train (`loading.fetch_classifier`). Logs where the latent weights of a packed one come from.

    Args:
        config: of the classifier, without quantization_config. Default: the stored one.
        subfolder: folder of the source to load from.

    Raises:
        LoadingError: there is no such model, or it is damaged.
    """
    where = {name: arguments[name] for name in ("cache_dir", "token", "trust_remote_code") if name in arguments}
    stored = loading.load_config(source, subfolder=subfolder, **where)
    if config is not None:
        arguments["config"] = config
    packing = getattr(stored, "quantization_config", None)
    if packing is None:
        return loading.fetch_classifier(source, subfolder=subfolder, **arguments)
    latent = f"{subfolder}/{LATENT}" if subfolder else LATENT
    if loading.has_config(source, subfolder=latent, **where):
        logger.info("%s is packed. Training starts from its latent weights in the folder %r.", source, latent)
        return loading.fetch_classifier(source, subfolder=latent, **arguments)
    arguments["config"] = copy.deepcopy(config or stored)
    arguments["config"].quantization_config = packing
    arguments.pop("dtype", None)  # packed weights have their own
    model, info = loading.fetch_classifier(source, subfolder=subfolder, **arguments)
    logger.info(
        "%s is packed and has no folder %r. Training starts from latent weights made from its bits.", source, latent
    )
    try:
        return model.dequantize(latent=True), info
    except ValueError as error:
        raise LoadingError(str(error)) from error

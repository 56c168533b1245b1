"""
Training in two stages: binary activations first, then binary weights too, from the weights of the first (ReActNet, Liu et
al., ECCV 2020; Real-to-Binary, Martinez et al., ICLR 2020). A stage is a config with some fields changed; the second begins
with the first's latent weights.
"""

import difflib
import json
import logging
import re

import torch
from torch import nn
from transformers import PreTrainedConfig

from ..errors import LoadingError, UserError, first_sentence
from ..loading import fetch_classifier, load_config
from ..network.quantization_binaryvit import LATENT


# What a network of other bits, or of another row, has or has not. It begins as a new network's does.
ONLY_IN_ONE = re.compile(
    r"\.attention\.probability_clip$|\.avg_pool_branches\.|\.layer_scale[12]\."
    r"|\.patch_embeddings\.(norm2|norm_activation)\.|\.patch_embeddings\.projection\.shift$"
)

logger = logging.getLogger(__name__)


def override_config(config: PreTrainedConfig, overrides: str) -> PreTrainedConfig:
    """
    A config with some fields changed, "weight_bits=32,depths=[2, 2]": names and JSON values.

    Raises:
        UserError: an unknown field, no value, or what the config's own checks refuse.
    """
    fields, known = {}, list(type(config).__annotations__)
    for part in re.split(r",(?=\s*\w+\s*=)", overrides):  # not the commas of a list
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals:
            raise UserError(f"--config_overrides is NAME=VALUE,…; {part.strip()!r} is not.")
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            raise UserError(
                f"--config_overrides: the config has no field {name!r}"
                + (f"; did you mean {close[0]!r}?" if close else ".")
            )
        try:
            fields[name] = json.loads(value.lower() if value in ("True", "False") else value)
        except ValueError:
            raise UserError(f"--config_overrides: {name}={value} is no number, list, true or false.") from None
    try:
        return type(config).from_dict(config.to_dict() | fields)
    except Exception as error:  # the checks of each config raise what they like
        raise UserError(f"--config_overrides {overrides!r}: {first_sentence(error)}") from error


def load_first_stage(source: str, **hub_arguments) -> nn.Module:
    """
    A trained model with its latent weights, from a folder or from the Hub: its own, or, where those are packed, those in
    its folder `latent`.

    Raises:
        UserError: it cannot be loaded, is incomplete, or is packed without latent weights beside it.
    """
    subfolder = ""
    try:
        if getattr(load_config(source, **hub_arguments), "quantization_config", None):
            subfolder = LATENT
        model, loading_info = fetch_classifier(source, subfolder=subfolder, dtype=torch.float32, **hub_arguments)
    except LoadingError as error:
        packed = f" is packed, and its latent weights in {LATENT!r}" if subfolder else ""
        raise UserError(f"--init_from {source!r}{packed} cannot be loaded: {error}") from error
    if missing := loading_info["missing_keys"]:
        raise UserError(f"--init_from {source!r} lacks the tensor {min(missing)!r} of its own network.")
    return model


def first_stage_weights(first: nn.Module, network: nn.Module, source: str) -> dict[str, torch.Tensor]:
    """
    What a new network takes over of a model: every tensor but those of `ONLY_IN_ONE`, which the log tells. The network may
    be on the meta device.

    Raises:
        UserError: another tensor is in one of them only, or has another shape.
    """
    ours, theirs = network.state_dict(), first.state_dict()
    for name, tensor in ours.items():
        if name in theirs and theirs[name].shape != tensor.shape:
            raise UserError(
                f"--init_from {source!r}: tensor {name!r} is {tuple(theirs[name].shape)} there and {tuple(tensor.shape)} "
                "in the new network; the two must have the same shapes."
            )
    new, left = sorted(ours.keys() - theirs.keys()), sorted(theirs.keys() - ours.keys())
    for names, who, other in ((new, "the new network", "it"), (left, "it", "the new network")):
        if strange := [name for name in names if not ONLY_IN_ONE.search(name)]:
            raise UserError(
                f"--init_from {source!r}: {who} has the tensor {strange[0]!r}, {other} has not ({len(strange)} such in all); "
                "the two must be of the same shape."
            )
    logger.info(
        "Begins with %d tensors of %s; new: %s; left there: %s",
        len(ours) - len(new),
        source,
        ", ".join(new) or "none",
        ", ".join(left) or "none",
    )
    return {name: tensor for name, tensor in theirs.items() if name in ours}

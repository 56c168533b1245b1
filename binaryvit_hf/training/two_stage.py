"""
Training in two stages: first binary activations only, then binary weights too, starting from the first stage's latent
weights (ReActNet, Liu et al., ECCV 2020; Real-to-Binary, Martinez et al., ICLR 2020). A stage is a config with some fields
changed.
"""

import json
import logging
import re
import shlex

import torch
from torch import nn
from transformers import PreTrainedConfig

from binaryvit_runtime.errors import LoadingError, UserError, counted, did_you_mean, first_sentence

from ..network.configuration_binaryvit import as_pair
from .latent_weights import load_trainable


# Tensors that networks of other bits or of another row may have or lack. They keep a new network's initial values.
ONLY_IN_ONE = re.compile(
    r"\.attention\.probability_clip$|\.avg_pool_branches\.|\.layer_scale[12]\."
    r"|\.patch_embeddings\.(norm2|norm_activation)\.|\.patch_embeddings\.projection\.shift$"
)

logger = logging.getLogger(__name__)


def override_config(config: PreTrainedConfig, overrides: str) -> PreTrainedConfig:
    """
    Change fields of a config.

    Args:
        overrides: names and JSON values, such as "weight_bits=32,depths=[2, 2]".

    Raises:
        UserError: a field is unknown, has no value, or fails the config's own checks.
    """
    fields, known = {}, list(type(config).__annotations__)
    for part in re.split(r",(?=\s*\w+\s*=)", overrides):  # no NAME= follows a comma inside a list
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals:
            raise UserError(f"--config_overrides takes NAME=VALUE,…: {part.strip()!r} is not of this form.")
        if name not in known:
            raise UserError(f"--config_overrides: the config has no field {name!r}{did_you_mean(name, known)}")
        try:
            fields[name] = json.loads(value.lower() if value in ("True", "False") else value)
        except ValueError:
            raise UserError(f"--config_overrides: {name}={value} must be a number, a list, true or false.") from None
    try:
        return type(config).from_dict(config.to_dict() | fields)
    except Exception as error:  # configs raise any kind of error
        raise UserError(f"--config_overrides {overrides!r}: {first_sentence(error)}") from error


def load_first_stage(source: str, **hub_arguments) -> nn.Module:
    """
    Load a trained model with its latent weights from a folder or the Hub (`fetch_trainable`).

    Raises:
        UserError: it cannot be loaded, or lacks tensors.
    """
    try:
        return load_trainable(source, dtype=torch.float32, **hub_arguments)
    except LoadingError as error:
        raise UserError(f"--init_from {source!r} cannot be loaded: {error}") from error


def resize_first_stage(first: nn.Module, config: PreTrainedConfig, source: str) -> None:
    """
    Resize the position embeddings of a first stage for the images of a new network, if these have another size.

    Args:
        config: of the new network.
        source: the first stage's name, for messages.

    Raises:
        UserError: the first stage cannot take images of that size.
    """
    if not first.config.model_type == config.model_type == "binaryvit":
        return
    before, after = as_pair(first.config.image_size), as_pair(config.image_size)
    if before == after or as_pair(first.config.patch_size) != as_pair(config.patch_size):
        return
    try:
        first.resize_position_embeddings(config.image_size)
    except ValueError as error:
        raise UserError(f"--init_from {source!r}: {first_sentence(error)}") from error
    logger.info("Resized the position embeddings of %s from images of %d x %d to %d x %d.", source, *before, *after)


def first_stage_weights(first: nn.Module, network: nn.Module, source: str) -> dict[str, torch.Tensor]:
    """
    The tensors that a new network takes over from a first stage. Logs those that only one of them has.

    Args:
        network: the new network; it may be on the meta device.
        source: the first stage's name, for messages.

    Raises:
        UserError: a tensor's shape differs, or only one of them has a tensor that `ONLY_IN_ONE` does not match.
    """
    ours, theirs = network.state_dict(), first.state_dict()
    same_network = f"For its network, give --config_name {shlex.quote(source)}."
    for name, tensor in ours.items():
        if name in theirs and theirs[name].shape != tensor.shape:
            raise UserError(
                f"--init_from {source!r}: tensor {name!r} is {tuple(theirs[name].shape)} there and {tuple(tensor.shape)} "
                f"in the new network; the two must have the same shapes. {same_network}"
            )
    new, unused = sorted(ours.keys() - theirs.keys()), sorted(theirs.keys() - ours.keys())
    for names, owner, other in ((new, "the new network", "it"), (unused, "it", "the new network")):
        if unknown := [name for name in names if not ONLY_IN_ONE.search(name)]:
            raise UserError(
                f"--init_from {source!r}: {owner} has {counted(len(unknown), 'tensor')} that {other} lacks, such as {unknown[0]!r}; "
                f"the two must have the same depths and parts. {same_network}"
            )
    logger.info(
        "Initialised %s from %s; new: %s; unused: %s",
        counted(len(ours) - len(new), "tensor"),
        source,
        ", ".join(new) or "none",
        ", ".join(unused) or "none",
    )
    return {name: tensor for name, tensor in theirs.items() if name in ours}

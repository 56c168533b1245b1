"""Every check of a run that needs no training, and the inputs that it leaves for the run."""

import json
import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import (
    BaseImageProcessor,
    PreTrainedConfig,
)

from ..argument_checks import check_supported
from ..data.image_checks import check_images
from ..data.label_names import compare_labels, match_labels
from ..data.loading import load_images, relabel
from ..data.streaming import ImageSplits
from ..errors import (
    UserError,
)
from ..hub import create_repository
from ..writing import check_writable
from .arguments import (
    ModelArguments,
    Phase,
    compare_with_recorded,
    is_finished,
)
from .batch_checks import check_batches
from .checkpoints import describe_damage, last_whole_checkpoint
from .models import (
    build_meta_network,
    load_config,
    load_first_weights,
    load_processor,
)
from .unused_arguments import warn_of_unused


logger = logging.getLogger(__name__)


@dataclass
class Inputs:
    """What a run needs that can be checked before any training: images, network, and what the output directory holds."""

    images: ImageSplits
    broken: list[str]
    config: PreTrainedConfig
    checkpoint: str | None
    finished: bool
    processor: BaseImageProcessor | None
    first_weights: dict[str, torch.Tensor] | None
    new_head: bool | None  # None of a model that is not trained


def prepare(phase: Phase) -> Inputs:
    model_arguments, data_arguments, training_arguments = phase
    config = load_config(model_arguments, training_arguments.do_train)
    if training_arguments.do_train:
        training_arguments.check_network(config)
        network = build_meta_network(model_arguments, config)
    images = load_images(
        data_arguments,
        training_arguments.seed,
        model_arguments.cache_dir,
        model_arguments.token,
        test=training_arguments.do_predict,
    )
    if training_arguments.do_train and "train" not in images:
        raise UserError(
            f"The images have no split {data_arguments.train_split_name!r} to train on; say which with --train_split_name."
        )
    if data_arguments.streaming:
        if training_arguments.do_train:
            batch_size = training_arguments.effective_batch_size
            images["train"] = images["train"].for_training(training_arguments.max_steps, batch_size)
        images |= {split: images[split].for_evaluation() for split in ("validation", "test") if split in images}
    images, broken = check_images(images, data_arguments.skip_broken_images, data_arguments.background)
    labels = images["validation"].features["label"].names
    new_head = None
    if training_arguments.do_train:
        new_head = adopt_labels(config, labels, model_arguments)
        check_batches(network, len(images["train"]), training_arguments)
    else:
        who = f"--model_name_or_path {model_arguments.model_name_or_path!r}"
        indices = match_labels(config, labels, who)
        warn_of_absent_labels(config, indices)
        images = relabel(images, indices, config.num_labels)
    checkpoint, finished = check_output_dir(Path(training_arguments.output_dir), config, phase)
    if training_arguments.push_to_hub and training_arguments.process_index == 0:
        create_repository(
            training_arguments.hub_model_id or Path(training_arguments.output_dir).absolute().name,
            training_arguments.hub_token,
            training_arguments.hub_private_repo,
        )
    own_folder = training_arguments.output_dir if finished else checkpoint
    processor = load_processor(model_arguments, data_arguments, config, own_folder)
    first_weights = None
    if model_arguments.init_from and not (checkpoint or finished):
        first_weights = load_first_weights(model_arguments, config, labels)
    return Inputs(images, broken, config, checkpoint, finished, processor, first_weights, new_head)


def check_arguments(phase: Phase) -> None:
    """Everything that can be said against the arguments before anything is loaded."""
    model_arguments, data_arguments, training_arguments = phase
    if not (training_arguments.do_train or training_arguments.do_eval or training_arguments.do_predict):
        raise UserError("There is nothing to do: give --do_train, --do_eval or --do_predict.")
    if bool(model_arguments.model_name_or_path) == bool(model_arguments.config_name):
        raise UserError(
            "Give either --config_name, to train a network from scratch, or --model_name_or_path, to go on with a "
            "trained one."
        )
    if training_arguments.push_to_hub and not training_arguments.do_train:
        raise UserError(
            "--push_to_hub uploads what --do_train trains; a trained model is uploaded by `binaryvit push FOLDER REPOSITORY`."
        )
    if training_arguments.do_train and data_arguments.validation_dir and not data_arguments.train_dir:
        raise UserError("--do_train needs --train_dir beside --validation_dir.")
    for flag in ("config_overrides", "init_from"):
        if getattr(model_arguments, flag) and not model_arguments.config_name:
            raise UserError(f"--{flag} is for a network that --config_name begins, not for --model_name_or_path.")
    if model_arguments.config_name and not training_arguments.do_train:
        raise UserError(
            "--config_name is a network without weights: evaluate one with --model_name_or_path, or --do_train."
        )
    check_supported(training_arguments)
    if training_arguments.do_train:
        training_arguments.check_optimization()
    warn_of_unused(phase)


def adopt_labels(config: PreTrainedConfig, labels: list[str], arguments: ModelArguments) -> bool:
    """
    Make the images' labels those of a network to train; returns whether its head is for others and begins anew.

    Raises:
        UserError: the network is for other labels, and nobody asked for a new head.
    """
    new_head = False
    if arguments.model_name_or_path:
        remedy = "start a new head with --ignore_mismatched_sizes"
        try:
            compare_labels(config, labels, f"--model_name_or_path {arguments.model_name_or_path!r}", remedy)
        except UserError:
            if not arguments.ignore_mismatched_sizes:
                raise
            new_head = True
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: index for index, label in enumerate(labels)}
    return new_head


def warn_of_absent_labels(config: PreTrainedConfig, indices: list[int]) -> None:
    """
    Args:
        indices: of the model's labels that images have.
    """
    absent = [label for index, label in config.id2label.items() if index not in indices]
    if absent:
        logger.warning(
            "%d of the model's %d classes are not among the images', %r first.",
            len(absent),
            config.num_labels,
            absent[0],
        )


def check_output_dir(output_dir: Path, config: PreTrainedConfig, phase: Phase) -> tuple[str | None, bool]:
    """
    What the output directory holds already.

    Returns:
        The checkpoint to go on from, if this run was interrupted; and whether it is finished.

    Raises:
        UserError: it holds another model's run, or a run of other arguments.
    """
    training_arguments = phase[2]
    if training_arguments.process_index == 0:
        check_writable(output_dir)
    remedy = "choose another --output_dir, or remove this one"
    found = last_whole_checkpoint(output_dir, training_arguments.checkpoint_files)
    last = None if found is None else str(found)
    for folder in (output_dir, *([Path(last)] if last else [])):
        if (folder / "config.json").is_file():
            # Compared as written, for reading turns tuples into lists.
            theirs, ours = json.loads((folder / "config.json").read_text()), json.loads(config.to_json_string())
            fields = ["model_type", *type(config).__annotations__, "id2label"]
            different = [field for field in fields if theirs.get(field) != ours.get(field)]
            if different:
                raise UserError(
                    f"--output_dir {str(output_dir)!r} holds another model's run (its {different[0]} is "
                    f"{theirs.get(different[0])}, not {ours.get(different[0])}); {remedy}."
                )
    explicit = training_arguments.resume_from_checkpoint
    if str(explicit).lower() == "true":
        explicit = last
        if last is None:
            raise UserError(f"--resume_from_checkpoint: {str(output_dir)!r} holds no checkpoint to go on from.")
    if not training_arguments.do_train or explicit:
        if explicit and not Path(explicit).is_dir():
            raise UserError(f"--resume_from_checkpoint: there is no folder {explicit!r}.")
        sharded = training_arguments.deepspeed or training_arguments.fsdp  # into files of other names
        damage = describe_damage(Path(explicit), training_arguments.checkpoint_files) if explicit else None
        if damage and not sharded:
            raise UserError(f"--resume_from_checkpoint: training cannot go on from {explicit!r}: {damage}.")
        return explicit, False
    compare_with_recorded(output_dir, phase)
    if is_finished(output_dir):
        logger.info("%s is trained already; it is evaluated again.", output_dir)
        return None, True
    if last:
        logger.info("Going on from %s.", last)
    return last, False

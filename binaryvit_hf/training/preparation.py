"""Checks the arguments and loads the inputs of a run, so that most errors appear before any training."""

import json
import logging
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

import torch
from datasets import Dataset
from transformers import BaseImageProcessor, PreTrainedConfig, PreTrainedModel
from transformers.utils import CONFIG_NAME

from binaryvit_runtime.errors import UserError, counted
from binaryvit_runtime.hub import create_repository
from binaryvit_runtime.pixels import choose_background, read_background
from binaryvit_runtime.sources import did_you_mean_path
from binaryvit_runtime.writing import check_writable

from ..data.arguments import DataArguments
from ..data.augmentation import AugmentationArguments
from ..data.image_checks import check_images
from ..data.label_names import compare_labels, match_labels
from ..data.loading import load_described_images, relabel
from ..data.streaming import ImageSplits
from ..run_history import TEST, TRAINING, UNKNOWN
from .arguments import DistillationTrainingArguments, ModelArguments, RunArguments
from .batch_checks import check_batches
from .checkpoints import describe_damage, lacking_argument, last_whole_checkpoint
from .models import (
    background_of_teacher,
    build_meta_network,
    check_named_models,
    load_config,
    load_first_weights,
    load_processor,
)
from .run_folder import (
    EarlierRunError,
    compare_training_images,
    compare_with_recorded,
    compare_with_training_images,
    holds_weights,
    is_finished,
    read_json,
)


logger = logging.getLogger(__name__)


class CheckedImages(NamedTuple):
    """Images that are loaded and checked."""

    images: ImageSplits
    broken: list[str]  # files that --skip_broken_images left out
    evaluation_images: str  # their kind (`run_history.EVALUATION_KINDS`)
    divided: bool  # whether they were held out of the training split or folder


class CheckedNetwork(NamedTuple):
    """The network of a run and the earlier run in its output directory, known before any image is read."""

    config: PreTrainedConfig
    meta: PreTrainedModel | None  # on the meta device, if it is trained
    last: Path | None  # the newest whole checkpoint in the output directory
    checkpoint: str | None  # folder to resume from
    finished: bool  # whether the output directory holds this run, trained to its end
    is_kept: bool = False  # whether a finished teacher is taken as it is, whatever arguments and images it had


@dataclass
class Inputs:
    """The checked inputs of a run."""

    images: ImageSplits
    broken: list[str]  # files that --skip_broken_images left out
    evaluation_images: str  # their kind (`run_history.EVALUATION_KINDS`)
    config: PreTrainedConfig
    checkpoint: str | None  # folder to resume from
    finished: bool  # whether the output directory holds this run, trained to its end
    processor: BaseImageProcessor | None  # None: it is created once the teacher's is known
    background: str | None  # the colour that the run puts behind transparent pixels; None: transparency is dropped
    first_weights: dict[str, torch.Tensor] | None  # tensors of --init_from
    new_head: bool | None  # whether to train the head from scratch; None if nothing is trained


def check_arguments(arguments: RunArguments) -> None:
    """Raise UserError if arguments contradict each other or are not supported."""
    model_arguments, data_arguments, training_arguments = arguments
    if not (training_arguments.do_train or training_arguments.do_eval or training_arguments.do_predict):
        raise UserError(
            "There is nothing to do: begin with a file of arguments, such as configs/photos.json, or give --do_train, "
            "--do_eval or --do_predict."
        )
    if bool(model_arguments.model_name_or_path) == bool(model_arguments.config_name):
        raise UserError(
            "Give either --config_name, to train a network from scratch, or --model_name_or_path, to use a trained one."
        )
    if training_arguments.push_to_hub and not training_arguments.do_train:
        raise UserError(
            "--push_to_hub needs --do_train. Upload a trained model with `binaryvit push FOLDER REPOSITORY`."
        )
    if training_arguments.do_train and data_arguments.validation_dir and not data_arguments.train_dir:
        raise UserError("--do_train needs --train_dir beside --validation_dir.")
    output_dir = Path(training_arguments.output_dir)
    for name in ("train_dir", "validation_dir"):
        folder = getattr(data_arguments, name)
        if folder and output_dir.resolve().is_relative_to(Path(folder).resolve()):
            raise UserError(
                f"--output_dir {str(output_dir)!r} is inside --{name} {folder!r}, whose sub-folders are classes: choose an "
                "--output_dir elsewhere."
            )
    for name in ("teacher_model_name_or_path", "init_from", "model_name_or_path"):
        source = getattr(model_arguments, name)
        if training_arguments.do_train and source and Path(source).resolve() == output_dir.resolve():
            raise UserError(
                f"--output_dir {str(output_dir)!r} is the folder of --{name}, which training would overwrite: choose "
                "another --output_dir."
            )
    for name in ("config_overrides", "init_from"):
        if getattr(model_arguments, name) and not model_arguments.config_name:
            raise UserError(
                f"--{name} is for new networks. To train the weights of a model in a changed network, for example at "
                "another image_size, replace --model_name_or_path by --init_from."
            )
    if model_arguments.config_name and not training_arguments.do_train:
        raise UserError(
            "--config_name is a network without weights: add --do_train, or evaluate a --model_name_or_path."
        )
    test_split = data_arguments.test_split_name
    if training_arguments.do_train and training_arguments.do_predict and test_split == data_arguments.train_split_name:
        raise UserError(
            f"--test_split_name {test_split!r} is the split to train on: name another one, or leave out --do_predict."
        )
    if training_arguments.balance_classes and data_arguments.streaming:
        raise UserError(
            "--balance_classes needs all labels before training, but --streaming reads them during training."
        )
    data_arguments.check_source(training_arguments.do_predict)
    training_arguments.check_supported()
    if training_arguments.do_train:
        training_arguments.check_optimization()


def check_network(arguments: RunArguments, teacher_follows: bool) -> CheckedNetwork:
    """
    Load the config of a run's network, and look for an earlier run in its output directory.

    Args:
        teacher_follows: whether the teacher does not exist yet, because another run trains it first.

    Raises:
        UserError: a model of this name cannot be loaded or trained.
    """
    model_arguments, _, training_arguments = arguments
    config, meta = load_config(model_arguments, training_arguments.do_train), None
    if training_arguments.do_train:
        training_arguments.check_network(config)
        meta = build_meta_network(model_arguments, config)
        training_arguments.check_checkpointing(meta)
    check_named_models(
        model_arguments, ["init_from"] if teacher_follows else ["init_from", "teacher_model_name_or_path"]
    )
    output_dir = Path(training_arguments.output_dir)
    last = last_whole_checkpoint(output_dir, training_arguments.checkpoint_files)
    return CheckedNetwork(config, meta, last, *find_earlier_run(output_dir, last, training_arguments))


def prepare(
    arguments: RunArguments,
    network: CheckedNetwork,
    loaded: dict[str, CheckedImages] | None = None,
    teacher: Inputs | None = None,
) -> Inputs:
    """
    Load the inputs of a run and check that they fit each other. With `--push_to_hub`, create the repository.

    Args:
        loaded: images of earlier runs, by `describe_source`. A teacher and its student read and check their images once.
        teacher: of the run before, which trains the teacher of this one.

    Raises:
        UserError: an input is missing, damaged or does not fit the others.
    """
    model_arguments, data_arguments, training_arguments = arguments
    output_dir, new_head = Path(training_arguments.output_dir), None
    config, meta, last, checkpoint, finished, is_kept = network
    processor = load_processor(model_arguments, data_arguments, config, output_dir if finished else checkpoint)
    of_teacher = teacher.background if teacher else background_of_teacher(model_arguments)
    background = find_background(data_arguments.background, processor, of_teacher)
    source, loaded = describe_source(arguments, background), {} if loaded is None else loaded
    if source not in loaded:
        loaded[source] = load_checked_images(arguments, background)
    images, broken, evaluation_images, divided = loaded[source]
    if divided:
        warn_of_learned_images(arguments, images["train"], checkpoint)
    labels = images["validation"].features["label"].names
    if meta is not None:
        new_head = adopt_labels(config, labels, model_arguments)
        if "top5" in (training_arguments.metric_for_best_model or "") and config.num_labels <= 5:
            raise UserError(
                f"--metric_for_best_model {training_arguments.metric_for_best_model} needs more than five classes; there are "
                f"{config.num_labels}. Give accuracy."
            )
        check_batches(meta, len(images["train"]), training_arguments)
    else:
        indices = match_labels(config, labels, f"--model_name_or_path {model_arguments.model_name_or_path!r}")
        warn_of_absent_labels(config, indices)
        images = relabel(images, indices, config.num_labels)
    check_earlier_run(output_dir, last, config, arguments, images, divided, is_kept)
    if training_arguments.push_to_hub and training_arguments.process_index == 0:
        create_repository(
            training_arguments.hub_model_id or output_dir.absolute().name,
            training_arguments.hub_token,
            training_arguments.hub_private_repo,
        )
    first_weights = None
    if model_arguments.init_from and not (checkpoint or finished):
        first_weights = load_first_weights(model_arguments, config, labels)
    return Inputs(
        images, broken, evaluation_images, config, checkpoint, finished, processor, background, first_weights, new_head
    )


def warn_of_learned_images(arguments: RunArguments, images: Dataset, checkpoint: str | None = None) -> None:
    """
    Warn if a run that this one starts from was trained on other images of the same folder. Images that are added or removed
    change which ones are held out, and so do other arguments, such as --train_val_split.

    Args:
        images: all images that are not held out.
        checkpoint: that training resumes from. Without --resume_from_checkpoint its run must have had these images.
    """
    names = ("model_name_or_path", "init_from", "teacher_model_name_or_path")
    sources = {name: getattr(arguments.model, name) for name in names}
    if arguments.training.resume_from_checkpoint:
        sources["resume_from_checkpoint"] = checkpoint
    for name, source in sources.items():
        counts = source and compare_with_training_images(Path(source), arguments.data, images)
        if counts:
            logger.warning(
                "--%s %r was trained on other images of %r than the training images of now (%s), and may have learned some "
                "of those that are held out now, so this run's accuracy may be too high: train it again.",
                *(name, source, arguments.data.train_dir or arguments.data.dataset_name, counts),
            )


def find_background(given: str | None, processor: BaseImageProcessor | None, of_teacher: str | None) -> str | None:
    """
    The colour that a run puts behind transparent pixels, as `#rrggbb`; `None` drops transparency.

    Without `--background` it is the model's, or for a new network the teacher's. Warns if the model or the teacher was
    trained with another one.

    Args:
        given: the argument `--background`.
        processor: of the model; `None` for a new network.
        of_teacher: the teacher's background.
    """
    of_model = None if processor is None else read_background(processor)
    owner, known = ("teacher", of_teacher) if processor is None else ("model", of_model)
    background = choose_background(given, known)
    if given is None and known is not None:
        logger.info("Transparent pictures are put on %s, the background of the %s.", known, owner)
    for owner, known in (("model", of_model), ("teacher", of_teacher)):
        if known is not None and known != background:
            here = "drops transparency" if background is None else f"puts transparent pictures on {background}"
            logger.warning("This run %s, but the %s was trained with the background %s.", here, owner, known)
    return background


def describe_source(arguments: RunArguments, background: str | None) -> str:
    """All values that determine the images and their checks. The length of a stream also depends on the batch."""
    model_arguments, data_arguments, training_arguments = arguments
    names = {field.name for field in fields(DataArguments)} - {field.name for field in fields(AugmentationArguments)}
    values = [(name, getattr(data_arguments, name)) for name in sorted(names - {"background"})]
    values.append(("background", background))
    values += [(name, getattr(training_arguments, name)) for name in ("seed", "do_train", "do_predict")]
    if data_arguments.streaming:
        values += [("max_steps", training_arguments.max_steps), ("batch", training_arguments.effective_batch_size)]
    return repr((values, model_arguments.cache_dir, model_arguments.token))


def load_checked_images(arguments: RunArguments, background: str | None) -> CheckedImages:
    """The images of every split, the broken files that were left out, and what the images to evaluate on are."""
    model_arguments, data_arguments, training_arguments = arguments
    source = data_arguments.dataset_name or data_arguments.train_dir or data_arguments.validation_dir
    if source:
        logger.info("Reading and checking the images of %s.", source)
    images, evaluation_images, divided = load_described_images(
        data_arguments,
        training_arguments.seed,
        model_arguments.cache_dir,
        model_arguments.token,
        test=training_arguments.do_predict,
    )
    if training_arguments.do_train and "train" not in images:
        raise UserError(
            f"The images have no split {data_arguments.train_split_name!r} to train on: name one with --train_split_name."
        )
    if data_arguments.streaming:
        if training_arguments.do_train:
            batch_size = training_arguments.effective_batch_size
            images["train"] = images["train"].for_training(training_arguments.max_steps, batch_size)
        images |= {split: images[split].for_evaluation() for split in ("validation", "test") if split in images}
    if not training_arguments.do_train and evaluation_images != TEST:
        evaluation_images = UNKNOWN  # the model may have been trained on any images
    if evaluation_images == TRAINING:
        logger.warning("The run is evaluated on its training images, which says nothing about other images.")
    checked = check_images(images, data_arguments.skip_broken_images, background, data_arguments.max_eval_samples)
    return CheckedImages(*checked, evaluation_images, divided)


def adopt_labels(config: PreTrainedConfig, labels: list[str], arguments: ModelArguments) -> bool:
    """
    Write the images' labels into the config of a network to train; returns whether the network needs a new head.

    Raises:
        UserError: the network has other labels, and `--ignore_mismatched_sizes` is not given.
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
    """Log the labels of the model that no image has; `indices` are those that images have."""
    absent = [label for index, label in config.id2label.items() if index not in indices]
    if absent:
        logger.warning(
            "Classes of the model without images: %d of %d, %r first.", len(absent), config.num_labels, absent[0]
        )


def find_earlier_run(
    output_dir: Path, last: Path | None, arguments: DistillationTrainingArguments
) -> tuple[str | None, bool]:
    """
    The checkpoint to resume from, if any, and whether the output directory holds a finished run.

    Args:
        last: the newest whole checkpoint in the output directory.

    Raises:
        UserError: training cannot resume from the checkpoint of `--resume_from_checkpoint`.
    """
    if arguments.resume_from_checkpoint or not arguments.do_train:
        return chosen_checkpoint(arguments, last), False
    if is_finished(output_dir):
        return None, True
    return str(last) if last else None, False


def check_output_folder(arguments: RunArguments, network: CheckedNetwork) -> None:
    """Raise EarlierRunError if the output directory holds a run of another network or of other arguments."""
    output_dir = Path(arguments.training.output_dir)
    for found in earlier_configs(output_dir, network.last):
        check_same_network(found, network.config, output_dir)
    if takes_over(arguments, network.is_kept):
        compare_with_recorded(output_dir, arguments)


def takes_over(arguments: RunArguments, is_kept: bool) -> bool:
    """Whether a run trains as the one before in its output directory did, and its arguments and images must be the same."""
    training = arguments.training
    is_changed = is_kept or training.resume_from_checkpoint
    return training.do_train and not is_changed and holds_weights(Path(training.output_dir))


def check_earlier_run(
    output_dir: Path,
    last: Path | None,
    config: PreTrainedConfig,
    arguments: RunArguments,
    images: ImageSplits,
    divided: bool,
    is_kept: bool = False,
) -> None:
    """
    Check that the output directory holds no run of other images, and log whether this one resumes.

    Raises:
        UserError: the folder is not writable, or holds a run of other classes or of other images.
    """
    training_arguments = arguments.training
    if training_arguments.process_index == 0:
        check_writable(output_dir)
    for found in earlier_configs(output_dir, last):
        check_same_labels(found, config, output_dir)
    if training_arguments.resume_from_checkpoint or not training_arguments.do_train:
        return
    if takes_over(arguments, is_kept):
        compare_training_images(output_dir, images["train"], divided)
    if is_finished(output_dir):
        kept = " and taken as it is" if is_kept else ""
        logger.info("%s is trained already%s; it is evaluated again.", output_dir, kept)
    elif last is not None:
        logger.info("Resuming from %s.", last)


def earlier_configs(output_dir: Path, last: Path | None) -> list[dict]:
    """
    What the files config.json of an output directory and of its last whole checkpoint hold, of those that are there.

    A run that was killed at its end may have written the first one in part. It counts for nothing: training writes it again.

    Raises:
        UserError: the file of a finished run or of the checkpoint is damaged.
    """
    found = []
    for folder in filter(None, (output_dir, last)):
        try:
            found.append(read_json(folder / CONFIG_NAME))
        except UserError:
            if folder == last or is_finished(folder):
                raise
    return list(filter(None, found))


def check_same_network(found: dict, config: PreTrainedConfig, output_dir: Path) -> None:
    """Raise EarlierRunError if the content of a config.json, of `earlier_configs`, is of another network."""
    # Compare as JSON, which turns tuples into lists.
    given = json.loads(config.to_json_string())
    for field in ("model_type", *type(config).__annotations__):
        if found.get(field) != given.get(field):
            change = f"its {field} is {found.get(field)}, not {given.get(field)}"
            raise EarlierRunError(output_dir, f"another model's run ({change})", can_resume=False)


def check_same_labels(found: dict, config: PreTrainedConfig, output_dir: Path) -> None:
    """Raise EarlierRunError if the content of a config.json, of `earlier_configs`, has other classes than `config`."""
    before, now = stored_labels(found), stored_labels(json.loads(config.to_json_string()))
    if before != now:
        changed = [name for name in [*now, *before] if (name in now) != (name in before)]
        change = "their order differs"
        if changed:
            change = f"{changed[0]!r} {'is new' if changed[0] in now else 'is missing now'}"
        classes = f"{counted(len(before), 'class')}, and there are {len(now)} ({change})"
        raise EarlierRunError(output_dir, f"a run with {classes}", can_resume=False)


def stored_labels(config: dict) -> list:
    """The class names in a config.json, a list in those of timm; empty if it has none or is damaged."""
    labels = config.get("id2label")
    if isinstance(labels, dict):
        return list(labels.values())
    names = config.get("label_names")
    return names if isinstance(names, list) else []


def chosen_checkpoint(arguments: DistillationTrainingArguments, last: Path | None) -> str | None:
    """The checkpoint of `--resume_from_checkpoint`, if given; raises UserError if training cannot resume from it."""
    name = arguments.resume_from_checkpoint
    if not name:
        return None
    if name.lower() == "true":
        if last is not None:
            return str(last)
        lacking = last_whole_checkpoint(Path(arguments.output_dir)) if arguments.checkpoint_files else None
        if lacking is None:
            raise UserError(f"--resume_from_checkpoint: {arguments.output_dir!r} holds no checkpoint to resume from.")
        name = str(lacking)
    if not Path(name).is_dir():
        raise UserError(f"--resume_from_checkpoint: there is no folder {name!r}{did_you_mean_path(name, Path.is_dir)}")
    if arguments.deepspeed or arguments.fsdp:  # their checkpoints have files of other names
        return name
    if argument := lacking_argument(Path(name), arguments.checkpoint_files):
        raise UserError(
            f"--resume_from_checkpoint: {name!r} was saved without --{argument}, so training cannot resume from it with that "
            "argument: train its weights with --init_from and another --output_dir."
        )
    if damage := describe_damage(Path(name)):
        raise UserError(f"--resume_from_checkpoint: training cannot resume from {name!r}: {damage}.")
    return name

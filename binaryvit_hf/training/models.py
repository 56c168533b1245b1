"""Load the models and image processors of a run: student, teacher and first stage, from a folder, the Hub or a config."""

import copy
import logging
import os
from pathlib import Path

import torch
from transformers import AutoModelForImageClassification, BaseImageProcessor, PreTrainedConfig, PreTrainedModel
from transformers.utils import CONFIG_NAME
from transformers.utils.hub import cached_file, extract_commit_hash

from binaryvit_runtime.errors import LoadingError, UserError, counted, first_sentence
from binaryvit_runtime.pixels import read_background, write_background
from binaryvit_runtime.resources import find_config_path, find_source, shipped_configs

from .. import loading
from ..data.arguments import DataArguments
from ..data.label_names import compare_labels
from ..data.model_inputs import RGB, create_image_processor, describe_input
from ..network.quantization_binaryvit import LATENT, QUANT_METHOD
from .arguments import ModelArguments
from .latent_weights import fetch_trainable
from .two_stage import first_stage_weights, load_first_stage, override_config, resize_first_stage


logger = logging.getLogger(__name__)


def load_config(arguments: ModelArguments, do_train: bool) -> PreTrainedConfig:
    """The network's config; raises UserError if it cannot be loaded or its network cannot be used here."""
    name = arguments.config_name or arguments.model_name_or_path
    source = name
    shipped = shipped_configs() if arguments.config_name else {}
    if arguments.config_name and not os.path.exists(name):
        source = str(shipped.get(name, find_config_path(name)))
    try:
        config = loading.load_config(source, shipped, subfolder=arguments.subfolder, **hub_arguments(arguments))
    except LoadingError as error:
        raise UserError(f"The config of {name!r} cannot be loaded: {error}") from error
    check_config(name, config, arguments, do_train)
    if do_train and hasattr(config, "quantization_config"):
        del config.quantization_config  # a network to train has no packed weights
    if arguments.config_overrides:
        config = override_config(config, arguments.config_overrides)
    if arguments.drop_path_rate is not None:
        if hasattr(config, "drop_path_rate"):
            config.drop_path_rate = arguments.drop_path_rate
        elif config.model_type != "vit":
            raise UserError(f"--drop_path_rate: {name!r} is a {config.model_type!r}, which has none.")
    return config


def check_config(name: str, config: PreTrainedConfig, arguments: ModelArguments, do_train: bool) -> None:
    """
    Raise UserError for quantised weights of others to train, for images without colours, and for a new network without
    image size.
    """
    if (
        do_train
        and arguments.model_name_or_path
        and config.model_type != QUANT_METHOD
        and getattr(config, "quantization_config", None)
    ):
        raise UserError(f"{name!r} has quantised weights, which cannot be trained: choose its full-precision weights.")
    if getattr(config, "num_channels", 3) != 3:
        raise UserError(
            f"{name!r} takes images of {counted(config.num_channels, 'channel')}; training reads colour images, so 3."
        )
    if arguments.config_name and getattr(config, "image_size", None) is None:
        raise UserError(
            f"--config_name {name!r} is a {config.model_type!r} without an image_size, so it cannot be trained from scratch; "
            "give a trained one as --model_name_or_path."
        )


def build_meta_network(arguments: ModelArguments, config: PreTrainedConfig) -> PreTrainedModel:
    """The network on the meta device, where it takes no memory; raises UserError if it is no image classifier."""
    try:
        with torch.device("meta"):
            return AutoModelForImageClassification.from_config(config, trust_remote_code=arguments.trust_remote_code)
    except Exception as error:  # networks raise any kind of error
        name = arguments.config_name or arguments.model_name_or_path
        raise UserError(f"{name!r} is no image classifier to train: {first_sentence(error)}") from error


def load_model(
    arguments: ModelArguments, config: PreTrainedConfig, finished_run: Path | None, new_head: bool | None = None
) -> PreTrainedModel:
    """
    The network with its weights, or with random ones for a new network.

    Args:
        finished_run: output directory to load the weights from, instead of `model_name_or_path`.
        new_head: whether to train the head from scratch; `None` if the model is not trained, so that it needs all of its
            weights.

    Raises:
        UserError: it cannot be loaded, or lacks weights that it needs.
    """
    source: str | Path | None = arguments.model_name_or_path
    subfolder = arguments.subfolder
    if finished_run is not None:
        source, subfolder = finished_run, LATENT if (finished_run / LATENT).is_dir() else ""
    if source is None:
        return loading.build_classifier(config, dtype=torch.float32, trust_remote_code=arguments.trust_remote_code)
    # Half precision would lose the optimiser's small steps; packed weights have their own types.
    precision = {} if getattr(config, "quantization_config", None) else {"dtype": torch.float32}
    options = {"config": config, "subfolder": subfolder, **precision, **hub_arguments(arguments)}
    try:
        if new_head is None:
            return loading.load_classifier(source, **options)
        with loading.without_load_report():
            model, info = fetch_trainable(source, ignore_mismatched_sizes=arguments.ignore_mismatched_sizes, **options)
    except LoadingError as error:
        raise UserError(f"--model_name_or_path {str(source)!r} cannot be loaded: {error}") from error
    if info["missing_keys"]:
        logger.warning(
            "%s lacks %s. Such tensors start from random values, %r first.",
            source,
            counted(len(info["missing_keys"]), "tensor"),
            min(info["missing_keys"]),
        )
    if new_head and finished_run is None:
        logger.info("%s gets a new head for the %d classes of the images.", source, config.num_labels)
        # transformers makes a new head only if the number of labels differs.
        if not info["mismatched_keys"]:
            model.load_state_dict(create_head(arguments, config), strict=False)
    return model


def create_head(arguments: ModelArguments, config: PreTrainedConfig) -> dict[str, torch.Tensor]:
    """Random weights for every tensor whose shape depends on the number of labels."""
    fresh = AutoModelForImageClassification.from_config(
        config, dtype=torch.float32, trust_remote_code=arguments.trust_remote_code
    ).state_dict()
    other = copy.deepcopy(config)
    other.num_labels = config.num_labels + 1
    larger = build_meta_network(arguments, other).state_dict()
    return {name: tensor for name, tensor in fresh.items() if tensor.shape != larger[name].shape}


def load_first_weights(
    arguments: ModelArguments, config: PreTrainedConfig, labels: list[str]
) -> dict[str, torch.Tensor]:
    """The tensors of `--init_from` for a new network; raises UserError if labels or shapes differ."""
    first = load_first_stage(arguments.init_from, **hub_arguments(arguments))
    compare_labels(first.config, labels, f"--init_from {arguments.init_from!r}", "choose a model of these labels")
    resize_first_stage(first, config, arguments.init_from)
    return first_stage_weights(first, build_meta_network(arguments, config), arguments.init_from)


def load_teacher(
    arguments: ModelArguments, student: PreTrainedConfig
) -> tuple[PreTrainedModel | None, BaseImageProcessor | None]:
    """The teacher and its image processor, if any; raises UserError if the teacher lacks weights or has other labels."""
    name = arguments.teacher_model_name_or_path
    if name is None:
        return None, None
    flag = f"--teacher_model_name_or_path {name!r}"
    try:
        teacher = loading.load_classifier(name, dtype=torch.float32, **hub_arguments(arguments))
    except LoadingError as error:
        raise UserError(f"{flag} cannot be loaded: {error}") from error
    compare_labels(teacher.config, list(student.id2label.values()), flag, "choose a teacher of these images' labels")
    return teacher, load_image_processor(name, arguments)


def check_named_models(arguments: ModelArguments, names: list[str]) -> None:
    """
    Raise UserError if models have no config to load, before anything that takes long.

    Args:
        names: of the arguments that name them, such as "init_from".
    """
    for name in names:
        if source := getattr(arguments, name):
            try:
                loading.load_config(source, **hub_arguments(arguments))
            except LoadingError as error:
                raise UserError(f"--{name} {source!r} cannot be loaded: {error}") from error


def load_processor(
    arguments: ModelArguments, data_arguments: DataArguments, config: PreTrainedConfig, earlier_run: Path | str | None
) -> BaseImageProcessor | None:
    """
    The student's image processor: the earlier run's, or else the one of `--model_name_or_path`, or else a new one with the
    mean, deviation and background of `--init_from`. `None` if there is none of these; a new one then follows the teacher's.
    """
    # A model in a subfolder may share the image processor of its repository.
    sources = [(earlier_run, ""), *((arguments.model_name_or_path, folder) for folder in (arguments.subfolder, ""))]
    for source, subfolder in dict.fromkeys(sources):  # without a subfolder, two are the same
        if source and (processor := load_image_processor(str(source), arguments, subfolder)):
            describe_input(processor, str(source))  # raises its error now, not after the teacher's training
            return processor
    if arguments.init_from and (first := load_image_processor(arguments.init_from, arguments)):
        who = f"--init_from {arguments.init_from!r}"
        like = describe_input(first, who)
        if like.channels != RGB:
            raise UserError(f"{who} takes BGR images, a new network RGB images; choose a first stage that takes RGB.")
        processor = create_image_processor(config, data_arguments.crop_pct, like)
        write_background(processor, read_background(first))
        return processor
    if source := arguments.model_name_or_path or arguments.init_from:
        logger.warning("%r has no image processor; a new one is made.", source)
    return None


def load_image_processor(source: str, arguments: ModelArguments, subfolder: str = "") -> BaseImageProcessor | None:
    try:
        return loading.load_image_processor(source, subfolder=subfolder, **hub_arguments(arguments))
    except LoadingError as error:
        raise UserError(f"The image processor of {source!r} cannot be loaded: {error}") from error


def background_of_teacher(arguments: ModelArguments) -> str | None:
    """The colour that a teacher's training put behind transparent pixels. `None` if it is unknown."""
    name = arguments.teacher_model_name_or_path
    if name is None:
        return None
    try:
        processor = loading.load_image_processor(name, **hub_arguments(arguments))
    except LoadingError:  # `load_teacher` reports it
        return None
    return None if processor is None else read_background(processor)


def hub_revision(name: str, arguments: ModelArguments) -> str | None:
    """The commit that a model of the Hub was loaded from; `None` for a local model."""
    file = cached_file(find_source(name), CONFIG_NAME, cache_dir=arguments.cache_dir, token=arguments.token)
    return extract_commit_hash(file, None)


def hub_arguments(arguments: ModelArguments) -> dict:
    return {
        "cache_dir": arguments.cache_dir,
        "token": arguments.token,
        "trust_remote_code": arguments.trust_remote_code,
    }

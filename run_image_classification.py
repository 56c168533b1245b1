#!/usr/bin/env python
"""
Train, distil and evaluate image classifiers, 1-bit and full precision.

    python run_image_classification.py configs/quickstart.json
    python run_image_classification.py --config_name binaryvit-small-patch4-224 --train_dir photos --do_train --do_eval
"""

import copy
import json
import logging
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from transformers import (
    AutoModelForImageClassification,
    BaseImageProcessor,
    EvalPrediction,
    PreTrainedConfig,
    PreTrainedModel,
    set_seed,
)
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import CONFIG_NAME
from transformers.utils.hub import cached_file, extract_commit_hash

from binaryvit_hf import loading
from binaryvit_hf.argument_checks import check_supported
from binaryvit_hf.arguments import (
    ModelArguments,
    Phase,
    compare_with_recorded,
    is_finished,
    parse_phases,
    record_beginning,
    record_end,
)
from binaryvit_hf.augmentation import create_mix
from binaryvit_hf.batch_checks import check_batches
from binaryvit_hf.checkpoints import describe_damage, last_whole_checkpoint
from binaryvit_hf.data import Images, add_transforms, collate_images, load_images, relabel
from binaryvit_hf.data_arguments import DataArguments
from binaryvit_hf.doctor import check_engine_variable
from binaryvit_hf.errors import (
    LoadingError,
    NonFiniteLossError,
    TerminatedError,
    UploadError,
    UserError,
    first_sentence,
)
from binaryvit_hf.host_memory import keep_freed_memory
from binaryvit_hf.hub import create_repository, told_how_to_resume_upload
from binaryvit_hf.image_checks import check_images
from binaryvit_hf.images import create_image_processor
from binaryvit_hf.label_names import compare_labels, match_labels
from binaryvit_hf.metrics import TopKAccuracy
from binaryvit_hf.model_inputs import (
    RGB,
    adapt_input,
    check_forward,
    describe_input,
    describe_teacher_input,
    ordinary_input,
)
from binaryvit_hf.ops import CONFIG_CLASSES, count_operations, total
from binaryvit_hf.ranks import leave, rank, show_error, shown_error_code
from binaryvit_hf.report import plot_learning_curves, read_json, read_log_history, write_model_card
from binaryvit_hf.resources import shipped_configs
from binaryvit_hf.shipping_binaryvit import LATENT
from binaryvit_hf.stochastic_depth import add_drop_path
from binaryvit_hf.trainer import DistillationTrainer, DistillationTrainingArguments
from binaryvit_hf.two_stage import first_stage_weights, load_first_stage, override_config
from binaryvit_hf.unused_arguments import warn_of_unused
from binaryvit_hf.writing import check_writable, describe_full_disk


TEACHER_METRICS = ("teacher_loss", "teacher_accuracy", "teacher_top5_accuracy")

logger = logging.getLogger("run_image_classification")


def main(arguments: list[str]) -> int:
    first = rank() == 0
    logging.basicConfig(format="%(message)s", level=logging.INFO if first else logging.ERROR)
    keep_freed_memory()
    for client in ("httpx", "httpx2"):
        logging.getLogger(client).setLevel(logging.WARNING)
    try:
        phases = train_and_evaluate(arguments)
    except UserError as error:
        # A worker of the data loader puts its stack trace before the message.
        message = str(error).strip().splitlines()[-1].removeprefix("binaryvit_hf.errors.UserError: ")
        return leave(show_error(message, 2))
    except (NonFiniteLossError, UploadError) as error:
        return leave(show_error(str(error), 1))
    except TerminatedError as error:
        return leave(show_error(str(error), 128 + signal.SIGTERM))
    except KeyboardInterrupt:
        message = "Interrupted; the same command goes on from the last checkpoint, if there is one."
        return leave(show_error(message, 128 + signal.SIGINT))
    except Exception as error:
        if failure := describe_full_disk(error):
            return leave(show_error(f"The run can write no more to its output directory: {failure}.", 1))
        if (code := shown_error_code()) is None:
            raise
        return leave(code)  # another process failed, said why, and left this one waiting for it
    if first and phases[-1][2].do_train:
        print_next_steps(phases[-1][2])
    return 0


def train_and_evaluate(arguments: list[str]) -> list[Phase]:
    check_engine_variable()
    phases = parse_phases(arguments)
    for phase in phases:
        check_arguments(phase)
    # All of them first: what is wrong with the student must not wait for its teacher's training.
    prepared = [prepare(phase) for phase in phases]
    for phase, inputs in zip(phases, prepared):
        PartialState().wait_for_everyone()  # for the first process writes what the others read in the next phase
        run(phase, inputs)
    end_together()
    return phases


def end_together() -> None:
    """Waits for the other processes: one that ends without a farewell may abort, and torchrun then ends who still writes."""
    state = PartialState()
    state.wait_for_everyone()
    state.destroy_process_group()


@dataclass
class Inputs:
    """What a run needs that can be checked before any training: images, network, and what the output directory holds."""

    images: Images
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
            images["train"] = images["train"].of_steps(training_arguments.max_steps, batch_size)
        images |= {split: images[split].counted() for split in ("validation", "test") if split in images}
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


def run(phase: Phase, inputs: Inputs) -> None:
    """Train and evaluate one model, and write what it leaves behind."""
    model_arguments, data_arguments, training_arguments = phase
    images, config = inputs.images, inputs.config
    output_dir = Path(training_arguments.output_dir)
    logger.info("%s -> %s", model_arguments.config_name or model_arguments.model_name_or_path, output_dir)
    set_seed(training_arguments.seed)
    teacher, teacher_processor = load_teacher(model_arguments, config)
    model = load_model(model_arguments, config, output_dir if inputs.finished else None, inputs.new_head)
    if model_arguments.drop_path_rate and config.model_type == "vit":
        add_drop_path(model.vit, model_arguments.drop_path_rate)
    if inputs.first_weights is not None:
        model.load_state_dict(inputs.first_weights, strict=False)  # which of them there must be is checked
    processor = inputs.processor or create_image_processor(
        config, data_arguments.crop_pct, like=ordinary_input(teacher_processor, config)
    )
    student_input = describe_input(processor, "The student")
    if model_arguments.model_name_or_path:
        check_forward(model, student_input, f"--model_name_or_path {model_arguments.model_name_or_path!r}")
    if teacher is not None:
        flag = f"--teacher_model_name_or_path {model_arguments.teacher_model_name_or_path!r}"
        teacher_input = describe_teacher_input(teacher, teacher_processor, student_input, flag)
        check_forward(teacher, teacher_input, flag)
        adapt_input(teacher, given=student_input, wanted=teacher_input)
    datasets = add_transforms(images, processor, data_arguments, training_arguments.seed)

    metric = TopKAccuracy()

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
        return metric.compute(predictions=logits.astype(np.float32), references=prediction.label_ids)

    def create_trainer(model: PreTrainedModel, teacher: PreTrainedModel | None = None) -> DistillationTrainer:
        return DistillationTrainer(
            model=model,
            args=training_arguments,
            teacher=teacher,
            mix=create_mix(data_arguments, config.num_labels),
            train_dataset=datasets.get("train"),
            eval_dataset=datasets["validation"],
            data_collator=collate_images,
            processing_class=processor,
            compute_metrics=compute_metrics,
        )

    trainer = create_trainer(model, teacher)
    if training_arguments.do_train and not inputs.finished:
        if trainer.is_world_process_zero():
            make_output_dir(output_dir)
            log_batch(training_arguments)
            if data_arguments.streaming:
                logger.info("Streaming: %s", images["train"])
            record_beginning(output_dir, phase)
        metrics_before = read_json(output_dir / "train_results.json")
        result = trainer.train(resume_from_checkpoint=inputs.checkpoint)
        if trainer.termination.terminated:
            saved = (
                "the weights alone (--save_only_model); the same command begins anew."
                if training_arguments.save_only_model
                else "a checkpoint; the same command goes on from it."
            )
            raise TerminatedError(
                f"Told to end (SIGTERM), training stopped after step {trainer.state.global_step} and saved {saved}"
            )
        if trainer.is_world_process_zero():
            record_end(output_dir)
        trainer.save_model(_internal_call=True)  # called otherwise it uploads, before there is a card
        trainer.save_state()
        metrics = {**result.metrics, "train_samples": len(images["train"])}
        if "train_loss" not in metrics:  # all steps were done before
            metrics = metrics_before or metrics
        trainer.save_metrics("train", metrics)
    elif inputs.finished:
        trainer.state.epoch = read_json(output_dir / TRAINER_STATE_NAME).get("epoch")  # to be told with the results
    if training_arguments.do_eval:
        metrics = trainer.evaluate()
        metrics["eval_samples"] = len(images["validation"])
        if teacher is not None:
            taught = create_trainer(teacher).evaluate(metric_key_prefix="teacher")
            metrics |= {key: taught[key] for key in TEACHER_METRICS if key in taught}
            if revision := hub_revision(model_arguments.teacher_model_name_or_path, model_arguments):
                metrics["teacher_revision"] = revision
            metrics["teacher_bytes"] = sum(tensor.nbytes for tensor in teacher.state_dict().values())
            if teacher.config.model_type in CONFIG_CLASSES:
                metrics["teacher_ops"] = total(count_operations(teacher.config)).ops
        if inputs.broken:
            metrics["skipped_images"] = len(inputs.broken)
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    if training_arguments.do_predict:
        metrics = trainer.evaluate(datasets["test"], metric_key_prefix="test")
        metrics["test_samples"] = len(images["test"])
        trainer.log_metrics("test", metrics)
        trainer.save_metrics("test", metrics)
    if inputs.broken:
        logger.warning("%d file(s) were left out, as they are no images.", len(inputs.broken))
    if trainer.is_world_process_zero() and training_arguments.do_train:
        write_report(phase, trainer.hub_model_id or str(output_dir))
    if training_arguments.push_to_hub:
        with told_how_to_resume_upload(output_dir, trainer.hub_model_id):
            trainer.push_to_hub()


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


def load_config(arguments: ModelArguments, do_train: bool) -> PreTrainedConfig:
    """The network's config, with the labels that it comes with."""
    name = arguments.config_name or arguments.model_name_or_path
    source = name if Path(name).exists() else str(shipped_configs().get(name, name))
    try:
        config = loading.load_config(source, subfolder=arguments.subfolder, **hub_arguments(arguments))
    except LoadingError as error:
        raise UserError(f"The config of {name!r} cannot be loaded: {error}") from error
    if arguments.config_overrides:
        config = override_config(config, arguments.config_overrides)
    if do_train and getattr(config, "quantization_config", None):
        raise UserError(
            f"{name!r} has packed weights, which cannot be trained: a bit has no gradient. Train the latent weights that it "
            f"was packed from; where they lie beside it, with --subfolder {LATENT}."
        )
    if getattr(config, "num_channels", 3) != 3:
        raise UserError(
            f"{name!r} takes images of {config.num_channels} channels; this script reads colour images, so 3."
        )
    if arguments.config_name and getattr(config, "image_size", None) is None:
        raise UserError(
            f"--config_name {name!r} is a {config.model_type!r} without an image_size, which this script cannot begin; give "
            "a trained one as --model_name_or_path."
        )
    if arguments.drop_path_rate is not None:
        if hasattr(config, "drop_path_rate"):
            config.drop_path_rate = arguments.drop_path_rate
        elif config.model_type != "vit":
            raise UserError(f"--drop_path_rate: {name!r} is a {config.model_type!r}, which has none.")
    return config


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


def build_meta_network(arguments: ModelArguments, config: PreTrainedConfig) -> PreTrainedModel:
    """The network on the meta device, where it takes no memory."""
    try:
        with torch.device("meta"):
            return AutoModelForImageClassification.from_config(config, trust_remote_code=arguments.trust_remote_code)
    except Exception as error:  # of configs that are no image classifier's, or have no network
        name = arguments.config_name or arguments.model_name_or_path
        raise UserError(f"{name!r} is no image classifier to train: {first_sentence(error)}") from error


def load_model(
    arguments: ModelArguments, config: PreTrainedConfig, finished_run: Path | None, new_head: bool | None = None
) -> PreTrainedModel:
    """
    The network with its weights, as far as there are any.

    Args:
        new_head: whether the head begins anew; `None` of a model that is not trained, so needs all of its weights.

    Raises:
        UserError: it cannot be loaded, or weights that it needs are missing.
    """
    source, subfolder = arguments.model_name_or_path, arguments.subfolder
    if finished_run is not None:
        source, subfolder = finished_run, LATENT if (finished_run / LATENT).is_dir() else ""
    if source is None:
        return loading.build_classifier(config, dtype=torch.float32, trust_remote_code=arguments.trust_remote_code)
    # Half precision would lose the optimiser's small steps; packed weights have their own types.
    precision = {} if getattr(config, "quantization_config", None) else {"dtype": torch.float32}
    try:
        model, info = loading.fetch_classifier(
            source,
            config=config,
            **precision,
            subfolder=subfolder,
            ignore_mismatched_sizes=arguments.ignore_mismatched_sizes and new_head is not None,
            **hub_arguments(arguments),
        )
    except LoadingError as error:
        raise UserError(f"--model_name_or_path {str(source)!r} cannot be loaded: {error}") from error
    if new_head is None:
        check_complete(model, info, f"--model_name_or_path {str(source)!r}", "train it first")
    # transformers makes a new head where the number of labels is another, and only there.
    if new_head and finished_run is None and not info["mismatched_keys"]:
        model.load_state_dict(create_head(config, arguments.trust_remote_code), strict=False)
    return model


def check_complete(model: PreTrainedModel, info: dict, who: str, remedy: str) -> None:
    """
    Raises:
        UserError: the checkpoint lacks weights, which are random now, as those of a head that was never trained.
    """
    missing = sorted(info["missing_keys"] & dict(model.named_parameters()).keys())
    if missing:
        raise UserError(f"{who} has no weights {missing[0]!r}, so its answers would be random; {remedy}.")


def create_head(config: PreTrainedConfig, trust_remote_code: bool) -> dict[str, torch.Tensor]:
    """New weights of every tensor of a network that has a value for each label."""
    fresh = AutoModelForImageClassification.from_config(
        config, dtype=torch.float32, trust_remote_code=trust_remote_code
    ).state_dict()
    other = copy.deepcopy(config)
    other.num_labels = config.num_labels + 1
    with torch.device("meta"):
        larger = AutoModelForImageClassification.from_config(other, trust_remote_code=trust_remote_code).state_dict()
    return {name: tensor for name, tensor in fresh.items() if tensor.shape != larger[name].shape}


def load_first_weights(
    arguments: ModelArguments, config: PreTrainedConfig, labels: list[str]
) -> dict[str, torch.Tensor]:
    """What the network takes over from --init_from, checked against it."""
    first = load_first_stage(arguments.init_from, **hub_arguments(arguments))
    compare_labels(first.config, labels, f"--init_from {arguments.init_from!r}", "choose a model of these labels")
    with torch.device("meta"):
        network = load_model(arguments, config, None)
    return first_stage_weights(first, network, arguments.init_from)


def load_teacher(arguments: ModelArguments, student: PreTrainedConfig):
    """The teacher of the student's labels and its image processor (`None` where it has none); or twice `None`."""
    name = arguments.teacher_model_name_or_path
    if name is None:
        return None, None
    try:
        teacher, info = loading.fetch_classifier(name, dtype=torch.float32, **hub_arguments(arguments))
    except LoadingError as error:
        raise UserError(f"--teacher_model_name_or_path {name!r} cannot be loaded: {error}") from error
    flag = f"--teacher_model_name_or_path {name!r}"
    compare_labels(teacher.config, list(student.id2label.values()), flag, "choose a teacher of these images' labels")
    check_complete(teacher, info, flag, "choose a trained teacher")
    return teacher, load_image_processor(name, arguments)


def load_processor(
    arguments: ModelArguments, data_arguments: DataArguments, config: PreTrainedConfig, own_folder: Path | str | None
) -> BaseImageProcessor | None:
    """
    The image processor of the run so far or of the model that it goes on with, or a new one with the first stage's mean and
    deviation. `None`: the teacher may decide.
    """
    for source in (own_folder, arguments.model_name_or_path):
        if source and (processor := load_image_processor(str(source), arguments)):
            describe_input(processor, str(source))  # refused now, not after the teacher's training
            return processor
    if arguments.init_from and (first := load_image_processor(arguments.init_from, arguments)):
        who = f"--init_from {arguments.init_from!r}"
        like = describe_input(first, who)
        if like.channels != RGB:
            raise UserError(f"{who} takes BGR images, a new network RGB images; choose a first stage that takes RGB.")
        return create_image_processor(config, data_arguments.crop_pct, like)
    for source in (arguments.model_name_or_path, arguments.init_from):
        if source:
            logger.warning("%r has no image processor; one is made.", source)
    return None


def load_image_processor(source: str, arguments: ModelArguments) -> BaseImageProcessor | None:
    try:
        return loading.load_image_processor(source, **hub_arguments(arguments))
    except LoadingError as error:
        raise UserError(f"The image processor of {source!r} cannot be loaded: {error}") from error


def hub_revision(name: str, arguments: ModelArguments) -> str | None:
    """The commit that a model of the Hub was loaded from; `None` of a local one."""
    file = cached_file(name, CONFIG_NAME, cache_dir=arguments.cache_dir, token=arguments.token)
    return extract_commit_hash(file, None)


def hub_arguments(arguments: ModelArguments) -> dict:
    return {
        "cache_dir": arguments.cache_dir,
        "token": arguments.token,
        "trust_remote_code": arguments.trust_remote_code,
    }


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
    last = last_whole_checkpoint(output_dir, training_arguments.checkpoint_files)
    last = None if last is None else str(last)
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


def make_output_dir(output_dir: Path) -> None:
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:  # of a file system that takes no new folders
        raise UserError(f"--output_dir {str(output_dir)!r} cannot be made: {error.strerror}.") from error


def log_batch(arguments: DistillationTrainingArguments) -> None:
    batch, meant_for = arguments.effective_batch_size, arguments.learning_rate_batch_size
    logger.info(
        "Batch: %d images (%d processes of %d, %d accumulated); learning rate: %g",
        batch,
        arguments.world_size,
        arguments.train_batch_size,
        arguments.gradient_accumulation_steps,
        arguments.scaled_learning_rate,
    )
    if meant_for is not None and batch != meant_for:
        logger.warning(
            "The recipe is for a batch of %d images, so the learning rate was scaled from %g. For the recipe's own batch "
            "change --per_device_train_batch_size, --gradient_accumulation_steps or the number of processes.",
            meant_for,
            arguments.learning_rate,
        )


def write_report(phase: Phase, model_id: str) -> None:
    """`learning_curves.png` and `README.md`, from the run's own files."""
    model_arguments, _, training_arguments = phase
    output_dir = Path(training_arguments.output_dir)
    teacher = model_arguments.teacher_model_name_or_path
    histories = {"student" if teacher else "model": read_log_history(output_dir)}
    if teacher:
        histories["teacher"] = read_log_history(Path(teacher))
    histories = {name: history for name, history in histories.items() if history}
    if histories:
        plot_learning_curves(histories, output_dir / "learning_curves.png")
    write_model_card(output_dir, model_id)


def print_next_steps(training_arguments: DistillationTrainingArguments) -> None:
    folder = Path(training_arguments.output_dir)
    print("load it:     import binaryvit_hf; from transformers import AutoModelForImageClassification")
    print(f"             AutoModelForImageClassification.from_pretrained('{folder}')")
    print(f"classify:    binaryvit classify {folder} IMAGE")
    print(f"publish:     binaryvit push {folder} REPOSITORY")
    print(f"its card:    {folder / 'README.md'}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

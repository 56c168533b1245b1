"""The steps of a training run, from the command line to the model card."""

import logging
import signal
from pathlib import Path

import numpy as np
from accelerate import PartialState
from transformers import (
    EvalPrediction,
    PreTrainedModel,
    set_seed,
)
from transformers.trainer import TRAINER_STATE_NAME

from ..data.augmentation import create_mix
from ..data.model_inputs import (
    adapt_input,
    check_forward,
    create_image_processor,
    describe_input,
    describe_teacher_input,
    teacher_normalization,
)
from ..data.transforms import add_transforms, collate_images
from ..doctor import check_engine_variable
from ..errors import (
    NonFiniteLossError,
    TerminatedError,
    UploadError,
    UserError,
)
from ..host_memory import keep_freed_memory
from ..hub import resumable_upload
from ..ops import CONFIG_CLASSES, count_operations, total
from ..writing import describe_full_disk
from .arguments import (
    Phase,
    parse_phases,
    record_beginning,
    record_end,
)
from .metrics import TopKAccuracy
from .models import hub_revision, load_model, load_teacher
from .preparation import Inputs, check_arguments, prepare
from .ranks import leave, rank, show_error, shown_error_code
from .report import plot_learning_curves, read_json, read_log_history, write_model_card
from .stochastic_depth import add_drop_path
from .trainer import DistillationTrainer, DistillationTrainingArguments


TEACHER_METRICS = ("teacher_loss", "teacher_accuracy", "teacher_top5_accuracy")

logger = logging.getLogger(__name__)


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
        config, data_arguments.crop_pct, like=teacher_normalization(teacher_processor, config)
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
        with resumable_upload(output_dir, trainer.hub_model_id):
            trainer.push_to_hub()


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

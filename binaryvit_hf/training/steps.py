"""The steps of one run: load, train, evaluate, test, report, upload."""

import logging
import shlex
import signal
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from transformers import (
    BaseImageProcessor,
    EvalPrediction,
    PreTrainedModel,
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
)
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import TrainOutput

from binaryvit_runtime.errors import TerminatedError, counted
from binaryvit_runtime.hub import resumable_upload
from binaryvit_runtime.pixels import read_background, write_background

from ..data.augmentation import create_mix
from ..data.model_inputs import (
    adapt_input,
    check_forward,
    create_image_processor,
    describe_input,
    describe_teacher_input,
    teacher_normalization,
)
from ..data.streaming import ImageStream
from ..data.transforms import add_transforms, collate_images, describe_sizes
from ..network.quantization_binaryvit import LATENT
from ..ops import CONFIG_CLASSES, count_operations, total
from ..run_history import EVALUATION_IMAGES, read_json, read_training_history
from .arguments import DistillationTrainingArguments, RunArguments
from .callbacks.progress import NamedProgress
from .checkpoints import last_whole_checkpoint
from .confusion import ConfusionMatrix, describe, predict_classes
from .forecast import steps_left
from .learning_curves import plot_learning_curves
from .memory_errors import FullMemoryError, evaluation_memory_errors, memory_errors, training_memory_error
from .metrics import TopKAccuracy
from .model_card import write_model_card
from .models import hub_revision, load_model, load_teacher
from .preparation import Inputs
from .run_folder import (
    TRAIN_RESULTS,
    FolderLocks,
    holds_weights,
    read_results,
    record_end,
    record_start,
    write_results,
    write_test_predictions,
)
from .stochastic_depth import add_drop_path
from .trainer import DistillationTrainer


CONFUSION_PICTURES = {"eval": "confusion_matrix.png", "test": "test_confusion_matrix.png"}

logger = logging.getLogger(__name__)


class TrainingRun:
    """
    The models and datasets of one run. `run.run` calls the steps in order.

    Args:
        name: of the run in its progress bar.
    """

    def __init__(self, arguments: RunArguments, inputs: Inputs, name: str = ""):
        self.arguments, self.inputs, self.name = arguments, inputs, name
        self.output_dir = Path(arguments.training.output_dir)
        self.metric = TopKAccuracy()
        # Of the last evaluation: class indices (images,) of labels and answers
        self.answers: tuple[np.ndarray, np.ndarray] | None = None
        self.summary: list[str] = []  # lines about the evaluation of the trained model
        if arguments.model.teacher_model_name_or_path:
            self.announce("Loading the teacher %s.", arguments.model.teacher_model_name_or_path)
        self.teacher, teacher_processor = load_teacher(arguments.model, inputs.config)
        self.student = self.load_student()
        self.processor = inputs.processor or create_image_processor(
            inputs.config, arguments.data.crop_pct, like=teacher_normalization(teacher_processor, inputs.config)
        )
        self.saves_background = inputs.finished and read_background(self.processor) != inputs.background
        write_background(self.processor, inputs.background)
        self.check_inputs_of_models(teacher_processor)
        trains = arguments.training.do_train and not inputs.finished
        keep = trains and (arguments.data.keep_images_in_memory or arguments.data.crop_in_batches)
        self.datasets = add_transforms(inputs.images, self.processor, arguments.data, arguments.training.seed, keep)
        logger.info("%s", describe_sizes(self.processor, arguments.data, trains))
        self.trainer = self.create_trainer(self.student, self.teacher)
        if inputs.finished:
            self.trainer.state.epoch = read_json(self.output_dir / TRAINER_STATE_NAME).get("epoch")  # for the results

    def load_student(self) -> PreTrainedModel:
        arguments, inputs = self.arguments.model, self.inputs
        finished_run = self.output_dir if inputs.finished else None
        student = load_model(arguments, inputs.config, finished_run, inputs.new_head)
        if arguments.drop_path_rate and inputs.config.model_type == "vit":
            add_drop_path(student.vit, arguments.drop_path_rate)
        if inputs.first_weights is not None:
            student.load_state_dict(inputs.first_weights, strict=False)  # two_stage.py has checked the missing ones
        return student

    def check_inputs_of_models(self, teacher_processor: BaseImageProcessor | None) -> None:
        """Try each model on an image, and let the teacher take the student's images."""
        arguments = self.arguments.model
        student_input = describe_input(self.processor, "The student")
        if arguments.model_name_or_path:
            check_forward(self.student, student_input, f"--model_name_or_path {arguments.model_name_or_path!r}")
        if self.teacher is not None:
            flag = f"--teacher_model_name_or_path {arguments.teacher_model_name_or_path!r}"
            teacher_input = describe_teacher_input(self.teacher, teacher_processor, student_input, flag)
            check_forward(self.teacher, teacher_input, flag)
            adapt_input(self.teacher, given=student_input, wanted=teacher_input)

    def create_trainer(self, model: PreTrainedModel, teacher: PreTrainedModel | None = None) -> DistillationTrainer:
        trainer = DistillationTrainer(
            model=model,
            args=self.arguments.training,
            teacher=teacher,
            mix=create_mix(self.arguments.data, self.inputs.config.num_labels),
            train_dataset=self.datasets.get("train"),
            eval_dataset=self.datasets["validation"],
            data_collator=collate_images,
            processing_class=self.processor,
            compute_metrics=self.compute_metrics,
        )
        for printer in (
            ProgressCallback,
            PrinterCallback,
        ):  # with --disable_tqdm the second, which prints dictionaries
            trainer.remove_callback(printer)
        bars = not self.arguments.training.disable_tqdm
        trainer.add_callback(NamedProgress(self.name, bars, self.inputs.evaluation_images))
        return trainer

    def announce(self, text: str, *values) -> None:
        """Log what begins now, after the name of the run."""
        logger.info("%s" + text, f"{self.name}: " if self.name else "", *values)

    def compute_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
        self.answers = prediction.label_ids, predict_classes(logits, prediction.label_ids)
        return self.metric.compute(predictions=logits.astype(np.float32), references=prediction.label_ids)

    def train(self, locks: FolderLocks) -> None:
        """Train and save the final model; on SIGTERM or SIGHUP save a checkpoint and raise TerminatedError."""
        trainer, arguments = self.trainer, self.arguments.training
        if trainer.is_world_process_zero():
            self.output_dir.mkdir(parents=True, exist_ok=True)
            locks.hold(self.output_dir)
            log_batch(arguments)
            if self.arguments.data.streaming:
                logger.info("Streaming: %s", self.inputs.images["train"])
            trainer.add_callback(RecordStart(self.arguments, self.inputs.images["train"]))
        steps = steps_left(self.arguments, self.inputs)
        self.announce("Training: %s.", describe_length(arguments, steps))
        earlier_metrics = read_results(self.output_dir / TRAIN_RESULTS)
        result = self.train_steps()
        if number := trainer.termination.terminated:
            saved = "the weights only (--save_only_model)" if arguments.save_only_model else "a checkpoint"
            outcome = "start again" if arguments.save_only_model else "resume"
            raise TerminatedError(
                f"Training got a {signal.Signals(number).name}, saved {saved} and stopped after step "
                f"{trainer.state.global_step}. Run the same command again to {outcome}."
            )
        if trainer.is_world_process_zero():
            record_end(self.output_dir)
        kinds = "packed and latent weights" if trainer.saves_packed else "weights"
        self.announce("Saving the %s in %s.", kinds, self.output_dir)
        trainer.save_model(_internal_call=True)  # without this argument it uploads, before there is a card
        trainer.save_state()
        metrics = {**result.metrics, "train_samples": len(self.inputs.images["train"])}
        if "train_loss" not in metrics:  # training resumed after its last step
            metrics = earlier_metrics or metrics
        self.save_metrics("train", metrics | {EVALUATION_IMAGES: self.inputs.evaluation_images})

    def train_steps(self) -> TrainOutput:
        """Raises FullMemoryError if the memory does not hold a batch."""
        trainer = self.trainer

        def create(error: BaseException) -> FullMemoryError:
            device, batch_size = trainer.args.device, trainer._train_batch_size
            return training_memory_error(error, device, batch_size, self.arguments_to_go_on())

        with memory_errors(create):
            return trainer.train(resume_from_checkpoint=self.inputs.checkpoint)

    def arguments_to_go_on(self) -> str:
        """What to give beside another batch, which the same command alone refuses; empty if this run has saved nothing."""
        prefix = "teacher." if self.name.startswith("teacher") else ""
        if last := last_whole_checkpoint(self.output_dir, self.arguments.training.checkpoint_files):
            return f"--{prefix}resume_from_checkpoint, to go on from {last}"
        more = []
        if self.name.startswith("student"):
            teacher = shlex.quote(self.arguments.model.teacher_model_name_or_path)
            more.append(f"--teacher_model_name_or_path {teacher}, which is trained already")
        if holds_weights(self.output_dir):  # which this run cannot go on from, such as those of --save_only_model
            more.append(f"another --{prefix}output_dir")
        return ", and ".join(more)

    def evaluate(self) -> None:
        """Evaluate student and teacher on the validation images."""
        kind = self.inputs.evaluation_images
        self.announce("Evaluating on %s.", counted(len(self.inputs.images["validation"]), f"{kind} image"))
        with evaluation_memory_errors(self.trainer.args):
            metrics = self.trainer.evaluate()
        metrics[EVALUATION_IMAGES] = kind
        metrics["eval_samples"] = len(self.inputs.images["validation"])
        metrics |= self.describe_confusion("eval", kind)
        if "eval_top5_accuracy" in metrics:
            share = f"{metrics['eval_top5_accuracy']:.1%}"
            self.summary.insert(1, f"top 5:     {share} have their label among the five most likely classes")
        if self.teacher is not None:
            metrics |= self.describe_teacher(self.teacher)
            self.summary.insert(1, f"teacher:   {metrics['teacher_accuracy']:.1%} of the same images")
        if self.inputs.broken:
            metrics["skipped_images"] = len(self.inputs.broken)
        self.save_metrics("eval", metrics)

    def describe_teacher(self, teacher: PreTrainedModel) -> dict:
        """The teacher's accuracy, size and operations, and its commit on the Hub."""
        self.announce("Evaluating the teacher on the same images.")
        with evaluation_memory_errors(self.trainer.args):
            metrics = self.create_trainer(teacher).evaluate(metric_key_prefix="teacher")
        names = ("teacher_loss", "teacher_accuracy", "teacher_top5_accuracy")
        described = {name: metrics[name] for name in names if name in metrics}
        if revision := hub_revision(self.arguments.model.teacher_model_name_or_path, self.arguments.model):
            described["teacher_revision"] = revision
        described["teacher_bytes"] = sum(tensor.nbytes for tensor in teacher.state_dict().values())
        if teacher.config.model_type in CONFIG_CLASSES:
            described["teacher_ops"] = total(count_operations(teacher.config)).ops
        return described

    def test(self) -> None:
        """Evaluate on the test images. Nothing is chosen by them, neither a checkpoint nor an argument."""
        self.announce("Evaluating on %s.", counted(len(self.inputs.images["test"]), "test image"))
        with evaluation_memory_errors(self.trainer.args):
            metrics = self.trainer.evaluate(self.datasets["test"], metric_key_prefix="test")
        metrics["test_samples"] = len(self.inputs.images["test"])
        metrics |= self.describe_confusion("test", "test")
        if self.trainer.is_world_process_zero():
            labels, predicted = self.answers
            write_test_predictions(self.output_dir, labels, predicted)
        self.save_metrics("test", metrics)

    def describe_confusion(self, split: str, images_name: str) -> dict[str, float]:
        """
        Draw the confusion matrix of the last evaluation. Returns the confidence interval of its accuracy, and the accuracy of
        guessing.
        """
        names = [str(name) for _, name in sorted(self.inputs.config.id2label.items())]
        labels, predicted = self.answers
        matrix = ConfusionMatrix.from_predictions(labels, predicted, names)
        self.summary += describe(matrix, images_name)
        if self.trainer.is_world_process_zero():
            self.output_dir.mkdir(parents=True, exist_ok=True)
            matrix.plot(
                self.output_dir / CONFUSION_PICTURES[split],
                f"Confusion matrix of {counted(matrix.images, f'{images_name} image')}",
            )
        low, high = matrix.interval
        results = {f"{split}_accuracy_low": low, f"{split}_accuracy_high": high}
        if len(names) > 1:
            results[f"{split}_guessing_accuracy"] = matrix.guessing_accuracy
        return results

    def save_metrics(self, split: str, metrics: dict) -> None:
        if self.trainer.is_world_process_zero():
            write_results(self.output_dir, split, metrics)

    def report(self) -> None:
        """Write `learning_curves.png` and the model card, `README.md`, from the files of the run."""
        if not self.trainer.is_world_process_zero():
            return
        self.announce("Writing the model card and the learning curves.")
        teacher = self.arguments.model.teacher_model_name_or_path
        folders = {"student": self.output_dir, "teacher": Path(teacher)} if teacher else {"model": self.output_dir}
        histories = {name: read_training_history(folder) for name, folder in folders.items()}
        plot_learning_curves(histories, self.output_dir / "learning_curves.png")
        if self.saves_background:  # 0.1.0, which trained this model, did not
            for folder in filter(Path.is_dir, (self.output_dir, self.output_dir / LATENT)):
                self.processor.save_pretrained(folder)
        write_model_card(self.output_dir, self.trainer.hub_model_id or str(self.output_dir))

    def upload(self) -> None:
        self.announce("Uploading to %s.", self.trainer.hub_model_id)
        with resumable_upload(self.output_dir, self.trainer.hub_model_id):
            self.trainer.push_to_hub()


class RecordStart(TrainerCallback):
    """
    Record in the output directory which run trains there. It is the last callback: a checkpoint that does not fit is refused
    before, and the finished run in the directory stays finished.
    """

    def __init__(self, arguments: RunArguments, images: Dataset | ImageStream):
        self.arguments, self.images = arguments, images

    def on_train_begin(self, args, state, control, **kwargs):
        record_start(Path(args.output_dir), self.arguments, self.images)


def describe_length(arguments: DistillationTrainingArguments, steps: int) -> str:
    """`40 epochs, 1,200 steps`; of a run that resumes the steps that are left."""
    if arguments.max_steps > 0:
        return counted(steps, "step")
    return f"{arguments.num_train_epochs:g} {'epoch' if arguments.num_train_epochs == 1 else 'epochs'}, {counted(steps, 'step')}"


def log_batch(arguments: DistillationTrainingArguments) -> None:
    batch, recipe_batch = arguments.effective_batch_size, arguments.learning_rate_batch_size
    processes, accumulated = arguments.world_size, arguments.gradient_accumulation_steps
    parts = ""
    if processes * accumulated > 1:
        parts = f" ({counted(processes, 'process')} of {arguments.train_batch_size}, {accumulated} accumulated)"
    logger.info("Batch: %s%s; learning rate: %g", counted(batch, "image"), parts, arguments.scaled_learning_rate)
    gpus = 0 if arguments.device.type == "cpu" else torch.accelerator.device_count()
    if processes == 1 and gpus > 1:
        logger.info(
            "GPUs: 1 of %d. To train on all, start the command with `torchrun --nproc_per_node %d` instead of `python`.",
            gpus,
            gpus,
        )
    if recipe_batch is not None and batch != recipe_batch:
        logger.warning(
            "The recipe is for a batch of %s, so the learning rate was scaled from %g. For the recipe's own batch "
            "change --per_device_train_batch_size, --gradient_accumulation_steps or the number of processes.",
            counted(recipe_batch, "image"),
            arguments.learning_rate,
        )

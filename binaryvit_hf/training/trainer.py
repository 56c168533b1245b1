"""Distillation from a full-precision teacher: a Trainer that changes the loss, and packs what it saves and uploads."""

import contextlib
import functools
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from huggingface_hub import HfApi
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments, get_scheduler
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import (
    PREFIX_CHECKPOINT_DIR,
    HubStrategy,
    get_last_checkpoint,
    has_length,
    rotate_checkpoints,
)
from transformers.utils.hub import PushInProgress

from ..argument_checks import check_ranges, check_reporting
from ..data.sampling import StreamSampler, create_train_sampler, seeded_rng
from ..errors import NonFiniteLossError, UserError, first_sentence
from ..network.quantization_binaryvit import LATENT, ShippedModel, pack_folder
from .callbacks.averaging import WeightAverage
from .callbacks.batch_norm_reestimation import first_batches, reestimate_batch_norm
from .callbacks.positive_clips import PositiveClips
from .checkpoints import CheckpointedCallback, SaveOnTermination, flush
from .latent_weights import distance_from_one, one_bit_layers
from .techniques import TrainingOptions


ASIDE = "_writing"
LAMBDA_SCHEDULES = ("linear", "cosine", "cosine_with_min_lr", "cosine_warmup_with_min_lr", "polynomial")
MIXED_LABEL_LOSS_WEIGHT = 0.1  # of the paper's runs with mixup or cutmix


@dataclass
class DistillationTrainingArguments(TrainingOptions, TrainingArguments):
    """
    `TrainingArguments` with the two of the distillation loss, linear scaling of the learning rate, repeated augmentation
    and packing, and the paper's defaults for the loss and for clipping.
    """

    label_loss_weight: float | None = field(
        default=None,
        metadata={
            "help": "Share of the cross-entropy with the labels in the loss, from 0 to 1; the rest is the teacher's. "
            "Default: 0, or 0.1 where mixup or cutmix make the labels soft."
        },
    )
    distillation_temperature: float = field(
        default=1.0,
        metadata={
            "help": "Temperature of student and teacher in the distillation loss, which is scaled by its square."
        },
    )
    max_grad_norm: float = field(
        default=0.0,
        metadata={
            "help": "Clip the gradient at this norm; 0, as in the paper's runs, does not. The gradient of a 1-bit network "
            "swings between norms of 2 and 300 from step to step, and transformers' default of 1 stalls it."
        },
    )
    learning_rate_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "The batch that --learning_rate is meant for: the rate is scaled linearly to the batch of this run, of "
            "all processes and accumulated steps together. Default: not scaled."
        },
    )
    lr_schedule_per_epoch: bool = field(
        default=False,
        metadata={
            "help": "Hold the learning rate for an epoch, as in the paper's runs, not change it with every step."
        },
    )
    repeated_augmentations: int = field(
        default=1,
        metadata={"help": "See each image that many times in neighbouring batches, augmented another way each time."},
    )
    save_packed: bool = field(
        default=True,
        metadata={
            "help": "Save a trained network of binary weights packed, a bit a weight, with the float weights that training "
            "goes on from in the folder 'latent'; --no_save_packed saves these alone."
        },
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Off: images are decoded and transformed as they are read."}
    )

    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={
            "help": "Go on from this checkpoint, or, alone or with 'true', from the last one in --output_dir, with arguments "
            "that may differ from those it was trained with.",
            "nargs": "?",
            "const": "true",
        },
    )

    def __post_init__(self):
        check_ranges(self)
        if self.output_dir == "":
            raise UserError("--output_dir is empty; name a folder.")
        super().__post_init__()
        self.output_dir = os.path.normpath(self.output_dir)
        check_reporting(self.report_to)
        if self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = False  # every parameter is used, so the search is for nothing
        # Without an accelerator PyTorch warns of every loader that pins its memory.
        self.dataloader_pin_memory = self.dataloader_pin_memory and torch.accelerator.is_available()
        if self.lr_schedule_per_epoch and (self.max_steps > 0 or self.lr_scheduler_type not in LAMBDA_SCHEDULES):
            raise ValueError(
                "lr_schedule_per_epoch needs num_train_epochs, not max_steps, and an lr_scheduler_type that is a function of "
                f"the step: {', '.join(LAMBDA_SCHEDULES)}."
            )
        if self.auto_find_batch_size and self.learning_rate_batch_size is not None:
            raise UserError(
                "--auto_find_batch_size changes the batch, to which --learning_rate_batch_size scales the learning rate "
                "before: leave one of them out."
            )
        self.check_options()

    def check_optimization(self) -> None:
        """
        Make the optimiser and the schedule, of one weight.

        Raises:
            UserError: one of them is not installed, or does not take its arguments.
        """
        try:
            weight, steps = nn.Parameter(torch.zeros(1, 1, device=self.device)), 100
            if self.optim_target_modules is not None:  # for a whole model
                return
            optimizer_class, kwargs = DistillationTrainer.get_optimizer_cls_and_kwargs(self)
            optimizer = optimizer_class([weight], **kwargs)
            warmup = self.get_warmup_steps(steps)
            get_scheduler(self.lr_scheduler_type, optimizer, warmup, steps, self.lr_scheduler_kwargs)
        except Exception as error:  # of any optimiser and schedule
            raise UserError(
                f"--optim {self.optim.value} with --lr_scheduler_type {self.lr_scheduler_type.value}, --optim_args and "
                f"--lr_scheduler_kwargs as given: {first_sentence(error)}"
            ) from error

    @property
    def effective_batch_size(self) -> int:
        """Images between two steps of the optimiser, of all processes."""
        return self.train_batch_size * self.gradient_accumulation_steps * self.world_size

    @property
    def sampling_seed(self) -> int:
        return self.data_seed if self.data_seed is not None else self.seed

    @property
    def scaled_learning_rate(self) -> float:
        if self.learning_rate_batch_size is None:
            return self.learning_rate
        return self.learning_rate * self.effective_batch_size / self.learning_rate_batch_size


class DistillationTrainer(Trainer):
    """
    Trainer of a student on what a teacher says, or, without a teacher, on the labels.

    Args:
        teacher: classifier of the same labels, in full precision. It is put into evaluation mode and never trained,
            never saved and no part of the optimiser.
        mix: in training, takes and returns a batch of images and its labels (`augmentation.create_mix`).
    """

    # compute_loss returns a mean over its batch, so the Trainer must divide by the steps of gradient accumulation.
    loss_is_scaled_for_ga = False

    def __init__(
        self, model=None, *args, teacher: PreTrainedModel | None = None, mix: Callable | None = None, **kwargs
    ):
        with evaluable(model):
            super().__init__(model, *args, **kwargs)
        self.label_smoother = None  # its loss is in compute_loss, and evaluation is by the labels as they are
        self.mix = mix
        self.train_sampler = None
        self.add_callback(SetEpoch(self))
        self.termination = SaveOnTermination()
        self.add_callback(self.termination)
        self.add_callback(PositiveClips(self.plain_model))
        options = self.args.create_callbacks()
        for callback in options:
            self.add_callback(callback)
        self.checkpointed = [callback for callback in options if isinstance(callback, CheckpointedCallback)]
        self.writes_aside = False
        self.teacher = teacher
        if teacher is not None:
            teacher.requires_grad_(False).eval()
            self.teacher = self.accelerator.prepare_model(teacher, evaluation_mode=True)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch=None)
        images, labels = inputs["pixel_values"], inputs["labels"]
        if self.mix is not None:
            images, labels = self.mix(images, labels)
        outputs = model(pixel_values=images)
        smoothing = self.args.label_smoothing_factor
        if self.teacher is None:
            # Not the model's own loss: it would take soft labels for those of a multi-label problem.
            loss = nn.functional.cross_entropy(outputs.logits, labels, label_smoothing=smoothing)
        else:
            with torch.no_grad():
                teacher_logits = self.teacher(pixel_values=images).logits
            weight, temperature = self.args.label_loss_weight, self.args.distillation_temperature
            loss = distillation_loss(outputs.logits, teacher_logits, labels, weight, temperature, smoothing)
        if self.args.weight_regularization:
            weights = [layer.weight for layer in one_bit_layers(self.plain_model).values()]
            loss = loss + self.args.weight_regularization * distance_from_one(weights)
        return (loss, outputs) if return_outputs else loss

    def train(self, *args, **kwargs):
        self.args.check_network(self.plain_model.config)
        for callback in self.checkpointed:
            callback.checkpoint = None
        try:
            output = super().train(*args, **kwargs)
        finally:
            self.termination.restore()
        # Where all steps were done before, there was no loss to take the mean of.
        if self.state.global_step == self._initial_global_step:
            output.metrics.pop("train_loss", None)
        if not self.termination.terminated:
            self.finish_weights()
        return output

    def _run_epoch(self, *args, **kwargs):
        """The Trainer looks after a step whether it was the last, so it would take one more where all are done."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def evaluate(self, *args, **kwargs):
        """
        As in transformers; in the midst of training of what it would leave behind now, and without a trace.

        Raises:
            NonFiniteLossError: the loss is no number, so it must not choose a best model.
        """
        if not self.is_in_train:
            metrics = super().evaluate(*args, **kwargs)
        else:
            with seeded_rng(self.args.seed), self.finished_weights():  # the loader draws a seed for its workers
                metrics = super().evaluate(*args, **kwargs)
        for name, value in metrics.items():
            if name.endswith("_loss") and not math.isfinite(value):
                if self.is_in_train:
                    self.stop_at(f"The evaluation loss became {value} at step {self.state.global_step}")
                raise NonFiniteLossError(
                    f"The evaluation loss is {value}: the weights are damaged, or training diverged; train again with a lower "
                    "--learning_rate, or evaluate another checkpoint."
                )
        return metrics

    def stop_at(self, fault: str) -> None:
        """
        Raises:
            NonFiniteLossError: always.
        """
        last = get_last_checkpoint(self.args.output_dir)
        kept = f"the last good checkpoint is {last}" if last else "no checkpoint had been saved before"
        raise NonFiniteLossError(
            f"{fault}, so training stopped; {kept}. Try a lower --learning_rate, --max_grad_norm, or --bf16 instead of --fp16."
        )

    def _get_dataloader(self, *args, is_training: bool = False, **kwargs):
        """`--dataloader_drop_last` is for training: evaluation counts every image."""
        wanted = self.args.dataloader_drop_last
        self.args.dataloader_drop_last = wanted and is_training
        try:
            return super()._get_dataloader(*args, is_training=is_training, **kwargs)
        finally:
            self.args.dataloader_drop_last = wanted

    @contextlib.contextmanager
    def finished_weights(self):
        """Inside of this the model is what training would leave behind now."""
        if not self.finishes_weights:
            yield
            return
        before = {name: tensor.clone() for name, tensor in self.plain_model.state_dict().items()}
        self.finish_weights()
        try:
            yield
        finally:
            self.plain_model.load_state_dict(before)

    @property
    def finishes_weights(self) -> bool:
        return self.args.ema_decay is not None or self.args.batch_norm_reestimation_batches > 0

    def finish_weights(self) -> None:
        """Put the average into the place of the weights and take their statistics anew, where the options say so."""
        for callback in self.checkpointed:
            if isinstance(callback, WeightAverage):
                self.plain_model.load_state_dict(callback.tensors())
        if count := self.args.batch_norm_reestimation_batches:
            batches = first_batches(self.train_dataset, self.data_collator, count, self.args)
            reestimate_batch_norm(self.plain_model, batches)

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        for callback in self.checkpointed:
            callback.checkpoint = checkpoint and Path(checkpoint)

    @staticmethod
    def get_optimizer_cls_and_kwargs(args, model=None):
        optimizer_class, kwargs = Trainer.get_optimizer_cls_and_kwargs(args, model)
        return optimizer_class, kwargs | {"lr": args.scaled_learning_rate}

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        created_before = self.lr_scheduler is not None
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if self.args.lr_schedule_per_epoch and not created_before:
            steps = math.ceil(num_training_steps / self.args.num_train_epochs)
            scheduler.lr_lambdas = [functools.partial(held, schedule, steps) for schedule in scheduler.lr_lambdas]
        return scheduler

    def _get_train_sampler(self, train_dataset=None):
        dataset = train_dataset if train_dataset is not None else self.train_dataset
        shuffled = self.args.train_sampling_strategy == "random" and has_length(dataset)
        if not shuffled and getattr(dataset, "stream", None) is None:
            return super()._get_train_sampler(train_dataset)
        self.train_sampler = create_train_sampler(
            dataset,
            self.args.repeated_augmentations,
            self.args.train_batch_size,
            self.args.world_size,
            self.args.sampling_seed,
        )
        return self.train_sampler

    def _get_eval_sampler(self, eval_dataset):
        stream = getattr(eval_dataset, "stream", None)
        return super()._get_eval_sampler(eval_dataset) if stream is None else StreamSampler(stream)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """
        Weights of products alone: decay would pull scales, shifts, slopes, clips and normalisation from what they are
        for, and position embeddings and class tokens are no weights.
        """
        embeddings = ("position_embeddings", "class_token", "cls_token")
        return [
            name
            for name, parameter in model.named_parameters()
            if parameter.dim() > 1 and not name.endswith(embeddings)
        ]

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        if not torch.isfinite(loss):  # before the optimiser spreads it over every weight
            self.stop_at(f"The loss became {loss.item()} at step {self.state.global_step + 1}")
        return loss

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """The final model is saved packed, its latent weights beside it; checkpoints are latent alone, to go on from."""
        folder = Path(output_dir or self.args.output_dir)
        if folder.name.startswith(PREFIX_CHECKPOINT_DIR):
            super()._save(str(folder), state_dict)
            return
        trained = folder / LATENT if self.packs else folder
        super()._save(str(trained), state_dict)
        # A pickle of all arguments, the token of the Hub among them, is not for publishing.
        (trained / TRAINING_ARGS_NAME).unlink(missing_ok=True)
        if self.packs and self.args.should_save:
            pack_folder(type(self.plain_model), folder / LATENT, folder)
            if self.processing_class is not None:
                self.processing_class.save_pretrained(folder)

    def _save_checkpoint(self, model, trial) -> None:
        """Written aside and renamed, so that whatever is called checkpoint-… is whole."""
        folder = Path(self.args.output_dir)
        written = folder / ASIDE / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        checkpoint = folder / written.name
        if self.args.should_save:
            shutil.rmtree(folder / ASIDE, ignore_errors=True)  # of a run that was killed while writing
        self.writes_aside = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.writes_aside = False
        self.accelerator.wait_for_everyone()
        if self.state.best_model_checkpoint == str(written):
            self.state.best_model_checkpoint = str(checkpoint)
        if self.args.should_save:
            self.state.save_to_json(str(written / TRAINER_STATE_NAME))
            for callback in self.checkpointed:
                callback.save(written)
            flush(written)
            shutil.rmtree(checkpoint, ignore_errors=True)  # of this step, before the run was interrupted
            written.rename(checkpoint)
            written.parent.rmdir()
            rotate_checkpoints(
                self.args.output_dir, self.args.save_total_limit, self.state.best_model_checkpoint, use_mtime=True
            )
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(checkpoint))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_weights(model or self.plain_model, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_best_model()
        else:
            load_weights(self.plain_model, self.state.best_model_checkpoint)
        for callback in self.checkpointed:
            callback.load(Path(self.state.best_model_checkpoint))

    def _get_output_dir(self, trial):
        folder = super()._get_output_dir(trial)
        return str(Path(folder) / ASIDE) if self.writes_aside else folder

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """What is uploaded on the way has the shape of what is uploaded in the end."""
        if self.writes_aside:  # it will have its name first
            return
        if self.args.hub_strategy == HubStrategy.END:
            return
        with self.finished_weights():  # of all processes
            self._push_finished(checkpoint_folder)

    def _push_finished(self, checkpoint_folder: str) -> None:
        if not self.is_world_process_zero():
            return
        unfinished = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if unfinished and not self.args.hub_always_push:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        model = self.plain_model
        (ShippedModel(model) if self.packs else model).save_pretrained(self.args.output_dir)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(self.args.output_dir)

        uploads: list[tuple[str, str | None]] = [(self.args.output_dir, None)]
        if self.args.hub_strategy == HubStrategy.CHECKPOINT:
            uploads.append((checkpoint_folder, "last-checkpoint"))
        elif self.args.hub_strategy == HubStrategy.ALL_CHECKPOINTS:
            uploads.append((checkpoint_folder, Path(checkpoint_folder).name))
        api = HfApi()  # one, which uploads in order: a checkpoint must not come before its model
        jobs = [
            api.upload_folder(
                repo_id=self.hub_model_id,
                folder_path=folder,
                path_in_repo=path_in_repo,
                commit_message=f"Training in progress, step {self.state.global_step}",
                token=self.args.hub_token,
                revision=self.args.hub_revision,
                ignore_patterns=["_*", f"{PREFIX_CHECKPOINT_DIR}-*", TRAINING_ARGS_NAME],
                run_as_future=True,
            )
            for folder, path_in_repo in uploads
        ]
        self.push_in_progress: PushInProgress | None = PushInProgress(
            (self.push_in_progress.jobs if unfinished else []) + jobs
        )

    @property
    def plain_model(self) -> PreTrainedModel:
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    @property
    def packs(self) -> bool:
        """Whether there is a latent model to pack, and it is wanted."""
        model = self.plain_model
        latent = model.config.model_type == "binaryvit" and model.config.weight_bits < 32 and not model.is_packed
        return self.args.save_packed and latent

    def create_model_card(self, *args, **kwargs):
        """A card that stands there already has the run's results, which transformers' own would overwrite."""
        if not (Path(self.args.output_dir) / "README.md").is_file():
            super().create_model_card(*args, **kwargs)


def held(schedule: Callable[[int], float], steps: int, step: int) -> float:
    """A schedule that changes every so many steps."""
    return schedule(step // steps * steps)


class SetEpoch(TrainerCallback):
    """Tell the sampler which epoch begins; accelerate does not reach it where a resumed run skips batches."""

    def __init__(self, trainer: DistillationTrainer):
        self.trainer = trainer

    def on_epoch_begin(self, args, state, control, **kwargs):
        if self.trainer.train_sampler is not None:
            self.trainer.train_sampler.set_epoch(math.floor(state.epoch + 1e-6))


def load_weights(model: PreTrainedModel, checkpoint: str) -> None:
    """
    Load a checkpoint's weights as `from_pretrained` does. The Trainer compares names as they are in the file, and leaves
    what it does not find as it was: all layers of transformers' ViT, which is saved by other names than it has in memory.
    """
    loaded = type(model).from_pretrained(checkpoint, config=model.config)
    model.load_state_dict(loaded.state_dict())


@contextlib.contextmanager
def evaluable(model: nn.Module | None):
    """
    The Trainer refuses quantised models when it is made, before it knows whether it will train or evaluate; inside of this
    it does not. Packed weights refuse training by themselves (`PackableModel.train`).
    """
    quantized = getattr(model, "is_quantized", False)
    if quantized:
        model.is_quantized = False
    try:
        yield
    finally:
        if quantized:
            model.is_quantized = True


def distillation_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    labels: torch.Tensor,
    label_loss_weight: float | None = None,
    temperature: float = 1.0,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """
    `(1 - w) * T**2 * -sum softmax(teacher / T) * log_softmax(student / T) + w * cross_entropy(student, labels)`, the mean
    over the batch (Le & Li, CVPRW 2023; at T = 1 and w = 0 the loss of the paper's runs).

    Args:
        student_logits, teacher_logits: `(batch, labels)`.
        labels: class indices `(batch,)`, or soft labels `(batch, labels)`.
        label_loss_weight: w; `None` is the paper's, 0 for class indices and 0.1 for soft labels.
        temperature: T.
        label_smoothing: share of the labels that is spread over all classes.
    """
    if label_loss_weight is None:
        label_loss_weight = MIXED_LABEL_LOSS_WEIGHT if labels.is_floating_point() else 0.0
    soft_targets = nn.functional.softmax(teacher_logits / temperature, dim=-1)
    loss = temperature**2 * nn.functional.cross_entropy(student_logits / temperature, soft_targets)
    if label_loss_weight == 0:
        return loss
    label_loss = nn.functional.cross_entropy(student_logits, labels, label_smoothing=label_smoothing)
    return (1 - label_loss_weight) * loss + label_loss_weight * label_loss

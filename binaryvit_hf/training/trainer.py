"""`DistillationTrainer`: transformers' Trainer with the paper's loss, whole checkpoints, and packed weights to publish."""

import contextlib
import functools
import logging
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerState
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import (
    PREFIX_CHECKPOINT_DIR,
    HubStrategy,
    IntervalStrategy,
    get_last_checkpoint,
    has_length,
    rotate_checkpoints,
)
from transformers.utils.hub import PushInProgress

from binaryvit_runtime.errors import NonFiniteLossError, UserError
from binaryvit_runtime.writing import give_usual_mode

from ..data.sampling import StreamSampler, create_train_sampler, seeded_rng
from ..data.workers import shield_workers
from ..network.packing_binaryvit import binary_layers, packed_layers
from ..network.quantization_binaryvit import LATENT, ShippedModel, is_latent, pack_folder, stored_tensors
from ..ops import CONFIG_CLASSES
from .arguments import DistillationTrainingArguments
from .callbacks.averaging import WeightAverage
from .callbacks.batch_norm_reestimation import first_batches, reestimate_batch_norm
from .callbacks.checkpointed import CheckpointedCallback
from .callbacks.positive_clips import PositiveClips
from .callbacks.termination import EvaluationStopped, SaveOnTermination
from .checkpoints import flush_to_disk
from .compilation import StepCompiler
from .losses import FiniteLosses, distance_from_one, distillation_loss
from .memory_errors import evaluation_memory_errors
from .run_folder import UNFINISHED_RUN_ARGUMENTS
from .step_graph import StepGraph


STAGING = "_writing"  # folder of unfinished checkpoints; the underscore keeps it out of uploads

logger = logging.getLogger(__name__)


class DistillationTrainer(Trainer):
    """
    Trainer that distils from a teacher, or, without one, trains on the labels.

    Args:
        args: `DistillationTrainingArguments`.
        teacher: full-precision classifier of the same labels. It is set to evaluation mode; it is neither trained nor saved.
        mix: takes and returns a training batch of images and labels (`data.augmentation.create_mix`).

    Raises:
        TypeError: `args` are of another class, or there is a `compute_loss_func`: the loss is that of `batch_loss`.
    """

    # compute_loss returns a mean over its batch, so the Trainer must divide by the steps of gradient accumulation.
    loss_is_scaled_for_ga = False

    def __init__(
        self,
        model=None,
        args: DistillationTrainingArguments | None = None,
        *more,
        teacher: PreTrainedModel | None = None,
        mix: Callable | None = None,
        **kwargs,
    ):
        if not isinstance(args, DistillationTrainingArguments):
            given = "none" if args is None else type(args).__name__
            raise TypeError(
                "DistillationTrainer needs args=DistillationTrainingArguments(...) of binaryvit_hf.training.arguments, which "
                f"takes all of transformers' TrainingArguments; there are {given}."
            )
        # The Trainer refuses packed models even for evaluation. `PackableModel.train` refuses to train them.
        is_packed = getattr(model, "is_quantized", False)
        if is_packed:
            model.is_quantized = False
        try:
            super().__init__(model, args, *more, **kwargs)
        finally:
            if is_packed:
                model.is_quantized = True
        if self.compute_loss_func is not None:
            raise TypeError(
                "DistillationTrainer has a loss of its own: leave out compute_loss_func, and override batch_loss for another one."
            )
        self.label_smoother = None  # compute_loss smooths labels itself, in training alone
        self.mix = mix
        self.train_sampler = None
        self.evaluated: dict[str, Any] = {}  # the trainer's own datasets that have an evaluation loader, by name
        self.termination = SaveOnTermination()
        method_callbacks = self.args.create_callbacks()
        for callback in (SetModel(self), SetEpoch(self), self.termination, PositiveClips(), *method_callbacks):
            self.add_callback(callback)
        self.checkpointed = [callback for callback in method_callbacks if isinstance(callback, CheckpointedCallback)]
        self.is_staging = False
        self.losses = FiniteLosses()
        self.compiler = StepCompiler(
            self.plain_model,
            False if self.compiles_by_accelerate else self.args.torch_compile,
            self.args.device,
            self.args.torch_compile_backend or "inductor",
            self.args.torch_compile_mode,
            is_float32=not (self.args.bf16 or self.args.fp16),
        )
        self.graph = StepGraph(self.plain_model, self.batch_loss, self.args.wants_graphs())
        self.is_full_batch = False  # whether the present batch has as many images as most batches
        self.teacher = teacher
        if teacher is not None:
            teacher.requires_grad_(False).eval()
            self.teacher = self.accelerator.prepare_model(teacher, evaluation_mode=True)

    @property
    def plain_model(self) -> PreTrainedModel:
        """The model without the wrappers of distributed training and compilation."""
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    @property
    def saves_packed(self) -> bool:
        """Whether the final model is saved packed: it has latent binary weights, and `--save_packed` is on."""
        return self.args.save_packed and is_latent(self.plain_model)

    @property
    def compiles_by_accelerate(self) -> bool:
        """Whether accelerate compiles, not this class: FSDP and DeepSpeed wrap the layers."""
        return bool(self.args.fsdp or self.args.deepspeed)

    def create_accelerator_and_postprocess(self) -> None:
        """
        Without compilation by accelerate, which would compile the whole network, for every shape of a batch, and for
        evaluation too. Pinned batches are copied to the GPU while it computes. Several processes do not look for parameters
        without a gradient in networks that have none.
        """
        args, config = self.args, self.args.accelerator_config
        before = args.torch_compile_backend, args.ddp_find_unused_parameters, config.non_blocking
        if not self.compiles_by_accelerate:
            args.torch_compile_backend = None
        model_type = None if self.model is None else self.model.config.model_type  # `model_init` creates it later
        if args.ddp_find_unused_parameters is None and model_type in CONFIG_CLASSES:
            args.ddp_find_unused_parameters = False
        config.non_blocking = config.non_blocking or args.dataloader_pin_memory
        try:
            super().create_accelerator_and_postprocess()
        finally:
            args.torch_compile_backend, args.ddp_find_unused_parameters, config.non_blocking = before

    # Training

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch=None)
        images, labels = inputs["pixel_values"], inputs.get("labels")
        if labels is None:
            self.check_labels_are_not_needed()
        elif self.mix is not None:
            images, labels = self.mix(images, labels)
        if self.is_full_batch and not return_outputs and labels is not None:
            return self.graph.loss(model, images, labels, self.loss_settings)
        loss, outputs = self.batch_loss(model, images, labels)
        return (loss, outputs) if return_outputs else loss

    def check_labels_are_not_needed(self) -> None:
        """Raise UserError if the loss needs labels: that of a teacher, without a share of the labels, does not."""
        if self.teacher is None or self.args.label_loss_weight or self.mix is not None:
            raise UserError(
                "The training batches have no 'labels': only a teacher without label_loss_weight and mix trains without them."
            )

    @property
    def loss_settings(self) -> tuple:
        """All that `batch_loss` depends on but the batch and the network's tensors."""
        args = self.args
        numbers = args.label_smoothing_factor, args.label_loss_weight, args.distillation_temperature
        return self.compiler.layers, self.teacher, *numbers, args.weight_regularization

    def batch_loss(
        self, model: nn.Module, images: torch.Tensor, labels: torch.Tensor | None
    ) -> tuple[torch.Tensor, Any]:
        """The training loss of a batch, and the outputs of the model. `labels` may be None if the loss ignores them."""
        outputs = model(pixel_values=images)
        smoothing = self.args.label_smoothing_factor
        if self.teacher is None:
            # Not the model's own loss: it would treat soft labels as a multi-label problem.
            loss = nn.functional.cross_entropy(outputs.logits, labels, label_smoothing=smoothing)
        else:
            with torch.no_grad():
                teacher_logits = self.teacher(pixel_values=images).logits
            weight, temperature = self.args.label_loss_weight, self.args.distillation_temperature
            loss = distillation_loss(outputs.logits, teacher_logits, labels, weight, temperature, smoothing)
        if self.args.weight_regularization:
            layers = binary_layers(self.plain_model).values()
            latent_weights = [layer.weight for layer in layers if layer.weight_bits == 1]
            loss = loss + self.args.weight_regularization * distance_from_one(latent_weights)
        return loss, outputs

    def train(self, *args, **kwargs):
        self.args.check_network(self.plain_model.config)
        if packed_layers(self.plain_model):
            self.args.check_packed()
        for callback in self.checkpointed:
            callback.checkpoint = None
        self.compiler.begin(None)
        self.losses = FiniteLosses()
        try:
            output = super().train(*args, **kwargs)
            self.check_losses(wait=True)
            self.check_weights()
        finally:
            self.is_full_batch = False
            self.graph.forget()
            self.termination.restore()
        # A run that resumes after its last step has no losses to average.
        if self.state.global_step == self._initial_global_step:
            output.metrics.pop("train_loss", None)
        if not self.termination.terminated:
            self.apply_final_step()
        return output

    def _init_training_state(
        self, max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
    ):
        """
        The Trainer finds the epoch of a checkpoint from its steps.

        Raises:
            UserError: steps or epochs of its run had other numbers of images, and the run would end before it begins.
        """
        epochs_trained, steps_trained = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        if resume_from_checkpoint:
            self.find_moved_best_checkpoint(Path(resume_from_checkpoint))
        lacks = self.lacks_evaluation(num_update_steps_per_epoch, max_steps)
        self.checkpoint_to_evaluate = resume_from_checkpoint if lacks else None
        step, before = self.state.global_step, self.state.epoch
        now = step / num_update_steps_per_epoch
        stream = getattr(self.train_dataset, "stream", None)
        has_epochs = has_length(self.train_dataset) and not (stream is not None and stream.endless)
        # Steps of accumulated batches are no equal parts of an epoch.
        if has_epochs and abs(now - (before or 0)) > 1 / max(1, num_update_steps_per_epoch - 1):
            moved = (
                f"step {step:,} of the checkpoint was in epoch {before:.1f}, and is in epoch {now:.1f} of {num_train_epochs} now: "
                "the images, the batch or the number of processes changed"
            )
            if step >= max_steps:
                raise UserError(
                    f"Nothing is left to train, as {moved}. Train on from its weights instead, with --init_from or "
                    "--model_name_or_path and another --output_dir."
                )
            logger.warning("Training goes on at another place: %s.", moved)
        return epochs_trained, steps_trained

    def find_moved_best_checkpoint(self, checkpoint: Path) -> None:
        """Find the best checkpoint beside the resumed one: its path is of the place where the run was before it was moved."""
        recorded = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME)).best_model_checkpoint
        if recorded is None or not (beside := checkpoint.parent / Path(recorded).name).is_dir():
            return
        output_dir = Path(self.args.output_dir)
        if output_dir.is_dir() and beside.parent.samefile(output_dir):
            beside = output_dir / beside.name  # transformers protects the best checkpoint by comparing strings
        if self.state.best_model_checkpoint is None:  # the Trainer has warned that it does not exist
            logger.info("The best checkpoint so far is %s.", beside)
        self.state.best_model_checkpoint = str(beside)

    def _run_epoch(self, *args, **kwargs):
        """Train an epoch. A run that resumes after its last step trains no further: the Trainer would add a step."""
        self.make_missed_evaluation()
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        if not self.control.should_training_stop:
            super()._run_epoch(*args, **kwargs)

    def make_missed_evaluation(self) -> None:
        """Make the evaluation that a signal had kept a run from, once after it resumes."""
        checkpoint, self.checkpoint_to_evaluate = self.checkpoint_to_evaluate, None
        if checkpoint is None:
            return
        self._load_rng_state(checkpoint)  # it may be saved again
        self.control.should_evaluate = True
        self.control.should_save = self.args.metric_for_best_model is not None  # with the result
        # Nothing is logged but the evaluation: since the checkpoint there was no step.
        self._maybe_log_save_evaluate(None, None, self.model, None, self.state.epoch, None, None)

    def lacks_evaluation(self, steps_per_epoch: int, max_steps: int) -> bool:
        """Whether the checkpoint that training resumes from was saved without the evaluation that follows its step."""
        args, state = self.args, self.state
        step = state.global_step
        if step == 0 or any(is_evaluation(entry) and entry["step"] == step for entry in state.log_history):
            return False
        is_last = step >= max_steps
        if args.eval_strategy == IntervalStrategy.EPOCH:
            return args.eval_delay <= state.epoch and (step % steps_per_epoch == 0 or is_last)
        by_steps = args.eval_strategy == IntervalStrategy.STEPS
        return by_steps and args.eval_delay <= step and (step % state.eval_steps == 0 or is_last)

    def _maybe_log_save_evaluate(self, tr_loss, grad_norm, model, trial, *args, **kwargs) -> None:
        self.termination.leaves_evaluations = True
        try:
            super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, *args, **kwargs)
        except EvaluationStopped:
            self._save_checkpoint(self.model, trial)
            self.callback_handler.on_save(self.args, self.state, self.control)
        finally:
            self.termination.leaves_evaluations = False

    def _finalize_training(self, *args, **kwargs):
        """A run that a signal ends keeps its last checkpoint, which the Trainer would remove if another one is the best."""
        self.make_missed_evaluation()  # of a run that resumes after its last epoch
        limit, loads_best = self.args.save_total_limit, self.args.load_best_model_at_end
        if self.termination.terminated:
            self.args.save_total_limit, self.args.load_best_model_at_end = None, False
        try:
            return super()._finalize_training(*args, **kwargs)
        finally:
            self.args.save_total_limit, self.args.load_best_model_at_end = limit, loads_best

    def training_step(self, model, inputs, *args, **kwargs):
        inputs = self._prepare_inputs(inputs)
        images, steps_left = inputs["pixel_values"], self.state.max_steps - self.state.global_step
        processes = self.args.world_size if self.accelerator.split_batches else 1
        self.is_full_batch = len(images) == self._train_batch_size // processes
        with self.compiler.step(images, self.is_full_batch, steps_left * self.args.gradient_accumulation_steps):
            loss = super().training_step(model, inputs, *args, **kwargs)
        self.losses.add(loss.detach(), self.state.global_step + 1)
        self.check_losses()  # before the optimiser spreads it over every weight
        return loss

    def check_losses(self, wait: bool = False) -> None:
        """Raise NonFiniteLossError if a loss was not finite; with `wait`, read also those that a GPU still computes."""
        if broken := self.losses.first_broken(wait):
            step, value = broken
            self.raise_non_finite(f"The loss became {value} at step {step}")

    def check_weights(self) -> None:
        """Raise NonFiniteLossError if a weight is not finite: a finite loss may have a gradient that is not."""
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:  # each process has a part
            return
        if not all(tensor.isfinite().all() for tensor in self.plain_model.state_dict().values()):
            self.raise_non_finite(f"Weights became NaN or infinite at step {self.state.global_step}")

    def raise_non_finite(self, fault: str) -> None:
        """Raise NonFiniteLossError, with the last checkpoint in its message."""
        last = get_last_checkpoint(self.args.output_dir)
        saved = f"the last good checkpoint is {last}" if last else "there is no earlier checkpoint"
        raise NonFiniteLossError(
            f"{fault}, so training stopped; {saved}. Try a lower --learning_rate, --max_grad_norm, or --bf16 instead of --fp16."
        )

    @staticmethod
    def get_optimizer_cls_and_kwargs(args, model=None):
        optimizer_class, kwargs = Trainer.get_optimizer_cls_and_kwargs(args, model)
        return optimizer_class, kwargs | {"lr": args.scaled_learning_rate}

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """
        Names of the weights of linear layers and convolutions. Scales, shifts, slopes, clips, normalisations, position
        embeddings and class tokens do not decay.
        """
        embeddings = ("position_embeddings", "class_token", "cls_token")
        parameters = model.named_parameters()
        return [name for name, parameter in parameters if parameter.dim() > 1 and not name.endswith(embeddings)]

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        created_before = self.lr_scheduler is not None
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if self.args.lr_schedule_per_epoch and not created_before:
            steps = math.ceil(num_training_steps / self.args.num_train_epochs)
            scheduler.lr_lambdas = [
                functools.partial(constant_within_epoch, schedule, steps) for schedule in scheduler.lr_lambdas
            ]
        return scheduler

    # Data

    def _get_dataloader(self, *args, is_training: bool = False, dataloader_key: str | None = None, **kwargs):
        """
        Apply `--dataloader_drop_last` to training only: evaluation counts every image. Workers persist for images that are
        read again: accelerate holds each loader, and so its workers, until the run ends.
        """
        drop_last, persistent = self.args.dataloader_drop_last, self.args.dataloader_persistent_workers
        self.args.dataloader_drop_last = drop_last and is_training
        self.args.dataloader_persistent_workers = persistent and (is_training or dataloader_key is not None)
        try:
            return shield_workers(
                super()._get_dataloader(*args, is_training=is_training, dataloader_key=dataloader_key, **kwargs)
            )
        finally:
            self.args.dataloader_drop_last, self.args.dataloader_persistent_workers = drop_last, persistent

    def get_eval_dataloader(self, eval_dataset=None):
        """
        The Trainer finds persistent workers by the name of a dataset. Here a dataset that is not the trainer's own has none,
        and one that replaces another has new ones.
        """
        if eval_dataset is None and self.eval_dataset is None:
            return super().get_eval_dataloader()  # raises an error
        name = eval_dataset if isinstance(eval_dataset, str) else "eval"
        own = self.eval_dataset[name] if isinstance(eval_dataset, str) else self.eval_dataset
        if not isinstance(eval_dataset, str) and eval_dataset is not None and eval_dataset is not own:
            return self.get_test_dataloader(eval_dataset)
        if self.evaluated.get(name) is not own:
            self.evaluated[name] = own
            replaced = vars(self).get("_eval_dataloaders", {}).pop(name, None)
            held = self.accelerator._dataloaders
            self.accelerator._dataloaders = [loader for loader in held if loader is not replaced]  # its workers end
        return super().get_eval_dataloader(eval_dataset)

    def _get_train_sampler(self, train_dataset=None):
        dataset = train_dataset if train_dataset is not None else self.train_dataset
        shuffled = self.args.train_sampling_strategy == "random" and has_length(dataset)
        if not shuffled and getattr(dataset, "stream", None) is None:
            return super()._get_train_sampler(train_dataset)
        if self.args.balance_classes and not hasattr(dataset, "labels"):
            raise UserError(
                "balance_classes needs a dataset with an attribute `labels`: the class index of each image."
            )
        self.train_sampler = create_train_sampler(
            dataset,
            self.args.repeated_augmentations,
            self.args.train_batch_size,
            self.args.world_size,
            self.args.sampling_seed,
            self.args.balance_classes,
        )
        return self.train_sampler

    def _get_eval_sampler(self, eval_dataset):
        stream = getattr(eval_dataset, "stream", None)
        return super()._get_eval_sampler(eval_dataset) if stream is None else StreamSampler(stream)

    # Evaluation and the final weights

    def evaluate(self, *args, **kwargs):
        """
        Evaluate as transformers' Trainer does. During training, evaluate the weights that training would save now, then
        restore weights and random state.

        Raises:
            NonFiniteLossError: the loss is not finite, so it must not choose a best model.
            FullMemoryError: during training, the memory does not hold a batch.
        """
        if not self.is_in_train:
            metrics = super().evaluate(*args, **kwargs)
        else:
            with (
                evaluation_memory_errors(self.args),
                seeded_rng(self.args.seed),  # the loader draws a seed for its workers
                self.final_weights(),
            ):
                metrics = super().evaluate(*args, **kwargs)
        for name, value in metrics.items():
            if name.endswith("_loss") and not math.isfinite(value):
                if self.is_in_train:
                    self.raise_non_finite(f"The evaluation loss became {value} at step {self.state.global_step}")
                raise NonFiniteLossError(
                    f"The evaluation loss is {value}: the weights are damaged, or training diverged; train again with a lower "
                    "--learning_rate, or evaluate another checkpoint."
                )
        return metrics

    def evaluation_loop(self, *args, **kwargs):
        with contextlib.nullcontext() if self.is_in_train else kept_tensors(self.plain_model):
            return super().evaluation_loop(*args, **kwargs)

    @contextlib.contextmanager
    def final_weights(self) -> Iterator[None]:
        """Give the model the weights that training would save now; restore the current ones afterwards."""
        if self.args.ema_decay is None and not self.args.batch_norm_reestimation_batches:
            yield
            return
        before = {name: tensor.clone() for name, tensor in self.plain_model.state_dict().items()}
        self.apply_final_step()
        try:
            yield
        finally:
            self.plain_model.load_state_dict(before)

    def apply_final_step(self) -> None:
        """Replace the weights by their average, then re-estimate batch norm statistics, if the arguments ask for it."""
        for callback in self.checkpointed:
            if isinstance(callback, WeightAverage):
                self.plain_model.load_state_dict(callback.tensors())
        if count := self.args.batch_norm_reestimation_batches:
            batches = first_batches(self.train_dataset, self.data_collator, count, self.args)
            reestimate_batch_norm(self.plain_model, batches)

    # Saving and resuming

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Save latent weights in a checkpoint; save the final model packed, with its latent weights in `latent/`."""
        folder = Path(output_dir or self.args.output_dir)
        latent_folder = folder / LATENT if self.saves_packed and not self.is_staging else folder
        token, self.args.hub_token = self.args.hub_token, None  # the Trainer pickles all arguments
        try:
            super()._save(str(latent_folder), state_dict)
        finally:
            self.args.hub_token = token
        if self.is_staging:
            return  # `_save_checkpoint` gives the mode
        # This pickle of all arguments is for checkpoints, but `push_to_hub` of the Trainer would upload it.
        for place in (folder, latent_folder):
            (place / TRAINING_ARGS_NAME).unlink(missing_ok=True)
        if self.saves_packed and self.args.should_save:
            pack_folder(type(self.plain_model), latent_folder, folder)
            if self.processing_class is not None:
                self.processing_class.save_pretrained(folder)
        give_usual_mode(folder, latent_folder)

    def _save_checkpoint(self, model, trial) -> None:
        """Write a checkpoint to the staging folder, then rename it: every `checkpoint-…` is whole."""
        self.check_losses(wait=True)  # no checkpoint may hold their weights
        self.check_weights()
        folder = Path(self._get_output_dir(trial))
        staged = folder / STAGING / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        checkpoint = folder / staged.name
        if self.args.should_save:
            shutil.rmtree(folder / STAGING, ignore_errors=True)  # left by a run that was killed
        self.is_staging = True  # see `_get_output_dir` and `_push_from_checkpoint`
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.is_staging = False
        self.accelerator.wait_for_everyone()
        if self.state.best_model_checkpoint == str(staged):
            self.state.best_model_checkpoint = str(checkpoint)
        if self.args.should_save:
            self.state.save_to_json(str(staged / TRAINER_STATE_NAME))
            for callback in self.checkpointed:
                callback.save(staged)
            self.compiler.save(staged)
            give_usual_mode(staged)
            flush_to_disk(staged)
            shutil.rmtree(checkpoint, ignore_errors=True)  # an interrupted run may have written it
            staged.rename(checkpoint)
            staged.parent.rmdir()
            rotate_checkpoints(
                str(folder), self.args.save_total_limit, self.state.best_model_checkpoint, use_mtime=True
            )
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(checkpoint))

    def _get_output_dir(self, trial):
        folder = super()._get_output_dir(trial)
        return str(Path(folder) / STAGING) if self.is_staging else folder

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_weights(model or self.plain_model, resume_from_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint):
        """
        Load their states. `--resume_from_checkpoint` may come with other arguments, which the states hold too.

        Raises:
            UserError: the checkpoint has the state of another optimiser, or of a schedule of another kind.
        """
        given = None if self.is_fsdp_enabled or self.is_deepspeed_enabled else Hyperparameters.of(self)
        if checkpoint and given is not None:
            self.load_optimizer_and_scheduler_of(checkpoint)
            given.apply(self)
        else:
            super()._load_optimizer_and_scheduler(checkpoint)
        folder = Path(checkpoint) if checkpoint else None
        self.compiler.begin(folder)
        for callback in self.checkpointed:
            callback.checkpoint = folder

    def load_optimizer_and_scheduler_of(self, checkpoint: str) -> None:
        self.check_kind_of_schedule(Path(checkpoint, SCHEDULER_NAME))
        names = [set(group) for group in self.optimizer.param_groups]
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
            # Loading replaces the settings, and adds those that a newer PyTorch has.
            is_other = any(known - group.keys() for known, group in zip(names, self.optimizer.param_groups))
        except (KeyError, ValueError):
            is_other = True
        if is_other:
            raise other_state_error(checkpoint, "the state of another optimiser", f"--optim {self.args.optim.value}")

    def check_kind_of_schedule(self, saved: Path) -> None:
        """
        Raises:
            UserError: the saved schedule has another kind of state than that of this run. Functions of the step have one kind,
                `reduce_lr_on_plateau` and `greedy` have their own.
        """
        if not saved.is_file():
            return
        states = torch.load(saved, map_location="cpu", weights_only=True), self.lr_scheduler.state_dict()
        before, now = ({"patience", "num_good_epochs"} & state.keys() for state in states)  # greedy has both
        if before != now:
            given = f"--lr_scheduler_type {self.args.lr_scheduler_type.value}"
            raise other_state_error(str(saved.parent), "a learning rate schedule of another kind", given)

    def _load_best_model(self) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_best_model()
        else:
            load_weights(self.plain_model, self.state.best_model_checkpoint)
        for callback in self.checkpointed:
            callback.load(Path(self.state.best_model_checkpoint))

    # Uploading

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Upload the final weights, packed, as after training. The Trainer's own method uploads the checkpoint's."""
        # A checkpoint is uploaded once it has its final name.
        if self.is_staging or self.args.hub_strategy == HubStrategy.END:
            return
        with self.final_weights():  # every process takes part
            if self.is_world_process_zero():
                self._upload_final_weights(checkpoint_folder)

    def _upload_final_weights(self, checkpoint_folder: str) -> None:
        is_uploading = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if is_uploading and not self.args.hub_always_push:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        folder, model = Path(self.args.output_dir), self.plain_model
        uploads: list[tuple[str, str | None]] = []
        # A finished run that continues keeps its weights, and the repository too: the card is that of the finished run.
        if not (folder / UNFINISHED_RUN_ARGUMENTS).is_file():
            (ShippedModel(model) if self.saves_packed else model).save_pretrained(folder)
            if self.processing_class is not None:
                self.processing_class.save_pretrained(folder)
            give_usual_mode(folder, folder / LATENT)
            uploads.append((self.args.output_dir, None))
        if self.args.hub_strategy == HubStrategy.CHECKPOINT:
            uploads.append((checkpoint_folder, "last-checkpoint"))
        elif self.args.hub_strategy == HubStrategy.ALL_CHECKPOINTS:
            uploads.append((checkpoint_folder, Path(checkpoint_folder).name))
        api = HfApi()  # one client uploads in order: a checkpoint must not arrive before its model
        jobs = [
            api.upload_folder(
                repo_id=self.hub_model_id,
                folder_path=source,
                path_in_repo=path_in_repo,
                commit_message=f"Training in progress, step {self.state.global_step}",
                token=self.args.hub_token,
                revision=self.args.hub_revision,
                ignore_patterns=["_*", f"{PREFIX_CHECKPOINT_DIR}-*", TRAINING_ARGS_NAME],
                run_as_future=True,
            )
            for source, path_in_repo in uploads
        ]
        self.push_in_progress: PushInProgress | None = PushInProgress(
            (self.push_in_progress.jobs if is_uploading else []) + jobs
        )

    def create_model_card(self, *args, **kwargs):
        """Keep a card with the run's results, which transformers' own card would overwrite."""
        if not (Path(self.args.output_dir) / "README.md").is_file():
            super().create_model_card(*args, **kwargs)


class SetModel(TrainerCallback):
    """Tell the parts that compute steps which model is trained: `model_init` creates one for each training."""

    def __init__(self, trainer: DistillationTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.compiler.model = self.trainer.graph.model = self.trainer.plain_model


class SetEpoch(TrainerCallback):
    """Tell the sampler which epoch begins: accelerate does not when a resumed run skips batches."""

    def __init__(self, trainer: DistillationTrainer):
        self.trainer = trainer

    def on_epoch_begin(self, args, state, control, **kwargs):
        if self.trainer.train_sampler is not None:
            self.trainer.train_sampler.set_epoch(math.floor(state.epoch + 1e-6))


def is_evaluation(entry: dict[str, Any]) -> bool:
    """Whether an entry of the log history is of an evaluation, also of one of several datasets."""
    return any(name.startswith("eval_") and name.endswith("_loss") for name in entry)


def constant_within_epoch(schedule: Callable[[int], float], steps_per_epoch: int, step: int) -> float:
    """Evaluate a learning rate schedule at the first step of the epoch."""
    return schedule(step // steps_per_epoch * steps_per_epoch)


@dataclass(frozen=True)
class Hyperparameters:
    """What the arguments of a run give to its optimiser and schedule, `base_rates` in the order of the parameter groups."""

    groups: list[dict[str, Any]]
    base_rates: list[float] | None

    @classmethod
    def of(cls, trainer: DistillationTrainer) -> "Hyperparameters":
        names = ("betas", "eps", "momentum", "weight_decay")
        groups = [{name: group[name] for name in names if name in group} for group in trainer.optimizer.param_groups]
        schedule = trainer.lr_scheduler
        return cls(groups, list(schedule.base_lrs) if isinstance(schedule, LambdaLR) else None)

    def apply(self, trainer: DistillationTrainer) -> None:
        """Replace what the states of a checkpoint hold. A schedule that follows the evaluations keeps its rate."""
        for group, given in zip(trainer.optimizer.param_groups, self.groups):
            group.update(given)
        schedule = trainer.lr_scheduler
        if self.base_rates is None or schedule.base_lrs == self.base_rates:
            return
        schedule.base_lrs = self.base_rates
        factors = [factor(schedule.last_epoch) for factor in schedule.lr_lambdas]
        schedule._last_lr = [rate * factor for rate, factor in zip(self.base_rates, factors)]
        for group, base_rate, rate in zip(trainer.optimizer.param_groups, self.base_rates, schedule._last_lr):
            group.update(initial_lr=base_rate, lr=rate)


@contextlib.contextmanager
def kept_tensors(model: nn.Module) -> Iterator[None]:
    """Give a model its own tensors again afterwards: --bf16_full_eval and --fp16_full_eval leave rounded ones in it."""
    before = [(members, name, tensor, tensor.data) for members, name, tensor in stored_tensors(model)]
    try:
        yield
    finally:
        for members, name, tensor, data in before:
            if members[name].dtype != data.dtype:
                members[name] = tensor  # buffers are replaced
                tensor.data = data  # parameters get other memory


def load_weights(model: PreTrainedModel, checkpoint: str) -> None:
    """
    Load a checkpoint's weights as `from_pretrained` does, which renames tensors. The Trainer's own loading skips a tensor
    whose name in the file differs from memory: all layers of transformers' ViT.
    """
    loaded = type(model).from_pretrained(checkpoint, config=model.config)
    model.load_state_dict(loaded.state_dict())


def other_state_error(checkpoint: str, found: str, given: str) -> UserError:
    """
    The error of a checkpoint that an argument of this run does not fit.

    Args:
        found: what the checkpoint has.
        given: the argument and its value.
    """
    return UserError(
        f"{checkpoint!r} has {found} than {given}, so training cannot resume from it: give the {given.split()[0]} of its "
        "run, or train its weights with --init_from or --model_name_or_path and another --output_dir."
    )

"""Distillation from a full-precision teacher: a Trainer that changes the loss, nothing else."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from .errors import NonFiniteLossError


MIXED_LABEL_LOSS_WEIGHT = 0.1  # of the paper's runs with mixup or cutmix


@dataclass
class DistillationTrainingArguments(TrainingArguments):
    """`TrainingArguments` with the two of the distillation loss, and the paper's defaults for these and for clipping."""

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
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Off: images are decoded and transformed as they are read."}
    )

    def __post_init__(self):
        super().__post_init__()
        # Without an accelerator PyTorch warns of every loader that pins its memory.
        self.dataloader_pin_memory = self.dataloader_pin_memory and torch.accelerator.is_available()
        if self.label_loss_weight is not None and not 0 <= self.label_loss_weight <= 1:
            raise ValueError(f"label_loss_weight is a share from 0 to 1, not {self.label_loss_weight}.")
        if self.distillation_temperature <= 0:
            raise ValueError(f"distillation_temperature must be positive, not {self.distillation_temperature}.")


class DistillationTrainer(Trainer):
    """
    Trainer of a student on what a teacher says, or, without a teacher, on the labels.

    Args:
        teacher: classifier of the same labels, in full precision. It is put into evaluation mode and never trained,
            never saved and no part of the optimiser.
    """

    # compute_loss returns a mean over its batch, so the Trainer must divide by the steps of gradient accumulation.
    loss_is_scaled_for_ga = False

    def __init__(self, *args, teacher: PreTrainedModel | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.teacher = teacher
        if teacher is not None:
            teacher.requires_grad_(False).eval()
            self.teacher = self.accelerator.prepare_model(teacher, evaluation_mode=True)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self.teacher is None or not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch=None)
        outputs = model(pixel_values=inputs["pixel_values"])
        with torch.no_grad():
            teacher_logits = self.teacher(pixel_values=inputs["pixel_values"]).logits
        loss = distillation_loss(
            outputs.logits,
            teacher_logits,
            inputs["labels"],
            self.args.label_loss_weight,
            self.args.distillation_temperature,
        )
        return (loss, outputs) if return_outputs else loss

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        if not torch.isfinite(loss):  # before the optimiser spreads it over every weight
            last = get_last_checkpoint(self.args.output_dir)
            kept = f"the last good checkpoint is {last}" if last else "no checkpoint had been saved before"
            raise NonFiniteLossError(
                f"The loss became {loss.item()} at step {self.state.global_step + 1}, so training stopped; {kept}. "
                "Try a lower --learning_rate, --max_grad_norm, or --bf16 instead of --fp16."
            )
        return loss

    def create_model_card(self, *args, **kwargs):
        """A card that stands there already has the run's results, which transformers' own would overwrite."""
        if not (Path(self.args.output_dir) / "README.md").is_file():
            super().create_model_card(*args, **kwargs)


def distillation_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    labels: torch.Tensor,
    label_loss_weight: float | None = None,
    temperature: float = 1.0,
) -> torch.Tensor:
    """
    `(1 - w) * T**2 * -sum softmax(teacher / T) * log_softmax(student / T) + w * cross_entropy(student, labels)`, the mean
    over the batch (Le & Li, CVPRW 2023; at T = 1 and w = 0 the loss of the paper's runs).

    Args:
        student_logits, teacher_logits: `(batch, labels)`.
        labels: class indices `(batch,)`, or soft labels `(batch, labels)`.
        label_loss_weight: w; `None` is the paper's, 0 for class indices and 0.1 for soft labels.
        temperature: T.
    """
    if label_loss_weight is None:
        label_loss_weight = MIXED_LABEL_LOSS_WEIGHT if labels.is_floating_point() else 0.0
    soft_targets = nn.functional.softmax(teacher_logits / temperature, dim=-1)
    loss = temperature**2 * nn.functional.cross_entropy(student_logits / temperature, soft_targets)
    if label_loss_weight == 0:
        return loss
    return (1 - label_loss_weight) * loss + label_loss_weight * nn.functional.cross_entropy(student_logits, labels)

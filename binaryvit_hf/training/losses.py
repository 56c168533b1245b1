"""The losses of training: distillation from a teacher, and the regularisation of latent weights."""

from collections import deque

import torch
from torch import nn


def distillation_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    labels: torch.Tensor | None,
    label_loss_weight: float | None = None,
    temperature: float = 1.0,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """
    `(1 - w) * T**2 * -sum softmax(teacher / T) * log_softmax(student / T) + w * cross_entropy(student, labels)`, the mean
    over the batch (Le & Li, CVPRW 2023; at T = 1 and w = 0 the loss of the paper's runs).

    Args:
        student_logits, teacher_logits: `(batch, labels)`.
        labels: class indices `(batch,)`, or soft labels `(batch, labels)`. None if their share of the loss is 0.
        label_loss_weight: w; `None` means the paper's value: 0 for class indices, 0.1 for the soft labels of mixup and CutMix.
        temperature: T.
        label_smoothing: share of the labels that is spread over all classes.
    """
    if label_loss_weight is None:
        label_loss_weight = 0.1 if labels is not None and labels.is_floating_point() else 0.0
    soft_targets = nn.functional.softmax(teacher_logits / temperature, dim=-1)
    loss = temperature**2 * nn.functional.cross_entropy(student_logits / temperature, soft_targets)
    if label_loss_weight == 0:
        return loss
    label_loss = nn.functional.cross_entropy(student_logits, labels, label_smoothing=label_smoothing)
    return (1 - label_loss_weight) * loss + label_loss_weight * label_loss


def distance_from_one(weights: list[torch.Tensor]) -> torch.Tensor:
    """
    Mean of `|1 - |w||` over all elements of all weights, a scalar.

    Gradient, divided by the number of elements: `-sign(w)` for `|w| < 1`, `sign(w)` for `|w| > 1`, else 0 (BNN+, Darabi et
    al., 2018, R1 with both scales 1).
    """
    return sum((1 - weight.abs()).abs().sum() for weight in weights) / sum(weight.numel() for weight in weights)


class FiniteLosses:
    """
    Finds losses that are not finite. It reads a loss of a GPU once that has been computed, so that no step waits for it.

    On the CPU a loss is read at once. On a GPU it is read one or a few steps later; `wait` reads all.
    """

    def __init__(self):
        self.unread: deque[tuple[int, torch.Tensor, torch.cuda.Event | None]] = deque()

    def add(self, loss: torch.Tensor, step: int) -> None:
        if loss.device.type != "cuda":
            self.unread.append((step, loss, None))
            return
        copy, copied = torch.empty((), dtype=loss.dtype, pin_memory=True), torch.cuda.Event()
        copy.copy_(loss, non_blocking=True)
        copied.record()
        self.unread.append((step, copy, copied))

    def first_broken(self, wait: bool = False) -> tuple[int, float] | None:
        """The step and the value of the first loss that is not finite, among those that can be read."""
        while self.unread:
            step, loss, copied = self.unread[0]
            if copied is not None and wait:
                copied.synchronize()
            elif copied is not None and not copied.query():
                return None
            self.unread.popleft()
            if not torch.isfinite(loss):
                return step, loss.item()
        return None

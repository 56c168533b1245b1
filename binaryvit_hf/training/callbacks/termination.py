"""
A checkpoint when a run is asked to end: SIGTERM, which schedulers of clusters send, and SIGHUP, which a terminal sends when
it is closed.
"""

import contextlib
import signal
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from ...network.functional_binaryvit import is_distributed


def ending_signals() -> list[int]:
    """SIGTERM, and SIGHUP, which Windows lacks, unless it is ignored, as under nohup."""
    has_terminal = hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) == signal.SIG_DFL
    return [signal.SIGTERM, signal.SIGHUP] if has_terminal else [signal.SIGTERM]


class EvaluationStopped(Exception):
    """An evaluation during training was left at a signal, and a checkpoint is to be saved."""


class SaveOnTermination(TrainerCallback):
    """On a signal, finish the step or leave the evaluation, save a checkpoint, end the training and set `terminated`."""

    def __init__(self):
        self.requested = self.terminated = 0  # the number of the signal
        self.leaves_evaluations = False  # set during those that a checkpoint can follow: not before the first step
        self.handlers_before: dict[int, Any] = {}

    def on_train_begin(self, args, state, control, **kwargs):
        self.restore()  # --auto_find_batch_size begins again
        self.requested = self.terminated = 0
        with contextlib.suppress(ValueError):  # Python handles signals in the main thread only
            for number in ending_signals():
                self.handlers_before[number] = signal.signal(number, self.request)

    def request(self, number, frame):
        self.requested = number

    def on_step_end(self, args, state, control, **kwargs):
        if number := self.requested_in_any_process(args.device):
            self.terminated = number
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False  # the sender of a SIGTERM waits for seconds only

    def on_prediction_step(self, args, state, control, **kwargs):
        """Raises EvaluationStopped during training; `DistillationTrainer` then saves the checkpoint."""
        if self.leaves_evaluations and self.handlers_before and (number := self.requested_in_any_process(args.device)):
            self.terminated = number
            control.should_training_stop = True
            raise EvaluationStopped

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.terminated:
            control.should_evaluate = control.should_save = False  # it is saved already

    def requested_in_any_process(self, device: torch.device) -> int:
        """The signal, or 0. Processes get it at different steps, but must end at the same step."""
        if not is_distributed():
            return self.requested
        requested = torch.tensor(self.requested, device=device)
        dist.all_reduce(requested, op=dist.ReduceOp.MAX)
        return int(requested)

    def restore(self) -> None:
        """Give the signals their previous handlers. One that came after the last step is for them."""
        while self.handlers_before:
            signal.signal(*self.handlers_before.popitem())
        if (number := self.requested) and not self.terminated:
            self.requested = 0
            signal.raise_signal(number)

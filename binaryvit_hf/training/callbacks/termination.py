"""A checkpoint on SIGTERM, which schedulers of clusters send before they end a job."""

import contextlib
import signal

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from ...network.functional_binaryvit import is_distributed


class SaveOnTermination(TrainerCallback):
    """On SIGTERM, finish the step, save a checkpoint, end the training and set `terminated`."""

    def __init__(self):
        self.requested = self.terminated = False
        self.handler_before = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.requested = self.terminated = False
        with contextlib.suppress(ValueError):  # Python handles signals in the main thread only
            self.handler_before = signal.signal(signal.SIGTERM, self.request)

    def request(self, number, frame):
        self.requested = True

    def on_step_end(self, args, state, control, **kwargs):
        if self.requested_in_any_process(args.device):
            self.terminated = control.should_save = control.should_training_stop = True
            control.should_evaluate = False  # the sender of a SIGTERM waits for seconds only

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.terminated:
            control.should_evaluate = control.should_save = False  # on_step_end has saved

    def requested_in_any_process(self, device: torch.device) -> bool:
        """Processes get the signal at different steps, but must end at the same step."""
        if not is_distributed():
            return self.requested
        requested = torch.tensor(int(self.requested), device=device)
        dist.all_reduce(requested, op=dist.ReduceOp.MAX)
        return bool(requested)

    def restore(self) -> None:
        """Give SIGTERM its previous handler."""
        if self.handler_before is not None:
            signal.signal(signal.SIGTERM, self.handler_before)
            self.handler_before = None

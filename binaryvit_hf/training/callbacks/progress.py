"""Progress of a run: a bar on a terminal, and lines with the time left in a log file."""

import logging
import time

from tqdm.auto import tqdm
from transformers import ProgressCallback


logger = logging.getLogger(__name__)


class NamedProgress(ProgressCallback):
    """
    transformers' progress bar with the name of the run. Where the output is no terminal, a bar would fill the log with copies
    of itself; each logged loss is followed by the time left instead.

    Args:
        name: such as "teacher (1 of 2)"; it may be empty.
    """

    def __init__(self, name: str = ""):
        super().__init__()
        self.name, self.start, self.first_step = name, 0.0, 0

    def on_train_begin(self, args, state, control, **kwargs):
        self.start, self.first_step = time.monotonic(), state.global_step
        self.current_step = state.global_step
        if state.is_world_process_zero:
            self.training_bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                desc=self.name or None,
                dynamic_ncols=True,
                disable=None,  # shown on a terminal alone
            )

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        if self.training_bar is None or not self.training_bar.disable:
            super().on_prediction_step(args, state, control, eval_dataloader, **kwargs)

    def on_log(self, args, state, control, logs=None, **kwargs):
        super().on_log(args, state, control, logs, **kwargs)
        done, to_do = state.global_step - self.first_step, state.max_steps - state.global_step
        if self.training_bar is None or not self.training_bar.disable or "loss" not in logs or not (done and to_do):
            return
        left = (time.monotonic() - self.start) / done * to_do
        name = f"{self.name}: " if self.name else ""
        logger.info("%sstep %d of %d, about %s left", name, state.global_step, state.max_steps, format_time(left))


def format_time(seconds: float) -> str:
    """`40 seconds`, `12 minutes`, `3.5 hours`."""
    if seconds < 90:
        return f"{max(1, round(seconds))} seconds"
    return f"{round(seconds / 60)} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"

"""Progress of a run: a bar on a terminal, and lines with the time left in a log file."""

import logging
import time

from tqdm.auto import tqdm
from transformers import ProgressCallback, TrainerState
from transformers.trainer_utils import has_length

from binaryvit_runtime.errors import counted


MAX_SILENCE = 60  # seconds without a line where there is no bar

logger = logging.getLogger(__name__)


class NamedProgress(ProgressCallback):
    """
    transformers' progress bar with the name of the run, and one line for each loss and evaluation. All values are in
    trainer_state.json. Where the output is no terminal, a bar would fill the log with copies of itself. The lines tell the time
    left instead, and at least one a minute is written.

    Args:
        name: such as "teacher (1 of 2)"; it may be empty.
    """

    def __init__(self, name: str = ""):
        super().__init__()
        self.name, self.start, self.first_step = name, 0.0, 0
        self.last_line, self.evaluated = time.monotonic(), 0
        self.prefix = f"{name}: " if name else ""

    def on_train_begin(self, args, state, control, **kwargs):
        self.start, self.first_step = time.monotonic(), state.global_step
        self.last_line = self.start
        self.current_step = state.global_step
        if state.is_world_process_zero:
            self.training_bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                desc=self.name or None,
                dynamic_ncols=True,
                disable=None,  # shown on a terminal alone
            )

    def on_step_end(self, args, state, control, **kwargs):
        super().on_step_end(args, state, control, **kwargs)
        if self.is_silent(self.training_bar) and not control.should_log:
            self.write_line(describe_step(state) + self.describe_time_left(state))

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        if not (state.is_world_process_zero and has_length(eval_dataloader)):
            return
        if self.prediction_bar is None:
            batches = len(eval_dataloader)
            self.prediction_bar = tqdm(total=batches, desc="evaluation", leave=False, dynamic_ncols=True, disable=None)
            self.evaluated = 0
        self.prediction_bar.update(1)
        self.evaluated += 1  # a hidden bar does not count
        if self.is_silent(self.prediction_bar):
            self.write_line(f"evaluation: batch {self.evaluated} of {len(eval_dataloader)}")

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is None or not logs:
            return
        line = describe_metrics(logs, state)
        if not self.training_bar.disable:
            self.training_bar.write(self.prefix + line)
        else:
            self.write_line(line + (self.describe_time_left(state) if "loss" in logs else ""))

    def is_silent(self, bar: tqdm | None) -> bool:
        """Whether a bar is hidden and the last line is a minute old."""
        return bar is not None and bar.disable and time.monotonic() - self.last_line >= MAX_SILENCE

    def write_line(self, line: str) -> None:
        self.last_line = time.monotonic()
        logger.info("%s%s", self.prefix, line)

    def describe_time_left(self, state: TrainerState) -> str:
        done, to_do = state.global_step - self.first_step, state.max_steps - state.global_step
        if not (done and to_do):
            return ""
        return f", about {format_time((time.monotonic() - self.start) / done * to_do)} left"


def describe_step(state: TrainerState) -> str:
    return f"epoch {state.epoch or 0:.4g}, step {state.global_step} of {state.max_steps}"


def describe_metrics(logs: dict[str, float], state: TrainerState) -> str:
    """One line about what the Trainer logs: losses of training, an evaluation, or the end."""
    if "train_runtime" in logs:
        return f"trained in {format_time(logs['train_runtime'])}"
    shown = {"loss": "training loss", "eval_loss": "loss on held-out images", "eval_accuracy": "accuracy"}
    values = [
        f"{text} {logs[name]:.1%}" if name == "eval_accuracy" else f"{text} {logs[name]:.4g}"
        for name, text in shown.items()
        if isinstance(logs.get(name), (int, float))
    ]
    return f"{describe_step(state)}: {', '.join(values)}"


def format_time(seconds: float) -> str:
    """`1 second`, `40 seconds`, `12 minutes`, `3.5 hours`."""
    if seconds < 90:
        return counted(max(1, round(seconds)), "second")
    return f"{round(seconds / 60)} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"

"""Progress of a run: a bar on a terminal, lines with the time left in a log file, and a sentence for each loss and evaluation."""

import contextlib
import logging
import time

from tqdm.auto import tqdm
from transformers import ProgressCallback, TrainerState
from transformers.trainer_utils import has_length

from binaryvit_runtime.progress import describe_time_left, format_time

from ...run_history import UNKNOWN


MAX_SILENCE = 60  # seconds without a line where there is no bar
MAX_EPOCHS = 2**31  # the Trainer's number of epochs for a stream of unknown length is above

logger = logging.getLogger(__name__)


class NamedProgress(ProgressCallback):
    """
    transformers' progress bar with the name of the run, and one sentence for each loss and evaluation. All values are in
    trainer_state.json. Where the output is no terminal, a bar would fill the log with copies of itself. The lines tell the time
    left instead, and at least one a minute is written.

    Args:
        name: such as "teacher (1 of 2)"; it may be empty.
        bars: whether to show bars on a terminal.
        evaluation_images: the kind of images to evaluate on.
    """

    def __init__(self, name: str = "", bars: bool = True, evaluation_images: str = UNKNOWN):
        super().__init__()
        self.name, self.start, self.first_step = name, 0.0, 0
        self.last_line, self.evaluated, self.evaluation_start = time.monotonic(), 0, 0.0
        self.kind = evaluation_images
        self.evaluation_images = name_images(self.kind)  # of the last evaluation
        self.prefix = f"{name}: " if name else ""
        self.disable = None if bars else True  # None: shown on a terminal alone

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
                disable=self.disable,
            )

    def on_step_end(self, args, state, control, **kwargs):
        super().on_step_end(args, state, control, **kwargs)
        if self.is_silent(self.training_bar) and not control.should_log:
            self.write_line(f"Training: {describe_step(state)}{self.describe_time_left(state)}.")

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        if not (state.is_world_process_zero and has_length(eval_dataloader)):
            return
        batches = len(eval_dataloader)
        if self.prediction_bar is None:
            self.prediction_bar = tqdm(
                total=batches, desc="evaluation", leave=False, dynamic_ncols=True, disable=self.disable
            )
            self.evaluated, self.evaluation_start = 0, time.monotonic()
            dataset = getattr(eval_dataloader, "dataset", None)
            self.evaluation_images = name_images(self.kind, len(dataset) if has_length(dataset) else None)
        self.prediction_bar.update(1)
        self.evaluated += 1  # a hidden bar does not count
        if self.is_silent(self.prediction_bar):
            left = describe_time_left(
                time.monotonic() - self.evaluation_start, self.evaluated, batches - self.evaluated
            )
            self.write_line(f"Evaluation: batch {self.evaluated} of {batches}{left}.")

    def on_log(self, args, state, control, logs=None, **kwargs):
        if (
            self.training_bar is None
            or not logs
            or not (sentence := describe_metrics(logs, state, self.evaluation_images))
        ):
            return
        if not self.training_bar.disable:
            with contextlib.suppress(OSError):  # the terminal was closed; training goes on
                self.training_bar.write(f"{self.prefix}{sentence}.")
        else:
            self.write_line(f"{sentence}{self.describe_time_left(state).replace(',', ';')}.")

    def is_silent(self, bar: tqdm | None) -> bool:
        """Whether a bar is hidden and the last line is a minute old."""
        return bar is not None and bar.disable and time.monotonic() - self.last_line >= MAX_SILENCE

    def write_line(self, line: str) -> None:
        self.last_line = time.monotonic()
        logger.info("%s%s", self.prefix, line)

    def describe_time_left(self, state: TrainerState) -> str:
        return describe_time_left(
            time.monotonic() - self.start, state.global_step - self.first_step, state.max_steps - state.global_step
        )


def describe_epoch(state: TrainerState) -> str:
    """`epoch 3 of 15`; within an epoch `epoch 2.25 of 15`."""
    epoch = f"epoch {round(state.epoch or 0, 2):g}"
    return f"{epoch} of {state.num_train_epochs}" if 0 < state.num_train_epochs < MAX_EPOCHS else epoch


def describe_step(state: TrainerState) -> str:
    return f"{describe_epoch(state)}, step {state.global_step:,} of {state.max_steps:,}"


def name_images(kind: str, number: int | None = None) -> str:
    """`5,000 held-out images`; `held-out images` if their number is unknown."""
    return f"{kind} images" if number is None else f"{number:,} {kind} {'image' if number == 1 else 'images'}"


def describe_metrics(logs: dict[str, float], state: TrainerState, images: str) -> str | None:
    """
    A sentence, without its full stop, about what the Trainer logs: the training loss, an evaluation, or the end. `None` for
    other values.

    Args:
        images: the name of the evaluation's images, such as "5,000 held-out images".
    """
    if "train_runtime" in logs:
        return f"Trained in {format_time(logs['train_runtime'])}"
    if "eval_accuracy" in logs:
        loss = f", loss {logs['eval_loss']:.3g}" if "eval_loss" in logs else ""
        return f"Accuracy on {images}: {100 * logs['eval_accuracy']:.1f} % ({describe_epoch(state)}){loss}"
    if "eval_loss" in logs:
        return f"Loss on {images}: {logs['eval_loss']:.3g} ({describe_epoch(state)})"
    if "loss" in logs:
        return f"Training loss: {logs['loss']:.4g} ({describe_step(state)})"
    return None

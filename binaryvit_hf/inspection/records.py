"""What the folder of a model says about its training run."""

from pathlib import Path
from typing import NamedTuple

from binaryvit_runtime.sources import RUN_ARGUMENTS, checkpoint_step

from ..network.quantization_binaryvit import LATENT
from ..run_history import (
    ALL_RESULTS,
    TRAINER_STATE,
    TrainingHistory,
    find_values,
    finite_numbers,
    named_metrics,
    read_json,
    read_training_history,
)


LEARNING_CURVES = "learning_curves.png"
MOST_PICTURE_BYTES = 2_000_000
PNG_START = b"\x89PNG\r\n\x1a\n"
RECORD_FILES = (RUN_ARGUMENTS, ALL_RESULTS, TRAINER_STATE, LEARNING_CURVES)


class RunRecords(NamedTuple):
    """
    Args:
        results: the metrics at the end of the run, or of a checkpoint. Empty if they are not recorded.
        history: what the run logged. Without epochs if `trainer_state.json` is missing.
        dataset: what the run was trained on.
        learning_rates: the last and the highest that the run logged, by these names. Empty if it did not train with Adam,
            whose step moves a weight by about the learning rate.
        curves_picture: the run's own drawing of its learning curves (PNG).
    """

    results: dict[str, float]
    history: TrainingHistory
    dataset: str | None
    learning_rates: dict[str, float]
    curves_picture: bytes | None

    def accuracy(self) -> tuple[dict[str, float], str]:
        """The accuracies by name and the images they are of: the test images if there are any. Empty if not recorded."""
        for prefix, images in (("test", "test images"), ("eval", f"{self.history.evaluation_images} images")):
            if found := named_metrics(self.results, prefix):
                number = self.results.get(f"{prefix}_samples")
                return found, images if number is None else f"{number:,.0f} {images}"
        return {}, ""


def find_part(folder: Path) -> Path | None:
    """A folder, which may be `.` or a link, as its run named it: `latent` or `checkpoint-N`; `None` if it is neither."""
    names = (folder, folder.absolute(), folder.resolve())
    return next((path for path in names if path.name == LATENT or checkpoint_step(path) is not None), None)


def find_checkpoint(folder: Path) -> Path | None:
    """A folder, as its run named it, if it is a checkpoint `checkpoint-N`; otherwise `None`."""
    part = find_part(folder)
    return None if part is None or part.name == LATENT else part


def records_folder(folder: Path) -> Path:
    """The output directory of the run that made the model in `folder`."""
    part = find_part(folder)
    return folder if part is None else part.parent


def read_records(folder: Path) -> RunRecords:
    """
    Args:
        folder: of a model, which may have no records, or have been trained elsewhere.

    Raises:
        UserError: a file is damaged.
    """
    of_run, checkpoint = records_folder(folder), find_checkpoint(folder)
    history = read_training_history(of_run, checkpoint)
    arguments = read_json(of_run / RUN_ARGUMENTS)
    # With these two arguments a run evaluates other weights than those that a checkpoint resumes from.
    is_evaluated = not (arguments.get("ema_decay") or arguments.get("batch_norm_reestimation_batches"))
    if checkpoint is None:
        results = finite_numbers(read_json(of_run / ALL_RESULTS))
    else:
        results = evaluation_at(history, checkpoint) if is_evaluated else {}
    dataset = next((arguments[name] for name in ("dataset_name", "train_dir") if arguments.get(name)), None)
    rates = [rate for _, rate in find_values(history, "learning_rate") if rate > 0]
    is_adam = str(arguments.get("optim")).startswith("adam")
    return RunRecords(
        results=results,
        history=history,
        dataset=dataset if isinstance(dataset, str) else None,
        learning_rates={"last": rates[-1], "highest": max(rates)} if rates and is_adam else {},
        curves_picture=None if checkpoint else read_picture(of_run / LEARNING_CURVES),
    )


def evaluation_at(history: TrainingHistory, checkpoint: Path) -> dict[str, float]:
    """The evaluation of a checkpoint, empty if the run evaluated at other steps."""
    evaluations = [entry for entry in history.entries if "eval_accuracy" in entry and "step" in entry]
    return next((entry for entry in evaluations if entry["step"] == checkpoint_step(checkpoint)), {})


def read_picture(file: Path) -> bytes | None:
    if not file.is_file() or file.stat().st_size > MOST_PICTURE_BYTES:
        return None
    content = file.read_bytes()
    return content if content.startswith(PNG_START) else None

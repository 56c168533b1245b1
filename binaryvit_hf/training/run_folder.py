"""An output directory: its lock, and the files that describe its run, the arguments and results."""

import contextlib
import hashlib
import itertools
import json
import os
import shlex
import time
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from binaryvit_runtime.errors import UserError, counted, first_sentence
from binaryvit_runtime.sources import RUN_ARGUMENTS, checkpoint_step  # the arguments of the run that made the weights
from binaryvit_runtime.writing import lock, write_file

from ..data.arguments import DataArguments
from ..data.image_checks import is_embedded
from ..data.streaming import ImageStream
from ..run_history import ALL_RESULTS, TRAINING_IMAGES, read_json
from .arguments import SCHEDULES_BY_METRICS, RunArguments
from .checkpoints import holds_whole_checkpoint
from .optional_methods import ARGUMENTS_OF_FILES


UNFINISHED_RUN_ARGUMENTS = "_unfinished_run_arguments.json"  # a run that continues a finished one; never uploaded
UNFINISHED_TRAINING_IMAGES = "_unfinished_training_images.json"  # as UNFINISHED_RUN_ARGUMENTS
WORKING_FOLDER = "_working_folder.txt"  # in which the last run started; never uploaded
TRAIN_RESULTS = "train_results.json"  # the last file that training writes
TEST_PREDICTIONS = "test_predictions.csv"  # the answer to every test image
RESULTS = (TRAIN_RESULTS, "eval_results.json", "test_results.json", ALL_RESULTS, TEST_PREDICTIONS)
WAIT_FOR_KILLED_RUN = 10.0  # seconds; processes that read its images see after 5 that it has ended
# Secrets, and arguments that may differ each time a run is resumed.
NOT_RECORDED = {
    *("token", "hub_token", "cache_dir", "resume_from_checkpoint", "push_to_hub", "logging_dir", "local_rank"),
}
# Recorded arguments that may differ when a run is resumed: none of them changes a weight by more than rounding.
WITHOUT_EFFECT_ON_WEIGHTS = {
    # A finished run can be evaluated again.
    *("do_eval", "do_predict"),
    # The metrics of an image do not depend on its batch.
    *("per_device_eval_batch_size", "eval_accumulation_steps", "eval_use_gather_object"),
    # Each image has its own random numbers (`data/sampling.py`), whichever worker loads it.
    *("dataloader_num_workers", "dataloader_prefetch_factor", "dataloader_persistent_workers"),
    *("dataloader_pin_memory", "dataloader_multiprocessing_context"),
    # Logging, reporting and uploads.
    *("logging_strategy", "logging_steps", "logging_first_step", "logging_nan_inf_filter"),
    *("log_level", "log_level_replica", "log_on_each_node", "disable_tqdm", "skip_memory_metrics"),
    *("report_to", "run_name", "project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"),
    *("hub_model_id", "hub_strategy", "hub_private_repo", "hub_always_push", "hub_revision"),
    # The number of checkpoints to keep; the best one is always kept.
    "save_total_limit",
    # Compiled steps differ from eager ones by rounding alone.
    *("torch_compile", "torch_compile_backend", "torch_compile_mode"),
    # The kernels of a graph are those of eager steps.
    "cuda_graphs",
    # How processes wait for each other, and exchange gradients.
    *("ddp_timeout", "ddp_find_unused_parameters"),
}
PROCESSES = "processes"  # recorded beside the arguments: they share the images of a step
PATH_ARGUMENTS = {
    *("model_name_or_path", "config_name", "init_from", "teacher_model_name_or_path", "output_dir"),
    *("dataset_name", "train_dir", "validation_dir", "class_names"),
}


# Arguments that name where the training images are.
TRAINING_SOURCE = ("dataset_name", "dataset_config_name", "train_dir", "train_split_name")


class FolderLocks(contextlib.ExitStack):
    """The output directories that this process trains in. Other runs must not, until this context ends."""

    def __init__(self) -> None:
        super().__init__()
        self.held: set[Path] = set()

    def hold(self, output_dir: Path, seconds: float = 0.0) -> None:
        """
        Keep other runs out of an output directory, if it exists and is not held yet.

        Args:
            seconds: to wait for the end of another run.

        Raises:
            UserError: another run trains in it.
        """
        end = time.monotonic() + seconds
        while output_dir.is_dir() and output_dir not in self.held:
            try:
                self.enter_context(lock(output_dir))
            except BlockingIOError:
                if time.monotonic() > end:
                    raise UserError(
                        f"Another run is training in {str(output_dir)!r}: wait for its end, or choose another --output_dir."
                    ) from None
                time.sleep(0.2)
            except OSError:  # some file systems have no locks
                return
            else:
                self.held.add(output_dir)


def write_results(output_dir: Path, split: str, metrics: dict) -> None:
    """Write the results of a split, `train`, `eval` or `test`, and add them to those of all."""
    for name, results in (
        (f"{split}_results.json", metrics),
        (ALL_RESULTS, read_results(output_dir / ALL_RESULTS) | metrics),
    ):
        write_file(output_dir / name, json.dumps(results, indent=4, sort_keys=True) + "\n")


def read_results(path: Path) -> dict:
    """The results in a file; empty if there is none, or if a run of an earlier version was killed while it wrote them."""
    try:
        return read_json(path)
    except UserError:
        return {}


def write_test_predictions(output_dir: Path, labels: np.ndarray, predicted: np.ndarray) -> None:
    """Write the class indices `(images,)` of labels and answers, a line for each test image in the order of the split."""
    lines = [f"{label},{answer}" for label, answer in zip(labels.tolist(), predicted.tolist())]
    write_file(output_dir / TEST_PREDICTIONS, "\n".join(["label,predicted", *lines, ""]))


def read_test_predictions(output_dir: Path) -> tuple[np.ndarray, np.ndarray]:
    """
    The class indices `(images,)` of labels and answers that `write_test_predictions` wrote.

    Raises:
        UserError: the file is missing or damaged.
    """
    path = output_dir / TEST_PREDICTIONS
    try:
        _, *lines = path.read_text(encoding="utf-8").splitlines()
        labels, predicted = np.array([line.split(",") for line in lines], dtype=np.int64).T
    except (OSError, ValueError) as error:
        raise UserError(f"{str(path)!r} cannot be read: {first_sentence(error)}; remove it and test again.") from error
    return labels, predicted


def arguments_to_json(arguments: RunArguments) -> dict:
    """The arguments of a run as JSON types, without `NOT_RECORDED`, and its number of processes."""
    model_arguments, data_arguments, training_arguments = arguments
    values = {**vars(model_arguments), **vars(data_arguments), **training_arguments.to_dict()}
    values[PROCESSES] = training_arguments.world_size
    values = {name: value for name, value in values.items() if name not in NOT_RECORDED and not name.startswith("_")}
    return json.loads(json.dumps(values, default=str, sort_keys=True))


class EarlierRunError(UserError):
    """
    An output directory holds another run.

    Args:
        found: what it holds, such as "a run of other arguments (seed was 1, not 2)".
        can_resume: whether `--resume_from_checkpoint` continues it, if it has a whole checkpoint.
    """

    def __init__(self, output_dir: Path, found: str, can_resume: bool = True):
        self.output_dir, self.found, self.can_resume = output_dir, found, can_resume
        super().__init__(f"--output_dir {str(output_dir)!r} holds {found}: {self.remedies('another --output_dir')}.")

    def remedies(self, another: str) -> str:
        if self.can_resume and holds_whole_checkpoint(self.output_dir):
            return f"choose {another}, remove this one, or continue it with --resume_from_checkpoint"
        return f"choose {another}, or remove this one"


def explain_earlier_runs(errors: list[EarlierRunError], teacher_dir: Path, output_dir: Path) -> str:
    """
    Explain in one sentence which of the folders of a teacher and its student hold other runs, and how to train a new pair.

    Args:
        errors: at least one, of these folders.
        output_dir: of the student.
    """
    follows = teacher_dir == teacher_folder(output_dir)
    candidates = (Path(f"{output_dir}-{number}") for number in itertools.count(2))
    new = next(path for path in candidates if not path.exists() and not (follows and teacher_folder(path).exists()))
    another = f"another one with --output_dir {shlex.quote(str(new))}"
    another += "" if follows else f" --teacher.output_dir {shlex.quote(str(teacher_folder(new)))}"
    follow = ", whose teacher's folder follows" if follows else ""
    of_folder = {error.output_dir: error for error in errors}
    of_teacher, of_student = of_folder.get(teacher_dir), of_folder.get(output_dir)
    if of_teacher is None:
        return f"--output_dir {str(output_dir)!r} holds {errors[0].found}: {errors[0].remedies(another)}."
    if of_student is not None:
        folders = (
            f"--output_dir {str(output_dir)!r} and its teacher's folder {str(teacher_dir)!r} hold {of_student.found}"
        )
        resume, can_resume = "", of_student.can_resume and of_teacher.can_resume
        if can_resume and is_finished(teacher_dir) and holds_whole_checkpoint(output_dir):
            resume = " --resume_from_checkpoint continues the student, with the teacher as it is."
        return f"{folders}: choose {another}{follow}, or remove both folders.{resume}"
    holds = f"The teacher's folder {str(teacher_dir)!r} holds {of_teacher.found}"
    if any((output_dir / name).is_file() for name in (RUN_ARGUMENTS, "config.json")):
        holds += f", and --output_dir {str(output_dir)!r} holds its student"
        return f"{holds}: choose {another}{follow}, or remove both folders."
    return f"{holds}: choose {another}{follow}, or remove it."


def teacher_folder(output_dir: str | Path) -> Path:
    """The output directory of the teacher that is trained before a student, unless another one is given."""
    return Path(f"{output_dir}-teacher")


def compare_with_recorded(output_dir: Path, arguments: RunArguments) -> None:
    """Raise EarlierRunError if the output directory holds a run of other arguments."""
    unfinished = output_dir / UNFINISHED_RUN_ARGUMENTS
    file = unfinished if unfinished.is_file() else output_dir / RUN_ARGUMENTS
    if not file.is_file():
        return
    recorded, given = read_json(file), arguments_to_json(arguments)
    # An older version may lack an argument: it ran with the argument's default.
    defaults = {
        field.name: field.default for part in arguments for field in fields(part) if field.default is not MISSING
    }
    recorded = {name: default for name, default in defaults.items() if name in given} | recorded
    may_differ = set(WITHOUT_EFFECT_ON_WEIGHTS)
    processes = recorded.setdefault(PROCESSES, given[PROCESSES])
    if is_finished(output_dir):
        # Its folder may be moved; the checkpoints of an unfinished run name theirs. Evaluations share out the images.
        may_differ |= {"output_dir", PROCESSES}
        may_differ |= {name for name in PATH_ARGUMENTS if have_moved_together(name, recorded, given)}
    elif processes != given[PROCESSES]:
        found = f"a run of {counted(processes, 'process')} (start {processes} to resume it, not {given[PROCESSES]})"
        raise EarlierRunError(output_dir, found, can_resume=False)
    compared = sorted((recorded.keys() | given.keys()) - may_differ)
    changed = [name for name in compared if normalize(name, recorded.get(name)) != normalize(name, given.get(name))]
    if changed:
        name = changed[0]
        found = f"a run of other arguments ({name} was {recorded.get(name)}, not {given.get(name)})"
        new_run = any(needs_new_run(name, recorded.get(name), given.get(name)) for name in changed)
        raise EarlierRunError(output_dir, found, can_resume=not new_run)


def needs_new_run(name: str, before: Any, now: Any) -> bool:
    """Whether training cannot resume with another value of an argument: its checkpoints lack the state of the new one."""
    if name == "lr_scheduler_type":  # functions of the step load each other's states
        return before in SCHEDULES_BY_METRICS or now in SCHEDULES_BY_METRICS
    return name == "optim" or (name in ARGUMENTS_OF_FILES and before is None)


def compare_training_images(output_dir: Path, images: Dataset | ImageStream, divided: bool) -> None:
    """
    Raise EarlierRunError if the run in the output directory was started with other training images.

    Args:
        divided: whether the held-out images are divided from them. Then the run may have learned some that are held out
            now, and is not to be continued.
    """
    recorded, given = recorded_images(output_dir), identify_images(images)
    if recorded and recorded != given:
        counts = f"{recorded.get('images')} before, {given['images']} now"
        raise EarlierRunError(output_dir, f"a run on other training images ({counts})", can_resume=not divided)


def recorded_images(output_dir: Path) -> dict:
    """The training images of the run that started last in the output directory; empty if this is not known."""
    is_unfinished = (output_dir / UNFINISHED_RUN_ARGUMENTS).is_file()
    recorded = read_json(output_dir / UNFINISHED_TRAINING_IMAGES) if is_unfinished else {}
    # An unfinished run of an older version, or one that was killed in `record_end`, has written TRAINING_IMAGES.
    return recorded or read_json(output_dir / TRAINING_IMAGES)


def compare_with_training_images(folder: Path, arguments: DataArguments, images: Dataset) -> str | None:
    """
    The numbers of training images, `340 then, 341 now`, if the run in `folder` had others of the same source; otherwise
    `None`, also if this is not known, or if that run has saved nothing.

    Args:
        folder: of a run or of its checkpoint, or anything else.
        arguments: that choose `images`.
    """
    run, files = folder, [(TRAINING_IMAGES, RUN_ARGUMENTS)]
    if checkpoint_step(folder) is not None:
        run = folder.parent
        if (run / UNFINISHED_RUN_ARGUMENTS).is_file():  # this run made the checkpoint, or the one that it continues
            files.append((UNFINISHED_TRAINING_IMAGES, UNFINISHED_RUN_ARGUMENTS))
    if not holds_weights(run):
        return None
    now = identify_images(images)
    for images_file, arguments_file in files:
        recorded, source = read_json(run / images_file), read_json(run / arguments_file)
        if recorded and recorded != now and has_same_source(run, source, arguments):
            return f"{recorded.get('images')} then, {now['images']} now"
    return None


def has_same_source(run: Path, recorded: dict, arguments: DataArguments) -> bool:
    """Whether the recorded arguments of the run in a folder are known to name the same training images, all of them."""
    if recorded.get("max_train_samples") or arguments.max_train_samples:
        return False
    output_dir, started_in = recorded.get("output_dir") or "", run / WORKING_FOLDER
    is_beside = not os.path.isabs(output_dir) and os.path.abspath(output_dir) == os.path.abspath(run)
    # Older versions have not written this file.
    is_in_place = is_beside or (started_in.is_file() and started_in.read_bytes() == os.getcwdb())
    for name in TRAINING_SOURCE:
        before, now = recorded.get(name), getattr(arguments, name)
        if normalize(name, before) != normalize(name, now):
            return False
        # The run may have started in another working folder, where a relative path is of another folder.
        is_relative = name in PATH_ARGUMENTS and before and not os.path.isabs(before) and os.path.exists(before)
        if is_relative and not is_in_place:
            return False
    return True


def identify_images(images: Dataset | ImageStream) -> dict:
    """The number of images, and a digest of their labels and, for files, of their names. A stream has only a number."""
    if isinstance(images, ImageStream):
        return {"images": len(images)}
    content = [images["label"][:]]
    if not is_embedded(images):
        content.append([Path(encoded["path"] or "").name for encoded in images["image"][:]])
    return {"images": len(images), "sha256": hashlib.sha256(json.dumps(content).encode()).hexdigest()}


def normalize(name: str, value: Any) -> Any:
    """Make paths absolute: `photos`, `photos/` and `./photos` are one folder."""
    return os.path.abspath(value) if name in PATH_ARGUMENTS and isinstance(value, str) else value


def have_moved_together(name: str, recorded: dict, given: dict) -> bool:
    """Whether a path has the same place as before, seen from the output directory, such as `../teacher`."""
    paths = [(arguments.get(name), arguments.get("output_dir")) for arguments in (recorded, given)]
    if not all(isinstance(path, str) for pair in paths for path in pair):
        return False
    try:
        before, now = (os.path.relpath(path, output_dir) for path, output_dir in paths)
    except ValueError:  # on two drives of Windows
        return False
    return before == now


def is_finished(output_dir: Path) -> bool:
    """Whether the last training in this folder ended."""
    return bool(read_results(output_dir / TRAIN_RESULTS)) and not (output_dir / UNFINISHED_RUN_ARGUMENTS).is_file()


def holds_weights(output_dir: Path) -> bool:
    """Whether a training in this folder has saved anything that another one could continue, or would overwrite."""
    names = (TRAIN_RESULTS, "config.json")
    return any((output_dir / name).is_file() for name in names) or any(
        checkpoint_step(path) is not None for path in output_dir.glob("checkpoint-*")
    )


def record_start(output_dir: Path, arguments: RunArguments, images: Dataset | ImageStream) -> None:
    """
    Write the arguments and training images of a run that starts. A finished run in the folder keeps its own until
    `record_end`.
    """
    continues = any((output_dir / name).is_file() for name in (TRAIN_RESULTS, UNFINISHED_RUN_ARGUMENTS))
    names = (TRAINING_IMAGES, RUN_ARGUMENTS)
    if continues:
        names = (UNFINISHED_TRAINING_IMAGES, UNFINISHED_RUN_ARGUMENTS)  # the second counts: it is written last
    write_file(output_dir / WORKING_FOLDER, os.getcwdb())
    for file, content in zip(names, (identify_images(images), arguments_to_json(arguments))):
        partial = output_dir / f"{file}.writing"
        partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        partial.replace(output_dir / file)


def record_end(output_dir: Path) -> None:
    """Replace what is recorded of the finished run whose weights are replaced next, if this run continues one."""
    if not (output_dir / UNFINISHED_RUN_ARGUMENTS).is_file():
        return
    for name in RESULTS:
        (output_dir / name).unlink(missing_ok=True)
    if (output_dir / UNFINISHED_TRAINING_IMAGES).is_file():
        (output_dir / UNFINISHED_TRAINING_IMAGES).replace(output_dir / TRAINING_IMAGES)
    (output_dir / UNFINISHED_RUN_ARGUMENTS).replace(output_dir / RUN_ARGUMENTS)

"""Run a command line: a teacher's run and its student's, or one run, and the exit code."""

import json
import logging
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

from accelerate import PartialState
from datasets import Dataset
from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
from transformers import set_seed
from transformers.utils.logging import disable_progress_bar

from binaryvit_runtime.errors import (
    NonFiniteLossError,
    TerminatedError,
    UploadError,
    UserError,
    counted,
    first_sentence,
)
from binaryvit_runtime.hub import prepare_hub_client, suggest_name
from binaryvit_runtime.packed_model import check_engine_variable
from binaryvit_runtime.writing import describe_full_disk, discard_output

from ..data.streaming import ImageStream
from ..data.workers import describe_dead_worker
from ..host_memory import keep_freed_memory
from .arguments import RunArguments
from .command_line import errors_with_flags_of, own_arguments, parse_runs, with_flags_of
from .forecast import describe_images, log_forecast
from .memory_errors import FullMemoryError, is_full_memory
from .preparation import CheckedNetwork, Inputs, check_arguments, check_network, check_output_folder, prepare
from .process_errors import leave, rank, show_error, shown_error_code
from .run_folder import WAIT_FOR_KILLED_RUN, EarlierRunError, FolderLocks, explain_earlier_runs
from .steps import CONFUSION_PICTURES, TrainingRun
from .unused_arguments import find_unused


logger = logging.getLogger(__name__)


def main(arguments: list[str]) -> int:
    """Train and evaluate as the command line says; returns the exit code. Every expected error is one sentence."""
    is_first = rank() == 0
    logging.basicConfig(format="%(message)s", level=logging.INFO if is_first else logging.ERROR)
    keep_freed_memory()
    hide_progress_of_files()
    prepare_hub_client()
    for client in ("httpx", "httpx2"):
        logging.getLogger(client).setLevel(logging.WARNING)
    try:
        train_and_evaluate(arguments)
    except UserError as error:
        # A worker of the data loader puts its stack trace before the message.
        message = str(error).strip().splitlines()[-1].removeprefix("binaryvit_runtime.errors.UserError: ")
        return leave(show_error(message, 2))
    except (NonFiniteLossError, UploadError, FullMemoryError) as error:
        return leave(show_error(str(error), 1))
    except TerminatedError as error:
        return leave(show_error(str(error), 128 + signal.SIGTERM))
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # another Ctrl-C ends the process at once, without a stack trace
        message = "Interrupted. Run the same command again to resume from the last checkpoint, if there is one."
        return leave(show_error(message, 128 + signal.SIGINT))
    except Exception as error:
        if reason := describe_dead_worker(error):
            message = f"{reason}. The same command then resumes from the last checkpoint, if there is one."
            return leave(show_error(message, 1))
        if is_full_memory(error):  # not in a batch
            return leave(show_error(f"The memory is full: {first_sentence(error)}", 1))
        if failure := describe_full_disk(error):
            return leave(show_error(f"The run can write no more to its output directory: {failure}.", 1))
        if (code := shown_error_code()) is None:
            raise
        return leave(code)  # another process failed and has shown its error; this one was waiting for it
    return 0


def hide_progress_of_files() -> None:
    """Hide transformers' bars for each checkpoint that is read or written. Downloads keep theirs."""
    downloads_are_hidden = are_progress_bars_disabled()
    disable_progress_bar()
    if not downloads_are_hidden:
        enable_progress_bars()


def train_and_evaluate(arguments: list[str]) -> None:
    check_engine_variable()
    runs = parse_runs(arguments)
    for run_arguments in reversed(runs):  # an argument of both is the student's, and named so
        with errors_with_flags_of(run_arguments, runs):
            check_arguments(run_arguments)
    uploads = any(run_arguments.training.push_to_hub for run_arguments in runs)
    own, unused = own_arguments(runs[0], runs), [dict(find_unused(run_arguments, uploads)) for run_arguments in runs]
    for run_arguments, of_run in zip(runs, unused):
        for argument, reason in of_run.items():
            # An argument of both runs may have an effect in one of them.
            if argument in own or (run_arguments is runs[-1] and all(argument in each for each in unused)):
                text = f"--{argument} has no effect: {reason}."
                logger.warning("%s", with_flags_of(run_arguments, runs, text))
    with FolderLocks() as locks:
        if rank() == 0:
            for run_arguments in runs:
                if run_arguments.training.do_train:
                    locks.hold(Path(run_arguments.training.output_dir), WAIT_FOR_KILLED_RUN)
        run_all(runs, locks)


def run_all(runs: list[RunArguments], locks: FolderLocks) -> None:
    # Check and prepare every run first: an error in the student's inputs must not wait for its teacher's training.
    networks = []
    for run_arguments in runs:
        with errors_with_flags_of(run_arguments, runs):
            networks.append(check_network(run_arguments, run_arguments is not runs[0]))
    if len(runs) == 2 and networks[0].finished and runs[-1].training.resume_from_checkpoint:
        # The student goes on with other arguments, which its finished teacher got from the same command line.
        networks[0] = networks[0]._replace(is_kept=True)
    check_output_folders(runs, networks)
    loaded: dict = {}
    prepared: list[Inputs] = []
    for run_arguments, network in zip(runs, networks):
        try:
            with errors_with_flags_of(run_arguments, runs):
                prepared.append(prepare(run_arguments, network, loaded, teacher=prepared[0] if prepared else None))
        except EarlierRunError as error:
            raise explain_for_all(runs, [error]) from error
    names = ["teacher (1 of 2)", "student (2 of 2)"] if len(runs) == 2 else [""]
    to_train = {
        name: (run_arguments, inputs)
        for name, run_arguments, inputs in zip(names, runs, prepared)
        if run_arguments.training.do_train and not inputs.finished
    }
    first = next(iter(to_train), None)
    if first is not None:
        first_arguments, first_inputs = to_train[first]
        describe_images(first_inputs.images, first_arguments.training.balance_classes)
    for name, run_arguments, inputs in zip(names, runs, prepared):
        PartialState().wait_for_everyone()  # the first process writes the teacher that all processes load
        with errors_with_flags_of(run_arguments, runs):
            summary = run(run_arguments, inputs, name, to_train if name == first else {}, locks)
        if run_arguments is not runs[-1]:
            logger.info("%s", "\n".join(summary))
    # Leave together: a process that exits early may abort, and torchrun then ends others that still write.
    PartialState().wait_for_everyone()
    PartialState().destroy_process_group()
    if rank() == 0:
        last = runs[-1]
        lines = [*summary, f"metrics:   {Path(last.training.output_dir) / 'all_results.json'}"]
        show_results("\n".join([*lines, *(next_steps(last, prepared[-1]) if last.training.do_train else [])]))


def check_output_folders(runs: list[RunArguments], networks: list[CheckedNetwork]) -> None:
    """
    Raise UserError if output directories hold runs of other arguments, or if a teacher is to be trained whose student has
    learned already, from an earlier teacher.
    """
    errors: list[EarlierRunError] = []
    for run_arguments, network in zip(runs, networks):
        try:
            check_output_folder(run_arguments, network)
        except EarlierRunError as error:
            errors.append(error)
    if errors:
        raise explain_for_all(runs, errors)
    student = runs[-1].training
    if len(runs) == 1 or networks[0].finished or student.resume_from_checkpoint:
        return
    if networks[1].finished or networks[1].checkpoint:
        raise EarlierRunError(Path(student.output_dir), "a student of an earlier teacher", can_resume=False)


def explain_for_all(runs: list[RunArguments], errors: list[EarlierRunError]) -> UserError:
    """One error for the output directories of all runs."""
    if len(runs) == 1:
        return errors[0]
    teacher_dir, output_dir = (Path(run_arguments.training.output_dir) for run_arguments in runs)
    return UserError(explain_earlier_runs(errors, teacher_dir, output_dir))


def run(
    arguments: RunArguments,
    inputs: Inputs,
    name: str,
    to_forecast: dict[str, tuple[RunArguments, Inputs]],
    locks: FolderLocks,
) -> list[str]:
    """
    Train, evaluate and test one model, write its results and its card, and upload it.

    Args:
        name: of the run, if there are two.
        to_forecast: this run and later ones, by name, whose time is to be estimated.
        locks: get the output directory of a training.

    Returns:
        Lines about the results.
    """
    model_arguments, _, training_arguments = arguments
    logger.info(
        "%s%s -> %s",
        f"{name}: " if name else "",
        model_arguments.config_name or model_arguments.model_name_or_path,
        training_arguments.output_dir,
    )
    set_seed(training_arguments.seed)
    training_run = TrainingRun(arguments, inputs, name)
    if to_forecast:
        log_forecast(training_run.datasets["train"], training_run.student, training_run.teacher, to_forecast)
    if training_arguments.do_train and not inputs.finished:
        training_run.train(locks)
    if training_arguments.do_eval:
        training_run.evaluate()
    if training_arguments.do_predict:
        training_run.test()
    if inputs.broken:
        logger.warning("Left out %s: broken, or too large.", counted(len(inputs.broken), "image"))
    if training_arguments.do_train:
        training_run.report()
    if training_arguments.push_to_hub:
        training_run.upload()
    return training_run.summary


def show_results(text: str) -> None:
    """Print results, which the output directory has, too: a closed terminal, or a pipe without a reader, is no error."""
    try:
        print(text, flush=True)
    except OSError:
        discard_output(sys.stdout)


def next_steps(run: RunArguments, inputs: Inputs) -> list[str]:
    """
    Where the results of a trained model are, and commands that can be pasted: classify, load, publish.

    The commands put transparent pictures on the model's background, so they answer as its evaluation. If the images are
    no files, the Python command loads one of the dataset, and there is no `binaryvit classify`.
    """
    folder = Path(run.training.output_dir)
    image, background = find_image_file(inputs.images["validation"]), inputs.background
    classifier = f'pipeline("image-classification", {json.dumps(str(folder))})'
    package = "binaryvit_hf.small_networks" if inputs.config.model_type == "timm_wrapper" else "binaryvit_hf"
    imports = f"import {package}; from transformers import pipeline"
    if image is None:
        imports += "; from binaryvit_hf.training.example_image import evaluation_image"
        cache = f", {json.dumps(run.model.cache_dir)}" if run.model.cache_dir else ""
        picture = f"evaluation_image({json.dumps(str(folder))}{cache})"
    elif background is not None:  # a pipeline drops transparency
        imports += "; from binaryvit_hf.pixels import to_rgb; from PIL import Image"
        picture = f"to_rgb(Image.open({json.dumps(image)}), {json.dumps(background)})"
    else:
        picture = json.dumps(image)
    commands = [
        ["python", "-c", f"{imports}; print({classifier}({picture}))"],
        ["binaryvit", "push", str(folder), suggest_name(folder)],
    ]
    if image is not None:
        commands.insert(0, ["binaryvit", "classify", str(folder), image])
    pictures = [name for name in (*CONFUSION_PICTURES.values(), "learning_curves.png") if (folder / name).is_file()]
    join = subprocess.list2cmdline if os.name == "nt" else shlex.join
    return [
        f"pictures:  {', '.join(str(folder / name) for name in pictures)}",
        f"its card:  {folder / 'README.md'}",
        "",
        "Classify images, load the model in Python, or publish it:"
        if image is not None
        else f"Classify one of the {inputs.evaluation_images} images in Python, or publish the model:",
        *map(join, commands),
    ]


def find_image_file(images: Dataset | ImageStream) -> str | None:
    """The file of the first image, if the images are files on this machine."""
    if isinstance(images, ImageStream) or not len(images):
        return None
    path = images[0]["image"]["path"]
    return path if path and Path(path).is_file() else None

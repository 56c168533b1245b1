"""The runs of an ablation: their command lines, order, processes and interruption."""

import contextlib
import functools
import logging
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from binaryvit_runtime.cpus import available_cpus
from binaryvit_runtime.errors import RunError, UserError, counted
from binaryvit_runtime.progress import format_time
from binaryvit_runtime.sources import list_names
from binaryvit_runtime.writing import check_writable, lock

from ..arguments import RunArguments
from ..models import load_config
from ..preparation import check_same_network, earlier_configs
from ..run_folder import (
    RUN_ARGUMENTS,
    TEST_PREDICTIONS,
    TRAIN_RESULTS,
    EarlierRunError,
    compare_with_recorded,
    holds_weights,
    is_finished,
    read_json,
)
from .results import RowResults, collect_results, output_file, write_results
from .table import DEFAULT_TABLE, FIRST_STAGE, Row, Table, check_run, parse_student, read_table, to_flags


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """
    One training run.

    Args:
        row: that the run belongs to.
        folder: its output directory.
        line: its command line, without the program.
        needs: the folders of runs that must be finished before.
    """

    row: Row
    folder: Path
    line: list[str]
    needs: tuple[Path, ...] = ()

    @functools.cached_property
    def arguments(self) -> RunArguments:
        return parse_student(self.line)

    @property
    def epochs(self) -> float:
        return self.arguments.training.num_train_epochs


@dataclass(frozen=True)
class Ablation:
    """
    A table, and the folder of its runs.

    Several tables may share `out`. A run of the same row, seed and arguments is then trained once for all of them.

    Args:
        folder: holds the table, recipes of run_image_classification.py, by default `teacher.json` and `student.json`, and a
            folder with a `config.json` for every network.
        out: gets a folder for every run, the table of results and its pictures.
        seeds: seeds of the students; the teacher has its recipe's seed.
        table_name: of the table's file in `folder`.
    """

    folder: Path
    out: Path
    seeds: tuple[int, ...]
    table_name: str = DEFAULT_TABLE

    @functools.cached_property
    def table(self) -> Table:
        return read_table(self.folder, self.table_name)

    @property
    def results_file(self) -> Path:
        return output_file(self.table, self.out)

    @property
    def teacher_folder(self) -> Path:
        """The folder of the run that all students learn from."""
        return self.out / self.table.teacher.key

    @functools.cached_property
    def teacher_seed(self) -> int:
        """The seed of the run that all students learn from: its recipe's."""
        return parse_student(self.line(self.table.teacher, self.teacher_folder, {})).training.seed

    def seeds_of(self, row: Row) -> list[int]:
        seeds = list(self.seeds)
        if row is self.table.teacher:
            seeds = list(dict.fromkeys([self.teacher_seed, *seeds]))[: len(seeds)]
        return seeds[: row.seeds]

    def output_dir(self, row: Row, seed: int) -> Path:
        """The folder of a run."""
        is_the_students_teacher = row is self.table.teacher and seed == self.teacher_seed
        return self.teacher_folder if is_the_students_teacher else self.out / f"{row.key}-seed{seed}"

    def line(self, row: Row, folder: Path, arguments: dict[str, Any]) -> list[str]:
        """
        The command line of a run.

        Args:
            arguments: override the row's.
        """
        given = {"config_name": os.path.normpath(self.folder / row.config), "output_dir": str(folder)}
        return [str(self.folder / row.recipe), *to_flags(row.arguments | arguments | given)]

    def runs_of(self, row: Row, seed: int) -> list[Run]:
        """The run of a row and seed, after that of its first stage if it has one."""
        folder = self.output_dir(row, seed)
        if folder == self.teacher_folder:
            return [Run(row, folder, self.line(row, folder, {}))]
        given: dict[str, Any] = {"seed": seed}
        if row is not self.table.teacher:
            given["teacher_model_name_or_path"] = str(self.teacher_folder)
        needs = (self.teacher_folder,)  # also a teacher of another seed waits, so that this one has all cores
        if row.first_stage is None:
            return [Run(row, folder, self.line(row, folder, given), needs)]
        first = self.out / f"{row.key}{FIRST_STAGE}-seed{seed}"
        return [
            Run(row, first, self.line(row, first, row.first_stage | given), needs),
            Run(row, folder, self.line(row, folder, given | {"init_from": str(first)}), (*needs, first)),
        ]

    def runs(self) -> dict[Path, Run]:
        """
        The runs by their folders: the teacher's, then all rows with their first seed, then all rows with their next seed.
        This order fills every row of the table early.

        Raises:
            UserError: two rows would share a folder.
        """
        runs: dict[Path, Run] = {}
        for turn in range(len(self.seeds)):
            for row in self.table.trained_rows.values():
                for seed in self.seeds_of(row)[turn : turn + 1]:
                    for run in self.runs_of(row, seed):
                        other = runs.setdefault(run.folder, run)
                        if other is not run:
                            raise UserError(
                                f"Rows {other.row.key!r} and {row.key!r} of {str(self.table.file)!r} share the folder "
                                f"{str(run.folder)!r}: give one of them another key."
                            )
        return runs

    def results(self) -> dict[str, RowResults]:
        """What the finished runs of the teacher and of each row recorded, by the key of the row."""
        results = {}
        for key, row in self.table.trained_rows.items():
            folders = [self.output_dir(row, seed) for seed in self.seeds_of(row)]
            if finished := [folder for folder in folders if has_results(folder)]:
                results[key] = collect_results(row, finished)
        return results

    def write_results(self, seconds: dict[str, float] | None = None, cpu: str | None = None) -> None:
        """
        Write the table and its pictures from the runs that are finished.

        Args:
            seconds: of a forward of each network, by the key of its row.
            cpu: the name of the CPU that they were measured on.
        """
        write_results(self.table, self.results(), self.out, seconds or {}, cpu)

    def folders_to_time(self) -> dict[str, Path]:
        """The folder of a run of each row, by its key; none if all rows have the same network."""
        if self.table.has_one_network:
            return {}
        results = self.results()
        return {key: results[key].folders[0] for key in self.table.rows if key in results}


def run_ablation(ablation: Ablation, jobs: int) -> None:
    """
    Train all runs that are not finished, and write the table after each.

    On SIGTERM, on Ctrl-C and when the terminal is closed, the runs save a checkpoint, and the same call resumes from it.

    Args:
        jobs: number of runs at once. Each gets its share of the cores, and one of the GPUs if there are any.

    Raises:
        UserError: the table or a recipe is wrong, or the folder holds runs of other arguments or another ablation trains in it.
        RunError: a run failed.
    """
    runs = list(ablation.runs().values())
    # Check all runs before any training: the folder may hold runs of other recipes.
    for run in runs:
        check_run(ablation.table, run.row, run.line)
    with in_use(ablation.out) as locks:
        waiting = [run for run in runs if not is_tested(run)]
        check_learners(ablation.out, waiting)
        train(ablation, waiting, jobs, locks)
        ablation.write_results()


@contextlib.contextmanager
def in_use(out: Path) -> Iterator[list[int]]:
    """
    Keep other ablations from training the same runs, also while runs go on whose ablation was killed.

    Yields:
        File descriptors that the runs inherit: the folder is in use until the last one ends.

    Raises:
        UserError: another one is training in this folder, or it cannot be written.
    """
    check_writable(out)
    out.mkdir(parents=True, exist_ok=True)
    locks: list[int] = []
    with contextlib.ExitStack() as stack:
        try:
            locks.append(stack.enter_context(lock(out)))
        except BlockingIOError:
            raise UserError(
                f"Another ablation trains in {str(out)!r}, or has left runs that do: wait for their end, or choose another OUT."
            ) from None
        except OSError:  # some file systems have no locks
            pass
        yield locks


def train(ablation: Ablation, runs: list[Run], jobs: int, locks: list[int]) -> None:
    """Train runs, `jobs` at a time, which inherit the file descriptors `locks`. An exception ends all of them."""
    waiting = list(runs)
    gpus = visible_gpus(os.environ, torch.cuda.device_count())
    running: dict[subprocess.Popen, Run] = {}
    places: dict[Path, int] = {}  # of running runs, from 0
    started: dict[Path, float] = {}
    seconds: dict[Path, float] = {}  # of runs that finished
    try:
        while waiting or running:
            while len(running) < jobs and (run := next_run(waiting, running.values())):
                if not started:
                    logger.info("%s", describe_left(ablation, runs, {}, {}, jobs))
                waiting.remove(run)
                started[run.folder] = time.monotonic()
                place = places[run.folder] = min(set(range(jobs)) - set(places.values()))
                left = len(running) + 1 + len(waiting)
                at_once = 1 if run.folder == ablation.teacher_folder else min(jobs, left)
                running[start(run, at_once, gpus[place % len(gpus)] if gpus else None, locks)] = run
            time.sleep(1)
            for process in [process for process in running if process.poll() is not None]:
                run = running.pop(process)
                del places[run.folder]
                if process.returncode != 0:
                    raise RunError(f"The run {run.folder} failed: read {log_of(run.folder)}.")
                accuracy = 100 * read_json(run.folder / "all_results.json")["test_accuracy"]
                now = time.monotonic()
                seconds[run.folder] = now - started[run.folder]
                elapsed = {other.folder: now - started[other.folder] for other in running.values()}
                described = describe_left(ablation, [*waiting, *running.values()], elapsed, seconds, jobs)
                logger.info("%s: %.2f %%; %s", run.folder, accuracy, described)
                ablation.write_results()
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.wait()


def next_run(waiting: list[Run], running: Iterable[Run]) -> Run | None:
    """The first waiting run that needs no other unfinished one."""
    unfinished = {run.folder for run in (*waiting, *running)}
    return next((run for run in waiting if not unfinished & set(run.needs)), None)


def describe_left(
    ablation: Ablation, left: list[Run], elapsed: dict[Path, float], measured: dict[Path, float], jobs: int
) -> str:
    """
    The number of runs that are left, and about how long they take, from the times of finished runs.

    Args:
        elapsed: seconds since the start of each run that is training, by its folder.
        measured: seconds of runs that have finished since, from their start to their end. Of earlier runs the recorded time
            of training counts.
    """
    runs = ablation.runs()
    described = f"{len(left)} of {counted(len(runs), 'run')} left"
    of_epochs: dict[str, list[float]] = {}  # seconds of an epoch, by row
    for folder in runs.keys() - {run.folder for run in left}:
        seconds = read_json(folder / TRAIN_RESULTS).get("train_runtime", 0.0)
        of_epoch = max(seconds, measured.get(folder, 0.0)) / runs[folder].epochs
        of_epochs.setdefault(runs[folder].row.key, []).append(of_epoch)
    if not of_epochs or not left:
        return described
    of_all = statistics.median(seconds for row in of_epochs.values() for seconds in row)
    of_rows = {key: statistics.median(seconds) for key, seconds in of_epochs.items()}
    rest = [max(0.0, run.epochs * of_rows.get(run.row.key, of_all) - elapsed.get(run.folder, 0.0)) for run in left]
    return f"{described}, about {format_time(sum(rest) / min(jobs, len(left)))}"


def has_results(folder: Path) -> bool:
    """Whether a run is trained and tested, and its answers to the test images are there."""
    has_answers = is_finished(folder) and (folder / TEST_PREDICTIONS).is_file()
    return has_answers and "test_accuracy" in read_json(folder / "all_results.json")


def is_tested(run: Run) -> bool:
    """Whether a run is trained and tested; raises UserError if its folder holds a run of other arguments or another network."""
    try:
        for found in earlier_configs(run.folder, None):
            check_same_network(found, load_config(run.arguments.model, do_train=True), run.folder)
        if holds_weights(run.folder):  # otherwise the training takes other arguments
            compare_with_recorded(run.folder, run.arguments)
    except EarlierRunError as error:
        raise UserError(
            f"{str(run.folder)!r} holds {error.found}: choose another OUT, restore what has changed, or remove this folder and "
            "those of the runs that learned from it."
        ) from error
    return has_results(run.folder)


def check_learners(out: Path, waiting: list[Run]) -> None:
    """
    Raise UserError if runs in `out`, of any table and seed, learned from an earlier run in the folder of one that is to be
    trained: finished ones are not trained again, and others would resume with another teacher. A run that has saved nothing
    begins anew.
    """
    to_train = {run.folder.name for run in waiting if not is_finished(run.folder)}
    files = [file for file in sorted(out.glob(f"*/{RUN_ARGUMENTS}")) if holds_weights(file.parent)]
    sources = {file.parent.name: sources_of(file) & to_train for file in files}
    for name in sorted(to_train):
        if learners := [learner for learner, names in sources.items() if name in names]:
            raise UserError(
                f"Runs in {str(out)!r} learned from an earlier {name!r}, which is to be trained: remove them too, or move them "
                f"elsewhere: {list_names(learners)}."
            )


def sources_of(file: Path) -> set[str]:
    """
    The names of the folders beside a run's own that its teacher and its first weights are from.

    Args:
        file: the run's recorded arguments. Their paths are of then: the folder above may be moved since.
    """
    recorded = read_json(file)
    paths = [recorded.get(name) for name in ("teacher_model_name_or_path", "init_from", "output_dir")]
    *sources, output_dir = (Path(os.path.abspath(path)) if isinstance(path, str) else None for path in paths)
    return {source.name for source in sources if source and output_dir and source.parent == output_dir.parent}


def log_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.log")


def visible_gpus(environment: Mapping[str, str], count: int) -> list[str]:
    """
    The names of the GPUs that a process may use, as CUDA_VISIBLE_DEVICES has them.

    Args:
        environment: of the process.
        count: of its GPUs.
    """
    names = environment.get("CUDA_VISIBLE_DEVICES")
    return ([str(number) for number in range(count)] if names is None else names.split(","))[:count]


def start(run: Run, at_once: int, gpu: str | None, locks: list[int]) -> subprocess.Popen:
    """
    Start a run. OMP_NUM_THREADS, if it is set, is its number of threads.

    Args:
        at_once: number of runs that share the cores.
        gpu: the one that the run may use, or `None` if there is none.
        locks: file descriptors that it inherits.
    """
    threads = max(available_cpus() // at_once, 1)
    given = {} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu}
    run.folder.parent.mkdir(parents=True, exist_ok=True)
    logger.info("%s: training, its log is %s", run.folder, log_of(run.folder))
    with log_of(run.folder).open("a", encoding="utf-8") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "binaryvit_hf.training", *run.line],
            stdout=log,
            stderr=subprocess.STDOUT,
            pass_fds=locks,
            start_new_session=True,  # only this process gets Ctrl-C, and ends the others by SIGTERM
            env={"OMP_NUM_THREADS": str(threads), **os.environ, **given},
        )

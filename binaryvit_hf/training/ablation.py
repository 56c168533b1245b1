"""Ablations: train every row and seed of a table by one recipe with one teacher, and write the table of results."""

import functools
import logging
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure
from transformers import AutoConfig

from binaryvit_runtime.errors import RunError, UserError, counted

from ..ops import LayerCost, count_operations, readable, total
from .command_line import parse_runs
from .model_card import weight_bytes
from .run_folder import compare_with_recorded, is_finished, read_json


TABLE_HEAD = (
    "| row | test top-1, % | seeds | to the teacher | held-out top-1, % | weights on disk | BOPs | FLOPs | OPs |"
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ablation:
    """
    A folder of recipes, and the folder of their runs.

    Args:
        folder: holds `table.json` (`title`, `description`, `teacher`, and `rows`: folder names and descriptions),
            `teacher.json` and `student.json` (recipes of run_image_classification.py), and a folder with a `config.json`
            for every row.
        out: gets a folder for every run, `results.md` and `ablation.png`.
        seeds: seeds of the students; the teacher has its recipe's seed.
    """

    folder: Path
    out: Path
    seeds: tuple[int, ...]

    @functools.cached_property
    def table(self) -> dict:
        return read_json(self.folder / "table.json")

    def output_dir(self, row: str, seed: int) -> Path:
        """The folder of a run. The teacher is trained only once, so its folder is the same for all seeds."""
        return self.out / (row if row == self.table["teacher"] else f"{row}-seed{seed}")

    def runs(self) -> dict[Path, list[str]]:
        """
        The command line of each run by its folder: the teacher's run, then all rows with the first seed, then all rows with
        the next seed. This order fills every row of the table early.
        """
        teacher, runs = self.table["teacher"], {}
        for seed in self.seeds:
            for row in (teacher, *self.table["rows"]):
                folder, recipe = self.output_dir(row, seed), "teacher.json" if row == teacher else "student.json"
                runs[folder] = [str(self.folder / recipe), "--config_name", str(self.folder / row)]
                runs[folder] += ["--output_dir", str(folder)]
                if row != teacher:
                    runs[folder] += ["--teacher_model_name_or_path", str(self.out / teacher), "--seed", str(seed)]
        return runs


def run_ablation(ablation: Ablation, jobs: int) -> None:
    """
    Train all runs that are not finished, and write the table after each.

    On SIGTERM and Ctrl-C the runs save a checkpoint, and the same call resumes from it.

    Args:
        jobs: number of runs at once; each gets its share of the cores.

    Raises:
        UserError: a recipe cannot be read, or the folder holds runs of other recipes.
        RunError: a run failed.
    """
    if not ablation.table:
        raise UserError(f"{str(ablation.folder)!r} is not the folder of an ablation: it has no table.json.")
    # Check all runs before any training: the folder may hold runs of other recipes.
    missing = {folder: line for folder, line in ablation.runs().items() if not is_tested(folder, line)}
    teacher = ablation.out / ablation.table["teacher"]
    if teacher in missing:  # the students need it
        train(ablation, {teacher: missing.pop(teacher)}, at_once=1)
    train(ablation, missing, at_once=jobs)
    write_results(ablation)


def train(ablation: Ablation, runs: dict[Path, list[str]], at_once: int) -> None:
    """Train runs, command lines by folder, `at_once` at a time. An exception ends all of them."""
    waiting = list(runs.items())
    running: dict[subprocess.Popen, Path] = {}
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                folder, arguments = waiting.pop(0)
                running[start(folder, arguments, at_once)] = folder
            time.sleep(1)
            for process in [process for process in running if process.poll() is not None]:
                folder = running.pop(process)
                if process.returncode != 0:
                    raise RunError(f"The run {folder} failed: read {log_of(folder)}.")
                logger.info("%s: %.2f %%", folder, 100 * read_json(folder / "all_results.json")["test_accuracy"])
                write_results(ablation)
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.wait()


def is_tested(folder: Path, arguments: list[str]) -> bool:
    """Whether a run is trained and tested; raises UserError if its folder holds a run of other arguments."""
    compare_with_recorded(folder, parse_runs(arguments)[-1])
    return is_finished(folder) and "test_accuracy" in read_json(folder / "all_results.json")


def log_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.log")


def start(folder: Path, arguments: list[str], at_once: int) -> subprocess.Popen:
    threads = max((os.cpu_count() or 1) // at_once, 1)
    folder.parent.mkdir(parents=True, exist_ok=True)
    logger.info("%s: training, its log is %s", folder, log_of(folder))
    with log_of(folder).open("a", encoding="utf-8") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "binaryvit_hf.training", *arguments],
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # only this process gets Ctrl-C, and ends the others by SIGTERM
            # With more threads than cores, a thread that waits by spinning blocks the one that it waits for.
            env={"OMP_WAIT_POLICY": "PASSIVE", **os.environ, "OMP_NUM_THREADS": str(threads)},
        )


@dataclass(frozen=True)
class Row:
    """A row of the table. `test` and `held_out` are accuracies in percent, one per seed."""

    name: str
    test: list[float]
    held_out: list[float]
    weight_bytes: int
    cost: LayerCost


def write_results(ablation: Ablation) -> None:
    """Write `results.md` and `ablation.png` from the finished runs."""
    rows = collect_rows(ablation)
    teacher = statistics.mean(rows[ablation.table["teacher"]].test)
    title, description = ablation.table["title"], ablation.table["description"]
    plot_rows(list(rows.values()), title, ablation.out / "ablation.png")
    lines = [f"# {title}", "", description, "", TABLE_HEAD, "| --- " * (TABLE_HEAD.count("|") - 1) + "|"]
    for row in rows.values():
        to_teacher, cost = statistics.mean(row.test) - teacher, row.cost
        cells = [row.name, mean_and_deviation(row.test), str(len(row.test)), f"{to_teacher:+.2f}"]
        cells += [mean_and_deviation(row.held_out), readable(row.weight_bytes, "B")]
        cells += map(readable, (cost.bops, cost.flops, cost.ops))
        lines.append(f"| {' | '.join(cells)} |")
    runs = sum(len(row.test) for row in rows.values())
    lines += [
        "",
        f"Mean and standard deviation over the seeds, {counted(runs, 'run')} in all.",
        "",
        "![Accuracy](ablation.png)",
        "",
    ]
    (ablation.out / "results.md").write_text("\n".join(lines), encoding="utf-8")


def collect_rows(ablation: Ablation) -> dict[str, Row]:
    """The rows that have a finished run, by folder name."""
    rows = {}
    for row, name in ablation.table["rows"].items():
        folders = [ablation.output_dir(row, seed) for seed in ablation.seeds]
        results = {folder: read_json(folder / "all_results.json") for folder in folders}
        results = {folder: result for folder, result in results.items() if "test_accuracy" in result}
        if results:
            rows[row] = Row(
                name,
                [100 * result["test_accuracy"] for result in results.values()],
                [100 * result["eval_accuracy"] for result in results.values()],
                weight_bytes(next(iter(results))),
                total(count_operations(AutoConfig.from_pretrained(ablation.folder / row))),
            )
    return rows


def mean_and_deviation(values: list[float]) -> str:
    mean = f"{statistics.mean(values):.2f}"
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean


def plot_rows(rows: list[Row], title: str, path: Path) -> None:
    """Draw test accuracy against OPs."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for row in rows:
        spread = statistics.stdev(row.test) if len(row.test) > 1 else 0
        axes.errorbar(row.cost.ops, statistics.mean(row.test), spread, fmt="o", capsize=4, label=row.name)
    axes.set(title=title, xlabel="OPs of one image = FLOPs + BOPs/64", ylabel="test top-1 accuracy, %", xscale="log")
    axes.grid(alpha=0.3, which="both")
    axes.legend(loc="lower right", fontsize="small")
    figure.savefig(path, dpi=120)

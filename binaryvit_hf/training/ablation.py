"""An ablation: one recipe for every row and seed with one shared teacher, trained as far as it is not yet, and its table."""

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

from ..errors import RunError, UserError
from ..ops import LayerCost, count_operations, readable, total
from .arguments import compare_with_recorded, parse_phases
from .arguments import is_finished as is_trained
from .report import read_json, weight_bytes


TABLE_HEAD = (
    "row",
    "test top-1, %",
    "seeds",
    "to the teacher",
    "held-out top-1, %",
    "weights on disk",
    "BOPs",
    "FLOPs",
    "OPs",
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ablation:
    """
    A folder of recipes, and where what they give goes.

    Args:
        folder: with `table.json` (`title`, `teacher` and, by name, what the `rows` are), `teacher.json` and
            `student.json` (recipes of run_image_classification.py), and a folder with a `config.json` for every row.
        out: a folder for every run.
        seeds: of the students; the teacher has its recipe's.
    """

    folder: Path
    out: Path
    seeds: tuple[int, ...]

    @functools.cached_property
    def table(self) -> dict:
        return read_json(self.folder / "table.json")

    def run_folders(self, row: str) -> list[Path]:
        if row == self.table["teacher"]:
            return [self.out / row]
        return [self.out / f"{row}-seed{seed}" for seed in self.seeds]

    def teacher_arguments(self) -> list[str]:
        row = self.table["teacher"]
        return [str(self.folder / "teacher.json"), *self.place(row, self.out / row)]

    def student_arguments(self) -> list[list[str]]:
        """Seed by seed, so that the table has all its rows early."""
        teacher = self.table["teacher"]
        return [
            [
                str(self.folder / "student.json"),
                *self.place(row, self.out / f"{row}-seed{seed}"),
                *("--teacher_model_name_or_path", str(self.out / teacher), "--seed", str(seed)),
            ]
            for seed in self.seeds
            for row in self.table["rows"]
            if row != teacher
        ]

    def place(self, row: str, output_dir: Path) -> list[str]:
        return ["--config_name", str(self.folder / row), "--output_dir", str(output_dir)]


def run_ablation(ablation: Ablation, jobs: int) -> None:
    """
    Train what is not trained yet, `jobs` runs at once, each on its share of the cores; after every run write the table.

    Told to end (SIGTERM, Ctrl-C), the runs save a checkpoint, and the same call goes on from it.

    Raises:
        UserError: recipes that cannot be read, or finished runs of other recipes.
        RunError: a run failed.
    """
    if not ablation.table:
        raise UserError(f"{str(ablation.folder)!r} is no folder of an ablation: it has no table.json.")
    teacher = ablation.teacher_arguments()
    # All of them first: what other recipes left is complained of before anything is trained.
    missing = [arguments for arguments in [teacher, *ablation.student_arguments()] if not is_finished(arguments)]
    train(ablation, [arguments for arguments in missing if arguments == teacher], at_once=1)
    train(ablation, [arguments for arguments in missing if arguments != teacher], at_once=jobs)
    write_results(ablation)


def train(ablation: Ablation, waiting: list[list[str]], at_once: int) -> None:
    """Runs by their arguments, `at_once` of them at a time; whatever ends this ends them, too."""
    running: dict[subprocess.Popen, Path] = {}
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                folder = output_dir(waiting[0])
                running[start(waiting.pop(0), folder, at_once)] = folder
            time.sleep(1)
            for process in [process for process in running if process.poll() is not None]:
                folder = running.pop(process)
                if process.returncode != 0:
                    raise RunError(f"The run {folder} failed; {log_of(folder)} says why.")
                logger.info("%s: %.2f %%", folder, 100 * read_json(folder / "all_results.json")["test_accuracy"])
                write_results(ablation)
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.wait()


def is_finished(arguments: list[str]) -> bool:
    """
    Raises:
        UserError: it is a run of other arguments.
    """
    folder = output_dir(arguments)
    compare_with_recorded(folder, parse_phases(arguments)[-1])
    return is_trained(folder) and "test_accuracy" in read_json(folder / "all_results.json")


def output_dir(arguments: list[str]) -> Path:
    return Path(arguments[arguments.index("--output_dir") + 1])


def log_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.log")


def start(arguments: list[str], folder: Path, at_once: int) -> subprocess.Popen:
    threads = max((os.cpu_count() or 1) // at_once, 1)
    folder.parent.mkdir(parents=True, exist_ok=True)
    logger.info("%s: training, its log is %s", folder, log_of(folder))
    with log_of(folder).open("a", encoding="utf-8") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "binaryvit_hf.training", *arguments],
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for this process alone, which tells them to end
            # Threads that wait by spinning take the cores from those they wait for, where there are more than cores.
            env={"OMP_WAIT_POLICY": "PASSIVE", **os.environ, "OMP_NUM_THREADS": str(threads)},
        )


@dataclass(frozen=True)
class Row:
    """What a row of the table came to: accuracies in percent, one a seed."""

    name: str
    test: list[float]
    held_out: list[float]
    weight_bytes: int
    cost: LayerCost


def write_results(ablation: Ablation) -> None:
    """`results.md` and `ablation.png`, of the runs that are finished."""
    rows = {}
    for row, name in ablation.table["rows"].items():
        finished = {folder: read_json(folder / "all_results.json") for folder in ablation.run_folders(row)}
        finished = {folder: result for folder, result in finished.items() if "test_accuracy" in result}
        if finished:
            rows[row] = Row(
                name,
                [100 * result["test_accuracy"] for result in finished.values()],
                [100 * result["eval_accuracy"] for result in finished.values()],
                weight_bytes(next(iter(finished))),
                total(count_operations(AutoConfig.from_pretrained(ablation.folder / row))),
            )
    teacher = statistics.mean(rows[ablation.table["teacher"]].test)
    plot_rows(list(rows.values()), ablation.table["title"], ablation.out / "ablation.png")
    lines = [
        f"# {ablation.table['title']}",
        "",
        ablation.table["description"],
        "",
        "| " + " | ".join(TABLE_HEAD) + " |",
    ]
    lines.append("| --- " * len(TABLE_HEAD) + "|")
    for row in rows.values():
        cells = [
            row.name,
            mean_and_deviation(row.test),
            str(len(row.test)),
            f"{statistics.mean(row.test) - teacher:+.2f}",
            mean_and_deviation(row.held_out),
            readable(row.weight_bytes, "B"),
            *(readable(count) for count in (row.cost.bops, row.cost.flops, row.cost.ops)),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    runs = sum(len(row.test) for row in rows.values())
    lines += [
        "",
        f"Mean and standard deviation over the seeds, {runs} runs in all.",
        "",
        "![Accuracy](ablation.png)",
        "",
    ]
    (ablation.out / "results.md").write_text("\n".join(lines), encoding="utf-8")


def mean_and_deviation(values: list[float]) -> str:
    mean = f"{statistics.mean(values):.2f}"
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean


def plot_rows(rows: list[Row], title: str, path: Path) -> None:
    """Test accuracy against OPs."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for row in rows:
        spread = statistics.stdev(row.test) if len(row.test) > 1 else 0
        axes.errorbar(row.cost.ops, statistics.mean(row.test), spread, fmt="o", capsize=4, label=row.name)
    axes.set(title=title, xlabel="OPs of one image = FLOPs + BOPs/64", ylabel="test top-1 accuracy, %", xscale="log")
    axes.grid(alpha=0.3, which="both")
    axes.legend(loc="lower right", fontsize="small")
    figure.savefig(path, dpi=120)

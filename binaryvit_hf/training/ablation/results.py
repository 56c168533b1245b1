"""The table of results of an ablation, from the files of its finished runs."""

import statistics
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from binaryvit_runtime.errors import UserError, counted
from binaryvit_runtime.writing import write_file

from ...loading import load_config
from ...ops import CONFIG_CLASSES, LayerCost, count_operations, readable, total
from ...run_history import HELD_OUT, evaluation_images
from ..model_card import weight_bytes
from ..run_folder import read_json, read_test_predictions
from .estimates import (
    FEW_SEEDS,
    LEAST_SEEDS,
    Difference,
    Interval,
    SeedVariance,
    correct_for_several,
    estimate_accuracy,
    estimate_difference,
)
from .pictures import Bar, Point, plot_accuracy, plot_differences
from .table import DEFAULT_TABLE, Row, Table


SIGNIFICANT = 0.05
METHOD = (
    "Intervals (95 %) and tests are for other seeds with the same teacher, and for other test images: seeds and images are crossed "
    "random effects (Hillis, Statistics in Medicine 26, 2007), images are paired, seeds are not. The variance between seeds is the "
    "largest of the row's own, the mean of the table (less for a row nearer to 0 or 100 %), and what seeds of equal quality have by "
    "chance. Accuracies have Wilson's interval with as many independent answers as would have their variance, differences a t interval."
)


@dataclass(frozen=True)
class RowResults:
    """
    What the finished runs of a row recorded.

    Args:
        correct: whether each answer to a test image is right, `(seeds, images)`.
        labels: of the test images `(images,)`.
        held_out: accuracies in percent, one per seed; none of runs that were evaluated on other images.
        folders: of the runs.
        cost: of one image; `None` for a network whose operations are not counted.
    """

    row: Row
    correct: np.ndarray
    labels: np.ndarray
    held_out: list[float]
    folders: list[Path]
    cost: LayerCost | None

    @property
    def name(self) -> str:
        return self.row.name

    @property
    def test(self) -> list[float]:
        """Accuracies in percent, one per seed."""
        return [100 * share for share in self.correct.mean(axis=1).tolist()]

    @property
    def mean(self) -> float:
        return statistics.mean(self.test)

    @property
    def weight_bytes(self) -> int:
        return weight_bytes(self.folders[0])


@dataclass(frozen=True)
class Comparison:
    """
    Two rows.

    Args:
        estimate: our accuracy minus theirs, in points, with its interval; `None` if there is an `obstacle`.
        p: of the estimate, corrected for the other comparisons of the table.
    """

    ours: RowResults
    theirs: RowResults
    estimate: Difference | None
    p: float | None = None

    @property
    def difference(self) -> float:
        return self.ours.mean - self.theirs.mean

    @property
    def obstacle(self) -> str:
        """Why there is no estimate."""
        if not np.array_equal(self.ours.labels, self.theirs.labels):
            return "their test images differ"
        for results in (self.ours, self.theirs):
            if len(results.folders) < LEAST_SEEDS:
                return f"{results.name} has {counted(len(results.folders), 'seed')} of at least {LEAST_SEEDS}"
        few_images = len(self.ours.labels) < 2
        return "there are too few test images" if few_images else "all images and seeds have the same difference"

    @property
    def is_shown(self) -> bool:
        """Whether the test finds a difference."""
        return self.p is not None and self.p < SIGNIFICANT

    def as_cell(self) -> str:
        """The difference and its interval in a table."""
        return f"{self.difference:+.2f} {readable_interval(self.estimate, '+.2f')}".rstrip()

    def in_words(self, comparisons: int) -> str:
        """One sentence that claims what the comparison shows, and no more."""
        subject, other = self.ours.name, f"compared with {self.theirs.name}"
        if self.estimate is None:
            return f"{subject}: {self.difference:+.2f} points, {other}; not tested, as {self.obstacle}."
        points = f"{abs(self.difference):.2f} ± {self.estimate.half_width:.2f} points"
        if self.is_shown:
            verb = "helps" if self.difference > 0 else "costs"
            return f"{subject}: {verb + ' by' if verb == 'helps' else verb} {points}, {other} ({readable_p(self.p)})."
        corrected = ""
        if self.estimate.p < SIGNIFICANT:
            corrected = f" after the correction for {counted(comparisons, 'comparison')}"
        points = f"{self.difference:+.2f} ± {self.estimate.half_width:.2f} points"
        return f"{subject}: no difference could be shown{corrected}, {other} ({points}, {readable_p(self.p)})."


def readable_p(p: float) -> str:
    if p < 0.001:
        return "p < 0.001"
    return f"p = {p:.4f}" if abs(p - SIGNIFICANT) < 0.0005 else f"p = {p:.3f}" if p < 0.1 else f"p = {p:.2f}"


def collect_results(row: Row, folders: list[Path]) -> RowResults:
    """
    Read what the finished runs of a row recorded.

    Args:
        folders: of the runs, one or more.

    Raises:
        UserError: a file is damaged, or the runs were tested on different images.
    """
    answers = [read_test_predictions(folder) for folder in folders]
    for folder, (labels, _) in zip(folders, answers):
        if not np.array_equal(labels, answers[0][0]):
            raise UserError(f"The runs {folders[0]} and {folder} were tested on different images; remove one of them.")
    config = load_config(folders[0])
    return RowResults(
        row,
        np.array([labels == predicted for labels, predicted in answers]),
        answers[0][0],
        [
            100 * read_json(folder / "all_results.json")["eval_accuracy"]
            for folder in folders
            if evaluation_images(folder) == HELD_OUT
        ],
        folders,
        total(count_operations(config)) if config.model_type in CONFIG_CLASSES else None,
    )


def compare_rows(results: dict[str, RowResults], between_seeds: SeedVariance | None) -> dict[str, Comparison]:
    """The comparisons of the rows that have results, by the key of the row."""
    comparisons = {}
    for key, ours in results.items():
        theirs = results.get(ours.row.compared_with or "")
        if theirs is not None:
            is_paired = np.array_equal(ours.labels, theirs.labels)
            estimate = estimate_difference(ours.correct, theirs.correct, between_seeds) if is_paired else None
            if estimate is not None:
                estimate = Difference(100 * estimate.value, 100 * estimate.half_width, estimate.p)
            comparisons[key] = Comparison(ours, theirs, estimate)
    tested = {key: comparison.estimate.p for key, comparison in comparisons.items() if comparison.estimate is not None}
    corrected = dict(zip(tested, correct_for_several(list(tested.values()))))
    return {key: replace(comparison, p=corrected.get(key)) for key, comparison in comparisons.items()}


def interval_in_percent(correct: np.ndarray, between_seeds: SeedVariance | None) -> Interval | None:
    found = estimate_accuracy(correct, between_seeds)
    return found and Interval(100 * found.value, 100 * found.low, 100 * found.high)


def write_results(
    table: Table, results: dict[str, RowResults], out: Path, seconds: dict[str, float], cpu: str | None = None
) -> None:
    """
    Write the table of results and its pictures to `out`: `results.md`, `ablation.png` and `ablation_ms.png`, or, for a table
    NAME.json of another name, `NAME.md`, `NAME.png` and `NAME_ms.png`.

    Args:
        results: of the rows, and of the teacher, which need not be a row; by key.
        seconds: of a forward, by row. Without them there are no milliseconds.
        cpu: the name of the CPU that they were measured on.
    """
    text = output_file(table, out)
    teacher = results.get(table.teacher.key)
    rows = {key: results[key] for key in table.rows if key in results}
    between_seeds = SeedVariance.of_rows(row.correct for row in rows.values())
    comparisons = compare_rows(rows, between_seeds)
    intervals = {key: interval_in_percent(row.correct, between_seeds) for key, row in rows.items()}
    columns = columns_of(table, rows, intervals, comparisons, teacher, seconds)
    # Without cells no row is finished, and the heads alone are shown.
    columns = {head: cells for head, cells in columns.items() if any(cells) or not cells}
    lines = [f"# {table.title}", ""]
    if table.description:
        lines += [table.description, ""]
    lines += [f"| {' | '.join(columns)} |", "| --- " * len(columns) + "|"]
    lines += [f"| {' | '.join(cells)} |" for cells in zip(*columns.values())]
    lines += ["", describe_columns(table, rows, intervals, comparisons, seconds, cpu), ""]
    if comparisons:
        count = sum(comparison.p is not None for comparison in comparisons.values())
        lines += ["What this shows:", ""]
        lines += [f"- {comparison.in_words(count)}" for comparison in comparisons.values()]
        lines.append("")
    for name, picture in draw(table, rows, intervals, comparisons, seconds, picture_file(table, out)).items():
        lines += [f"![{name}]({picture.name})", ""]
    write_file(text, "\n".join(lines))


def output_file(table: Table, out: Path) -> Path:
    """The file of the table of results."""
    return out / ("results.md" if table.file.name == DEFAULT_TABLE else f"{table.file.stem}.md")


def picture_file(table: Table, out: Path) -> Path:
    """The file of the first picture."""
    return out / ("ablation.png" if table.file.name == DEFAULT_TABLE else f"{table.file.stem}.png")


def draw(
    table: Table,
    rows: dict[str, RowResults],
    intervals: dict[str, Interval | None],
    comparisons: dict[str, Comparison],
    seconds: dict[str, float],
    picture: Path,
) -> dict[str, Path]:
    """
    Draw the differences between rows of one network, or the accuracy of several networks against OPs and milliseconds.

    Args:
        picture: file of the first picture.

    Returns:
        The files by what they show.
    """
    if table.has_one_network:
        bars = [
            Bar(comparison.ours.name, comparison.difference, comparison.estimate, comparison.is_shown)
            for comparison in comparisons.values()
        ]
        if bars:
            others = {comparison.theirs.name for comparison in comparisons.values()}
            other = others.pop() if len(others) == 1 else "the row that it is compared with"
            plot_differences(bars, table.title, other, picture)
        return {"Differences": picture} if bars else {}
    pictures = {
        "Accuracy and OPs": ("OPs of one image = FLOPs + BOPs/64", picture),
        "Accuracy and time": ("ms an image, median, one thread", picture.with_stem(f"{picture.stem}_ms")),
    }
    ops = {key: row.cost.ops for key, row in rows.items() if row.cost is not None}
    milliseconds = {key: 1000 * seconds[key] for key in rows if key in seconds}
    drawn = {}
    for costs, (name, (label, path)) in zip((ops, milliseconds), pictures.items()):
        points = [Point(rows[key].name, cost, rows[key].mean, intervals[key]) for key, cost in costs.items()]
        if points:
            plot_accuracy(points, table.title, label, path)
            drawn[name] = path
    return drawn


def columns_of(
    table: Table,
    rows: dict[str, RowResults],
    intervals: dict[str, Interval | None],
    comparisons: dict[str, Comparison],
    teacher: RowResults | None,
    seconds: dict[str, float],
) -> dict[str, list[str]]:
    """The cells of each column, by its head."""
    results = list(rows.values())
    columns = {
        "row": [row.name.replace("|", "\\|") for row in results],
        "test top-1, %": [mean_and_deviation(row.test) for row in results],
        "seeds": [str(len(row.test)) for row in results],
        "95 % interval": [readable_interval(interval, ".2f") for interval in intervals.values()],
    }
    if comparisons:
        found = [comparisons.get(key) for key in rows]
        columns["difference, points"] = ["" if comparison is None else comparison.as_cell() for comparison in found]
        columns["p"] = ["" if comparison is None else readable_p_cell(comparison.p) for comparison in found]
    if teacher is not None:
        taught = teacher.test[0]  # the accuracy of the run that all students learned from
        columns["to the teacher"] = ["" if row.row is teacher.row else f"{row.mean - taught:+.2f}" for row in results]
    if any(row.held_out for row in results):
        columns["held-out top-1, %"] = [mean_and_deviation(row.held_out) if row.held_out else "" for row in results]
    if table.has_one_network:
        return columns
    columns["weights on disk"] = [readable(row.weight_bytes, "B") for row in results]
    for head, name in (("BOPs", "bops"), ("FLOPs", "flops"), ("OPs", "ops")):
        columns[head] = ["" if row.cost is None else readable(getattr(row.cost, name)) for row in results]
    if seconds:
        columns["ms"] = [f"{1000 * seconds[key]:.2f}" if key in seconds else "" for key in rows]
    return columns


def describe_columns(
    table: Table,
    rows: dict[str, RowResults],
    intervals: dict[str, Interval | None],
    comparisons: dict[str, Comparison],
    seconds: dict[str, float],
    cpu: str | None,
) -> str:
    """What the numbers of the table are."""
    runs = counted(sum(len(row.test) for row in rows.values()), "run")
    if any(len(row.folders) > 1 for row in rows.values()):
        sentences = [
            f"Mean and standard deviation over the seeds, {runs} in all.",
            *([METHOD] if any(intervals.values()) else []),
        ]
    else:
        sentences = [f"One seed of each row, {runs} in all: no intervals and no tests."]
    tests = sum(comparison.p is not None for comparison in comparisons.values())
    if any(len(row.folders) > 1 and intervals[key] is None for key, row in rows.items()):
        sentences.append(FEW_SEEDS)
    if tests:
        sentences.append(
            f"p is corrected for the {counted(tests, 'comparison')} of this table (Holm), intervals are not."
        )
    if table.has_one_network and rows:
        row = next(iter(rows.values()))
        cost = "" if row.cost is None else f", {readable(row.cost.bops)} BOPs, {readable(row.cost.flops)} FLOPs"
        sentences.append(f"All rows are the same network ({readable(row.weight_bytes, 'B')} on disk{cost}).")
    elif seconds:
        sentences.append(
            "ms is the median time of one image on one thread, measured in turns: packed networks on the engine, others in "
            "PyTorch in float32."
        )
        if cpu is not None:
            sentences.append(f"CPU: {cpu}.")
    return " ".join(sentences)


def readable_interval(estimate: Interval | Difference | None, form: str) -> str:
    return "" if estimate is None else f"[{estimate.low:{form}}, {estimate.high:{form}}]"


def readable_p_cell(p: float | None) -> str:
    return "" if p is None else readable_p(p).removeprefix("p ").removeprefix("= ")


def mean_and_deviation(values: list[float]) -> str:
    mean = f"{statistics.mean(values):.2f}"
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean

"""`binaryvit ablation`: trains all rows and seeds of an ablation."""

import argparse
import logging
import signal
import sys
from pathlib import Path

from binaryvit_runtime.errors import UserError
from binaryvit_runtime.resources import find_config_path

from .common import needs_extra


EXAMPLE = "binaryvit ablation configs/fashion-mnist outputs/fashion-mnist --seeds 1 2 3 --jobs 2"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="FOLDER", help="folder of recipes, such as configs/fashion-mnist")
    parser.add_argument(
        "out", metavar="OUT", type=Path, help="folder for the runs, the table of results and its pictures"
    )
    parser.add_argument(
        "--table",
        metavar="NAME.json",
        default="table.json",
        help="table in FOLDER (default: table.json, whose results are OUT/results.md); the results of another are OUT/NAME.md. "
        "Tables that share OUT share the runs of equal rows",
    )
    parser.add_argument(
        "--seeds",
        metavar="N",
        type=int,
        nargs="+",
        default=[1, 2, 3],
        help="seeds of the students (default: 1 2 3). The table has the runs of these alone: to add seeds, name all again",
    )
    parser.add_argument(
        "--jobs", metavar="N", type=int, default=1, help="students to train at the same time (default: 1)"
    )


def run(options: argparse.Namespace) -> None:
    """
    Train all rows of an ablation, time their networks, and write a table and pictures of the results.

    It takes hours. After an interruption run the same command again: finished rows are kept, and the others resume.
    """
    if options.jobs < 1:
        raise UserError(f"--jobs is how many students to train at once, 1 or more, not {options.jobs}.")
    with needs_extra("train", "Ablations"):
        from binaryvit_hf.training.ablation.runs import Ablation, run_ablation
        from binaryvit_hf.training.callbacks.termination import ending_signals
    from binaryvit_hf.benchmarks import trained
    from binaryvit_hf.benchmarks.machine import describe_machine

    folder = Path(find_config_path(options.folder))
    ablation = Ablation(folder, options.out, tuple(dict.fromkeys(options.seeds)), options.table)
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    # As an exception, a signal reaches the code that ends the runs.
    numbers = [signal.SIGINT, *ending_signals()]
    before = [signal.signal(number, lambda number, _: sys.exit(128 + number)) for number in numbers]
    try:
        run_ablation(ablation, options.jobs)
        if folders := ablation.folders_to_time():
            ablation.write_results(trained.time_trained(folders), describe_machine()["cpu"])
    finally:
        for number, handler in zip(numbers, before):
            signal.signal(number, handler)
    print(ablation.results_file)

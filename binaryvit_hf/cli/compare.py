"""`binaryvit compare`: measures trained networks beside each other."""

import argparse
import json
import logging
from pathlib import Path

from binaryvit_runtime.errors import UserError
from binaryvit_runtime.writing import check_writable_file, write_file

from .common import needs_extra, needs_onnx_libraries


EXAMPLE = "binaryvit compare outputs/photos outputs/resnet --out table.md"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "runs",
        metavar="RUN",
        nargs="+",
        help="output directory of a run, or a model that comes with the package; all runs have the same images",
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the table to this file of Markdown")
    parser.add_argument(
        "--steps", type=int, default=7, metavar="N", help="timed turns of each network, 2 or more (default: 7)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(options: argparse.Namespace) -> None:
    """Measure accuracy, latency and file size of trained networks: 1 bit on the engine, others in 8 bits in onnxruntime."""
    if options.steps < 2:
        raise UserError(f"--steps is 2 or more, not {options.steps}.")
    if options.out:
        check_writable_file(options.out)
    needs_onnx_libraries("Comparisons")
    with needs_extra("train", "Comparisons"):
        from binaryvit_hf.comparison import compare_runs, format_markdown, format_text

    logging.basicConfig(format="%(message)s")
    logging.getLogger("binaryvit_hf").setLevel(logging.INFO)
    measured = compare_runs(options.runs, options.steps)
    try:  # the measurements take long: they are not lost if nobody reads them, or if the file cannot be written any more
        print(json.dumps(measured, indent=2) if options.json else format_text(measured), flush=True)
    finally:
        if options.out:
            write_file(options.out, format_markdown(measured))

"""`binaryvit benchmark`: measures forwards, also in WebAssembly, files to labels, training steps or the image loader."""

import argparse
import importlib
import json
import logging
from collections.abc import Callable
from pathlib import Path

from binaryvit_runtime.errors import UserError
from binaryvit_runtime.writing import check_writable_file

from .common import needs_extra, needs_onnx_libraries


EXAMPLE = "binaryvit benchmark --threads 1 --batch-size 1 --steps 2\nbinaryvit benchmark --loader"
MODEL, STEPS = "binaryvit-small-patch4-224", 7
PLOT_SUFFIXES = (".png", ".svg", ".pdf")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group(
        "what to measure (default: forwards of packed models on this CPU, beside their peers)"
    )
    kinds = what.add_mutually_exclusive_group()
    kinds.add_argument(
        "--pipeline",
        action="store_true",
        help="measure from JPEG files to labels, and whole processes from their start; compare with transformers' "
        "pipeline and onnxruntime",
    )
    kinds.add_argument(
        "--browser",
        action="store_true",
        help="measure forwards in WebAssembly on one thread of node, and compare with onnxruntime-web",
    )
    kinds.add_argument(
        "--train",
        action="store_true",
        help="measure training steps, eager, compiled and as CUDA graphs, and compare with DeiT and the plain simulation",
    )
    kinds.add_argument(
        "--loader",
        action="store_true",
        help="measure image loading on one core and compare with the paper's public code",
    )
    how = parser.add_argument_group("how to measure")
    how.add_argument("--model", metavar="ROW", help=f"binary row of configs/ (default: {MODEL})")
    how.add_argument(
        "--batch-size",
        metavar="N",
        type=int,
        nargs="+",
        help="images in a batch (default: 1 and 8; with --pipeline, 1 and 16 in transformers' pipeline; with --train, 8 on "
        "the CPU and 128 on a GPU)",
    )
    how.add_argument(
        "--threads",
        metavar="N",
        type=int,
        nargs="+",
        help="threads of forwards (default: 1 and all) or with --pipeline (default: all)",
    )
    how.add_argument(
        "--steps", metavar="N", type=int, help=f"timed turns of each contestant, 2 or more (default: {STEPS})"
    )
    how.add_argument(
        "--node-modules",
        type=Path,
        metavar="FOLDER",
        help="folder with onnxruntime-web for --browser (default: ./node_modules, or those of NODE_PATH)",
    )
    output = parser.add_argument_group("output")
    output.add_argument("--plot", type=Path, metavar="FILE", help="image file for a plot of the forwards' times")
    output.add_argument("--json", action="store_true", help="print JSON instead of text")


def run(options: argparse.Namespace) -> None:
    """
    Measure the speed of a network on this machine, beside other networks and programs in the same run.

    Forwards take some minutes, the others up to half an hour on two cores. The machine should do nothing else meanwhile.
    """
    logging.basicConfig(format="%(message)s")
    logging.getLogger("binaryvit_hf").setLevel(logging.INFO)
    how = (options.model, options.batch_size, options.threads, options.steps, options.plot)
    if options.loader and any(value is not None for value in how):
        raise UserError(
            "--loader loads a fixed number of batches without a network: leave out --model, --batch-size, --threads, --steps "
            "and --plot."
        )
    options.model = MODEL if options.model is None else options.model
    options.steps = STEPS if options.steps is None else options.steps
    if options.steps < 2:
        raise UserError(f"--steps is 2 or more, not {options.steps}.")
    if min(options.batch_size or [1]) < 1 or min(options.threads or [1]) < 1:
        raise UserError("--batch-size and --threads are 1 or more.")
    if options.node_modules and not options.browser:
        raise UserError("--node-modules needs --browser.")
    if options.browser:
        if options.threads or options.plot or options.batch_size:
            raise UserError(
                "--browser measures one image on one thread: leave out --threads, --batch-size and --plot."
            )
        time_browser(options)
    elif options.loader:
        time_loader(options)
    elif options.train:
        if options.threads or options.plot or len(options.batch_size or [1]) > 1:
            raise UserError(
                "--threads, --plot and several values of --batch-size need a benchmark of forwards: leave out --train."
            )
        time_training(options)
    elif options.pipeline:
        if options.plot:
            raise UserError("--plot needs a benchmark of forwards: leave out --pipeline.")
        time_pipeline(options)
    else:
        time_forwards(options)


def time_forwards(options: argparse.Namespace) -> None:
    if options.plot:
        check_plot(options.plot)
    from binaryvit_hf.benchmarks.inference import benchmark_inference, format_forwards, plot_latency

    measured = benchmark_inference(options.model, options.batch_size or [1, 8], options.threads, options.steps)
    print_measured(options, measured, format_forwards)
    if options.plot:
        plot_latency(measured, options.plot)


def time_pipeline(options: argparse.Namespace) -> None:
    from binaryvit_hf.benchmarks.pipeline import benchmark_pipeline, format_pipeline

    measured = benchmark_pipeline(options.model, options.batch_size, options.threads, options.steps)
    print_measured(options, measured, format_pipeline)


def time_browser(options: argparse.Namespace) -> None:
    needs_onnx_libraries("Benchmarks in WebAssembly")
    from binaryvit_hf.benchmarks.browser import benchmark_browser, format_browser

    measured = benchmark_browser(options.model, options.steps, options.node_modules)
    print_measured(options, measured, format_browser)


def time_training(options: argparse.Namespace) -> None:
    from binaryvit_hf.benchmarks.training import benchmark_training, format_steps

    (batch_size,) = options.batch_size or [None]
    print_measured(options, benchmark_training(options.model, batch_size, options.steps), format_steps)


def time_loader(options: argparse.Namespace) -> None:
    with needs_extra("train", "Benchmarks of the loader"):
        from binaryvit_hf.benchmarks.loader import benchmark_loader, format_speeds
    print_measured(options, benchmark_loader(), format_speeds)


def print_measured(options: argparse.Namespace, measured: dict, as_text: Callable[[dict], str]) -> None:
    from binaryvit_hf.benchmarks.machine import describe_machine

    print(json.dumps({**describe_machine(), **measured}, indent=2) if options.json else as_text(measured))


def check_plot(file: Path) -> None:
    """
    Raises:
        UserError: matplotlib is not installed, it does not draw files of this kind, or the file cannot be written.
    """
    with needs_extra("benchmark", "Plots"):
        importlib.import_module("matplotlib.figure")
    if file.suffix not in PLOT_SUFFIXES:
        raise UserError(f"--plot is a file of the kinds {', '.join(PLOT_SUFFIXES)}, not {str(file)!r}.")
    check_writable_file(file)

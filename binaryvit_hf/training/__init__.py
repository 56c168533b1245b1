"""
Train, distil and evaluate image classifiers: `python -m binaryvit_hf.training ARGUMENTS`.

Input: a command line, optionally with a JSON or YAML file of arguments. It describes one run, or a teacher's run and its
student's.
Output: a directory for each run, with

- the packed model, and in `latent/` its latent weights, which can be trained further,
- `checkpoint-STEP/`: the same command resumes from the last one that is whole,
- `run_arguments.json`, and the metrics in `train_`, `eval_`, `test_` and `all_results.json`,
- `learning_curves.png`, `confusion_matrix.png` and the model card, `README.md`,
- with `--do_predict`, `test_predictions.csv`: label and answer of each test image, as class indices.

The files, in the order in which a run uses them:

    run.py           main: parse, check and prepare all runs, then run each; errors become one sentence and an exit code
    command_line.py  flags and files -> the arguments of each run
    arguments.py     the arguments as dataclasses; optional_methods.py: methods beyond the paper's recipe
    preparation.py   checks and inputs before training: unused_arguments.py, batch_checks.py, checkpoints.py
    models.py        student, teacher and image processors; two_stage.py: weights of a first stage; stochastic_depth.py
    forecast.py      images and classes, estimated time and memory of the runs
    steps.py         train, evaluate, test, report, upload
    trainer.py       transformers' Trainer with losses.py, checkpoints and packing; callbacks/
    compilation.py   compiled training steps, and whether they pay; step_graph.py: steps as CUDA graphs
    run_folder.py    locks an output directory, records a run's arguments and compares them before a run resumes
    metrics.py, confusion.py, learning_curves.py, model_card.py
    example_image.py an evaluation image for the commands at the end

`process_errors.py` shows an error once for several processes, `memory_errors.py` describes a full memory. `ablation/` starts the runs of a whole table.

These files import `network/`, `data/` and the files beside those folders. They must not import `cli/`, `benchmarks/` or
the script `run_image_classification.py`.
"""

import signal
import threading

from binaryvit_runtime.resources import installation


def start(arguments: list[str]) -> int:
    """
    `main` of `run.py`. One sentence and exit code 1 if a library that training needs is not installed. A Ctrl-C during the
    imports ends the process without a word.
    """
    is_usual = signal.getsignal(signal.SIGINT) in (signal.SIG_DFL, signal.default_int_handler)  # a job may ignore it
    is_usual &= threading.current_thread() is threading.main_thread()  # no other one may set handlers
    if is_usual:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        from .run import main
    except ModuleNotFoundError as error:
        raise SystemExit(f"error: Training needs {error.name!r}: {installation('train')}.") from error
    finally:
        if is_usual:
            signal.signal(signal.SIGINT, signal.default_int_handler)
    return main(arguments)

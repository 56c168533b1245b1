#!/usr/bin/env python
"""
Train, distil and evaluate image classifiers, 1-bit and full precision.

    python run_image_classification.py configs/quickstart.json
    python run_image_classification.py --config_name binaryvit-small-patch4-224 --train_dir photos --do_train --do_eval

`run.py` of `binaryvit_hf/training` runs these steps:

1. `command_line.py` parses flags and configuration files: one run, or a teacher's run and its student's.
2. `preparation.py` checks arguments, images, labels and the output directory before any training.
3. `models.py` loads the student, the teacher and their image processors.
4. `steps.py` trains, evaluates, tests, writes the model card and uploads.
5. `trainer.py` holds the distillation loss, and saves checkpoints and packed weights.

An installed package does the same with `python -m binaryvit_hf.training`.
"""

import signal
import sys


if __name__ == "__main__" and signal.getsignal(signal.SIGINT) == signal.default_int_handler:
    signal.signal(
        signal.SIGINT, signal.SIG_DFL
    )  # no stack trace of the imports on Ctrl-C; `start` sets Python's handler again

try:
    from binaryvit_hf.training import start
except (ImportError, OSError) as error:  # OSError: PyTorch lacks a library of the system
    sys.exit(f"error: {error}\nInstall what training needs, in the folder of this script: pip install -e '.[train]'")
except ValueError as error:  # two libraries do not fit; the sentence says what to do
    sys.exit(f"error: {error}")

if __name__ == "__main__":
    sys.exit(start(sys.argv[1:]))

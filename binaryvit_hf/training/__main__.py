"""`python -m binaryvit_hf.training`: the same as `run_image_classification.py`, for an installed package."""

import sys

from . import start


sys.argv[0] = "python -m binaryvit_hf.training"  # argparse shows it in --help
sys.exit(start(sys.argv[1:]))

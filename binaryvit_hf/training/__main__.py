"""`python -m binaryvit_hf.training`: the same as `run_image_classification.py`, for an installed package."""

import sys

from .run import main


sys.argv[0] = "python -m binaryvit_hf.training"  # argparse shows it in --help
sys.exit(main(sys.argv[1:]))

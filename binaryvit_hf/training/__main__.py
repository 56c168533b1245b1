"""`python -m binaryvit_hf.training`: `run_image_classification.py` of an installed package."""

import sys

from .run import main


sys.exit(main(sys.argv[1:]))

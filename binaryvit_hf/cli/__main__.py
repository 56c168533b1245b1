"""`python -m binaryvit_hf.cli` is the command `binaryvit`."""

import sys

from . import main


sys.exit(main())

"""`python -m binaryvit_hf.cli`: the command `binaryvit`."""

import sys

from . import main


sys.exit(main())

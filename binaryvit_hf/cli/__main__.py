"""`python -m binaryvit_cli` is the command `binaryvit`."""

import sys

from . import main


sys.exit(main())

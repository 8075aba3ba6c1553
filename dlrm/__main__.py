"""Makes `python -m dlrm` (and `torchrun -m dlrm`) the command line."""

import sys

from dlrm.cli import main

sys.exit(main())

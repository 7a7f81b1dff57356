"""``python -m crucible_kitchen`` is the command line. Read next: ``crucible_kitchen.cli``."""

import sys

from crucible_kitchen.cli import main

sys.exit(main())

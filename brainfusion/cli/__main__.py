"""`python -m brainfusion.cli`."""

import sys

from brainfusion.cli import main

sys.exit(main())

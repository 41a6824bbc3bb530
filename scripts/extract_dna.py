"""The same as `brainfusion extract`."""

import sys

from brainfusion.cli import run

if __name__ == "__main__":
    sys.exit(run("extract"))

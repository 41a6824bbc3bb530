"""The same as `brainfusion finetune`, for torchrun."""

import sys

from brainfusion.cli import run

if __name__ == "__main__":
    sys.exit(run("finetune"))

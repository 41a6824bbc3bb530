"""`brainfusion import SOURCE --out COHORT --tr-s 0.72`: a cohort from anyone's recordings."""

from pathlib import Path

from brainfusion.cli import import_dna
from brainfusion.cli.options import parse
from brainfusion.data.importers import ImportConfig, import_cohort
from brainfusion.runtime.errors import UserError
from brainfusion.runtime.threads import one_thread

PROG = "brainfusion import"
DESCRIPTION = """Make a cohort folder from parcellated recordings: import SOURCE --out COHORT.

SOURCE is a folder with one recording a file (.npy, TSV/CSV, MATLAB .mat), or one .npy array of all
recordings. Parcels are matched by name where names exist; what is dropped is counted and said.
With --dna MODEL, add DNA embeddings to a cohort instead: import --dna evo2 PATH --cohort COHORT.
"""
_NOT_GIVEN = ImportConfig(source=Path("SOURCE"), out=Path("COHORT"))


def main(argv: list[str]) -> int:
    """Import recordings; prints what was read, dropped and why, and the next command."""
    if any(word.split("=")[0] == "--dna" for word in argv):
        return import_dna.main(argv)
    if argv and not argv[0].startswith("-"):
        argv = ["--source", *argv]
    config = parse(ImportConfig, argv, prog=PROG, description=DESCRIPTION, default=_NOT_GIVEN)
    for name in ("source", "out"):
        if getattr(config, name) == getattr(_NOT_GIVEN, name):
            raise UserError(
                f"--{name} is not given: expected {PROG} SOURCE --out COHORT --tr-s SECONDS "
                f"(see {PROG} --help)."
            )
    with one_thread():
        report = import_cohort(config)
    for line in report.lines():
        print(line)
    print(f"wrote {config.out}; next: brainfusion pretrain --model brainlm --cohort {config.out}")
    return 0

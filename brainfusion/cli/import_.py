"""`brainfusion import SOURCE --out COHORT --tr-s 0.72`: a cohort from anyone's recordings."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from brainfusion.cli import import_dna
from brainfusion.cli.options import parse
from brainfusion.data.cohort import Cohort
from brainfusion.data.importers import ImportConfig, import_cohort
from brainfusion.runtime.threads import one_thread

PROG = "brainfusion import"
DESCRIPTION = """Make a cohort folder from recordings.

For example: brainfusion import SOURCE --out COHORT --tr-s 0.72

SOURCE is a folder with one recording a file (.npy, TSV/CSV, MATLAB .mat, CIFTI, NIfTI), derivatives
of fMRIPrep or XCP-D, BrainLM's Arrow folders, HDF5, or one .npy array of all recordings. Parcels
are matched by name where names exist; what is dropped is counted and said. After a stop the same
command goes on from there.

With --dna it adds DNA embeddings to a cohort instead (its options: import --dna evo2 --help):
brainfusion import --dna evo2 PATH --cohort COHORT
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportOptions(ImportConfig):
    """Options of `brainfusion import`."""

    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """A folder of recordings, or one file that holds all."""


def main(argv: list[str]) -> int:
    """Import recordings; prints what was read, dropped and why, and the next command."""
    if any(word.split("=")[0] == "--dna" for word in argv):
        return import_dna.main(argv)
    empty = ImportOptions(source=tyro.MISSING, out=tyro.MISSING)
    config = parse(ImportOptions, argv, prog=PROG, description=DESCRIPTION, default=empty)
    with one_thread():
        report = import_cohort(config)
    for line in report.lines():
        print(line)
    # BrainLM needs to know where the parcels are.
    model = "brainjepa" if Cohort.open(config.out).atlas.xyz_mm is None else "brainlm"
    print(f"wrote {config.out}; next: brainfusion pretrain --model {model} --cohort {config.out}")
    return 0

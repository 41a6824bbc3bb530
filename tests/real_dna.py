"""Real human DNA that Debian packages ship; only files are read.

vt-examples: chromosome 20 of GRCh37. shapeit4-example: phased genotypes of 300 people of the 1000
Genomes project on chr20:1.0-4.0 Mb, 24,990 variants. `make real-dna` unpacks both; without it they
are looked for where BRAINFUSION_CHR20 says (at any depth), and where the packages install them.
"""

import os
from functools import cache
from pathlib import Path

import pytest

OXT = (3_052_265, 3_053_162, "+")
"""Oxytocin's gene on GRCh37's chromosome 20, counted from 0."""
AVP = (3_063_201, 3_065_370, "-")
"""Vasopressin's."""
_UNPACKED = Path(__file__).parents[1] / ".venv" / "real-dna"
_INSTALLED = Path("/usr/share/doc")
_FASTA, _VCF = "vt/examples/ref/20.fa.gz", "shapeit4/examples/test/reference.vcf.gz"


def chr20() -> tuple[Path, Path]:
    """The FASTA file and the VCF; skips the test without them."""
    found = _found()
    if found is None:
        pytest.skip(
            "real DNA (the Debian packages vt-examples and shapeit4-example) is not here: 'make "
            "real-dna' unpacks it, or BRAINFUSION_CHR20 names its folder"
        )
    return found


@cache
def _found() -> tuple[Path, Path] | None:
    folders = [_UNPACKED / "usr" / "share" / "doc", _INSTALLED]
    if named := os.environ.get("BRAINFUSION_CHR20"):
        places = [next(Path(named).rglob(Path(file).name), None) for file in (_FASTA, _VCF)]
        return None if None in places else (places[0], places[1])
    for folder in folders:
        if (folder / _FASTA).exists() and (folder / _VCF).exists():
            return folder / _FASTA, folder / _VCF
    return None

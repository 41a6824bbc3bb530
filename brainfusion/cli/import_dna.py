"""`brainfusion import --dna MODEL PATH`: add a model's DNA embeddings to a cohort.

They are checked, matched to the cohort's people by id, and kept in COHORT/genetics/<model>.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from brainfusion.cli.options import parse
from brainfusion.data.cohort import Cohort
from brainfusion.runtime.errors import UserError
from brainfusion.runtime.logs import say


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportDnaOptions:
    """Options of `brainfusion import --dna`."""

    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="PATH")]
    """A file or folder of embeddings, as the model's users store them."""
    dna: str
    """Whose embeddings they are: evo2, generator or caduceus."""
    cohort: Path
    """The cohort that they are added to."""
    checkpoint: str | None = None
    """What made the files, where no provenance.json lies beside them."""
    layer: str | None = None
    """The layer to read, where files hold several."""
    strands: str | None = None
    """How the files hold both strands, where no provenance.json lies beside them."""
    strict: bool = False
    """Make every alarm an error."""


def main(argv: list[str]) -> int:
    """Read the files, check them, write the store into the cohort."""
    empty = ImportDnaOptions(source=tyro.MISSING, dna=tyro.MISSING, cohort=tyro.MISSING)
    options = parse(
        ImportDnaOptions,
        argv,
        prog="brainfusion import --dna MODEL",
        description=__doc__ or "",
        default=empty,
    )
    path = import_dna(
        options.dna,
        options.source,
        options.cohort,
        checkpoint=options.checkpoint,
        layer=options.layer,
        strands=options.strands,
        strict=options.strict,
    )
    say(f"next: brainfusion align --dna {options.dna} --cohort {options.cohort} (written: {path})")
    return 0


def import_dna(model: str, source: Path, cohort_path: Path, **how: str | bool | None) -> Path:
    """Read `source` with the model's adapter and write the cohort's store; returns its folder."""
    from brainfusion.genetics import read, write_store

    cohort = Cohort.open(cohort_path)
    features = read(model, source, **how)  # type: ignore[arg-type]
    known = set(cohort.subjects["subject"])
    n_known = sum(subject in known for subject in features.subjects)
    if not n_known:
        raise UserError(
            f"none of the {len(features.subjects)} ids in {source} is a subject of the cohort "
            f"'{cohort.name}': compare them with subjects.parquet (leading zeros, suffixes)."
        )
    path = cohort_path / "genetics" / model
    write_store(path, features)
    n_people, n_genes, width = features.vectors.shape
    say(
        f"{model}: {n_people} people ({n_known} of the cohort's {len(known)}) x {n_genes} genes x "
        f"{width} values, {1 - float(features.mask.mean()):.1%} missing"
        + (", simulated" if features.provenance.simulated else "")
    )
    return path

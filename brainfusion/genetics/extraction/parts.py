"""Genes that are embedded, kept until the store is whole, so that a stopped run goes on.

A part is a file for a gene, wholly there or not at all. Its name has a hash of all that decides its
numbers (model, checkpoint, layer, windows, strands, device, versions, batch size) and of the gene's
sequences with who carries which: a part of anything else is never taken for this one.

Shape legend: n people, p haplotypes, u distinct sequences, w width.
"""

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from brainfusion.genetics.extraction.sequences import GeneHaplotypes
from brainfusion.runtime.errors import UserError
from brainfusion.runtime.files import atomic_file


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class GenePart:
    """One gene's vectors, and who has which."""

    vectors: np.ndarray
    """float32 [u, w]; nan where the model gave nan."""
    index: np.ndarray
    """int32 [n, p] into `vectors`."""
    mask: np.ndarray
    """bool [n]."""
    indels: np.ndarray
    """bool [u]."""
    facts: dict[str, Any]
    """Counts of the gene: lengths, windows, variants, what was left out."""

    def rows(self, rows: slice) -> np.ndarray:
        """float32 [r, p, w] of some people; nan where they have none."""
        values = self.vectors[self.index[rows]]
        values[~self.mask[rows]] = np.nan
        return values

    def carriers(self, rows: slice) -> np.ndarray:
        """Whose haplotype has an insertion or deletion: bool [r, p]."""
        return self.indels[self.index[rows]] & self.mask[rows, None]


class GeneParts:
    """A folder of parts.

    Args:
        folder: Made if it is not there.
        key: A hash of all that decides the numbers, but for the sequences.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self._folder, self._key = folder, key
        folder.mkdir(parents=True, exist_ok=True)

    def __len__(self) -> int:
        """Parts that are there, of this key or of another."""
        return len(list(self._folder.glob("*.npz")))

    def file(self, number: int, haplotypes: GeneHaplotypes) -> Path:
        """Where the part of these sequences is kept."""
        digest = hashlib.sha256(self._key.encode())
        for sequence in (haplotypes.gene, haplotypes.strand, *haplotypes.sequences):
            digest.update(sequence.encode() + b"\n")
        for array in (haplotypes.index, haplotypes.mask, haplotypes.indels):
            digest.update(np.ascontiguousarray(array).tobytes())
        return self._folder / f"{number:05d}-{digest.hexdigest()[:16]}.npz"

    def keep(self, file: Path, part: GenePart) -> None:
        """Write a part.

        Raises:
            UserError: The disk is full, or the folder cannot be written to.
        """
        try:
            with atomic_file(file) as aside, aside.open("wb") as handle:
                np.savez(
                    handle,
                    vectors=part.vectors,
                    index=part.index,
                    mask=part.mask,
                    indels=part.indels,
                    facts=json.dumps(part.facts),
                )
        except OSError as error:
            raise UserError(
                f"cannot keep {file} ({error.strerror or error}): free space; what is kept already "
                "is not computed again."
            ) from error

    def load(self, file: Path) -> GenePart:
        """Read a part."""
        with np.load(file, allow_pickle=False) as archive:
            return GenePart(
                vectors=archive["vectors"],
                index=archive["index"],
                mask=archive["mask"],
                indels=archive["indels"],
                facts=json.loads(str(archive["facts"])),
            )

    def remove(self) -> None:
        """Throw all parts away: the store is whole."""
        shutil.rmtree(self._folder, ignore_errors=True)

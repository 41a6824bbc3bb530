"""FASTA files, plain or compressed (bgzip is gzip, too), read from beginning to end: no index."""

import gzip
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO

from brainfusion.runtime.errors import UserError
from brainfusion.runtime.logs import say

SUFFIXES = (".fa", ".fasta", ".fna", ".fa.gz", ".fasta.gz", ".fna.gz")
_ODD = "".join(sorted(set("ABCDEFGHIJKLMNOPQRSTUVWXYZ*-.") - set("ACGTN")))
_TO_N = str.maketrans(_ODD, "N" * len(_ODD))


def normalised(sequence: str) -> str:
    """Upper case, and N for any letter that is none of A, C, G, T (IUPAC codes, gaps)."""
    return sequence.upper().translate(_TO_N)


def count_odd(sequence: str) -> int:
    """Letters of a sequence that `normalised` makes N."""
    upper = sequence.upper()
    return len(upper) - sum(map(upper.count, "ACGTN"))


def open_text(path: Path) -> TextIO:
    """A text file, compressed or not."""
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8")
    return path.open(encoding="utf-8")


def records(path: Path) -> Iterator[tuple[str, str]]:
    """The first word of each header with its sequence, as written.

    Raises:
        UserError: The file cannot be read or is no FASTA.
    """
    name, lines = None, []
    try:
        with open_text(path) as handle:
            for line in handle:
                if not line.startswith(">"):
                    lines.append(line.strip())
                    continue
                if name is not None:
                    yield name, "".join(lines)
                elif any(lines):
                    raise UserError(f"{path}: expected FASTA, but it does not begin with '>'.")
                name, lines = (line[1:].split() or [""])[0], []
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path} cannot be read as FASTA ({reason}): restore it.") from error
    if name is None:
        raise UserError(f"{path}: no FASTA records.")
    yield name, "".join(lines)


def match_chromosomes(wanted: Sequence[str], known: Sequence[str], *, where: str) -> dict[str, str]:
    """Names in a file for chromosome names that may differ by "chr" in front.

    Returns:
        Wanted name -> name in the file; that they differ is said.

    Raises:
        UserError: Chromosomes that the file lacks.
    """
    found, missing, differ = {}, [], 0
    for name in dict.fromkeys(wanted):
        other = name.removeprefix("chr") if name.startswith("chr") else f"chr{name}"
        if name in known:
            found[name] = name
        elif other in known:
            found[name], differ = other, differ + 1
        else:
            missing.append(name)
    if missing:
        shown = ", ".join(list(known)[:5]) + (" ..." if len(known) > 5 else "")
        raise UserError(
            f"{where} has no chromosome {', '.join(missing[:3])} ({len(missing)} of "
            f"{len(found) + len(missing)} that are asked for are not there; it has {shown}): give "
            "the file that has them, or name them as it does."
        )
    if differ:
        say(f"{where}: {differ} chromosome names differ by 'chr' in front; taken as the same")
    return found


def unknown_share(sequences: Sequence[str]) -> float:
    """Share of N among all bases."""
    total = sum(map(len, sequences))
    return sum(sequence.count("N") for sequence in sequences) / total if total else 0.0

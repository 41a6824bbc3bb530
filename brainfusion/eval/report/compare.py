"""Alignment runs that are compared: read from their folders, and who is better on whom.

Runs are compared on the test people that all of them have, pair by pair, with a permutation test in
which whole families change sides. Runs on other cohorts or other splits are shown and not compared.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from brainfusion.data.features import read_features
from brainfusion.eval.retrieval.comparison import compare_models
from brainfusion.runtime.config import read_yaml
from brainfusion.runtime.errors import UserError
from brainfusion.runtime.files import read_json

Row = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, eq=False)
class AlignmentRun:
    """What a run folder says of itself."""

    name: str
    """What tells it from the other runs of the page."""
    summary: Row
    retrieval: Row
    subjects: tuple[str, ...]
    """Test people; never written anywhere."""
    vectors: tuple[np.ndarray, np.ndarray]
    """What retrieval scores: brain and DNA of the test people, row by row."""
    config: Row = field(default_factory=dict)
    """Its settings, config.yaml; empty where there is none."""


def read_alignment_runs(folders: Sequence[Path]) -> list[AlignmentRun]:
    """Read run folders of `brainfusion align` that `brainfusion retrieve` has scored.

    Raises:
        UserError: A folder is none, or has not been scored yet.
    """
    return [_read(folder, name) for folder, name in zip(folders, short_names(folders), strict=True)]


def short_names(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that differ from one another."""
    resolved = [folder.resolve().parts for folder in folders]
    if len(set(resolved)) < len(resolved):
        raise UserError("a run is named twice: expected each run folder once.")
    for n in range(1, max(map(len, resolved)) + 1):
        names = ["/".join(parts[-n:]) for parts in resolved]
        if len(set(names)) == len(names):
            return names
    raise AssertionError("different paths have different names")


def _read(folder: Path, name: str) -> AlignmentRun:
    for file, command in (("summary.json", "align"), ("retrieval.json", "retrieve")):
        if not (folder / file).is_file():
            raise UserError(
                f"{folder} has no {file}: expected the folder of an alignment run. Make it with "
                f"'brainfusion {command}'."
            )
    where = "scores" if (folder / "scores" / "brain.parquet").is_file() else "embeddings"
    brain, dna = (read_features(folder / where / f"{side}.parquet") for side in ("brain", "dna"))
    assert brain.extra is not None
    rows = np.flatnonzero((brain.extra["split"] == "test").to_numpy())
    subjects = tuple(brain.subjects[row] for row in rows)
    return AlignmentRun(
        name=name,
        summary=read_json(folder / "summary.json"),
        retrieval=read_json(folder / "retrieval.json"),
        subjects=subjects,
        vectors=(brain.vectors[rows], dna.select(subjects)),
        config=read_yaml(folder / "config.yaml") if (folder / "config.yaml").is_file() else {},
    )


def compare_runs(
    runs: Sequence[AlignmentRun], *, families: Mapping[str, str] | None = None, **how: Any
) -> list[dict[str, Any]]:
    """Paired comparisons of all runs on the test people that all have.

    Args:
        runs: Two or more.
        families: Family of a person, for those who have one.
        how: `n_permutations`, `n_bootstrap`, `seed` of `compare_models`.

    Returns:
        Its rows; none where fewer than 10 people are common to all.
    """
    common = [s for s in runs[0].subjects if all(s in run.subjects for run in runs[1:])]
    if len(runs) < 2 or len(common) < 10:
        return []
    models = {}
    for run in runs:
        place = {subject: row for row, subject in enumerate(run.subjects)}
        rows = [place[subject] for subject in common]
        models[run.name] = (run.vectors[0][rows], run.vectors[1][rows])
    labels = None if families is None else [families.get(subject) for subject in common]
    return compare_models(models, families=labels, **how)

"""Alignment runs side by side on one page: the same measurements, and who is better on whom.

Runs are compared on the test people that all of them have, pair by pair, with a permutation test in
which whole families change sides. Runs on other cohorts or other splits are shown and not compared.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from brainfusion.data.features import read_features
from brainfusion.eval.report.drawing import DIRECTION_COLOURS
from brainfusion.eval.report.forest import ForestRow, Mark, forest, scale_of, symbols
from brainfusion.eval.report.parts import document, table
from brainfusion.eval.report.rows import (
    DIRECTION_NAMES,
    DIRECTIONS,
    control_failed,
    number,
    p_cell,
    rounded,
    with_interval,
)
from brainfusion.eval.retrieval.comparison import compare_models
from brainfusion.runtime.errors import UserError
from brainfusion.runtime.files import read_json, write_text

Row = Mapping[str, Any]

_SHAPES = {"brain_to_dna": "dot", "dna_to_brain": "triangle"}
_RECALL = (1, 5, 10)


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


def write_comparison(out: Path, runs: Sequence[AlignmentRun], compared: Sequence[Row]) -> Path:
    """Write the page."""
    write_text(out, comparison_page(runs, compared))
    return out


def comparison_page(runs: Sequence[AlignmentRun], compared: Sequence[Row]) -> str:
    """The whole page as text; no ids of people."""
    sentences = list(findings(runs, compared))
    rest = "".join(f"<li>{escape(text)}</li>" for text in sentences[1:])
    header = (
        f"{symbols()}\n<h1>{len(runs)} alignments side by side</h1>\n"
        f'<div class="verdict"><p class="lead">{escape(sentences[0])}</p>'
        f"{f'<ul>{rest}</ul>' if rest else ''}</div>"
    )
    parts = [
        ("auc", "Retrieval", _forest(runs) + _retrieval_table(runs)),
        ("differences", "Differences, paired by person", _differences(compared)),
        ("runs", "The runs", _runs_table(runs)),
    ]
    footer = (
        "AUC: the chance that a person's own partner is ranked above somebody else's, 0.5 when "
        "guessing. Intervals are 95%, by a bootstrap of families."
    )
    return document("brainfusion: alignments side by side", header, parts, footer)


def findings(runs: Sequence[AlignmentRun], compared: Sequence[Row]) -> Iterator[str]:
    """What the page says, in sentences; the first is the headline."""
    best = max(runs, key=_mean_auc)
    yield (
        f"Highest AUC: {best.name}, {rounded(_mean_auc(best), 3)} (mean of both directions; chance "
        "0.5)."
    )
    for run in runs:
        if control_failed(run.retrieval):
            yield f"CONTROL FAILED in {run.name}: its figures are not to be trusted."
    for one, other in combinations([run.name for run in runs], 2):
        rows = [
            row
            for row in compared
            if row["metric"] == "auc" and (row["first"], row["second"]) == (one, other)
        ]
        if not rows:
            yield f"{one} and {other} share too few test people to be compared."
            continue
        change = float(np.mean([row["difference"] for row in rows]))
        p = max(row["q_value"] for row in rows)
        better, worse = (one, other) if change > 0 else (other, one)
        if p < 0.05:
            yield f"{better} beats {worse} by {abs(change):.3f} AUC (FDR-adjusted p = {p:.2g})."
        else:
            yield (
                f"{one} and {other} are not told apart: difference {change:+.3f} AUC "
                f"(FDR-adjusted p = {p:.2g})."
            )


def _mean_auc(run: AlignmentRun) -> float:
    return float(np.mean([run.retrieval[direction]["auc"] for direction in DIRECTIONS]))


def _forest(runs: Sequence[AlignmentRun]) -> str:
    lines = [(run, [run.retrieval[direction] for direction in DIRECTIONS]) for run in runs]
    ends = [
        number(row, key)
        for _, rows in lines
        for row in rows
        for key in ("auc", "ci_low", "ci_high")
    ]
    scale = scale_of([0.4, *(end for end in ends if end == end)], chance=0.5)
    rows = [
        ForestRow(
            name=run.name,
            marks=[
                Mark(
                    value=row["auc"],
                    low=number(row, "ci_low"),
                    high=number(row, "ci_high"),
                    shape=_SHAPES[direction],
                    colour=DIRECTION_COLOURS[direction],
                )
                for direction, row in zip(DIRECTIONS, both, strict=True)
            ],
            cells=[
                [with_interval(row) for row in both],
                [p_cell(number(row, "p_value")) for row in both],
                [f"{row['n_gallery']:,}" for row in both],
            ],
        )
        for run, both in lines
    ]
    key = "Dots: brain to DNA; triangles: DNA to brain; dashed: chance."
    drawn = forest(rows, scale, headings=["", "", "AUC", "p", "gallery"])
    return f'<div>{drawn}</div>\n<p class="note under">{key}</p>\n'


def _retrieval_table(runs: Sequence[AlignmentRun]) -> str:
    headings = ["Run", "Direction", *(f"R@{k}" for k in _RECALL), "Median rank", "Control AUC"]
    body = []
    for run in runs:
        control = number(run.retrieval.get("shuffled_control") or {}, "auc")
        for direction in DIRECTIONS:
            row = run.retrieval[direction]
            recall = [
                f"{rounded(number(row, f'recall_at_{k}'), 3)}\nchance "
                f"{rounded(number(row, f'recall_at_{k}_chance'), 3)}"
                for k in _RECALL
            ]
            rank = f"{row['median_rank']:g} of {row['n_gallery']:,}"
            checked = rounded(control) if control == control else ""
            body.append([run.name, DIRECTION_NAMES[direction], *recall, rank, checked])
    return table(headings, body, text_columns=(1,))


def _differences(compared: Sequence[Row]) -> str:
    if not compared:
        return '<p class="missing">These runs have too few test people in common.</p>\n'
    headings = ["First", "Second", "Direction", "Metric", "First less second", "p", "p (FDR)"]
    body = [
        [
            row["first"],
            row["second"],
            DIRECTION_NAMES.get(row["direction"], str(row["direction"])),
            row["metric"].replace("recall_at_", "R@").replace("auc", "AUC"),
            f"{row['difference']:+.3f} [{row['ci_low']:+.3f}, {row['ci_high']:+.3f}]",
            f"{row['p_value']:.3g}",
            f"{row['q_value']:.3g}",
        ]
        for row in compared
    ]
    n = compared[0]["n_queries"]
    text = (
        f"<p>On the {n:,} test people that all runs have. Two-sided permutation tests in which a "
        "family's people change sides together; p adjusted over all pairs of runs.</p>\n"
    )
    return text + table(headings, body, text_columns=(1, 2, 3))


def _runs_table(runs: Sequence[AlignmentRun]) -> str:
    keys = {
        "method": "Method",
        "loss_name": "Loss",
        "n_train": "Training people",
        "n_test": "Test people",
        "best_step": "Best step",
        "validation_auc": "Validation AUC",
        "logit_scale": "Logit scale",
        "effective_rank": "Effective rank",
        "n_processes": "Processes",
    }
    headings = ["Run", *keys.values(), "Residualised on"]
    body = [
        [
            run.name,
            *(_cell(run.summary.get(key)) for key in keys),
            ", ".join(run.summary.get("residualised_on") or []) or "nothing",
        ]
        for run in runs
    ]
    return table(headings, body, text_columns=(1, 2, len(headings) - 1))


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) else str(value)

"""What the verdict says of confounds: sites, ancestry, covariates, families, hidden relatives.

The rules:

- what is alike within groups explains a finding when exchanging everybody with everybody gives
  p below 0.05 and exchanging people within their groups, families whole, does not.
- a stratum speaks of confounding when the AUC within it is clearly below the one among everyone.
- relatives are hidden when many more test people are as alike to somebody in training as siblings
  are than chance makes opposite (`relatives.alike_in_training`).
"""

import math
from collections.abc import Mapping
from typing import Any

from brainfusion.eval.report.evidence import aligner, in_words, is_above_chance, mean_row
from brainfusion.eval.report.rows import DIRECTIONS, by_name, number, p_text, rounded, with_interval

Row = Mapping[str, Any]

_WITHIN = {"site": "site", "group": "ancestry group"}


def confounds(retrieval: Row) -> list[str]:
    """Sentences on what may have been found instead of a link within people."""
    return [
        *exchanged_freely(retrieval),
        *hidden_relatives(retrieval),
        *covariates_alone(retrieval),
        *_strata(retrieval),
    ]


def in_groups_only(row: Row) -> bool:
    """Whether only a test that ignores sites, ancestry and families finds something.

    Two p-values on either side of 0.05 that are nearly the same say nothing of the kind.
    """
    free = number(row, "p_value_freely_exchanged")
    return free < 0.05 and number(row, "p_value") >= max(0.05, 2 * free)


def exchanged_freely(retrieval: Row) -> list[str]:
    """Warns where only a test that ignores sites, ancestry and families finds something."""
    rows = [retrieval[name] for name in DIRECTIONS if retrieval.get(name)]
    naive = [row for row in rows if in_groups_only(row)]
    if not naive:
        return []
    worst = min(naive, key=lambda row: number(row, "p_value_freely_exchanged"))
    names = list(worst.get("exchanged_within") or [])
    groups = [_WITHIN[name] for name in names if name in _WITHIN]
    how = "whole families" if "family" in names else "people"
    how += f" within their {' and '.join(groups)}" if groups else ""
    groups += ["family"] if "family" in names else []
    return [
        "Warning: exchanging everybody with everybody would call this an alignment "
        f"({p_text(number(worst, 'p_value_freely_exchanged'))}), exchanging {how} does not "
        f"({p_text(number(worst, 'p_value'))}). What people of one {' or '.join(groups)} have in "
        "common explains it, not a link within the person."
    ]


def hidden_relatives(retrieval: Row) -> list[str]:
    """Warns where test people have relatives in training whom no family names."""
    row = retrieval.get("relatives") or {}
    if not row.get("warns"):
        return []
    return [
        f"Warning: {row['n_alike']:,} of {row['n_test']:,} test people have somebody in training "
        "whose DNA is as alike as a sibling's, in no family that the cohort names (by chance about "
        f"{row['n_by_chance']:,}). What is found may be the family's and not the person's: name "
        "the families in subjects.parquet, delete splits.json, and start again."
    ]


def covariates_alone(retrieval: Row) -> list[str]:
    """Warns when the covariates alone find the partner."""
    sentences = []
    for name, rows in by_name(retrieval.get("baselines") or []).items():
        alone = name.lower().startswith(("covariate", "confound"))
        if alone and number(mean_row(rows), "ci_low") > 0.5:
            sentences.append(
                f"Warning: {name} already finds the partner, {in_words(rows)}. That much of the "
                "alignment needs neither brain nor DNA."
            )
    return sentences


def _strata(retrieval: Row) -> list[str]:
    """A stratum whose whole interval is below the overall AUC points at confounding."""
    if not is_above_chance(retrieval):
        return []
    held, sentences = {}, []
    for name, rows in by_name(retrieval.get("strata") or []).items():
        mean, ours = mean_row(rows), aligner(retrieval, rows)
        if ours is None:
            continue
        drop, high = ours["auc"] - mean["auc"], number(mean, "ci_high")
        certain = drop > 0.05 if math.isnan(high) else high < ours["auc"]
        if not certain or drop <= 0.02:
            held[name] = mean["auc"]
            continue
        lost = ", no longer told apart from chance" if number(mean, "ci_low") <= 0.5 else ""
        sentences.append(
            f"Warning: among people of one stratum ({name}) the AUC drops from "
            f"{rounded(ours['auc'])} to {with_interval(mean)}{lost}. What differs between strata "
            "explains part of the alignment: it may be confounding."
        )
    if held:
        ends = dict.fromkeys(rounded(value) for value in (min(held.values()), max(held.values())))
        sentences.append(
            f"The alignment holds within strata: AUC {' to '.join(ends)} ({', '.join(held)})."
        )
    return sentences

"""What the numbers of `results.json` say, in plain sentences.

Every sentence is computed from the results; nothing is taken on trust. The rules, in one place:

- found: permutation p below 0.01 and the 95% interval of the AUC above chance; weak: only one of
  the two, or p below 0.05; below chance: the whole interval under it, a mistake somewhere.
- a control has failed when its AUC is more than 3 standard errors from 0.5.
- two AUCs differ clearly when their 95% intervals do not overlap; only directions that have an
  interval are compared, each with the same direction of the other.
- a probe goes beyond the confounds when p is below 0.05 and its interval is above chance after the
  confounds are residualised or, without such a row, above what the confounds alone predict.
- the smallest detectable AUC is 0.5 + (1.645 + 0.842) standard errors: one-sided 5%, power 80%.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from brainfusion.eval.attainable import share_of_attainable
from brainfusion.eval.report import cca
from brainfusion.eval.report.confounds import confounds, covariates_alone, in_groups_only
from brainfusion.eval.report.evidence import (
    aligner,
    comparable,
    evidence,
    in_words,
    is_found,
    mean_row,
    smallest_detectable,
)
from brainfusion.eval.report.rows import (
    CONTROL_LIMIT,
    DIRECTION_NAMES,
    DIRECTIONS,
    attainable,
    beyond_confounds,
    by_name,
    by_target,
    control_distance,
    control_failed,
    gallery_text,
    number,
    p_text,
    rounded,
    row_p,
    with_interval,
)

Row = Mapping[str, Any]

__all__ = ["best_baseline", "evidence", "smallest_detectable", "verdict"]

PRETRAINED, UNTRAINED = "ridge-CCA, encoder features", "ridge-CCA, untrained encoder"
"""The baselines that differ in nothing but the encoder's pretraining."""


def verdict(results: Row) -> list[str]:
    """Plain sentences about a run: the finding, then what speaks for and against it.

    The finding comes first, then the control, how far it is from the ceiling, the baselines, the
    strata, CCA and the probes. A control that failed comes before everything else.

    Args:
        results: The content of `results.json` (docs/formats.md). Parts that are missing are said
            to be missing, or left out.

    Returns:
        One or more sentences an entry, the most important entry first.
    """
    retrieval = results.get("retrieval") or {}
    control = _control(retrieval)
    failed = control_failed(retrieval)
    sentences = [
        *(control if failed else []),
        *_headline(retrieval),
        *_leak(retrieval),
        *([] if failed else control),
        *_ceiling(retrieval),
        *_linear(retrieval),
        *_baselines(retrieval),
        *_pretraining(retrieval),
        *confounds(retrieval),
        *cca.sentences(results.get("cca") or {}),
        *_probes(results.get("probes") or []),
    ]
    if (results.get("cohort") or {}).get("origin") == "simulated":
        sentences.append(
            "The cohort is simulated: these figures test the method and say nothing about people."
        )
    return sentences


# -- the finding -------------------------------------------------------------------------------


def _headline(retrieval: Row) -> list[str]:
    rows = {name: retrieval[name] for name in DIRECTIONS if retrieval.get(name)}
    if not rows:
        return ["Nothing can be said about the alignment yet: no retrieval was run."]
    kinds = {evidence(row) for row in rows.values()}
    if len(rows) == 2 and kinds in ({"found"}, {"none"}):
        brain, dna = (rows[name] for name in DIRECTIONS)
        aucs, p_values = (with_interval(brain), with_interval(dna)), (row_p(brain), row_p(dna))
        if kinds == {"none"}:
            return [
                f"No evidence of alignment: AUC {aucs[0]}, {p_values[0]} from brain to DNA and "
                f"AUC {aucs[1]}, {p_values[1]} from DNA to brain, in {gallery_text(brain)}; "
                f"{_detectable(brain)}."
            ]
        same = p_values[0] == p_values[1]
        p = f"both {p_values[0]}" if same else f"{p_values[0]} and {p_values[1]}"
        return [
            "A person's brain finds their own DNA better than chance, and their DNA their brain: "
            f"AUC {aucs[0]} and {aucs[1]} in {gallery_text(brain)}, {p}."
        ]
    return [_direction(name, row) for name, row in rows.items()]


def _direction(name: str, row: Row) -> str:
    query, found = DIRECTIONS[name]
    numbers = f"AUC {with_interval(row)} in {gallery_text(row)}, {row_p(row)}"
    match evidence(row):
        case "found":
            return f"The {query} of a person finds their own {found} better than chance: {numbers}."
        case "weak" if in_groups_only(row):
            return (
                f"No evidence that the {query} of a person finds their own {found}: {numbers}. It "
                "finds people of the same group."
            )
        case "weak":
            return (
                f"Weak evidence that the {query} of a person finds their own {found}: {numbers}. "
                "It would not survive a strict test."
            )
        case "below":
            return (
                f"Worse than chance from {query} to {found}: {numbers}. A true effect cannot do "
                "this: look for rows in the wrong order or a flipped sign."
            )
        case _:
            return f"No evidence of alignment from {query} to {found}: {numbers}; " + (
                f"{_detectable(row)}."
            )


def _detectable(row: Row) -> str:
    return (
        f"with n = {int(row.get('n_gallery') or 0):,} the smallest AUC that would be detected in 4 "
        f"of 5 cohorts is {smallest_detectable(row):.2f}"
    )


def _leak(retrieval: Row) -> list[str]:
    """A learner above its ceiling knows something that it should not."""
    rows = {name: retrieval[name] for name in DIRECTIONS if retrieval.get(name)}
    return [
        f"TOO GOOD: from {DIRECTION_NAMES[name]} the AUC {with_interval(row)} is above the "
        f"attainable {rounded(attainable(row))}. Information leaks from somewhere; do not use "
        "these figures before it is found."
        for name, row in rows.items()
        if number(row, "ci_low") > attainable(row) and evidence(row) == "found"
    ]


def _ceiling(retrieval: Row) -> list[str]:
    """How much of the way from chance to the ceiling a finding has come."""
    texts = {
        "attainable": "with a perfect model of perfectly measured people",
        "attainable_from_bold": "from these recordings",
    }
    found = [retrieval[name] for name in DIRECTIONS if retrieval.get(name)]
    found = [row for row in found if evidence(row) == "found"]
    parts, shares = [], []
    for key, text in texts.items():
        tops = [attainable(row) if key == "attainable" else number(row, key) for row in found]
        known = [(row["auc"], top) for row, top in zip(found, tops, strict=True) if top > 0.5]
        if known:
            share = sum((auc - 0.5) / (top - 0.5) for auc, top in known) / len(known)
            parts.append(f"{rounded(sum(top for _, top in known) / len(known))} {text}")
            shares.append(f"{min(share, 1.0):.0%}")
    if not parts:
        return []
    return [
        f"Attainable is an AUC of {' and '.join(parts)}: this run has come "
        f"{' and '.join(dict.fromkeys(shares))} of the way there from chance."
    ]


def _linear(retrieval: Row) -> list[str]:
    """How a finding compares with the best linear-Gaussian model that as many people allow."""
    row = retrieval.get("attainable_linear")
    ours = [retrieval[name] for name in DIRECTIONS if retrieval.get(name)]
    if not row or not ours:
        return []
    top, high = number(row, "auc"), number(row, "ci_high")
    found = is_found(retrieval)
    if top <= 0.5:
        limit = f"its AUC is 0.50, at most {rounded(high)}"
        if found:
            return [f"A linear-Gaussian model learnt from as many people finds nothing: {limit}."]
        if all(evidence(own) == "none" for own in ours):
            return [f"Nor does a linear-Gaussian model learnt from as many people: {limit}."]
        return []
    if not found:
        return []
    mean = mean_row(ours)
    share = share_of_attainable(mean["auc"], top)
    beyond = number(mean, "ci_low") > high
    return [
        f"The aligner reaches {rounded(share)} of the best linear-Gaussian model's AUC above "
        f"chance, {with_interval(row)} learnt from as many people"
        + (": it finds what no linear model does." if beyond else ".")
    ]


def _control(retrieval: Row) -> list[str]:
    control = retrieval.get("shuffled_control")
    if not control:
        if not any(retrieval.get(name) for name in DIRECTIONS):
            return []
        return ["No shuffled-pairs control was run, so a leak cannot be ruled out."]
    distance = control_distance(control)
    if math.isnan(distance):
        return [f"The shuffled-pairs control has AUC {control['auc']:.3f}, without standard error."]
    if distance <= CONTROL_LIMIT:
        return [
            f"The shuffled-pairs control is at chance, as it must be: AUC {control['auc']:.3f}, "
            f"{distance:.1f} standard errors from 0.5."
        ]
    return [
        f"CONTROL FAILED: with the pairs shuffled the AUC is still {control['auc']:.3f}, "
        f"{distance:.1f} standard errors from 0.5. No figure of this run can be trusted until this "
        "is explained (a leak between splits, the same person twice, rows in a telling order)."
    ]


# -- against simpler methods -------------------------------------------------------------------


def best_baseline(retrieval: Row) -> str | None:
    """The name of the baseline with the highest AUC, over the directions that have an interval."""
    groups = by_name(retrieval.get("baselines") or [])
    return max(groups, key=lambda name: mean_row(groups[name])["auc"], default=None)


def _baselines(retrieval: Row) -> list[str]:
    groups, best = by_name(retrieval.get("baselines") or []), best_baseline(retrieval)
    ours = aligner(retrieval, groups[best]) if best else None
    if best is None or ours is None:
        return []
    theirs = mean_row(groups[best])
    name, own = f"{best}, with {in_words(groups[best])}", f"AUC {with_interval(ours)}"
    if not is_found(retrieval) and number(theirs, "ci_low") <= 0.5:
        p = min(number(row, "p_value") for row in comparable(groups[best]))
        if p < 0.05:
            return [
                f"No baseline finds anything clearly: the best of {len(groups)} is {name}, "
                f"{p_text(p)}, not corrected for their number."
            ]
        return [f"The baselines find nothing either; the best is {name}."]
    tops = [attainable(retrieval[name]) for name in DIRECTIONS if retrieval.get(name)]
    if tops and number(theirs, "ci_low") > max(tops):
        return [
            f"Warning: {name} is above the attainable {rounded(max(tops))}. What it finds is a "
            "confound and no link between brain and DNA, so it is not the standard to beat."
        ]
    p = min(number(row, "p_value") for row in comparable(groups[best]))
    if number(theirs, "ci_low") > 0.5 and p >= 0.05:
        return [
            f"Warning: {name}, is above chance but not above what exchanging people within their "
            f"site and group gives ({p_text(p)}): it rests on what differs between those."
        ]
    if ours["auc"] <= theirs["auc"]:
        if number(ours, "ci_high") < number(theirs, "ci_low"):
            end = f"its own is clearly lower, {own}. "
            end += (
                "But covariates alone find partners too: the baseline may rest on them."
                if covariates_alone(retrieval)
                else "Prefer the baseline."
            )
        else:
            end = f"its own is {own}, so the simpler method is enough."
        return [f"The aligner does not beat the best baseline, {name}: {end}"]
    if number(ours, "ci_low") > number(theirs, "ci_high"):
        return [f"The aligner ({own}) beats the best baseline, {name}."]
    return [
        f"The aligner ({own}) is ahead of the best baseline, {name}, but the intervals overlap: "
        "the difference may be chance."
    ]


def _pretraining(retrieval: Row) -> list[str]:
    """Whether the pretrained encoder's features do better than those of an untrained one."""
    groups = by_name(retrieval.get("baselines") or [])
    if not {PRETRAINED, UNTRAINED} <= groups.keys():
        return []
    trained, raw = mean_row(groups[PRETRAINED]), mean_row(groups[UNTRAINED])
    numbers = (
        f"with ridge-CCA on the encoder's features {in_words(groups[PRETRAINED])}, on those of "
        f"the same encoder untrained AUC {with_interval(raw)}"
    )
    rows = [*comparable(groups[PRETRAINED]), *comparable(groups[UNTRAINED])]
    if all(evidence(row) == "none" or number(row, "p_value") >= 0.05 for row in rows):
        return [f"Neither pretrained nor untrained features find anything: {numbers}."]
    if number(trained, "ci_low") > number(raw, "ci_high"):
        return [f"Pretraining helps: {numbers}."]
    if number(trained, "ci_high") < number(raw, "ci_low"):
        return [f"Pretraining hurts: {numbers}."]
    if trained["auc"] > raw["auc"]:
        return [f"Pretraining may help, but the intervals overlap: {numbers}."]
    return [f"Pretraining does not help here: {numbers}."]


# -- probes ------------------------------------------------------------------------------------


def _probes(rows: Sequence[Row]) -> list[str]:
    """How many targets each representation predicts beyond the confounds."""
    targets = by_target(rows)
    predicted: dict[str, list[str]] = {}
    for target, group in targets.items():
        for base, beyond in beyond_confounds(group).items():
            predicted.setdefault(base, []).extend([target] * beyond)
    if not predicted:
        return []
    n = len(targets)
    if not any(predicted.values()):
        return [f"Probes predict none of {n} targets beyond the confounds."]
    some = sorted((base for base in predicted if predicted[base]), key=lambda b: -len(predicted[b]))
    parts = [f"{base} {len(predicted[base])} ({_some(predicted[base])})" for base in some]
    none = [base for base, names in predicted.items() if not names]
    parts += [f"{_and(none)} none"] if none else []
    return [
        f"Of {n} targets, probes predict beyond the confounds (each at p < 0.05, uncorrected): "
        f"{'; '.join(parts)}."
    ]


def _some(names: list[str], n: int = 3) -> str:
    return ", ".join(names[:n]) + (f" and {len(names) - n} more" if len(names) > n else "")


def _and(names: list[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)

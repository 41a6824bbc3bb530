"""What the numbers of `results.json` say, in plain sentences.

Every sentence is computed from the results; nothing is taken on trust. The rules, in one place:

- found: permutation p below 0.01 and the 95% interval of the AUC above chance; weak: only one of
  the two, or p below 0.05; below chance: the whole interval under it, a mistake somewhere.
- a control has failed when its AUC is more than 3 standard errors from 0.5.
- two AUCs differ clearly when their 95% intervals do not overlap.
- a probe goes beyond the confounds when p is below 0.05 and its interval is above chance after the
  confounds are residualised or, without such a row, above what the confounds alone predict.
- the smallest detectable AUC is 0.5 + (1.645 + 0.842) standard errors: one-sided 5%, power 80%.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

Row = Mapping[str, Any]
Evidence = Literal["found", "weak", "none", "below"]

DIRECTIONS = {"brain_to_dna": ("brain", "DNA"), "dna_to_brain": ("DNA", "brain")}
"""Key in `results["retrieval"]` -> (what is asked with, what is searched)."""

_DIRECTION_ALIASES = {"query_to_gallery": "brain_to_dna", "gallery_to_query": "dna_to_brain"}

CONTROL_LIMIT = 3.0
"""Standard errors from 0.5 that a shuffled control may be away."""


def verdict(results: Row) -> list[str]:
    """Plain sentences about a run: the finding, then what speaks for and against it.

    A control that failed comes before everything else.

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
        *_ceiling(retrieval),
        *([] if failed else control),
        *_baselines(retrieval),
        *_strata(retrieval),
        *_probes(results.get("probes") or []),
    ]
    if (results.get("cohort") or {}).get("origin") == "simulated":
        sentences.append(
            "The cohort is simulated: these figures test the method and say nothing about people."
        )
    return sentences


def evidence(row: Row) -> Evidence:
    """How strongly one retrieval direction speaks for an alignment."""
    chance = number(row, "chance", 0.5)
    low, high, p = number(row, "ci_low"), number(row, "ci_high"), number(row, "p_value")
    if high < chance:
        return "below"
    if math.isnan(p):
        return "found" if low > chance else "none"
    above = low > chance or (math.isnan(low) and row["auc"] > chance)
    if p < 0.01 and above:
        return "found"
    return "weak" if p < 0.05 or above else "none"


def control_distance(control: Row) -> float:
    """Standard errors between the shuffled control's AUC and 0.5; NaN without a standard error."""
    error = number(control, "standard_error")
    return abs(control["auc"] - 0.5) / error if error > 0 else math.nan


def control_failed(retrieval: Row) -> bool:
    """Whether a shuffled control was run and is not at chance."""
    control = retrieval.get("shuffled_control")
    return bool(control) and control_distance(control) > CONTROL_LIMIT


def attainable(row: Row, metric: str = "auc") -> float:
    """The ceiling of a metric in one direction, NaN where it is unknown.

    `attainable` is the AUC, or a dict of metrics; `<metric>_attainable` is read as well.
    """
    ceiling = row.get("attainable")
    if isinstance(ceiling, Mapping):
        return number(ceiling, metric)
    if metric == "auc":
        return number(row, "attainable")
    return number(row, f"{metric}_attainable")


def direction_of(row: Row) -> str | None:
    """The direction that a baseline's or stratum's row is about, a key of `DIRECTIONS`."""
    name = str(row.get("direction", ""))
    name = _DIRECTION_ALIASES.get(name, name)
    return name if name in DIRECTIONS else None


def by_name(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows that have an AUC, by name: one a direction, or one in all."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if math.isfinite(number(row, "auc")):
            groups.setdefault(str(row["name"]), []).append(row)
    return groups


_TAKEN_OUT = re.compile(r"\s*\|\s*confounds$|[\s,(]*\bresiduali[sz]ed( for [^)]*)?\)?")


def base_name(features: str) -> str:
    """A probe's representation without the mark that the confounds were taken out.

    >>> base_name("connectome | confounds"), base_name("connectome, residualised")
    ('connectome', 'connectome')
    """
    return _TAKEN_OUT.sub("", features).strip(" ,") or features


def is_residualised(features: str) -> bool:
    """Whether a probe's row has the confounds taken out."""
    return base_name(features) != features


def is_confounds(features: str) -> bool:
    """Whether a probe's row is predicted from the confounds alone."""
    return features.lower().startswith("confound") and not is_residualised(features)


def main_metric(rows: Sequence[Row]) -> str:
    """The metric by which the probes of one target are judged, when rows hold several."""
    names = [str(row.get("metric", "")) for row in rows]
    known = ("r2", "auroc", "balanced_accuracy", "r", "accuracy")
    return next((name for name in known if name in names), names[0])


def number(row: Row, key: str, default: float = math.nan) -> float:
    """A float from a row whose value may be missing or null."""
    value = row.get(key)
    return default if value is None or isinstance(value, (str, Mapping)) else float(value)


def with_interval(row: Row, key: str = "auc", digits: int = 2) -> str:
    """A value with its interval, if it has one.

    >>> with_interval({"auc": 0.834, "ci_low": 0.8, "ci_high": 0.86})
    '0.83 [0.80, 0.86]'
    """
    value, low, high = number(row, key), number(row, "ci_low"), number(row, "ci_high")
    if math.isnan(value):
        return "unknown"
    bounds = "" if math.isnan(low + high) else f" [{low:.{digits}f}, {high:.{digits}f}]"
    return f"{value:.{digits}f}{bounds}"


def p_text(p: float) -> str:
    """A p-value in words; never "p = 0", which no permutation test can give.

    >>> p_text(0.3125), p_text(0.00001)
    ('p = 0.31', 'p < 0.0001')
    """
    if math.isnan(p):
        return "p not computed"
    if p < 1e-4:
        return "p < 0.0001"
    return f"p = {p:.2f}" if p >= 0.095 else f"p = {p:.2g}"


def people(row: Row) -> str:
    """The gallery in words, in the unit that the row names."""
    unit = str(row.get("unit", "person"))
    plural = "people" if unit == "person" else f"{unit}s"
    size = f"{int(row['n_gallery']):,} {plural}" if row.get("n_gallery") else "unknown size"
    return f"a gallery of {size}"


def smallest_detectable(row: Row) -> float:
    """The AUC that a one-sided 5% test detects with power 80%, given this row's uncertainty.

    The standard error is that of the interval (which knows about families), but at least the one
    of independent people, whose AUC is uniform under the null: sqrt(1 / (12 n)).
    """
    errors = [(number(row, "ci_high") - number(row, "ci_low")) / (2 * 1.96)]
    if row.get("n_gallery"):
        errors.append(math.sqrt(1.0 / (12.0 * row["n_gallery"])))
    return 0.5 + (1.645 + 0.842) * max([e for e in errors if not math.isnan(e)], default=math.nan)


def ceiling_text(row: Row) -> str:
    """What could be attained, in words; empty where it is unknown."""
    ceiling, from_bold = attainable(row), number(row, "attainable_from_bold")
    if math.isnan(ceiling):
        return ""
    more = f" ({from_bold:.2f} from these recordings)" if math.isfinite(from_bold) else ""
    return f"attainable {ceiling:.2f}{more}"


def _headline(retrieval: Row) -> list[str]:
    rows = {name: retrieval[name] for name in DIRECTIONS if retrieval.get(name)}
    if not rows:
        return ["Nothing can be said about the alignment yet: no retrieval was run."]
    if len(rows) == 2 and all(evidence(row) == "none" for row in rows.values()):
        brain, dna = (rows[name] for name in DIRECTIONS)
        return [
            f"No evidence of alignment: AUC {with_interval(brain)}, {_p(brain)} from brain to DNA "
            f"and AUC {with_interval(dna)}, {_p(dna)} from DNA to brain, in {people(brain)}; "
            f"{_detectable(brain)}."
        ]
    return [_direction(name, row) for name, row in rows.items()]


def _direction(name: str, row: Row) -> str:
    query, found = DIRECTIONS[name]
    numbers = f"AUC {with_interval(row)} in {people(row)}, {_p(row)}"
    if ceiling := ceiling_text(row):
        numbers += f"; {ceiling}"
    match evidence(row):
        case "found":
            return f"The {query} of a person finds their own {found} better than chance: {numbers}."
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


def _ceiling(retrieval: Row) -> list[str]:
    """A learner above its ceiling is a leak; below it, the share of the way is worth saying."""
    shares: dict[str, list[float]] = {"attainable": [], "attainable_from_bold": []}
    sentences = []
    for name, (query, found) in DIRECTIONS.items():
        row = retrieval.get(name) or {}
        ceiling = attainable(row)
        if number(row, "ci_low") > ceiling:
            sentences.append(
                f"TOO GOOD: from {query} to {found} the AUC {with_interval(row)} is above the "
                f"attainable {ceiling:.2f}. Information leaks from somewhere; do not use these "
                "figures before it is found."
            )
        elif row and evidence(row) == "found":
            for key, value in (("attainable", ceiling), ("attainable_from_bold", math.nan)):
                top = number(row, key) if math.isnan(value) else value
                if top > 0.5:
                    shares[key].append((row["auc"] - 0.5) / (top - 0.5))
    texts = {
        "attainable": "to what a perfect model of perfectly measured people could attain",
        "attainable_from_bold": "to what could be read from these recordings",
    }
    parts = [
        f"{min(sum(values) / len(values), 1.0):.0%} of the way from chance {texts[key]}"
        for key, values in shares.items()
        if values
    ]
    return [*sentences, *([f"That is {', and '.join(parts)}."] if parts else [])]


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


def _mean(rows: Sequence[Row]) -> Row:
    """AUC and bounds averaged over directions, which share their people: bounds do not shrink."""
    means = {
        key: sum(number(row, key) for row in rows) / len(rows)
        for key in ("auc", "ci_low", "ci_high")
    }
    return {key: value for key, value in means.items() if math.isfinite(value)}


def _aligner(retrieval: Row, like: Sequence[Row]) -> Row | None:
    """The aligner's own figures, averaged over the directions that `like` has."""
    asked = {direction_of(row) for row in like} - {None} or set(DIRECTIONS)
    rows = [retrieval[name] for name in DIRECTIONS if retrieval.get(name) and name in asked]
    return _mean(rows) if rows else None


def _found(retrieval: Row) -> bool:
    return any(evidence(retrieval[name]) == "found" for name in DIRECTIONS if retrieval.get(name))


def _baselines(retrieval: Row) -> list[str]:
    groups = by_name(retrieval.get("baselines") or [])
    if not groups:
        return []
    means = {name: _mean(rows) for name, rows in groups.items()}
    best = max(means, key=lambda name: means[name]["auc"])
    theirs, ours = means[best], _aligner(retrieval, groups[best])
    if ours is None:
        return []
    name, own = f"{best} (AUC {with_interval(theirs)})", f"AUC {with_interval(ours)}"
    if not _found(retrieval) and number(theirs, "ci_low") <= 0.5:
        return [f"The baselines find nothing either; the best is {name}."]
    if ours["auc"] <= theirs["auc"]:
        if number(ours, "ci_high") < number(theirs, "ci_low"):
            end = f"its own is clearly lower, {own}. Prefer the baseline."
        else:
            end = f"its own is {own}, so the simpler method is enough."
        return [f"The aligner does not beat the best baseline, {name}: {end}"]
    if number(ours, "ci_low") > number(theirs, "ci_high"):
        return [f"The aligner ({own}) beats the best baseline, {name}."]
    return [
        f"The aligner ({own}) is ahead of the best baseline, {name}, but the intervals overlap: "
        "the difference may be chance."
    ]


def _strata(retrieval: Row) -> list[str]:
    """A stratum whose whole interval is below the overall AUC points at confounding."""
    if not _found(retrieval):
        return []
    held, sentences = {}, []
    for name, rows in by_name(retrieval.get("strata") or []).items():
        mean, ours = _mean(rows), _aligner(retrieval, rows)
        if ours is None:
            continue
        drop, high = ours["auc"] - mean["auc"], number(mean, "ci_high")
        certain = drop > 0.05 if math.isnan(high) else high < ours["auc"]
        if not certain or drop <= 0.02:
            held[name] = mean["auc"]
            continue
        lost = ", no longer told apart from chance" if number(mean, "ci_low") <= 0.5 else ""
        sentences.append(
            f"Warning: among people of one stratum ({name}) the AUC drops from {ours['auc']:.2f} "
            f"to {with_interval(mean)}{lost}. What differs between strata explains part of the "
            "alignment: it may be confounding."
        )
    if held:
        low, high = min(held.values()), max(held.values())
        spread = f"{low:.2f}" + (f" to {high:.2f}" if f"{low:.2f}" != f"{high:.2f}" else "")
        sentences.append(f"The alignment holds within strata: AUC {spread} ({', '.join(held)}).")
    return sentences


def _probes(rows: Sequence[Row]) -> list[str]:
    """How many targets each representation predicts beyond the confounds."""
    targets: dict[str, list[Row]] = {}
    for row in rows:
        if math.isfinite(number(row, "value")):
            targets.setdefault(str(row["target"]), []).append(row)
    predicted: dict[str, list[str]] = {}
    for target, group in targets.items():
        metric = main_metric(group)
        mine = {str(r["features"]): r for r in group if str(r.get("metric", "")) == metric}
        alone = [number(r, "value") for name, r in mine.items() if is_confounds(name)]
        residualised = {base_name(name) for name in mine if is_residualised(name)}
        for name, row in mine.items():
            base = base_name(name)
            if is_confounds(name) or (base in residualised and not is_residualised(name)):
                continue
            floor = number(row, "chance", 0.0)
            floor = floor if is_residualised(name) else max([floor, *alone])
            names = predicted.setdefault(base, [])
            if number(row, "ci_low") > floor and number(row, "p_value", 0.0) < 0.05:
                names.append(target)
    if not predicted:
        return []
    n = len(targets)
    if not any(predicted.values()):
        return [f"Probes predict none of {n} targets beyond the confounds."]
    parts = [
        f"{base} {len(names)} of {n}"
        + (f" ({_some(names)})" if names and len(predicted) <= 3 else "")
        for base, names in predicted.items()
    ]
    return [f"Targets that probes predict beyond the confounds: {'; '.join(parts)}."]


def _some(names: list[str], n: int = 4) -> str:
    return ", ".join(names[:n]) + (f" and {len(names) - n} more" if len(names) > n else "")


def _p(row: Row) -> str:
    return p_text(number(row, "p_value"))

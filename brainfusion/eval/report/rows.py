"""How the rows of `results.json` are read and put into words, the same on the page and in text."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]

DIRECTIONS = {"brain_to_dna": ("brain", "DNA"), "dna_to_brain": ("DNA", "brain")}
"""Key in `results["retrieval"]` -> (what is asked with, what is searched)."""

DIRECTION_NAMES = {name: f"{query} to {found}" for name, (query, found) in DIRECTIONS.items()}

CONTROL_LIMIT = 3.0
"""Standard errors from 0.5 that a shuffled control may be away."""

_DIRECTION_ALIASES = {"query_to_gallery": "brain_to_dna", "gallery_to_query": "dna_to_brain"}


def number(row: Row, key: str, default: float = math.nan) -> float:
    """A float from a row whose value may be missing or null."""
    value = row.get(key)
    return default if value is None or isinstance(value, (str, Mapping)) else float(value)


def rounded(value: float, digits: int = 2) -> str:
    """A number to `digits`, or to more where it would read as 1 without being 1; never "-0.00".

    >>> rounded(0.834), rounded(0.9975), rounded(1.0), rounded(-0.001)
    ('0.83', '0.998', '1.00', '0.00')
    """
    text = f"{value:.{digits}f}"
    while value < 1 and float(text) >= 1 and digits < 6:
        digits += 1
        text = f"{value:.{digits}f}"
    return text.lstrip("-") if float(text) == 0 else text


def with_interval(row: Row, key: str = "auc", digits: int = 2) -> str:
    """A value with its interval, if it has one.

    >>> with_interval({"auc": 0.834, "ci_low": 0.8, "ci_high": 0.86})
    '0.83 [0.80, 0.86]'
    """
    value, low, high = number(row, key), number(row, "ci_low"), number(row, "ci_high")
    if math.isnan(value):
        return "unknown"
    known = math.isfinite(low + high)
    bounds = f" [{rounded(low, digits)}, {rounded(high, digits)}]" if known else ""
    return f"{rounded(value, digits)}{bounds}"


def p_text(p: float, n_permutations: float = math.nan) -> str:
    """A p-value in words; never "p = 0", which no permutation test can give.

    >>> p_text(0.3125), p_text(0.00001)
    ('p = 0.31', 'p < 0.001')
    >>> p_text(0.001, 999)
    'p = 0.001 (smallest possible with 999 permutations)'
    """
    if math.isnan(p):
        return "p not computed"
    if p * (1 + n_permutations) <= 1 + 1e-6:
        return f"p = {p:.2g} (smallest possible with {n_permutations:,.0f} permutations)"
    if p < 0.001:
        return "p < 0.001"
    return f"p = {p:.2f}" if p >= 0.095 else f"p = {p:.2g}"


def row_p(row: Row) -> str:
    """The p-value of a row in words."""
    return p_text(number(row, "p_value"), number(row, "n_permutations"))


def p_cell(p: float) -> str:
    """A p-value in a table's column of them.

    >>> p_cell(0.0012), p_cell(0.00012)
    ('0.0012', '< 0.001')
    """
    return p_text(p).removeprefix("p = ").removeprefix("p ") if math.isfinite(p) else ""


def p_exact(p: float) -> str:
    """A p-value of a test without permutations, to four digits.

    >>> p_exact(0.01234), p_exact(1e-20)
    ('0.0123', '< 0.0001')
    """
    return "< 0.0001" if p < 1e-4 else f"{p:.4f}"


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


def ceiling_text(row: Row) -> str:
    """What could be attained, in words; empty where it is unknown."""
    ceiling, from_bold = attainable(row), number(row, "attainable_from_bold")
    if math.isnan(ceiling):
        return ""
    known = math.isfinite(from_bold)
    return f"attainable {rounded(ceiling)}" + (
        f" ({rounded(from_bold)} from these recordings)" if known else ""
    )


def gallery_text(row: Row) -> str:
    """The gallery in words, in the unit that the row names."""
    unit = str(row.get("unit", "person"))
    plural = "people" if unit == "person" else f"{unit}s"
    size = f"{int(row['n_gallery']):,} {plural}" if row.get("n_gallery") else "unknown size"
    return f"a gallery of {size}"


def direction_of(row: Row) -> str | None:
    """The direction that a baseline's or stratum's row is about, a key of `DIRECTIONS`."""
    name = str(row.get("direction", ""))
    name = _DIRECTION_ALIASES.get(name, name)
    return name if name in DIRECTIONS else None


def by_name(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows that have an AUC, by name: one a direction, or one in all.

    A row with `auc_dna_to_brain` holds brain to DNA and, without interval, the way back.
    """
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if math.isfinite(number(row, "auc")):
            groups.setdefault(str(row["name"]), []).extend(_directions(row))
    return groups


def _directions(row: Row) -> list[Row]:
    back = number(row, "auc_dna_to_brain")
    if math.isnan(back) or direction_of(row):
        return [row]
    shared = ("name", "chance", "n_queries", "n_gallery", "unit", "n_permutations")
    other = {key: row[key] for key in shared if key in row}
    other |= {"auc": back, "p_value": row.get("p_value_dna_to_brain"), "direction": "dna_to_brain"}
    # All scores tied: the way back is tied as well, and as certain.
    other |= {"standard_error": 0.0} if is_tied(row) and back == 0.5 else {}
    return [{**row, "direction": "brain_to_dna"}, other]


def is_tied(row: Row) -> bool:
    """Whether a retrieval told nobody apart: every score is the same."""
    return row["auc"] == 0.5 and number(row, "standard_error") == 0.0


def bar_ends(row: Row) -> tuple[float, float]:
    """The ends of an AUC's bar: its interval or, without one, 3 standard errors to each side."""
    low, high = number(row, "ci_low"), number(row, "ci_high")
    if math.isnan(low + high):
        reach = CONTROL_LIMIT * number(row, "standard_error")
        return row["auc"] - reach, row["auc"] + reach
    return low, high


def control_distance(control: Row) -> float:
    """Standard errors between the shuffled control's AUC and 0.5; NaN without a standard error."""
    error = number(control, "standard_error")
    return abs(control["auc"] - 0.5) / error if error > 0 else math.nan


def control_failed(retrieval: Row) -> bool:
    """Whether a shuffled control was run and is not at chance."""
    control = retrieval.get("shuffled_control")
    return bool(control) and control_distance(control) > CONTROL_LIMIT


# -- alignments --------------------------------------------------------------------------------

_CLOSED_FORMS = {"rcca": "ridge CCA", "pls": "partial least squares", "ridge": "ridge regression"}
_LOSSES = {"info_nce": "InfoNCE", "clip": "CLIP's loss", "siglip": "SigLIP"}


def method_name(alignment: Row) -> str:
    """How an alignment was made, in words, from its summary.

    >>> method_name({"loss_name": "info_nce"}), method_name({"method": "rcca"})
    ('InfoNCE', 'ridge CCA, closed form')
    >>> method_name({"loss_name": "info_nce", "finetune": {"how": "lora"}})
    'InfoNCE, fine-tuned (lora)'
    """
    method = str(alignment.get("method", "infonce"))
    if method != "infonce":
        return f"{_CLOSED_FORMS.get(method, method)}, closed form"
    loss = str(alignment.get("loss_name", "info_nce"))
    tuned = alignment.get("finetune") or {}
    return _LOSSES.get(loss, loss) + (f", fine-tuned ({tuned['how']})" if tuned.get("how") else "")


# -- probes ------------------------------------------------------------------------------------

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


def by_target(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Probe rows that have a value, by target, each target by its main metric alone."""
    targets: dict[str, list[Row]] = {}
    for row in rows:
        if math.isfinite(number(row, "value")):
            targets.setdefault(str(row["target"]), []).append(row)
    judged = {target: main_metric(group) for target, group in targets.items()}
    return {
        target: [row for row in group if str(row.get("metric", "")) == judged[target]]
        for target, group in targets.items()
    }


def beyond_confounds(rows: Sequence[Row]) -> dict[str, bool]:
    """For one target's rows: representation -> whether it predicts beyond the confounds.

    That is p below 0.05 and an interval above chance after the confounds were taken out or, where
    there is no such row, above what the confounds alone predict.
    """
    mine = {str(row["features"]): row for row in rows}
    alone = [number(row, "value") for name, row in mine.items() if is_confounds(name)]
    residualised = {base_name(name) for name in mine if is_residualised(name)}
    found: dict[str, bool] = {}
    for name, row in mine.items():
        base = base_name(name)
        if is_confounds(name) or (base in residualised and not is_residualised(name)):
            continue
        floor = number(row, "chance", 0.0)
        floor = floor if is_residualised(name) else max([floor, *alone])
        found[base] = number(row, "ci_low") > floor and number(row, "p_value", 0.0) < 0.05
    return found

"""Is one model better than another on the same people? Paired tests that keep families whole.

Two models of one cohort share its people, so their scores go up and down together; two intervals
that overlap say little. What is tested is the difference, person by person.

Permutation: if the models are equally good, each family's part of the difference could as well have
the other sign. All sign patterns are one matrix product over family sums.

DeLong: the AUROC of a classifier is a mean over pairs of people, and its variance and covariance
follow from each person's share, found from midranks in n log n. With families the shares are summed
by family (Obuchowski), which is DeLong's formula when everyone is alone.

Sources: DeLong et al. 1988, Biometrics; Sun and Xu 2014, IEEE Signal Processing Letters; Obuchowski
1997, Biometrics; Bandos et al. 2005, Statistics in Medicine (swaps of ranks); Winkler et al. 2014
(signs flipped by blocks).

Shape legend: n people, f families, m models, b draws, c statistics.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from brainfusion.eval.statistics import (
    LEVEL,
    Labels,
    auroc,
    family_bootstrap,
    family_codes,
    interval,
    midranks,
)
from brainfusion.runtime.errors import UserError


def paired_difference(
    first: np.ndarray,
    second: np.ndarray,
    *,
    families: Labels | None = None,
    n_permutations: int = 9999,
    n_bootstrap: int = 2000,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Test mean differences of per-person values: hits, squared errors, shares of an AUC.

    Args:
        first: Values of one model, [n] or several statistics [n, c].
        second: Values of the other, of the same people.
        families: Family of each person: its values change sides together.
        n_permutations: Sign patterns drawn.
        n_bootstrap: Bootstrap samples of families.
        seed: Of both.

    Returns:
        For each statistic `difference`, `ci_low`, `ci_high` (95 %), `standard_error`, `p_value`
        (two-sided), `n_permutations`, `n_families`.
    """
    first, second = (np.asarray(values, np.float64) for values in (first, second))
    if first.shape != second.shape or first.ndim not in (1, 2) or not len(first):
        raise UserError(
            f"values of shapes {list(first.shape)} and {list(second.shape)}: a paired comparison "
            "needs one row a person in both, of the same people."
        )
    change = (first - second).reshape(len(first), -1)
    family = family_codes(families, len(change))
    p = sign_flip_p(change, family, n_permutations=n_permutations, seed=seed)
    draws = family_bootstrap(change, family, n_bootstrap, seed)
    rows = []
    for at, total in enumerate(change.sum(axis=0)):
        low, high = interval(draws[:, at])
        row = {"difference": float(total / len(change)), "ci_low": low, "ci_high": high}
        row |= {"standard_error": float(draws[:, at].std(ddof=1)), "p_value": float(p[at])}
        n_families = int(family.max()) + 1
        rows.append({**row, "n_permutations": n_permutations, "n_families": n_families})
    return rows


def sign_flip_p(
    change: np.ndarray, family: np.ndarray, *, n_permutations: int, seed: int
) -> np.ndarray:
    """Two-sided p of each column's mean when whole families change sign, [c].

    Args:
        change: [n, c], differences of paired values.
        family: int [n], family codes.
        n_permutations: Sign patterns drawn.
        seed: Of the draws.
    """
    totals = np.zeros((int(family.max()) + 1, change.shape[1]))
    np.add.at(totals, family, change)
    # Rounding must not turn a tie into a miss.
    reach = np.abs(totals.sum(axis=0)) - 1e-9 * np.abs(totals).sum(axis=0)
    n_reached = np.zeros(len(reach))
    for signs in _signs(len(totals), n_permutations, seed):
        n_reached += (np.abs(signs @ totals) >= reach).sum(axis=0)
    return (1 + n_reached) / (1 + n_permutations)


class DeLong(NamedTuple):
    """Areas under the ROC curve of several models, and how they vary together."""

    auroc: np.ndarray
    """float64 [m]."""
    covariance: np.ndarray
    """float64 [m, m], of the areas."""
    n_families: int
    """Independent units behind the covariance."""


def delong(positive: np.ndarray, scores: np.ndarray, families: Labels | None = None) -> DeLong:
    """Areas under the ROC curve with their covariance, families taken as the independent units.

    Args:
        positive: bool [n].
        scores: [m, n], higher for more likely positive; scales may differ between models.
        families: Family of each person.

    Raises:
        UserError: Shapes do not fit, or a class has members in fewer than 2 families.
    """
    positive, scores = np.asarray(positive, bool), np.atleast_2d(np.asarray(scores, np.float64))
    if positive.ndim != 1 or scores.shape[1] != len(positive):
        raise UserError(
            f"scores of shape {list(scores.shape)} for {len(positive)} people: expected one row a "
            "model and one column a person."
        )
    family = family_codes(families, len(positive))
    n_families = int(family.max()) + 1
    if min(len(np.unique(family[own])) for own in (positive, ~positive)) < 2:
        raise UserError(
            "a class has people of fewer than 2 families: an AUROC's variance needs 2 or more."
        )
    area, influence = auroc_influence(positive, scores, family, n_families)
    return DeLong(area, influence @ influence.T, n_families)


def auroc_influence(
    positive: np.ndarray, scores: np.ndarray, family: np.ndarray, n_families: int
) -> tuple[np.ndarray, np.ndarray]:
    """Areas under the ROC curve, and how each family moves them: its part of their covariance.

    Args:
        positive: bool [n], some true and some false.
        scores: [m, n].
        family: int [n], codes below `n_families`.
        n_families: Of all people, of whom these may be some.

    Returns:
        Areas [m], and [m, f]; its product with itself is the covariance. A class of one family only
        adds nothing to it.
    """
    # In order of people: each one's share of the area, over its positives or over its negatives.
    share = np.empty(scores.shape)
    ranks = midranks(scores).astype(np.float64)
    for own in (positive, ~positive):
        below = (ranks[:, own] - midranks(scores[:, own])) / (~own).sum()
        share[:, own] = below if own is positive else 1 - below
    area = share[:, positive].mean(axis=1)
    influence = np.zeros((len(scores), n_families))
    for own in (positive, ~positive):
        n_with = len(np.unique(family[own]))
        sums = np.stack([np.bincount(family[own], row[own], n_families) for row in share])
        sums -= area[:, None] * np.bincount(family[own], minlength=n_families)
        # Obuchowski's degrees of freedom: families that have a member of the class.
        influence += sums / own.sum() * np.sqrt(n_with / max(n_with - 1, 1))
    return area, influence


def compare_auroc(
    positive: np.ndarray,
    first: np.ndarray,
    second: np.ndarray,
    *,
    families: Labels | None = None,
    n_permutations: int = 1999,
    seed: int = 0,
) -> dict[str, Any]:
    """Compare two classifiers by their AUROC on the same people.

    Args:
        positive: bool [n].
        first: Scores of one model [n], out of fold.
        second: Scores of the other.
        families: Family of each person.
        n_permutations: Draws in which families swap the models' ranks.
        seed: Of the draws.

    Returns:
        `auroc_first`, `auroc_second`, `difference` with `standard_error`, `ci_low`, `ci_high` and
        the two-sided `p_value` (DeLong), `p_permutation`, `n_permutations`, `n_positive`,
        `n_negative`, `n_families` and `variance`, which says what was taken as independent.
    """
    from scipy.stats import norm

    found = delong(positive, np.stack([first, second]), families)
    difference = float(found.auroc[0] - found.auroc[1])
    change = np.array([1.0, -1.0])
    error = float(np.sqrt(max(change @ found.covariance @ change, 0.0)))
    reach = float(norm.ppf((1 + LEVEL) / 2)) * error
    p = float(2 * norm.sf(abs(difference) / error)) if error else float(difference == 0)
    n_positive = int(np.asarray(positive, bool).sum())
    return {
        "auroc_first": float(found.auroc[0]),
        "auroc_second": float(found.auroc[1]),
        "difference": difference,
        "standard_error": error,
        "ci_low": difference - reach,
        "ci_high": difference + reach,
        "p_value": p,
        "p_permutation": _swap_test(positive, first, second, families, n_permutations, seed),
        "n_permutations": n_permutations,
        "n_positive": n_positive,
        "n_negative": len(positive) - n_positive,
        "n_families": found.n_families,
        "variance": f"DeLong over {found.n_families} "
        + ("people" if found.n_families == len(positive) else "families (Obuchowski 1997)"),
    }


def _signs(n_families: int, n_draws: int, seed: int) -> Iterator[np.ndarray]:
    """Random signs in parts of up to 32 MiB, float64 [part, f]; `n_draws` rows in all."""
    rng = np.random.default_rng([seed, 5])
    step = max(1, 2**22 // n_families)
    for start in range(0, n_draws, step):
        shape = (min(step, n_draws - start), n_families)
        yield rng.integers(0, 2, shape, np.int8) * 2.0 - 1.0


def _swap_test(
    positive: np.ndarray,
    first: np.ndarray,
    second: np.ndarray,
    families: Labels | None,
    n_permutations: int,
    seed: int,
) -> float:
    """Two-sided p of the AUROC's difference when families swap the two models' ranks."""
    positive = np.asarray(positive, bool)
    ranks = midranks(np.stack([first, second]).astype(np.float64))
    observed = abs(auroc(positive, ranks[0]) - auroc(positive, ranks[1]))
    family = family_codes(families, len(positive))
    n_positive = int(positive.sum())
    n_pairs = n_positive * (len(positive) - n_positive)
    n_reached = 0
    for signs in _signs(int(family.max()) + 1, n_permutations, seed):
        swap = signs[:, family] < 0
        sums = [
            midranks(np.where(swap, one, other))[:, positive].sum(axis=1, dtype=np.float64)
            for one, other in ((ranks[0], ranks[1]), (ranks[1], ranks[0]))
        ]
        n_reached += int((np.abs(sums[0] - sums[1]) / n_pairs >= observed - 1e-9).sum())
    return (1 + n_reached) / (1 + n_permutations)

"""Does one representation predict a target better than another? Paired tests of two probes.

Both probes have the same people, folds and targets, so their difference is tested person by person:

- continuous targets: the difference of R2, its interval from the bootstrap that both rows share,
  and a p-value from whole families changing sign in the differences of squared errors;
- labels: the difference of AUROC by DeLong, families as the units. The AUROC compares people of one
  held-out fold, so each fold has its own areas and shares; folds weigh by their pairs, classes
  alike. Fitted models are taken as given in both.

Shape legend: n people, f families, k classes that are held against the rest.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from brainfusion.eval.paired import auroc_influence, sign_flip_p
from brainfusion.eval.probing.jobs import Found, People, main_draws
from brainfusion.eval.probing.logistic import one_hot, probabilities
from brainfusion.eval.statistics import LEVEL, fdr, interval
from brainfusion.runtime.errors import UserError, nearest

N_SIGN_FLIPS = 4999
"""Sign patterns behind a p-value of a difference of R2."""

Predictions = dict[tuple[str, str], Found]
"""What was found, by representation and target."""


def differences(
    found: Predictions, pairs: Iterable[tuple[str, str]], people: People, *, seed: int
) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Differences of representations, for each target of both.

    Args:
        found: Out-of-fold predictions, of the same people and folds.
        pairs: Names of two representations: the first less the second.
        people: Whose they are.
        seed: Of sign patterns.

    Returns:
        By the first representation and target, a row for each that it is held against: `against`,
        `difference`, `ci_low`, `ci_high`, `p_value`, `test`.

    Raises:
        UserError: One of them has the confounds taken out of a continuous target and the other has
            not: their R2 are of different parts of it.
    """
    rows: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for first, second in pairs:
        for (name, target), one in found.items():
            other = found.get((second, target))
            if name == first and other is not None:
                row = {"against": second, **_difference(one, other, people, seed)}
                rows.setdefault((first, target), []).append(row)
    return rows


def check_names(pairs: Iterable[Sequence[str]], names: Sequence[str]) -> None:
    """Refuse pairs of what there is no row of.

    Raises:
        UserError: A name that is not there, or one that is compared with itself.
    """
    for first, second in pairs:
        for name in (first, second):
            if name not in names:
                raise UserError(
                    f"a comparison with '{name}', which has no row. {nearest(name, names)}"
                )
        if first == second:
            raise UserError(f"'{first}' is compared with itself: expected two names.")


def adjust(rows: Iterable[tuple[str, list[dict[str, Any]]]]) -> None:
    """Add `q_value` (Benjamini and Hochberg 1995): over the targets of each pair.

    Args:
        rows: The first representation and its comparisons, a target each.
    """
    by_pair: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for first, comparisons in rows:
        for row in comparisons:
            by_pair.setdefault((first, row["against"]), []).append(row)
    for members in by_pair.values():
        for row, q in zip(members, fdr([row["p_value"] for row in members]), strict=True):
            row["q_value"] = float(q)


def _difference(one: Found, other: Found, people: People, seed: int) -> dict[str, Any]:
    if one.target.n_classes is not None:
        return _by_delong(one, other, people)
    if not np.allclose(one.true[2], other.true[2]):
        raise UserError(
            f"the R2 of '{one.name}' and '{other.name}' is not of the same part of "
            f"{one.target.name}: compare two rows with the confounds taken out, or two without."
        )
    value, draws = main_draws(one, people)
    against, others = main_draws(other, people)
    errors = [((f.true[0] - f.true[1]) ** 2).astype(np.float64) for f in (other, one)]
    p = sign_flip_p(errors[0] - errors[1], people.family, n_permutations=N_SIGN_FLIPS, seed=seed)
    row: dict[str, Any] = {"difference": value - against, "p_value": float(p[0])}
    if len(draws):
        row["ci_low"], row["ci_high"] = interval(draws - others)
    return row | {"test": "signs of families"}


def _by_delong(one: Found, other: Found, people: People) -> dict[str, Any]:
    """Difference of the fold-wise AUROC, with DeLong's variance over families."""
    from scipy.stats import norm

    classes = one.target.n_classes
    assert classes is not None
    hot = one_hot(one.true[0], classes).reshape(len(people.folds), -1) > 0
    scores = [_scores(found) for found in (one, other)]
    n_families = int(people.family.max()) + 1
    difference, influence = 0.0, np.zeros(n_families)
    for k in range(scores[0].shape[1]):
        positive, parts = hot[:, k], []
        for fold in np.unique(people.folds):
            rows = people.folds == fold
            n_pairs = positive[rows].sum() * (~positive[rows]).sum()
            if n_pairs:
                both = np.stack([s[rows, k] for s in scores])
                found = auroc_influence(positive[rows], both, people.family[rows], n_families)
                parts.append((n_pairs, *found))
        weights = np.array([n_pairs for n_pairs, *_ in parts], np.float64)
        weights /= weights.sum() * scores[0].shape[1]
        for weight, (_, area, spread) in zip(weights, parts, strict=True):
            difference += weight * (area[0] - area[1])
            influence += weight * (spread[0] - spread[1])
    error = float(np.sqrt(influence @ influence))
    reach = float(norm.ppf((1 + LEVEL) / 2)) * error
    return {
        "difference": float(difference),
        "ci_low": float(difference - reach),
        "ci_high": float(difference + reach),
        "p_value": float(2 * norm.sf(abs(difference) / error)) if error else float(not difference),
        "test": "DeLong",
    }


def _scores(found: Found) -> np.ndarray:
    """[n, k]: what orders people within a fold, as the AUROC of the row does."""
    logits = found.true[1][:, 0].astype(np.float64)
    return logits if logits.shape[1] == 1 else probabilities(logits)

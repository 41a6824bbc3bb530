"""What the best linear-Gaussian model attains on a real cohort, learnt from as many people.

Ridge-CCA is fitted and chosen on some folds of whole families and looked at in another, until each
pair was held out once. The canonical correlations of the held-out pairs give the log density ratio
of a linear-Gaussian cohort, which no score of one pair at a time can beat there (`data.oracle`);
its AUC and recall follow by Monte Carlo. Learnt directions are not the true ones: this is what
linear methods reach with these people, less than an oracle would, and a nonlinear aligner may
exceed it.

Chance is taken out twice. A test asks whether the held-out pairs know of each other at all; if not,
0.5 is attainable. And each squared correlation is less by its sampling variance.

Given a query and two candidates whose scores differ by D, the better one is the partner with
probability 1 / (1 + exp(-|D|)) by Bayes; the mean of that over pairs is the AUC, and is exactly 0.5
without a link.

Sources: Vinod 1976 (ridge CCA); Barlow et al. 1972 (isotonic regression); Cameron and Miller 2015
(variances of clustered observations).

Shape legend: n people, d and e columns, k components, f folds, b bootstrap draws, m Monte Carlo.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from brainfusion.data.cca_choice import choose_cca
from brainfusion.data.oracle import attainable, mutual_information
from brainfusion.eval.components import principal_scores, standardised
from brainfusion.eval.design import group_folds
from brainfusion.eval.statistics import Labels, bootstrap_weights, family_codes, interval
from brainfusion.runtime.errors import UserError
from brainfusion.runtime.threads import one_thread

N_FOLDS = 7
"""Five to fit on, one to choose with, one to look at: near the default split of 70:10:20."""
MAX_COLUMNS = 512
"""Principal components of each table that are looked at."""
LEAST_PEOPLE = 70
"""With fewer, a fold to choose with has under 10."""
_CRITICAL = 1.645
"""One-sided 5%."""
_GREATEST = 0.995


@dataclass(frozen=True, eq=False)
class HeldOut:
    """Variates of people who were held out, each in the fit of their fold."""

    u: np.ndarray
    """[n, k], standardised in each fold; 0 beyond a fold's components."""
    v: np.ndarray
    """[n, k]."""
    weight: np.ndarray
    """[n, k]: what the fold's fit makes of u v, by the people that it was chosen with."""


def attainable_linear(
    x: np.ndarray,
    y: np.ndarray,
    *,
    n_gallery: int,
    families: Labels | None = None,
    covariates: np.ndarray | None = None,
    n_folds: int = N_FOLDS,
    n_bootstrap: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """AUC and recall that a linear-Gaussian model attains on pairs like these.

    Args:
        x: Brain features [n, d], finite.
        y: DNA features [n, e], the same people.
        n_gallery: People in the gallery that recall is for.
        families: Family of each person: folds and the bootstrap keep families whole.
        covariates: [n, c], taken out of both tables by least squares.
        n_folds: Folds of people, 3 or more.
        n_bootstrap: Samples of families for the interval.
        seed: Of folds, bootstrap and Monte Carlo.

    Returns:
        `auc` with `ci_low` and `ci_high`, `recall_at_1`, `recall_at_5`, `recall_at_10` and
        `median_rank` with `_low` and `_high` (those at the ends of the AUC's interval),
        `correlations` (held out, chance taken out, falling), `information_nats`, `p_value` (of any
        link among the held-out pairs), `n_pairs`, `n_folds`, `n_gallery`.

    Raises:
        UserError: Rows that are no pairs, or too few people or families.
    """
    if len(x) != len(y) or len(x) < LEAST_PEOPLE:
        raise UserError(
            f"{len(x)} brains and {len(y)} DNA rows: expected the same {LEAST_PEOPLE} people or "
            "more to estimate what is attainable."
        )
    codes = family_codes(families, len(x))
    with one_thread():
        held_out = cross_fit(x, y, codes, covariates=covariates, n_folds=n_folds, seed=seed)
        p, squares, draws = _squares(held_out, codes, n_bootstrap, seed)
        found = p < 0.05
        rho = np.sqrt(squares) if found else np.zeros(1)
        point = expected_auc(rho, n_draws=20_000, seed=seed)
        near = expected_auc(rho, seed=seed)
        aucs = np.array([point + expected_auc(np.sqrt(d), seed=seed) - near for d in draws])
        aucs = np.maximum(aucs, 0.5)
        low, high = interval(aucs)
        # Without a link there is nothing to be low about.
        low, high = (min(low, point), max(high, point)) if found else (0.5, max(high, 0.5))
        ends = [np.sqrt(draws[np.abs(aucs - end).argmin()]) for end in (low, high)]
        ends[0] = ends[0] if found else np.zeros(1)
        at = [attainable(r, n_gallery=n_gallery, seed=seed) for r in (rho, *ends)]
    ranks = {key: value for key, value in at[0].items() if key != "auc"}
    return {
        "auc": point,
        "ci_low": low,
        "ci_high": high,
        **ranks,
        **{f"{key}_low": at[1][key] for key in ranks},
        **{f"{key}_high": at[2][key] for key in ranks},
        "correlations": [float(value) for value in rho[rho > 0]],
        "information_nats": mutual_information(rho),
        "p_value": p,
        "n_pairs": len(x),
        "n_folds": n_folds,
        "n_gallery": n_gallery,
    }


def expected_auc(rho: np.ndarray, *, n_draws: int = 2000, seed: int = 0) -> float:
    """AUC of the log density ratio between pairs with these canonical correlations [k].

    The same `seed` gives the same people: differences between two `rho` are smooth.
    """
    rng = np.random.default_rng([seed, 5])
    # Component by component, so that one more component leaves the draws of the others.
    difference = np.zeros(n_draws)
    for value in np.asarray(rho, np.float64):
        u, own, other = rng.standard_normal((3, n_draws))
        if value == 0.0:
            continue
        own = value * u + np.sqrt(1 - value**2) * own
        slope, half = value / (1 - value**2), value**2 / (2 * (1 - value**2))
        difference += slope * u * (own - other) - half * (own**2 - other**2)
    return float((1 / (1 + np.exp(-np.abs(difference)))).mean())


def share_of_attainable(auc: float, attainable_auc: float) -> float:
    """How far an AUC has come from chance to what is attainable; NaN where that is chance."""
    top = attainable_auc - 0.5
    return (auc - 0.5) / top if top > 0 else float("nan")


def cross_fit(
    x: np.ndarray,
    y: np.ndarray,
    families: np.ndarray,
    *,
    covariates: np.ndarray | None = None,
    n_folds: int = N_FOLDS,
    seed: int = 0,
) -> HeldOut:
    """Canonical variates of everyone, by fits that have not seen them or their family.

    Args:
        x: [n, d].
        y: [n, e].
        families: Codes [n].
        covariates: [n, c], taken out of both.
        n_folds: Of them, one is looked at and one chosen with in each turn.
        seed: Of the folds.
    """
    if n_folds < 3:
        raise UserError(f"n_folds={n_folds}: expected 3 or more: to fit on, choose with, look at.")
    fold = group_folds(families, n_folds, balance=np.zeros((len(x), 0)), seed=seed)
    # Neither looks at who belongs to whom, so everyone may be in both.
    x, y = (_reduced(values, covariates) for values in (x, y))
    if not x.shape[1] or not y.shape[1]:
        raise UserError("all people have the same features: nothing can be attained from them.")
    parts: list[tuple[np.ndarray, ...]] = []
    for f in range(n_folds):
        look, choose = fold == f, fold == (f + 1) % n_folds
        fit = ~(look | choose)
        cca, rho = choose_cca(x[fit], y[fit], x[choose], y[choose])
        u, v = (_standard(z) for z in (cca.variates_x(x[look]), cca.variates_y(y[look])))
        parts.append((np.flatnonzero(look), u, v, rho / (1 - rho**2)))
    k = max(part[1].shape[1] for part in parts)
    out = HeldOut(*(np.zeros((len(x), k)) for _ in range(3)))
    for rows, u, v, weight in parts:
        own = u.shape[1]
        out.u[rows, :own], out.v[rows, :own], out.weight[rows, :own] = u, v, weight
    return out


def _reduced(values: np.ndarray, covariates: np.ndarray | None) -> np.ndarray:
    """Standardised columns without the covariates, in their principal components, float64."""
    values = standardised(values)
    if covariates is not None and covariates.shape[1]:
        design = covariates - covariates.mean(axis=0)
        values = values - design @ np.linalg.lstsq(design, values, rcond=1e-6)[0]
    return principal_scores(values, MAX_COLUMNS)


def _standard(values: np.ndarray) -> np.ndarray:
    values = values - values.mean(axis=0)
    spread = values.std(axis=0)
    return values / np.where(spread > 0, spread, 1)


def _squares(
    held_out: HeldOut, families: np.ndarray, n_bootstrap: int, seed: int
) -> tuple[float, np.ndarray, np.ndarray]:
    """p-value of any link, squared correlations [k], and bootstrap draws of them [b, k]."""
    products = held_out.u * held_out.v
    p = _p_value((held_out.weight * products).sum(axis=1), families)
    n_families = int(families.max()) + 1
    totals = np.zeros((3, n_families, products.shape[1]))
    present = held_out.u.any(axis=0)
    # A fold without a component has a correlation of 0 there, and counts.
    for total, values in zip(
        totals,
        (products, _counted(held_out.u), _counted(held_out.v)),
        strict=True,
    ):
        np.add.at(total, families, values)
    r = _correlation(totals.sum(axis=1))
    variance = _clustered_variance(products - r * (products != 0), families)
    squares = _falling(np.sign(r) * r**2 - variance)
    weights = bootstrap_weights(n_families, n_bootstrap, seed).astype(np.float64)
    drawn = _correlation(np.einsum("bf,sfk->sbk", weights, totals, optimize=True))
    # A draw strays from the estimate as the estimate does from the truth.
    draws = np.stack([_falling(np.sign(d) * d**2 - 2 * variance) for d in drawn])
    return p, squares[present], draws[:, present]


def _counted(values: np.ndarray) -> np.ndarray:
    return np.where(values == 0, 1.0, values**2)


def _correlation(sums: np.ndarray) -> np.ndarray:
    return sums[0] / np.sqrt(np.maximum(sums[1] * sums[2], np.finfo(float).tiny))


def _falling(squares: np.ndarray) -> np.ndarray:
    """The nearest falling sequence, not below 0: the fit orders its components."""
    from scipy.optimize import isotonic_regression

    return np.clip(isotonic_regression(squares, increasing=False).x, 0, _GREATEST**2)


def _clustered_variance(values: np.ndarray, families: np.ndarray) -> np.ndarray:
    """Variance of the mean of values [n, k] whose families are independent."""
    sums = np.zeros((int(families.max()) + 1, values.shape[1]))
    np.add.at(sums, families, values)
    return (sums**2).sum(axis=0) / len(values) ** 2


def _p_value(values: np.ndarray, families: np.ndarray) -> float:
    """One-sided: is the mean of values [n] above 0? Families are independent."""
    from scipy.stats import norm

    variance = _clustered_variance(values[:, None], families)[0]
    return float(norm.sf(values.mean() / np.sqrt(variance))) if variance > 0 else 1.0

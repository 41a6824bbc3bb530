"""What a study can find: attainable retrieval, the power of its test, the people that it needs.

Start from an assumption: the canonical correlations between brains and DNA in the population. They
fix the best possible score of a pair (`data.oracle`), and with it

- the AUC, the same in a gallery of any size, exactly (`best_auc`), and R@k and median rank in a
  gallery of n, by simulation;
- the power of the permutation test of that AUC with n test people, by a normal approximation:

      power(n) = Phi((AUC - 1/2 - z_alpha s0 / sqrt(n)) / (s1 / sqrt(n)))

  with s0 the spread of the AUC when partners are reassigned and s1 its spread over cohorts, both
  simulated, so the dependence between queries of one gallery is in them. Held against tests that
  were done in `benchmarks/calibration.py`.

All this is for someone who knows the link. Training on finite people loses a part, for which there
is no closed form. `after_training` simulates one case: canonical correlation analysis without
penalty of Gaussian features, which does not depend on their scales and mixtures; only on their
numbers. A penalty, or features whose leading directions carry the link, can do better.

Test people are taken as unrelated. Relatives count for less: with families give their number.

Sources: Imhof 1961, Biometrika (the distribution of a quadratic form of Gaussians); Anderson 2003,
An Introduction to Multivariate Statistical Analysis, ch. 7 and 12 (Wishart matrices by Bartlett's
decomposition, canonical correlations).

Shape legend: n people, k canonical correlations, p and q features of the two sides, c cohorts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from brainfusion.data.oracle import attainable, inner_product_form, mutual_information
from brainfusion.eval.statistics import midranks
from brainfusion.runtime.errors import UserError

ALPHA, POWER = 0.05, 0.8
"""The test's level (one-sided) and the power that a study is planned for."""
FEWEST = 10
"""People below whom the normal approximation says nothing: the smallest answer of `n_needed`."""

_COHORT, _N_COHORTS = 200, 2000
_COMPARISONS = 10**8


@dataclass(frozen=True, kw_only=True)
class Effect:
    """The AUC of a link and its spread; divide the spreads by sqrt(n)."""

    auc: float
    null_spread: float
    """Of the AUC under reassignment of partners, times sqrt(n)."""
    spread: float
    """Of the AUC over cohorts, times sqrt(n)."""

    def power(self, n: int, alpha: float = ALPHA) -> float:
        """Share of cohorts of `n` whose one-sided permutation p is below `alpha`."""
        from scipy.stats import norm

        _check(n, alpha)
        needed = norm.isf(alpha) * self.null_spread / np.sqrt(n)
        return float(norm.cdf((self.auc - 0.5 - needed) / (self.spread / np.sqrt(n))))

    def n_needed(self, power: float = POWER, alpha: float = ALPHA) -> int | None:
        """Test people for that power, `FEWEST` or more; None if there is nothing to find."""
        from scipy.stats import norm

        if self.auc <= 0.5:
            return None
        reach = norm.isf(alpha) * self.null_spread + norm.ppf(power) * self.spread
        return max(FEWEST, int(np.ceil((max(reach, 0.0) / (self.auc - 0.5)) ** 2)))


def best_auc(rho: Sequence[float]) -> float:
    """The AUC of the best possible score of a pair: chance that a partner beats a stranger; exact.

    The score of the partner v less that of a stranger v' is, for a query u, the quadratic form

        sum of rho^2 / (2 (1 - rho^2)) [(v' - u / rho)^2 - (v - u / rho)^2]

    of Gaussians; that it is positive is one integral over its eigenvalues (Imhof 1961, eq. 3.2).

    Args:
        rho: Canonical correlations, strictly between -1 and 1.

    Raises:
        UserError: A correlation is not.
    """
    values = np.asarray(rho, np.float64)
    if not (np.abs(values) < 1).all():
        raise UserError("a canonical correlation is not strictly between -1 and 1.")
    eigenvalues = []
    for r in np.abs(values[values != 0]):
        root = np.linalg.cholesky([[1, r, 0], [r, 1, 0], [0, 0, 1]])
        form = r / (2 * (1 - r**2)) * np.array([[0, 1, -1], [1, -r, 0], [-1, 0, r]])
        eigenvalues.append(np.linalg.eigvalsh(root.T @ form @ root))
    # In log t the integrand is smooth and falls off exponentially: equal steps are exact enough.
    log_t, step = np.linspace(-45, 45, 4501, retstep=True)
    turned = np.exp(log_t)[:, None] * np.concatenate([*eigenvalues, [0.0]])
    angle = np.arctan(turned).sum(axis=1) / 2
    damped = np.sin(angle) * np.exp(-np.log1p(turned**2).sum(axis=1) / 4)
    return float(0.5 + damped.sum() * step / np.pi)


@cache
def effect_of(rho: tuple[float, ...], seed: int = 0) -> Effect:
    """The effect of canonical correlations; the spreads by simulating cohorts.

    Args:
        rho: Canonical correlations, strictly between -1 and 1.
        seed: Of the cohorts; their spreads are known to about 2 %.
    """
    auc, known = best_auc(rho), np.array([value for value in rho if value])
    null_spread = float(np.sqrt((_COHORT + 1) / (12 * (_COHORT - 1))))
    if not len(known):
        return Effect(auc=auc, null_spread=null_spread, spread=null_spread)
    rng = np.random.default_rng([seed, 6])
    aucs, reassigned = np.empty(_N_COHORTS), []
    for cohort in range(_N_COHORTS):
        u = rng.standard_normal((_COHORT, len(known)))
        v = known * u + np.sqrt(1 - known**2) * rng.standard_normal(u.shape)
        queries, gallery = inner_product_form(u, v, known)
        scores = queries @ gallery.T
        aucs[cohort] = (scores < np.diag(scores)[:, None]).sum() / (_COHORT * (_COHORT - 1))
        if cohort < _N_COHORTS // 10:
            reassigned.append(_reassigned_variance(scores))
    return Effect(
        auc=auc,
        null_spread=float(np.sqrt(np.mean(reassigned) * _COHORT)),
        spread=float(aucs.std(ddof=1) * np.sqrt(_COHORT)),
    )


def correlation_for(auc: float, n_components: int = 1) -> float:
    """The canonical correlation that, `n_components` times over, attains this AUC.

    Raises:
        UserError: The AUC is not above 0.5, or above what correlations of 0.999 attain.
    """
    if not 0.5 < auc < 1:
        raise UserError(f"auc={auc}: expected a number between 0.5 (chance) and 1.")
    low, high = 0.0, 0.999
    if best_auc([high] * n_components) < auc:
        raise UserError(
            f"auc={auc}: {n_components} canonical correlation(s) below {high} attain less; give "
            "more components."
        )
    while high - low > 1e-6:
        middle = (low + high) / 2
        below = best_auc([middle] * n_components) < auc
        low, high = (middle, high) if below else (low, middle)
    return (low + high) / 2


def plan(
    rho: Sequence[float],
    n: Sequence[int],
    *,
    alpha: float = ALPHA,
    power: float = POWER,
    seed: int = 0,
) -> dict[str, Any]:
    """What is attainable, and with which power, for each number of test people.

    Args:
        rho: Canonical correlations assumed.
        n: Numbers of test people, who are the gallery as well.
        alpha: Level of the one-sided test.
        power: What `n_needed` is for.
        seed: Of the simulations.

    Returns:
        `correlations`, `mutual_information` (nats), `auc`, `alpha`, `target_power`, `n_needed`, and
        `rows`, one for each n: `n`, `auc`, `recall_at_k` with `recall_at_k_chance` (k = 1, 5, 10),
        `median_rank` with `median_rank_chance`, `power`, `smallest_detectable_auc`.
    """
    effect = effect_of(tuple(float(value) for value in rho), seed)
    rows = []
    for people in n:
        _check(people, alpha)
        n_draws = min(max(_COMPARISONS // people, 4000), 200_000)
        best = attainable(rho, n_gallery=people, n_draws=n_draws, seed=seed)
        chance = attainable([], n_gallery=people)
        row: dict[str, Any] = {"n": people, "auc": effect.auc}
        for name in ("recall_at_1", "recall_at_5", "recall_at_10", "median_rank"):
            row |= {name: best[name], f"{name}_chance": chance[name]}
        row["power"] = effect.power(people, alpha)
        row["smallest_detectable_auc"] = smallest_detectable_auc(people, alpha=alpha, power=power)
        rows.append(row)
    return {
        "correlations": [float(value) for value in rho],
        "mutual_information": mutual_information(rho) + 0.0,
        "auc": effect.auc,
        "alpha": alpha,
        "target_power": power,
        "n_needed": effect.n_needed(power, alpha),
        "rows": rows,
    }


def smallest_detectable_auc(n: int, *, alpha: float = ALPHA, power: float = POWER) -> float:
    """The AUC that a one-sided permutation test of `n` unrelated people finds with this power.

    Ranks of unlinked people are uniform, so 1/2 is found off by sqrt((n + 1) / (12 n (n - 1))); a
    weak link leaves that spread as it is. Never above 1.
    """
    from scipy.stats import norm

    _check(n, alpha)
    error = np.sqrt((n + 1) / (12 * n * (n - 1)))
    return float(min(1.0, 0.5 + (norm.isf(alpha) + norm.ppf(power)) * error))


def after_training(
    rho: Sequence[float], n_train: int, dims: tuple[int, int], *, n_repeats: int = 10, seed: int = 0
) -> np.ndarray:
    """Canonical correlations that are left in the components fitted on `n_train` people.

    Covariances of the training people are drawn (a Wishart matrix), the analysis is fitted to them,
    and what its k leading components share in the population is computed: no score of these
    components can do better than the oracle of the correlations returned.

    Args:
        rho: Canonical correlations of the population, k of them.
        n_train: Training people.
        dims: Features of the two sides, p and q, each k or more; together fewer than `n_train`.
        n_repeats: Training sets drawn.
        seed: Of the draws.

    Returns:
        [k], largest first, mean over training sets.

    Raises:
        UserError: More features than people: such a fit finds perfect correlations in noise.
    """
    known = np.asarray(rho, np.float64)
    k, (p, q) = len(known), dims
    if min(dims) < k:
        raise UserError(
            f"{p} and {q} features cannot carry {k} canonical correlations: give more features or "
            "fewer components."
        )
    if p + q >= n_train:
        raise UserError(
            f"{p} + {q} features of {n_train} training people: canonical correlation analysis "
            f"without penalty needs fewer features than people; reduce them (PCA) below {n_train}."
        )
    cross = np.zeros((p, q))
    cross[np.arange(k), np.arange(k)] = known
    root = np.linalg.cholesky(np.block([[np.eye(p), cross], [cross.T, np.eye(q)]]))
    rng = np.random.default_rng([seed, 7])
    left = [_left(root @ _bartlett(p + q, n_train - 1, rng), cross, k) for _ in range(n_repeats)]
    return np.mean(left, axis=0)


def _left(factor: np.ndarray, cross: np.ndarray, k: int) -> np.ndarray:
    """Population correlations [k] between the leading components of a sample covariance.

    `factor` is its root [p + q, p + q].
    """
    p = len(cross)
    sample = factor @ factor.T
    roots = [np.linalg.cholesky(part) for part in (sample[:p, :p], sample[p:, p:])]
    whitened = np.linalg.solve(roots[0], sample[:p, p:])
    whitened = np.linalg.solve(roots[1], whitened.T).T
    first, _, second = np.linalg.svd(whitened, full_matrices=False)
    # Orthonormal bases of what the fitted components span: the population is white.
    spans = [
        np.linalg.qr(np.linalg.solve(root.T, directions[:, :k]))[0]
        for root, directions in zip(roots, (first, second.T), strict=True)
    ]
    return np.linalg.svd(spans[0].T @ cross @ spans[1], compute_uv=False)


def _bartlett(n_features: int, n_free: int, rng: np.random.Generator) -> np.ndarray:
    """Lower triangular root of a Wishart matrix of identity scale with `n_free` degrees."""
    root = np.tril(rng.standard_normal((n_features, n_features)), -1)
    root[np.diag_indices(n_features)] = np.sqrt(rng.chisquare(n_free - np.arange(n_features)))
    return root


def _reassigned_variance(scores: np.ndarray) -> float:
    """Variance of the AUC over all reassignments of partners (the permutation null), exactly."""
    n = len(scores)
    outranked = (midranks(scores).astype(np.float64) - 1) / (n - 1)
    outranked -= outranked.mean(axis=0)
    outranked -= outranked.mean(axis=1, keepdims=True)
    return float((outranked**2).sum() / (n - 1) / n**2)


def _check(n: int, alpha: float) -> None:
    if n < 2:
        raise UserError(f"n={n}: a gallery needs 2 people or more.")
    if not 0 < alpha < 1:
        raise UserError(f"alpha={alpha}: expected a level strictly between 0 and 1.")

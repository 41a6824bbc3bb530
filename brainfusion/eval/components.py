"""Principal components of everyone in a table, from the smaller of its Gram matrices.

Shape legend: n people, d columns, k components.
"""

import numpy as np


def standardised(values: np.ndarray) -> np.ndarray:
    """Columns of mean 0 and variance 1, float64 [n, d']; columns that do not vary are left out."""
    values = np.asarray(values, np.float64)
    values = values - values.mean(axis=0)
    spread = values.std(axis=0)
    varies = spread > 1e-6 * max(float(spread.max(initial=0.0)), np.finfo(float).tiny)
    return values[:, varies] / spread[varies]


def principal_scores(values: np.ndarray, limit: int, *, share: float = 1.0) -> np.ndarray:
    """Scores on the principal axes of centred rows, the largest first.

    Args:
        values: float64 [n, d], centred.
        limit: Components at most.
        share: Of the variance that the components together hold; those beyond it are left out.

    Returns:
        float64 [n, k], with the variance that the components have.
    """
    if not values.shape[1]:
        return np.zeros((len(values), 0))
    wide = values.shape[1] > len(values)
    found, vectors = np.linalg.eigh(values @ values.T if wide else values.T @ values)
    found, vectors = found[::-1], vectors[:, ::-1]
    # A Gram matrix squares the singular values: 1e-10 of the largest is near its rounding error.
    k = int((found > 1e-10 * found[0]).sum())
    if share < 1:
        k = min(k, int(np.searchsorted(found.cumsum(), share * found.sum())) + 1)
    k = min(k, limit)
    return vectors[:, :k] * np.sqrt(found[:k]) if wide else values @ vectors[:, :k]

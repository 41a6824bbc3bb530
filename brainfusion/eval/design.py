"""What a fair comparison of representations shares: folds of whole families, and covariates.

Shape legend: n people, c counts to even out, q covariate columns.
"""

from collections.abc import Sequence

import numpy as np
import polars as pl

from brainfusion.runtime.errors import UserError


def group_folds(
    families: np.ndarray, n_folds: int, *, balance: np.ndarray, seed: int = 0
) -> np.ndarray:
    """Assign whole families to folds, evenly in size and in other counts.

    Args:
        families: Codes [n].
        n_folds: How many.
        balance: What else should be even, [n, c] of 0 and 1 (classes, sites).
        seed: Of the order of equally large families.

    Returns:
        Fold numbers [n].

    Raises:
        UserError: Fewer families than folds.
    """
    n_families = int(families.max()) + 1
    if n_families < n_folds:
        raise UserError(
            f"{n_families} families for {n_folds} folds: a family stays in one fold; ask for fewer "
            "folds or add people."
        )
    counts = np.zeros((n_families, 1 + balance.shape[1]))
    np.add.at(counts, families, np.concatenate([np.ones((len(families), 1)), balance], axis=1))
    shuffled = np.random.default_rng([seed, 4]).permutation(n_families)
    order = shuffled[np.argsort(-counts[shuffled, 0], kind="stable")]
    wanted = np.maximum(counts.sum(axis=0) / n_folds, 1)
    filled, fold = np.zeros((n_folds, counts.shape[1])), np.empty(n_families, np.int64)
    for family in order:
        # The fold that lacks most of what this family brings.
        gain = ((filled / wanted) * counts[family]).sum(axis=1) + filled[:, 0] / wanted[0]
        fold[family] = gain.argmin()
        filled[fold[family]] += counts[family]
    return fold[families]


def covariate_matrix(subjects: pl.DataFrame, columns: Sequence[str]) -> np.ndarray:
    """Covariates as numbers [n, q]: standardised, or one column a level but the first.

    A missing number becomes the mean and gets an indicator column; a missing label is a level.
    """
    parts: list[np.ndarray] = []
    for name in columns:
        column = subjects[name]
        if column.dtype.is_numeric():
            values = column.cast(pl.Float64).fill_null(float("nan")).to_numpy()
            missing = ~np.isfinite(values)
            if missing.all():
                continue
            values = np.where(missing, values[~missing].mean(), values)
            spread = values.std()
            parts.append((values - values.mean()) / (spread if spread > 0 else 1.0))
            if missing.any():
                parts.append(missing.astype(np.float64))
        else:
            text = column.cast(pl.String).fill_null("").to_numpy()
            parts += [(text == level).astype(np.float64) for level in np.unique(text)[1:]]
    return np.stack(parts, axis=1) if parts else np.empty((subjects.height, 0))

"""CCA with permutation: how many components two sets of features share, and how strongly.

The test of component k takes the earlier components out of both sides first: with orthonormal
views Qx, Qy and the singular value decomposition Qx'Qy = L D M', the pairs are permuted in the
coordinates U = Qx L, V = Qy M, and component k is judged by the trailing block (U'PV)[k:, k:], so
that a strong first component neither hides nor feigns a second one. p-values are made monotone from
the first component on, which controls the family-wise error over components (Winkler, Renaud, Smith
and Nichols 2020, NeuroImage 220:117065). People are permuted in whole families within blocks.

Statistics: Wilks' lambda of the components from k on, as -sum log(1 - r^2), which one Cholesky
factorisation a permutation gives for every k; or Roy's largest root, r_k.

Nuisance columns (age, sex, site) are regressed out of both sides as Theil (1965) does, to as many
rows fewer as there are columns: plain residuals are not exchangeable, these are, and unlike those
of Huh and Jhun (2001) each still belongs to a person, and so to a family.

Held-out correlations come from folds of whole families, refitted in each; their p-values repeat
that with families permuted within folds.

Shape legend: n people, d and e widths, p and q ranks of the sides, k components, b permutations.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from brainfusion.eval.design import group_folds
from brainfusion.eval.statistics import (
    Labels,
    block_codes,
    block_permutations,
    bootstrap_weights,
    family_codes,
    interval,
    p_value,
)
from brainfusion.runtime.errors import UserError
from brainfusion.runtime.threads import one_thread

_SOLID = 1e-10
"""Eigenvalues of a covariance below this share of the largest are rounding."""


@dataclass(frozen=True, kw_only=True, eq=False)
class CCATest:
    """What `cca_test` found; arrays are [k], one value a component."""

    correlations: np.ndarray
    """In the people fitted on: always too high for anyone else."""
    p_values: np.ndarray
    """Of each component with the earlier ones taken out, not corrected."""
    p_family_wise: np.ndarray
    """The largest of the p-values so far: components below 0.05 are there, at 5% family-wise."""
    held_out: np.ndarray
    """Correlations in people that the directions were not fitted on; NaN without folds."""
    ci_low: np.ndarray
    """95% interval of `held_out`, by bootstrap of families."""
    ci_high: np.ndarray
    p_held_out: np.ndarray
    """One-sided: of as high a held-out correlation among permuted people; NaN without folds."""
    null_low: np.ndarray
    """Ends of the middle 95% of held-out correlations of permuted people; NaN without any."""
    null_high: np.ndarray
    n: int
    """People."""
    n_columns: tuple[int, int]
    """Columns or principal components of the two sides."""

    def rows(self) -> list[dict[str, float | int]]:
        """One a component, for JSON; what was not computed is left out."""
        names = ("correlations", "p_values", "p_family_wise", "held_out", "ci_low", "ci_high")
        rows = []
        for i in range(len(self.correlations)):
            row: dict[str, float | int] = {"component": i + 1, "n": self.n}
            for name in (*names, "p_held_out", "null_low", "null_high"):
                value = float(getattr(self, name)[i])
                if np.isfinite(value):
                    row[name.removesuffix("s")] = value
            rows.append(row)
        return rows


def cca_test(
    x: np.ndarray,
    y: np.ndarray,
    *,
    nuisance: np.ndarray | None = None,
    families: Labels | None = None,
    blocks: Labels | None = None,
    n_components: int = 3,
    n_pcs: int | None = None,
    ridge: float = 0.0,
    statistic: Literal["wilks", "roy"] = "wilks",
    n_permutations: int = 1000,
    n_folds: int = 5,
    n_held_out_permutations: int = 199,
    n_bootstrap: int = 500,
    seed: int = 0,
) -> CCATest:
    """Test the canonical correlations of two views of the same people.

    Args:
        x: [n, d], row i and row i of `y` are one person.
        y: [n, e].
        nuisance: Columns to take out of both sides, [n, z]; the mean always is.
        families: Whole families are permuted, resampled and held out.
        blocks: Within what people are exchangeable, for example their site.
        n_components: How many to test.
        n_pcs: Leading principal components of each side to keep; all columns if omitted.
        ridge: Share of the mean variance added to each side's; 0 is plain CCA.
        statistic: "wilks" sums over the components from each on, "roy" is of each alone.
        n_permutations: For the p-values in the people fitted on.
        n_folds: For held-out correlations; 0 for none.
        n_held_out_permutations: For their p-values; each refits every fold. 0 for none.
        n_bootstrap: For their intervals; 0 for none.
        seed: Of permutations, folds and bootstrap.

    Raises:
        UserError: No pairs, or more columns than people can tell apart.
    """
    x, y, z = _checked(x, y, nuisance, n_components, ridge)
    with one_thread():
        kept, left = np.arange(len(x)), [x - x.mean(axis=0), y - y.mean(axis=0)]
        if z is not None:
            kept, left = theil(z, [x, y])
        sides = [_whitened(side, n_pcs, ridge) for side in left]
        n_columns = sides[0].shape[1], sides[1].shape[1]
        if not ridge and sum(n_columns) >= len(kept):
            raise UserError(
                f"CCA of {n_columns[0]} and {n_columns[1]} columns in {len(kept)} people fits "
                "anything: expected fewer columns than people together; give n_pcs (a quarter of "
                "the people or fewer) or a ridge."
            )
        k = min(n_components, *n_columns)
        about = (_some(families, kept), _some(blocks, kept))
        moves = block_permutations(len(kept), *about, n_permutations, seed)
        rotated = _rotated(*sides)
        observed = trailing(*rotated, np.arange(len(kept))[None], k, statistic)[0]
        null = trailing(*rotated, moves, k, statistic)
        p = np.array([p_value(observed[i], null[:, i]) for i in range(k)])
        counts = n_folds, n_held_out_permutations, n_bootstrap
        held = _held_out(left[0], left[1], about, k, n_pcs, ridge, counts, seed)
    correlations = _correlations(rotated[0][:, :k], rotated[1][:, :k])
    return CCATest(
        correlations=correlations,
        p_values=p,
        p_family_wise=np.maximum.accumulate(p),
        **held,
        n=len(kept),
        n_columns=n_columns,
    )


def trailing(
    u: np.ndarray, v: np.ndarray, moves: np.ndarray, k: int, statistic: str = "wilks"
) -> np.ndarray:
    """The statistic of each component when the rows of one side are moved, float64 [b, k].

    Args:
        u: Canonical variates of one side, [n, p]; orthonormal without ridge.
        v: Of the other, [n, q].
        moves: Permutations [b, n]: row i is paired with what row `moves[b, i]` had.
        k: Components.
        statistic: "wilks" or "roy".
    """
    # float32 products: a correlation is right to 1e-6, and the observed one is made likewise.
    left, right = np.ascontiguousarray(u.T, np.float32), np.ascontiguousarray(v, np.float32)
    judge = _wilks if statistic == "wilks" else _roy
    out = np.empty((len(moves), k))
    for i, move in enumerate(moves):
        cross = (left @ right[move]).astype(np.float64)
        out[i] = judge(cross if len(cross) <= cross.shape[1] else cross.T, k)
    return out


def _wilks(cross: np.ndarray, k: int) -> np.ndarray:
    """-log det(I - B B') of each trailing block B = C[i:, i:], i < k, of C [p, q].

    With G = I - C C' and W = C[i:, :i], I - B B' is G[i:, i:] + W W'. One factorisation of G, from
    the end, has those of all its trailing blocks; W has few columns.
    """
    from scipy.linalg import solve_triangular

    p = len(cross)
    back = cross[::-1]
    factor = np.linalg.cholesky(np.eye(p) - back @ back.T)
    log_det = 2 * np.cumsum(np.log(np.diag(factor)))
    out = np.empty(k)
    for i in range(k):
        size, small = p - i, 0.0
        if i:
            w = solve_triangular(factor[:size, :size], back[:size, :i], lower=True)
            small = np.linalg.slogdet(np.eye(i) + w.T @ w)[1]
        out[i] = -(log_det[size - 1] + small)
    return out


def _roy(cross: np.ndarray, k: int) -> np.ndarray:
    """The largest singular value of each trailing block."""
    from scipy.linalg import eigh

    out = np.empty(k)
    for i in range(k):
        block = cross[i:, i:]
        last = [len(block) - 1] * 2
        out[i] = eigh(block @ block.T, eigvals_only=True, subset_by_index=last)[0]
    return np.sqrt(np.maximum(out, 0))


def theil(z: np.ndarray, views: list[np.ndarray]) -> tuple[np.ndarray, list[np.ndarray]]:
    """Residuals that are exchangeable: best linear unbiased with a scalar covariance (Theil 1965).

    Args:
        z: Columns to take out, [n, z]; the mean is added.
        views: Each [n, d].

    Returns:
        The rows that are left, and each view's residuals of them, [n - rank, d]. What they are
        made with, Q, has Q'Q = I and Q'Z = 0. The rows that are left out are those that tell most
        about the columns.
    """
    from scipy.linalg import qr

    z = np.column_stack([np.ones(len(z)), z])
    basis, sizes, _ = np.linalg.svd(z / np.maximum(np.linalg.norm(z, axis=0), 1e-300), False)
    basis = basis[:, sizes > 1e-9 * sizes[0]]
    rank = basis.shape[1]
    order: np.ndarray = qr(basis.T, mode="economic", pivoting=True)[-1]  # pyright: ignore
    kept = np.sort(order[rank:])
    # S (I - BB') S' is I - WW' with W = SB: its inverse root differs from I in `rank` directions.
    found, vectors = np.linalg.eigh(basis[kept].T @ basis[kept])
    solid = found > 1e-12
    axes = basis[kept] @ (vectors[:, solid] / np.sqrt(found[solid]))
    grown = 1 / np.sqrt(1 - found[solid]) - 1
    out = []
    for view in views:
        left = (view - basis @ (basis.T @ view))[kept]
        out.append(left + axes @ (grown[:, None] * (axes.T @ left)))
    return kept, out


# -- held out --------------------------------------------------------------------------------------


def _held_out(
    x: np.ndarray,
    y: np.ndarray,
    about: tuple[list[object] | None, list[object] | None],
    k: int,
    n_pcs: int | None,
    ridge: float,
    counts: tuple[int, int, int],
    seed: int,
) -> dict[str, np.ndarray]:
    """The held-out fields of `CCATest`, [k] each; NaN where they are not asked for."""
    n_folds, n_permutations, n_bootstrap = counts
    names = ("held_out", "ci_low", "ci_high", "p_held_out", "null_low", "null_high")
    out = {name: np.full(k, np.nan) for name in names}
    if not n_folds:
        return out
    n, (families, blocks) = len(x), about
    family, block = family_codes(families, n), block_codes(blocks, n)
    even = (block[:, None] == np.arange(block.max() + 1)).astype(np.float64)
    folds = group_folds(family, n_folds, balance=even, seed=seed)
    parts = [_Fold(x, y, folds == f, n_pcs, ridge) for f in range(n_folds)]
    pairs = [part.variates(np.arange(n), k) for part in parts]
    u, v = (np.concatenate([pair[side] for pair in pairs]) for side in (0, 1))
    rows = np.concatenate([part.rows for part in parts])
    out["held_out"] = held = _correlations(u, v)
    if n_bootstrap:
        draws = bootstrap_weights(int(family.max()) + 1, n_bootstrap, seed)[:, family[rows]]
        sums = [draws @ one for one in (u * v, u * u, v * v)]
        resampled = sums[0] / np.sqrt(np.maximum(sums[1] * sums[2], 1e-300))
        out["ci_low"], out["ci_high"] = _ends(resampled)
    if n_permutations:
        within = (block * n_folds + folds).tolist()
        drawn = []
        for move in block_permutations(n, families, within, n_permutations, seed):
            moved = [part.variates(move, k) for part in parts]
            drawn.append(_correlations(*(np.concatenate([m[s] for m in moved]) for s in (0, 1))))
        null = np.array(drawn)
        out["p_held_out"] = np.array([p_value(held[i], null[:, i]) for i in range(k)])
        out["null_low"], out["null_high"] = _ends(null)
    return out


def _ends(draws: np.ndarray) -> np.ndarray:
    """The middle 95% of draws [b, k]: [2, k]."""
    return np.array([interval(column) for column in draws.T]).T


class _Fold:
    """A fold held out: both sides in the whitened axes of its training people."""

    def __init__(
        self, x: np.ndarray, y: np.ndarray, held: np.ndarray, n_pcs: int | None, ridge: float
    ) -> None:
        self.rows, self._train = np.flatnonzero(held), np.flatnonzero(~held)
        self._sides = []
        for view in (x, y):
            mean = view[self._train].mean(axis=0)
            self._sides.append((view - mean) @ _whitening(view[self._train] - mean, n_pcs, ridge))

    def variates(self, move: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Of the people held out, centred, by directions of the others: [m, k] a side.

        `move` may not take anyone across folds: each side's axes stay as they are.
        """
        from scipy.linalg import eigh

        x, y = self._sides
        cross = x[self._train].T @ y[move[self._train]]
        flip = cross.shape[0] > cross.shape[1]
        cross = cross.T if flip else cross
        size = len(cross)
        kept = [max(size - k, 0), size - 1]
        vectors = eigh(cross @ cross.T, subset_by_index=kept)[1][:, ::-1]
        others = cross.T @ vectors
        others /= np.maximum(np.linalg.norm(others, axis=0), 1e-300)
        first, second = (others, vectors) if flip else (vectors, others)
        u, v = x[self.rows] @ first, y[move[self.rows]] @ second
        return u - u.mean(axis=0), v - v.mean(axis=0)


# -- one side --------------------------------------------------------------------------------------


def _whitening(centred: np.ndarray, n_pcs: int | None, ridge: float) -> np.ndarray:
    """[d, r]: to principal components of unit norm (less, with ridge) in these rows."""
    wide = centred.shape[1] > len(centred)
    values, vectors = np.linalg.eigh(centred @ centred.T if wide else centred.T @ centred)
    solid = values > _SOLID * max(values[-1], 0)
    if not solid.any():
        raise UserError("all people have the same features: nothing can be correlated.")
    axes = centred.T @ (vectors[:, solid] / np.sqrt(values[solid])) if wide else vectors[:, solid]
    values, n_columns = values[solid], centred.shape[1]
    if n_pcs is not None:
        axes, values = axes[:, -n_pcs:], values[-n_pcs:]
        n_columns = len(values)
    return axes / np.sqrt(values + ridge * values.sum() / n_columns)


def _whitened(centred: np.ndarray, n_pcs: int | None, ridge: float) -> np.ndarray:
    return centred @ _whitening(centred, n_pcs, ridge)


def _rotated(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Canonical variates of both sides, with those that have no partner: [n, p] and [n, q]."""
    left, _, right = np.linalg.svd(x.T @ y, full_matrices=True)
    return x @ left, y @ right.T


def _correlations(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    size = np.sqrt((u**2).sum(axis=0) * (v**2).sum(axis=0))
    return np.divide((u * v).sum(axis=0), size, out=np.zeros(u.shape[1]), where=size > 0)


def _some(labels: Labels | None, kept: np.ndarray) -> list[object] | None:
    if labels is None:
        return None
    values = labels.tolist() if isinstance(labels, np.ndarray) else list(labels)
    return [values[i] for i in kept]


def _checked(
    x: np.ndarray, y: np.ndarray, nuisance: np.ndarray | None, n_components: int, ridge: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y) or len(x) < 10:
        raise UserError(
            f"views of shapes {x.shape} and {y.shape}: expected 10 rows or more, row i of both "
            "from one person."
        )
    if n_components < 1 or ridge < 0:
        raise UserError(
            f"n_components={n_components}, ridge={ridge}: expected one component or more and a "
            "ridge of 0 or more."
        )
    if nuisance is None or not nuisance.shape[1]:
        z = None
    elif len(nuisance) != len(x):
        raise UserError(
            f"nuisance has {len(nuisance)} rows for {len(x)} people: give one a person."
        )
    else:
        z = np.asarray(nuisance, np.float64)
    for name, values in (("x", x), ("y", y), ("nuisance", z)):
        if values is not None and not np.isfinite(values).all():
            raise UserError(f"{name} has NaN or infinite values: fill or drop them first.")
    return np.asarray(x, np.float64), np.asarray(y, np.float64), z
